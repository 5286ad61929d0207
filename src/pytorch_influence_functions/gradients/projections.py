"""Gradients projected to few dimensions, by a matrix drawn from a seed and held as a whole only where it is small."""

from __future__ import annotations

import math
import zlib
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, final

import torch
from jaxtyping import Float
from torch import Tensor

from ..core.errors import InvalidInput
from ..core.records import Record
from ..core.validate import whole_number
from ..linalg.blocks import AbstractBlock, Dense
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
    """A linear map of gradients to fewer numbers, as a frozen record.

    Those of this library are `Sketch` and `TwoSided`, whose signs are keyed by layer and seed and are the same for live
    gradients and in an index, the dense `Gaussian`, and `Rescaled`.
    """

    @property
    @abstractmethod
    def keeps_layers_apart(self) -> bool:
        """Whether every block of parameters has numbers of its own, so that each may have a curvature of its own."""

    @abstractmethod
    def reduced(self, space: Space) -> Space:
        """The space of projected rows.

        Args:
            space: the parameters.

        Raises:
            InvalidInput: it cannot be projected so.
        """

    @abstractmethod
    def projector(self, space: Space) -> AbstractProjector:
        """The map of one parameter space.

        Args:
            space: the parameters.

        Raises:
            InvalidInput: it cannot be projected so.
        """


def reduced_to(k: int, space: Space, per_layer: bool, described: str, instead: str) -> Space:
    """k numbers for all parameters together, or k for every block that has more.

    Args:
        k: how many numbers.
        space: the parameters.
        per_layer: whether blocks stay apart.
        described: the projection, as it would be written.
        instead: what else can be done where parameters cannot be mixed.

    Raises:
        InvalidInput: k is no smaller than the number of parameters, or weight decay differs between parameters that are
            mixed.
    """
    if k >= space.size:
        raise InvalidInput(
            f"{described} is no smaller than the {space.size:,} parameters, where projecting only adds noise; take a k "
            f"below {space.size:,} (a method that was given by its name is written out, as ptif.methods.trak(k="
            f"{max(1, space.size // 2)}) is; for a command in get_options()), or leave the projection out."
        )
    if per_layer:
        sizes = {name: (min(k, block.numel),) for name, block in space.blocks.items()}
        return Space({name: BlockSpec(name, (), sizes[name], decay=b.decay) for name, b in space.blocks.items()}, {})
    decays = set(space.decay.values())
    if len(decays) > 1:
        raise InvalidInput(
            f"Weight decay differs between parameters, and {described} mixes them; pass one number for all, or "
            f"{instead}."
        )
    return Space({JOINT: BlockSpec(JOINT, (), (k,), decay=decays.pop())}, {})


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

    @property
    def keeps_layers_apart(self) -> bool:
        """As `per_layer` says."""
        return self.per_layer

    @final
    def reduced(self, space: Space) -> Space:
        """k numbers, or up to k for every block.

        Args:
            space: the parameters.
        """
        return reduced_to(self.k, space, self.per_layer, f"{type(self).__name__}(k={self.k})", "use TwoSided(k_in)")

    @final
    def projector(self, space: Space) -> Projector:
        """The projection of one parameter `space`.

        Raises:
            InvalidInput: k is no smaller than the number of parameters, or weight decay differs between parameters.
        """
        return Projector(self, self.reduced(space))


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
class Rescaled(AbstractReduction):
    """Another projection, of gradients whose every number is multiplied by one of its own first.

    Args:
        projection: what projects them.
        scales: the multipliers by parameter name, in the parameters' shapes, such as Adam's 1 / (sqrt(v) + eps).
            Weight decay then takes no part.

    >>> Rescaled(Gaussian(64), {"weight": torch.ones(2, 3)})
    Rescaled(Gaussian(k=64), 1 tensor)
    """

    projection: AbstractReduction
    scales: Mapping[str, Tensor]

    def __repr__(self) -> str:
        n = len(self.scales)
        return f"Rescaled({self.projection!r}, {n} tensor{'' if n == 1 else 's'})"

    def __fingerprint__(self) -> tuple[Any, ...]:
        """What results depend on."""
        return self.projection, dict(self.scales)

    @property
    def keeps_layers_apart(self) -> bool:
        """As the projection does."""
        return self.projection.keeps_layers_apart

    def reduced(self, space: Space) -> Space:
        """As of the projection, without weight decay.

        Args:
            space: the parameters.
        """
        return self.projection.reduced(_without_decay(space))

    def projector(self, space: Space) -> RescaledProjector:
        """The projection of one parameter `space` after the multiplication."""
        inner = self.projection.projector(_without_decay(space))
        scales = {name: self.scales[name][None] for name in self.scales if name in space.shapes}
        return RescaledProjector(inner, space.from_parameters(scales), inner.space)


def _without_decay(space: Space) -> Space:
    """What is rescaled has no uniform decay any more, and takes none."""
    return Space({name: replace(block, decay=0.0) for name, block in space.blocks.items()}, space.shapes)


@dataclass(frozen=True, eq=False)
class RescaledProjector(AbstractProjector):
    """A map of rows whose every number is multiplied by that of the one row `scales` first."""

    inner: AbstractProjector
    scales: Rows
    space: Space

    def apply(self, rows: Rows) -> Rows:
        """Projected rows."""
        scaled: dict[str, AbstractBlock] = {}
        for name, block in rows.blocks.items():
            dense = block.dense()
            scaled[name] = Dense(dense * self.scales.blocks[name].dense().to(dense))
        return self.inner.apply(Rows(scaled))


@dataclass(frozen=True, eq=False)
class Projector(AbstractProjector):
    """A projection of one space by a dense matrix; `space` is that of the projected rows."""

    projection: AbstractProjection
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
        size = like.shape[1]
        for number, start in enumerate(range(0, size, _STRIP)):
            key = (name, number, like.dtype, like.device)
            strip = self._known.get(key)
            if strip is None:
                strip = self.projection.draw(name, number, min(_STRIP, size - start)).to(like)
                if sum(s.numel() for s in self._known.values()) + strip.numel() <= _KEPT:
                    self._known[key] = strip
            yield start, strip
