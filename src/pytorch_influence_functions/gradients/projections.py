"""Gradients projected to few dimensions: TRAK's sketch, drawn from a seed, stored only where it is small."""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, final

import torch
from jaxtyping import Float
from torch import Tensor

from ..core.errors import InvalidInput
from ..core.validate import whole_number
from ..linalg.blocks import Dense
from ..linalg.rows import Rows
from ..linalg.space import BlockSpec, Space

# Coordinates of a block that are projected at once: part of the definition, so that nothing else changes the numbers.
_STRIP = 1 << 14
# Projections up to so many numbers are kept after the first draw.
_KEPT = 1 << 28

JOINT = "projected"
"""The one block of a joint projection."""


@final
@dataclass(frozen=True)
class Gaussian:
    r"""Every gradient times a random P x k matrix with entries N(0, 1/k): inner products are kept up to 1 / sqrt(k).

    With `per_layer` each block of parameters is projected to k numbers of its own, so that `Blockwise(Spectral())`
    gives every layer its own kernel; blocks of at most k coordinates are left as they are. The matrix is drawn from the
    seed, strip by strip, and depends on nothing else. Uniform weight decay stays the same number on the projected
    diagonal.

    Args:
        k: how many numbers a gradient is projected to.
        per_layer: project every block of parameters by itself.
        seed: of the matrix.

    Reference: Park et al. (2023); Johnson & Lindenstrauss (1984).

    >>> Gaussian(512).k
    512
    """

    k: int
    per_layer: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        whole_number("k", self.k, owner=self, hint="512 to 4096 are usual")

    def projector(self, space: Space) -> Projector:
        """The projection of one parameter space.

        Args:
            space: the parameters that take part.

        Raises:
            InvalidInput: k is no smaller than the number of parameters, or weight decay differs between parameters.
        """
        if self.k >= space.size:
            raise InvalidInput(
                f"Gaussian(k={self.k}) is no smaller than the {space.size:,} parameters, where projecting only adds "
                "noise; leave the projection out."
            )
        decays = set(space.decay.values())
        if len(decays) > 1:
            raise InvalidInput(
                "Weight decay differs between parameters, and a projection mixes them; pass one number for all, or "
                "leave the projection out."
            )
        decay = decays.pop()
        if not self.per_layer:
            blocks = {JOINT: BlockSpec(JOINT, (), (self.k,), decay=decay)}
        else:
            sizes = {name: min(self.k, block.numel) for name, block in space.blocks.items()}
            blocks = {name: BlockSpec(name, (), (size,), decay=decay) for name, size in sizes.items()}
        return Projector(self, Space(blocks, {}))


@dataclass(frozen=True, eq=False)
class Projector:
    """A projection of one space; `space` is that of the projected rows."""

    projection: Gaussian
    space: Space
    _known: dict[Any, Tensor] = field(default_factory=dict, repr=False)

    def apply(self, rows: Rows) -> Rows:
        """Projected rows, written out."""
        projected: dict[str, Tensor] = {}
        for name, block in rows.blocks.items():
            dense = block.dense().flatten(1)
            if name in self.space.blocks and self.space.blocks[name].numel == dense.shape[1]:
                projected[name] = dense
                continue
            total = dense.new_zeros(len(dense), self.projection.k)
            for start, strip in self._strips(name, dense):
                total.addmm_(dense[:, start : start + len(strip)], strip)
            projected[name] = total
        if not self.projection.per_layer:
            projected = {JOINT: torch.stack(list(projected.values())).sum(0)}
        return Rows({name: Dense(projected[name]) for name in self.space.blocks})

    def _strips(self, name: str, like: Float[Tensor, "n p"]) -> Iterator[tuple[int, Float[Tensor, "s k"]]]:
        k, size = self.projection.k, like.shape[1]
        for number, start in enumerate(range(0, size, _STRIP)):
            key = (name, number, like.dtype, like.device)
            strip = self._known.get(key)
            if strip is None:
                seed = zlib.crc32(f"{self.projection.seed}/{name}/{number}".encode())
                generator = torch.Generator().manual_seed(seed)
                strip = torch.randn(min(_STRIP, size - start), k, generator=generator) / k**0.5
                strip = strip.to(like)
                if sum(s.numel() for s in self._known.values()) + strip.numel() <= _KEPT:
                    self._known[key] = strip
            yield start, strip
