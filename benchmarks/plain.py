"""The plain loops that scoring is measured against: what one would write without this package."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from nets import cifar, floor_case

Run = Callable[[], Any]


def cifar_loop(options: dict[str, Any]) -> Run:
    """One forward and backward pass per training image and a dot product with a given s_test, as the seed had it.

    The seed also kept the graph of every gradient (`create_graph=True`); the loop here does not, which is faster.
    """
    model, x, y, qx, qy = cifar(options["n"])
    parameters = list(model.parameters())
    s_test = torch.autograd.grad(F.cross_entropy(model(qx), qy), parameters)

    def run() -> np.ndarray:
        scores = []
        for i in range(len(x)):
            grads = torch.autograd.grad(F.cross_entropy(model(x[i : i + 1]), y[i : i + 1]), parameters)
            scores.append(sum(float((g * s).sum()) for g, s in zip(grads, s_test, strict=True)) / len(x))
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
