"""pyDVL 0.10.0. Damping is absolute, added to means over examples."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from pydvl.influence import InfluenceMode
from pydvl.influence.torch import ArnoldiInfluence, CgInfluence, EkfacInfluence, NystroemSketchInfluence
from torch.utils.data import DataLoader, TensorDataset

from peers.workloads import Case, mean_loss, read

METHODS: dict[str, Callable[[Case], Any]] = {
    # It always uses torch's cross entropy, of one label per example.
    "ekfac": lambda case: EkfacInfluence(case.model, update_diagonal=True, hessian_regularization=case.damping),
    "arnoldi 50": lambda case: ArnoldiInfluence(case.model, mean_loss, case.damping, rank=50),
    "nystroem 50": lambda case: NystroemSketchInfluence(case.model, mean_loss, case.damping, rank=50),
    "cg": lambda case: CgInfluence(case.model, mean_loss, case.damping, maxiter=100),
}


def make(options: dict[str, Any]) -> Callable[[], Any]:
    build = METHODS[options["method"]]

    def run() -> tuple[np.ndarray, dict[str, float]]:
        start = time.perf_counter()
        case = read(options)
        torch.manual_seed(0)
        train = DataLoader(TensorDataset(case.x, case.y), batch_size=case.slab, shuffle=False)
        model = build(case).fit(train)
        half = time.perf_counter()
        # Batch by batch, as its own sequential calculator does: gradients of all examples at once need not fit.
        model_scores = []
        factors = model.influence_factors(case.qx, case.qy)
        for x, y in train:
            model_scores.append(model.influences_from_factors(factors, x, y, mode=InfluenceMode.Up))
        scores = torch.cat(model_scores, dim=1)
        return scores.detach().numpy(), {"fit": half - start, "score": time.perf_counter() - half}

    return run
