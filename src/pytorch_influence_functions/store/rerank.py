"""Two stages: candidates from the index, exact scores for them by the live engine, and what the first stage missed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from ..core.errors import InvalidInput
from ..core.validate import whole_number
from ..influence.attribution import Attribution
from ..influence.candidates import lists_of
from ..scores.scores import Scores
from .asking import Asker
from .audit import Recall, count_entering, draw_audit
from .manifest import Manifest


def check_rerank(candidates: int, top: int | None, audit: int, ids: Any, by: Any, normalised: bool) -> None:
    """Refuse what exact scores of candidates cannot be given with; the arguments are those of `Index.score`.

    Raises:
        InvalidInput: they cannot.
    """
    if lists_of(ids) is not None:
        raise InvalidInput(
            "rerank= finds candidates, and ids= names them for every query; leave rerank= out, or have the "
            "live method compute them: ptif.ekfac().fit(problem).score(queries, ids=ids)."
        )
    if by is not None:
        raise InvalidInput(
            "by= tells the index's own scores apart, and rerank= replaces them by exact ones; leave one out, "
            "or have the live method tell them apart: ptif.ekfac().fit(problem).score(queries, ids=ids, by=by)."
        )
    whole_number("rerank", candidates, top or 1, hint="it is how many candidates are taken for the top= that is kept")
    whole_number("audit", audit, 0)
    if top is None or normalised:
        what = "normalised=True" if normalised else "no top="
        raise InvalidInput(
            f"rerank= gives exact scores to the ends of a ranking, and {what} was asked for; write top=10, "
            f"rerank={candidates} without normalised=."
        )


def exact_method(asker: Asker, manifest: Manifest, method: Any, damping: Any) -> Attribution:
    """The method that computes exact scores, fitted once.

    Args:
        asker: how gradients of queries are taken.
        manifest: of the index.
        method: as for `Index.score`.
        damping: as for `Index.score`.

    Raises:
        InvalidInput: the training data are not at hand, or the method is not known.
    """
    if len(manifest.parts) > 1:
        raise InvalidInput(
            "rerank= reads examples from the training data by their place, and this index has appended ones; build "
            "an index of all data, or leave rerank= out."
        )
    return asker.attribution(method, damping, manifest.fingerprint, manifest.examples)


def rerank(
    first: Scores, exact_scores: Callable[[Int[Tensor, " n"]], Scores], mask: Tensor, top: int, audit: int
) -> Scores:
    """Exact scores of the candidates that the index named, the best of them, and what was missed.

    Args:
        first: the index's scores, with more examples than are asked for at each end.
        exact_scores: gives the exact scores of all queries on some examples.
        mask: which examples count.
        top: how many are asked for at each end.
        audit: how many others are looked at.
    """
    assert first.indices is not None
    candidates = torch.tensor(sorted(set(first.indices.flatten().tolist())))
    others = draw_audit(mask, candidates, audit)
    ids = torch.cat([candidates, others]).sort().values
    computed = exact_scores(ids)
    values = computed.values.gather(1, torch.searchsorted(ids, first.indices))
    exact = replace(first, values=values).top(top)
    better = count_entering(exact.values, computed.values[:, torch.searchsorted(ids, others)], top)
    looked_at = f"exact scores for {len(candidates):,} candidates of the index"
    left = int(mask.sum()) - len(ids)
    recall = Recall(looked_at, len(others), len(others) * len(first), better, left)
    index_notes = tuple(note for note in first.diagnostics.notes if note not in computed.diagnostics.notes)
    notes = (*computed.diagnostics.notes, *index_notes, str(recall))
    seconds = first.diagnostics.seconds + computed.diagnostics.seconds
    diagnostics = replace(computed.diagnostics, notes=notes, seconds=seconds)
    return replace(exact, diagnostics=diagnostics, provenance=computed.provenance)
