"""Gradients projected to few dimensions, by a matrix drawn from a seed and held as a whole only where it is small."""

from __future__ import annotations

import math
import zlib
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, final

import torch
from jaxtyping import Float
from torch import Tensor

from ..core.errors import InvalidInput
from ..core.records import Record
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


class AbstractProjector(ABC):
    """A linear map of the gradients of one space to fewer numbers; `space` is that of the projected rows."""

    space: Space

    @abstractmethod
    def apply(self, rows: Rows) -> Rows:
        """Projected rows."""


class AbstractReduction(Record, ABC):
    """A linear map of gradients to fewer numbers, as a frozen record."""

    @abstractmethod
    def projector(self, space: Space) -> AbstractProjector:
        """The map of one parameter space.

        Args:
            space: the parameters.

        Raises:
            InvalidInput: it cannot be projected so.
        """


class AbstractProjection(AbstractReduction):
    """A random linear map of gradients to k numbers by a dense matrix, which keeps inner products on average.

    A new one is a frozen record with the fields `k`, `per_layer` and `seed`, and draws the strips of its matrix:

    >>> @dataclass(frozen=True)
    ... class Signs(AbstractProjection):
    ...     k: int
    ...     per_layer: bool = False
    ...     seed: int = 0
    ...     def strip(self, length, generator):
    ...         return (2.0 * torch.randint(0, 2, (length, self.k), generator=generator) - 1) / self.k**0.5
    """

    k: int
    per_layer: bool
    seed: int

    @abstractmethod
    def strip(self, length: int, generator: torch.Generator) -> Float[Tensor, "length k"]:
        """The part of the matrix that meets `length` coordinates, float32 on the CPU: E[strip strip^T] is the identity.

        It must depend on its arguments alone.

        Args:
            length: how many coordinates.
            generator: the only source of randomness.
        """

    @final
    def draw(self, block: str, number: int, length: int) -> Float[Tensor, "length k"]:
        """One strip of the matrix, the same one every time.

        Args:
            block: the name of the block of parameters.
            number: which strip of the block.
            length: how many coordinates it meets.
        """
        seed = zlib.crc32(f"{self.seed}/{block}/{number}".encode())
        return self.strip(length, torch.Generator().manual_seed(seed))

    @final
    def projector(self, space: Space) -> Projector:
        """The projection of one parameter `space`.

        Raises:
            InvalidInput: k is no smaller than the number of parameters, or weight decay differs between parameters.
        """
        if self.k >= space.size:
            raise InvalidInput(
                f"{type(self).__name__}(k={self.k}) is no smaller than the {space.size:,} parameters, where projecting "
                f"only adds noise; take a k below {space.size:,}, or leave the projection out."
            )
        factors = self.factors(space)
        # What is rescaled has no uniform decay any more, and takes none.
        decays = set(space.decay.values()) if factors is None else {0.0}
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
        return Projector(self, Space(blocks, {}), factors)

    def factors(self, space: Space) -> Rows | None:
        """What every coordinate of a gradient is multiplied by before it is projected, as one row; None: nothing.

        Args:
            space: the parameters that take part.
        """
        return None


@final
@dataclass(frozen=True, repr=False)
class Gaussian(AbstractProjection):
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

    def strip(self, length: int, generator: torch.Generator) -> Float[Tensor, "length k"]:
        return torch.randn(length, self.k, generator=generator) / math.sqrt(self.k)


@final
@dataclass(frozen=True, eq=False, repr=False)
class Rescaled(AbstractProjection):
    """Another projection, of gradients whose every number is multiplied by one of its own first.

    Args:
        projection: what projects them.
        scales: the multipliers by parameter name, in the parameters' shapes, such as Adam's 1 / (sqrt(v) + eps).
            Weight decay then takes no part.

    >>> Rescaled(Gaussian(64), {"weight": torch.ones(2, 3)})
    Rescaled(Gaussian(k=64), 1 tensor)
    """

    projection: AbstractProjection
    scales: Mapping[str, Tensor]

    @property
    def k(self) -> int:  # type: ignore[override]
        """As of the projection."""
        return self.projection.k

    @property
    def per_layer(self) -> bool:  # type: ignore[override]
        """As of the projection."""
        return self.projection.per_layer

    @property
    def seed(self) -> int:  # type: ignore[override]
        """As of the projection."""
        return self.projection.seed

    def __repr__(self) -> str:
        n = len(self.scales)
        return f"Rescaled({self.projection!r}, {n} tensor{'' if n == 1 else 's'})"

    def __fingerprint__(self) -> tuple[Any, ...]:
        """What results depend on."""
        return self.projection, dict(self.scales)

    def strip(self, length: int, generator: torch.Generator) -> Float[Tensor, "length k"]:
        return self.projection.strip(length, generator)

    def factors(self, space: Space) -> Rows | None:
        return space.from_parameters({name: self.scales[name][None] for name in self.scales if name in space.shapes})


@dataclass(frozen=True, eq=False)
class Projector(AbstractProjector):
    """A projection of one space; `space` is that of the projected rows, `factors` what they are multiplied by first."""

    projection: AbstractProjection
    space: Space
    factors: Rows | None = None
    _known: dict[Any, Tensor] = field(default_factory=dict, repr=False)

    def apply(self, rows: Rows) -> Rows:
        """Projected rows, written out."""
        projected: dict[str, Tensor] = {}
        for name, block in rows.blocks.items():
            dense = block.dense().flatten(1)
            if self.factors is not None:
                dense = dense * self.factors.blocks[name].dense().flatten(1).to(dense)
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
        size = like.shape[1]
        for number, start in enumerate(range(0, size, _STRIP)):
            key = (name, number, like.dtype, like.device)
            strip = self._known.get(key)
            if strip is None:
                strip = self.projection.draw(name, number, min(_STRIP, size - start)).to(like)
                if sum(s.numel() for s in self._known.values()) + strip.numel() <= _KEPT:
                    self._known[key] = strip
            yield start, strip
