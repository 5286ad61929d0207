"""Two garments, and a network trained on the eight others as the source of features: figures 4 and 5 share it."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import pytorch_influence_functions as ptif

from . import data
from .training import newton, with_constant

WORDS = "Fashion-MNIST, 900 + 300 pullovers and as many coats"
DECAY = 1e-3
PULLOVER, COAT = 2, 4


class Trunk(nn.Module):
    """Images [n, 1, 28, 28] to 128 features, at a mean length of one."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(1, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
            nn.Conv2d(32, 64, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
            nn.Flatten(), nn.Linear(64 * 49, 128), nn.ReLU(),
        )  # fmt: skip
        self.register_buffer("size", torch.ones(()))

    def forward(self, x: Tensor) -> Tensor:
        features: Tensor = self.layers(x) / self.size
        return features


@dataclass(frozen=True, eq=False)
class Head:
    """Logistic regression on features and a constant, at its minimum."""

    features: Tensor
    labels: Tensor
    decay: float
    model: nn.Linear

    @staticmethod
    def fit(features: Tensor, labels: Tensor, decay: float, start: Tensor | None = None) -> Head:
        """By Newton's method on features [n, d] and labels 0 or 1; `start` [d + 1] is near the minimum."""
        x = with_constant(features)
        return Head(x, labels, decay, newton(x, labels, decay, start))

    def problem(self) -> ptif.Problem:
        """The trained head, for the library."""
        data_ = (self.features, self.labels[:, None].double())
        return ptif.Problem(self.model, ptif.Bernoulli(), data_, weight_decay=self.decay, batch_size=1024)


@dataclass(frozen=True, eq=False)
class Garments:
    """Pullovers (label 0) against coats (1), images [n, 1, 28, 28] float64, 0 to 1; what sees them, and the head."""

    split: data.Split
    trunk: Trunk
    head: Head

    def features(self, images: Tensor) -> Tensor:
        """What the head sees of images: features and a constant."""
        return with_constant(self.trunk(images))


@cache
def garments() -> Garments:
    """900 + 300 images of each."""
    everything = data.fashion()
    x, y = _two(everything.x, everything.y, 900)
    qx, qy = _two(everything.qx, everything.qy, 300)
    trunk = _trained(everything, 16_000, 3)
    with torch.no_grad():
        trunk.double().size.fill_(float(trunk(x).norm(dim=1).mean()))
        features = trunk(x)
    return Garments(data.Split(x, y, qx, qy), trunk, Head.fit(features, y, DECAY))


def _two(x: Tensor, y: Tensor, each: int) -> tuple[Tensor, Tensor]:
    kept = torch.cat([(y == label).nonzero().flatten()[:each] for label in (PULLOVER, COAT)])
    kept = kept[torch.randperm(len(kept), generator=torch.Generator().manual_seed(0))]
    return x[kept].double(), (y[kept] == COAT).long()


def _trained(everything: data.Split, count: int, epochs: int) -> Trunk:
    """On the eight other classes, in float32; then frozen."""
    others = ((everything.y != PULLOVER) & (everything.y != COAT)).nonzero().flatten()[:count]
    x, y = everything.x[others].float(), everything.y[others]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        trunk = Trunk()
        model = nn.Sequential(trunk, nn.Linear(128, 10))
        steps = torch.optim.Adam(model.parameters(), lr=1e-3)
        for _ in range(epochs):
            for batch in torch.randperm(len(x)).split(64):
                steps.zero_grad()
                F.cross_entropy(model(x[batch]), y[batch]).backward()
                steps.step()
    return trunk.eval().requires_grad_(False)
