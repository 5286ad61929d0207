"""How the models of every workload are trained; the same recipe for the model that is explained and for its truth."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from peers.workloads import NETS, Workload
from pytorch_influence_functions import CrossEntropy, SquaredError, TokenCrossEntropy
from pytorch_influence_functions.evaluation import LinearDecay, Recipe, train_model


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
    return Recipe(NETS[this.net], optimizer, this.epochs, this.batch, LinearDecay(0.1), objective(this))


def model_of(this: Workload, x: Tensor, y: Tensor, seed: int = 0) -> nn.Module:
    """The model trained on everything."""
    how = recipe(this)
    return (
        how(torch.utils.data.TensorDataset(x, y), seed) if isinstance(how, Convex) else train_model(how, (x, y), seed)
    )
