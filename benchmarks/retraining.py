"""The retraining engine against an ordinary loop over models: `python benchmarks/retraining.py`.

The loop is the engine's own one-model path on one thread, as a script without the engine would run it.
"""

from __future__ import annotations

import statistics
import time
from functools import partial

import torch
from nets import mlp
from torch import Tensor

from pytorch_influence_functions.evaluation import Recipe, Subsets, retrain, training

MODELS = {"MLP 784-128-64-10, N = 2,000": (784, 128, 64, 10), "MLP 10-64-64-3, N = 2,000": (10, 64, 64, 3)}


def once(widths: tuple[int, ...], alone: bool, models: int) -> float:
    """Seconds for `models` trainings of 3 epochs on halves."""
    x = torch.randn(2000, widths[0], generator=torch.Generator().manual_seed(0))
    y = torch.arange(2000) % widths[-1]
    recipe = Recipe(lambda: mlp(*widths), partial(torch.optim.SGD, lr=0.05, momentum=0.9), epochs=3, batch_size=100)
    queries: tuple[Tensor, Tensor] = (x[:50], y[:50])
    large = training._LARGE_MODEL
    training._LARGE_MODEL = 0 if alone else large
    try:
        start = time.perf_counter()
        retrain(
            recipe, Subsets.halves(2000, models - 1), 1, train=(x, y), queries=queries, workers=1 if alone else None
        )
        return time.perf_counter() - start
    finally:
        training._LARGE_MODEL = large


def main() -> None:
    print(f"{'model':<32}{'loop':>10}{'engine':>10}{'ratio':>18}")
    for name, widths in MODELS.items():
        once(widths, False, 4)
        pairs = [(once(widths, True, 60), once(widths, False, 60)) for _ in range(3)]
        ratios = [a / b for a, b in pairs]
        loop, engine = (statistics.median(side) for side in zip(*pairs, strict=True))
        spread = f"{statistics.median(ratios):.1f}x ({min(ratios):.1f}-{max(ratios):.1f})"
        print(f"{name:<32}{loop:>9.1f}s{engine:>9.1f}s{spread:>18}")


if __name__ == "__main__":
    main()
