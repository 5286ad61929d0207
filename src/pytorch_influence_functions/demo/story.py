"""How much the demo explains and checks, and the record of its results."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import final

import numpy as np
from jaxtyping import Float, Int
from torch import Tensor, nn

from ..evaluation.recipe import Recipe
from ..scores.scores import Scores
from .data import DemoData


@final
@dataclass(frozen=True)
class Extent:
    """How much is explained and checked."""

    wrong: int = 3
    """How many misclassified test images are explained: the first ones of the test set, each of another class."""
    right: int = 2
    """How many correctly classified ones."""
    shown: int = 3
    """How many of the most helpful and of the most harmful training images are printed for each."""
    suspects: int = 200
    """How many of the most suspected labels are compared with the planted ones."""
    group: int = 40
    """How many images a group removes together."""
    groups: int = 2
    """How many groups are taken from either end of the predicted effect, and how many random ones."""


@final
@dataclass(frozen=True, eq=False)
class TrainedModel:
    """The model, with its losses and predictions on both sets."""

    model: nn.Module
    train_losses: Float[Tensor, " n"]
    train_probabilities: Float[Tensor, "n classes"]
    train_accuracy: float
    test_losses: Float[Tensor, " m"]
    test_probabilities: Float[Tensor, "m classes"]
    test_accuracy: float

    @property
    def train_classes(self) -> Int[Tensor, " n"]:
        """The class that the model gives each training image."""
        return self.train_probabilities.argmax(1)


@final
@dataclass(frozen=True, eq=False)
class Suspects:
    """Training images ranked by how wrong their label looks."""

    self_influence: Float[Tensor, " n"]
    suspicion: Float[Tensor, " n"]
    """The predicted loss of each image for a model that was never trained on it."""
    order: Int[Tensor, " n"]
    """Most suspected first."""
    count: int
    hits: int
    """Planted labels among the first `count`."""
    hits_by_loss: int
    hits_at_random: int


@final
@dataclass(frozen=True)
class Comparison:
    """Images removed together, the change predicted, and the change measured by retraining."""

    name: str
    ids: tuple[int, ...]
    query: int | None
    """Test image whose loss is measured; `None`: the mean over all of them."""
    predicted: float
    actual: float


@final
@dataclass(frozen=True, eq=False)
class Story:
    """All results of the demo."""

    data: DemoData
    recipe: Recipe
    seed: int
    trained: TrainedModel
    scores: Scores
    queries: tuple[int, ...]
    suspects: Suspects
    groups: tuple[Comparison, ...]
    singles: tuple[Comparison, ...]
    seconds: float


def agreement(comparisons: Sequence[Comparison]) -> tuple[float, float]:
    """Pearson's r between predicted and actual changes, and the least-squares slope of actual on predicted."""
    predicted, actual = ([getattr(c, n) for c in comparisons] for n in ("predicted", "actual"))
    slope = float(np.polyfit(predicted, actual, 1)[0])
    return float(np.corrcoef(predicted, actual)[0, 1]), slope
