"""One block of per-example gradients, kept in its cheapest exact form.

A block is one row per example over one parameter matrix. Weight sharing, repeated calls, sequence positions and
convolution patches are all more terms on the `t` axis; nothing is written out until a route asks for it.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce
from typing import ClassVar

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from .chunks import chunks
from .sides import Side, times
from .terms import padded, terms_in_use
from .window import Window

# Numbers of patches that are written out at once.
_PATCHES = 1 << 22


class AbstractBlock(ABC):
    """`n` rows over one parameter block of shape `shape`."""

    read_when_used: ClassVar[bool] = False
    """Whether every use reads the rows from disk."""

    @property
    @abstractmethod
    def shape(self) -> tuple[int, ...]:
        """Shape of the parameter block, without the row axis."""

    @property
    @abstractmethod
    def reference(self) -> Tensor:
        """Any floating tensor of the block: tells dtype and device."""

    @property
    @abstractmethod
    def numbers(self) -> int:
        """How many numbers the block takes in memory or on disk."""

    @abstractmethod
    def __len__(self) -> int: ...
    @abstractmethod
    def dense(self) -> Tensor:
        """The rows written out, shape [n, *shape]."""

    @abstractmethod
    def take(self, index: Tensor | slice) -> AbstractBlock:
        """The rows `index`, in that order."""

    @abstractmethod
    def scale(self, factor: Tensor | float) -> AbstractBlock:
        """Rows times a number, or times one number per row."""

    @abstractmethod
    def to(self, dtype: torch.dtype) -> AbstractBlock:
        """The same rows in another precision."""

    def squared_norms(self) -> Float[Tensor, " n"]:
        """Squared norm of every row; by default through the written-out rows."""
        return self.dense().flatten(1).square().sum(1)

    @abstractmethod
    def sums(self) -> Float[Tensor, " n"]:
        """One number per row that is NaN or infinite if any number stored for the row is: a cheap check.

        These are sums of what is stored, not of the gradient; no gradient is written out.
        """

    def combine(self, weights: Float[Tensor, "q n"]) -> Tensor:
        """sum_n weights[q, n] G_n, shape [q, *shape]; by default through written-out rows, chunk by chunk."""
        width = int(torch.Size(self.shape).numel())
        total = self.reference.new_zeros(weights.shape[0], width)
        for chunk in chunks(len(self), width):
            total.addmm_(weights[:, chunk], self.take(chunk).dense().flatten(1))
        return total.reshape(len(weights), *self.shape)

    def project(self, left: Side, right: Side) -> AbstractBlock:
        """left^T G right of every row, in factors where the row has some; by default through written-out rows.

        Args:
            left: [o, k_out], for G as a matrix [o, i]; a slice takes some of G's rows, None leaves the side as it is.
            right: [i, k_in]; a slice takes some of G's columns, None leaves the side as it is.
        """
        dense = self.dense().reshape(len(self), *matrix_shape(self.shape))
        return Dense(times(times(dense.mT, left).mT, right))

    def without_idle(self) -> AbstractBlock:
        """The same rows without the terms that are zero in all of them, as at padding and what no loss depends on."""
        return self

    def expect(self, count: int) -> None:
        """Be told how many rows will come for inner products with these, where that decides what is cheaper."""
        return None

    def fold(self, n: int) -> AbstractBlock:
        """n rows, each the sum of so many neighbours: positions that were folded into the axis of examples."""
        rows = self.dense()
        return Dense(rows.reshape(n, -1, *rows.shape[1:]).sum(1))


def matrix_shape(shape: tuple[int, ...]) -> tuple[int, int]:
    """A block's shape as a matrix: the first axis against all others."""
    return shape[0], math.prod(shape[1:])


def _sum_of_each(x: Tensor) -> Float[Tensor, " n"]:
    """Over all but the first axis, without the copy that flattening a transposed tensor makes."""
    return x.sum(tuple(range(1, x.ndim)))


def _refold(a: Tensor, n: int) -> Tensor:
    return a.reshape(n, -1, a.shape[-1])


def _rowwise(factor: Tensor | float, like: Tensor) -> Tensor | float:
    if isinstance(factor, Tensor) and factor.dim() == 1:
        return factor.to(like).reshape(-1, *[1] * (like.dim() - 1))
    return factor


@dataclass(frozen=True, eq=False)
class Dense(AbstractBlock):
    """Rows written out."""

    values: Float[Tensor, "n *shape"]

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.values.shape[1:])

    @property
    def reference(self) -> Tensor:
        return self.values

    @property
    def numbers(self) -> int:
        return self.values.numel()

    def __len__(self) -> int:
        return self.values.shape[0]

    def dense(self) -> Tensor:
        return self.values

    def take(self, index: Tensor | slice) -> Dense:
        return Dense(self.values[index])

    def scale(self, factor: Tensor | float) -> Dense:
        return Dense(self.values * _rowwise(factor, self.values))

    def to(self, dtype: torch.dtype) -> Dense:
        return Dense(self.values.to(dtype))

    def sums(self) -> Float[Tensor, " n"]:
        return self.values.flatten(1).sum(1)


@dataclass(frozen=True, eq=False)
class Outer(AbstractBlock):
    """G_n = sum_t left[n, t] right[n, t]^T, never written out unless asked."""

    left: Float[Tensor, "n t o"]
    right: Float[Tensor, "n t i"]

    @property
    def shape(self) -> tuple[int, ...]:
        return (self.left.shape[2], self.right.shape[2])

    @property
    def terms(self) -> int:
        return self.left.shape[1]

    @property
    def reference(self) -> Tensor:
        return self.left

    @property
    def numbers(self) -> int:
        return self.left.numel() + self.right.numel()

    def __len__(self) -> int:
        return self.left.shape[0]

    def dense(self) -> Tensor:
        if self.terms == 1:
            return self.left[:, 0, :, None] * self.right[:, 0, None, :]
        return torch.bmm(self.left.transpose(1, 2), self.right)

    def take(self, index: Tensor | slice) -> Outer:
        return Outer(self.left[index], self.right[index])

    def scale(self, factor: Tensor | float) -> Outer:
        return Outer(self.left * _rowwise(factor, self.left), self.right)

    def to(self, dtype: torch.dtype) -> Outer:
        return Outer(self.left.to(dtype), self.right.to(dtype))

    def project(self, left: Side, right: Side) -> Outer:
        return Outer(times(self.left, left), times(self.right, right))

    def without_idle(self) -> Outer:
        used = None if self.terms == 1 else terms_in_use(self.left, self.right)
        return self if used is None else Outer(self.left[:, used], self.right[:, used])

    def fold(self, n: int) -> Outer:
        return Outer(_refold(self.left, n), _refold(self.right, n))

    def squared_norms(self) -> Float[Tensor, " n"]:
        t, (o, i) = self.terms, self.shape
        if t * (o + i) > o * i:
            dense = self.dense().flatten(1)
            return torch.einsum("np,np->n", dense, dense)
        grams = torch.bmm(self.left, self.left.mT) * torch.bmm(self.right, self.right.mT)
        return grams.sum((1, 2))

    def sums(self) -> Float[Tensor, " n"]:
        return self.left.sum((1, 2)) + self.right.sum((1, 2))

    def combine(self, weights: Float[Tensor, "q n"]) -> Tensor:
        right = self.right.flatten(0, 1)
        out = right.new_empty(weights.shape[0], *self.shape)
        for q, w in enumerate(weights):  # one [o, n t] x [n t, i] product each: nothing of size [n, o, i] is made
            torch.matmul((self.left * w[:, None, None]).flatten(0, 1).T, right, out=out[q])
        return out


@dataclass(frozen=True, eq=False)
class Indexed(AbstractBlock):
    """G_n[index[n, t]] += values[n, t]: an embedding's gradient; `size` rows in the table."""

    index: Int[Tensor, "n t"]
    values: Float[Tensor, "n t d"]
    size: int

    @property
    def shape(self) -> tuple[int, ...]:
        return (self.size, self.values.shape[2])

    @property
    def reference(self) -> Tensor:
        return self.values

    @property
    def numbers(self) -> int:
        return self.values.numel() + self.index.numel()

    def __len__(self) -> int:
        return self.values.shape[0]

    def dense(self) -> Tensor:
        out = self.values.new_zeros(len(self), *self.shape)
        return out.scatter_add_(1, self.index[:, :, None].expand_as(self.values), self.values)

    def take(self, index: Tensor | slice) -> Indexed:
        return Indexed(self.index[index], self.values[index], self.size)

    def scale(self, factor: Tensor | float) -> Indexed:
        return Indexed(self.index, self.values * _rowwise(factor, self.values), self.size)

    def to(self, dtype: torch.dtype) -> Indexed:
        return Indexed(self.index, self.values.to(dtype), self.size)

    def project(self, left: Side, right: Side) -> AbstractBlock:
        if not isinstance(left, Tensor):
            return super().project(left, right)
        return Outer(left[self.index], times(self.values, right))

    def without_idle(self) -> Indexed:
        used = terms_in_use(self.values)
        return self if used is None else Indexed(self.index[:, used], self.values[:, used], self.size)

    def fold(self, n: int) -> Indexed:
        return Indexed(self.index.reshape(n, -1), _refold(self.values, n), self.size)

    def squared_norms(self) -> Float[Tensor, " n"]:
        same = self.index[:, :, None] == self.index[:, None, :]
        return (torch.bmm(self.values, self.values.mT) * same).sum((1, 2))

    def sums(self) -> Float[Tensor, " n"]:
        return self.values.flatten(1).sum(1)

    def combine(self, weights: Float[Tensor, "q n"]) -> Tensor:
        out, index = self.values.new_zeros(weights.shape[0], *self.shape), self.index.flatten()
        for q, w in enumerate(weights):
            out[q].index_add_(0, index, (self.values * w[:, None, None]).flatten(0, 1))
        return out


@dataclass(frozen=True, eq=False)
class Conv(AbstractBlock):
    """A convolution's rows: an `Outer` over patches that is not unfolded until a route needs it.

    `left` is the gradient at the layer's output, `x` its padded input (one group).
    """

    left: Float[Tensor, "n o *positions"]
    x: Float[Tensor, "n i *space"]
    window: Window

    @property
    def shape(self) -> tuple[int, ...]:
        per = self.x.shape[1] * int(torch.Size(self.window.kernel).numel())
        return (self.left.shape[1], per + int(self.window.bias))

    @property
    def terms(self) -> int:
        return int(torch.Size(self.left.shape[2:]).numel())

    @property
    def reference(self) -> Tensor:
        return self.left

    @property
    def numbers(self) -> int:
        return self.left.numel() + self.x.numel()

    def __len__(self) -> int:
        return self.left.shape[0]

    def outer(self) -> Outer:
        return Outer(self.left.flatten(2).mT.contiguous(), self.window.patches(self.x))

    def dense(self) -> Tensor:
        return torch.bmm(self.left.flatten(2), self.window.patches(self.x))

    def take(self, index: Tensor | slice) -> Conv:
        return Conv(self.left[index], self.x[index], self.window)

    def scale(self, factor: Tensor | float) -> Conv:
        return Conv(self.left * _rowwise(factor, self.left), self.x, self.window)

    def to(self, dtype: torch.dtype) -> Conv:
        return Conv(self.left.to(dtype), self.x.to(dtype), self.window)

    def project(self, left: Side, right: Side) -> Outer:
        return Outer(times(self.left.flatten(2).mT, left), self.window.patches_times(self.x, right))

    def fold(self, n: int) -> Outer:
        return self.outer().fold(n)

    def squared_norms(self) -> Float[Tensor, " n"]:
        return torch.cat([self.take(piece).outer().squared_norms() for piece in self._pieces()])

    def sums(self) -> Float[Tensor, " n"]:
        return _sum_of_each(self.left) + _sum_of_each(self.x)

    def combine(self, weights: Float[Tensor, "q n"]) -> Tensor:
        total = self.left.new_zeros(len(weights), *self.shape)
        for piece in self._pieces():
            total += self.take(piece).outer().combine(weights[:, piece])
        return total

    def _pieces(self) -> list[slice]:
        """A few rows at a time, so that not all patches are written out together."""
        return chunks(len(self), self.terms * sum(self.shape), _PATCHES)

    def apply(self, v: Float[Tensor, "m o *k"]) -> Float[Tensor, "n m"]:
        """<G_n, V_m> by convolving the input with V: no patches, no per-example gradient."""
        m, o = v.shape[:2]
        v = v.reshape(m, o, -1)
        weight = v[..., :-1] if self.window.bias else v
        weight = weight.reshape(m * o, self.x.shape[1], *self.window.kernel)
        bias = v[..., -1].reshape(-1) if self.window.bias else None
        conv = (F.conv1d, F.conv2d, F.conv3d)[len(self.window.kernel) - 1]
        y = conv(self.x, weight, bias, self.window.stride, 0, self.window.dilation)
        if m == 1:
            return y.mul_(self.left).flatten(1).sum(1, keepdim=True)
        return torch.bmm(y.reshape(y.shape[0], m, -1), self.left.reshape(len(self), -1, 1))[..., 0]


@dataclass(frozen=True, eq=False)
class Sum(AbstractBlock):
    """A parameter used by layers of different kinds (a tied embedding and head): the sum of its parts."""

    parts: tuple[AbstractBlock, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        return self.parts[0].shape

    @property
    def reference(self) -> Tensor:
        return self.parts[0].reference

    @property
    def numbers(self) -> int:
        return sum(p.numbers for p in self.parts)

    def __len__(self) -> int:
        return len(self.parts[0])

    def dense(self) -> Tensor:
        total = self.parts[0].dense().clone()
        for part in self.parts[1:]:
            total += part.dense().view_as(total)
        return total

    def take(self, index: Tensor | slice) -> Sum:
        return Sum(tuple(p.take(index) for p in self.parts))

    def scale(self, factor: Tensor | float) -> Sum:
        return Sum(tuple(p.scale(factor) for p in self.parts))

    def to(self, dtype: torch.dtype) -> Sum:
        return Sum(tuple(p.to(dtype) for p in self.parts))

    def project(self, left: Side, right: Side) -> AbstractBlock:
        return reduce(add, (p.project(left, right) for p in self.parts))

    def without_idle(self) -> Sum:
        return Sum(tuple(p.without_idle() for p in self.parts))

    def sums(self) -> Float[Tensor, " n"]:
        return torch.stack([p.sums() for p in self.parts]).sum(0)

    def squared_norms(self) -> Float[Tensor, " n"]:
        """A tied embedding's and head's without writing them out: of each, and twice their inner product."""
        pair = self.table_and_outer()
        if pair is None:
            parts = [self.take(chunk) for chunk in chunks(len(self), math.prod(self.shape))]
            return torch.cat([part.dense().flatten(1).square().sum(1) for part in parts])
        return sum((p.squared_norms() for p in pair), 2 * _table_with_outer(*pair))

    def table_and_outer(self) -> tuple[Indexed, Outer] | None:
        """The parts of a tied embedding and head; None where the uses are others."""
        tables = [p for p in self.parts if isinstance(p, Indexed)]
        outers = [p for p in self.parts if isinstance(p, Outer)]
        return (tables[0], outers[0]) if len(tables) == len(outers) == 1 and len(self.parts) == 2 else None

    def combine(self, weights: Float[Tensor, "q n"]) -> Tensor:
        total = self.parts[0].combine(weights)
        for part in self.parts[1:]:
            total = total + part.combine(weights).view_as(total)
        return total


def _table_with_outer(table: Indexed, outer: Outer) -> Float[Tensor, " n"]:
    """<table_n, outer_n>: only the rows of the table that example n uses are looked at."""
    rows = outer.left.gather(2, table.index[:, None, :].expand(-1, outer.terms, -1))
    return (rows * torch.bmm(outer.right, table.values.mT)).sum((1, 2))


def add(a: AbstractBlock, b: AbstractBlock) -> AbstractBlock:
    """The block of a parameter used twice: terms side by side where the forms agree."""
    if isinstance(a, Dense) and isinstance(b, Dense):
        return Dense(a.values + b.values.view_as(a.values))
    if isinstance(a, Outer) and isinstance(b, Outer):
        return Outer(torch.cat([a.left, b.left], 1), torch.cat([a.right, b.right], 1))
    if isinstance(a, Indexed) and isinstance(b, Indexed):
        return Indexed(torch.cat([a.index, b.index], 1), torch.cat([a.values, b.values], 1), a.size)
    parts = [p for x in (a, b) for p in (x.parts if isinstance(x, Sum) else (x,))]
    return Sum(tuple(parts))


def cat(blocks: Sequence[AbstractBlock]) -> AbstractBlock:
    """Rows of several batches, one after the other: of sums of outer products those of fewer terms get terms of zeros.

    Blocks of different forms are written out, and where terms of zeros would take more than that.
    """
    first = blocks[0]
    if len(blocks) == 1:
        return first
    sums = [b for b in blocks if isinstance(b, Sum)]
    if len(sums) == len(blocks) and len({tuple(type(p) for p in b.parts) for b in sums}) == 1:
        return Sum(tuple(cat(parts) for parts in zip(*(b.parts for b in sums), strict=True)))
    if isinstance(first, Conv) and all(isinstance(b, Conv) and b.x.shape[1:] == first.x.shape[1:] for b in blocks):
        convs = [b for b in blocks if isinstance(b, Conv)]
        return Conv(torch.cat([b.left for b in convs]), torch.cat([b.x for b in convs]), first.window)
    outers = [b.outer() if isinstance(b, Conv) else b for b in blocks if isinstance(b, (Conv, Outer))]
    terms = {b.terms for b in outers}
    most = max(terms, default=0)
    if len(outers) == len(blocks) and (len(terms) == 1 or most * sum(first.shape) <= math.prod(first.shape)):
        left, right = [padded(b.left, most) for b in outers], [padded(b.right, most) for b in outers]
        return Outer(torch.cat(left), torch.cat(right))
    tables = [b for b in blocks if isinstance(b, Indexed)]
    if len(tables) == len(blocks):
        most = max(b.index.shape[1] for b in tables)
        index, values = [padded(b.index, most) for b in tables], [padded(b.values, most) for b in tables]
        return Indexed(torch.cat(index), torch.cat(values), tables[0].size)
    return Dense(torch.cat([b.dense().reshape(len(b), *first.shape) for b in blocks]))
