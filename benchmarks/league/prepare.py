"""Trains a setting's models and measures its truth; both kept under `.bench/cache`, under hashes of what they are."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from peers.prepare import DATA
from peers.recipes import Convex, model_of, objective, recipe
from peers.workloads import CACHE, Workload, workload
from torch import Tensor, nn

from pytorch_influence_functions import Recording, ekfac
from pytorch_influence_functions.evaluation import Subsets, retrain, train_model
from pytorch_influence_functions.problem.checkpoints import load_checkpoint
from pytorch_influence_functions.problem.problem import Problem

# Of the models that are explained; the truth's seeds are 0, 1, ...
SEEDS = (1000, 1001, 1002)


def _models(this: Workload, x: Tensor, y: Tensor) -> list[nn.Module]:
    """The models that are explained; all but the convex problem's, which has one minimum, with their runs."""
    how = recipe(this)
    if isinstance(how, Convex):
        return [model_of(this, x, y, SEEDS[0])]
    return [train_model(how, (x, y), seed, record=this.folder / f"run-{at}") for at, seed in enumerate(SEEDS)]


def _is_trained(this: Workload) -> bool:
    """Whether models, and the runs of those that have one, are there."""
    run = isinstance(recipe(this), Convex) or (this.folder / "run.npz").exists()
    return run and (this.folder / "meta.json").exists()


def _train(this: Workload) -> None:
    x, y, qx, qy = DATA[this.data](this.n, this.queries)
    this.folder.mkdir(parents=True, exist_ok=True)
    models = _models(this, x, y)
    if len(models) > 1:
        # For libraries that read no recordings.
        states = [load_checkpoint(c) for c in Recording.open(this.folder / "run-0").checkpoints]
        np.savez(this.folder / "run.npz", **{f"{k}.{n}": v.numpy() for k, s in enumerate(states) for n, v in s.items()})
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
        if not _is_trained(this):
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
