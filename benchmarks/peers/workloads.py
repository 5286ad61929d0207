"""What is measured: four trained models and their data. Needs torch only, so that every library's process can read it.

Trained once by `prepare.py` and kept; here they are described, and read.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from nets import Transformer, mlp
from torch import Tensor, nn

HOME = Path(os.environ.get("PTIF_BENCH_HOME") or Path(__file__).resolve().parents[2] / ".bench")
CACHE = HOME / "cache"


@dataclass(frozen=True)
class Workload:
    """A model, its data and how it was trained; what is computed to judge scores by."""

    number: int
    title: str
    data: str  # a loader in `prepare.py`
    net: str
    n: int
    queries: int
    epochs: int
    rate: float
    weight_decay: float = 0.0
    batch: int = 100  # in training
    slab: int = 250  # examples at once in scoring, the same for every library
    # Absolute damping: this share of the mean eigenvalue of the Gauss-Newton matrix, or the weight decay itself.
    share: float | None = 0.1
    exact_queries: int = 30
    exact_dtype: str = "float64"
    exact_rtol: float = 1e-8
    subsets: int = 60
    seeds: int = 3
    dear: bool = False  # its exact answer and retraining take an hour and more: only when asked for

    @property
    def tokens(self) -> bool:
        return "transformer" in self.net

    @property
    def key(self) -> str:
        """Changes with anything that changes weights or data."""
        made_of = ("data", "net", "n", "queries", "epochs", "rate", "weight_decay", "batch", "share")
        spec = {k: v for k, v in asdict(self).items() if k in made_of}
        return f"{self.number}-{hashlib.sha256(json.dumps(spec).encode()).hexdigest()[:12]}"

    @property
    def folder(self) -> Path:
        return CACHE / self.key


FULL = {
    1: Workload(
        1,
        "MLP 784-128-64-10 on Fashion-MNIST",
        "fashion",
        "mlp",
        n=2000,
        queries=200,
        epochs=30,
        rate=0.05,
        slab=500,
        exact_queries=200,
    ),
    2: Workload(
        2,
        "ResNet-9 with GroupNorm on Fashion-MNIST at 32x32",
        "fashion32",
        "resnet",
        n=2000,
        queries=100,
        epochs=12,
        rate=0.05,
        exact_queries=2,
        exact_dtype="float32",
        exact_rtol=1e-3,
        subsets=24,
        seeds=1,
        dear=True,
    ),
    3: Workload(
        3,
        "causal transformer, 2 layers of 256, 128 characters of Shakespeare",
        "shakespeare",
        "transformer",
        n=1000,
        queries=50,
        epochs=15,
        rate=1e-3,
        batch=25,
        slab=50,
        exact_queries=2,
        exact_dtype="float32",
        exact_rtol=1e-3,
        subsets=24,
        seeds=1,
        dear=True,
    ),
    4: Workload(
        4,
        "logistic regression on MNIST",
        "mnist",
        "logistic",
        n=4800,
        queries=200,
        epochs=300,
        rate=1.0,
        weight_decay=1e-2,
        slab=1200,
        share=None,
        seeds=1,
    ),
}

QUICK = {
    1: replace(FULL[1], n=200, queries=20, epochs=10, exact_queries=20, subsets=8, seeds=2),
    2: replace(FULL[2], n=60, queries=5, epochs=1, batch=20, exact_queries=0, subsets=0),
    3: replace(
        FULL[3], data="python_manual", net="transformer", n=24, queries=3, epochs=1, batch=8, exact_queries=0, subsets=0
    ),
    4: replace(FULL[4], data="fashion", n=200, queries=20, epochs=50, exact_queries=5, subsets=8),
}

# The settings of the league table: its own numbers, so that other libraries' adapters can be asked for them too.
LEAGUE = {
    11: Workload(11, "Fashion-MNIST, MLP 784-128-64-10", "fashion", "mlp", 2000, 100, epochs=30, rate=0.05, slab=500),
    12: Workload(
        12, "MNIST, logistic regression", "mnist", "logistic", 4800, 100, epochs=300, rate=1.0, weight_decay=1e-2,
        slab=1200, share=None, seeds=1,
    ),
    13: Workload(
        13, "diabetes, regression by an MLP 10-64-64-1", "diabetes", "regression", 350, 92, epochs=60, rate=0.02,
        weight_decay=1e-3, batch=35, slab=350,
    ),
    14: Workload(14, "Fashion-MNIST, small CNN", "fashion", "cnn", 1000, 100, epochs=15, rate=0.05, batch=50),
    15: Workload(
        15, "Shakespeare, causal transformer of one layer", "shakespeare64", "small_transformer", 300, 50, epochs=10,
        rate=3e-3, batch=15, slab=100,
    ),
}  # fmt: skip
LEAGUE = {k: replace(w, subsets=100, seeds=w.seeds if w.net == "logistic" else 5) for k, w in LEAGUE.items()}
LEAGUE_QUICK = {
    11: replace(LEAGUE[11], n=100, queries=10, epochs=5, subsets=8, seeds=2),
    12: replace(LEAGUE[12], data="fashion", n=100, queries=10, epochs=30, subsets=8),
    13: replace(LEAGUE[13], n=100, queries=10, epochs=10, subsets=8, seeds=2),
    14: replace(LEAGUE[14], n=60, queries=10, epochs=3, batch=20, subsets=8, seeds=2),
    15: replace(LEAGUE[15], data="python_manual64", n=30, queries=5, epochs=2, subsets=8, seeds=2),
}


def workload(number: int, quick: bool) -> Workload:
    return ({**QUICK, **LEAGUE_QUICK} if quick else {**FULL, **LEAGUE})[number]


# ------------------------------------------------------------------------------------------ networks


def _unit(inner: int, outer: int, stride: int = 1) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(inner, outer, 3, stride, 1, bias=False), nn.GroupNorm(8, outer), nn.ReLU())


class Residual(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.path = nn.Sequential(_unit(width, width), _unit(width, width))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.path(x)


def resnet9() -> nn.Sequential:
    """Eight convolutions, two of them pairs with a bypass, and a linear layer; 1.6 million parameters.

    Strides come early, so that the whole comparison fits an afternoon on two cores.
    """
    return nn.Sequential(
        _unit(1, 32, 2),
        _unit(32, 64, 2),
        Residual(64),
        _unit(64, 128, 2),
        _unit(128, 256, 2),
        Residual(256),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(256, 10),
    )


def small_cnn() -> nn.Sequential:
    """Two strided convolutions and two linear layers on rows of 784 pixels; 26,698 parameters."""
    return nn.Sequential(
        nn.Unflatten(1, (1, 28, 28)),
        nn.Conv2d(1, 8, 3, 2, 1),
        nn.ReLU(),
        nn.Conv2d(8, 16, 3, 2, 1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(784, 32),
        nn.ReLU(),
        nn.Linear(32, 10),
    )


VOCABULARY = 96  # printable ASCII and the line break

NETS: dict[str, Callable[[], nn.Module]] = {
    "mlp": lambda: mlp(784, 128, 64, 10),
    "logistic": lambda: mlp(784, 10),
    "resnet": resnet9,
    "transformer": lambda: Transformer(VOCABULARY, width=256, length=128, layers=2),
    "regression": lambda: mlp(10, 64, 64, 1),
    "cnn": small_cnn,
    "small_transformer": lambda: Transformer(VOCABULARY, width=64, length=64, layers=1),
}


# ------------------------------------------------------------------------------------------ reading


def losses(logits: Tensor, y: Tensor) -> Tensor:
    """One number per example: -log p(label), or -log p(sequence), a sum over its tokens.

    The sum, because with it the Gauss-Newton matrix is the Fisher matrix of the same loss, which is what libraries
    that draw labels estimate; a mean would put a factor of the length between the two, and into the damping.
    """
    if logits.dim() == 2:
        return F.cross_entropy(logits, y, reduction="none")
    return F.cross_entropy(logits.flatten(0, 1), y.flatten(), reduction="none").view(y.shape).sum(1)


def mean_loss(logits: Tensor, y: Tensor) -> Tensor:
    return losses(logits, y).mean()


@dataclass(frozen=True)
class Case:
    """A trained model and its data, as every library gets them."""

    model: nn.Module
    x: Tensor
    y: Tensor
    qx: Tensor
    qy: Tensor
    damping: float
    slab: int
    tokens: bool

    def layers(self, *kinds: type[nn.Module]) -> list[str]:
        return [name for name, module in self.model.named_modules() if isinstance(module, kinds)]


def read(options: dict[str, Any]) -> Case:
    """From disk, which is part of what is timed."""
    this = workload(options["workload"], options["quick"])
    with np.load(this.folder / "trained.npz") as file:
        arrays = {k: torch.from_numpy(file[k]) for k in file.files}
    model = NETS[this.net]()
    model.load_state_dict({k[2:]: v for k, v in arrays.items() if k.startswith("w.")})
    meta = this.folder / "meta.json"
    damping = json.loads(meta.read_text())["damping"] if meta.exists() else 0.0  # not yet known while it is measured
    parts = (arrays[k] for k in ("x", "y", "qx", "qy"))
    return Case(model.eval(), *parts, damping=damping, slab=this.slab, tokens=this.tokens)
