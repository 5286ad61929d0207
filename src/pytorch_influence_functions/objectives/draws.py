"""Random numbers for sampling labels: from a generator, or fixed by each example's index. A loss may draw none."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TypeAlias, final

import torch
from jaxtyping import Int
from torch import Tensor

from ..core.errors import InvalidInput

# Multipliers of the SplitMix64 generator (Steele, Lea & Flood 2014), as signed 64-bit numbers.
_GOLDEN = 0x9E3779B97F4A7C15 - (1 << 64)
_MIX1, _MIX2 = 0xBF58476D1CE4E5B9 - (1 << 64), 0x94D049BB133111EB - (1 << 64)


@final
@dataclass(frozen=True, eq=False)
class Keyed:
    """Draws that depend on `seed`, on the example's dataset index and on nothing else.

    The same example gets the same draw in any batch and any order, so that what is fitted on sampled labels
    does not depend on the batch size.
    """

    ids: Int[Tensor, " n"]
    seed: int = 0

    def uniform(self, shape: torch.Size) -> Tensor:
        """Numbers in (0, 1), float64, one row per example."""
        n, per = shape[0], math.prod(shape[1:])
        key = _mix(_mix(self.ids.long() + self.seed * _SEEDS)[:, None] + torch.arange(per, device=self.ids.device))
        # 53 random bits, and a half so that neither end is reached.
        return (((key >> 11) & ((1 << 53) - 1)).double().add_(0.5) * 2.0**-53).reshape(n, *shape[1:])


_SEEDS = 0x632BE5AB


def _mix(x: Tensor) -> Tensor:
    """SplitMix64's output function: neighbouring inputs give unrelated outputs. Multiplication wraps around."""
    x = x * _GOLDEN + _GOLDEN
    x = (x ^ _shift_right(x, 30)) * _MIX1
    x = (x ^ _shift_right(x, 27)) * _MIX2
    return x ^ _shift_right(x, 31)


def _shift_right(x: Tensor, by: int) -> Tensor:
    """A logical shift to the right."""
    return (x >> by) & ((1 << (64 - by)) - 1)


Randomness: TypeAlias = torch.Generator | Keyed | None


def draw(like: Tensor, source: Randomness, normal: bool = False) -> Tensor:
    """Uniform or normal numbers shaped like `like`, drawn on the source's device and moved to that of `like`."""
    # Half precision has too few uniform numbers for rare classes.
    dtype = torch.promote_types(like.dtype, torch.float32)
    if isinstance(source, Keyed):
        numbers = source.uniform(like.shape)
        if normal:
            numbers = torch.special.ndtri(numbers)
        return numbers.to(device=like.device, dtype=dtype)
    device = like.device if source is None else source.device
    sample = torch.randn if normal else torch.rand
    return sample(like.shape, generator=source, dtype=dtype, device=device).to(like.device)


def refuse_draws(name: str, once: Tensor, again: Tensor) -> None:
    """Refuse a loss whose two values for the same outputs and targets differ.

    Raises:
        InvalidInput: they do.
    """
    once, again = once.detach(), again.detach()
    if once.shape != again.shape or torch.allclose(once, again, rtol=1e-4, atol=0.0, equal_nan=True):
        return
    raise InvalidInput(
        f"The loss {name} gave {float(once.sum()):.4g} and {float(again.sum()):.4g} for the same outputs and targets: "
        "it draws random numbers, so a score would belong to one draw; draw them once per example in the dataset and "
        "give them as part of the target."
    )
