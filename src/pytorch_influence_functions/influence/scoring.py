"""The one scoring pass: queries are differentiated in groups, and the training data pass by each solved group once.

Every method that scores uses it. `ScoringPass` reads the queries, adds up blocks of scores, and makes the result;
`TrainingStream` is one pass of the training data against solved queries, by whichever way is cheapest.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any, TypeAlias

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ..core.cut_up import whole
from ..core.distributed import World, current
from ..core.errors import InvalidInput, NonFinite, name_ids
from ..gradients.per_example import Derivatives, GradientBatch
from ..gradients.products import Products
from ..linalg.chunks import SCORE_NUMBERS, SCORE_ROWS, chunks
from ..linalg.dual_solution import DualSolution
from ..linalg.rows import Route, Rows
from ..problem.data import Source
from ..problem.problem import Problem, sweep
from ..scores.diagnostics import Diagnostics
from ..scores.parts import PartScores
from ..scores.scores import Scores
from ..solvers.truncation import Truncation
from .parts import Part, Parts
from .question import Question
from .run_log import RunLog
from .topk import TopK

Solved: TypeAlias = Rows | DualSolution

# Share of the memory budget that solved queries, with what the solver holds beside each, may take.
QUERY_SHARE = 1 / 4
# Batches are joined up to so many examples, and to this share of the numbers of the solved queries that they meet.
_JOINED, _JOINED_SHARE = 32, 1 / 8
# Up to this many queries one forward-mode pass per query is cheaper than rows for layers without a rule.
_FORWARD_QUERIES = 8


@dataclass(eq=False)
class ScoringPass:
    """One question on its way to scores.

    Args:
        problem: whose training examples are scored.
        question: the queries and what is measured on them. Where it asks for the extremes only, no more is held.
        log: what is written down while scores are made.
        world: the processes that each add the blocks of their own share of the training examples.
    """

    problem: Problem
    question: Question
    log: RunLog = field(default_factory=RunLog)
    parts: Parts | None = None
    whole: bool = False
    """Whether blocks come in shares that are added up, so that extremes can only be taken at the end."""
    double: bool = False
    """Whether scores are given in float64 whatever the model's precision: parts that cancel only add up then."""
    world: World = field(default_factory=current)
    _started: float = field(default_factory=time.perf_counter, init=False)
    _matrices: list[ScoreMatrix] = field(init=False)

    def __post_init__(self) -> None:
        count = 1 if self.parts is None else len(self.parts)
        self._matrices = [ScoreMatrix(self.question, len(self.problem), self.whole) for _ in range(count)]

    def query_groups(
        self, derivatives: Derivatives, room: int, ids: Int[Tensor, " q"] | None = None
    ) -> Iterator[tuple[Int[Tensor, " q"], Rows]]:
        """(query indices, gradients of the measure) in groups of `room`, whatever the batches are.

        Each group costs a pass over the training data, so groups are filled up to the last row. `ids`: which queries;
        `None`: all.
        """
        yield from grouped(self._rows(derivatives, room, ids), room)

    def _rows(self, derivatives: Derivatives, room: int, ids: Tensor | None) -> Iterator[tuple[Tensor, Rows]]:
        first, labels = 0, self.question.labels
        for ask in self.question.asks:
            every = torch.arange(len(ask))
            own = every if ids is None else ids[(ids >= first) & (ids < first + len(ask))] - first
            for some, rows in ask.batches(derivatives, own, room, labels):
                yield some + first, rows
            first += len(ask)

    def add(
        self, query_ids: Int[Tensor, " q"], ids: Int[Tensor, " n"], values: Float[Tensor, "q n"], part: int = 0
    ) -> None:
        """Add a block of scores: queries `query_ids` on training examples `ids` (ascending), of one of the parts.

        Raises:
            NonFinite: a score is NaN or infinite: nothing is ranked around it.
        """
        refuse_nonfinite(values, query_ids, ids)
        if len(ids):  # of few examples some processes have none
            self._matrices[part].add(query_ids, ids, values)

    def scores(self, diagnostics: Callable[[RunLog], Diagnostics], fit_seconds: float = 0.0) -> Scores:
        """The result, with labels, sources and the diagnostics that `diagnostics` makes of the log.

        Scores are in the model's precision, at least float32.
        """
        return self._result(self._matrices[0], self._record(diagnostics, fit_seconds))

    def part_scores(self, diagnostics: Callable[[RunLog], Diagnostics], fit_seconds: float = 0.0) -> PartScores:
        """The result by part; diagnostics are the same for all."""
        assert self.parts is not None
        record = self._record(diagnostics, fit_seconds)
        each = {name: self._result(matrix, record) for name, matrix in zip(self.parts, self._matrices, strict=True)}
        return PartScores(each)

    def _record(self, diagnostics: Callable[[RunLog], Diagnostics], fit_seconds: float) -> Diagnostics:
        seconds = fit_seconds + time.perf_counter() - self._started
        record, question = diagnostics(self.log), self.question
        notes = record.notes
        if question.candidates is not None:
            width = question.candidates.width
            notes = (f"{width:,} of {len(self.problem):,} training examples per row were asked for", *notes)
        if self.parts is not None:
            notes = (f"told apart by {len(self.parts)} parts of the model, which add up to the whole", *notes)
        return replace(
            record, n_queries=len(question), seconds=seconds, notes=notes, rows=question.description or record.rows
        )

    def _result(self, matrix: ScoreMatrix, diagnostics: Diagnostics) -> Scores:
        problem, question = self.problem, self.question
        data, queries = problem.data, question.source
        values, indices = matrix.result(self.world)
        if data.positions is not None and question.candidates is None:
            # A loader's sampler chose a part of the dataset: examples are named by their places in the whole.
            indices = data.positions.expand(len(values), -1) if indices is None else data.positions[indices]
        dtype = problem.space.like(problem.model).dtype
        scores = Scores(
            values.to(torch.float64 if self.double or dtype == torch.float64 else torch.float32),
            lower_is_better=question.lower_is_better,
            n_train=len(data.whole),
            indices=indices,
            train_labels=_spread_labels(problem.labels.as_list(self.world), data),
            query_labels=question.query_labels(),
            query_names=question.names,
            query_ids=question.query_ids,
            class_names=data.class_names or (None if queries is None else queries.class_names),
            diagnostics=diagnostics,
            train_source=data.whole,
            query_source=question.shown,
            measure=question.measure,
        )
        return scores.top(question.top) if question.top is not None and matrix.holds_all else scores


@dataclass(eq=False)
class ScoreMatrix:
    """Scores of all rows as they come in: the whole matrix, the candidates' part of it, or its extremes.

    Args:
        question: the rows, and what is kept of each.
        n_train: N.
        whole: hold all scores even where the question asks for extremes.
    """

    question: Question
    n_train: int
    whole: bool = False
    _extremes: TopK | None = field(default=None, init=False)
    _total: Tensor | None = field(default=None, init=False)

    def __post_init__(self) -> None:
        top = self.question.top
        if top is not None and self.question.candidates is None and not self.whole:
            self._extremes = TopK(len(self.question), min(top, self.n_train))

    @property
    def holds_all(self) -> bool:
        """Whether all scores are held, so that extremes are still to be taken of the result."""
        return self._extremes is None

    def add(self, query_ids: Int[Tensor, " q"], ids: Int[Tensor, " n"], values: Float[Tensor, "q n"]) -> None:
        """Add a block of finite scores."""
        candidates = self.question.candidates
        if self._extremes is not None:
            self._extremes.add(query_ids, ids, values)
        elif candidates is not None:
            self._held()[query_ids] += candidates.pick(query_ids, ids, values)
        else:
            # Neighbours are added in place, several times as fast as by their indices.
            rows, columns = _as_slice(query_ids), _as_slice(ids)
            if isinstance(rows, slice) and isinstance(columns, slice):
                self._held()[rows, columns].add_(values.cpu())
            else:
                self._held()[query_ids[:, None], ids[None]] += values.double().cpu()

    def _held(self) -> Tensor:
        """The matrix, made when the first block comes: who asks for the queries alone holds none."""
        if self._total is None:
            candidates = self.question.candidates
            width = self.n_train if candidates is None else candidates.width
            self._total = torch.zeros(len(self.question), width, dtype=torch.float64)
        return self._total

    def result(self, world: World) -> tuple[Float[Tensor, "q m"], Int[Tensor, "q m"] | None]:
        """Scores of what all processes added, and the index of the training example behind each; None: all in order.

        Of the extremes 3 k per query and process are exchanged; all scores are exchanged once, in place.
        """
        candidates = self.question.candidates
        if self._extremes is not None:
            return self._extremes.everyones(world).result()
        named = None if candidates is None else candidates.positions.expand(len(self.question), -1)
        return world.sum_into(self._held()), named


def _as_slice(index: Int[Tensor, " n"]) -> slice | Tensor:
    """The indices as a slice, where each is the one before plus one."""
    first = int(index[0]) if len(index) else 0
    consecutive = torch.equal(index, torch.arange(first, first + len(index)))
    return slice(first, first + len(index)) if consecutive else index


def _spread_labels(labels: list[Any] | None, data: Source) -> list[Any] | None:
    """One label per example of the whole dataset, None for those that a sampler left out."""
    if labels is None or data.positions is None:
        return labels
    spread: list[Any] = [None] * len(data.whole)
    for position, label in zip(data.positions.tolist(), labels, strict=True):
        spread[position] = label
    return spread


def grouped(batches: Iterable[tuple[Tensor, Rows]], room: int) -> Iterator[tuple[Tensor, Rows]]:
    """Indices and rows in groups of exactly `room` rows (fewer in the last), whatever the batches are."""
    ids: list[Tensor] = []
    parts: list[Rows] = []
    filled = 0
    for batch_ids, rows in batches:
        start, n = 0, len(batch_ids)
        while start < n:
            part = slice(start, start + min(n - start, room - filled))
            ids.append(batch_ids[part])
            parts.append(rows.take(part))
            start, filled = part.stop, filled + part.stop - part.start
            if filled == room:
                yield _joined(ids, parts)
                filled = 0
        del batch_ids, rows
    if ids:
        yield _joined(ids, parts)


def _joined(ids: list[Tensor], parts: list[Rows]) -> tuple[Tensor, Rows]:
    """All parts as one, and the lists emptied: they must not keep the parts alive."""
    joined = torch.cat(ids), Rows.cat(parts)
    ids.clear()
    parts.clear()
    return joined


@dataclass(frozen=True, eq=False)
class TrainingStream:
    """Solved queries against every training example at the model's present weights, in one pass.

    Args:
        derivatives: how gradients are taken at these weights.
        solved: (C + D)^-1 grad m(q) of a group of queries.
        route: the way of the inner products, see `Route`.
        training_rows: the rows that stand for the training examples, batch by batch; None: their loss gradients.
        stored: all training gradients, where a fit has kept them: then nothing is read.
        truncation: keep the solved queries in low rank while they are used.
        log: takes the certificate of the truncation.
        precision: of the inner products; None: that of the rows.
        ids: the training examples that are read, in ascending order; None: all.
        parts: tell the scores apart by parts of the model; None: the model as a whole.
    """

    derivatives: Derivatives
    solved: Solved
    route: Route = Route.AUTO
    training_rows: Callable[[], Iterator[GradientBatch]] | None = None
    stored: Rows | None = None
    truncation: Truncation | None = None
    log: RunLog = field(default_factory=RunLog)
    precision: torch.dtype | None = None
    ids: Int[Tensor, " n"] | None = None
    parts: Parts | None = None

    def blocks(self) -> Iterator[tuple[Int[Tensor, " n"], Float[Tensor, "q n"]]]:
        """(training ids, scores of the group on them), in dataset order; all of them where all are stored."""
        n, constant = len(self.derivatives.problem), decay_term(self.derivatives, self.solved)
        for ids, values in self._products():
            yield ids, (values if constant is None else values + constant[:, None]) / n

    def part_blocks(self) -> Iterator[tuple[Int[Tensor, " n"], list[Float[Tensor, "q n"]]]]:
        """(training ids, scores of the group on them by part), in dataset order."""
        assert self.parts is not None
        n, parts = len(self.derivatives.problem), self.parts.values()
        whole, precision, known = self._whole(self.parts.divides_layers)
        solved = [part.of_solved(whole) for part in parts]
        constants = [decay_term(self.derivatives, own, part) for own, part in zip(solved, parts, strict=True)]
        for ids, rows in self._training_rows():
            pairs = zip(solved, parts, strict=True)
            values = [own.against(part.of(rows), self.route, precision) for own, part in pairs]
            if known is not None:
                _add_up_to(known[:, ids], values)
            yield ids, [(v if c is None else v + c[:, None]) / n for v, c in zip(values, constants, strict=True)]

    def _whole(self, written_out: bool) -> tuple[Solved, torch.dtype | None, Tensor | None]:
        """Solved queries to take parts of, the precision of their products, and the whole's where they are known.

        Parts of a dual solution are up to 1 / damping as large as the whole and cancel, so they are taken in float64.
        """
        solved = self.solved
        if not isinstance(solved, DualSolution):
            return (solved.rows() if written_out else solved), self.precision, None
        known = None if self.stored is None or self.training_rows is not None else solved.known(self.stored)
        # Written out once, not for every head.
        return (solved.rows(torch.float64) if written_out else solved.in_double()), torch.float64, known

    def _training_rows(self) -> Iterator[tuple[Tensor, Rows]]:
        """(training ids, the rows that stand for them)."""
        if self.stored is not None and self.training_rows is None:
            ids, rows = self._own_rows(self.stored)
            yield ids, self.stored if rows is None else rows
            return
        if self.training_rows is None:
            stream = self.derivatives.stream(ids=self.ids, label="scoring")
        else:
            stream = self.training_rows()
        for gradients in stream:
            yield gradients.ids, gradients.rows

    def _products(self) -> Iterator[tuple[Tensor, Tensor]]:
        if self.stored is not None and self.training_rows is None:
            ids, rows = self._own_rows(self.stored)
            if rows is None or not self.solved.written_out:
                # Of a dual solution the products with all of its own rows are at hand.
                yield ids, self.solved.against(self.stored)[:, current().share(len(self.stored))]
            else:
                yield ids, self.solved.against(rows)
        elif self._takes_forward_mode():
            yield from self._by_forward_mode()
        else:
            yield from self._by_rows()

    @staticmethod
    def _own_rows(stored: Rows) -> tuple[Tensor, Rows | None]:
        """The training ids and rows of this process's share, where every one holds all; None in place of all."""
        share = current().share(len(stored))
        ids = torch.arange(len(stored))[share]
        return ids, None if len(ids) == len(stored) else stored.take(share)

    def _by_rows(self) -> Iterator[tuple[Tensor, Tensor]]:
        n = len(self.derivatives.problem)
        truncated = None if self.truncation is None else self.truncation.of(self.solved.rows())
        solved = self.solved if truncated is None else truncated.rows
        if isinstance(solved, Rows):
            own = current().share(n if self.ids is None else len(self.ids))
            solved.expect(own.stop - own.start)
        for ids, rows in self._joined_rows(solved):
            if truncated is not None:
                self.log.add_truncation(truncated, truncated.bound(rows) / n)
            for piece in self._pieces(len(ids), solved):
                some, part = (ids, rows) if piece == slice(0, len(ids)) else (ids[piece], rows.take(piece))
                yield some, solved.against(part, self.route, self.precision)

    def _joined_rows(self, solved: Solved) -> Iterator[tuple[Tensor, Rows]]:
        """Training ids and rows, small batches joined: solved queries, the most memory, are read once for each.

        What is joined takes at most a share of what solved queries do.
        """
        room = solved.numbers * _JOINED_SHARE if isinstance(solved, Rows) else 0.0
        ids: list[Tensor] = []
        parts: list[Rows] = []
        for some, rows in self._training_rows():
            if ids and (sum(p.numbers for p in (*parts, rows)) > room or sum(map(len, (*ids, some))) > _JOINED):
                yield torch.cat(ids), Rows.joined(parts)
                ids, parts = [], []
            ids.append(some)
            parts.append(rows)
            del rows
        if ids:
            yield torch.cat(ids), Rows.joined(parts)

    @staticmethod
    def _pieces(count: int, solved: Solved) -> list[slice]:
        """Parts of a batch, so that its scores for many queries are no more than `SCORE_NUMBERS` at once.

        Queries that are read from disk are read once for a whole batch.
        """
        if solved.read_when_used:
            return [slice(0, count)]
        return chunks(count, solved.met, max(SCORE_NUMBERS, SCORE_ROWS * solved.met))

    def _takes_forward_mode(self) -> bool:
        d = self.derivatives
        if self.route is Route.FORWARD:
            if self.training_rows is not None:
                raise InvalidInput(
                    "route='forward' makes no rows, which this scaling needs; leave the route to 'auto'."
                )
            return True
        ruleless = bool(d.vmapped or d.looped) and d.projector is None
        # Forward mode follows whole directions: truncated ones would lose their certificate.
        rows_needed = self.training_rows is not None or self.truncation is not None or not self.solved.written_out
        return self.route is Route.AUTO and ruleless and len(self.solved) <= _FORWARD_QUERIES and not rows_needed

    def _by_forward_mode(self) -> Iterator[tuple[Tensor, Tensor]]:
        directions, products = self.solved.rows(), None
        for ids, batch in sweep(self.derivatives.problem, ids=self.ids, label="scoring (forward mode)"):
            products = products or Products.of(self.derivatives, batch, len(ids))
            yield ids, products.losses_along(ids, batch, directions).T


def decay_term(derivatives: Derivatives, solved: Solved, part: Part | None = None) -> Float[Tensor, " q"] | None:
    """<x, weight decay * theta> at the model's present weights: only where every example carries its own penalty.

    `part`: what of the model `solved` has; None: all.
    """
    decay, space = derivatives.problem.weight_decay, derivatives.space
    if not decay.per_example or decay.is_zero:
        return None
    values = {k: whole(v).detach()[None] for k, v in space.values(derivatives.problem.model).items()}
    own = space.from_parameters(values).scaled(space.decay)
    own = own.to(solved.dtype)
    return solved.inner(own if part is None else part.of(own))[:, 0]


def _add_up_to(whole: Float[Tensor, "q n"], parts: list[Float[Tensor, "q n"]]) -> None:
    """Change each part in proportion to its size, so that they add up.

    What is missing is what rounding has left of the Gram matrix, which is as far as parts were known.
    """
    missing = whole.clone()
    sizes = torch.zeros_like(whole)
    for part in parts:
        missing -= part
        sizes += part.abs()
    share = missing / sizes.clamp_min(torch.finfo(sizes.dtype).tiny)
    for part in parts:
        part += share * part.abs()


def self_influence_rows(derivatives: Derivatives, room: int) -> Iterator[tuple[Int[Tensor, " n"], Rows]]:
    """(training ids, loss gradients) in pieces of at most `room` rows: every example of our share is its own query."""
    for gradients in derivatives.stream(label="self-influence"):
        for part in torch.split(torch.arange(len(gradients.ids)), room):
            yield gradients.ids[part], gradients.rows.take(part)


def refuse_nonfinite(values: Tensor, query_ids: Tensor, ids: Tensor) -> None:
    """Nothing is ranked around a NaN: scores `[q, n]` of queries `at` on training examples `ids` must be finite."""
    # The sum is one cheap pass; a sum that is not finite may also be an overflow, hence the second check.
    if bool(torch.isfinite(values.sum())):
        return
    bad = (~torch.isfinite(values)).nonzero()
    if len(bad):
        queries, examples = (sorted(set(i.tolist())) for i in (query_ids[bad[:, 0].cpu()], ids[bad[:, 1].cpu()]))
        raise NonFinite(
            f"Scores of queries {name_ids(queries)} are NaN or infinite at training indices {name_ids(examples)}; look "
            "at these examples or raise the damping."
        )
