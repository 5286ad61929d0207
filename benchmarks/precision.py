"""What bfloat16 costs in faithfulness: rank correlation of scores with those of float32, query by query.

    .venv/bin/python benchmarks/precision.py

Two networks are trained on the bundled images: a perceptron and a small convolutional net. Their scores are computed in
float32, with precision="bf16", and from weights that were rounded to bfloat16 and to float16 (which are computed in
float32: what is left is the rounding of the weights). Times are of one run on a quiet machine and say little on a CPU
without bfloat16 units.
"""

from __future__ import annotations

import copy
import time
from typing import Any

import torch
import torch.nn.functional as F
from solvers import spearman
from torch import Tensor, nn

import pytorch_influence_functions as ptif
from pytorch_influence_functions.demo.data import datasets

TRAIN, QUERIES = 400, 20
METHODS: dict[str, Any] = {
    "grad_dot": ptif.methods.grad_dot(),
    "ekfac": ptif.ekfac(),
    "dual": ptif.dual(),
    "gauss_newton": ptif.methods.gauss_newton(),
    "exact dual of GGN": ptif.dual(ptif.curvature.GGN()),
}


def networks() -> dict[str, nn.Module]:
    torch.manual_seed(0)
    return {
        "perceptron": nn.Sequential(nn.Flatten(), nn.Linear(784, 64), nn.ReLU(), nn.Linear(64, 10)),
        "convolutions": nn.Sequential(
            *(nn.Conv2d(1, 8, 3, 2, 1), nn.ReLU(), nn.Conv2d(8, 16, 3, 2, 1), nn.GroupNorm(4, 16), nn.ReLU()),
            *(nn.Flatten(), nn.Linear(784, 10)),
        ),
    }


def trained(net: nn.Module, x: Tensor, y: Tensor) -> nn.Module:
    optimiser = torch.optim.Adam(net.parameters(), 1e-3, weight_decay=1e-4)
    for epoch in range(30):
        for batch in torch.randperm(len(x), generator=torch.Generator().manual_seed(epoch)).split(64):
            optimiser.zero_grad()
            F.cross_entropy(net(x[batch]), y[batch]).backward()
            optimiser.step()
    return net


def scores(net: nn.Module, data: tuple[Tensor, Tensor], queries: tuple[Tensor, Tensor], **options: Any) -> Any:
    start = time.perf_counter()
    values = ptif.attribute(net, data, queries, loss=nn.CrossEntropyLoss(), **options).values
    return values, time.perf_counter() - start


def main() -> None:
    (x, y), (xq, yq) = (d.tensors for d in datasets())
    x, y, xq, yq = x[:TRAIN], y[:TRAIN], xq[:QUERIES], yq[:QUERIES]
    print("| network | method | precision bf16 | weights in bfloat16 | weights in float16 | seconds float32, bf16 |")
    print("|---|---|---|---|---|---|")
    for name, net in networks().items():
        trained(net, x, y)
        for title, method in METHODS.items():
            exact, slow = scores(net, (x, y), (xq, yq), method=method)
            fast, quick = scores(net, (x, y), (xq, yq), method=method, precision="bf16")
            row = [spearman(fast, exact)]
            for dtype in (torch.bfloat16, torch.float16):
                half = copy.deepcopy(net).to(dtype)
                values, _ = scores(half, (x.to(dtype), y), (xq.to(dtype), yq), method=method)
                row.append(spearman(values, exact))
            print(f"| {name} | {title} | " + " | ".join(f"{r:.4f}" for r in row) + f" | {slow:.1f}, {quick:.1f} |")


if __name__ == "__main__":
    main()
