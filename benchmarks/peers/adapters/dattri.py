"""dattri 0.3.0. Damping is absolute, added to means over examples."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import dattri.algorithm as library
import numpy as np
import torch
from dattri.task import AttributionTask
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.data import DataLoader, TensorDataset

from peers.workloads import Case, losses, mean_loss, read

Loss = Callable[[Any, Any], Tensor]


def _mean(model: nn.Module) -> Loss:
    def loss(parameters: Any, data: Any) -> Tensor:
        x, y = data
        return mean_loss(functional_call(model, parameters, (x,)), y.long())

    return loss


def _log_odds(model: nn.Module) -> Loss:
    """TRAK's output function for one example."""

    def output(parameters: Any, data: Any) -> Tensor:
        x, y = data
        log_p = -losses(functional_call(model, parameters, (x[None],)), y[None])[0]
        return log_p - torch.log(1 - torch.exp(log_p))

    return output


def _probability(model: nn.Module, tokens: bool) -> Loss:
    def correct(parameters: Any, data: Any) -> Tensor:
        x, y = data
        if single := y.dim() == int(tokens):  # asked for a batch, or for one example
            x, y = x[None], y[None]
        found = torch.exp(-losses(functional_call(model, parameters, (x,)), y))
        return found[0] if single else found

    return correct


def _inner(kind: str, case: Case) -> Any:
    task = AttributionTask(loss_func=_mean(case.model), model=case.model, checkpoints=case.model.state_dict())
    if kind == "ekfac":
        return library.IFAttributorEKFAC(task=task, module_name=case.layers(nn.Linear), damping=case.damping)
    if kind == "arnoldi":
        return library.IFAttributorArnoldi(task=task, regularization=case.damping, proj_dim=50, max_iter=114)
    if kind == "cg":
        return library.IFAttributorCG(task=task, regularization=case.damping, max_iter=100)
    return library.IFAttributorDataInf(task=task, regularization=case.damping)


METHODS = {
    "ekfac": "ekfac",
    "trak 512": "trak",
    "arnoldi 50": "arnoldi",
    "datainf": "datainf",
    "cg": "cg",
}


def make(options: dict[str, Any]) -> Callable[[], Any]:
    kind = METHODS[options["method"]]

    def run() -> tuple[np.ndarray, dict[str, float]]:
        start = time.perf_counter()
        case = read(options)
        torch.manual_seed(0)
        train = DataLoader(TensorDataset(case.x, case.y), batch_size=case.slab, shuffle=False)
        queries = DataLoader(TensorDataset(case.qx, case.qy), batch_size=len(case.qx), shuffle=False)
        if kind == "trak":
            attributor: Any = library.TRAKAttributor(
                task=AttributionTask(
                    model=case.model, loss_func=_log_odds(case.model), checkpoints=[case.model.state_dict()]
                ),
                correct_probability_func=_probability(case.model, case.tokens),
                device="cpu",
                projector_kwargs={"proj_dim": min(512, len(case.x) // 2), "device": "cpu"},
            )
        else:
            attributor = _inner(kind, case)
        attributor.cache(train)
        half = time.perf_counter()
        with torch.no_grad():
            scores = attributor.attribute(queries) if kind == "trak" else attributor.attribute(train, queries)
        return scores.T.numpy(), {"fit": half - start, "score": time.perf_counter() - half}

    return run
