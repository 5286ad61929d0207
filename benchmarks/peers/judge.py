"""How good scores are: agreement with the exact answer, and with retraining.

numpy only, so that the process that starts all others stays small.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

RESAMPLES = 100


def ranks(values: np.ndarray) -> np.ndarray:
    """Along the last axis, from 0; equal values share their mean rank."""

    def one(row: np.ndarray) -> np.ndarray:
        _, inverse, counts = np.unique(row, return_inverse=True, return_counts=True)
        return (np.cumsum(counts) - (counts + 1) / 2)[inverse]

    return np.apply_along_axis(one, -1, np.asarray(values, dtype=np.float64))


def spearman(a: np.ndarray, b: np.ndarray) -> float:
    """Rank correlation along the last axis, averaged over rows; a row without any variation counts as 0."""
    p, q = (r - r.mean(-1, keepdims=True) for r in (ranks(a), ranks(b)))
    size = np.sqrt((p * p).sum(-1) * (q * q).sum(-1))
    return float(np.mean((p * q).sum(-1) / np.where(size > 0, size, 1)))


@dataclass(frozen=True)
class Retraining:
    """Losses after training on halves: kept [S, N], losses [seeds, S, Q]."""

    kept: np.ndarray
    losses: np.ndarray

    @staticmethod
    def read(path: str | Path) -> Retraining:
        with np.load(path) as file:
            return Retraining(file["kept"], file["losses"])

    def score(self, scores: np.ndarray) -> tuple[float, float, float]:
        """Linear datamodelling score, with the middle 95 % over resampled subsets.

        A score says by how much removal raises the query's loss, so the predicted loss is minus the sum of kept ones.
        """
        predicted = -(np.asarray(scores, dtype=np.float64) @ self.kept.T.astype(np.float64))
        measured = self.losses.mean(0).T
        generator = np.random.default_rng(0)
        draws = (generator.integers(0, len(self.kept), len(self.kept)) for _ in range(RESAMPLES))
        found = [spearman(predicted[:, d], measured[:, d]) for d in draws]
        low, high = np.quantile(found, (0.025, 0.975))
        return spearman(predicted, measured), float(low), float(high)

    def ceiling(self) -> float | None:
        """What perfect predictions of the expected loss would reach, from the agreement of seeds; None for one seed."""
        seeds = len(self.losses)
        if seeds < 2:
            return None
        pairs = [(i, j) for i in range(seeds) for j in range(i)]
        one = float(np.mean([spearman(self.losses[i].T, self.losses[j].T) for i, j in pairs]))
        return float(np.sqrt(max(seeds * one / (1 + (seeds - 1) * one), 0.0)))
