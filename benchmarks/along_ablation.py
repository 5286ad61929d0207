"""Which parts of averaging along the run matter: `python benchmarks/along_ablation.py [--setting fashion] [--quick]`.

Every method is asked once at each of thirty checkpoints of one training; schedules, numbers and units are then put
together from these matrices, as `Along` does it. Prints tables of `docs/along.md`; some
minutes per setting on one core.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from nets import mlp
from peers.prepare import DATA
from peers.workloads import CACHE
from torch import Tensor

import pytorch_influence_functions as ptif
from pytorch_influence_functions.damping import Relative
from pytorch_influence_functions.evaluation import (
    LinearDecay,
    Recipe,
    Subsets,
    Truth,
    evaluate_one,
    noise_ceiling,
    retrain,
    train_model,
)
from pytorch_influence_functions.methods import dual, ekfac, grad_dot, kfac, shampoo
from pytorch_influence_functions.trajectory import Recording

LOG = (0.02, 0.05, 0.1, 0.2, 0.4, 0.7, 1.0)
EVEN = tuple(k / 7 for k in range(1, 8))
EARLY = (0.01, 0.02, 0.03, 0.05, 0.08, 0.12, 0.2)
LATE = (0.7, 0.75, 0.8, 0.85, 0.9, 0.95, 1.0)
DAMPINGS = (0.1, 0.3, 1.0, 3.0, 10.0)


def log_spaced(count: int) -> tuple[float, ...]:
    """Shares from 2 % to the end."""
    return tuple(0.02 ** (1 - k / (count - 1)) for k in range(count)) if count > 1 else (1.0,)


NUMBERS = {count: log_spaced(count) for count in (2, 3, 5, 7, 10, 15, 30)}


@dataclass(frozen=True)
class Setting:
    """Data, and how its models are trained."""

    data: tuple[Tensor, Tensor, Tensor, Tensor]
    recipe: Recipe
    objective: ptif.objectives.AbstractObjective

    @property
    def train(self) -> tuple[Tensor, Tensor]:
        return self.data[0], self.data[1]

    @property
    def queries(self) -> tuple[Tensor, Tensor]:
        return self.data[2], self.data[3]


def settings(quick: bool) -> dict[str, Setting]:
    """A classification, its AdamW twin, a regression, and a convex problem."""
    n, epochs = (100, 3) if quick else (1000, 30)
    fashion = DATA["fashion"](n, 100)
    sgd = partial(torch.optim.SGD, lr=0.05, momentum=0.9)
    adamw = partial(torch.optim.AdamW, lr=1e-3, weight_decay=0.01)
    convex = partial(torch.optim.SGD, lr=0.1, momentum=0.9, weight_decay=1e-2)
    small, cross = partial(mlp, 784, 64, 10), ptif.CrossEntropy()
    tabular = Recipe(partial(mlp, 10, 64, 64, 1), sgd_slow(), epochs * 2, 35, LinearDecay(0.1), ptif.SquaredError())
    return {
        "fashion": Setting(fashion, Recipe(small, sgd, epochs, 50, LinearDecay(0.1), cross), cross),
        "adamw": Setting(fashion, Recipe(small, adamw, epochs, 50, LinearDecay(0.1), cross), cross),
        "diabetes": Setting(DATA["diabetes"](350, 92), tabular, ptif.SquaredError()),
        "convex": Setting(
            fashion, Recipe(partial(mlp, 784, 10), convex, 2 * epochs, 100, LinearDecay(0.1), cross), cross
        ),
    }


def sgd_slow() -> partial[torch.optim.Optimizer]:
    return partial(torch.optim.SGD, lr=0.02, momentum=0.9, weight_decay=1e-3)


def truths(this: Setting, quick: bool) -> dict[str, Truth]:
    """Retraining without random halves, without 5 %, and without one example."""
    n = len(this.train[0])
    sizes = (
        {"halves": (6, 1), "5 %": (6, 1), "one": (6, 1)}
        if quick
        else {"halves": (60, 2), "5 %": (40, 5), "one": (30, 10)}
    )
    subsets = {
        "halves": Subsets.halves(n, sizes["halves"][0]),
        "5 %": Subsets.drops(n, sizes["5 %"][0], 0.05),
        "one": Subsets.leave_one_out(
            n, torch.randperm(n, generator=torch.Generator().manual_seed(0))[: sizes["one"][0]]
        ),
    }
    return {
        name: retrain(
            this.recipe, subset, sizes[name][1], train=this.train, queries=this.queries, measure=this.objective,
            folder=CACHE / "along-ablation", workers=1,
        )
        for name, subset in subsets.items()
    }  # fmt: skip


@dataclass
class Asked:
    """Score matrices [C, Q, N] of one method at some shares of the run."""

    at: dict[float, Tensor]

    def average(self, shares: Sequence[float], units: str = "spread") -> Tensor:
        """As `Along` averages them; every checkpoint once."""
        nearest = sorted({min(self.at, key=lambda s: abs(s - share)) for share in shares})
        scores = torch.stack([self.at[s] for s in nearest])
        if units == "raw":
            return scores.mean(0)
        spread = scores.std(2, correction=0, keepdim=True)
        return (spread.log().mean(0).exp() * (scores / spread).mean(0)).nan_to_num()


def ask(
    problem: ptif.Problem,
    run: Recording,
    shares: Sequence[float],
    queries: tuple[Tensor, Tensor],
    method: ptif.Influence,
) -> Asked:
    """One method at some shares of the run."""
    found = {}
    for k in sorted({min(range(len(run)), key=lambda k: abs(run.shares[k] - s)) for s in shares}):
        scores = method.fit(problem.with_(checkpoints=[run.checkpoints[k]]), len(queries[0])).score(queries)
        found[run.shares[k]] = scores.values.double()
    return Asked(found)


def per_layer(layers: Sequence[Asked], shares: Sequence[float]) -> Tensor:
    """Every layer's scores in units of their own spread at every checkpoint, added up."""
    return torch.stack([layer.average(shares) for layer in layers]).sum(0)


def per_layer_equal(layers: Sequence[Asked], shares: Sequence[float]) -> Tensor:
    """As `per_layer`, and every layer counts alike."""
    parts = [layer.average(shares) for layer in layers]
    return torch.stack([p / p.std(1, correction=0, keepdim=True).clamp_min(1e-300) for p in parts]).sum(0)


def table(title: str, rows: dict[str, Tensor], truth: dict[str, Truth]) -> None:
    """One line per row, one column per truth."""
    print(f"\n| {title} | {' | '.join(truth)} |\n| --- |{' --- |' * len(truth)}")
    for name, scores in rows.items():
        values = [evaluate_one(scores, t) for t in truth.values()]
        print(f"| {name} | {' | '.join(f'{e.value:.3f} ({e.low:.3f} to {e.high:.3f})' for e in values)} |", flush=True)


def run_setting(name: str, this: Setting, quick: bool) -> None:
    truth = truths(this, quick)
    shares = sorted({s for v in (LOG, EVEN, EARLY, LATE, *NUMBERS.values()) for s in v})
    with tempfile.TemporaryDirectory() as folder:
        model = train_model(this.recipe, this.train, 1000, record=folder, at=shares)
        run = Recording.open(folder)
        ceilings = {k: noise_ceiling(t) for k, t in truth.items()}
        described = ", ".join(f"{k} {c:.2f}" for k, c in ceilings.items() if c is not None)
        print(f"\n### {name}: N = {len(this.train[0]):,}, {len(run)} checkpoints; ceilings {described}", flush=True)
        problem = ptif.Problem(model, this.objective, this.train, batch_size=500)
        asked = partial(ask, problem, run, queries=this.queries)
        one = asked(shares, method=ekfac())
        table("EK-FAC", {
            "final weights": one.at[1.0],
            "along the run, seven": one.average(LOG),
            "… raw mean": one.average(LOG, "raw"),
        }, truth)  # fmt: skip
        schedules = {"log": LOG, "even": EVEN, "early": EARLY, "late": LATE}
        table("schedule (seven)", {k: one.average(v) for k, v in schedules.items()}, truth)
        table("number (log-spaced from 2 %)", {str(k): one.average(v) for k, v in NUMBERS.items()}, truth)
        table("one checkpoint at", {f"{s:.0%}": one.average([s]) for s in LOG}, truth)
        layers = [
            ask(problem.with_(parameters=layer), run, LOG, this.queries, ekfac()) for layer in problem.space.blocks
        ]
        table("units", {
            "spread of the query's row": one.average(LOG),
            "spread by layer": per_layer(layers, LOG),
            "spread by layer, layers alike": per_layer_equal(layers, LOG),
            "raw": one.average(LOG, "raw"),
        }, truth)  # fmt: skip
        methods: dict[str, Callable[[], ptif.Influence]] = {
            "identity": grad_dot, "dual of the empirical Fisher": dual, "K-FAC": kfac, "Shampoo": shampoo,
        }  # fmt: skip
        others = {k: asked(LOG, method=make()) for k, make in methods.items()} | {"EK-FAC": one}
        finals = {f"{k}, final": a.average([1.0]) for k, a in others.items()}
        table("curvature", finals | {f"{k}, along": a.average(LOG) for k, a in others.items()}, truth)
        both = torch.stack([one.average(LOG), others["Shampoo"].average(LOG)])
        table("together", {"EK-FAC + Shampoo, along": (both / both.std(2, keepdim=True)).mean(0)}, truth)
        damped = {d: asked(LOG, method=ekfac(Relative(d, per_block=True))) for d in DAMPINGS}
        table("damping share, final · along", {
            f"{d:g}, {where}": a.average([1.0] if where == "final" else LOG)
            for where in ("final", "along") for d, a in damped.items()
        }, truth)  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description="What matters along the run.")
    parser.add_argument("--setting", action="append", choices=("fashion", "adamw", "diabetes", "convex"))
    parser.add_argument("--quick", action="store_true", help="tiny sizes")
    given = parser.parse_args()
    torch.set_num_threads(1)
    for name, this in settings(given.quick).items():
        if given.setting is None or name in given.setting:
            run_setting(name, this, given.quick)


if __name__ == "__main__":
    main()
