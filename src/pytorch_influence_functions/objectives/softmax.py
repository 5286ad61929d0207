"""The curvature of a softmax, position by position: its root, its products, and labels drawn from it.

z [n, l, c]: logits; s [n, l]: the factor of each position. H = s (diag p - p pᵀ), zero between positions.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from ..linalg.chunks import chunks
from .draws import Randomness, draw

# From so many classes on labels are drawn block by block.
_BLOCKED, _BLOCK = 1024, 128


def softmax_root(z: Float[Tensor, "n l c"], s: Float[Tensor, "n l"]) -> Float[Tensor, "k n l c"]:
    """The Cholesky factor of s (diag p - p pᵀ), whose rank is one less than the classes, for every position.

    Column k sets class k against the classes behind it, in their proportions: sqrt(s p_k t_k / (p_k + t_k)) (e_k -
    p_{>k} / t_k) with t_k = Σ_{j>k} p_j. Tails are added up from behind, so that nothing cancels.
    """
    n, length, classes = z.shape
    columns = softmax_rank(classes)
    p = z.to(torch.promote_types(z.dtype, torch.float32)).softmax(-1)
    from_here = p.flip(-1).cumsum(-1).flip(-1)  # p_k + t_k
    tail = torch.nn.functional.pad(from_here[..., 1:], (0, 1))[..., :columns]
    first, tiny = p[..., :columns], torch.finfo(p.dtype).tiny
    size = (s[..., None] * first * (tail / from_here[..., :columns].clamp_min(tiny))).sqrt()
    behind = torch.ones(classes, classes, dtype=p.dtype, device=z.device).triu(1)[:columns]
    unit = torch.eye(classes, dtype=p.dtype, device=z.device)[:columns]
    others = behind * p[..., None, :] / tail.clamp_min(tiny)[..., None]
    root = (size[..., None] * (unit - others)).to(z.dtype)  # n l k c
    place = torch.eye(length, dtype=z.dtype, device=z.device)
    spread = torch.einsum("nakc,ab->aknbc", root, place)
    return spread.reshape(length * columns, n, length, classes)


def softmax_rank(classes: int) -> int:
    """Columns of `softmax_root` for each position: the probabilities add up to one, which takes one away."""
    return max(1, classes - 1)


def softmax_product(
    z: Float[Tensor, "n l c"], s: Float[Tensor, "n l"], v: Float[Tensor, "n l c"]
) -> Float[Tensor, "n l c"]:
    p = z.softmax(-1)
    return s[..., None] * p * (v - (p * v).sum(-1, keepdim=True))


def _softmax_sample(p: Float[Tensor, "n l c"], level: Float[Tensor, "n l"]) -> Int[Tensor, "n l"]:
    """Classes drawn with probabilities p by inverting their distribution function at `level`, from 0 to 1.

    Of many classes first a block is drawn by its sum and then a class in it: sums are a fifth of the time of running
    sums.
    """
    classes = p.shape[-1]
    if classes < _BLOCKED:
        return _inverted(p, level)[0].clamp_max(classes - 1)
    whole = classes // _BLOCK * _BLOCK
    sums = p[..., :whole].reshape(*p.shape[:-1], -1, _BLOCK).sum(-1, dtype=torch.promote_types(p.dtype, torch.float32))
    if whole < classes:
        sums = torch.cat([sums, p[..., whole:].sum(-1, keepdim=True, dtype=sums.dtype)], -1)
    block, left = _inverted(sums, level)
    block = block.clamp_max(sums.shape[-1] - 1)
    places = block[..., None] * _BLOCK + torch.arange(_BLOCK, device=p.device)
    inside = p.gather(-1, places.clamp_max(classes - 1)) * (places < classes)
    share = left / inside.sum(-1, dtype=sums.dtype).clamp_min(torch.finfo(sums.dtype).tiny)
    drawn = _inverted(inside, share)[0].clamp_max(_BLOCK - 1)
    return (block * _BLOCK + drawn).clamp_max(classes - 1)


def _inverted(
    p: Float[Tensor, "n l c"], level: Float[Tensor, "n l"]
) -> tuple[Int[Tensor, "n l"], Float[Tensor, "n l"]]:
    """The first class up to which p sums to `level` times its sum, and how much of that lies within the class."""
    summed = p.to(torch.promote_types(p.dtype, torch.float32)).cumsum(-1)
    target = level[..., None] * summed[..., -1:]
    drawn = torch.searchsorted(summed, target)
    before = summed.gather(-1, (drawn - 1).clamp(0, p.shape[-1] - 1)) * (drawn > 0)
    return drawn[..., 0], (target - before)[..., 0].clamp_min(0.0)


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
        p, factor = torch.softmax(z[some].detach(), -1, out=cotangent[some]), factors[some]
        drawn = _softmax_sample(p, level[some])[..., None]
        p.mul_(factor).scatter_add_(-1, drawn, -factor)
    return cotangent


def positions_that_count(factor: Float[Tensor, "n l"]) -> float:
    """How many positions of an example count, on average."""
    return float((factor > 0).sum()) / len(factor)
