"""Trains a setting's models and measures its truth; both kept under `.bench/cache`, under hashes of what they are."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from peers.prepare import DATA
from peers.workloads import CACHE, NETS, Workload, workload
from torch import Tensor, nn

from pytorch_influence_functions import CrossEntropy, SquaredError, TokenCrossEntropy, ekfac
from pytorch_influence_functions.evaluation import Linear, Recipe, Subsets, retrain, trained
from pytorch_influence_functions.problem import Problem

# Of the models that are explained; the truth's seeds are 0, 1, ...
SEEDS = (1000, 1001, 1002)


def objective(this: Workload) -> Any:
    """Training loss and measure."""
    if this.net == "regression":
        return SquaredError()
    return TokenCrossEntropy(average=False) if this.tokens else CrossEntropy()


@dataclass(frozen=True)
class Convex:
    """The minimum of mean loss + weight decay: nothing is left to chance."""

    net: str
    steps: int
    decay: float

    def __call__(self, dataset: Any, seed: int) -> nn.Module:
        x, y = (torch.stack(v).double() for v in zip(*(dataset[i] for i in range(len(dataset))), strict=True))
        model = NETS[self.net]().double()
        for p in model.parameters():
            nn.init.zeros_(p)
        optimizer = torch.optim.LBFGS(
            model.parameters(), max_iter=self.steps, tolerance_grad=1e-6, history_size=50, line_search_fn="strong_wolfe"
        )

        def closure() -> Tensor:
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(model(x), y.long())
            loss = loss + self.decay / 2 * sum(p.square().sum() for p in model.parameters())
            loss.backward()
            return loss

        optimizer.step(closure)
        return model.float()


def recipe(this: Workload) -> Any:
    """How every model of the setting is trained."""
    if this.net == "logistic":
        return Convex(this.net, this.epochs, this.weight_decay)
    if this.tokens:
        optimizer: Any = partial(torch.optim.Adam, lr=this.rate)
    else:
        optimizer = partial(torch.optim.SGD, lr=this.rate, momentum=0.9, weight_decay=this.weight_decay)
    return Recipe(NETS[this.net], optimizer, this.epochs, this.batch, Linear(0.1), objective(this))


def _models(this: Workload, x: Tensor, y: Tensor) -> list[nn.Module]:
    how = recipe(this)
    if isinstance(how, Convex):
        return [how(torch.utils.data.TensorDataset(x, y), 0)]
    return [trained(how, (x, y), seed) for seed in SEEDS]


def _train(this: Workload) -> None:
    x, y, qx, qy = DATA[this.data](this.n, this.queries)
    models = _models(this, x, y)
    this.folder.mkdir(parents=True, exist_ok=True)
    data = {"x": x, "y": y, "qx": qx, "qy": qy}
    for at, model in enumerate(models):
        name = "trained.npz" if at == 0 else f"trained-{at}.npz"
        arrays = {f"w.{k}": v for k, v in model.state_dict().items()} | data
        np.savez(this.folder / name, **{k: v.numpy() for k, v in arrays.items()})
    first = models[0].eval()
    with torch.no_grad():
        measured = [objective(this).losses(first(a), (a, b)) for a, b in ((x, y), (qx, qy))]
    meta = {"models": len(models), "damping": this.weight_decay}
    meta |= {"loss": float(measured[0].mean()), "query_loss": float(measured[1].mean())}
    meta["parameters"] = sum(p.numel() for p in first.parameters())
    if this.share is not None:
        # What libraries without a rule of their own are given: a tenth of the mean eigenvalue of EK-FAC.
        fitted = ekfac(1.0).fit(Problem(first, objective(this), (x, y)))
        meta["damping"] = float(f"{this.share * fitted.members[0].operator.mean_eigenvalue():.3g}")
    (this.folder / "meta.json").write_text(json.dumps(meta))


def make(options: dict[str, Any]) -> Callable[[], dict[str, Any]]:
    """What is missing of a setting; says where its truth is."""
    this = workload(options["workload"], options["quick"])

    def run() -> dict[str, Any]:
        if not (this.folder / "meta.json").exists():
            _train(this)
        path = this.folder / f"truth-{this.subsets}x{this.seeds}.safetensors"
        if not path.exists():
            start = time.perf_counter()
            x, y, qx, qy = DATA[this.data](this.n, this.queries)
            truth = retrain(
                recipe(this), Subsets.halves(this.n, this.subsets), this.seeds, train=(x, y), queries=(qx, qy),
                measure=objective(this), folder=CACHE / "league", workers=options["threads"],
            )  # fmt: skip
            truth.save(path)
            print(f"truth of setting {this.number}: {time.perf_counter() - start:.0f} s")
        found: dict[str, Any] = json.loads((this.folder / "meta.json").read_text())
        return found | {"truth": str(path), "title": this.title, "n": this.n, "queries": this.queries}

    return run
