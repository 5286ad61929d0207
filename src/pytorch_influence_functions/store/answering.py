"""One question on its way through an index: solved queries meet stored rows, as a whole or part by part."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, final

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ..core.distributed import current
from ..core.errors import InvalidInput, TooLarge
from ..curvature.base import Budget
from ..gradients.per_example import Derivatives
from ..influence.candidates import Candidates
from ..influence.parts import Parts
from ..influence.question import Question
from ..influence.scoring import ScoringPass
from ..linalg.eigenbasis import Eigenbasis
from ..scores.diagnostics import Diagnostics
from ..scores.parts import PartScores
from ..scores.scores import Scores
from .describe import labels_of_index
from .graph import Shortlist
from .manifest import Manifest
from .search import Ranking, StoredRows


def parts_of(by: Any, manifest: Manifest, derivatives: Derivatives) -> Parts:
    """Read `by=` for what an index keeps.

    Args:
        by: as for `Attribution.score`.
        manifest: of the index.
        derivatives: how the gradients of queries are taken and projected.

    Raises:
        InvalidInput: the layers are mixed in what is kept, or `by` is none of what can be read.
    """
    if set(derivatives.whole.blocks) != set(derivatives.space.blocks):
        raise InvalidInput(
            f"by={by!r} tells layers apart, and {manifest.facts['described']} mixes all of them in every number "
            "that is kept; build an index with Factors(), TwoSided(k_in) or Sketch(k, per_layer=True)."
        )
    parts = Parts.of(by, derivatives)
    if parts.divides_layers:
        raise InvalidInput(
            f"by={by!r} divides layers, and an index keeps them whole, often projected; use by='layer' or patterns of "
            "names, or score() of the live method."
        )
    return parts


@final
@dataclass(frozen=True, eq=False)
class Search:
    """What is asked of an index.

    Args:
        question: the queries, and how many extremes of each are kept.
        stored: the rows that count.
        own: candidates of every query's own; None: whatever counts.
        parts: of the model, by which scores are told apart; None: the model as a whole.
        inverse: 1 / (eigenvalue + damping) of every coordinate.
        normalised: divide by the size of every example.
        budget: what scores and solved queries may take.
        shortlist: of which rows are looked at; None: all that count.
    """

    question: Question
    stored: StoredRows
    own: Candidates | None
    parts: Parts | None
    inverse: Float[Tensor, " k"]
    normalised: bool
    budget: Budget
    shortlist: Shortlist | None = None

    def check_memory(self) -> None:
        """Refuse to hold all scores where they do not fit.

        Raises:
            TooLarge: they do not.
        """
        columns = int(self.stored.mask.sum()) if self.own is None else self.own.width
        queries, top, parts = len(self.question), self.question.top, 1 if self.parts is None else len(self.parts)
        wanted = parts * (8 * queries * columns if top is None else 24 * queries * min(top, columns))
        if wanted > self.budget.bytes:
            told = "" if self.parts is None else f"{parts} parts x "
            raise TooLarge(
                f"{told}{queries:,} queries x {columns:,} scores would take {wanted / 1e9:.3g} GB and the bound is "
                f"{self.budget.bytes / 1e9:.3g} GB; ask for fewer with top=, ask in parts, or raise memory=."
            )

    def scores(
        self, derivatives: Derivatives, basis: Eigenbasis, record: Diagnostics, told: Mapping[str, Any]
    ) -> Scores | PartScores:
        """The result, of every part of the model or of the whole.

        Args:
            derivatives: how the gradients of queries are taken and projected.
            basis: where a damped solve is a division.
            record: how the scores come about.
            told: what else `Scores` are to know of the training examples.
        """
        results = self._results(derivatives, basis)
        dtype = derivatives.whole.like(derivatives.problem.model).dtype
        kind = torch.float64 if dtype == torch.float64 else torch.float32
        if self.parts is not None:
            note = f"told apart by {len(self.parts)} parts of the model, which add up to the whole"
            record = replace(record, notes=(note, *record.notes))
        if self.shortlist is not None and self.question.top is not None:
            note = self.shortlist.note(results[0][0] * len(self.stored.mask), self.question.top, current())
            record = replace(record, notes=(*record.notes, note))
        # Only now: a file that is damaged is told of by the search, which needs it.
        told = {**told, "train_labels": labels_of_index(self.stored.folder)}
        each = [self._scores(values.to(kind), indices, record, told) for values, indices in results]
        return each[0] if self.parts is None else PartScores(dict(zip(self.parts, each, strict=True)))

    def _scores(self, values: Tensor, indices: Tensor, record: Diagnostics, told: Mapping[str, Any]) -> Scores:
        question, mask = self.question, self.stored.mask
        everyone = question.top is None and self.own is None and bool(mask.all())
        scores = Scores(
            values,
            lower_is_better=question.lower_is_better,
            n_train=len(mask),
            indices=None if everyone else indices,
            query_labels=question.query_labels(),
            query_names=question.names,
            query_ids=question.query_ids,
            query_source=question.shown,
            diagnostics=record,
            **told,
        )
        return scores if question.top is None or self.own is None else scores.top(question.top)

    def _results(
        self, derivatives: Derivatives, basis: Eigenbasis
    ) -> list[tuple[Float[Tensor, "q m"], Int[Tensor, "q m"]]]:
        """Scores and the examples behind them, for every part of the model, or for the whole."""
        count, layout = 1 if self.parts is None else len(self.parts), self.stored.layout
        mask, n = self.stored.mask, len(self.stored.mask)
        rankings = [Ranking(len(self.question), mask, self.question.top, self.own) for _ in range(count)]
        norm = self.inverse if self.normalised else None
        scoring = ScoringPass(derivatives.problem, self.question)
        # A query's coordinates are held in float64, solved, and made ready, for every part.
        room = max(1, int(self.budget.bytes / 4 / (8 * (2 + count) * basis.size)))
        for query_ids, rows in scoring.query_groups(derivatives, room):
            solved = basis.coordinates(rows).double().cpu() * self.inverse
            if self.parts is None:
                ready = [layout.ready(solved)]
            else:
                ready = layout.ready_by_part(solved, [part.blocks for part in self.parts.values()])
            stored = self.stored if self.shortlist is None else self.shortlist.of(query_ids, solved, self.stored)
            del rows, solved
            for train_ids, values in stored.scores(ready, len(query_ids), norm):
                if self.shortlist is not None:
                    train_ids, values[0] = self.shortlist.without_audited(query_ids, train_ids, values[0])
                for ranking, some in zip(rankings, values, strict=True):
                    ranking.add(query_ids, train_ids, some / n)
        return [ranking.everyones(current()).result() for ranking in rankings]
