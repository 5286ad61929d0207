"""The plain loops that scoring is measured against: what one would write without this package."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from nets import cifar, floor_case
from torch.utils.data import TensorDataset, default_collate

Run = Callable[[], Any]


def cifar_loop(options: dict[str, Any]) -> Run:
    """One forward and backward pass per training image and a dot product with a given s_test.

    With `seed`, the loop does what the seed's did besides: each image goes through dataset and collate function,
    and the graph of every gradient is kept (`create_graph=True`). Without, it is as lean as such a loop can be.
    """
    model, x, y, qx, qy = cifar(options["n"])
    dataset, seed = TensorDataset(x, y), options["seed"]
    parameters = list(model.parameters())
    s_test = torch.autograd.grad(F.cross_entropy(model(qx), qy), parameters)

    def run() -> np.ndarray:
        scores = []
        for i in range(len(x)):
            one, label = default_collate([dataset[i]]) if seed else (x[i : i + 1], y[i : i + 1])
            loss = F.cross_entropy(model(one), label)
            grads = torch.autograd.grad(loss, parameters, create_graph=seed)
            scores.append(sum(float((g.detach() * s).sum()) for g, s in zip(grads, s_test, strict=True)) / len(x))
        return np.array([scores])

    return run


def epoch(options: dict[str, Any]) -> Run:
    """One forward and backward pass over the training set, in batches, gradients accumulated: no optimiser step."""
    model, x, y, size = floor_case(options["case"], options["quick"])
    x, y = x[:-1], y[:-1]

    def run() -> None:
        model.zero_grad(set_to_none=True)
        for at in range(0, len(x), size):
            outputs, targets = model(x[at : at + size]), y[at : at + size]
            F.cross_entropy(outputs.flatten(0, -2), targets.flatten(), reduction="sum").backward()

    return run
