"""Small trained models and data in the forms that people have, for the tests of the classic API."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

from pytorch_influence_functions.classic import Config

DECAY = 0.1
"""L2 strength the toys are trained with, and damp * scale in `quick`: so the damped Hessian is the objective's."""


def fit(model: nn.Module, x: Tensor, y: Tensor, loss: Callable[..., Tensor], decay: float = DECAY) -> None:
    """Train to the minimum of mean loss + decay / 2 |theta|^2."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.LBFGS(
        parameters, max_iter=200, tolerance_grad=1e-11, tolerance_change=1e-14, line_search_fn="strong_wolfe"
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        value = loss(model(x), y) + decay / 2 * sum(p.square().sum() for p in parameters)
        value.backward()
        return value

    for _ in range(3):
        optimizer.step(closure)
    optimizer.zero_grad()


@dataclass
class Toy:
    """A softmax regression at its minimum, in float64."""

    model: nn.Module
    x: Tensor
    y: Tensor
    test_x: Tensor
    test_y: Tensor

    @property
    def train(self) -> DataLoader[Any]:
        return DataLoader(TensorDataset(self.x, self.y), batch_size=8, shuffle=True)

    @property
    def test(self) -> DataLoader[Any]:
        return DataLoader(TensorDataset(self.test_x, self.test_y), batch_size=2)


def toy(n: int = 40, tests: int = 9, features: int = 4, classes: int = 3, flipped: int = 4) -> Toy:
    """`flipped` of the training labels are wrong. Trained once; each caller gets a copy."""
    return copy.deepcopy(trained_toy(n, tests, features, classes, flipped))


@lru_cache
def trained_toy(n: int, tests: int, features: int, classes: int, flipped: int) -> Toy:
    g = torch.Generator().manual_seed(0)
    centres = 1.5 * torch.randn(classes, features, generator=g, dtype=torch.float64)
    y = torch.arange(n + tests) % classes
    x = centres[y] + torch.randn(n + tests, features, generator=g, dtype=torch.float64)
    labels = y[:n].clone()
    labels[:flipped] = (labels[:flipped] + 1) % classes
    model = nn.Linear(features, classes).double()
    fit(model, x[:n], labels, nn.functional.cross_entropy)
    return Toy(model, x[:n], labels, x[n:], y[n:])


def quick(folder: Path, **changes: Any) -> Config:
    """A config for toys: full batches, which settle to 1e-8 quickly; progress off."""
    config = Config(outdir=str(folder), progress=False, batch_size=1000, scale=2.0, damp=DECAY / 2.0, tolerance=1e-3)
    config.update(changes)
    return config


def hessian(model: nn.Module, loss: Callable[[], Tensor]) -> Tensor:
    """Dense Hessian over all parameters, flattened in parameter order."""
    parameters = list(model.parameters())
    first = torch.autograd.grad(loss(), parameters, create_graph=True)
    flat = torch.cat([g.reshape(-1) for g in first])
    rows = [torch.autograd.grad(f, parameters, retain_graph=True, allow_unused=True) for f in flat]
    return torch.stack([
        torch.cat([
            torch.zeros(p.numel(), dtype=p.dtype) if g is None else g.reshape(-1)
            for g, p in zip(row, parameters, strict=True)
        ])
        for row in rows
    ])  # fmt: skip


def gradient(model: nn.Module, loss: Callable[[], Tensor]) -> Tensor:
    return torch.cat([g.reshape(-1) for g in torch.autograd.grad(loss(), list(model.parameters()))])


def flat(vectors: list[Tensor]) -> Tensor:
    return torch.cat([v.reshape(-1) for v in vectors])


@dataclass
class Images(Dataset[tuple[Tensor, int]]):
    """An image dataset as torchvision makes them: `.targets` may be there, reading an item is counted."""

    pixels: Tensor
    labels_: list[int]
    transform: Callable[[Tensor], Tensor] | None = None
    reads: int = 0

    def __len__(self) -> int:
        return len(self.labels_)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        self.reads += 1
        picture = self.pixels[index]
        return (picture if self.transform is None else self.transform(picture)), self.labels_[index]


class ImagesWithTargets(Images):
    """The same, with `.targets` and `.classes`."""

    classes = ("ship", "frog", "cat")

    @property
    def targets(self) -> list[int]:
        return self.labels_


def images(kind: type[Images], n: int = 12, **more: Any) -> Images:
    g = torch.Generator().manual_seed(1)
    return kind(torch.rand(n, 1, 6, 6, generator=g), [(i * 2) % 3 for i in range(n)], **more)


def image_model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Tanh(), nn.Dropout(0.5), nn.Flatten(), nn.Linear(32, 3)
    )
