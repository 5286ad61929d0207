"""What becomes of raw first-order scores.

First-order influence *underestimates* removals, the more so the higher an example's leverage: removing
it also removes its share of the curvature. `Leverage()` corrects for that.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import ClassVar, final

import torch
from jaxtyping import Float
from torch import Tensor

from .errors import NotLikelihood
from .gradients import Derivatives, Slab, slopes
from .objectives import AbstractLikelihood
from .operators import Expansion
from .problem import sweep
from .rows import Rows
from .solvers import Solution


class AbstractScaling(ABC):
    """How raw scores are rescaled: by which rows stand for the training examples."""

    first_order: ClassVar[bool]
    """Whether the rows are the plain loss gradients, so that stored rows and forward mode may stand in for them."""

    @abstractmethod
    def rows(self, derivatives: Derivatives, solve: Callable[[Rows], Solution], count: int) -> Iterator[Slab]:
        """The training rows, batch by batch in dataset order."""


@final
@dataclass(frozen=True)
class Raw(AbstractScaling):
    """The first-order scores as they are."""

    first_order: ClassVar[bool] = True

    def rows(self, derivatives: Derivatives, solve: Callable[[Rows], Solution], count: int) -> Iterator[Slab]:
        return derivatives.stream(label="scoring")


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

    def rows(self, derivatives: Derivatives, solve: Callable[[Rows], Solution], count: int) -> Iterator[Slab]:
        return leverage_corrected(derivatives, solve, count)


def rowwise(a: Rows | Expansion, b: Rows) -> Float[Tensor, " n"]:
    """<a_n, b_n> for matching rows."""
    return b.rowwise(a.rows() if isinstance(a, Expansion) else a)


def leverage_corrected(derivatives: Derivatives, solve: Callable[[Rows], Solution], count: int) -> Iterator[Slab]:
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
        yield Slab(ids, tape.rows(corrected.to(slope).reshape(slope.shape)), losses, batch)
