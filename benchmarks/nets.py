"""Networks and data of the benchmarks; needs torch only, so that every side's process can import it."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

SEED = 0


class CifarNet(nn.Module):
    """The small convolutional net of PyTorch's CIFAR tutorial, which the seed's example used; 62,006 parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(3, 6, 5), nn.Conv2d(6, 16, 5)
        self.fc1, self.fc2, self.fc3 = nn.Linear(400, 120), nn.Linear(120, 84), nn.Linear(84, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(F.relu(self.conv1(x)), 2)
        x = F.max_pool2d(F.relu(self.conv2(x)), 2)
        return self.fc3(F.relu(self.fc2(F.relu(self.fc1(x.flatten(1))))))


def mlp(*widths: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for a, b in pairwise(widths):
        layers += [nn.Linear(a, b), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def convnet() -> nn.Sequential:
    """Four convolutions with GroupNorm on 1x28x28; about 205,000 parameters."""
    stages: list[nn.Module] = []
    for i, o, stride in ((1, 32, 1), (32, 64, 2), (64, 128, 2), (128, 96, 1)):
        stages += [nn.Conv2d(i, o, 3, stride, 1), nn.GroupNorm(8, o), nn.ReLU()]
    return nn.Sequential(*stages, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(96, 10))


class Block(nn.Module):
    """Pre-norm causal attention and a two-layer MLP."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        n, t, d = x.shape
        q, k, v = self.qkv(self.norm1(x)).view(n, t, 3, self.heads, d // self.heads).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).reshape(n, t, d))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class Transformer(nn.Module):
    """Two causal blocks of width 128 on 64 tokens out of 256; about 471,000 parameters."""

    def __init__(self, vocabulary: int = 256, width: int = 128, length: int = 64, layers: int = 2) -> None:
        super().__init__()
        self.token, self.position = nn.Embedding(vocabulary, width), nn.Embedding(length, width)
        self.blocks = nn.Sequential(*(Block(width, 4) for _ in range(layers)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, vocabulary)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.token(ids) + self.position(torch.arange(ids.shape[1], device=ids.device))
        return self.head(self.norm(self.blocks(x)))


def cifar(n: int) -> tuple[CifarNet, Tensor, Tensor, Tensor, Tensor]:
    """A net, n + 1 random images, and labels from a fixed random teacher; the last image is the query."""
    torch.manual_seed(SEED)
    teacher, model = CifarNet(), CifarNet()
    x = torch.randn(n + 1, 3, 32, 32)
    with torch.no_grad():
        logits = teacher(x)
        y = (logits - logits.mean(0)).argmax(1)
    return model.eval(), x[:n], y[:n], x[n:], y[n:]


def floor_case(name: str, quick: bool) -> tuple[nn.Module, Tensor, Tensor, int]:
    """Model, n + 1 inputs and targets, batch size."""
    torch.manual_seed(SEED)
    n = {"mlp": 4000, "cnn": 1000, "transformer": 256}[name] // (4 if quick else 1)
    if name == "transformer":
        ids = torch.randint(0, 256, (n + 1, 65))
        return Transformer().eval(), ids[:, :-1].contiguous(), ids[:, 1:].contiguous(), 64
    y = torch.randint(0, 10, (n + 1,))
    if name == "mlp":
        return mlp(784, 512, 256, 10).eval(), torch.randn(n + 1, 784), y, 250
    return convnet().eval(), torch.randn(n + 1, 1, 28, 28), y, 100


FASHION = (784, 128, 64, 10)


def load_fashion(folder: str) -> tuple[nn.Sequential, dict[str, Tensor]]:
    """The trained MLP and its data, read from disk: part of what workload b times."""
    with np.load(Path(folder) / "fashion.npz") as file:
        arrays = {k: torch.from_numpy(file[k]) for k in file.files}
    model = mlp(*FASHION)
    model.load_state_dict({k[2:]: v for k, v in arrays.items() if k.startswith("w.")})
    return model.eval(), {k: v for k, v in arrays.items() if not k.startswith("w.")}


def _ranks(values: np.ndarray) -> np.ndarray:
    """Ranks from 0; equal values share their mean rank, which matters: fitted examples have scores of zero."""
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    ends = np.cumsum(counts)
    return (ends - (counts + 1) / 2)[inverse]


def spearman(a: Any, b: Any) -> float:
    """Rank correlation per query, averaged over queries."""
    pairs = zip(np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64), strict=True)
    return float(np.mean([np.corrcoef(_ranks(p), _ranks(q))[0, 1] for p, q in pairs]))
