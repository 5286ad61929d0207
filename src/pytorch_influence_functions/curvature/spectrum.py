"""What the curvature looks like, and what damping leaves of the queries: read it before trusting a lambda."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import final

import torch
from jaxtyping import Float
from torch import Tensor

from ..core.notebook import Printable
from ..core.validate import whole_number
from ..linalg.density import Density
from ..linalg.lanczos import estimate_density
from ..linalg.operator import AbstractSymmetric
from ..linalg.shift import Shift


@final
@dataclass(frozen=True, eq=False, repr=False)
class Spectrum(Printable):
    r"""The spectrum of C beside D = damping + weight decay; `print` it, or plot `density()`.

    Args:
        parameters: P.
        damping: lambda; where blocks differ, their mean.
        smallest: the most negative eigenvalue, or the smallest. Where not exact: a Ritz value, which is no smaller.
        largest: the largest eigenvalue. Where not exact: a Ritz value, which is no larger.
        trace: the sum of all eigenvalues.
        effective_dimension: tr(C (C + mean D)^-1), how many directions the data decide rather than the damping.
        block_means: trace(C_bb) / P_b for every block.
        lost: for every query's gradient g, `<g, D (C + D)^-1 g> / |g|^2`: the share of its squared norm that damping
            takes, 1 in directions where C is zero, 1/2 where its eigenvalue is D, 0 far above; None without queries.
            A zero gradient has nothing to lose: 0.
        exact: whether every eigenvalue was known; otherwise stochastic Lanczos quadrature (Ubaru et al. 2017).
        trace_error: standard error of `trace` over the probes; 0 where exact.
        effective_dimension_error: the same of `effective_dimension`.
        eigenvalues: the eigenvalues and how many there are of each.
    """

    parameters: int
    damping: float
    smallest: float
    largest: float
    trace: float
    effective_dimension: float
    block_means: Mapping[str, float]
    lost: Float[Tensor, " q"] | None
    exact: bool
    trace_error: float
    effective_dimension_error: float
    eigenvalues: Density

    @property
    def mean(self) -> float:
        """trace / P, the unit of `Relative` damping."""
        return self.trace / self.parameters

    def density(self, bins: int = 50) -> tuple[Float[Tensor, " edges"], Float[Tensor, " bins"]]:
        """Edges [`bins` + 1] and the number of eigenvalues in each bin [bins], summing to P; for a histogram.

        Bins are equal in the logarithm from 1e-12 of the largest |eigenvalue| where none is negative (smaller ones, the
        zeros with them, go to the first bin), else equal in the eigenvalue.
        """
        whole_number("bins", bins)
        values, weights = self.eigenvalues.values, self.eigenvalues.weights / len(self.eigenvalues.weights)
        top = max(abs(self.smallest), abs(self.largest))
        tiny = 1e-12 * top
        if top == 0 or self.smallest < -1e-9 * top:
            pad = tiny or 1.0
            edges = torch.linspace(self.smallest - pad, self.largest + pad, bins + 1, dtype=torch.float64)
        else:
            edges = torch.logspace(math.log10(tiny), math.log10(top), bins + 1, dtype=torch.float64)
        where = (torch.bucketize(values, edges) - 1).clamp(0, bins - 1)
        counts = torch.zeros(bins, dtype=torch.float64).index_add_(0, where.flatten(), weights.flatten())
        return edges, counts

    def __str__(self) -> str:
        def about(value: float, error: float) -> str:
            return f"{value:.4g}" + ("" if self.exact else f" ± {error:.1g}")

        way = "every eigenvalue" if self.exact else f"estimated from {len(self.eigenvalues.values)} probes"
        lines = [
            f"spectrum             {self.parameters:,} parameters, {way}",
            f"largest eigenvalue   {self.largest:.4g}",
            f"smallest eigenvalue  {self.smallest:.4g}{' (negative curvature)' if self._negative else ''}",
            f"trace                {about(self.trace, self.trace_error)} (mean eigenvalue {self.mean:.3g})",
            f"damping              {self.damping:.4g} ({self._share} mean eigenvalue)",
            f"effective dimension  {about(self.effective_dimension, self.effective_dimension_error)}",
        ]
        if self.lost is not None:
            lines.append(
                f"lost to damping      {float(self.lost.median()):.1%} of a query's squared gradient norm (median; "
                f"most {float(self.lost.max()):.1%})"
            )
        lines += [f"  block {name or '(root)'}: mean eigenvalue {mean:.3g}" for name, mean in self.block_means.items()]
        return "\n".join(lines)

    @property
    def _negative(self) -> bool:
        return self.smallest < -1e-9 * abs(self.largest)

    @property
    def _share(self) -> str:
        return f"{self.damping / self.mean:.3g} x the" if self.mean > 0 else "beside a non-positive"


def spectrum_of(
    operator: AbstractSymmetric, shift: Shift, like: Tensor, lost: Tensor | None, steps: int, probes: int, seed: int
) -> Spectrum:
    """The record for one curvature under one D; `like` has the model's dtype and device."""
    density = operator.known_eigenvalues()
    if density is None:
        density = estimate_density(operator, steps, probes, seed, dtype=like.dtype, device=like.device)
    low, high = density.extremes
    trace, trace_error = density.sum(lambda x: x)
    space = operator.space
    mean = sum(d * space.numel(k) for k, d in shift.over(space.blocks).items()) / space.size
    dimension, error = density.sum(lambda x: effective(x, mean))
    means = operator.block_means()
    return Spectrum(
        space.size, shift.damping, low, high, trace, dimension, means, lost, density.exact, trace_error, error, density
    )


def effective(values: Tensor, d: float) -> Tensor:
    """x / (x + d), and 0 where both are zero."""
    return torch.where(values == 0, torch.zeros_like(values), values / (values + d))
