"""Two stages: candidates from the index, exact scores for them by the live engine, and what the first stage missed."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Final, final

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ..scores.scores import Scores

_SEED: Final = 0
# The chance that a bound is wrong.
_RISK: Final = 0.05


@final
@dataclass(frozen=True, eq=False)
class Recall:
    """What the first stage missed, as far as a random sample of the other examples tells.

    Args:
        candidates: examples whose exact scores were computed because the index named them.
        audited: examples drawn at random from all others, with exact scores.
        better: how many of these would have entered a query's top k at either end, over all queries.
        queries: how many queries there were.
        others: examples that were neither.
    """

    candidates: int
    audited: int
    better: int
    queries: int
    others: int

    @property
    def bound(self) -> float:
        """The share of the other examples that would have entered is below this, with 95 % confidence."""
        return clopper_pearson(self.better, self.audited * self.queries, _RISK)

    def __str__(self) -> str:
        return (
            f"exact scores for {self.candidates:,} candidates of the index; of {self.audited:,} other examples drawn "
            f"at random {self.better:,} of {self.audited * self.queries:,} scores would have entered a top list, so at "
            f"most {self.bound:.2g} of the {self.others:,} that were not looked at, with 95 % confidence"
        )


def clopper_pearson(successes: int, trials: int, risk: float = _RISK) -> float:
    """The upper end of the exact one-sided confidence interval of a share; 1 where nothing was tried.

    Args:
        successes: how many there were.
        trials: out of how many.
        risk: the chance that the share is above.

    Reference: Clopper & Pearson (1934).

    >>> round(clopper_pearson(0, 100), 4), round(clopper_pearson(3, 100), 3), clopper_pearson(5, 5)
    (0.0295, 0.076, 1.0)
    """
    if successes >= trials:
        return 1.0
    low, high = successes / trials, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        # P(at most so many successes) falls as the share rises.
        low, high = (middle, high) if _at_most(successes, trials, middle) > risk else (low, middle)
    return high


def _at_most(successes: int, trials: int, share: float) -> float:
    log_share, log_rest = math.log(share), math.log1p(-share)
    total = 0.0
    for k in range(successes + 1):
        ways = math.lgamma(trials + 1) - math.lgamma(k + 1) - math.lgamma(trials - k + 1)
        total += math.exp(ways + k * log_share + (trials - k) * log_rest)
    return total


def draw_audit(mask: Tensor, candidates: Int[Tensor, " c"], audit: int) -> Int[Tensor, " a"]:
    """Examples at random among those that count and are no candidates, the same ones every time."""
    free = mask.clone()
    free[candidates] = False
    others = free.nonzero().flatten()
    order = torch.randperm(len(others), generator=torch.Generator().manual_seed(_SEED))
    return others[order[:audit]].sort().values


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
    better = _entering(exact, computed.values[:, torch.searchsorted(ids, others)], top)
    recall = Recall(len(candidates), len(others), better, len(first), int(mask.sum()) - len(ids))
    index_notes = tuple(note for note in first.diagnostics.notes if note not in computed.diagnostics.notes)
    notes = (*computed.diagnostics.notes, *index_notes, str(recall))
    seconds = first.diagnostics.seconds + computed.diagnostics.seconds
    diagnostics = replace(computed.diagnostics, notes=notes, seconds=seconds)
    return replace(exact, diagnostics=diagnostics, provenance=computed.provenance)


def _entering(exact: Scores, audited: Float[Tensor, "q a"], top: int) -> int:
    """How many audited scores lie beyond the last of a query's top list, at either end."""
    sorted_values = exact.values.double().sort(1, descending=True).values
    k = min(top, sorted_values.shape[1])
    highest, lowest = sorted_values[:, k - 1 : k], sorted_values[:, -k][:, None]
    return int(((audited > highest) | (audited < lowest)).sum())
