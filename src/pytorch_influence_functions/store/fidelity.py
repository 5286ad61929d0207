"""How true a random projection is, from two seeds on a sample: no exact product is needed."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Final, final

import torch
from jaxtyping import Float
from torch import Tensor

from ..core.distributed import World
from ..core.indexing import spread_sample
from ..gradients.per_example import Derivatives
from ..gradients.sketches import EIGENVECTORS, Sketch, TwoSided
from ..linalg.rows import Rows
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


def estimate_fidelity(
    representation: Representation, derivatives: Derivatives, rows: Sequence[Rows] = ()
) -> Fidelity | None:
    """What a random projection keeps; None for what is not random.

    Args:
        representation: what is kept of a gradient.
        derivatives: how gradients are taken, not projected.
        rows: gradients of some examples drawn at random; none: those of 256 are taken.
    """
    if not isinstance(representation, (Sketch, TwoSided)):
        return None
    if isinstance(representation, TwoSided) and representation.basis == EIGENVECTORS:
        return None
    if not rows:
        ids = spread_sample(len(derivatives.problem), _SAMPLED)
        batches = derivatives.stream(ids=ids, label="how true the projection is", world=World())
    seeds = (representation, replace(representation, seed=representation.seed + 1))
    projectors = [one.projector(derivatives.whole) for one in seeds]
    projected: list[list[Tensor]] = [[], []]
    for some in rows or (gradients.rows for gradients in batches):
        for projector, parts in zip(projectors, projected, strict=True):
            parts.append(projector.apply(some).flat().double().cpu())
    vectors = [torch.cat(parts)[:_SAMPLED] for parts in projected]
    if len(vectors[0]) < 3:
        return None
    pair = torch.stack([_cosines(v) for v in vectors])
    if not bool((pair.std(1) > 0).all()):
        return None
    k = representation.k if isinstance(representation, Sketch) else representation.k_in
    return Fidelity(min(1.0, float(torch.corrcoef(pair)[0, 1])), k, len(vectors[0]))


def _cosines(rows: Float[Tensor, "n k"]) -> Float[Tensor, " m"]:
    """Of every pair."""
    norms = rows.norm(dim=1, keepdim=True)
    rows = rows / torch.where(norms > 0, norms, torch.ones_like(norms))
    above = torch.triu_indices(len(rows), len(rows), 1)
    return (rows @ rows.T)[above[0], above[1]]
