"""Statistics of one parameter block: second moments of its two axes, and of its gradients in a basis."""

from __future__ import annotations

import enum
import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from ...linalg.blocks import AbstractBlock, Conv, Indexed, Outer, Sum, matrix_shape
from ...linalg.chunks import chunks
from ...linalg.eigh import eigh_shared
from ...linalg.kronecker_block import KroneckerBlock
from ..cost import terms_of

# Moments at least this long are added up in at most so many panels, to leave out most of the lower triangle, but none
# narrower than products are fast.
_PANELLED, _PANELS, _NARROWEST = 256, 8, 96
# Uses of a weight beyond this many times the longer side tell nothing new about a basis: positions are then skipped.
_USES_PER_SIDE = 64
# Numbers of a gradient from which on its squares are added example by example.
IN_TURN = 1 << 13
# Numbers that stay in a core's cache meanwhile.
_CACHED = 1 << 18


class Sharing(enum.Enum):
    """How the uses of a shared weight (sequence positions, patches, repeated calls) enter K-FAC's factors.

    Reference: Eschenhagen et al. (2023), "Kronecker-Factored Approximate Curvature for Modern Neural Network
    Architectures".
    """

    EXPAND = "expand"
    """Every use is an example of its own: exact when uses are independent."""
    REDUCE = "reduce"
    """Uses are summed first: exact when the layer's input is the same for all uses, or its output is averaged."""


class Moments(enum.Enum):
    """Which second moments give the bases."""

    FACTORS = "layer inputs and output gradients"
    GRADIENTS = "rows and columns of the gradient matrix"


@dataclass(eq=False)
class Axis:
    """Second moment of one axis: full, or only its diagonal where the axis is too long (or one-hot)."""

    size: int
    full: bool
    moment: Tensor

    @staticmethod
    def of(size: int, full: bool, like: Tensor) -> Axis:
        return Axis(size, full, like.new_zeros((size, size) if full else (size,)))

    def add(self, x: Float[Tensor, "m d"], weight: float = 1.0) -> None:
        """weight * sum_m x x^T; of a full moment only the upper panels, nine sixteenths of the work."""
        if not self.full:
            self.moment.add_(x.square().sum(0), alpha=weight)
            return
        step = self.size if self.size < _PANELLED else max(_NARROWEST, -(-self.size // _PANELS))
        for start in range(0, self.size, step):
            self.moment[start : start + step, start:].addmm_(x[:, start : start + step].T, x[:, start:], alpha=weight)

    def room(self) -> tuple[Tensor, Float[Tensor, " d"]]:
        """Room for the eigenvectors and eigenvalues of a full moment that another process decomposes."""
        return torch.empty_like(self.moment), self.moment.new_empty(self.size, dtype=torch.float64)

    def eigen(self, what: str) -> tuple[Tensor | None, Float[Tensor, " d"]]:
        """Eigenvectors (None: the coordinates themselves) and eigenvalues, clamped at 0, float64."""
        if not self.full:
            return None, self.moment.double()
        upper = self.moment.triu()
        values, vectors = eigh_shared(upper + upper.triu(1).T, what, single=True)
        # Laid out by rows, as it is sent to other processes.
        return vectors.to(self.moment.dtype).contiguous(), values.clamp_min(0.0)


@dataclass(eq=False)
class BlockFactors:
    """One block, seen as a matrix [o, i], while it is being measured."""

    name: str
    left: Axis
    right: Axis
    moments: Moments
    sharing: Sharing
    stride: int = 1
    terms: int = 0
    basis: KroneckerBlock | None = None
    squares: Tensor = field(default_factory=lambda: torch.zeros(0))

    @staticmethod
    def of(
        name: str, block: AbstractBlock, moments: Moments, sharing: Sharing, largest: int, uses: int
    ) -> BlockFactors:
        """Room for one block; axes longer than `largest`, and a vocabulary, keep their coordinates as basis.

        Args:
            name: of the block.
            block: a few of its rows.
            moments: which second moments give the basis.
            sharing: how the uses of a shared weight enter it.
            largest: the longest axis that is decomposed.
            uses: how often the weight is used, over all examples that will be seen.
        """
        o, i = matrix_shape(block.shape)
        one_hot = isinstance(block, Indexed)
        left = Axis.of(o, 1 < o <= largest and not one_hot, block.reference)
        right = Axis.of(i, 1 < i <= largest, block.reference)
        known = moments if isinstance(block, (Outer, Conv, Indexed)) else Moments.GRADIENTS
        stride = 1
        if isinstance(block, (Outer, Conv)) and sharing is Sharing.EXPAND:
            stride = max(1, min(block.terms, uses // (_USES_PER_SIDE * max(o, i))))
        return BlockFactors(name, left, right, known, sharing, stride)

    def see(self, columns: Sequence[AbstractBlock]) -> None:
        """Add the rows of one batch to the moments, one block per column of the Fisher matrix's root."""
        first = columns[0]
        if isinstance(first, (Outer, Conv)) and self.moments is Moments.FACTORS:
            for chunk in chunks(len(first), first.terms * (self.left.size + self.right.size)):
                self._see_outers(_outers(columns, chunk), isinstance(first, Outer))
            return
        if isinstance(first, Indexed):
            self._see_indexed([column for column in columns if isinstance(column, Indexed)])
            return
        for column in columns:
            for chunk in chunks(len(column), self.left.size * self.right.size):
                self._see_gradients(column.take(chunk))

    def _see_outers(self, columns: list[Outer], sequences: bool) -> None:
        """A layer's input is the same for every column, and is looked at once.

        Of `sequences`, the uses without any gradient (padding, what comes after the last label) leave both sides:
        their inputs would make the factors depend on how texts are padded. Patches of a convolution all stay.
        """
        lefts, rights = _distinct([c.left for c in columns]), _distinct([c.right for c in columns])
        teaches = teaching_uses(columns) if sequences and columns[0].terms > 1 else None
        if teaches is None:
            teaches = torch.ones(lefts[0].shape[:2], dtype=torch.bool, device=lefts[0].device)
        stride, several = self.stride, min(len(lefts), len(rights))
        if self.sharing is Sharing.REDUCE:
            some = teaches.any(1)
            shares = teaches[:, None].to(rights[0]) / teaches.sum(1).clamp_min(1)[:, None, None]
            lefts, rights = [x.sum(1)[some] for x in lefts], [torch.bmm(shares, x)[some, 0] for x in rights]
            stride, self.terms = 1, self.terms + several * int(some.sum())
        else:
            # What stands for several uses counts for as many.
            chosen = _every(teaches, stride)
            lefts, rights = [_choose(x, chosen) for x in lefts], [_choose(x, chosen) for x in rights]
            self.terms += stride * several * len(lefts[0])
        for axis, parts in ((self.left, lefts), (self.right, rights)):
            for x in parts:
                axis.add(x, float(stride))

    def _see_indexed(self, columns: list[Indexed]) -> None:
        """The input is one-hot: its second moment is how often each row of the table is used, exactly a diagonal."""
        teaches = torch.stack([_nonzero(column.values) for column in columns]).any(0)
        used = columns[0].index[teaches]
        self.left.moment.index_add_(0, used, torch.ones_like(used, dtype=self.left.moment.dtype))
        for column in columns:
            self.right.add(column.values.flatten(0, 1))
        self.terms += len(used)

    def _see_gradients(self, block: AbstractBlock) -> None:
        if isinstance(block, Outer) and block.terms == 1:
            left, right = block.left[:, 0], block.right[:, 0]
            self.left.add(left * right.norm(dim=1, keepdim=True))
            self.right.add(right * left.norm(dim=1, keepdim=True))
            return
        pair = block.table_and_outer() if isinstance(block, Sum) and not self.left.full else None
        if pair is not None:
            for row in range(len(block)):
                one = slice(row, row + 1)
                self._see_tied(pair[0].take(one), pair[1].take(one))
            return
        dense = block.dense().reshape(len(block), self.left.size, self.right.size)
        self.left.add(dense.transpose(1, 2).flatten(0, 1))
        self.right.add(dense.flatten(0, 1))

    def _see_tied(self, table: Indexed, outer: Outer) -> None:
        """One gradient G = E^T V + L^T R of a tied embedding and head, E one-hot: the diagonal of G G^T, and G^T G.

        Both follow from the Gram matrices of the terms; G itself, as long as the vocabulary, is not written out.
        """
        index, v, left, right = table.index[0], table.values[0], outer.left[0], outer.right[0]
        there, same = left[:, index], (index[:, None] == index[None]).to(v)
        cross = there * (right @ v.T)
        squares = torch.einsum("to,to->o", (right @ right.T) @ left, left)
        squares.index_add_(0, index, 2 * cross.sum(0) + (same * (v @ v.T)).sum(1))
        self.left.moment.add_(squares)
        product = right.T @ (there @ v)
        self.right.moment.add_(v.T @ (same @ v)).add_(right.T @ (left @ left.T @ right)).add_(product).add_(product.T)

    def sides(self) -> tuple[tuple[Axis, str], tuple[Axis, str]]:
        """Both axes, and what each is called in a message."""
        return (self.left, f"the outputs of {self.name!r}"), (self.right, f"the inputs of {self.name!r}")

    def rebase(
        self,
        outputs: tuple[Tensor | None, Float[Tensor, " o"]],
        inputs: tuple[Tensor | None, Float[Tensor, " i"]],
        count: int,
    ) -> None:
        """Turn both sides' eigenvectors and values into a basis and K-FAC's eigenvalues of the mean over `count`.

        The moments are let go, and room is made for squares in the basis.
        """
        if self.moments is Moments.GRADIENTS:
            whole = self.left.moment.diagonal() if self.left.full else self.left.moment
            weight = float(whole.double().sum())
        else:
            weight = float(self.terms)
        (left, first), (right, second) = outputs, inputs
        second = second / (count * weight if weight > 0 else 1.0)
        values = first[:, None] * second[None]
        self.basis = KroneckerBlock(left, right, values, (first, second))
        self.squares = self.left.moment.new_zeros(values.shape)
        self.left.moment = self.right.moment = values.new_zeros(0)

    def see_squares(self, columns: Sequence[AbstractBlock]) -> None:
        """Add squared gradients in the basis, summed over columns: EK-FAC's eigenvalues."""
        assert self.basis is not None, "decompose() comes first"
        o, i = self.basis.values.shape
        first = columns[0]
        if isinstance(first, (Outer, Conv)):
            numbers = o * i if first.terms > 1 else o + i
            for chunk in chunks(len(first), numbers + first.terms * (o + i)):
                self._squares_of_outers(_outers(columns, chunk))
            return
        for column in columns:
            if isinstance(column, Indexed):
                self._squares_of_indexed(column)
                continue
            pair = column.table_and_outer() if isinstance(column, Sum) and self.basis.left is None else None
            if pair is not None:
                self._squares_of_tied(*pair)
                continue
            for chunk in chunks(len(column), o * i):
                self._add_squares(self.basis.into_basis(column.take(chunk)))

    def _squares_of_outers(self, columns: list[Outer]) -> None:
        """Uses without any gradient are left out before anything is turned: padding, what no label depends on."""
        assert self.basis is not None
        n, terms = columns[0].left.shape[:2]
        lefts, rights = _distinct([c.left for c in columns]), _distinct([c.right for c in columns])
        if terms == 1 and min(len(lefts), len(rights)) == 1:
            # sum_c (Q^T g_c)^2 x (Q^T a)^2: one product for all columns.
            left = sum(_turn(x[:, 0], self.basis.left).square_() for x in lefts)
            right = sum(_turn(x[:, 0], self.basis.right).square_() for x in rights)
            self.squares.addmm_(torch.as_tensor(left).T, torch.as_tensor(right))
            return
        teaches = teaching_uses(columns) if terms > 1 else None
        counts = [terms] * n if teaches is None else teaches.sum(1).tolist()
        if not self.basis.factors_are_cheaper(-(-sum(counts) // n)):
            for column in columns:
                self._add_squares(self.basis.into_basis(column))
            return
        chosen = slice(None) if teaches is None else teaches
        known = {x.data_ptr(): _turn(_choose(x, chosen), self.basis.left) for x in lefts}
        others = {x.data_ptr(): _turn(_choose(x, chosen), self.basis.right) for x in rights}
        for column in columns:
            self._add_outer_squares(known[column.left.data_ptr()], others[column.right.data_ptr()], counts)

    def _add_outer_squares(self, left: Float[Tensor, "m o"], right: Float[Tensor, "m i"], counts: list[int]) -> None:
        """The squares of sums of outer products, of so many neighbours each.

        On a CPU one example after the other, some rows of the matrix at a time: it stays in the cache, which takes a
        third of the time of writing all of them out.
        """
        assert self.squares is not None
        if max(counts) <= 1:
            self.squares.addmm_(left.square().T, right.square())
            return
        lefts, rights = torch.split(left, counts), torch.split(right, counts)
        if self.squares.numel() < IN_TURN or left.device.type != "cpu":
            self._add_squares(torch.bmm(pad_sequence(list(lefts), True).mT, pad_sequence(list(rights), True)))
            return
        rows, width = self.squares.shape
        panels = chunks(rows, width, most=_CACHED)
        gradient = torch.empty_like(self.squares[panels[0]])
        for one, other in zip(lefts, rights, strict=True):
            for panel in panels:
                squares = self.squares[panel]
                some = torch.mm(one[:, panel].T, other, out=gradient[: len(squares)])
                squares.addcmul_(some, some)

    def _squares_of_tied(self, table: Indexed, outer: Outer) -> None:
        """(G + E)^2 = G^2 + (2 G + E) E, and E, the part of the inputs, is zero in all rows but the words of a text."""
        assert self.basis is not None and self.squares is not None
        outer = Outer(outer.left, _turn(outer.right, self.basis.right))
        self._add_outer_squares(outer.left.flatten(0, 1), outer.right.flatten(0, 1), [outer.terms] * len(outer))
        values = _turn(table.values, self.basis.right)
        for index, value, left, right in zip(table.index, values, outer.left, outer.right, strict=True):
            words, which = torch.unique(index, return_inverse=True)
            summed = value.new_zeros(len(words), value.shape[1]).index_add_(0, which, value)
            twice = (left[:, words].T @ right).mul_(2.0).add_(summed)
            self.squares.index_add_(0, words, twice.mul_(summed))

    def _add_squares(self, turned: Float[Tensor, "n o i"]) -> None:
        flat = turned.reshape(len(turned), -1)
        # A third of the time of squaring and then summing, which writes the squares out.
        self.squares += torch.einsum("np,np->p", flat, flat).view_as(self.squares)

    def _squares_of_indexed(self, block: Indexed) -> None:
        """Only the rows of the table that an example uses have a gradient; repeated uses add up first."""
        assert self.basis is not None
        n = len(block)
        key = (torch.arange(n, device=block.index.device)[:, None] * block.size + block.index).flatten()
        pairs, which = torch.unique(key, return_inverse=True)
        turned = _turn(block.values.flatten(0, 1), self.basis.right)
        summed = turned.new_zeros(len(pairs), turned.shape[1]).index_add_(0, which, turned)
        self.squares.index_add_(0, pairs % block.size, summed.square_())

    def corrected(self, count: int) -> KroneckerBlock:
        """The basis with the measured eigenvalues E[(Q^T G Q)^2]."""
        assert self.basis is not None
        return KroneckerBlock(self.basis.left, self.basis.right, self.squares.div_(count))


def teaching_uses(columns: Sequence[Outer]) -> Bool[Tensor, "n t"] | None:
    """Which uses of a weight any column has a gradient for; None: all."""
    lefts, rights = _distinct([c.left for c in columns]), _distinct([c.right for c in columns])
    either = [torch.stack([_nonzero(x) for x in several]).any(0) for several in (lefts, rights)]
    teaches = either[0] & either[1]
    return None if bool(teaches.all()) else teaches


def teaching_terms(block: AbstractBlock) -> float:
    """How many terms of an example's gradient are not zero, on average: padding is not counted."""
    if isinstance(block, Outer):
        teaches = teaching_uses([block])
        return float(block.terms) if teaches is None else float(teaches.sum(1).double().mean())
    if isinstance(block, Indexed):
        return float(_nonzero(block.values).sum(1).double().mean())
    if isinstance(block, Sum):
        return max(teaching_terms(part) for part in block.parts)
    return float(terms_of(block))


def _nonzero(x: Float[Tensor, "n t d"]) -> Bool[Tensor, "n t"]:
    """Whether any number of a term differs from zero. The largest, as squares of small numbers would vanish.

    One number of each is looked at first (of a layer's inputs the 1 of its bias): all are, of terms where it is 0.
    """
    nonzero: Tensor = x[..., -1] != 0
    if not bool(nonzero.all()):
        rest = ~nonzero
        nonzero[rest] = torch.linalg.vector_norm(x[rest], math.inf, -1).bool()
    return nonzero


def _every(teaches: Bool[Tensor, "n t"], stride: int) -> Bool[Tensor, "n t"] | slice:
    """Every `stride`-th of the uses that teach, counted within each example; a slice where all do."""
    if bool(teaches.all()):
        return slice(stride // 2, None, stride)
    return teaches & ((teaches.cumsum(1) - 1) % stride == stride // 2)


def _choose(x: Float[Tensor, "n t d"], chosen: Tensor | slice) -> Float[Tensor, "m d"]:
    """The chosen uses of all examples, one after the other."""
    return x[:, chosen].flatten(0, 1) if isinstance(chosen, slice) else x[chosen]


def _turn(x: Tensor, basis: Tensor | None) -> Tensor:
    return x.clone() if basis is None else x @ basis


def _same(x: Tensor, y: Tensor) -> bool:
    return x.data_ptr() == y.data_ptr() and x.shape == y.shape and x.stride() == y.stride()


def _distinct(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Each tensor once, where several are the same memory."""
    distinct: list[Tensor] = []
    for x in tensors:
        if not any(_same(x, y) for y in distinct):
            distinct.append(x)
    return distinct


def _outers(columns: Sequence[AbstractBlock], chunk: slice) -> list[Outer]:
    """The rows `chunk` of every column with patches unfolded, once per distinct input."""
    outers: list[Outer] = []
    unfolded: list[tuple[Tensor, Tensor]] = []
    for column in columns:
        part = column.take(chunk)
        if isinstance(part, Outer):
            outers.append(part)
            continue
        assert isinstance(part, Conv)
        patches = next((p for x, p in unfolded if _same(x, part.x)), None)
        if patches is None:
            patches = part.window.patches(part.x)
            unfolded.append((part.x, patches))
        outers.append(Outer(part.left.flatten(2).mT, patches))
    return outers


def unified(columns: Sequence[AbstractBlock]) -> list[AbstractBlock]:
    """Columns that hold equal inputs made to share them: what is the same is stored, and computed with, once."""
    first, shared = columns[0], list(columns[:1])
    for column in columns[1:]:
        if isinstance(first, Outer) and isinstance(column, Outer):
            left = first.left if _equal(first.left, column.left) else column.left
            right = first.right if _equal(first.right, column.right) else column.right
            column = Outer(left, right)
        elif isinstance(first, Conv) and isinstance(column, Conv) and _equal(first.x, column.x):
            column = Conv(column.left, first.x, column.window)
        shared.append(column)
    return shared


def _equal(x: Tensor, y: Tensor) -> bool:
    return x.shape == y.shape and (_same(x, y) or torch.equal(x, y))
