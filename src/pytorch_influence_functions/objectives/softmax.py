"""The curvature of a softmax, position by position: its root, its products, and labels drawn from it.

z [n, l, c]: logits; s [n, l]: the factor of each position. H = s (diag p - p pᵀ), zero between positions.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from ..linalg.chunks import chunks
from .draws import Randomness, draw


def softmax_root(z: Float[Tensor, "n l c"], s: Float[Tensor, "n l"]) -> Float[Tensor, "k n l c"]:
    """sqrt(s p_c) (e_c - p) for every position and class: Σ_c p_c (e_c - p)(e_c - p)ᵀ = diag p - p pᵀ."""
    p = z.softmax(-1)
    n, length, classes = z.shape
    unit = torch.eye(classes, dtype=z.dtype, device=z.device)
    columns = (s[..., None] * p).sqrt()[..., None] * (unit - p[..., None, :])  # n l k c
    place = torch.eye(length, dtype=z.dtype, device=z.device)
    spread = torch.einsum("nakc,ab->aknbc", columns, place)
    return spread.reshape(length * classes, n, length, classes)


def softmax_product(
    z: Float[Tensor, "n l c"], s: Float[Tensor, "n l"], v: Float[Tensor, "n l c"]
) -> Float[Tensor, "n l c"]:
    p = z.softmax(-1)
    return s[..., None] * p * (v - (p * v).sum(-1, keepdim=True))


def _softmax_sample(p: Float[Tensor, "n l c"], level: Float[Tensor, "n l"]) -> Int[Tensor, "n l"]:
    """Classes drawn with probabilities p by inverting their distribution function at `level`, from 0 to 1."""
    summed = p.to(torch.promote_types(p.dtype, torch.float32)).cumsum(-1)
    return torch.searchsorted(summed, level[..., None] * summed[..., -1:])[..., 0].clamp_max(p.shape[-1] - 1)


def _of_counting(numbers: Float[Tensor, "n l"], counts: Bool[Tensor, "n l"]) -> Float[Tensor, "n l"]:
    """The k-th position that counts takes the example's k-th number, so that draws do not depend on padding."""
    return numbers.gather(1, (counts.cumsum(1) - 1).clamp_min(0))


def softmax_cotangent(
    z: Float[Tensor, "n l c"], s: Float[Tensor, "n l"], generator: Randomness
) -> Float[Tensor, "n l c"]:
    """sqrt(s) (p - e_c) with a class c drawn from p: one uniform number per position.

    A few examples at a time: the logits of a language model are large, and are held several times meanwhile.
    """
    level = _of_counting(draw(z[..., 0], generator), s > 0)
    cotangent, factors = torch.empty_like(z, memory_format=torch.contiguous_format), s.sqrt()[..., None]
    for some in chunks(len(z), z[0].numel()):
        p, factor = z[some].softmax(-1), factors[some]
        drawn = _softmax_sample(p, level[some])[..., None]
        cotangent[some] = p.mul_(factor).scatter_add_(-1, drawn, -factor)
    return cotangent
