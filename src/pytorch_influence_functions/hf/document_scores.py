"""Scores of texts that were trained on in blocks: every block's score is shared out over the texts in it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from ..core.errors import InvalidInput
from ..influence.attribution import Attribution
from ..scores.scores import Scores
from .packing import Blocks


def document_scores(attribution: Attribution, queries: Any, measure: Any = None) -> Scores:
    """What removing each text from its blocks would change, where training packed texts into blocks.

    A block's loss is a sum over tokens, so its score is too: a text has the scores of its own tokens, in whichever
    blocks they are. The context of its neighbours stays as it was. One forward-mode pass per query and block.

    Args:
        attribution: fitted to `ptif.hf.problem(..., packing=length)`.
        queries: as for `attribution.score`.
        measure: as for `attribution.score`.

    Returns:
        `Scores` [queries, texts]: index i is text i of the dataset. Values are in units of `attribution.score`.

    Raises:
        InvalidInput: the training data are no blocks of texts.
    """
    blocks = attribution.problem.data.dataset
    if not isinstance(blocks, Blocks) or blocks.texts is None:
        raise InvalidInput(
            "document_scores() shares out blocks of packed texts, and the training data are none; make the problem "
            "with ptif.hf.problem(..., packing=length), or use attribution.score(queries)."
        )
    shares = attribution.token_scores(queries, range(len(blocks)), measure)
    total = sum((blocks.sums(b, values) for b, values in shares.items()), torch.zeros(()))
    whole = attribution.score(queries, measure, top=1)
    return Scores(
        total,
        lower_is_better=whole.lower_is_better,
        query_ids=whole.query_ids,
        query_labels=whole.query_labels,
        train_names=[blocks.texts.name(i) for i in range(len(blocks.texts))],
        diagnostics=replace(
            whole.diagnostics, notes=(*whole.diagnostics.notes, f"shared out from {len(blocks):,} blocks by tokens")
        ),
        provenance=whole.provenance,
    )
