"""One, two and four processes that share one attribution: `python benchmarks/processes.py [--quick] [--processes 1 2]`.

Every row is one call with `distributed=True` on as many processes of one machine, each with one thread. Seconds are
those of the slowest process; CPU seconds are those of the one that computed most, which is what is left where each has
a core of its own. Memory is how far the most that a process had resident is above what it held before the call.
"""

from __future__ import annotations

import argparse
import os
import re
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn

import pytorch_influence_functions as ptif


@dataclass(frozen=True)
class Row:
    """One call on a perceptron 784-128-64-10 and noise that a random teacher labels."""

    method: str
    examples: int
    queries: int
    top: int | None = None

    def __str__(self) -> str:
        kept = "all scores" if self.top is None else f"top {self.top}"
        return f"{self.method}, {self.examples:,} examples, {self.queries:,} queries, {kept}"


ROWS = (
    Row("ekfac", 20_000, 200, 100),
    Row("ekfac", 20_000, 200),
    Row("dual", 2_000, 50, 100),
    Row("gauss_newton", 4_000, 2, 100),
)
QUICK = tuple(Row(row.method, row.examples // 10, row.queries, row.top) for row in ROWS)


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(784, 128), nn.ReLU(), nn.Linear(128, 64), nn.ReLU(), nn.Linear(64, 10))


def data(count: int) -> tuple[Tensor, Tensor]:
    x = torch.randn(count, 784, generator=torch.Generator().manual_seed(count))
    with torch.no_grad():
        return x, net()(x).argmax(1)


def resident(kind: str) -> float:
    """MiB that this process has resident now (VmRSS) or had at most (VmHWM)."""
    found = re.search(rf"{kind}:\s+(\d+)", Path("/proc/self/status").read_text())
    return float(found[1]) / 1024 if found else float("nan")


def work(rank: int, size: int, row: Row, folder: str) -> None:
    torch.set_num_threads(1)
    os.environ["PTIF_PROGRESS"] = "0"
    dist.init_process_group("gloo", init_method=Path(folder, "meeting").as_uri(), rank=rank, world_size=size)
    train, queries = data(row.examples), data(row.queries)
    options: dict[str, Any] = {"loss": nn.CrossEntropyLoss(), "method": row.method, "top": row.top}
    small = train[0][:64], train[1][:64]
    ptif.attribute(net(), small, queries, **{**options, "method": "ekfac", "top": 1}, distributed=True)  # warm up
    dist.barrier()
    before, start, busy = resident("VmRSS"), time.perf_counter(), time.process_time()
    scores = ptif.attribute(net(), train, queries, **options, distributed=True)
    seconds, busy = time.perf_counter() - start, time.process_time() - busy
    torch.save((seconds, busy, resident("VmHWM") - before, scores.values[:, :20].clone()), Path(folder, f"{rank}.pt"))
    dist.destroy_process_group()


def measure(row: Row, size: int) -> tuple[float, float, float, Tensor]:
    """Seconds and CPU seconds of the slowest process, MiB of the one that took most, and some scores."""
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(work, args=(size, row, folder), nprocs=size)
        told = [torch.load(Path(folder, f"{rank}.pt")) for rank in range(size)]
    seconds, busy, memory = (max(t[k] for t in told) for k in range(3))
    return seconds, busy, memory, told[0][3]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a twentieth of the examples: does it still run?")
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2, 4])
    arguments = parser.parse_args()
    print(f"{os.cpu_count()} cores, torch {torch.__version__}, one thread a process\n")
    print("| call | processes | seconds | CPU seconds a process | MiB a process | largest difference |")
    print("|---|---|---|---|---|---|")
    for row in QUICK if arguments.quick else ROWS:
        first: Tensor | None = None
        for size in arguments.processes:
            seconds, busy, memory, values = measure(row, size)
            first = values if first is None else first
            error = float((values - first).abs().max() / first.abs().max())
            print(f"| {row} | {size} | {seconds:.1f} | {busy:.1f} | {memory:.0f} | {error:.0e} |", flush=True)


if __name__ == "__main__":
    main()
