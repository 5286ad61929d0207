"""What was not looked at: some of it drawn at random, and what its scores say of all the rest."""

from __future__ import annotations

import math
import random
from dataclasses import dataclass
from typing import Final, final

import torch
from jaxtyping import Float, Int
from torch import Tensor

_SEED: Final = 0
# The chance that a bound is wrong.
_RISK: Final = 0.05


@final
@dataclass(frozen=True, eq=False)
class Recall:
    """What a first stage missed, as far as a random sample of the other examples tells.

    Args:
        looked_at: what was scored, in words.
        audited: examples drawn at random from all others, with the same scores.
        trials: how many scores these have, over all queries.
        better: how many of them would have entered a query's top k at either end.
        others: examples that were neither.
    """

    looked_at: str
    audited: int
    trials: int
    better: int
    others: int

    @property
    def bound(self) -> float:
        """The share of the other examples that would have entered is below this, with 95 % confidence."""
        return clopper_pearson(self.better, self.trials, _RISK)

    def __str__(self) -> str:
        if not self.others and not self.audited:
            return f"{self.looked_at}, which are all examples that count"
        if not self.others:
            return (
                f"{self.looked_at}; of all {self.audited:,} other examples {self.better:,} of {self.trials:,} scores "
                "would have entered a top list"
            )
        return (
            f"{self.looked_at}; of {self.audited:,} other examples drawn at random {self.better:,} of {self.trials:,} "
            f"scores would have entered a top list, so at most {self.bound:.2g} of the {self.others:,} that were not "
            "looked at, with 95 % confidence"
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
    places = random.Random(_SEED).sample(range(len(others)), min(audit, len(others)))
    return others[torch.tensor(sorted(places), dtype=torch.long)]


def count_entering(values: Float[Tensor, "q m"], audited: Float[Tensor, "q a"], top: int) -> int:
    """How many audited scores lie beyond the last of a query's top list, at either end.

    Args:
        values: the scores of every query's lists.
        audited: of examples that are in none.
        top: how many an end has.
    """
    highest, lowest = ends_of(values, top)
    return int(((audited > highest[:, None]) | (audited < lowest[:, None])).sum())


def ends_of(values: Float[Tensor, "q m"], top: int) -> tuple[Float[Tensor, " q"], Float[Tensor, " q"]]:
    """The last score of the most helpful and of the most harmful of every query."""
    sorted_values = values.double().sort(1, descending=True).values
    k = min(top, sorted_values.shape[1])
    return sorted_values[:, k - 1], sorted_values[:, -k]
