"""Seconds, memory and agreement: what benchmarks measure that also run where this package is not installed."""

from __future__ import annotations

import resource
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor


class Peak:
    """The most resident memory while a block runs, in GiB; pages of files that are mapped count too."""

    def __init__(self) -> None:
        self.gib, self._running = 0.0, True

    def _watch(self) -> None:
        while self._running:
            self.gib = max(self.gib, resident())
            time.sleep(0.02)

    def __enter__(self) -> Peak:
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: Any) -> None:
        self._running = False
        self._thread.join()


def resident() -> float:
    """GiB of memory in use by this process."""
    status = Path("/proc/self/statm")
    if not status.exists():
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    return int(status.read_text().split()[1]) * resource.getpagesize() / 2**30


@contextmanager
def measured(record: dict[str, Any], name: str) -> Iterator[None]:
    """CPU seconds, wall seconds and peak memory of a block, under its name."""
    with Peak() as peak:
        wall, cpu = time.perf_counter(), time.process_time()
        yield
        record[name] = {"wall": time.perf_counter() - wall, "cpu": time.process_time() - cpu}
    record[name]["peak"] = peak.gib
    print(name, {k: round(v, 2) for k, v in record[name].items()}, file=sys.stderr, flush=True)


def rank_agreement(a: Tensor, b: Tensor) -> float:
    """Spearman's correlation of two matrices' rows, averaged."""
    ranks = [x.argsort(1).argsort(1).double() for x in (a, b)]
    centred = [r - r.mean(1, keepdim=True) for r in ranks]
    p, q = (r / r.norm(dim=1, keepdim=True) for r in centred)
    return float((p * q).sum(1).mean())
