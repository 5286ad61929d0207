"""What Adam divides a step by, measured on the training data: the root mean square of a batch's gradient, by block."""

from __future__ import annotations

import math

import torch

from ..core.distributed import World
from ..gradients.per_example import Derivatives

# Gradients that are looked at: their mean square is then known to a fifth or better.
_MOST = 128


def adam_denominators(derivatives: Derivatives, batch: int) -> dict[str, float]:
    r"""The root mean square of one entry of a batch's mean gradient, by block, at the weights that the model has.

    For batches drawn without replacement from N examples, entry by entry and then averaged over the block,

        v = |mean gradient|^2 + (mean |gradient|^2 - |mean gradient|^2) (N - batch) / (batch (N - 1)),

    taken from a sample of at most 128 examples, the same at every call, without bias. A block without any gradient
    takes the root of all entries' mean.

    Args:
        derivatives: how gradients are taken.
        batch: the examples of a batch; from N on the batch is all of the data.
    """
    n, space = len(derivatives.problem), derivatives.space
    count = min(n, _MOST)
    ids = torch.randperm(n, generator=torch.Generator().manual_seed(0))[:count].sort().values
    squares = dict.fromkeys(space.blocks, 0.0)
    sums: dict[str, torch.Tensor] = {}
    for gradients in derivatives.stream(ids=ids, label="what Adam divides by", world=World()):
        ones = torch.ones(1, len(gradients.ids), dtype=gradients.rows.dtype, device=gradients.rows.device)
        for name, block in gradients.rows.blocks.items():
            squares[name] += float(block.squared_norms().double().sum())
            total = block.combine(ones)[0].flatten()
            sums[name] = sums[name] + total if name in sums else total
    noise = max(0.0, (n - batch) / (batch * (n - 1))) if n > 1 else 0.0
    moments = {}
    for name, square in squares.items():
        of_sum = float(sums[name].double().square().sum())
        # Of a sample, the square of the mean is too large by the noise of that mean.
        mean_square = square / count
        of_mean = of_sum / n**2 if count == n else max(0.0, (of_sum - square) / (count * (count - 1)))
        moments[name] = max(0.0, of_mean + (mean_square - of_mean) * noise)
    whole = math.sqrt(sum(moments.values()) / space.size)
    return {name: math.sqrt(v / space.numel(name)) if v > 0 else whole for name, v in moments.items()}
