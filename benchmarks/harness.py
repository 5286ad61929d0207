"""Measuring two sides fairly: fresh processes, warmed up, alternated, medians with their spread."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

HERE = Path(__file__).resolve().parent


@dataclass(frozen=True)
class Side:
    """What runs: a function of a module here, under some Python."""

    name: str
    module: str
    function: str
    options: dict[str, Any]
    python: str = sys.executable


class Worker:
    """A running side; `ask` makes it do its work once."""

    def __init__(self, side: Side, threads: int) -> None:
        self.side = side
        options = json.dumps(side.options | {"threads": threads})
        environment = os.environ | {"OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}
        self._errors = tempfile.TemporaryFile("w+")  # noqa: SIM115 - closed in __exit__
        self._process = subprocess.Popen(
            [side.python, "-W", "ignore", str(HERE / "worker.py"), side.module, side.function, options],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
            env=environment,
        )

    def ask(self, command: str = "go") -> dict[str, Any]:
        assert self._process.stdin is not None and self._process.stdout is not None
        try:
            print(command, file=self._process.stdin, flush=True)
            line = self._process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            self._errors.seek(0)
            tail = "".join(self._errors.readlines()[-15:])
            raise SystemExit(f"{self.side.name} stopped before it answered:\n{tail}")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def __enter__(self) -> Worker:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._process.kill()
        self._process.wait()
        self._errors.close()


def once(side: Side, threads: int) -> dict[str, Any]:
    """One run, no warm-up: for preparation and checks, not for timing."""
    with Worker(side, threads) as worker:
        return worker.ask()


@dataclass(frozen=True)
class Timing:
    """Seconds over the repetitions, and the process's memory in MiB: when set up, and at its highest."""

    name: str
    median: float
    low: float
    high: float
    seconds: list[float]
    start_mib: float
    peak_mib: float

    @staticmethod
    def of(name: str, answers: list[dict[str, Any]]) -> Timing:
        seconds = [a["seconds"] for a in answers]
        last = answers[-1]
        return Timing(
            name,
            statistics.median(seconds),
            min(seconds),
            max(seconds),
            seconds,
            last["start_mib"],
            last["peak_mib"],
        )


def compare(ours: Side, theirs: Side, threads: int, repetitions: int, keep: Path | None = None) -> dict[str, Any]:
    """Both sides in turn, `repetitions` times after one warm-up each.

    The ratio reported is the median of the ratios of neighbouring runs (theirs / ours), so that a machine
    that slows down for a while slows both. `keep` is where the warm-up's results are saved, as NAME.npy.
    """
    taken: tuple[list[dict[str, Any]], list[dict[str, Any]]] = ([], [])
    with Worker(ours, threads) as a, Worker(theirs, threads) as b:
        for worker in (a, b):
            worker.ask(f"save {keep / worker.side.name}.npy" if keep else "go")
        for k in range(repetitions):
            pair = (0, 1) if k % 2 == 0 else (1, 0)  # neither side always goes first
            for at in pair:
                taken[at].append((a, b)[at].ask())
    ratios = [t["seconds"] / o["seconds"] for o, t in zip(*taken, strict=True)]
    return {
        "ours": asdict(Timing.of(ours.name, taken[0])),
        "theirs": asdict(Timing.of(theirs.name, taken[1])),
        "ratio": {"median": statistics.median(ratios), "low": min(ratios), "high": max(ratios)},
        "torch": taken[0][0]["torch"],
    }
