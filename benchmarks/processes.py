"""One, two and four processes that share the work: `python benchmarks/processes.py [--quick] [--only dual]`.

Every row is one call by as many processes of one machine, each with one thread, on a perceptron 784-128-64-10 in
float32 and noise that a random teacher labels. Seconds are those of the slowest process. CPU seconds are those of all
processes together: divided by their number it is what is left where each has a core of its own. Memory is the most
that a process had resident during the call, and how far that is above what it had before. The difference is the
largest of scores, over the largest score of one process.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import os
import re
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn

import pytorch_influence_functions as ptif
from pytorch_influence_functions import curvature, solvers

LOSS = nn.CrossEntropyLoss()
CG = ptif.Influence(curvature.GGN(), solvers.CG(rtol=1e-4), damping=0.01)


@dataclass(frozen=True)
class Row:
    """One call, and the sizes it is made with."""

    name: str
    examples: int
    queries: int
    call: Callable[[ptif.Problem, Any, Path], Tensor]

    def __str__(self) -> str:
        asked = f", {self.queries:,} queries" if self.queries else ""
        return f"{self.name}, {self.examples:,} examples{asked}"


@dataclass(frozen=True)
class Measured:
    """What a process measured of one call."""

    seconds: float
    busy: float
    peak: float
    grown: float
    values: Tensor


def _attribute(method: Any) -> Callable[[ptif.Problem, Any, Path], Tensor]:
    return lambda problem, queries, _: method.fit(problem).score(queries, top=100).values


def _build(problem: ptif.Problem, queries: Any, folder: Path) -> Tensor:
    ptif.Index.build(problem, folder / "index", representation=ptif.store.Factors(), shard="4MB")
    return torch.zeros(1)


def _ask(problem: ptif.Problem, queries: Any, folder: Path) -> Tensor:
    return ptif.Index.open(folder / "index", problem).score(queries, top=100).values


ROWS = (
    Row("EK-FAC, top 100", 10_000, 100, _attribute(ptif.ekfac())),
    Row("dual, top 100", 4_000, 50, _attribute(ptif.dual())),
    Row("conjugate gradients, top 100", 2_000, 2, _attribute(CG)),
    Row("self-influence by EK-FAC", 10_000, 0, lambda problem, *_: ptif.ekfac().fit(problem).self_influence()),
    Row("building an index", 10_000, 0, _build),
    Row("asking it, top 100", 10_000, 100, _ask),
)


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(784, 128), nn.ReLU(), nn.Linear(128, 64), nn.ReLU(), nn.Linear(64, 10))


def data(count: int) -> tuple[Tensor, Tensor]:
    x = torch.randn(max(count, 1), 784, generator=torch.Generator().manual_seed(count))
    with torch.no_grad():
        return x, net()(x).argmax(1)


def resident(kind: str) -> float:
    """MiB that this process has resident now (VmRSS) or had at most (VmHWM)."""
    line = re.search(rf"{kind}:\s+(\d+)", Path("/proc/self/status").read_text())
    return float(line[1]) / 1024 if line else float("nan")


def forget_peak() -> None:
    """Give back what is free, and let the peak be what is resident now."""
    gc.collect()
    with suppress(OSError, AttributeError):  # another C library keeps it
        ctypes.CDLL("libc.so.6").malloc_trim(0)
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def measure(row: Row, quick: bool, folder: Path) -> Measured:
    """One call of this process."""
    count = row.examples // (10 if quick else 1)
    problem, queries = ptif.Problem(net(), LOSS, data(count)), data(row.queries)
    forget_peak()
    dist.barrier()
    before, start, busy = resident("VmRSS"), time.perf_counter(), time.process_time()
    with ptif.distributed():
        values = row.call(problem, queries, folder)
    seconds, busy, peak = time.perf_counter() - start, time.process_time() - busy, resident("VmHWM")
    return Measured(seconds, busy, peak, peak - before, values.clone())


def work(rank: int, size: int, only: str, quick: bool, folder: str) -> None:
    torch.set_num_threads(1)
    os.environ["PTIF_PROGRESS"] = "0"
    dist.init_process_group("gloo", init_method=Path(folder, "meeting").as_uri(), rank=rank, world_size=size)
    small = data(64)
    ptif.attribute(net(), small, small, loss=LOSS, method="ekfac", top=1, distributed=True)  # warm up
    for at, row in enumerate(ROWS):
        if only in row.name:
            torch.save(vars(measure(row, quick, Path(folder))), Path(folder, f"{at}-{rank}.pt"))
    dist.destroy_process_group()


def run(size: int, only: str, quick: bool) -> dict[Row, list[Measured]]:
    """What each of `size` processes measured of every row."""
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(work, args=(size, only, quick, folder), nprocs=size)
        return {
            row: [Measured(**torch.load(Path(folder, f"{at}-{rank}.pt"))) for rank in range(size)]
            for at, row in enumerate(ROWS)
            if only in row.name
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a tenth of the examples: does it still run?")
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--only", default="", help="the calls with this in their name")
    arguments = parser.parse_args()
    print(f"{os.cpu_count()} cores, torch {torch.__version__}, one thread a process\n")
    table = {size: run(size, arguments.only, arguments.quick) for size in arguments.processes}
    print("| call | processes | seconds | CPU seconds of all | peak MiB a process | of it by the call | difference |")
    print("|---|---|---|---|---|---|---|")
    for row in table[arguments.processes[0]]:
        first = table[arguments.processes[0]][row][0].values
        for size, measured in table.items():
            ranks = measured[row]
            seconds, peak, grown = (max(getattr(m, name) for m in ranks) for name in ("seconds", "peak", "grown"))
            error = max(float((m.values - first).abs().max() / first.abs().max().clamp_min(1e-30)) for m in ranks)
            busy, difference = sum(m.busy for m in ranks), "" if row.call is _build else f"{error:.0e}"
            print(
                f"| {row} | {size} | {seconds:.1f} | {busy:.1f} | {peak:.0f} | {grown:.0f} | {difference} |", flush=True
            )


if __name__ == "__main__":
    main()
