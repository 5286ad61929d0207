"""How true a random projection is, from two seeds on a sample: no exact product is needed."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Final, final

import torch
from torch import Tensor

from ..core.distributed import World
from ..core.indexing import spread_sample
from ..gradients.per_example import Derivatives
from ..gradients.sketches import EIGENVECTORS, Sketch, TwoSided
from .representation import Representation

_SAMPLED: Final = 256
_WANTED: Final = 0.95


@final
@dataclass(frozen=True)
class Fidelity:
    """What two projections that differ only in their seed tell of each.

    The noise of one is independent of that of the other, so they agree by the square of what each agrees with the
    truth: `expected = sqrt(agreement)`. The noise falls as 1 / k, hence `needed`.

    Args:
        agreement: correlation of the cosines of pairs of sampled gradients under the two seeds.
        k: numbers of the sketch, or of each side.
        examples: how many were sampled.
    """

    agreement: float
    k: int
    examples: int

    @property
    def expected(self) -> float:
        """The expected correlation with the cosines of the gradients themselves."""
        return math.sqrt(max(0.0, self.agreement))

    @property
    def needed(self) -> int:
        """The k at which that is .95; 0 where the two seeds have nothing in common."""
        if self.agreement <= 0:
            return 0
        return math.ceil(self.k * (1 / self.agreement - 1) / (1 / _WANTED**2 - 1))

    def __str__(self) -> str:
        needed = f"{_WANTED:g} needs k = {self.needed:,}" if self.needed else "a far larger k is needed"
        more = f"; {needed}" if self.expected < _WANTED else ""
        return (
            f"two seeds agree by {self.agreement:.2f} on {self.examples:,} gradients, so the projection keeps their "
            f"cosines by {self.expected:.2f} (correlation){more}"
        )


def estimate_fidelity(representation: Representation, derivatives: Derivatives) -> Fidelity | None:
    """What a random projection keeps; None for what is not random.

    Args:
        representation: what is kept of a gradient.
        derivatives: how gradients are taken, not projected.

    Cost: two passes over 256 examples.
    """
    if not isinstance(representation, (Sketch, TwoSided)):
        return None
    if isinstance(representation, TwoSided) and representation.basis == EIGENVECTORS:
        return None
    ids = spread_sample(len(derivatives.problem), _SAMPLED)
    if len(ids) < 3:
        return None
    seeds = (representation, replace(representation, seed=representation.seed + 1))
    pair = torch.stack([_cosines(derivatives, one, ids) for one in seeds])
    if not bool((pair.std(1) > 0).all()):
        return None
    k = representation.k if isinstance(representation, Sketch) else representation.k_in
    return Fidelity(min(1.0, float(torch.corrcoef(pair)[0, 1])), k, len(ids))


def _cosines(derivatives: Derivatives, representation: Sketch | TwoSided, ids: Tensor) -> Tensor:
    projected = replace(derivatives, projector=representation.projector(derivatives.whole))
    batches = projected.stream(ids=ids, label="how true the projection is", world=World())
    rows = torch.cat([gradients.rows.flat().double().cpu() for gradients in batches])
    norms = rows.norm(dim=1, keepdim=True)
    rows = rows / torch.where(norms > 0, norms, torch.ones_like(norms))
    above = torch.triu_indices(len(rows), len(rows), 1)
    return (rows @ rows.T)[above[0], above[1]]
