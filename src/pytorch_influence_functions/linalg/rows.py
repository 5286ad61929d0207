"""Rows: n vectors in parameter space, and how their inner products are routed.

Per block the route is chosen by a model of floating-point operations *and* bytes moved: a batch of per-example
gradients that is written out and read back is limited by memory bandwidth unless the sequence is long, so operations
alone would choose badly. Every route is exact.
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from ..core.errors import InvalidInput
from . import blocks as _blocks
from .blocks import AbstractBlock, Conv, Dense, Indexed, Outer, Sum
from .chunks import chunks, written_numbers
from .on_disk import OnDisk
from .turned import Turned

# Operations the machine does in the time it moves one byte. The numbers are fixed: results never depend on timing.
_OPERATIONS_PER_BYTE = {"cpu": 12.0, "cuda": 100.0}
# Numbers of a block that are held at once in another precision.
_CONVERTED = 1 << 24
# Numbers that stay in a core's cache; examples whose gradients are written out there together, of at least so many rows
# of the matrix: fewer make the products thin, which costs more than leaving the cache does.
_CACHED, _WRITTEN_TOGETHER, _PANEL_ROWS = 1 << 18, 16, 32


class Route(enum.Enum):
    """How <a_n, b_m> is computed. `AUTO` chooses per block by the cost model; the others force a choice."""

    AUTO = "auto"
    GHOST = "ghost"
    """Factored against factored: (left . left) * (right . right), no gradient written out."""
    APPLY = "apply"
    """Sum_t left^T V right: the other side is dense, this side is never written out."""
    MATERIALISE = "materialise"
    """Write the per-example gradients out, then one matrix product."""
    FORWARD = "forward"
    """One forward-mode pass of the per-example losses along each solved query; no rows at all."""
    VMAP = "vmap"
    """Per-example gradients by torch.func.vmap, whatever the layer."""
    LOOP = "loop"
    """One backward pass per example: slow, always right."""

    @classmethod
    def of(cls, value: Route | str | None) -> Route:
        """A route from its name; `None` is `AUTO`.

        Args:
            value: a route, its name such as `"ghost"`, or `None`.
        """
        if value is None:
            return cls.AUTO
        try:
            return cls(value)
        except ValueError:
            known = ", ".join(repr(r.value) for r in cls)
            raise InvalidInput(f"route={value!r} is not a route; choose one of {known}.") from None


@dataclass(frozen=True)
class RoutePlan:
    """What one contraction would cost: multiply-adds and bytes moved."""

    route: Route
    macs: float
    bytes: float

    def cost(self, device: str) -> float:
        return 2 * self.macs / _OPERATIONS_PER_BYTE.get(device, 12.0) + self.bytes


def outer_plans(n: int, t: int, o: int, i: int, m: int, s: int | None, size: int) -> list[RoutePlan]:
    """Costs for n rows of t terms against m rows that are dense (s None) or of s terms. [o, i] block."""
    plans = [
        RoutePlan(Route.MATERIALISE, 1.0 * n * t * o * i + n * m * o * i, 1.0 * size * (2 * n * o * i + m * o * i)),
        RoutePlan(Route.APPLY, 1.0 * n * t * m * o * (i + 1), 1.0 * size * (2 * n * t * m * o + m * o * i)),
    ]
    if s is not None:
        write = m * s * o * i  # the other side has to be written out for the two routes above
        plans = [RoutePlan(p.route, p.macs + write, p.bytes + size * m * o * i) for p in plans]
        moved = 1.0 * size * (2 * n * m * t * s + (n * t + m * s) * (o + i))
        plans.append(RoutePlan(Route.GHOST, 1.0 * n * m * t * s * (o + i), moved))
    return plans


def _indexed_plans(a: Indexed, m: int, size: int) -> list[RoutePlan]:
    """A table's rows against m dense ones: gather the rows each example uses, or write its whole gradient out."""
    n, t, d = a.values.shape
    written = a.size * d
    return [
        RoutePlan(Route.APPLY, 1.0 * n * m * t * d, 3.0 * size * n * m * t * d),
        RoutePlan(Route.MATERIALISE, 1.0 * n * m * written, 1.0 * size * (2 * n * written + m * written)),
    ]


def choose_route(a: AbstractBlock, b: AbstractBlock) -> Route:
    """The cheapest exact route for <a, b>, by operations and bytes."""
    size, device = a.reference.element_size(), a.reference.device.type
    if isinstance(a, Indexed):
        return min(_indexed_plans(a, len(b), size), key=lambda p: p.cost(device)).route
    if not isinstance(a, (Outer, Conv)):
        return Route.MATERIALISE
    o, i = a.shape
    s = b.terms if isinstance(b, (Outer, Conv)) else None
    plans = outer_plans(len(a), a.terms, o, i, len(b), s, size)
    if isinstance(a, Conv):
        # All routes but `apply` unfold the patches first: gathered, given the bias column, read back.
        unfolded = 4 * size * len(a) * a.terms * i
        plans = [p if p.route is Route.APPLY else RoutePlan(p.route, p.macs, p.bytes + unfolded) for p in plans]
    return min(plans, key=lambda p: p.cost(device)).route


def _as_outer(block: Outer | Conv) -> Outer:
    return block if isinstance(block, Outer) else block.outer()


def _ghost(a: Outer, b: Outer) -> Tensor:
    if a.terms == 1 and b.terms == 1:
        return (a.left[:, 0] @ b.left[:, 0].T).mul_(a.right[:, 0] @ b.right[:, 0].T)
    n, m = len(a), len(b)
    out = a.left.new_empty(n, m)
    al, ar = a.left.flatten(0, 1), a.right.flatten(0, 1)
    for chunk in chunks(m, n * a.terms * b.terms):
        part = b.take(chunk)
        pairs = (al @ part.left.flatten(0, 1).T).mul_(ar @ part.right.flatten(0, 1).T)
        out[:, chunk] = pairs.view(n, a.terms, len(part), b.terms).sum((1, 3))
    return out


def _apply(a: Outer | Conv, v: Tensor) -> Tensor:
    n, (o, i), m = len(a), a.shape, v.shape[0]
    if isinstance(a, Outer) and m == 1:
        return _apply_one(a, v[0].reshape(o, i))
    out = v.new_empty(n, m)
    for chunk in chunks(m, n * a.terms * o):
        part = v[chunk]
        if isinstance(a, Conv):
            out[:, chunk] = a.apply(part)
            continue
        pushed = (a.right.flatten(0, 1) @ part.reshape(-1, i).T).view(n, a.terms, part.shape[0], o)
        out[:, chunk] = torch.einsum("ntmo,nto->nm", pushed, a.left)
        del pushed  # before the next is made
    return out


def _apply_one(a: Outer, v: Tensor) -> Tensor:
    """`_apply` for a single direction [o, i], a few examples at a time so that what is pushed stays in cache."""
    n, t, o = a.left.shape
    out, vt = v.new_empty(n, 1), v.T
    # Below this size pieces cost more to start than their memory traffic saves.
    step = n if n * t * o <= _CACHED or v.device.type != "cpu" else max(1, _CACHED // (t * o))
    for start in range(0, n, step):
        chunk = slice(start, start + step)
        pushed = (a.right[chunk].flatten(0, 1) @ vt).view(-1, t, o)
        out[chunk, 0] = pushed.mul_(a.left[chunk]).sum((1, 2))
    return out


def _materialise(a: AbstractBlock, v: Tensor) -> Tensor:
    if isinstance(a, Outer) and a.terms > 1 and a.left.shape[2] * a.right.shape[2] > _CACHED and v.device.type == "cpu":
        return _materialise_in_cache(a, v.reshape(len(v), *a.shape))
    out = v.new_empty(len(a), v.shape[0])
    flat = v.flatten(1).T
    for chunk in chunks(len(a), flat.shape[0], written_numbers(flat.shape[0])):
        torch.mm(a.take(chunk).dense().flatten(1), flat, out=out[chunk])
    return out


def _materialise_in_cache(a: Outer, v: Float[Tensor, "m o i"]) -> Tensor:
    """`_materialise` of large matrices, some rows of them at a time: what is written out does not leave the cache."""
    out, (o, i) = v.new_zeros(len(a), len(v)), a.shape
    for some in chunks(len(a), 1, _WRITTEN_TOGETHER):
        part, scores = a.take(some), out[some]
        for panel in chunks(o, len(part) * i, max(_CACHED, _PANEL_ROWS * len(part) * i)):
            written = torch.bmm(part.left[:, :, panel].mT, part.right)
            scores.addmm_(written.flatten(1), v[:, panel].flatten(1).T)
    return out


def _indexed_dense(a: Indexed, v: Tensor) -> Tensor:
    out = v.new_empty(len(a), v.shape[0])
    for chunk in chunks(v.shape[0], a.values.numel()):
        out[:, chunk] = torch.einsum("mntd,ntd->nm", v[chunk][:, a.index], a.values)
    return out


def _indexed_pair(a: Indexed, b: Indexed) -> Tensor:
    out = a.values.new_empty(len(a), len(b))
    av, ai = a.values.flatten(0, 1), a.index.flatten()
    for chunk in chunks(len(b), a.index.numel() * b.index.shape[1]):
        part = b.take(chunk)
        pairs = (av @ part.values.flatten(0, 1).T).mul_(ai[:, None] == part.index.flatten()[None])
        out[:, chunk] = pairs.view(len(a), a.index.shape[1], len(part), b.index.shape[1]).sum((1, 3))
    return out


def _outer_indexed(a: Outer, b: Indexed) -> Tensor:
    out = a.left.new_empty(len(a), len(b))
    n, t = a.left.shape[:2]
    for chunk in chunks(len(b), n * t * b.index.shape[1]):
        part = b.take(chunk)
        columns = a.left[:, :, part.index.flatten()]
        pushed = a.right @ part.values.flatten(0, 1).T
        out[:, chunk] = (columns * pushed).sum(1).view(n, len(part), -1).sum(2)
    return out


def inner(a: AbstractBlock, b: AbstractBlock, route: Route = Route.AUTO) -> Float[Tensor, "n m"]:
    """<a_n, b_m> for all pairs of rows of one block."""
    if isinstance(a, Turned):
        a = Dense(a.dense())
    if isinstance(b, Turned):
        return inner(*(b.meets(a) if route is Route.AUTO else (a, Dense(b.dense()))), route)
    if isinstance(b, OnDisk):
        return torch.cat([inner(a, piece, route) for piece in b.pieces()], 1)
    if isinstance(a, Sum):
        return torch.stack([inner(p, b, route) for p in a.parts]).sum(0)
    if isinstance(b, Sum):
        return torch.stack([inner(a, p, route) for p in b.parts]).sum(0)
    if isinstance(a, Indexed) and isinstance(b, Indexed) and route is not Route.MATERIALISE:
        return _indexed_pair(a, b)
    if isinstance(a, Indexed) and isinstance(b, Outer) and route is not Route.MATERIALISE:
        return _outer_indexed(b, a).T
    if isinstance(a, Outer) and isinstance(b, Indexed) and route is not Route.MATERIALISE:
        return _outer_indexed(a, b)
    if isinstance(a, Indexed):
        chosen = route if route in (Route.GHOST, Route.APPLY, Route.MATERIALISE) else choose_route(a, b)
        return _materialise(a, b.dense()) if chosen is Route.MATERIALISE else _indexed_dense(a, b.dense())
    if isinstance(a, Dense) and isinstance(b, (Indexed, Outer, Conv)):
        return inner(b, a, route).T
    if not isinstance(a, (Outer, Conv)):
        return _materialise(a, b.dense())
    chosen = route if route in (Route.GHOST, Route.APPLY, Route.MATERIALISE) else choose_route(a, b)
    if chosen is Route.GHOST and isinstance(b, (Outer, Conv)):
        return _ghost(_as_outer(a), _as_outer(b))
    # A dense row has no second pair of factors, so `ghost` against it means `apply`.
    return _materialise(a, b.dense()) if chosen is Route.MATERIALISE else _apply(a, b.dense())


def _rowwise(a: AbstractBlock, b: AbstractBlock) -> Float[Tensor, " n"]:
    """<a_n, b_n>: an outer product is not written out for it."""
    if isinstance(a, Turned):
        a, b = b, a
    if isinstance(b, Turned):
        a, b = b.meets(a)
    if isinstance(b, Outer) and not isinstance(a, Outer):
        a, b = b, a
    if not isinstance(a, Outer):
        return torch.einsum("np,np->n", a.dense().flatten(1), b.dense().flatten(1))
    o, i = a.shape
    if isinstance(b, Outer) and a.terms * b.terms * (o + i) <= a.terms * o * i:
        return (torch.bmm(a.left, b.left.mT) * torch.bmm(a.right, b.right.mT)).sum((1, 2))
    pushed = torch.bmm(a.left, b.dense().reshape(len(b), o, i))
    return pushed.mul_(a.right).sum((1, 2))


def inner_in(a: AbstractBlock, b: AbstractBlock, dtype: torch.dtype, route: Route = Route.AUTO) -> Float[Tensor, "n m"]:
    """<a_n, b_m> computed in another precision than the rows are kept in, a part of each at a time."""
    b = Dense(b.dense()) if isinstance(b, Turned) else b
    out = a.reference.new_empty(len(a), len(b), dtype=dtype)
    parts = [(part, b.take(part).to(dtype)) for part in _parts(b)] if b.numbers <= _CONVERTED else None
    for rows in _parts(a):
        some = a.take(rows).to(dtype)
        for columns, others in parts or ((part, b.take(part).to(dtype)) for part in _parts(b)):
            out[rows, columns] = inner(some, others, route)
    return out


def _parts(block: AbstractBlock) -> list[slice]:
    step = max(1, _CONVERTED * len(block) // max(1, block.numbers))
    return [slice(start, start + step) for start in range(0, len(block), step)]


@dataclass(frozen=True, eq=False)
class Rows:
    """`n` vectors in parameter space, block by block.

    Blocks are named by `Space`; two `Rows` meet block by block, so they must come from the same space.
    """

    written_out: ClassVar[bool] = True
    """Whether each row can be followed as a direction without further work; a `DualSolution` cannot."""

    blocks: Mapping[str, AbstractBlock]

    def __len__(self) -> int:
        return len(next(iter(self.blocks.values())))

    @property
    def dtype(self) -> torch.dtype:
        return next(iter(self.blocks.values())).reference.dtype

    @property
    def device(self) -> torch.device:
        return next(iter(self.blocks.values())).reference.device

    @property
    def numbers(self) -> int:
        """How many numbers these rows take in their present form."""
        return sum(b.numbers for b in self.blocks.values())

    def inner(self, other: Rows, route: Route | None = None, dtype: torch.dtype | None = None) -> Float[Tensor, "n m"]:
        """All inner products <self_n, other_m>, each block by its own route.

        Args:
            other: the other rows, of the same space.
            route: one for all blocks; None: the cheapest of each.
            dtype: the precision of the products; None: that of the rows. Blocks are added up in float32 or more.
        """
        total: Tensor | None = None
        for name, block in self.blocks.items():
            another = other.blocks[name]
            if dtype is None:
                products = inner(block, another, route or Route.AUTO)
            else:
                products = inner_in(block, another, dtype, route or Route.AUTO)
            products = products.to(torch.promote_types(products.dtype, torch.float32))
            total = products if total is None else total.add_(products)
        assert total is not None
        return total

    def against(
        self, training: Rows, route: Route | None = None, dtype: torch.dtype | None = None
    ) -> Float[Tensor, "n m"]:
        """<self_n, training_m> for solved queries, routed by the form of the training rows."""
        return training.inner(self, route, dtype).T

    def rowwise(self, other: Rows) -> Float[Tensor, " n"]:
        """<self_n, other_n> for matching rows."""
        total = torch.zeros(len(self), dtype=self.dtype, device=self.device)
        for name, block in self.blocks.items():
            total += _rowwise(block, other.blocks[name])
        return total

    def routes(self, other: Rows) -> dict[str, Route]:
        """Which route `inner` would take for each block."""
        return {k: choose_route(b, other.blocks[k]) for k, b in self.blocks.items()}

    @property
    def met(self) -> int:
        """Vectors that each other row meets for its products with these."""
        return len(self)

    @property
    def read_when_used(self) -> bool:
        """Whether every use reads some of them from disk."""
        return any(b.read_when_used for b in self.blocks.values())

    def rows(self) -> Rows:
        """These rows; a `DualSolution` writes itself out."""
        return self

    def map(self, f: Callable[[str, AbstractBlock], AbstractBlock]) -> Rows:
        return Rows({k: f(k, b) for k, b in self.blocks.items()})

    def dense(self) -> Rows:
        """Every block written out."""
        return self.map(lambda _, b: b if isinstance(b, Dense) else Dense(b.dense()))

    def flat(self) -> Float[Tensor, "n p"]:
        """The rows written out as one matrix, in the order of the space's blocks."""
        return torch.cat([b.dense().flatten(1) for b in self.blocks.values()], 1)

    def squared_norms(self) -> Float[Tensor, " n"]:
        """Squared norm of every row."""
        return torch.stack([b.squared_norms() for b in self.blocks.values()]).sum(0)

    def sums(self) -> Float[Tensor, " n"]:
        """NaN or infinite where any number stored for a row is; much cheaper than norms."""
        return torch.stack([b.sums() for b in self.blocks.values()]).sum(0)

    def to(self, dtype: torch.dtype) -> Rows:
        """The same rows in another precision."""
        return self.map(lambda _, b: b.to(dtype))

    def expect(self, count: int) -> None:
        """Be told how many rows will come for inner products with these."""
        for block in self.blocks.values():
            block.expect(count)

    def without_idle(self) -> Rows:
        """The same rows without the terms that are zero in all of them."""
        return self.map(lambda _, b: b.without_idle())

    def only(self, names: Sequence[str]) -> Rows:
        """Some blocks of these rows."""
        return Rows({name: self.blocks[name] for name in names})

    def take(self, index: Tensor | slice) -> Rows:
        return self.map(lambda _, b: b.take(index))

    def scaled(self, factor: Tensor | float | Mapping[str, float]) -> Rows:
        """Times a number, one number per row, or one number per block."""
        if isinstance(factor, Mapping):
            return self.map(lambda k, b: b.scale(factor[k]))
        return self.map(lambda _, b: b.scale(factor))

    def combine(self, weights: Float[Tensor, "q n"]) -> Rows:
        """Rows sum_n weights[q, n] self_n, written out."""
        return self.map(lambda _, b: Dense(b.combine(weights.to(b.reference))))

    def compact(self) -> Rows:
        """Each block in whichever of its exact forms takes fewer numbers: the form to keep in memory."""

        def smaller(_: str, b: AbstractBlock) -> AbstractBlock:
            written_out = len(b) * int(torch.Size(b.shape).numel())
            return Dense(b.dense()) if b.numbers > written_out else b

        return self.map(smaller)

    @staticmethod
    def cat(rows: Sequence[Rows]) -> Rows:
        """Rows of several batches, one after the other."""
        return Rows(dict(Rows.joined(rows).blocks))

    @staticmethod
    def joined(rows: Sequence[Rows]) -> Rows:
        """`cat`, each block made when it is asked for: all of them are never held beside what they are made of."""
        return rows[0] if len(rows) == 1 else Rows(_JoinedBlocks(rows))


@dataclass(frozen=True, eq=False)
class _JoinedBlocks(Mapping[str, AbstractBlock]):
    """The blocks of several rows, one after the other, made when they are asked for."""

    rows: Sequence[Rows]

    def __getitem__(self, name: str) -> AbstractBlock:
        return _blocks.cat([r.blocks[name] for r in self.rows])

    def __iter__(self) -> Iterator[str]:
        return iter(self.rows[0].blocks)

    def __len__(self) -> int:
        return len(self.rows[0].blocks)
