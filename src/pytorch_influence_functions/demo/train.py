"""The demo's model and its training: one recipe, run again without some images to see what really changes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeAlias

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional

from ..damping.rules import FromTraining

Weights: TypeAlias = dict[str, Tensor]


@dataclass(frozen=True)
class Recipe:
    """Stochastic gradient descent with momentum; the learning rate rises for `warmup` steps, then falls to zero.

    `weight_decay` is the L2 term of the objective, `strength / 2 * |theta|^2`.

    >>> Recipe().steps(2000)
    600
    """

    epochs: int = 30
    batch_size: int = 100
    lr: float = 0.05
    momentum: float = 0.9
    weight_decay: float = 5e-3
    warmup: int = 20
    seed: int = 0

    def steps(self, examples: int) -> int:
        """Optimiser steps for a training set of that size."""
        return self.epochs * -(-examples // self.batch_size)

    def rate(self, step: int, steps: int) -> float:
        """The learning rate of one step."""
        return self.lr * min(1.0, (step + 1) / self.warmup) * (1.0 - step / steps)

    def damping(self, examples: int) -> FromTraining:
        """The damping that stopping after these steps amounts to; nothing here is tuned by hand."""
        steps = self.steps(examples)
        mean = sum(self.rate(step, steps) for step in range(steps)) / steps
        return FromTraining(lr=mean, steps=steps, momentum=self.momentum)


class SmallCNN(nn.Module):
    """Two strided convolutions and two linear layers, 26,698 parameters; smooth activations, no dropout."""

    def __init__(self, classes: int = 10) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(1, 8, 3, stride=2, padding=1),
            nn.GELU(),
            nn.Conv2d(8, 16, 3, stride=2, padding=1),
            nn.GELU(),
            nn.Flatten(),
            nn.Linear(16 * 7 * 7, 32),
            nn.GELU(),
            nn.Linear(32, classes),
        )

    def forward(self, images: Float[Tensor, "n 1 28 28"]) -> Float[Tensor, "n classes"]:
        outputs: Tensor = self.body(images)
        return outputs


def initial(seed: int, classes: int = 10) -> Weights:
    """The start that every training shares. The global random state is left alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return SmallCNN(classes).state_dict()


def train(
    images: Float[Tensor, "n 1 28 28"],
    labels: Int[Tensor, " n"],
    recipe: Recipe,
    start: Weights,
    without: Sequence[int] = (),
    each_epoch: Callable[[], None] = lambda: None,
) -> SmallCNN:
    """Train from `start`; images named in `without` weigh nothing, all else (the batches too) stays as it was.

    The same call gives the same weights: batches follow the recipe's seed, not the global random state.
    """
    with torch.device("meta"):  # nothing is drawn at random here: the weights are the start's
        model = SmallCNN(len(start["body.7.bias"]))
    model.load_state_dict({name: value.clone() for name, value in start.items()}, assign=True)
    weight = torch.ones(len(images))
    weight[list(without)] = 0.0
    order = torch.Generator().manual_seed(recipe.seed)
    optimiser = torch.optim.SGD(
        model.parameters(), lr=recipe.lr, momentum=recipe.momentum, weight_decay=recipe.weight_decay
    )
    steps, step = recipe.steps(len(images)), 0
    with torch.enable_grad():
        for _ in range(recipe.epochs):
            for ids in torch.split(torch.randperm(len(images), generator=order), recipe.batch_size):
                for group in optimiser.param_groups:
                    group["lr"] = recipe.rate(step, steps)
                losses = functional.cross_entropy(model(images[ids]), labels[ids], reduction="none")
                optimiser.zero_grad()
                (losses @ weight[ids] / len(ids)).backward()  # type: ignore[no-untyped-call]
                optimiser.step()
                step += 1
            each_epoch()
    return model.eval()


def train_many(
    images: Tensor,
    labels: Tensor,
    recipe: Recipe,
    start: Weights,
    removals: Sequence[Sequence[int]],
    each_epoch: Callable[[], None] = lambda: None,
) -> Iterator[SmallCNN]:
    """`train` once per removal, in the order given, two at a time on two cores."""

    def one(without: Sequence[int]) -> SmallCNN:
        # Set again in the thread itself: the number of threads belongs to the thread that asks.
        torch.set_num_threads(1)
        return train(images, labels, recipe, start, without, each_epoch)

    with one_thread(), ThreadPoolExecutor(max_workers=2) as pool:
        try:
            yield from pool.map(one, removals)
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


@contextmanager
def one_thread() -> Iterator[None]:
    """A single thread inside: such small layers gain nothing from more, and sums are added in one order."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@torch.no_grad()
def look(model: nn.Module, images: Tensor, labels: Tensor) -> tuple[Float[Tensor, " n"], Float[Tensor, "n classes"]]:
    """The loss of every example, and the probabilities behind it."""
    outputs = model(images)
    return functional.cross_entropy(outputs, labels, reduction="none"), outputs.softmax(1)
