"""What a run costs in epochs and memory, beside its forecast: `python benchmarks/costs.py --only "table MLP, 1,000"`.

An epoch is the CPU time of one bare forward and backward pass over the training data in batches of 64: what training
takes per epoch, whatever the machine. Every run is a process of its own, made by fork where model and data are ready;
memory is what it had resident at most, above what it had before. The last lines say how far the automatic choice is
from the best of the ways to what it estimates, and from EK-FAC.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from nets import Block
from torch import Tensor, nn

import pytorch_influence_functions as ptif
from pytorch_influence_functions.curvature import cost
from pytorch_influence_functions.demo.data import datasets
from pytorch_influence_functions.solvers import forecast as forecasting

METHODS: dict[str, ptif.Influence] = {
    "auto": ptif.Influence(),
    "dense": ptif.Influence(ptif.curvature.GGN(), ptif.solvers.Spectral()),
    "exact dual": ptif.Influence(ptif.curvature.GGN(), ptif.solvers.Woodbury()),
    "dual": ptif.dual(),
    "ekfac": ptif.ekfac(),
    "cg": ptif.gauss_newton(),
    "grad_dot": ptif.methods.grad_dot(),
}
# The ways to the solution with the exact Gauss-Newton matrix.
EXACT = ("dense", "exact dual")
# Above this many epochs a forecast is taken at its word.
LONGEST = 2000.0
# Seconds that may go into what is paid once in a process, on a small problem.
WARM = 2.0


@dataclass(frozen=True)
class Case:
    """A network, and its data: the bundled Fashion-MNIST images, or noise that a random teacher labels."""

    make: Callable[[], nn.Module]
    inputs: tuple[int, ...]
    n: int
    classes: int = 10
    images: bool = False
    numbers: bool = False
    """Whether targets are numbers instead of classes."""

    @property
    def loss(self) -> ptif.objectives.AbstractObjective:
        return ptif.SquaredError() if self.numbers else ptif.CrossEntropy()

    def build(self) -> tuple[nn.Module, Tensor, Tensor]:
        """The network, trained for a few epochs, and its data."""
        torch.manual_seed(0)
        teacher, model = self.make(), self.make()
        x, y = self.photographs() if self.images else self.noise(teacher)
        optimiser = torch.optim.Adam(model.parameters(), lr=1e-3)
        for _ in range(max(1, min(10, 30_000 // self.n))):
            for part in torch.randperm(self.n)[:30_000].split(64):
                optimiser.zero_grad()
                self.total(model(x[part]), y[part]).div(len(part)).backward()
                optimiser.step()
        return model.eval(), x, y

    def total(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """The sum of the losses."""
        if self.numbers:
            return F.mse_loss(outputs, targets, reduction="sum")
        return F.cross_entropy(outputs, targets, reduction="sum")

    def queries(self, count: int, x: Tensor) -> tuple[Tensor, Tensor]:
        """As many queries, drawn anew; pictures are the training pictures with noise."""
        inputs = torch.randn(count, *self.inputs)
        if self.images:
            inputs = x[torch.arange(count) % len(x)] + 0.1 * inputs
        targets = torch.randn(count, 1) if self.numbers else torch.randint(0, self.classes, (count,))
        return inputs, targets

    def photographs(self) -> tuple[Tensor, Tensor]:
        x, y = datasets().train.tensors
        return x[: self.n].reshape(self.n, *self.inputs), y[: self.n]

    def noise(self, teacher: nn.Module) -> tuple[Tensor, Tensor]:
        x = torch.randn(self.n, *self.inputs)
        targets: list[Tensor] = []
        with torch.no_grad():
            for part in torch.arange(self.n).split(4096):
                logits = teacher(x[part])
                if self.numbers:
                    targets.append(logits + 0.5 * torch.randn_like(logits))
                    continue
                noise = torch.randn_like(logits) * logits.std(0)
                targets.append((logits - logits.mean(0) + noise).argmax(1))
        return x, torch.cat(targets)


def mlp(*widths: int) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        layers: list[nn.Module] = []
        for a, b in pairwise(widths):
            layers += [nn.Linear(a, b), nn.ReLU()]
        return nn.Sequential(*layers[:-1])

    return make


def small_cnn() -> nn.Module:
    """Two convolutions on 28 x 28; 26,698 parameters."""
    return nn.Sequential(
        nn.Conv2d(1, 8, 5, padding=2),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(8, 16, 5, padding=2),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(784, 29),
        nn.ReLU(),
        nn.Linear(29, 10),
    )


def convnet() -> nn.Module:
    """Four convolutions with GroupNorm on 28 x 28; 205,000 parameters."""
    stages: list[nn.Module] = []
    for i, o, stride in ((1, 32, 1), (32, 64, 2), (64, 128, 2), (128, 96, 1)):
        stages += [nn.Conv2d(i, o, 3, stride, 1), nn.GroupNorm(8, o), nn.ReLU()]
    return nn.Sequential(*stages, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(96, 10))


class Reader(nn.Module):
    """A transformer of two blocks of width 64 over 16 pieces of a picture; 106,000 parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(49, 64)
        self.blocks = nn.ModuleList(Block(64, 4) for _ in range(2))
        self.head = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        pieces = x.reshape(len(x), 4, 7, 4, 7).transpose(2, 3).reshape(len(x), 16, 49)
        hidden = self.embed(pieces)
        for block in self.blocks:
            hidden = block(hidden)
        return self.head(hidden.mean(1))


TABLE, FASHION = mlp(50, 64, 64, 2), mlp(784, 128, 64, 10)
CASES: dict[str, Case] = {
    "logistic, 1,000": Case(mlp(100, 10), (100,), 1000),
    "wine MLP, 142": Case(mlp(13, 16, 3), (13,), 142, 3),
    "digits MLP, 1,400": Case(mlp(64, 16, 10), (64,), 1400),
    "regression MLP, 354": Case(mlp(10, 64, 64, 1), (10,), 354, numbers=True),
    "regression MLP, 10,000": Case(mlp(10, 64, 64, 1), (10,), 10_000, numbers=True),
    "transformer, 500": Case(Reader, (784,), 500, images=True),
    "table MLP, 100,000": Case(TABLE, (50,), 100_000, 2),
    "logistic, 10,000": Case(mlp(100, 10), (100,), 10_000),
    "table MLP, 1,000": Case(TABLE, (50,), 1000, 2),
    "table MLP, 3,000": Case(TABLE, (50,), 3000, 2),
    "table MLP, 30,000": Case(TABLE, (50,), 30_000, 2),
    "Fashion MLP, 1,000": Case(FASHION, (784,), 1000, images=True),
    "small CNN, 1,000": Case(small_cnn, (1, 28, 28), 1000, images=True),
    "convnet, 500": Case(convnet, (1, 28, 28), 500, images=True),
    "tiny table, 1,000,000": Case(mlp(16, 2), (16,), 1_000_000, 2),
    "wide MLP, 1,000": Case(mlp(784, 4096, 4096, 10), (784,), 1000, images=True),
}
for count in (1000, 3000, 10_000, 30_000, 100_000, 1_000_000):
    CASES[f"three classes, {count:,}"] = Case(mlp(20, 64, 64, 32, 3), (20,), count, 3)
DEFAULT = ("wine MLP, 142", "digits MLP, 1,400", "regression MLP, 354", "regression MLP, 10,000", "logistic, 1,000")
DEFAULT += ("logistic, 10,000", "table MLP, 1,000", "table MLP, 3,000", "table MLP, 30,000", "table MLP, 100,000")
DEFAULT += ("Fashion MLP, 1,000", "small CNN, 1,000", "transformer, 500")


def bare_pass(case: Case, model: nn.Module, x: Tensor, y: Tensor) -> float:
    """CPU seconds of one forward and backward pass in batches of 64, the fastest of a few, over 30,000 at most."""
    parameters, n = list(model.parameters()), min(len(x), 30_000)
    best = float("inf")
    for _ in range(4):
        start = time.process_time()
        for first in range(0, n, 64):
            part = slice(first, min(n, first + 64))
            torch.autograd.grad(case.total(model(x[part]), y[part]), parameters)
        best = min(best, time.process_time() - start)
    return best * len(x) / n


@dataclass(frozen=True)
class Measured:
    """One run: CPU seconds and MiB of fitting and scoring, what was forecast, and the composition that was used."""

    seconds: float
    mib: float
    forecast_seconds: float
    forecast_mib: float
    method: str
    refused: str = ""


def resident(key: str) -> float:
    """MiB that this process has (`VmRSS`) or had at most (`VmHWM`)."""
    with open("/proc/self/status") as file:
        return next(float(line.split()[1]) / 1024 for line in file if line.startswith(key))


def run(method: ptif.Influence, of: ptif.Problem, queries: tuple[Tensor, Tensor], longest: float) -> Measured:
    """Forecast and run; a run that would take longer than `longest` seconds is only forecast (NaN)."""
    forecast = method.forecast(of, len(queries[0]))
    mib = (forecast.memory_bytes + forecast.batch_bytes) / 2**20
    if forecast.seconds > longest:
        return Measured(float("nan"), float("nan"), forecast.seconds, mib, forecast.method)
    # What was freed before goes back, so that using it again counts.
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")
    start, before = time.process_time(), resident("VmRSS")
    fitted = method.fit(of, n_queries=len(queries[0]))
    scores = fitted.score(queries)
    seconds, peak = time.process_time() - start, resident("VmHWM") - before
    assert len(scores) == len(queries[0])
    return Measured(seconds, peak, forecast.seconds, mib, fitted.method)


def run_apart(
    method: ptif.Influence, of: ptif.Problem, queries: tuple[Tensor, Tensor], small: ptif.Problem, longest: float
) -> Measured:
    """`run` in a process of its own, which first pays on a `small` problem for what is paid once."""
    reading, writing = os.pipe()
    child = os.fork()
    if not child:
        try:
            try:
                if method.forecast(small, 2).seconds < WARM:
                    method.fit(small).score((queries[0][:2], queries[1][:2]))
                answer = run(method, of, queries, longest)
            except ptif.errors.InfluenceError as refusal:
                nothing = float("nan")
                answer = Measured(nothing, nothing, nothing, nothing, "", type(refusal).__name__)
            os.write(writing, json.dumps(vars(answer)).encode())
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(0)
    os.close(writing)
    with os.fdopen(reading) as pipe:
        answer = pipe.read()
    os.waitpid(child, 0)
    return Measured(**json.loads(answer))


def measure(name: str, methods: list[str], counts: list[int], batch_size: int | None, longest: float) -> Iterator[str]:
    """Lines of the table for one case, and the distance of the automatic choice from the best."""
    case = CASES[name]
    model, x, y = case.build()
    epoch = bare_pass(case, model, x, y)
    queries = case.queries(max(counts), x)
    small = ptif.Problem(model, case.loss, (x[:100], y[:100]))
    of = ptif.Problem(model, case.loss, (x, y), batch_size=batch_size)
    taken: dict[tuple[str, int], Measured] = {}
    for method in methods:
        for count in counts:
            asked = queries[0][:count], queries[1][:count]
            one = taken[method, count] = run_apart(METHODS[method], of, asked, small, min(longest, LONGEST * epoch))
            if one.refused:
                yield f"| {name} | {method} | {count:,} | {one.refused} | | | | | | |"
                continue
            took, forecast = one.seconds, one.forecast_seconds
            ran = one.method.split(", damping")[0][10:]
            yield (
                f"| {name} | {method} | {count:,} | {took:.2f} s | {took / epoch:,.1f} | {forecast / epoch:,.1f} | "
                f"{forecast / took:.2f} | {one.mib:,.0f} | {one.forecast_mib:,.0f} | "
                f"{one.forecast_mib / max(1.0, one.mib):.2f} | {ran} |"
            )
    for count in counts:
        yield from compare(name, count, {m: taken[m, count] for m in methods})


def compare(name: str, count: int, taken: dict[str, Measured]) -> Iterator[str]:
    """How many times what others take the automatic choice takes."""
    if "auto" not in taken or taken["auto"].seconds != taken["auto"].seconds:
        return
    auto = taken["auto"]
    others = {m: auto.seconds / one.seconds for m, one in taken.items() if m != "auto" and one.seconds == one.seconds}
    listed = ", ".join(f"{m} {ratio:.1f}" for m, ratio in others.items())
    yield f"#   {name}, {count:,} queries: automatic {auto.seconds:.2f} s, in times of {listed}"


def main() -> int:
    parser = argparse.ArgumentParser(description="Epochs and memory that runs take, and that were forecast.")
    parser.add_argument("--only", nargs="*", choices=[*CASES], default=list(DEFAULT), help="which cases")
    parser.add_argument("--methods", nargs="*", choices=[*METHODS], default=["auto", *EXACT, "dual", "ekfac"])
    parser.add_argument("--queries", nargs="*", type=int, default=[1, 10, 100, 1000])
    parser.add_argument("--batch-size", type=int, help="as a user would give it")
    parser.add_argument("--longest", type=float, default=60.0, help="seconds above which a run is only forecast")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    # Forecasts are of seconds on an idle machine: their clock, too, must not count what other processes take.
    for module in (cost, forecasting):
        module.time = SimpleNamespace(perf_counter=time.process_time)  # type: ignore[attr-defined]
    warnings.simplefilter("ignore")
    print("| case | method | queries | CPU | epochs | forecast | ratio | MiB | forecast | ratio | what ran |")
    print("|" + " --- |" * 11)
    for name in asked.only:
        for line in measure(name, asked.methods, asked.queries, asked.batch_size, asked.longest):
            print(line, flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
