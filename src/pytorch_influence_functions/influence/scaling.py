"""What becomes of raw first-order scores.

First-order influence *underestimates* removals, the more so the higher an example's leverage: removing
it also removes its share of the curvature. `Leverage()` corrects for that. `RelatIF()` and `Cosine()` divide by how
much an example moves the model at all: for finding examples that matter to this query and not to every query. Their
scores are no predicted changes any more.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import ClassVar, final

import torch
from jaxtyping import Float
from torch import Tensor

from ..core.errors import NotLikelihood
from ..gradients.per_example import Derivatives, GradientBatch, slopes
from ..linalg.dual_solution import DualSolution
from ..linalg.rows import Rows
from ..objectives.base import AbstractLikelihood
from ..problem.problem import sweep
from ..solvers.base import Solution


@dataclass(frozen=True, eq=False)
class Solving:
    """What a scaling may ask of a fitted model: `solve` gives (C + D)^-1 of rows, `count` is N."""

    solve: Callable[[Rows], Solution]
    quadratic: Callable[[Rows], Tensor]
    """b^T (C + D)^-1 b for every row."""
    count: int


class AbstractScaling(ABC):
    """How raw scores are rescaled: by which rows stand for the training examples."""

    first_order: ClassVar[bool]
    """Whether the rows are the plain loss gradients, so that stored rows and forward mode may stand in for them."""

    @abstractmethod
    def rows(self, derivatives: Derivatives, solving: Solving) -> Iterator[GradientBatch]:
        """The training rows, batch by batch in dataset order."""

    def query_factors(self, rows: Rows) -> Float[Tensor, " q"] | None:
        """One number per query that its scores are multiplied by; `rows` are the unsolved query gradients."""
        return None

    @property
    def note(self) -> str:
        """What to say with a result that is no predicted change; empty for one that is."""
        return ""


@final
@dataclass(frozen=True)
class Raw(AbstractScaling):
    """The first-order scores as they are."""

    first_order: ClassVar[bool] = True

    def rows(self, derivatives: Derivatives, solving: Solving) -> Iterator[GradientBatch]:
        return derivatives.stream(label="scoring")


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


@final
@dataclass(frozen=True)
class Leverage(AbstractScaling):
    r"""One Newton step for the removal of each single example, instead of the first-order term.

    With A_i = J_i (C + lambda)^-1 J_i^T and H_i the loss's Hessian in the outputs, example i's slope s_i is replaced
    by (I - H_i A_i / N)^-1 s_i; for one output that divides by 1 - leverage. Exact for ridge regression's leave-one-out
    (Sherman-Morrison). Costs one solve per example and output.

    Reference: Rubinstein & Hopkins (2025), "Rescaled Influence Functions".
    """

    first_order: ClassVar[bool] = False

    def rows(self, derivatives: Derivatives, solving: Solving) -> Iterator[GradientBatch]:
        return leverage_corrected(derivatives, solving.solve, solving.count)


def rowwise(a: Rows | DualSolution, b: Rows) -> Float[Tensor, " n"]:
    """<a_n, b_n> for matching rows."""
    return b.rowwise(a.rows() if isinstance(a, DualSolution) else a)


def leverage_corrected(
    derivatives: Derivatives, solve: Callable[[Rows], Solution], count: int
) -> Iterator[GradientBatch]:
    """Training rows with each example's slope corrected for its own leverage."""
    objective = derivatives.objective
    if not isinstance(objective, AbstractLikelihood):
        raise NotLikelihood(
            f"Leverage() needs the Hessian of the loss in the model's outputs, and {type(objective).__name__} gives "
            "none; use CrossEntropy(), SquaredError() or Bernoulli(), or scaling=Raw()."
        )
    for ids, batch in sweep(derivatives.problem, label="leverages"):
        n = len(ids)
        tape = derivatives.tape(batch, n)
        outputs = tape.outputs.detach()
        objective.check(outputs, batch, ids)
        losses, slope = slopes(objective, outputs, batch, ids)
        columns = outputs[0].numel()
        units = torch.eye(columns, dtype=outputs.dtype, device=outputs.device)
        rows = [tape.rows(units[k].expand(n, -1).reshape(outputs.shape), keep_graph=True) for k in range(columns)]
        solved = [solve(r).unwrap() for r in rows]
        a = torch.stack([torch.stack([rowwise(x, r) for x in solved], 1) for r in rows], 1)
        hessian = objective.output_hessian(outputs, batch).to(a)
        system = units.to(a) - hessian @ a / count
        corrected = torch.linalg.solve(system, slope.flatten(1).to(a)[..., None])[..., 0]
        yield GradientBatch(ids, tape.rows(corrected.to(slope).reshape(slope.shape)), losses, batch)
