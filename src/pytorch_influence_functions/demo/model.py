"""The demo's model, and the recipe by which `ptif.evaluation` trains and retrains it."""

from __future__ import annotations

from functools import partial

import torch
from jaxtyping import Float
from torch import Tensor, nn

from ..damping.rules import FromTraining
from ..evaluation.recipe import LinearDecay, Recipe
from ..objectives.likelihoods import CrossEntropy

LR = 0.05
MOMENTUM = 0.9
WEIGHT_DECAY = 5e-3
"""The L2 term of the objective, `WEIGHT_DECAY / 2 * |theta|^2`."""


class SmallCNN(nn.Module):
    """Two strided convolutions and two linear layers, 26,698 parameters; smooth activations, no dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(1, 8, 3, stride=2, padding=1),
            nn.GELU(),
            nn.Conv2d(8, 16, 3, stride=2, padding=1),
            nn.GELU(),
            nn.Flatten(),
            nn.Linear(16 * 7 * 7, 32),
            nn.GELU(),
            nn.Linear(32, 10),
        )

    def forward(self, images: Float[Tensor, "n 1 28 28"]) -> Float[Tensor, "n classes"]:
        outputs: Tensor = self.body(images)
        return outputs


def make_recipe(epochs: int = 30, batch_size: int = 100) -> Recipe:
    """Stochastic gradient descent with momentum; the learning rate rises for 1/30 of the steps, then falls to zero.

    Retraining keeps every batch as it is and gives removed images the weight 0: nothing but the removal differs.

    >>> make_recipe().steps(2000)
    600
    """
    return Recipe(
        SmallCNN,
        partial(torch.optim.SGD, lr=LR, momentum=MOMENTUM, weight_decay=WEIGHT_DECAY),
        epochs=epochs,
        batch_size=batch_size,
        schedule=LinearDecay(warmup=1 / 30),
        loss=CrossEntropy(),
        hold_batches=True,
    )


def training_damping(recipe: Recipe, examples: int) -> FromTraining:
    """The damping that stopping after the recipe's steps amounts to; nothing here is tuned by hand."""
    steps = recipe.steps(examples)
    mean_rate = LR * sum(recipe.schedule(step, steps) for step in range(steps)) / steps
    return FromTraining(lr=mean_rate, steps=steps, momentum=MOMENTUM)
