"""Scores divided by an example's own size: for examples that matter to this query and not to every query."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar, final

import torch
from jaxtyping import Float
from torch import Tensor

from ..gradients.per_example import Derivatives, GradientBatch
from ..linalg.rows import Rows
from .base import AbstractScaling, Solving


def inverse(sizes: Float[Tensor, " n"]) -> Float[Tensor, " n"]:
    """1 / size; an example without any gradient moves nothing, and keeps its score of 0."""
    return torch.where(sizes > 0, 1.0 / sizes.clamp_min(torch.finfo(sizes.dtype).tiny), torch.zeros_like(sizes))


@final
@dataclass(frozen=True)
class RelatIF(AbstractScaling):
    r"""score[q, i] / sqrt(g_i^T (C + lambda)^-1 g_i): influence per unit of the example's own.

    Examples with large gradients (outliers, mislabelled ones) influence everything; this asks which examples matter to
    *this* query. `parameters=True` divides by |(C + lambda)^-1 g_i| instead, by how far the example moves the weights.
    Costs one solve per training example. An example without gradient has the score 0.

    Reference: Barshan, Brunet & Dziugaite (2020): the loss-relative form, and the parameter-relative one.
    """

    parameters: bool = False
    first_order: ClassVar[bool] = False

    def rows(self, derivatives: Derivatives, solving: Solving) -> Iterator[GradientBatch]:
        for slab in derivatives.stream(label="scoring"):
            if self.parameters:
                sizes = solving.solve(slab.rows).unwrap().squared_norms()
            else:
                sizes = solving.quadratic(slab.rows)
            yield slab._replace(rows=slab.rows.scaled(inverse(sizes.double().clamp_min(0.0).sqrt())))

    @property
    def note(self) -> str:
        return "scores are divided by each example's own size (RelatIF): a ranking, not predicted changes"


@final
@dataclass(frozen=True)
class Cosine(AbstractScaling):
    r"""Rows and queries divided by their length: with `Identity()` the cosine of two gradients, over N.

    Costs nothing but the norms. A query or example without gradient has the score 0.
    """

    first_order: ClassVar[bool] = False

    def rows(self, derivatives: Derivatives, solving: Solving) -> Iterator[GradientBatch]:
        for slab in derivatives.stream(label="scoring"):
            yield slab._replace(rows=slab.rows.scaled(inverse(slab.rows.squared_norms().double().sqrt())))

    def query_factors(self, rows: Rows) -> Float[Tensor, " q"] | None:
        return inverse(rows.squared_norms().double().sqrt())

    @property
    def note(self) -> str:
        return "gradients are divided by their length (cosine): a ranking, not predicted changes"
