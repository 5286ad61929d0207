"""What stands on the right of the linear system: gradients of measures, put together before they are solved."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import reduce
from typing import final

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ..core.distributed import World
from ..core.errors import InvalidInput, NonFinite
from ..gradients.per_example import Derivatives, GradientBatch
from ..linalg.blocks import add
from ..linalg.differences import without_rounding
from ..linalg.rows import Rows
from ..objectives.base import AbstractObjective
from ..objectives.model_functions import FromModel
from ..problem.data import Source
from ..problem.labels import Labels
from ..problem.model_and_loss import ModelAndLoss
from ..problem.model_state import derivative_safe, preserved
from ..problem.problem import Problem, check_weights, sweep
from .checks import in_queries
from .combination import Combination


class AbstractAsk(ABC):
    """Some rows of a question."""

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def batches(
        self, derivatives: Derivatives, ids: Int[Tensor, " r"], room: int, labels: Labels
    ) -> Iterator[tuple[Int[Tensor, " b"], Rows]]:
        """(row ids, gradients) of the rows `ids` (ascending) at the model's present weights, at most `room` at once.

        Args:
            derivatives: how gradients are taken.
            ids: which rows, counted from 0 in this ask.
            room: how many rows may be held.
            labels: takes the labels of the queries that pass by.
        """

    @abstractmethod
    def values(self, problem: Problem) -> Float[Tensor, " r"]:
        """What every row measures at the model's present weights, in float64."""


@final
@dataclass(frozen=True, eq=False)
class Term:
    """Queries, and with which weight each enters which row; `place` is the argument that they came in."""

    source: Source
    combination: Combination
    place: str = "queries"

    def gradients(
        self, derivatives: Derivatives, measure: AbstractObjective, ids: Int[Tensor, " q"], labels: Labels
    ) -> Iterator[GradientBatch]:
        """Gradients of the measure on the queries `ids`, batch by batch in that order."""
        batches = derivatives.stream(self.source, measure, ids, "query gradients", World())
        while True:
            # Only what the stream itself raises speaks of the queries.
            with in_queries(self.place):
                gradients = next(batches, None)
            if gradients is None:
                return
            if self.place == "queries":
                labels.add(gradients.ids, gradients.batch)
            yield gradients


@final
@dataclass(frozen=True, eq=False)
class DataAsk(AbstractAsk):
    """One measure on queries, or on weighted sums of them; `terms` are added up."""

    measure: AbstractObjective
    terms: tuple[Term, ...]

    def __len__(self) -> int:
        return self.terms[0].combination.size

    def batches(
        self, derivatives: Derivatives, ids: Int[Tensor, " r"], room: int, labels: Labels
    ) -> Iterator[tuple[Int[Tensor, " b"], Rows]]:
        if len(self.terms) == 1 and self.terms[0].combination.trivial:
            for gradients in self.terms[0].gradients(derivatives, self.measure, ids, labels):
                yield gradients.ids, gradients.rows
            return
        for some in torch.split(ids, room):
            parts = [(term, term.combination.restricted(some)) for term in self.terms]
            if all(combination.selects for _, combination in parts):
                yield some, self._picked(derivatives, parts, labels)
            else:
                yield some, self._summed(derivatives, parts, labels, len(some))

    def values(self, problem: Problem) -> Float[Tensor, " r"]:
        total = torch.zeros(len(self), dtype=torch.float64)
        for term in self.terms:
            measured = []
            for _, batch in sweep(problem, term.source, label="measuring queries", world=World()):
                with torch.no_grad():
                    outputs = self.measure.outputs(problem.model, batch)
                    measured.append(self.measure.losses(outputs, batch).double().cpu())
            total += term.combination.apply(torch.cat(measured)[:, None])[:, 0]
        return total

    def _picked(self, derivatives: Derivatives, parts: list[tuple[Term, Combination]], labels: Labels) -> Rows:
        """Rows of one query per term, in the form of gradients: the terms stand side by side."""
        terms: list[Rows] = []
        for term, combination in parts:
            queries, place = torch.unique(combination.queries, return_inverse=True)
            read = [g.rows for g in term.gradients(derivatives, self.measure, queries, labels)]
            rows = Rows.cat(read).take(place)
            if not bool((combination.weights == 1).all()):
                rows = rows.scaled(combination.weights)
            terms.append(rows)
        if len(terms) == 1:
            return terms[0]
        sizes = {name: torch.stack([_norms(rows, name) for rows in terms]).sum(0) for name in terms[0].blocks}
        return _settled(reduce(_added, terms), sizes)

    def _summed(
        self, derivatives: Derivatives, parts: list[tuple[Term, Combination]], labels: Labels, size: int
    ) -> Rows:
        """Sums over queries, batch by batch: only the sums are held."""
        space = derivatives.space
        like = derivatives.whole.like(derivatives.problem.model)
        total = space.rows(like.detach().new_zeros(size, space.size))
        sizes = {name: torch.zeros(size, dtype=torch.float64, device=like.device) for name in total.blocks}
        signed = any(bool((combination.weights < 0).any()) for _, combination in parts)
        for term, combination in parts:
            order = torch.argsort(combination.queries, stable=True)
            entries = combination.queries[order]
            queries = torch.unique(entries)
            if not len(queries):
                continue
            for gradients in term.gradients(derivatives, self.measure, queries, labels):
                bounds = torch.stack([gradients.ids[0], gradients.ids[-1] + 1])
                first, last = torch.searchsorted(entries, bounds).tolist()
                here = order[first:last]
                weights = torch.zeros(size, len(gradients.ids), dtype=torch.float64)
                columns = torch.searchsorted(gradients.ids, combination.queries[here])
                weights.index_put_((combination.rows[here], columns), combination.weights[here], accumulate=True)
                _add_sums(total, gradients.rows, weights)
                for name in sizes if signed else ():
                    norms = _norms(gradients.rows, name)
                    sizes[name] += weights.abs().to(norms) @ norms
        return _settled(total, sizes) if signed else total


def _norms(rows: Rows, name: str) -> Float[Tensor, " n"]:
    return rows.blocks[name].squared_norms().double().clamp_min(0.0).sqrt()


def _settled(rows: Rows, sizes: Mapping[str, Float[Tensor, " n"]]) -> Rows:
    """Rows that are sums of terms of both signs, whose norms add up to `sizes`, without what rounding left of them."""
    return rows.map(lambda name, block: without_rounding(block, sizes[name]))


def _added(a: Rows, b: Rows) -> Rows:
    return a.map(lambda name, block: add(block, b.blocks[name]))


def _add_sums(total: Rows, rows: Rows, weights: Tensor) -> None:
    """Add to row r of `total` the sum of `rows`, each times its number in `weights[r]`."""
    for row in weights.any(1).nonzero().flatten().tolist():
        used = weights[row].nonzero().flatten()
        members = rows if len(used) == len(rows) else rows.take(used)
        for name, block in members.combine(weights[row, used][None]).blocks.items():
            values = total.blocks[name].dense()[row]
            values += block.dense()[0].reshape(values.shape)


@final
@dataclass(frozen=True, eq=False)
class ModelAsk(AbstractAsk):
    """A function of the whole model: one row."""

    function: FromModel

    def __len__(self) -> int:
        return 1

    def batches(
        self, derivatives: Derivatives, ids: Int[Tensor, " r"], room: int, labels: Labels
    ) -> Iterator[tuple[Int[Tensor, " b"], Rows]]:
        if len(ids):
            yield ids, self._gradient(derivatives)

    def values(self, problem: Problem) -> Float[Tensor, " r"]:
        model = problem.model
        with preserved(model, problem.space.names), derivative_safe(model), torch.no_grad():
            value = self.function.value(model.inner if isinstance(model, ModelAndLoss) else model)
        return value.detach().double().cpu().reshape(1)

    def _gradient(self, derivatives: Derivatives) -> Rows:
        model, space = derivatives.problem.model, derivatives.whole
        check_weights(model)
        if derivatives.problem.is_cut_up:
            raise InvalidInput(
                "FromModel is differentiated in all weights at once, of which fully_shard leaves each process a part; "
                "ask with examples and a measure, or put the model together first."
            )
        with preserved(model, space.names), derivative_safe(model), torch.enable_grad():
            parameters = space.values(model)
            value = self.function.value(model.inner if isinstance(model, ModelAndLoss) else model)
            gradients: tuple[Tensor | None, ...] = torch.autograd.grad(
                value, list(parameters.values()), allow_unused=True
            )
        if not bool(torch.isfinite(value)):
            raise NonFinite(
                f"The function {self.function.called} of FromModel is {float(value.detach())}; make it finite."
            )
        if all(g is None for g in gradients):
            raise InvalidInput(
                f"The function {self.function.called} of FromModel does not depend on the parameters that take part; "
                "use the model that it is given, or name others with parameters=."
            )
        known = {
            name: (torch.zeros_like(p) if g is None else g.detach())[None]
            for (name, p), g in zip(parameters.items(), gradients, strict=True)
        }
        if not all(bool(torch.isfinite(g).all()) for g in known.values()):
            raise NonFinite(
                f"The gradient of the function {self.function.called} of FromModel is NaN or infinite; look for a "
                "square root or a logarithm of 0 in it."
            )
        rows = space.from_parameters(known)
        return rows if derivatives.projector is None else derivatives.projector.apply(rows)
