"""C known on a few directions and a constant across them: every function of it costs two thin products."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import final

import torch
from jaxtyping import Float
from torch import Tensor

from ..core.errors import InvalidInput
from .density import Density
from .operator import AbstractSpectral
from .rows import Rows
from .space import Space


@final
@dataclass(frozen=True, eq=False)
class Span:
    """Some blocks, orthonormal directions over their coordinates, and the eigenvalue `rest` of C across those there.

    `basis` [k, P_g] has orthonormal rows over the coordinates of `names`, in the space's order.
    """

    names: tuple[str, ...]
    basis: Float[Tensor, "k p"]
    rest: float = 0.0

    @property
    def whole(self) -> bool:
        """Whether the directions span all coordinates."""
        return self.basis.shape[0] == self.basis.shape[1]


@final
@dataclass(frozen=True, eq=False)
class LowRank(AbstractSpectral):
    r"""C = W^T U diag(values) U^T W + rest (I - W^T W), with orthonormal rows W.

    W is made of `spans`, each over its own blocks, so that a weight decay or damping that differs between blocks is
    added exactly: the directions are cut at the borders where it changes, and only a small matrix is decomposed again.
    `turn` is U [K, K], the identity when None; `values` [K] are float64.

    The complement, where nothing was measured, is one of two:

    * kept: f(C) is f(rest) there, so the inverse of C + lambda is 1 / (rest + lambda);
    * `dropped`: every function of C is zero there and only the K directions answer (Schioppa et al. 2022); C + D is
      then its own restriction to these directions, and `answered_part` is what a solution can account for.

    Memory K x P numbers; a product with n rows costs 4 n K P operations.

    Raises `InvalidInput` when shapes do not fit, or a dropped complement is given a value.
    """

    space: Space
    spans: tuple[Span, ...]
    values: Float[Tensor, " k"]
    turn: Float[Tensor, "k k"] | None = None
    dropped: bool = False
    notes: tuple[str, ...] = ()
    """Sentences that belong to the result, such as directions that have not converged."""

    def __post_init__(self) -> None:
        expected = [(len(s.basis), sum(self.space.numel(k) for k in s.names)) for s in self.spans]
        names = [k for s in self.spans for k in s.names]
        shapes = [tuple(s.basis.shape) for s in self.spans]
        if (
            shapes != expected
            or sorted(names) != sorted(self.space.blocks)
            or sum(k for k, _ in shapes) != len(self.values)
        ):
            raise InvalidInput(
                f"Directions of shapes {shapes} with {len(self.values)} eigenvalues do not fit a space of {self.size} "
                "parameters; give one row of P numbers per eigenvalue."
            )
        if self.dropped and any(s.rest for s in self.spans):
            raise InvalidInput("A complement that is dropped has no value; leave rest at 0, or keep it.")

    @staticmethod
    def of(
        space: Space,
        vectors: Float[Tensor, "k p"],
        values: Float[Tensor, " k"],
        rest: float = 0.0,
        dropped: bool = False,
        notes: tuple[str, ...] = (),
    ) -> LowRank:
        """From orthonormal eigenvectors as rows [k, P] and their eigenvalues [k].

        >>> from torch import nn
        >>> one = LowRank.of(Space.of(nn.Linear(2, 1)), torch.eye(3)[:1], torch.tensor([4.0]), rest=1.0)
        >>> one.mean_eigenvalue(), one.extremes()
        (2.0, (1.0, 4.0))
        """
        return LowRank(space, (Span(tuple(space.blocks), vectors, rest),), values.double(), None, dropped, notes)

    def apply(self, rows: Rows) -> Rows:
        flat = rows.flat()
        coordinates = self._coordinates(flat)
        products = self._multiply_small(coordinates)
        out = torch.empty_like(flat)
        for span, own in self._span_slices():
            columns = self._columns(span.names)
            excess = products[:, own] - span.rest * coordinates[:, own]
            part = excess.to(span.basis) @ span.basis
            out[:, columns] = (part + span.rest * flat[:, columns].to(part) if span.rest else part).to(flat)
        return self.space.rows(out)

    def block_means(self) -> dict[str, float]:
        small, means = self._small(), {}
        for span, own in self._span_slices():
            excess = small[own, own] - span.rest * torch.eye(len(span.basis), dtype=small.dtype, device=small.device)
            for name, columns in self._inner_columns(span.names).items():
                part = span.basis[:, columns].double()
                means[name] = span.rest + float((excess @ part * part).sum()) / part.shape[1]
        return {k: means[k] for k in self.space.blocks}

    def function(self, f: Callable[[Tensor], Tensor]) -> LowRank:
        if self.dropped:
            return replace(self, values=f(self.values))
        rests = torch.tensor([s.rest for s in self.spans], dtype=self.values.dtype, device=self.values.device)
        values = f(torch.cat([self.values, rests]))
        # Where the directions span everything there is no complement, and f of its eigenvalue may be infinite.
        tails = values[len(self.values) :].tolist()
        spans = (replace(s, rest=0.0 if s.whole else t) for s, t in zip(self.spans, tails, strict=True))
        return replace(self, values=values[: len(self.values)], spans=tuple(spans))

    def shifted(self, decay: Mapping[str, float]) -> LowRank:
        numbers = {decay[k] for k in self.space.blocks}
        if self.dropped:
            if len(numbers) == 1:
                return replace(self, values=self.values + numbers.pop())
            return self._decompose(self._small() + self._restrict(decay), self.spans)
        if len(numbers) == 1:
            add = numbers.pop()
            return replace(
                self, values=self.values + add, spans=tuple(replace(s, rest=s.rest + add) for s in self.spans)
            )
        return self._shift_unevenly(decay)

    def extremes(self) -> tuple[float, float]:
        values = self.values.tolist() + [s.rest for s in self.spans if not (self.dropped or s.whole)]
        return min(values), max(values)

    def known_eigenvalues(self) -> Density:
        rests = [(s.rest, float(s.basis.shape[1] - s.basis.shape[0])) for s in self.spans]
        values, counts = torch.tensor(rests, dtype=torch.float64).T
        ones = torch.ones(len(self.values), dtype=torch.float64)
        return Density.of(torch.cat([self.values.cpu(), values]), torch.cat([ones, counts]))

    def answered_part(self, flat: Float[Tensor, "n p"]) -> Float[Tensor, "n p"]:
        """The part of every row that functions of C act on: all of it, unless the complement is dropped."""
        if not self.dropped:
            return flat
        coordinates, out = self._coordinates(flat), torch.empty_like(flat)
        for span, own in self._span_slices():
            out[:, self._columns(span.names)] = (coordinates[:, own].to(span.basis) @ span.basis).to(flat)
        return out

    # ---------------------------------------------------------------- inner workings

    def _span_slices(self) -> Iterator[tuple[Span, slice]]:
        """Every span with the place of its directions among all K."""
        start = 0
        for span in self.spans:
            yield span, slice(start, start + len(span.basis))
            start += len(span.basis)

    def _coordinates(self, flat: Tensor) -> Tensor:
        """Coordinates along W, [n, K]."""
        parts = [flat[:, self._columns(s.names)].to(s.basis) @ s.basis.T for s in self.spans]
        return torch.cat([p.double() for p in parts], 1)

    def _multiply_small(self, coordinates: Tensor) -> Tensor:
        """U diag(values) U^T times coordinates along W."""
        if self.turn is None:
            return coordinates * self.values
        return (coordinates @ self.turn * self.values) @ self.turn.T

    def _small(self) -> Tensor:
        """U diag(values) U^T, [K, K]."""
        return self.values.diag() if self.turn is None else (self.turn * self.values) @ self.turn.T

    def _restrict(self, decay: Mapping[str, float]) -> Tensor:
        """W D W^T, [K, K]."""
        parts = []
        for span in self.spans:
            k = len(span.basis)
            total = self.values.new_zeros(k, k)
            for name, columns in self._inner_columns(span.names).items():
                part = span.basis[:, columns].double()
                total.addmm_(part, part.T, alpha=decay[name])
            parts.append(total)
        blocks: Tensor = torch.block_diag(*parts)  # type: ignore[no-untyped-call]
        return blocks

    def _shift_unevenly(self, decay: Mapping[str, float]) -> LowRank:
        """C + D where D differs between blocks: directions are cut at the borders, and a small matrix is decomposed.

        Each span's W_s = sum_g T_g Q_g with Q_g orthonormal over the blocks of one D; on the span of all Q the matrix
        is T^T (M - rest) T + rest + D, and across it rest + D.
        """
        spans: list[Span] = []
        turns: list[Tensor] = []
        old_rests: list[Tensor] = []
        for span in self.spans:
            old_rests.append(self.values.new_full((len(span.basis),), span.rest))
            inner = self._inner_columns(span.names)
            pieces = []
            for number in dict.fromkeys(decay[k] for k in span.names):
                names = tuple(k for k in span.names if decay[k] == number)
                part = torch.cat([span.basis[:, inner[k]] for k in names], 1)
                q, r = torch.linalg.qr(part.T)
                spans.append(Span(names, q.T.contiguous(), span.rest + number))
                pieces.append(r.T.double())
            turns.append(torch.cat(pieces, 1))
        t = torch.block_diag(*turns)  # type: ignore[no-untyped-call]
        rests = torch.cat([self.values.new_full((len(s.basis),), s.rest) for s in spans])
        return self._decompose(t.T @ (self._small() - torch.cat(old_rests).diag()) @ t + rests.diag(), tuple(spans))

    def _decompose(self, small: Tensor, spans: tuple[Span, ...]) -> LowRank:
        values, turn = torch.linalg.eigh((small + small.T) / 2)
        return replace(self, spans=spans, values=values, turn=turn)

    def _inner_columns(self, names: tuple[str, ...]) -> dict[str, slice]:
        """Where each of some blocks lies among the coordinates of these blocks only."""
        columns, start = {}, 0
        for name in names:
            columns[name] = slice(start, start + self.space.numel(name))
            start += self.space.numel(name)
        return columns

    def _columns(self, names: tuple[str, ...]) -> slice | Tensor:
        """Where some blocks lie in a flat vector."""
        if names == tuple(self.space.blocks):
            return slice(None)
        slices = self.space.slices
        device = self.spans[0].basis.device
        return torch.cat([torch.arange(slices[k].start, slices[k].stop, device=device) for k in names])
