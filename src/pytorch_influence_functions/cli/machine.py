"""What this machine has: memory, disk, and how to say so."""

import os
import shutil
from pathlib import Path

import torch


def memory() -> int:
    """Bytes this process holds: on the accelerator where one is in use, else in main memory."""
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
    """Bytes of main memory that could be had now; None where the system does not tell."""
    meminfo = Path("/proc/meminfo")
    if not meminfo.exists():
        return None
    for line in meminfo.read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return None


def free_disk(path: Path) -> int:
    """Bytes free where `path` is, or would be."""
    place = path.absolute()
    while not place.exists():
        place = place.parent
    return shutil.disk_usage(place).free


def duration(seconds: float | int) -> str:
    """Seconds as a person would say them.

    >>> [duration(x) for x in (0.4, 59, 200, 8000)]
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


def size(count: float | int) -> str:
    """Bytes as a person would say them.

    >>> size(2000), size(3 * 2**20), size(5 * 2**30)
    ('2 KiB', '3 MiB', '5.0 GiB')
    """
    if count >= 2**30:
        return f"{count / 2**30:.1f} GiB"
    return f"{count / 2**20:,.0f} MiB" if count >= 2**20 else f"{count / 2**10:,.0f} KiB"
