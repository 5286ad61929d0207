"""What Adam divides a step by, measured on the training data: the root mean square of a batch's gradient, by block."""

from __future__ import annotations

import math

import torch

from ..core.distributed import World
from ..gradients.per_example import Derivatives

# At least so many gradients are looked at, and so many times a batch: the noise in the squared mean gradient, one part
# in `count` of the mean square, is then well below what a batch's own noise adds, one part in `batch`.
_LEAST, _PER_BATCH = 128, 4


def adam_denominators(derivatives: Derivatives, batch: int) -> dict[str, float]:
    r"""The root mean square of one entry of a batch's mean gradient, by block, at the weights that the model has.

    For batches drawn without replacement from N examples, entry by entry and then averaged over the block,

        v = |mean gradient|^2 + (mean |gradient|^2 - |mean gradient|^2) (N - batch) / (batch (N - 1)),

    taken from a sample of max(128, 4 batch) examples, the same at every call, without bias: from all where that is more
    than there are, and for a batch of all of the data. A block without any gradient takes the root of all entries'
    mean. Under a projection, which keeps a gradient's squared norm on average, entries are still those of the
    parameters.

    Args:
        derivatives: how gradients are taken.
        batch: the examples of a batch; from N on the batch is all of the data.
    """
    n, space, whole = len(derivatives.problem), derivatives.space, derivatives.whole
    sizes = {name: whole.numel(name) if name in whole.blocks else whole.size for name in space.blocks}
    count = min(n, max(_LEAST, _PER_BATCH * batch))
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
    overall = math.sqrt(sum(moments.values()) / sum(sizes.values()))
    return {name: math.sqrt(v / sizes[name]) if v > 0 else overall for name, v in moments.items()}
