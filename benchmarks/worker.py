"""One side of one workload, in a process of its own: set up once, then run when told, one JSON line per run.

Started by `run.py`. Time is taken around the work alone, not around imports; peak memory is the process's.
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
    import torch

    torch.set_num_threads(options["threads"])
    run = getattr(importlib.import_module(module), function)(options)
    before = peak_mib()
    for line in sys.stdin:
        command = line.strip()
        if command == "quit":
            return
        start = time.perf_counter()
        result: Any = run()
        answer: dict[str, Any] = {"seconds": time.perf_counter() - start}
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
