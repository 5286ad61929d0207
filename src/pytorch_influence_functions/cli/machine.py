"""Memory and disk of this machine, and sizes and durations as text."""

import os
import shutil
from pathlib import Path

import torch


def used_memory() -> int:
    """Bytes that this process uses: on the accelerator if one is in use, else in main memory."""
    if torch.cuda.is_available() and torch.cuda.memory_allocated():
        return int(torch.cuda.memory_allocated())
    statm = Path("/proc/self/statm")
    if statm.exists():
        return int(statm.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    try:
        import resource
    except ImportError:  # not on Windows
        return 0
    return int(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss) * 1024


def free_memory() -> int | None:
    """Bytes of main memory that are available now; None if the system does not tell."""
    meminfo = Path("/proc/meminfo")
    if not meminfo.exists():
        return None
    for line in meminfo.read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return None


def free_disk(path: Path) -> int:
    """Free bytes on the disk where `path` is, or would be."""
    existing = path.absolute()
    while not existing.exists():
        existing = existing.parent
    return shutil.disk_usage(existing).free


def format_duration(seconds: float | int) -> str:
    """A duration in readable units.

    >>> [format_duration(x) for x in (0.4, 59, 200, 8000)]
    ['0.4 s', '59 s', '3 min 20 s', '2 h 13 min']
    """
    if seconds < 10:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600:,} h {whole % 3600 // 60} min"


def format_bytes(count: float | int) -> str:
    """A number of bytes in readable units.

    >>> format_bytes(2000), format_bytes(3 * 2**20), format_bytes(5 * 2**30)
    ('2 KiB', '3 MiB', '5.0 GiB')
    """
    if count >= 2**30:
        return f"{count / 2**30:.1f} GiB"
    if count >= 2**20:
        return f"{count / 2**20:,.0f} MiB"
    return f"{count / 2**10:,.0f} KiB" if count >= 2**9 or count <= 0 else "under 1 KiB"
