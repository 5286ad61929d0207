"""What the demo is asked to do, and the record of what it found."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import final

import numpy as np
from jaxtyping import Float, Int
from torch import Tensor, nn

from ..scores.scores import Scores
from .data import DemoData
from .train import Recipe, Weights


@final
@dataclass(frozen=True)
class Plan:
    """How much is explained and checked."""

    wrong: int = 3
    """Misclassified test images explained: the first ones of the test set, each of another class."""
    right: int = 2
    """Correctly classified ones."""
    shown: int = 3
    """Most helpful and most harmful training images printed for each."""
    suspects: int = 200
    """How far down the ranking of suspected labels one looks."""
    group: int = 40
    """Images removed together."""
    groups: int = 2
    """Groups from either end of the predicted effect, and as many random ones."""


@final
@dataclass(frozen=True, eq=False)
class Trained:
    """The model and what it makes of both sets."""

    model: nn.Module
    start: Weights
    train_losses: Float[Tensor, " n"]
    train_said: Int[Tensor, " n"]
    train_accuracy: float
    test_losses: Float[Tensor, " m"]
    test_odds: Float[Tensor, "m classes"]
    test_accuracy: float


@final
@dataclass(frozen=True, eq=False)
class Suspects:
    """Training images by how wrong their label looks."""

    own: Float[Tensor, " n"]
    """Self-influence of each."""
    suspicion: Float[Tensor, " n"]
    """Predicted loss of each image for a model that was never trained on it."""
    order: Int[Tensor, " n"]
    """Most suspected first."""
    count: int
    hits: int
    """Planted labels among the first `count`."""
    hits_by_loss: int
    hits_at_random: int


@final
@dataclass(frozen=True)
class Removal:
    """Images left out together, the change predicted, and the change found by retraining."""

    name: str
    ids: tuple[int, ...]
    query: int | None
    """Test image whose loss is measured; `None`: the mean over all of them."""
    predicted: float
    actual: float


@final
@dataclass(frozen=True, eq=False)
class Story:
    """Everything the demo found."""

    data: DemoData
    recipe: Recipe
    trained: Trained
    scores: Scores
    queries: tuple[int, ...]
    suspects: Suspects
    groups: tuple[Removal, ...]
    singles: tuple[Removal, ...]
    seconds: float


def agreement(removals: Sequence[Removal]) -> tuple[float, float]:
    """Pearson's r between predicted and actual changes, and the least-squares slope of actual on predicted."""
    predicted, actual = ([getattr(r, n) for r in removals] for n in ("predicted", "actual"))
    slope = float(np.polyfit(predicted, actual, 1)[0])
    return float(np.corrcoef(predicted, actual)[0, 1]), slope
