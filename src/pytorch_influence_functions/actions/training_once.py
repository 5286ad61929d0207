"""One training of a model, by the built-in recipe or by a user's own function."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ..core.errors import InvalidInput
from ..evaluation.accuracy import Accuracy
from ..evaluation.recipe import Recipe
from ..evaluation.retraining import train_model
from ..evaluation.training import Job
from ..evaluation.user_training import Work
from ..problem.data import Source


def train_once(recipe: Any, source: Source, seed: int) -> nn.Module:
    """Train on everything with one seed; the model is returned in eval mode, the random state is as before.

    Args:
        recipe: a `Recipe`, or a function `(dataset, seed) -> trained model`.
        source: the training data.
        seed: of the training.

    Raises:
        InvalidInput: it is neither, or the function returns no model.
    """
    if isinstance(recipe, Recipe):
        return train_model(recipe, source, seed)
    if not callable(recipe):
        raise InvalidInput(
            f"recipe must be a Recipe or a function (dataset, seed) -> trained model, got {type(recipe).__name__}."
        )
    everything = Job(torch.ones(len(source), dtype=torch.bool), {}, seed)
    return Work(recipe, source, source, Accuracy()).train(everything)
