"""Projections by random signs from a counter-based generator: the same on every machine, and no P x k matrix."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import reduce
from typing import Final, cast, final

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from ..core.errors import InvalidInput
from ..core.validate import choice, whole_number
from ..linalg.blocks import AbstractBlock, Conv, Dense, Indexed, Outer, Sum, add, matrix_shape
from ..linalg.chunks import chunks
from ..linalg.rows import Rows
from ..linalg.space import BlockSpec, Space
from .projections import JOINT, AbstractProjector, AbstractReduction

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

    def projector(self, space: Space) -> TwoSidedProjector:
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
        blocks = {
            name: BlockSpec(name, (), projection.shape_of(block), decay=block.decay)
            for name, block in space.blocks.items()
        }
        return TwoSidedProjector(Space(blocks, {}), sides, measured)

    def apply(self, rows: Rows) -> Rows:
        """Projected rows; layers stay in factors."""
        return rows.map(lambda name, block: project_sides(block, *self._sides_for(name, block.reference)))

    def _sides_for(self, name: str, like: Tensor) -> tuple[Tensor | None, Tensor | None]:
        key = (name, like.dtype, like.device)
        if key not in self._known:
            left, right = (None if side is None else side.to(like) for side in self.sides[name])
            self._known[key] = left, right
        return self._known[key]


def project_sides(block: AbstractBlock, left: Tensor | None, right: Tensor | None) -> AbstractBlock:
    """left^T G right of every row, in factors where the row has some.

    Args:
        block: rows over a block seen as a matrix [o, i].
        left: [o, k_out]; None leaves the side as it is.
        right: [i, k_in]; None leaves the side as it is.
    """
    if isinstance(block, Sum):
        return reduce(add, (project_sides(part, left, right) for part in block.parts))
    if isinstance(block, Conv):
        return Outer(_times(block.left.flatten(2).mT, left), _project_patches(block, right))
    if isinstance(block, Outer):
        return Outer(_times(block.left, left), _times(block.right, right))
    if isinstance(block, Indexed) and left is not None:
        return Outer(left[block.index], _times(block.values, right))
    dense = block.dense().reshape(len(block), *matrix_shape(block.shape))
    if left is not None:
        dense = left.T @ dense
    return Dense(_times(dense, right))


def _times(x: Tensor, side: Tensor | None) -> Tensor:
    return x if side is None else x @ side


def _project_patches(block: Conv, right: Tensor | None) -> Float[Tensor, "n t k"]:
    """Every patch times the matrix, by convolving the input with it: no patch is written out."""
    if right is None:
        return block.window.patches(block.x)
    window, channels = block.window, block.x.shape[1]
    weight = right[:-1] if window.bias else right
    kernels = weight.T.reshape(right.shape[1], channels, *window.kernel)
    convolve = (F.conv1d, F.conv2d, F.conv3d)[len(window.kernel) - 1]
    pushed = convolve(block.x, kernels, right[-1] if window.bias else None, window.stride, 0, window.dilation)
    return pushed.flatten(2).mT


# --------------------------------------------------------------------------- sketch


@final
@dataclass(frozen=True, repr=False)
class Sketch(AbstractReduction):
    r"""Every gradient as k numbers: each coordinate is added, with a random sign, to one of them.

    A sparse Johnson-Lindenstrauss map with one entry per coordinate: inner products are kept on average, up to
    1 / sqrt(k), for one operation per coordinate and without a matrix. A block is cut into pieces of k coordinates;
    each piece gets random signs and a random cyclic shift, so that all of its coordinates land on different numbers.

    Args:
        k: how many numbers a gradient becomes.
        seed: of signs and shifts; each block of parameters has its own.

    References: Charikar, Chen & Farach-Colton (2002); Kane & Nelson (2014); Hu et al. (2025), GraSS.

    >>> Sketch(1024).k
    1024
    """

    k: int
    seed: int = 0

    def __post_init__(self) -> None:
        whole_number("k", self.k, owner=self, hint="512 to 8192 are usual")

    def projector(self, space: Space) -> SketchProjector:
        if self.k >= space.size:
            raise InvalidInput(
                f"{self!r} is no smaller than the {space.size:,} parameters, where projecting only adds noise; take a "
                "smaller k, or leave it out."
            )
        decays = set(space.decay.values())
        if len(decays) > 1:
            raise InvalidInput(
                "Weight decay differs between parameters, and a sketch mixes them; pass one number for all, or use "
                "TwoSided(k_in)."
            )
        return SketchProjector(Space({JOINT: BlockSpec(JOINT, (), (self.k,), decay=decays.pop())}, {}), self)


@final
@dataclass(frozen=True, eq=False)
class SketchProjector(AbstractProjector):
    """The map of any space to the k numbers of one sketch."""

    space: Space
    sketch: Sketch
    _known: dict[object, Tensor] = field(default_factory=dict, repr=False)

    def apply(self, rows: Rows) -> Rows:
        """Projected rows, written out."""
        k = self.sketch.k
        total = torch.zeros(len(rows), k, dtype=rows.dtype, device=rows.device)
        for name, block in rows.blocks.items():
            size = math.prod(block.shape)
            signs = self._signs(name, size, block.reference)
            shifts = (random_words(-(-size // k), self.sketch.seed, name, "shift") % np.uint64(k)).tolist()
            for chunk in chunks(len(rows), size):
                flat = block.take(chunk).dense().flatten(1) * signs
                _fold(flat, cast("list[int]", shifts), total[chunk])
        return Rows({JOINT: Dense(total)})

    def _signs(self, name: str, size: int, like: Tensor) -> Tensor:
        key = (name, size, like.dtype, like.device)
        if key not in self._known:
            self._known[key] = random_signs(size, self.sketch.seed, name, "sign").to(like)
        return self._known[key]


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
