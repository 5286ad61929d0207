"""Solved queries in low rank, with a bound on what that costs every score."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

import torch
from jaxtyping import Float
from torch import Tensor

from ..core.errors import InvalidInput
from ..core.records import Record
from ..core.validate import finite_number, whole_number
from ..linalg.blocks import AbstractBlock, Dense, Outer, matrix_shape
from ..linalg.chunks import chunks
from ..linalg.rows import Rows
from ..linalg.turned import Turned


@final
@dataclass(frozen=True, repr=False)
class Truncation(Record):
    r"""Keep a solved query's matrix per layer as a sum of few outer products: V ~ sum_r u_r v_r^T.

    Scoring then costs r (o + i) per term and pair instead of o i, which pays for large layers read once per example
    (heads, perceptrons, tables); elsewhere the inner product's route writes the matrix out again and nothing is gained.
    What is left out is known exactly, and so is what it can do to a score:

        |error of score[q, i]| <= (1/N) sum over layers |V_q - V_q,r|_F |grad loss(i)|_F

    The largest such bound over all pairs is part of the diagnostics, beside the largest score.

    Args:
        tolerance: the largest |V - V_r|_F / |V|_F allowed in any layer; the rank follows, per layer.
        rank: keep exactly so many, whatever is lost.

    Reference: Grosse et al. (2023), section 3.2.2, who keep rank 32 and report a correlation; here it is a certificate.

    >>> Truncation(tolerance=0.01)
    Truncation(tolerance=0.01)
    """

    tolerance: float | None = None
    rank: int | None = None

    def __post_init__(self) -> None:
        if (self.tolerance is None) == (self.rank is None):
            raise InvalidInput(
                f"Truncation(tolerance={self.tolerance}, rank={self.rank}) needs one of the two: a tolerance such as "
                "0.01, or a rank such as 32."
            )
        if self.tolerance is not None:
            finite_number("tolerance", self.tolerance, above=0, below=1, owner=self)
        if self.rank is not None:
            whole_number("rank", self.rank, owner=self)

    def of(self, rows: Rows) -> Truncated:
        """The `rows` in low rank, and what each layer of each row lost."""
        truncated_blocks = {name: self._block(block) for name, block in rows.blocks.items()}
        kept = Rows({name: block for name, (block, _) in truncated_blocks.items()})
        return Truncated(kept, {name: lost for name, (_, lost) in truncated_blocks.items()})

    def _block(self, block: AbstractBlock) -> tuple[AbstractBlock, Float[Tensor, " n"]]:
        nothing = torch.zeros(len(block), dtype=torch.float64, device=block.reference.device)
        if isinstance(block, Turned):
            block = Dense(block.dense())
        if not isinstance(block, Dense) or len(block.shape) < 2 or min(matrix_shape(block.shape)) < 2:
            return block, nothing
        o, i = matrix_shape(block.shape)
        matrices = block.values.reshape(-1, o, i)
        parts = [torch.linalg.svd(matrices[chunk], full_matrices=False) for chunk in chunks(len(block), o * i)]
        u, s, v = (torch.cat([p[k] for p in parts]) for k in range(3))
        lost = s.double().square().flip(1).cumsum(1).flip(1)  # lost[:, r]: what ranks above r hold
        rank = self._rank(lost)
        if rank >= s.shape[1] or rank * (o + i) >= o * i:
            return block, nothing
        outer = Outer((u[:, :, :rank] * s[:, None, :rank]).mT.contiguous(), v[:, :rank].contiguous())
        return outer, lost[:, rank].sqrt()

    def _rank(self, lost: Float[Tensor, "n r"]) -> int:
        """One rank for all rows of a layer, so that they stay one block."""
        if self.tolerance is None:
            assert self.rank is not None
            return self.rank
        good = lost <= self.tolerance**2 * lost[:, :1]
        within = good.all(0).nonzero()
        return max(1, int(within[0])) if len(within) else lost.shape[1]


@dataclass(frozen=True, eq=False)
class Truncated:
    """Rows in low rank; `lost[block]` [n] is |V - V_r|_F of every row, float64."""

    rows: Rows
    lost: dict[str, Tensor]

    def bound(self, training: Rows) -> Float[Tensor, "q n"]:
        """sum over layers |V_q - V_q,r|_F |G_i|_F: how far <V_q, G_i> can be off, for every pair."""
        total = torch.zeros(len(self.rows), len(training), dtype=torch.float64, device=training.device)
        for name, lost in self.lost.items():
            if bool((lost > 0).any()):
                total += lost[:, None] * training.blocks[name].squared_norms().double().sqrt()[None]
        return total

    @property
    def ranks(self) -> dict[str, int]:
        """The rank kept in every layer that was truncated."""
        return {k: b.terms for k, b in self.rows.blocks.items() if isinstance(b, Outer)}
