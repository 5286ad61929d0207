"""This package."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import numpy as np

import pytorch_influence_functions as ptif
from peers.workloads import read
from pytorch_influence_functions.curvature import EKFAC, GGN, Fisher
from pytorch_influence_functions.influence.attribution import Influence
from pytorch_influence_functions.solvers import CG

METHODS: dict[str, Callable[[float], Any]] = {
    "grad_dot": lambda damping: ptif.methods.grad_dot(),
    "kfac": lambda damping: ptif.methods.kfac(damping),
    "ekfac": lambda damping: ptif.ekfac(damping),
    "ekfac, own damping": lambda damping: ptif.ekfac(),
    "ekfac of drawn labels": lambda damping: ptif.ekfac(damping, fisher=Fisher()),
    "dual": lambda damping: ptif.dual(damping=damping),
    "dual, own damping": lambda damping: ptif.dual(),
    "arnoldi 50": lambda damping: ptif.methods.arnoldi(50, curvature=GGN(), damping=damping),
    "datainf": lambda damping: ptif.methods.datainf(damping),
    "cg guided by ekfac": lambda damping: Influence(
        GGN(), CG(rtol=1e-2, max_steps=1000), damping, preconditioner=EKFAC()
    ),
}


def make(options: dict[str, Any]) -> Callable[[], Any]:
    def run() -> tuple[np.ndarray, dict[str, float]]:
        start = time.perf_counter()
        case = read(options)
        objective = ptif.TokenCrossEntropy(average=False) if case.tokens else ptif.CrossEntropy()
        problem = ptif.Problem(case.model, objective, (case.x, case.y), batch_size=case.slab)
        fitted = METHODS[options["method"]](case.damping).fit(problem, n_queries=len(case.qx))
        half = time.perf_counter()
        scores = np.asarray(fitted.score((case.qx, case.qy)).values)
        return scores, {"fit": half - start, "score": time.perf_counter() - half}

    return run
