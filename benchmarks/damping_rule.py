"""Which damping and curvature `Auto` should take: `python benchmarks/damping_rule.py [--setting digits] [--quick]`.

A rule is fixed on the first three settings of the league and judged on the others, which no rule has seen: the rest of
the league, the first network trained by AdamW and with wrong labels, and three small networks, where an exact solution
is cheap. Prints what `docs/trust.md` sums up: half-subset LDS at the final weights.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from along_ablation import settings as ablation_settings
from nets import mlp
from peers.prepare import DATA
from peers.recipes import Convex, objective, recipe
from peers.workloads import CACHE, workload
from sklearn.datasets import load_breast_cancer, load_digits, load_wine
from torch import Tensor

import pytorch_influence_functions as ptif
from pytorch_influence_functions.curvature import GGN
from pytorch_influence_functions.damping import FromCurve, Relative
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
from pytorch_influence_functions.solvers import Spectral, Woodbury

EKFAC_SHARES = (0.03, 0.1, 0.3, 1.0, 3.0, 10.0)
EXACT_SHARES = (0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0)
SEED = 1000
Data = tuple[Tensor, Tensor, Tensor, Tensor]


@dataclass(frozen=True)
class Setting:
    """Data, and how models are trained; where the truth is kept."""

    data: Data
    recipe: Any
    objective: Any
    weight_decay: float
    subsets: int
    seeds: int
    kept: str = "damping"

    def model(self) -> Any:
        x, y, *_ = self.data
        if isinstance(self.recipe, Convex):
            return self.recipe(torch.utils.data.TensorDataset(x, y), SEED)
        return train_model(self.recipe, (x, y), SEED)

    def truth(self) -> Truth:
        x, y, *queries = self.data
        return retrain(
            self.recipe, Subsets.halves(len(x), self.subsets), self.seeds, train=(x, y), queries=tuple(queries),
            measure=self.objective, folder=CACHE / self.kept, workers=1,
        )  # fmt: skip


def of_league(number: int, quick: bool) -> Setting:
    """A setting of the league, with the league's own truth."""
    this = workload(10 + number, quick)
    data = DATA[this.data](this.n, this.queries)
    return Setting(data, recipe(this), objective(this), this.weight_decay, this.subsets, this.seeds, "league")


def of_ablation(name: str, quick: bool) -> Setting:
    this = ablation_settings(quick)[name]
    return Setting(this.data, this.recipe, this.objective, 0.0, *this.halves, "along-ablation")


def of_table(load: Callable[[], Any], n: int, widths: tuple[int, ...], quick: bool) -> Setting:
    """A table of scikit-learn and a small network."""
    table = load()
    x = torch.tensor(table.data, dtype=torch.float32)
    x, y = (x - x.mean(0)) / x.std(0).clamp_min(1e-3), torch.tensor(table.target)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    train, queries = order[:n], order[n : n + 60]
    sgd = partial(torch.optim.SGD, lr=0.05, momentum=0.9, weight_decay=1e-3)
    how = Recipe(partial(mlp, *widths), sgd, 3 if quick else 30, 20, LinearDecay(0.1), ptif.CrossEntropy())
    data = x[train], y[train], x[queries], y[queries]
    return Setting(data, how, ptif.CrossEntropy(), 1e-3, 8 if quick else 60, 1 if quick else 2)


SETTINGS: dict[str, Callable[[bool], Setting]] = {
    "1 Fashion-MNIST MLP": partial(of_league, 1),
    "2 MNIST, logistic": partial(of_league, 2),
    "3 diabetes MLP": partial(of_league, 3),
    "4 small CNN": partial(of_league, 4),
    "5 transformer": partial(of_league, 5),
    "AdamW": partial(of_ablation, "adamw"),
    "wrong labels": partial(of_ablation, "wrong labels"),
    "digits MLP 64-16-10": partial(of_table, load_digits, 400, (64, 16, 10)),
    "breast cancer MLP 30-32-2": partial(of_table, load_breast_cancer, 400, (30, 32, 2)),
    "wine MLP 13-16-3": partial(of_table, load_wine, 118, (13, 16, 3)),
}


def methods(parameters: int, rows: int) -> dict[str, tuple[ptif.Influence, tuple[Any, ...]]]:
    """(the method, dampings tried on its one fit) by name, for so many parameters and rows of the dual."""
    relative = (*(Relative(s) for s in EXACT_SHARES), FromCurve())
    found: dict[str, tuple[ptif.Influence, tuple[Any, ...]]] = {
        "Auto": (ptif.Influence(), ()),
        "EK-FAC, per layer": (ptif.ekfac(), tuple(Relative(s, per_block=True) for s in EKFAC_SHARES)),
        "EK-FAC, overall": (ptif.ekfac(), tuple(Relative(s) for s in EKFAC_SHARES)),
    }
    if min(parameters, rows) <= 1500:
        solver: Any = Spectral() if parameters <= rows else Woodbury()
        found["exact GGN"] = ptif.Influence(GGN(), solver), relative
    else:
        found["dual of the empirical Fisher"] = ptif.dual(), (FromCurve(),)
    return found


def measure(name: str, quick: bool) -> None:
    """One table: LDS of every method and damping."""
    this = SETTINGS[name](quick)
    truth, model = this.truth(), this.model()
    x, y, qx, qy = this.data
    problem = ptif.Problem(model, this.objective, (x, y), weight_decay=this.weight_decay, batch_size=250)
    ceiling, outputs = noise_ceiling(truth), model(x[:1]).numel()
    print(f"\n### {name}: N = {len(x):,}, {problem.space.size:,} parameters; {truth.name}", end="")
    print("" if ceiling is None else f"; ceiling {ceiling:.3f}")
    for title, (method, dampings) in methods(problem.space.size, len(x) * outputs).items():
        fitted = method.fit(problem, len(qx))
        parts = []
        for damping in dampings or (None,):
            at = fitted if damping is None else fitted.with_damping(damping)
            e = evaluate_one(at.score((qx, qy)).values.double(), truth)
            label = fitted.method if damping is None else getattr(damping, "share", "from its curve")
            parts.append(f"{label}: {e.value:.3f} ({e.low:.3f} to {e.high:.3f})")
        print(f"{title}: {'; '.join(parts)}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description="Damping against retraining.")
    parser.add_argument("--setting", action="append", help="only settings whose name holds these words")
    parser.add_argument("--quick", action="store_true", help="tiny sizes")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    for name in SETTINGS:
        if asked.setting is None or any(words in name for words in asked.setting):
            measure(name, asked.quick)


if __name__ == "__main__":
    main()
