"""`ptif doctor`: what is installed, what the machine has, and what is missing."""

import os
import platform
import re
import sys
import time
from importlib import metadata
from typing import Any, Final

import numpy as np
import torch
from rich.text import Text

from .._version import __version__
from . import options, show
from .machine import free_memory, size
from .outcome import Voice, ending

PACKAGE: Final = "pytorch-influence-functions"
_CORE: Final = ("torch", "numpy", "safetensors", "tqdm", "jaxtyping")
# Extras that gather others, or are for those who work on the package.
_INNER: Final = ("all", "test", "dev")
_VARIABLES: Final = (
    "OMP_NUM_THREADS",
    "MKL_NUM_THREADS",
    "OPENBLAS_NUM_THREADS",
    "CUDA_VISIBLE_DEVICES",
    "PTIF_PROGRESS",
)
_SIDE: Final = 768


def doctor(json: options.Json = False, quiet: options.Quiet = False) -> None:
    """Versions, devices, threads, BLAS, and which extras are missing; the first thing to paste into a bug report."""
    voice = Voice(json, quiet)
    with ending(voice):
        found = examined()
        missing = [(name, lacks) for name, lacks in found["extras"].items() if lacks]
        voice.say(
            show.heading("Versions"),
            show.facts([(k, str(v)) for k, v in found["versions"].items()]),
            "",
            show.heading("Machine"),
            show.facts([(k, str(v)) for k, v in found["machine"].items()]),
            "",
            show.heading("Threads and BLAS"),
            show.facts([(k, str(v)) for k, v in found["threads"].items()]),
            "",
            show.heading("Extras"),
            show.facts([(k, f"missing: {', '.join(v)}" if v else "installed") for k, v in found["extras"].items()]),
            *([Text(f"  pip install '{PACKAGE}[{','.join(name for name, _ in missing)}]'")] if missing else []),
        )
        voice.whole({"status": "complete", "exit_code": 0, "command": "doctor"} | found)


def examined() -> dict[str, dict[str, Any]]:
    """Everything the doctor looks at, in words and numbers."""
    return {
        "versions": {"ptif": __version__, "python": f"{platform.python_version()} ({sys.executable})"}
        | {name: metadata.version(name) for name in _CORE},
        "machine": _machine(),
        "threads": _threads(),
        "extras": extras(),
    }


def _machine() -> dict[str, Any]:
    free = free_memory()
    found: dict[str, Any] = {
        "system": f"{platform.system()} {platform.release()}, {platform.machine()}",
        "processors": os.cpu_count(),
        "free memory": "not told by the system" if free is None else size(free),
    }
    for i in range(torch.cuda.device_count()):
        one = torch.cuda.get_device_properties(i)
        found[f"cuda:{i}"] = f"{one.name}, {size(one.total_memory)}"
    if torch.backends.mps.is_available():
        found["mps"] = "available"
    if len(found) == 3:
        found["accelerators"] = "none: everything runs on the CPU"
    return found


def _threads() -> dict[str, Any]:
    blas = re.search(r"BLAS_INFO=(\w+)", torch.__config__.show())
    level = re.search(r"CPU capability usage: (\w+)", torch.__config__.show())
    numpy_blas = np.show_config(mode="dicts")["Build Dependencies"]["blas"]  # type: ignore[call-overload,index,unused-ignore]
    found: dict[str, Any] = {
        "torch threads": torch.get_num_threads(),
        "torch interop threads": torch.get_num_interop_threads(),
        "torch BLAS": blas[1] if blas else "not told",
        "instructions": level[1] if level else "not told",
        "numpy BLAS": f"{numpy_blas.get('name')} {numpy_blas.get('version')}",
        "matrix product": f"{_speed():.0f} Gflop/s in float32 ({_SIDE} × {_SIDE})",
    }
    return found | {name: os.environ[name] for name in _VARIABLES if name in os.environ}


def _speed() -> float:
    """10⁹ operations per second of a matrix product, the best of three."""
    a = torch.ones(_SIDE, _SIDE)
    best = float("inf")
    for _ in range(3):
        start = time.perf_counter()
        torch.mm(a, a)
        best = min(best, time.perf_counter() - start)
    return 2 * _SIDE**3 / best / 1e9


def extras() -> dict[str, list[str]]:
    """For every extra of the package, which of its libraries are not installed."""
    found: dict[str, list[str]] = {}
    for line in metadata.requires(PACKAGE) or []:
        name, _, condition = line.partition(";")
        extra = re.search(r"extra\s*==\s*['\"]([\w-]+)['\"]", condition)
        if extra is None or extra[1] in _INNER or not _applies(condition):
            continue
        library = re.split(r"[\s<>=!~\[(]", name.strip(), maxsplit=1)[0]
        found.setdefault(extra[1], [])
        if not _installed(library):
            found[extra[1]].append(library)
    return found


def _installed(library: str) -> bool:
    try:
        metadata.version(library)
    except metadata.PackageNotFoundError:
        return False
    return True


def _applies(condition: str) -> bool:
    """Whether this Python is one that the library is asked for; only bounds from above are in use."""
    below = re.search(r"python_version\s*<\s*['\"](\d+)\.(\d+)['\"]", condition)
    return below is None or sys.version_info[:2] < (int(below[1]), int(below[2]))
