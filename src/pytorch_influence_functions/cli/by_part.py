"""Scores of the whole model or of its parts (`--by`), written and told alike."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Final

import torch

from ..scores.diagnostics import Diagnostics
from ..scores.parts import PartScores
from ..scores.scores import Scores
from .blocks import join_blocks

WHOLE: Final = ""
"""The name of the whole model where there are no parts."""
SCORES: Final = "scores.safetensors"
PARTS: Final = "parts.safetensors"
_LISTED: Final = 5


def by_part(scores: Scores | PartScores) -> Mapping[str, Scores]:
    """The scores by the name of the part."""
    return scores.scores if isinstance(scores, PartScores) else {WHOLE: scores}


def like(parts: Mapping[str, Scores]) -> Scores | PartScores:
    """What `by_part` took apart."""
    return parts[WHOLE] if WHOLE in parts else PartScores(parts)


def file_of(scores: Scores | PartScores) -> str:
    """The name of the file they are written to."""
    return PARTS if isinstance(scores, PartScores) else SCORES


def read_by(scores: Scores | PartScores) -> str:
    """What reads that file."""
    return f"ptif.{type(scores).__name__}.load reads it"


def with_query_ids(
    scores: Scores | PartScores, ids: Sequence[int], diagnostics: Diagnostics | None = None
) -> Scores | PartScores:
    """The scores, whose rows are these queries, with these diagnostics in place of their own."""
    positions, told = torch.tensor(list(ids)), diagnostics or scores.diagnostics
    return like({k: replace(s, query_ids=positions, diagnostics=told) for k, s in by_part(scores).items()})


def with_data(scores: Scores | PartScores, train: Any, queries: Any) -> Scores | PartScores:
    """The scores with the data they are about, for pictures."""
    return like({k: replace(s, train_source=train, query_source=queries) for k, s in by_part(scores).items()})


def joined(blocks: Sequence[Scores | PartScores]) -> Scores | PartScores:
    """The scores of several blocks of queries, in the order given."""
    several = [by_part(block) for block in blocks]
    return like({name: join_blocks([block[name] for block in several]) for name in several[0]})


def influences_of(scores: Scores | PartScores, labels: bool) -> dict[str, Any]:
    """For `--json`: the most helpful and harmful examples of every query, of the whole or of every part.

    Args:
        scores: of them.
        labels: whether the label of the query is told.
    """
    told = {name: _influences(part, labels) for name, part in by_part(scores).items()}
    return {"influences": told[WHOLE]} if WHOLE in told else {"parts": told}


def _influences(scores: Scores, labels: bool) -> list[dict[str, Any]]:
    return [
        {"query": int(q)}
        | ({"label": scores.query_labels[row] if isinstance(scores.query_labels, list) else None} if labels else {})
        | {"helpful": scores.helpful(row, _LISTED), "harmful": scores.harmful(row, _LISTED)}
        for row, q in enumerate(scores.query_ids.tolist())
    ]
