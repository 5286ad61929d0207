"""Projections by random signs from a counter-based generator: the same on every machine, and no P x k matrix."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final, cast, final

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from ..core.errors import InvalidInput
from ..core.validate import choice, whole_number
from ..linalg.blocks import AbstractBlock, Dense, Outer, matrix_shape
from ..linalg.chunks import chunks
from ..linalg.rows import Rows
from ..linalg.space import BlockSpec, Space
from .projections import JOINT, AbstractProjector, AbstractReduction, reduced_to

RANDOM_SIGNS: Final = "random signs"
EIGENVECTORS: Final = "eigenvectors"


def random_words(count: int, *key: object) -> np.ndarray[tuple[int], np.dtype[np.uint64]]:
    """So many 64-bit words that depend on the key alone: on no device, no version, and not on what was drawn before.

    The generator is Philox, whose raw words numpy promises to keep (Salmon et al. 2011).
    """
    name = hashlib.blake2b("/".join(map(str, key)).encode(), digest_size=16).digest()
    return np.random.Philox(key=int.from_bytes(name, "little")).random_raw(count)


def random_signs(count: int, *key: object) -> Float[Tensor, " n"]:
    """So many numbers +1 and -1 for a key, float32 on the CPU.

    >>> random_signs(4, 0, "layer", "input").tolist() == random_signs(9, 0, "layer", "input")[:4].tolist()
    True
    """
    words = random_words(-(-count // 64), *key).astype("<u8").view(np.uint8)
    bits = torch.from_numpy(np.unpackbits(words, count=count, bitorder="little"))
    return bits.float().mul_(2).sub_(1)


# --------------------------------------------------------------------------- two-sided


@final
@dataclass(frozen=True, repr=False)
class TwoSided(AbstractReduction):
    r"""Every layer's gradient G = sum_t d_t a_t^T as sum_t (P_out d_t)(P_in a_t)^T, `k_out` x `k_in` numbers.

    Inputs and output gradients are projected before they meet, so the gradient itself is never written out. Inner
    products are kept on average, up to about sqrt(1 / k_in + 1 / k_out). A side no longer than its k stays as it is;
    a scale or bias that stands alone has k_in * k_out numbers.

    Args:
        k_in: numbers that a layer's input is projected to.
        k_out: numbers that the gradient at its output is projected to; `None`: as many.
        basis: `"random signs"`, or `"eigenvectors"`: the leading ones of the layer's input and output-gradient second
            moments, which an index measures when it is built.
        seed: of the signs; each layer and side has its own.

    Reference: Choe et al. (2024), "What is Your Data Worth to GPT?" (LoGra).

    >>> TwoSided(16)
    TwoSided(k_in=16)
    """

    k_in: int
    k_out: int | None = None
    basis: str = RANDOM_SIGNS
    seed: int = 0

    def __post_init__(self) -> None:
        whole_number("k_in", self.k_in, owner=self, hint="8 to 64 are usual")
        if self.k_out is not None:
            whole_number("k_out", self.k_out, owner=self, hint="8 to 64 are usual")
        choice("basis", self.basis, (RANDOM_SIGNS, EIGENVECTORS), owner=self)

    @property
    def sides(self) -> tuple[int, int]:
        """(k_out, k_in)."""
        return self.k_out or self.k_in, self.k_in

    def shape_of(self, block: BlockSpec) -> tuple[int, int]:
        """The shape of a block's projected gradient.

        Args:
            block: the block of parameters.
        """
        o, i = matrix_shape(block.shape)
        left, right = self.sides
        return (min(o, left * right), 1) if i == 1 else (min(o, left), min(i, right))

    @property
    def keeps_layers_apart(self) -> bool:
        """Always: each layer is projected by itself."""
        return True

    def reduced(self, space: Space) -> Space:
        """k_out x k_in numbers for every block, fewer where it has fewer.

        Args:
            space: the parameters.
        """
        return Space({n: BlockSpec(n, (), self.shape_of(b), decay=b.decay) for n, b in space.blocks.items()}, {})

    def projector(self, space: Space) -> TwoSidedProjector:
        """The projection of one parameter `space`, by random signs.

        Raises:
            InvalidInput: its directions are measured, which needs data.
        """
        if self.basis == EIGENVECTORS:
            raise InvalidInput(
                f"{self!r} measures its directions on the training data, which only an index does; leave basis= out, "
                "or use ptif.Index.build(...)."
            )
        sides = {}
        for name, block in space.blocks.items():
            lengths, kept = matrix_shape(block.shape), self.shape_of(block)
            sides[name] = (
                self._signs(name, "output", lengths[0], kept[0]),
                self._signs(name, "input", lengths[1], kept[1]),
            )
        return TwoSidedProjector.of(self, space, sides)

    def _signs(self, block: str, side: str, length: int, k: int) -> Float[Tensor, "length k"] | None:
        if k >= length:
            return None
        return random_signs(length * k, self.seed, block, side).reshape(length, k) / math.sqrt(k)


@final
@dataclass(frozen=True, eq=False)
class TwoSidedProjector(AbstractProjector):
    """The map of one space.

    Args:
        space: of the projected rows: every block has the shape [k_out, k_in].
        sides: per block the matrices [o, k_out] and [i, k_in]; None leaves a side as it is.
        measured: whether they were measured on data, not drawn from a seed.
    """

    space: Space
    sides: Mapping[str, tuple[Tensor | None, Tensor | None]]
    measured: bool = False
    _known: dict[object, tuple[Tensor | None, Tensor | None]] = field(default_factory=dict, repr=False)

    @staticmethod
    def of(
        projection: TwoSided,
        space: Space,
        sides: Mapping[str, tuple[Tensor | None, Tensor | None]],
        measured: bool = False,
    ) -> TwoSidedProjector:
        """The map with these matrices."""
        return TwoSidedProjector(projection.reduced(space), sides, measured)

    def apply(self, rows: Rows) -> Rows:
        """Projected rows; layers stay in factors."""
        return rows.map(lambda name, block: block.project(*self._sides_for(name, block.reference)))

    def _sides_for(self, name: str, like: Tensor) -> tuple[Tensor | None, Tensor | None]:
        key = (name, like.dtype, like.device)
        if key not in self._known:
            left, right = (None if side is None else side.to(like) for side in self.sides[name])
            self._known[key] = left, right
        return self._known[key]


# --------------------------------------------------------------------------- sketch


@final
@dataclass(frozen=True, repr=False)
class Sketch(AbstractReduction):
    r"""Every gradient as k numbers: each coordinate is added, with a random sign, to one of them.

    A sparse Johnson-Lindenstrauss map with one entry per coordinate: inner products are kept on average, up to
    1 / sqrt(k), for one operation per coordinate and without a matrix. A block is cut into pieces of k coordinates;
    each piece gets random signs and a random cyclic shift, so that all of its coordinates land on different numbers.

    With `per_layer` each block of parameters becomes k numbers of its own, so that `Blockwise(Spectral())` gives every
    layer its own kernel; blocks of at most k coordinates are left as they are.

    Args:
        k: how many numbers a gradient becomes.
        per_layer: sketch every block of parameters by itself.
        seed: of signs and shifts; each block of parameters has its own.

    References: Charikar, Chen & Farach-Colton (2002); Kane & Nelson (2014); Hu et al. (2025), GraSS.

    >>> Sketch(1024).k
    1024
    """

    k: int
    seed: int = 0
    per_layer: bool = False

    def __post_init__(self) -> None:
        whole_number("k", self.k, owner=self, hint="512 to 8192 are usual")

    @property
    def keeps_layers_apart(self) -> bool:
        """As `per_layer` says."""
        return self.per_layer

    def reduced(self, space: Space) -> Space:
        """k numbers, or up to k for every block.

        Args:
            space: the parameters.
        """
        return reduced_to(self.k, space, self.per_layer, repr(self), "use TwoSided(k_in)")

    def projector(self, space: Space) -> SketchProjector:
        """The sketch of one parameter `space`.

        Raises:
            InvalidInput: k is no smaller than the number of parameters, or weight decay differs between parameters that
                are mixed.
        """
        return SketchProjector(self.reduced(space), self)


# Coordinates that are added up at once, and numbers of all examples together: temporaries that stay in the cache.
_STRIP = 1 << 17
_NUMBERS = 1 << 22


@final
@dataclass(frozen=True, eq=False)
class SketchProjector(AbstractProjector):
    """The map of any space to the k numbers of one sketch."""

    space: Space
    sketch: Sketch
    _known: dict[object, Any] = field(default_factory=dict, repr=False)

    def apply(self, rows: Rows) -> Rows:
        """Projected rows, written out."""
        k, projected = self.sketch.k, {}
        for name, block in rows.blocks.items():
            if self.sketch.per_layer and math.prod(block.shape) <= k:
                projected[name] = block.dense().flatten(1)
            elif isinstance(block, Outer) and block.terms == 1:
                projected[name] = self._of_products(name, block)
            else:
                projected[name] = self._of_dense(name, block)
        if not self.sketch.per_layer:
            projected = {JOINT: torch.stack(list(projected.values())).sum(0)}
        return Rows({name: Dense(projected[name]) for name in self.space.blocks})

    def _of_dense(self, name: str, block: AbstractBlock) -> Float[Tensor, "n k"]:
        """A few rows at a time written out, and each piece of k coordinates added to the totals."""
        size, k = math.prod(block.shape), self.sketch.k
        total = torch.zeros(len(block), k, dtype=block.reference.dtype, device=block.reference.device)
        signs, shifts = self._signs(name, size, block.reference), self._shifts(name, size).tolist()
        for chunk in chunks(len(block), size):
            _fold(block.take(chunk).dense().flatten(1) * signs, cast("list[int]", shifts), total[chunk])
        return total

    def _of_products(self, name: str, block: Outer) -> Float[Tensor, "n k"]:
        """The same for one product a row, with the examples last: each of the k numbers is a signed sum over lines."""
        left, right = block.left[:, 0].T.contiguous(), block.right[:, 0].T.contiguous()
        total = torch.zeros(len(block), self.sketch.k, dtype=left.dtype, device=left.device)
        for lines, members, firsts, signs in self._bags(name, block.shape, left):
            for some in chunks(len(block), len(members), _NUMBERS):
                products = (left[lines, None, some] * right[None, :, some]).flatten(0, 1)
                total[some] += F.embedding_bag(members, products, firsts, mode="sum", per_sample_weights=signs).T
        return total

    def _bags(self, name: str, shape: tuple[int, ...], like: Tensor) -> list[tuple[slice, Tensor, Tensor, Tensor]]:
        """A strip of the matrix at a time: its coordinates in the order of their number, where each begins, signs."""
        key = (name, shape, like.dtype, like.device)
        if key in self._known:
            return cast("list[tuple[slice, Tensor, Tensor, Tensor]]", self._known[key])
        (o, i), k = shape, self.sketch.k
        shifts = torch.from_numpy(self._shifts(name, o * i))
        signs = random_signs(o * i, self.sketch.seed, name, "sign")
        strips, lines = [], max(1, _STRIP // i)
        for start in range(0, o, lines):
            stop = min(start + lines, o)
            at = torch.arange(start * i, stop * i)
            number = (at + shifts[at // k]) % k
            members = torch.argsort(number, stable=True)
            counts = torch.bincount(number, minlength=k)
            firsts = (counts.cumsum(0) - counts).int().to(like.device)
            strips.append((slice(start, stop), members.int().to(like.device), firsts, signs[at[members]].to(like)))
        self._known[key] = strips
        return strips

    def _shifts(self, name: str, size: int) -> np.ndarray[Any, np.dtype[np.int64]]:
        """How far each piece of k coordinates is moved round."""
        k = self.sketch.k
        words = random_words(-(-size // k), self.sketch.seed, name, "shift")
        shifts: np.ndarray[Any, np.dtype[np.int64]] = (words % np.uint64(k)).astype(np.int64)
        return shifts

    def _signs(self, name: str, size: int, like: Tensor) -> Tensor:
        key = (name, size, like.dtype, like.device)
        if key not in self._known:
            self._known[key] = random_signs(size, self.sketch.seed, name, "sign").to(like)
        return cast("Tensor", self._known[key])


def _fold(flat: Float[Tensor, "n p"], shifts: list[int], total: Float[Tensor, "n k"]) -> None:
    """Add each piece of k coordinates to the k totals, moved round by its shift."""
    k, size = total.shape[1], flat.shape[1]
    for piece, shift in enumerate(shifts):
        start = piece * k
        first = min(k - shift, size - start)
        total[:, shift : shift + first] += flat[:, start : start + first]
        rest = min(shift, size - start - first)
        if rest > 0:
            total[:, :rest] += flat[:, start + first : start + first + rest]
