"""Whether a loss has a Gauss-Newton matrix: known losses have one, others are looked at on a few examples."""

from __future__ import annotations

import torch

from ..core.distributed import World
from ..core.errors import NotLikelihood
from ..core.indexing import spread_sample
from ..gradients.per_example import Derivatives
from ..objectives.differentiated import Differentiated, no_curvature, output_curvature
from ..problem.problem import sweep

# Convexity is looked at on so many examples; a root of the Hessian looks again at every example it is taken of.
_LOOK = 256


def require_output_curvature(derivatives: Derivatives) -> None:
    """Refuse a loss that has no Gauss-Newton matrix.

    Args:
        derivatives: how gradients are taken.

    Raises:
        NotLikelihood: its second derivative in the outputs is not positive semidefinite, 0, or unknown.
    """
    obstacle = find_obstacle(derivatives)
    if obstacle is not None:
        raise obstacle


def find_obstacle(derivatives: Derivatives) -> NotLikelihood | None:
    """Why the loss of `derivatives` has no Gauss-Newton matrix; None where it has one."""
    curvature = output_curvature(derivatives.objective)
    if not isinstance(curvature, Differentiated):
        return None
    try:
        _look_at(derivatives, curvature)
    except NotLikelihood as obstacle:
        return obstacle
    return None


def _look_at(derivatives: Derivatives, curvature: Differentiated) -> None:
    problem, curved = derivatives.problem, False
    some = spread_sample(len(problem), _LOOK)
    for ids, batch in sweep(problem, ids=some, label="looking at the loss", world=World()):
        with torch.no_grad():
            outputs = curvature.objective.outputs(problem.model, batch)
        curvature.objective.check(outputs, batch, ids)
        for blocks in curvature.blocks_of(outputs, batch):
            blocks.refuse_negative()
            curved = curved or bool((blocks.values != 0).any())
    if not curved:
        raise no_curvature(curvature.objective, len(some))
