"""A model's outputs as what it answers: probabilities of classes, or a number."""

from typing import Any

import torch
from torch import Tensor

from ..objectives.bernoulli import Bernoulli
from ..objectives.likelihoods import CrossEntropy, SquaredError


def as_predictions(objective: Any, outputs: Tensor) -> Tensor | None:
    """Probabilities [n, C], or a number each [n]; None if neither fits."""
    if isinstance(objective, CrossEntropy) and outputs.ndim == 2:
        return outputs.softmax(1)
    if isinstance(objective, Bernoulli) and outputs.numel() == len(outputs):
        p = outputs.reshape(-1).sigmoid()
        return torch.stack([1 - p, p], 1)
    if isinstance(objective, SquaredError) and outputs.numel() == len(outputs):
        return outputs.reshape(-1)
    return None
