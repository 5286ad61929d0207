"""One side of one workload, in a process of its own: set up once, then run when told, one JSON line per run.

Started by `run.py`. Time is taken around the work alone, not around imports: on the clock, and as CPU seconds of this
process and those it started, which other work on the machine hardly changes. Peak memory is the process's.
"""

from __future__ import annotations

import importlib
import json
import os
import resource
import sys
import time
from typing import Any

import numpy as np

_MIB = 1024.0 if sys.platform != "darwin" else 1024.0**2


def peak_mib() -> float:
    """The most memory this process ever had resident."""
    # On Linux `ru_maxrss` begins at what the *parent* had when it started this process, so a large parent hides all.
    try:
        with open("/proc/self/status") as file:
            return next(float(line.split()[1]) / 1024 for line in file if line.startswith("VmHWM:"))
    except (OSError, StopIteration):
        pass
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / _MIB


def cpu_seconds() -> float:
    """CPU time of this process, all its threads, and the processes that it started and that have ended."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(u.ru_utime + u.ru_stime for u in used)


def limit_cpu(minutes: float) -> None:
    """More CPU time than this ends the process by SIGXCPU: a limit that a loaded machine does not tighten."""
    seconds = max(1, round(60 * minutes))
    resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds + 10))


def limit_memory(gib: float) -> None:
    """Asking for more fails, rather than taking the machine down."""
    size = int(gib * 2**30)
    resource.setrlimit(resource.RLIMIT_DATA, (size, size))


def main() -> None:
    # Whatever the libraries print must not mix with the answers.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    module, function, options = sys.argv[1], sys.argv[2], json.loads(sys.argv[3])
    if "memory_gib" in options:
        limit_memory(options["memory_gib"])
    if "cpu_minutes" in options:
        limit_cpu(options["cpu_minutes"])
    import torch

    torch.set_num_threads(options["threads"])
    run = getattr(importlib.import_module(module), function)(options)
    before = peak_mib()
    for line in sys.stdin:
        command = line.strip()
        if command == "quit":
            return
        start, spent = time.perf_counter(), cpu_seconds()
        result: Any = run()
        answer: dict[str, Any] = {"seconds": time.perf_counter() - start, "cpu_seconds": cpu_seconds() - spent}
        answer |= {"peak_mib": peak_mib(), "start_mib": before, "torch": torch.__version__}
        if isinstance(result, tuple):  # scores, and how long their parts took
            result, answer["parts"] = result
        if isinstance(result, dict):
            answer["result"] = result
        elif result is not None and command.startswith("save "):
            np.save(command.removeprefix("save "), result)
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    main()
