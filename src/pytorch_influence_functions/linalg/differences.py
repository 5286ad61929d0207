"""Differences of rows that have much in common: what rounding left of it is no part of them."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from .blocks import AbstractBlock, Dense
from .chunks import chunks

# Of fewer roundings of what it is the difference of, a row holds nothing else. Measured: gradients of the same example
# in batches of 1, 3 and 16 differ by up to 1.5 of them in perceptrons of 3 layers and transformers, 2.3 in a
# convolutional network and 5.5 in a perceptron of 12 layers.
_ROUNDINGS = 32
# Below this share, products of the two sides' factors are mostly rounding: the difference is written out for them.
_CLOSE = 0.1


def without_rounding(block: AbstractBlock, sizes: Float[Tensor, " n"]) -> AbstractBlock:
    """Sums that nearly cancel, as they are to be computed with: those that cancel within rounding are 0.

    Terms that stand side by side are multiplied with others, and with themselves, one by one, so that a product has the
    rounding of the terms and not of their sum. Where a sum is far smaller than its terms, the block is written out.

    Args:
        block: the sums.
        sizes: of every row the sum of the norms of its terms.
    """
    squares = block.squared_norms().double()
    sizes = sizes.to(squares)
    index = (squares < (_CLOSE * sizes).square()).nonzero().flatten()
    if not len(index):
        return block
    width = int(torch.Size(block.shape).numel())
    norms = torch.cat([_norms(block.take(index[piece])) for piece in chunks(len(index), width)])
    vanishes = norms <= _ROUNDINGS * torch.finfo(block.reference.dtype).eps * sizes[index]
    if not bool(vanishes.all()):
        block = Dense(block.dense().reshape(len(block), *block.shape))
    kept = torch.ones_like(squares)
    kept[index[vanishes]] = 0.0
    return block.scale(kept)


def _norms(block: AbstractBlock) -> Float[Tensor, " n"]:
    norms: Tensor = torch.linalg.vector_norm(block.dense().flatten(1), dim=1, dtype=torch.float64)
    return norms
