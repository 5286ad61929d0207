"""This package's methods in the league, every one with its own defaults: nothing is tuned on the truth."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from peers.recipes import objective
from peers.workloads import read, workload

import pytorch_influence_functions as ptif
from pytorch_influence_functions.curvature import EKFAC, GGN
from pytorch_influence_functions.damping import FromCurve
from pytorch_influence_functions.methods import EmbeddingSimilarity, Random, TrainingLoss
from pytorch_influence_functions.trajectory import SOURCE

METHODS: dict[str, Callable[[], Any]] = {
    "random": Random,
    "loss": TrainingLoss,
    "embedding similarity": EmbeddingSimilarity,
    "gradient dot product": ptif.methods.grad_dot,
    "gradient cosine": ptif.methods.grad_cos,
    "chosen by itself": ptif.Influence,
    "K-FAC": ptif.methods.kfac,
    "EK-FAC": ptif.ekfac,
    "Shampoo": ptif.methods.shampoo,
    "exact Gauss-Newton": lambda: ptif.Influence(GGN()),
    "dual": ptif.dual,
    "dual, damping from the path": lambda: ptif.dual(damping=FromCurve()),
    "TRAK 1024": lambda: ptif.trak(1024),
    "DataInf": ptif.methods.datainf,
    "Arnoldi 50": ptif.methods.arnoldi,
}
# These follow the recorded run of the model that is explained, or of several models.
ALONG: dict[str, Callable[[list[ptif.Recording]], Any]] = {
    "EK-FAC along the run": ptif.methods.along,
    "Shampoo along the run": lambda runs: ptif.methods.along(runs, ptif.methods.shampoo()),
    "SOURCE, EK-FAC": lambda runs: SOURCE(runs[0].segments(3), EKFAC()),
}
ENSEMBLES = ("chosen by itself", "EK-FAC", "dual, damping from the path", "TRAK 1024", "EK-FAC along the run")


def make(options: dict[str, Any]) -> Callable[[], Any]:
    """Scores by one method for one setting, over so many models."""
    this = workload(options["workload"], options["quick"])

    def run() -> tuple[np.ndarray, dict[str, float]]:
        start = time.perf_counter()
        case = read(options)
        states = []
        for at in range(1, options["models"]):
            with np.load(this.folder / f"trained-{at}.npz") as file:
                states.append({k[2:]: torch.from_numpy(file[k]) for k in file.files if k.startswith("w.")})
        along = ALONG.get(options["method"])
        runs = [ptif.Recording.open(this.folder / f"run-{at}") for at in range(options["models"] if along else 0)]
        checkpoints = [case.model.state_dict(), *states] if states and not along else []
        problem = ptif.Problem(
            case.model, objective(this), (case.x, case.y), weight_decay=this.weight_decay, batch_size=case.slab,
            checkpoints=checkpoints,
        )  # fmt: skip
        method = along(runs) if along else METHODS[options["method"]]()
        fitted = method.fit(problem, n_queries=len(case.qx))
        half = time.perf_counter()
        scores = np.asarray(fitted.score((case.qx, case.qy)).values)
        return scores, {"fit": half - start, "score": time.perf_counter() - half}

    return run
