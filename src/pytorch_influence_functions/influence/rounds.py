"""A question's way through the fitted checkpoints: solve, let the training data pass, add up."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ..core.errors import InvalidInput
from ..curvature.base import Budget
from ..linalg.rows import Route, Rows
from ..problem.checkpoints import at_checkpoint
from ..problem.problem import Problem
from ..scaling.base import AbstractScaling
from ..solvers.truncation import Truncation
from .agreement import Units
from .averaging import CheckpointAverage, split_queries
from .fitted_member import FittedMember
from .members import Members
from .parts import Parts
from .question import Question
from .run_log import RunLog
from .scoring import ScoringPass, Solved, TrainingStream

# What solved queries may take that are written out to be followed as directions.
_WRITTEN_BYTES = 1 << 29


@dataclass(frozen=True, eq=False)
class Rounds:
    """Scores of any question with the fitted checkpoints of one method.

    Args:
        problem: model, loss and training data.
        members: the fitted checkpoints.
        weights: what each checkpoint's scores are multiplied by before they are added up, as they are.
        units: in which units they are averaged.
        memory: what solved queries may take.
        scaling: what becomes of the raw scores.
        route: the way of the inner products.
        truncation: keep solved queries in low rank.
        precision: of the inner products; None: that of the rows.
    """

    problem: Problem
    members: Members
    weights: tuple[float, ...]
    units: Units
    memory: Budget
    scaling: AbstractScaling
    route: Route
    truncation: Truncation | None = None
    precision: torch.dtype | None = None

    def scored(self, question: Question) -> ScoringPass:
        """All scores of a question: averaged over the checkpoints in `units`, or summed with `weights`."""
        alone = len(self.members) == 1
        by_weights = self.units is Units.RAW or alone
        if (question.candidates is not None and by_weights) or alone:
            scoring = ScoringPass(self.problem, question)
            self._add_shares(scoring, list(self._even_factors(question)))
        else:
            scoring = ScoringPass(self.problem, question)
            # Spreads are over all training examples, so all are read, whichever are asked for.
            everything = ScoringPass(self.problem, replace(question, candidates=None), scoring.log)
            for part in split_queries(question, len(self.problem), self.memory):
                average = self.average(everything, part)
                scoring.add(part, torch.tensor(average.columns), average.result())
                scoring.log.agreement += average.agreement()
        scoring.log.end_checkpoints(self.weights)
        return scoring

    def scored_by_part(self, question: Question, parts: Parts) -> ScoringPass:
        """The same for every part of the model: parts add up to the whole.

        Raises:
            InvalidInput: the method makes no rows, or keeps queries in low rank.
        """
        if self.route is Route.FORWARD:
            raise InvalidInput(
                "by= takes inner products layer by layer, and route='forward' makes no rows to take them of; leave the "
                "route to 'auto'."
            )
        if self.truncation is not None:
            raise InvalidInput(
                f"truncation={self.truncation!r} certifies whole scores and not their parts; leave it or by= out."
            )
        # Where checkpoints are averaged in units of their spread, that of the whole is the unit of every part.
        factors = self.factors(ScoringPass(self.problem, replace(question, candidates=None)))
        scoring = ScoringPass(self.problem, question, parts=parts, whole=len(self.members) > 1)
        self._add_shares(scoring, factors)
        scoring.log.end_checkpoints(self.weights)
        return scoring

    def solved(
        self, scoring: ScoringPass, part: Tensor | None = None
    ) -> Iterator[tuple[int, FittedMember, Tensor, Solved]]:
        """(checkpoint, its member, query indices, solved queries) in groups that fit, at the checkpoint's weights."""
        # What takes solved queries whole, or part by part, cannot have them read from disk layer by layer.
        whole = self.truncation is not None or self.route is Route.FORWARD or scoring.parts is not None
        for k, member in enumerate(self.members):
            scoring.log.checkpoint = k
            with at_checkpoint(self.problem.model, member.checkpoint):
                for query_ids, solved in member.solved_groups(scoring, self.scaling, self.memory, part, whole):
                    yield k, member, query_ids, solved

    def directions(self, scoring: ScoringPass) -> Iterator[tuple[int, FittedMember, Tensor, Rows]]:
        """As `solved`, written out to be followed one by one: so many at a time that they take half a GiB.

        A solution of the dual holds no vector as long as the weights, and others may lie on the disk.
        """
        for k, member, query_ids, solved in self.solved(scoring):
            step = max(1, _WRITTEN_BYTES // (member.derivatives.space.size * member.number_bytes))
            for first in range(0, len(solved), step):
                piece = slice(first, first + step)
                yield k, member, query_ids[piece], solved.take(piece).rows()

    def average(self, scoring: ScoringPass, part: Int[Tensor, " q"]) -> CheckpointAverage:
        """All scores of a part of the queries, averaged over the checkpoints."""
        first, n = int(part[0]), len(self.problem)
        average = CheckpointAverage(self.units, self.weights, len(part), n)
        done = 0
        for k, member, query_ids, solved in self.solved(scoring, part):
            if k > done:
                average.end_checkpoint()
                done = k
            for ids, values in self._stream(member, solved, scoring.log).blocks():
                average.add(query_ids - first, ids, values)
        average.end_checkpoint()
        return average

    def factors(self, scoring: ScoringPass) -> list[Float[Tensor, " q"]]:
        """For every checkpoint, what each query's scores are multiplied by before they are added up."""
        if self.units is Units.RAW or len(self.members) == 1:
            return list(self._even_factors(scoring.question))
        return list(self.average(scoring, torch.arange(len(scoring.question))).factors())

    def _even_factors(self, question: Question) -> Iterator[Tensor]:
        for weight in self.weights:
            yield torch.full((len(question),), weight, dtype=torch.float64)

    def _add_shares(self, scoring: ScoringPass, factors: list[Tensor]) -> None:
        """Add every checkpoint's blocks, times its factors; every process those of its share of the data."""
        candidates = scoring.question.candidates
        ids = None if candidates is None else candidates.union
        for k, member, query_ids, solved in self.solved(scoring):
            factor = factors[k][query_ids]
            stream = self._stream(member, solved, scoring.log, ids, scoring.parts)
            if scoring.parts is None:
                for some, values in stream.blocks():
                    scoring.add(query_ids, some, _times(values, factor))
            else:
                scoring.double |= not solved.written_out
                for some, by_part in stream.part_blocks():
                    for part, values in enumerate(by_part):
                        scoring.add(query_ids, some, _times(values, factor), part)

    def _stream(
        self,
        member: FittedMember,
        solved: Solved,
        log: RunLog,
        ids: Int[Tensor, " n"] | None = None,
        parts: Parts | None = None,
    ) -> TrainingStream:
        scaling = self.scaling
        return TrainingStream(
            member.derivatives,
            solved,
            self.route,
            None if scaling.first_order else lambda: member.training_rows(scaling, ids),
            member.stored,
            self.truncation,
            log,
            self.precision,
            ids,
            parts,
        )


def _times(values: Float[Tensor, "q n"], factor: Float[Tensor, " q"]) -> Tensor:
    """Every row times its number; as it is where that is 1."""
    if bool((factor == 1).all()):
        return values
    return values.double().cpu() * factor[:, None]
