"""captum 0.9.0. Its Hessian is a sum over examples, so the damping is N times ours."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from captum.influence import TracInCP
from captum.influence._core.arnoldi_influence_function import ArnoldiInfluenceFunction
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from peers.workloads import Case, losses, read


class _Summed(nn.Module):
    """The loss of a batch, summed; `reduction` is where captum looks for how."""

    reduction = "sum"

    def forward(self, logits: Tensor, y: Tensor) -> Tensor:
        return losses(logits, y).sum()


def _load(model: nn.Module, path: str) -> float:
    model.load_state_dict(torch.load(path))
    return 1.0


def _tracin(case: Case, path: str) -> Any:
    return TracInCP(
        case.model,
        TensorDataset(case.x, case.y),
        checkpoints=[path],
        checkpoints_load_func=_load,
        batch_size=case.slab,
        loss_fn=_Summed(),
        sample_wise_grads_per_batch=True,
    )


def _arnoldi(case: Case, path: str) -> Any:
    train = TensorDataset(case.x, case.y)
    return ArnoldiInfluenceFunction(
        case.model,
        train,
        checkpoint=path,
        checkpoints_load_func=_load,
        batch_size=case.slab,
        loss_fn=_Summed(),
        sample_wise_grads_per_batch=True,
        hessian_dataset=train,
        projection_dim=50,
        arnoldi_dim=114,
        hessian_reg=case.damping * len(case.x),
    )


METHODS = {"tracin, one checkpoint": _tracin, "arnoldi 50": _arnoldi}


def make(options: dict[str, Any]) -> Callable[[], Any]:
    build = METHODS[options["method"]]

    def run() -> tuple[np.ndarray, dict[str, float]]:
        start = time.perf_counter()
        case = read(options)
        torch.manual_seed(0)
        with tempfile.TemporaryDirectory() as folder:
            path = str(Path(folder) / "weights.pt")
            torch.save(case.model.state_dict(), path)
            explainer = build(case, path)
            half = time.perf_counter()
            scores = explainer.influence((case.qx, case.qy))
        return scores.detach().numpy(), {"fit": half - start, "score": time.perf_counter() - half}

    return run
