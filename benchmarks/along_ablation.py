"""Which parts of averaging along the run matter: `python benchmarks/along_ablation.py [--setting fashion] [--quick]`.

Every method is asked once at each of some seventy checkpoints of one training; schedules, numbers and units are then
put together from these matrices, as `Along` does it. Prints the tables of `docs/along.md`; some minutes per setting on
one core. `--write` keeps the numbers in `docs/along/ablation.json`, of which `along_figures.py` draws the figures.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from nets import mlp
from peers.prepare import DATA
from peers.workloads import CACHE
from torch import Tensor

import pytorch_influence_functions as ptif
from pytorch_influence_functions.curvature import EKFAC, GGN, Subsample
from pytorch_influence_functions.damping import Relative
from pytorch_influence_functions.demo.data import load as demo_data
from pytorch_influence_functions.evaluation import (
    LinearDecay,
    Recipe,
    Subsets,
    Truth,
    evaluate_one,
    found_when_checking,
    noise_ceiling,
    retrain,
    train_model,
)
from pytorch_influence_functions.methods import along, dual, ekfac, grad_dot, kfac, shampoo
from pytorch_influence_functions.solvers import CG
from pytorch_influence_functions.trajectory import Recording

NUMBERS_FILE = Path(__file__).resolve().parents[1] / "docs" / "along" / "ablation.json"
LOG = (0.02, 0.05, 0.1, 0.2, 0.4, 0.7, 1.0)
EVEN = tuple(k / 7 for k in range(1, 8))
EARLY = (0.01, 0.02, 0.03, 0.05, 0.08, 0.12, 0.2)
LATE = (0.7, 0.75, 0.8, 0.85, 0.9, 0.95, 1.0)
DAMPINGS = (0.1, 0.3, 1.0, 3.0, 10.0)
# Places for a method that is too dear for seven.
FEW = (0.2, 0.4, 1.0)


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
    # (subsets, seeds) of every kind of removal.
    halves: tuple[int, int] = (40, 2)
    small: tuple[int, int] = (30, 2)
    one: tuple[int, int] = (16, 5)
    planted: Tensor | None = None

    @property
    def train(self) -> tuple[Tensor, Tensor]:
        return self.data[0], self.data[1]

    @property
    def queries(self) -> tuple[Tensor, Tensor]:
        return self.data[2], self.data[3]


def settings(quick: bool) -> dict[str, Setting]:
    """A classification, twins of it by AdamW and with wrong labels, a regression, and a convex problem."""
    n, epochs = (100, 3) if quick else (1000, 30)
    fashion = DATA["fashion"](n, 100)
    sgd = partial(torch.optim.SGD, lr=0.05, momentum=0.9)
    adamw = partial(torch.optim.AdamW, lr=1e-3, weight_decay=0.01)
    convex = partial(torch.optim.SGD, lr=0.1, momentum=0.9, weight_decay=1e-2)
    small, cross = partial(mlp, 784, 64, 10), ptif.CrossEntropy()
    tabular = Recipe(partial(mlp, 10, 64, 64, 1), sgd_slow(), epochs * 2, 35, LinearDecay(0.1), ptif.SquaredError())
    first = Recipe(small, sgd, epochs, 50, LinearDecay(0.1), cross)
    labels = demo_data()
    wrong = (fashion[0], torch.from_numpy(labels.train_labels[:n]).long(), *fashion[2:])
    line = Recipe(partial(mlp, 784, 10), convex, 2 * epochs, 100, LinearDecay(0.1), cross)
    return {
        "fashion": Setting(fashion, first, cross, (60, 2), (40, 5), (30, 10)),
        "adamw": Setting(
            fashion, Recipe(small, adamw, epochs, 50, LinearDecay(0.1), cross), cross, (30, 1), (24, 2), (12, 4)
        ),
        "wrong labels": Setting(wrong, first, cross, planted=torch.from_numpy(labels.planted[:n])),
        "diabetes": Setting(DATA["diabetes"](350, 92), tabular, ptif.SquaredError()),
        "convex": Setting(fashion, line, cross, (60, 1), (40, 2), (20, 4)),
    }


def sgd_slow() -> partial[torch.optim.Optimizer]:
    return partial(torch.optim.SGD, lr=0.02, momentum=0.9, weight_decay=1e-3)


def truths(this: Setting, quick: bool) -> dict[str, Truth]:
    """Retraining without random halves, without 5 %, and without one example."""
    n = len(this.train[0])
    sizes = {"halves": this.halves, "5 %": this.small, "one": this.one}
    if quick:
        sizes = dict.fromkeys(sizes, (6, 1))
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


@dataclass
class Tables:
    """Judges scores by every kind of removal; prints what it finds, and keeps it."""

    truth: dict[str, Truth]
    kept: dict[str, dict[str, dict[str, list[float]]]] = field(default_factory=dict)
    """(value, low, high) by title, row and kind of removal."""

    def add(self, title: str, rows: dict[str, Tensor]) -> None:
        """One line per row, one column per truth."""
        print(f"\n| {title} | {' | '.join(self.truth)} |\n| --- |{' --- |' * len(self.truth)}")
        for name, scores in rows.items():
            values = {kind: evaluate_one(scores, t) for kind, t in self.truth.items()}
            shown = " | ".join(f"{e.value:.3f} ({e.low:.3f} to {e.high:.3f})" for e in values.values())
            print(f"| {name} | {shown} |", flush=True)
            kept = {kind: [round(v, 4) for v in (e.value, e.low, e.high)] for kind, e in values.items()}
            self.kept.setdefault(title, {})[name] = kept


def made_of_ekfac(one: Asked, tables: Tables) -> None:
    """Units, schedules and numbers of checkpoints."""
    tables.add("EK-FAC", {
        "final weights": one.at[1.0],
        "along the run, seven": one.average(LOG),
        "… raw mean": one.average(LOG, "raw"),
    })  # fmt: skip
    schedules = {"log": LOG, "even": EVEN, "early": EARLY, "late": LATE}
    tables.add("schedule (seven)", {k: one.average(v) for k, v in schedules.items()})
    tables.add("number (log-spaced from 2 %)", {str(k): one.average(v) for k, v in NUMBERS.items()})
    tables.add("one checkpoint at", {f"{s:.0%}": one.average([s]) for s in LOG})


def by_curvature(one: Asked, asked: Callable[..., Asked], tables: Tables) -> None:
    """Every curvature at the final weights and along the run."""
    methods: dict[str, Callable[[], ptif.Influence]] = {
        "identity": grad_dot, "dual of the empirical Fisher": dual, "K-FAC": kfac, "Shampoo": shampoo,
    }  # fmt: skip
    others = {k: asked(LOG, method=make()) for k, make in methods.items()} | {"EK-FAC": one}
    finals = {f"{k}, final": a.average([1.0]) for k, a in others.items()}
    tables.add("curvature", finals | {f"{k}, along": a.average(LOG) for k, a in others.items()})
    both = torch.stack([one.average(LOG), others["Shampoo"].average(LOG)])
    tables.add("together", {"EK-FAC + Shampoo, along": (both / both.std(2, keepdim=True)).mean(0)})


def by_damping(asked: Callable[..., Asked], tables: Tables) -> None:
    """EK-FAC at other shares of each layer's own mean eigenvalue, and guided conjugate gradients on a fixed batch."""
    damped = {d: asked(LOG, method=ekfac(Relative(d, per_block=True))) for d in DAMPINGS}
    tables.add("damping share, final · along", {
        f"{d:g}, {where}": a.average([1.0] if where == "final" else LOG)
        for where in ("final", "along") for d, a in damped.items()
    })  # fmt: skip
    rows = {}
    for share in (3.0, 30.0):
        guided = ptif.Influence(
            Subsample(GGN(), examples=256), CG(rtol=0.1, max_steps=10), Relative(share), preconditioner=EKFAC()
        )
        at = asked(FEW, method=guided)
        rows |= {f"share {share:g}, final": at.average([1.0]), f"share {share:g}, at 20, 40, 100 %": at.average(FEW)}
    tables.add("Gauss-Newton of 256 examples, guided", rows)


def wrong_labels(this: Setting, problem: ptif.Problem, run: Recording) -> None:
    """Which share of the wrong labels stands among a tenth and a fifth of the examples."""
    assert this.planted is not None, "asked of settings that have some"
    final, seven = ekfac().fit(problem), along(run.at(LOG)).fit(problem)
    x, y = this.train
    with torch.no_grad():
        losses = this.objective.losses(problem.model(x), (x, y))
    suspicions = {
        "self-influence, final": final.self_influence(),
        "self-influence, along": seven.self_influence(),
        "harm to the queries, final": -final.score(this.queries).values.sum(0),
        "harm to the queries, along": -seven.score(this.queries).values.sum(0),
        "training loss": losses,
    }
    print("\n| wrong labels found in | a tenth | a fifth |\n| --- | --- | --- |")
    for name, suspicion in suspicions.items():
        print(
            f"| {name} | {' | '.join(f'{s:.2f}' for s in found_when_checking(suspicion, this.planted, (0.1, 0.2)))} |"
        )


def run_setting(name: str, this: Setting, quick: bool) -> dict[str, Any]:
    """All tables of one setting, printed and given back."""
    truth = truths(this, quick)
    tables = Tables(truth)
    shares = sorted({s for v in (LOG, EVEN, EARLY, LATE, *NUMBERS.values()) for s in v})
    with tempfile.TemporaryDirectory() as folder:
        model = train_model(this.recipe, this.train, 1000, record=folder, at=shares)
        run = Recording.open(folder)
        ceilings = {k: noise_ceiling(t) for k, t in truth.items()}
        described = ", ".join(f"{k} {c:.2f}" for k, c in ceilings.items() if c is not None)
        print(f"\n### {name}: N = {len(this.train[0]):,}, {len(run)} checkpoints; ceilings {described}")
        print("; ".join(t.name for t in truth.values()), flush=True)
        problem = ptif.Problem(model, this.objective, this.train, batch_size=500)
        asked = partial(ask, problem, run, queries=this.queries)
        one = asked(shares, method=ekfac())
        made_of_ekfac(one, tables)
        if this.planted is not None:
            wrong_labels(this, problem, run)
        layers = [
            ask(problem.with_(parameters=layer), run, LOG, this.queries, ekfac()) for layer in problem.space.blocks
        ]
        tables.add("units", {
            "spread of the query's row": one.average(LOG),
            "spread by layer": per_layer(layers, LOG),
            "spread by layer, layers alike": per_layer_equal(layers, LOG),
            "raw": one.average(LOG, "raw"),
        })  # fmt: skip
        by_curvature(one, asked, tables)
        by_damping(asked, tables)
    return tables.kept


def keep(name: str, found: dict[str, Any]) -> None:
    """Beside the numbers of the other settings."""
    NUMBERS_FILE.parent.mkdir(exist_ok=True)
    known = json.loads(NUMBERS_FILE.read_text()) if NUMBERS_FILE.exists() else {}
    NUMBERS_FILE.write_text(json.dumps(known | {name: found}, indent=1) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description="What matters along the run.")
    parser.add_argument(
        "--setting", action="append", choices=("fashion", "adamw", "wrong labels", "diabetes", "convex")
    )
    parser.add_argument("--quick", action="store_true", help="tiny sizes")
    parser.add_argument("--write", action="store_true", help="keep the numbers of these settings in docs/along")
    given = parser.parse_args()
    torch.set_num_threads(1)
    for name, this in settings(given.quick).items():
        if given.setting is None or name in given.setting:
            found = run_setting(name, this, given.quick)
            if given.write and not given.quick:
                keep(name, found)


if __name__ == "__main__":
    main()
