"""The density of a spectrum: eigenvalues, and how many there are of each."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import final

import torch
from jaxtyping import Float
from torch import Tensor


@final
@dataclass(frozen=True, eq=False)
class Density:
    """Eigenvalues with how many there are of each: `sum(f)` is trace f(C), exactly or by quadrature.

    Each row of `values` [r, k] and `weights` [r, k] is one estimate (one probe; r = 1 where exact), its weights summing
    to P. Both are float64.
    """

    values: Float[Tensor, "r k"]
    weights: Float[Tensor, "r k"]
    exact: bool

    @staticmethod
    def of(values: Float[Tensor, " k"], counts: Float[Tensor, " k"] | None = None, zeros: int = 0) -> Density:
        """The exact density: every eigenvalue once, or as often as `counts` says, and so many zeros beside them."""
        values = values.double().cpu()
        counts = torch.ones_like(values) if counts is None else counts.double().cpu()
        if zeros:
            values, counts = torch.cat([values, values.new_zeros(1)]), torch.cat([counts, counts.new_tensor([zeros])])
        return Density(values[None], counts[None], exact=True)

    def sum(self, f: Callable[[Tensor], Tensor]) -> tuple[float, float]:
        """trace f(C), and the standard error of that estimate: 0 where exact."""
        estimates = (f(self.values) * self.weights).sum(1)
        error = 0.0 if self.exact else float(estimates.std()) / len(estimates) ** 0.5
        return float(estimates.mean()), error

    @property
    def extremes(self) -> tuple[float, float]:
        """The smallest and the largest eigenvalue; where not exact, the true ones lie further out."""
        present = self.values[self.weights > 0]
        return float(present.min()), float(present.max())
