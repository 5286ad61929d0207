"""`ptif doctor`: installed versions, the machine, and missing extras."""

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
from .exit import Output, exit_with_code
from .machine import format_bytes, free_memory

PACKAGE: Final = "pytorch-influence-functions"
_CORE: Final = ("torch", "numpy", "safetensors", "tqdm", "jaxtyping")
# Extras that combine others, or are for the package's developers.
_NOT_FOR_USERS: Final = ("all", "test", "dev")
_VARIABLES: Final = (
    "OMP_NUM_THREADS",
    "MKL_NUM_THREADS",
    "OPENBLAS_NUM_THREADS",
    "CUDA_VISIBLE_DEVICES",
    "PTIF_PROGRESS",
)
_MATRIX_SIDE: Final = 768


def doctor_command(json: options.Json = False, quiet: options.Quiet = False) -> None:
    """Versions, devices, threads, BLAS, and which extras are missing; the first thing to paste into a bug report."""
    output = Output(json, quiet)
    with exit_with_code(output):
        report = examine()
        missing = [name for name, libraries in report["extras"].items() if libraries]
        extras = [(k, f"missing: {', '.join(v)}" if v else "installed") for k, v in report["extras"].items()]
        if not extras:
            extras = [("not known", f"{PACKAGE} is not installed, only on the path; in its folder: pip install -e .")]
        output.print_text(
            show.heading("Versions"),
            show.fact_table([(k, str(v)) for k, v in report["versions"].items()]),
            "",
            show.heading("Machine"),
            show.fact_table([(k, str(v)) for k, v in report["machine"].items()]),
            "",
            show.heading("Threads and BLAS"),
            show.fact_table([(k, str(v)) for k, v in report["threads"].items()]),
            "",
            show.heading("Extras"),
            show.fact_table(extras),
            *([Text(f"  pip install '{PACKAGE}[{','.join(missing)}]'")] if missing else []),
        )
        output.print_json({"status": "complete", "exit_code": 0, "command": "doctor"} | report)


def examine() -> dict[str, dict[str, Any]]:
    """Everything that the doctor looks at, as text and numbers."""
    return {
        "versions": {"ptif": __version__, "python": f"{platform.python_version()} ({sys.executable})"}
        | {name: metadata.version(name) for name in _CORE},
        "machine": _machine(),
        "threads": _threads(),
        "extras": missing_libraries(),
    }


def _machine() -> dict[str, Any]:
    free = free_memory()
    machine: dict[str, Any] = {
        "system": f"{platform.system()} {platform.release()}, {platform.machine()}",
        "processors": os.cpu_count(),
        "free memory": "not told by the system" if free is None else format_bytes(free),
    }
    for i in range(torch.cuda.device_count()):
        device = torch.cuda.get_device_properties(i)
        machine[f"cuda:{i}"] = f"{device.name}, {format_bytes(device.total_memory)}"
    if torch.backends.mps.is_available():
        machine["mps"] = "available"
    if len(machine) == 3:
        machine["accelerators"] = "none: everything runs on the CPU"
    return machine


def _threads() -> dict[str, Any]:
    blas = re.search(r"BLAS_INFO=(\w+)", torch.__config__.show())
    level = re.search(r"CPU capability usage: (\w+)", torch.__config__.show())
    numpy_blas = np.show_config(mode="dicts")["Build Dependencies"]["blas"]  # type: ignore[call-overload,index,unused-ignore]
    threads: dict[str, Any] = {
        "torch threads": torch.get_num_threads(),
        "torch interop threads": torch.get_num_interop_threads(),
        "torch BLAS": blas[1] if blas else "not told",
        "instructions": level[1] if level else "not told",
        "numpy BLAS": f"{numpy_blas.get('name')} {numpy_blas.get('version')}",
        "matrix product": f"{_product_speed():.0f} Gflop/s in float32 ({_MATRIX_SIDE} × {_MATRIX_SIDE})",
    }
    return threads | {name: os.environ[name] for name in _VARIABLES if name in os.environ}


def _product_speed() -> float:
    """10⁹ operations per second of a matrix product, the best of three."""
    a = torch.ones(_MATRIX_SIDE, _MATRIX_SIDE)
    best = float("inf")
    for _ in range(3):
        start = time.perf_counter()
        torch.mm(a, a)
        best = min(best, time.perf_counter() - start)
    return 2 * _MATRIX_SIDE**3 / best / 1e9


def missing_libraries() -> dict[str, list[str]]:
    """For every extra of the package, its libraries that are not installed; nothing where the package itself is not."""
    missing: dict[str, list[str]] = {}
    if not _is_installed(PACKAGE):
        return missing
    for line in metadata.requires(PACKAGE) or []:
        name, _, condition = line.partition(";")
        extra = re.search(r"extra\s*==\s*['\"]([\w-]+)['\"]", condition)
        if extra is None or extra[1] in _NOT_FOR_USERS or not _applies_here(condition):
            continue
        library = re.split(r"[\s<>=!~\[(]", name.strip(), maxsplit=1)[0]
        missing.setdefault(extra[1], [])
        if not _is_installed(library):
            missing[extra[1]].append(library)
    return missing


def _is_installed(library: str) -> bool:
    try:
        metadata.version(library)
    except metadata.PackageNotFoundError:
        return False
    return True


def _applies_here(condition: str) -> bool:
    """Whether the condition on the Python version holds here; only upper bounds occur."""
    below = re.search(r"python_version\s*<\s*['\"](\d+)\.(\d+)['\"]", condition)
    return below is None or sys.version_info[:2] < (int(below[1]), int(below[2]))
