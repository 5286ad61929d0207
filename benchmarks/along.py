"""What averaging along the training run buys, against retraining: `python benchmarks/along.py [--quick] [--setting 1]`.

Three trainings per setting are recorded at many shares of the run; every row is one call of the library with its
defaults. Truth: mean loss after training on random halves. Prints the tables of `docs/along.md`; models and truth are
made from nothing and kept under `.bench/cache/along`.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from nets import mlp
from peers.prepare import DATA
from peers.recipes import objective, recipe
from peers.workloads import CACHE, workload
from torch import Tensor, nn

import pytorch_influence_functions as ptif
from pytorch_influence_functions.curvature import EKFAC
from pytorch_influence_functions.demo.data import load as demo_data
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
from pytorch_influence_functions.methods import along, dual, ekfac, grad_dot, shampoo
from pytorch_influence_functions.trajectory import SOURCE, Recording

LOG = (0.02, 0.05, 0.1, 0.2, 0.4, 0.7, 1.0)
SCHEDULES = {
    "2, 5, 10, 20, 40, 70, 100 %": LOG,
    "20, 100 %": (0.2, 1.0),
    "10, 40, 100 %": (0.1, 0.4, 1.0),
    "10, 20, 40, 70, 100 %": (0.1, 0.2, 0.4, 0.7, 1.0),
    "even: 14, 29, ... 100 %": tuple(k / 7 for k in range(1, 8)),
    "early: 1, 2, 3, 5, 8, 12, 20 %": (0.01, 0.02, 0.03, 0.05, 0.08, 0.12, 0.2),
    "late: 70, 75, ... 100 %": (0.7, 0.75, 0.8, 0.85, 0.9, 0.95, 1.0),
    "fifteen": (0.01, 0.02, 0.03, 0.05, 0.08, 0.12, 0.16, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.85, 1.0),
}
SEEDS = (1000, 1001, 1002)
Scored = Callable[[], ptif.Scores]


@dataclass(frozen=True)
class Setting:
    """Data, and how every model of it is trained."""

    title: str
    data: tuple[Tensor, Tensor, Tensor, Tensor]
    recipe: Recipe
    objective: Any
    weight_decay: float
    subsets: int
    seeds: int

    @property
    def train(self) -> tuple[Tensor, Tensor]:
        return self.data[0], self.data[1]

    @property
    def queries(self) -> tuple[Tensor, Tensor]:
        return self.data[2], self.data[3]


def settings(quick: bool) -> dict[int, Setting]:
    """Two networks of the league, a convex problem trained by SGD, and the first network trained otherwise."""
    made = {}
    for number, league in ((1, 11), (2, 13)):
        this = workload(league, quick)
        data = DATA[this.data](this.n, this.queries)
        subsets = (8, 2) if quick else (100, 5)
        made[number] = Setting(this.title, data, recipe(this), objective(this), this.weight_decay, *subsets)
    sgd = partial(torch.optim.SGD, lr=0.1, momentum=0.9, weight_decay=1e-2)
    convex = Recipe(logistic, sgd, 5 if quick else 60, 100, LinearDecay(0.1), ptif.CrossEntropy())
    size = (100, 10) if quick else (1000, 100)
    subsets = (8, 1) if quick else (100, 1)
    title = "Fashion-MNIST, logistic regression, weight decay 0.01"
    made[3] = Setting(title, DATA["fashion"](*size), convex, ptif.CrossEntropy(), 1e-2, *subsets)
    first, few = made[1], (8, 2) if quick else (60, 3)
    adamw = replace(first.recipe, optimizer=partial(torch.optim.AdamW, lr=1e-3, weight_decay=0.01))
    made[4] = replace(first, title=f"{first.title}, AdamW", recipe=adamw, subsets=few[0], seeds=few[1])
    x, _, qx, qy = first.data
    wrong = torch.from_numpy(demo_data().train_labels).long()[: len(x)]
    title = f"{first.title}, a tenth of the training labels wrong"
    made[5] = replace(first, title=title, data=(x, wrong, qx, qy), subsets=few[0], seeds=few[1])
    return made


def logistic() -> nn.Module:
    return mlp(784, 10)


def record(this: Setting, seed: int, folder: Path) -> tuple[nn.Module, Recording]:
    """One training, recorded at every share that a schedule asks for."""
    shares = sorted({s for v in SCHEDULES.values() for s in v})
    model = train_model(this.recipe, this.train, seed, record=folder, at=shares)
    return model, Recording.open(folder)


def truth_of(this: Setting, workers: int) -> Truth:
    x, y = this.train
    return retrain(
        this.recipe, Subsets.halves(len(x), this.subsets), this.seeds, train=(x, y), queries=this.queries,
        measure=this.objective, folder=CACHE / "along", workers=workers,
    )  # fmt: skip


def rows(
    this: Setting, models: list[nn.Module], runs: list[Recording], only: str | None
) -> Iterator[tuple[str, Scored]]:
    """(name, how the scores are made)."""
    problem = ptif.Problem(models[0], this.objective, this.train, weight_decay=this.weight_decay, batch_size=500)

    def asked(method: Any, of: ptif.Problem = problem) -> Scored:
        return lambda: method.fit(of, len(this.queries[0])).score(this.queries)

    seven = [run.at(LOG) for run in runs]
    ensemble = problem.with_(checkpoints=[model.state_dict() for model in models])
    found = {
        "EK-FAC, final weights": asked(ekfac()),
        "EK-FAC along the run": asked(along(seven[0])),
        "EK-FAC along the run, raw mean": asked(along(seven[0], units="raw")),
        "Shampoo, final weights": asked(shampoo()),
        "Shampoo along the run": asked(along(seven[0], shampoo())),
        "dual, final weights": asked(dual()),
        "dual along the run": asked(along(seven[0], dual())),
        "gradient dot product, final weights": asked(grad_dot()),
        "gradient dot product along the run": asked(along(seven[0], grad_dot())),
        "TracIn with the same seven": asked(
            ptif.tracin(seven[0].learning_rates, seven[0].stretches), problem.with_(checkpoints=seven[0].checkpoints)
        ),
        "SOURCE (EK-FAC) with the same seven": asked(SOURCE(seven[0].segments(3), EKFAC())),
        "three trainings: EK-FAC, final weights": asked(ekfac(), ensemble),
        "three trainings: EK-FAC along the runs": asked(along(seven)),
    }
    for name, shares in SCHEDULES.items():
        found[f"schedule {name}"] = asked(along(runs[0].at(shares)))
    for share in LOG:
        found[f"EK-FAC at {share:.0%} alone"] = asked(along(runs[0].at([share])))
    yield from ((name, how) for name, how in found.items() if only is None or only in name)


def run_setting(this: Setting, asked: argparse.Namespace) -> None:
    truth = truth_of(this, asked.threads)
    ceiling = noise_ceiling(truth)
    with tempfile.TemporaryDirectory() as place:
        recorded = [record(this, seed, Path(place) / str(seed)) for seed in SEEDS]
        models, runs = [m for m, _ in recorded], [r for _, r in recorded]
        n, q = len(this.train[0]), len(this.queries[0])
        print(f"\n### {this.title}\n\nN = {n:,}, {q} queries, {runs[0].steps[-1]:,} steps. {truth.name}; ", end="")
        print("ceiling 1." if ceiling is None else f"ceiling {ceiling:.3f}.")
        print("\n| row | LDS (95 %) | seconds |\n| --- | --- | --- |", flush=True)
        for name, how in rows(this, models, runs, asked.rows):
            start = time.perf_counter()
            scores = how()
            seconds = time.perf_counter() - start
            e = evaluate_one(scores, truth)
            print(f"| {name} | {e.value:.3f} ({e.low:.3f} to {e.high:.3f}) | {seconds:.1f} |", flush=True)
            for note in scores.diagnostics.notes if name == "EK-FAC along the run" else ():
                print(f"<!-- {note} -->")


def main() -> int:
    parser = argparse.ArgumentParser(description="Along the run against retraining.")
    parser.add_argument(
        "--setting", type=int, choices=(1, 2, 3, 4, 5), action="append", help="one of them (default: all)"
    )
    parser.add_argument("--rows", help="only the rows whose name holds these words")
    parser.add_argument("--quick", action="store_true", help="tiny sizes")
    parser.add_argument("--threads", type=int, default=2, help="torch threads, and workers of the retraining")
    asked = parser.parse_args()
    torch.set_num_threads(asked.threads)
    for number, this in settings(asked.quick).items():
        if number in (asked.setting or numbers):
            run_setting(this, asked)
    return 0


if __name__ == "__main__":
    sys.exit(main())
