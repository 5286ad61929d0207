"""What a run costs in epochs, beside what was forecast: `python benchmarks/costs.py --only "table MLP, 1,000"`.

An epoch is the CPU time of one bare forward and backward pass over the training data in batches of 64, in the same
process: what training takes per epoch, whatever the machine.
"""

from __future__ import annotations

import argparse
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import pytorch_influence_functions as ptif
from pytorch_influence_functions.curvature import cost
from pytorch_influence_functions.demo.data import datasets
from pytorch_influence_functions.solvers import forecast as forecasting

METHODS: dict[str, ptif.Influence] = {
    "auto": ptif.Influence(),
    "dual": ptif.dual(),
    "ekfac": ptif.ekfac(),
    "cg": ptif.gauss_newton(),
    "grad_dot": ptif.methods.grad_dot(),
}
# Above this many epochs a forecast is taken at its word.
LONGEST = 2000.0


@dataclass(frozen=True)
class Case:
    """A network, and its data: the bundled Fashion-MNIST images, or noise that a random teacher labels."""

    make: Callable[[], nn.Module]
    inputs: tuple[int, ...]
    n: int
    classes: int = 10
    images: bool = False

    def build(self) -> tuple[nn.Module, Tensor, Tensor]:
        """The network, trained for a few epochs, and its data."""
        torch.manual_seed(0)
        teacher, model = self.make(), self.make()
        x, y = self.photographs() if self.images else self.noise(teacher)
        optimiser = torch.optim.Adam(model.parameters(), lr=1e-3)
        for _ in range(max(1, min(10, 30_000 // self.n))):
            for part in torch.randperm(self.n)[:30_000].split(64):
                optimiser.zero_grad()
                F.cross_entropy(model(x[part]), y[part]).backward()
                optimiser.step()
        return model.eval(), x, y

    def photographs(self) -> tuple[Tensor, Tensor]:
        x, y = datasets().train.tensors
        return x[: self.n].reshape(self.n, *self.inputs), y[: self.n]

    def noise(self, teacher: nn.Module) -> tuple[Tensor, Tensor]:
        x = torch.randn(self.n, *self.inputs)
        y = torch.empty(self.n, dtype=torch.long)
        with torch.no_grad():
            for part in torch.arange(self.n).split(4096):
                logits = teacher(x[part])
                noise = torch.randn_like(logits) * logits.std(0)
                y[part] = (logits - logits.mean(0) + noise).argmax(1)
        return x, y


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


TABLE, FASHION = mlp(50, 64, 64, 2), mlp(784, 128, 64, 10)
CASES: dict[str, Case] = {
    "logistic, 1,000": Case(mlp(100, 10), (100,), 1000),
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
DEFAULT = ("logistic, 1,000", "logistic, 10,000", "table MLP, 1,000", "table MLP, 3,000", "table MLP, 30,000")
DEFAULT += ("Fashion MLP, 1,000", "small CNN, 1,000")


def bare_pass(model: nn.Module, x: Tensor, y: Tensor) -> float:
    """CPU seconds of one forward and backward pass in batches of 64, the fastest of a few, over 30,000 at most."""
    parameters, n = list(model.parameters()), min(len(x), 30_000)
    best = float("inf")
    for _ in range(4):
        start = time.process_time()
        for first in range(0, n, 64):
            part = slice(first, min(n, first + 64))
            torch.autograd.grad(F.cross_entropy(model(x[part]), y[part], reduction="sum"), parameters)
        best = min(best, time.process_time() - start)
    return best * len(x) / n


@dataclass(frozen=True)
class Measured:
    """One run: CPU seconds of fitting and scoring, what was forecast, and the composition that was used."""

    seconds: float
    forecast: ptif.solvers.Forecast
    method: str


def run(method: ptif.Influence, of: ptif.Problem, queries: tuple[Tensor, Tensor], longest: float) -> Measured:
    """Forecast and run; a run that would take longer than `longest` seconds is only forecast (NaN)."""
    forecast = method.forecast(of, len(queries[0]))
    if forecast.seconds > longest:
        return Measured(float("nan"), forecast, forecast.method)
    start = time.process_time()
    fitted = method.fit(of, n_queries=len(queries[0]))
    fitted.score(queries)
    return Measured(time.process_time() - start, forecast, fitted.method)


def measure(name: str, methods: list[str], counts: list[int], batch_size: int | None) -> Iterator[str]:
    """Lines of the table for one case."""
    case = CASES[name]
    model, x, y = case.build()
    epoch = bare_pass(model, x, y)
    queries = torch.randn(max(counts), *case.inputs), torch.randint(0, case.classes, (max(counts),))
    if case.images:
        queries = x[torch.arange(max(counts)) % len(x)] + 0.1 * queries[0], queries[1]
    small = ptif.Problem(model, ptif.CrossEntropy(), (x[:100], y[:100]))
    for method in methods:
        METHODS[method].fit(small).score((x[:2], y[:2]))  # what is paid once
        for count in counts:
            of = ptif.Problem(model, ptif.CrossEntropy(), (x, y), batch_size=batch_size)
            try:
                one = run(METHODS[method], of, (queries[0][:count], queries[1][:count]), LONGEST * epoch)
            except ptif.errors.InfluenceError as refused:
                yield f"| {name} | {method} | {count:,} | {type(refused).__name__} | | | |"
                continue
            expected = one.forecast.seconds
            yield (
                f"| {name} | {method} | {count:,} | {one.seconds:.2f} s | {one.seconds / epoch:,.1f} | "
                f"{expected / epoch:,.1f} | {expected / one.seconds:.2f} | {one.method.split(', damping')[0][10:]}"
            )


def main() -> int:
    parser = argparse.ArgumentParser(description="Epochs that runs take, and that were forecast.")
    parser.add_argument("--only", nargs="*", choices=[*CASES], default=list(DEFAULT), help="which cases")
    parser.add_argument("--methods", nargs="*", choices=[*METHODS], default=["auto", "dual", "ekfac", "cg"])
    parser.add_argument("--queries", nargs="*", type=int, default=[1, 10, 100])
    parser.add_argument("--batch-size", type=int, help="as a user would give it")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    # Forecasts are of seconds on an idle machine: their clock, too, must not count what other processes take.
    for module in (cost, forecasting):
        module.time = SimpleNamespace(perf_counter=time.process_time)  # type: ignore[attr-defined]
    warnings.simplefilter("ignore")
    print("| case | method | queries | CPU | epochs | forecast | ratio | what ran |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- |")
    for name in asked.only:
        for line in measure(name, asked.methods, asked.queries, asked.batch_size):
            print(line, flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
