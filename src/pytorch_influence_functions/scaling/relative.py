"""Scores divided by an example's own size: for examples that matter to this query and not to every query."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar, final

import torch
from jaxtyping import Float
from torch import Tensor

from ..gradients.per_example import Derivatives, GradientBatch
from ..linalg.dual_solution import DualSolution
from ..linalg.rows import Rows
from .base import AbstractScaling, Solving


def invert(sizes: Float[Tensor, " n"]) -> Float[Tensor, " n"]:
    """1 / size, and 0 for an example without gradient, whose scores are 0."""
    return torch.where(sizes > 0, 1.0 / sizes.clamp_min(torch.finfo(sizes.dtype).tiny), torch.zeros_like(sizes))


@final
@dataclass(frozen=True, repr=False)
class RelatIF(AbstractScaling):
    r"""score[q, i] / sqrt(g_i^T (C + lambda)^-1 g_i): influence per unit of the example's own.

    Examples with large gradients (outliers, mislabelled ones) influence everything; this asks which examples matter to
    *this* query. `parameters=True` divides by |(C + lambda)^-1 g_i| instead, by how far the example moves the weights.
    Costs one solve per training example. An example without gradient has the score 0.

    Reference: Barshan, Brunet & Dziugaite (2020): the loss-relative form, and the parameter-relative one.
    """

    parameters: bool = False
    first_order: ClassVar[bool] = False

    def solves_per_example(self, outputs: int) -> int:
        return 1

    def rows(self, derivatives: Derivatives, solving: Solving) -> Iterator[GradientBatch]:
        for gradients in derivatives.stream(ids=solving.ids, label="scoring"):
            rows = gradients.rows
            sizes = solving.solve(rows).unwrap().squared_norms() if self.parameters else solving.quadratic(rows)
            yield gradients._replace(rows=rows.scaled(invert(sizes.double().clamp_min(0.0).sqrt())))

    @property
    def note(self) -> str:
        return "scores are divided by each example's own size (RelatIF): a ranking, not predicted changes"


@final
@dataclass(frozen=True, repr=False)
class Cosine(AbstractScaling):
    r"""Rows and queries divided by their length: with `Identity()` the cosine of two gradients, over N.

    Costs nothing but the norms. A query or example without gradient has the score 0.
    """

    first_order: ClassVar[bool] = False

    def rows(self, derivatives: Derivatives, solving: Solving) -> Iterator[GradientBatch]:
        for gradients in derivatives.stream(ids=solving.ids, label="scoring"):
            norms = gradients.rows.squared_norms().double().sqrt()
            yield gradients._replace(rows=gradients.rows.scaled(invert(norms)))

    def query_factors(self, rows: Rows, solved: Rows | DualSolution) -> Float[Tensor, " q"] | None:
        return invert(rows.squared_norms().double().sqrt())

    @property
    def note(self) -> str:
        return "gradients are divided by their length (cosine): a ranking, not predicted changes"


@final
@dataclass(frozen=True, repr=False)
class Whitened(AbstractScaling):
    r"""The cosine of query and example where lengths are measured by the curvature, over N.

    score[q, i] = (1/N) g_q^T M g_i / sqrt(g_q^T M g_q  g_i^T M g_i) with M = (C + lambda)^-1: `RelatIF` with the query
    divided by its own size as well, so that queries compare too. Costs one solve per training example. A query or
    example without gradient has the score 0.

    Reference: Chang et al. (2024), "Scalable Influence and Fact Tracing for Large Language Model Pretraining".
    """

    first_order: ClassVar[bool] = False

    def solves_per_example(self, outputs: int) -> int:
        return 1

    def rows(self, derivatives: Derivatives, solving: Solving) -> Iterator[GradientBatch]:
        return RelatIF().rows(derivatives, solving)

    def query_factors(self, rows: Rows, solved: Rows | DualSolution) -> Float[Tensor, " q"] | None:
        return invert(solved.rowwise(rows).double().clamp_min(0.0).sqrt())

    @property
    def note(self) -> str:
        return "queries and examples are divided by their own size in the curvature: a ranking, not predicted changes"
