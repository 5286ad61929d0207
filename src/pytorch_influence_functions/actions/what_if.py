"""What would change if training examples were removed, relabelled, replaced, added or weighted otherwise."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, final

import torch
from jaxtyping import Float
from torch import Tensor, nn

from ..core.errors import InvalidInput, SolveFailed
from ..curvature.base import Budget
from ..curvature.own_losses import find_obstacle
from ..influence.attribution import Attribution
from ..influence.fitted_member import FittedMember
from ..influence.question import Question
from ..influence.scoring import ScoringPass
from ..linalg.dual_solution import DualSolution
from ..linalg.implicit import Implicit
from ..linalg.rows import Rows
from ..linalg.shift import Shift
from ..linalg.space import Space
from ..problem.checkpoints import at_checkpoint
from ..problem.model_state import plain_autograd
from ..problem.problem import Problem
from ..problem.working_precision import deep_copy, own_model
from ..solvers.cg import CG
from ..solvers.preconditioner import Inverse
from .edits import Edit
from .fitted_system import fit_system
from .local_rows import LocalRows

# Up to so many rows the edited examples' block is inverted densely; beyond, the edited system is solved by CG.
_DENSE_ROWS = 4096
# Kronecker factors need not hold the curvature of single examples. Where these would have a larger share than this of
# theirs, correcting for it predicts worse than not: on digits, 10 of 1,000 removed from a perceptron, twice too much
# becomes four times.
_MOST_LEVERAGE = 0.5
_FACTORED = "first order, because Kronecker factors hold less curvature than the edited examples have"


@final
@dataclass(frozen=True, eq=False)
class WhatIf:
    """What an edit of the training data is predicted to do. `what_if(...)` makes one.

    Attributes:
        attribution: the fitted method it was predicted with.
        edit: what is changed.
        corrected: the change of the parameters after one Newton step of the edited objective, a row per checkpoint.
        first_order: the same to first order: the sum of single influences, which underestimates duplicates.
        solved_by: how the step was solved, in words.
    """

    attribution: Attribution
    edit: Edit
    corrected: tuple[Rows, ...]
    first_order: tuple[Rows, ...]
    solved_by: str

    @property
    def how(self) -> str:
        """How the step was solved, and how far it is from first order."""
        return f"{self.solved_by}, {100 * self.correction:.3g} % from first order"

    @property
    def correction(self) -> float:
        """|corrected - first order| / |first order|: how much the examples' own curvature and their overlap matter."""
        ratios = []
        for step, plain in zip(self.corrected, self.first_order, strict=True):
            difference = (step.flat().double() - plain.flat().double()).norm()
            ratios.append(float(difference / plain.flat().double().norm().clamp_min(1e-300)))
        return sum(ratios) / len(ratios)

    @plain_autograd()
    def change(self, queries: Any, measure: Any = None, order: str = "corrected") -> Float[Tensor, " q"]:
        """The predicted change of a measure on every query, [Q] in float64; the mean over checkpoints.

        The measure is taken as linear around the trained weights; `model()` gives the edited model itself.

        Args:
            queries: a Dataset, DataLoader, tensors or arrays `(x, y)`.
            measure: what is measured, an objective or loss; `None`: the training objective.
            order: `"corrected"`, or `"first"` for the sum of single influences.

        Raises:
            InvalidInput: `order` is something else.

        Example:
            >>> x, y = torch.randn(40, 3), torch.arange(40) % 2
            >>> problem = Problem(nn.Linear(3, 2), nn.CrossEntropyLoss(), (x, y))
            >>> what_if(problem, remove=[3, 7]).change((x[:5], y[:5])).shape
            torch.Size([5])
        """
        if order not in ("corrected", "first"):
            raise InvalidInput(f"order={order!r} must be 'corrected' or 'first'.")
        moves = self.corrected if order == "corrected" else self.first_order
        fitted = self.attribution
        question = Question.of(fitted.problem, fitted.members[0].derivatives.objective, queries, measure)
        total = torch.zeros(len(question), dtype=torch.float64)
        scoring = ScoringPass(fitted.problem, question)
        for member, move in zip(fitted.members, moves, strict=True):
            with at_checkpoint(fitted.problem.model, member.checkpoint):
                room = member.room(Budget.of(fitted.spec.memory))
                for ids, rows in scoring.query_groups(member.derivatives, room):
                    total[ids] += rows.inner(move)[:, 0].double().cpu() / len(moves)
        return total

    @property
    def parameter_change(self) -> dict[str, Tensor]:
        """The predicted change of every parameter that takes part, by name; the mean over checkpoints."""
        space = self.attribution.members[0].derivatives.whole
        flat = torch.stack([move.flat()[0] for move in self.corrected]).mean(0, keepdim=True)
        return {name: value[0] for name, value in space.to_parameters(space.rows(flat)).items()}

    def model(self) -> nn.Module:
        """A copy of the model with the predicted change added, in mode and types of the original, which is left alone.

        Weights in half precision are rounded to it, and a small change may vanish there; `parameter_change` has it all,
        and that of a loss's own weights too.

        Raises:
            InvalidInput: the prediction is over several checkpoints, which are several models.
        """
        if len(self.corrected) > 1:
            raise InvalidInput(
                f"The prediction is over {len(self.corrected)} checkpoints, which are as many models; leave "
                "checkpoints= out to edit one."
            )
        problem, member = self.attribution.problem, self.attribution.members[0]
        change = self.parameter_change
        with at_checkpoint(problem.model, member.checkpoint), torch.no_grad():
            edited = deep_copy(own_model(problem.model))
            values = dict([*problem.model.named_parameters(), *problem.model.named_buffers()])
            for name, tensor in [*edited.named_parameters(), *edited.named_buffers()]:
                tensor.copy_(values[name] + change[name].to(values[name]) if name in change else values[name])
        return edited

    def __repr__(self) -> str:
        return f"WhatIf({self.edit.description}; {self.how})"


@plain_autograd()
def what_if(
    problem: Problem | Attribution,
    remove: Any = None,
    relabel: Mapping[int, Any] | None = None,
    replace: Mapping[int, Any] | None = None,
    add: Any = None,
    reweight: Mapping[int, float] | None = None,
    method: Any = None,
) -> WhatIf:
    """Predict what an edit of the training data does to the model, without training again.

    One Newton step of the edited objective from the trained weights. With the edited examples' Jacobian rows J, slopes
    s and Hessians H in the outputs, and their changes of weight w (-1 removes, +1 adds),

        step = -(C + D + J^T w H J / N)^-1 J^T w s / N,

    solved through the few rows of J. For one removal this divides the influence by one minus the leverage; for groups
    it holds how their members overlap, so duplicates are not underestimated as in the sum of single influences. Exact
    for ridge regression without damping. Where Kronecker factors (EK-FAC) do not hold the curvature of what is taken
    out, the step stays at first order, and `.how` says so.

    Args:
        problem: model, loss and training data; or what a method's `fit(problem)` gave, which is then used again.
        remove: indices of training examples, or a bool mask over them.
        relabel: new labels by index; names of classes where the data have them.
        replace: new inputs by index, without a batch axis.
        add: more training examples: a dataset, a loader, tensors or arrays `(x, y)`.
        reweight: new weights by index; 1 is what an example has now.
        method: a method of `ptif.methods` that is an `Influence`, by name or made; `None`: chosen by size.

    Returns:
        `WhatIf`: `.change(queries, measure)`, `.parameter_change`, `.model()`.

    Raises:
        InvalidInput: nothing is changed, an index is out of range or doubled, everything is removed, a label is no
            class, or the method has no linear system (baselines, projections).
        SolveFailed: without these examples the curvature is no longer positive; more damping would help.

    Reference: Koh et al. (2019), "On the Accuracy of Influence Functions for Measuring Group Effects"; Rubinstein &
    Hopkins (2025), "Rescaled Influence Functions".

    Example:
        >>> x, y = torch.randn(40, 3), torch.arange(40) % 2
        >>> what_if(Problem(nn.Linear(3, 2), nn.CrossEntropyLoss(), (x, y)), relabel={4: 1}).edit.description
        '1 example relabelled'
    """
    fitted = fit_system(problem, method, "what_if")
    edit = Edit.of(fitted.problem, remove, relabel, replace, add, reweight)
    steps = []
    for member in fitted.members:
        with at_checkpoint(fitted.problem.model, member.checkpoint):
            steps.append(_step(member, edit))
    return WhatIf(fitted, edit, tuple(s for s, _, _ in steps), tuple(f for _, f, _ in steps), steps[0][2])


def _step(member: FittedMember, edit: Edit) -> tuple[Rows, Rows, str]:
    """(one Newton step, the first-order step, how it was solved), each step as one row."""
    derivatives, n = member.derivatives, len(member.derivatives.problem)
    by_gradient = member.composition.curvature.holds_gradients
    curved = not by_gradient and find_obstacle(derivatives) is None
    local = LocalRows.of(derivatives, edit, per_output=curved)
    pull = (local.slopes / n)[None].to(local.rows.dtype)
    right = local.rows.combine(pull).flat().double()
    shift, decay = _edited_shift(member, edit)
    if decay is not None:
        right = right + decay
    space = derivatives.space
    right_rows = space.rows(-right.to(local.rows.dtype))
    plain = space.rows(member.solve(right_rows).unwrap().flat())
    if not (curved or by_gradient):
        return plain, plain, "first order, because the loss has no Gauss-Newton matrix"
    factored = member.composition.curvature.kronecker
    if len(local) > _DENSE_ROWS:
        if factored and bool((local.hessian.diagonal() < 0).any()):
            return plain, plain, _FACTORED
        return _by_cg(member, local, right_rows, shift), plain, "one Newton step by conjugate gradients"
    solver, state, start = member.composition.solver, member.state, plain
    if shift != member.shift:
        state = solver.init(member.operator, shift)
        start = space.rows(solver.solve(state, right_rows).unwrap().flat())
    solved = solver.solve(state, local.rows).unwrap()
    overlap = solved.inner(local.rows).double()
    overlap = (overlap + overlap.T) / 2
    system = _system(overlap, local.hessian / n)
    # One minus the largest leverage of what is taken out.
    least = float(torch.linalg.eigvals(system).real.min())
    if factored and least < 1.0 - _MOST_LEVERAGE:
        return start, plain, _FACTORED
    if least <= 1e-9:
        raise SolveFailed(
            "After the edit the curvature is no longer positive: the examples taken out hold more of it than the "
            "damping leaves; raise the damping, or change fewer examples."
        )
    return _by_block(space, local, start, solved, system, n), plain, "one Newton step through the examples' own block"


def _edited_shift(member: FittedMember, edit: Edit) -> tuple[Shift, Tensor | None]:
    """D after the edit, and what the examples' own weight decay adds to the gradient, [1, P]."""
    problem, shift = member.derivatives.problem, member.shift
    if not problem.weight_decay.per_example or problem.weight_decay.is_zero:
        return shift, None
    share = edit.weight / len(problem)
    space = member.derivatives.space
    theta = space.from_parameters({k: v.detach()[None] for k, v in space.values(problem.model).items()})
    pull = theta.scaled({k: share * d for k, d in space.decay.items()}).flat().double()
    return replace(shift, decay={k: d * (1.0 + share) for k, d in shift.decay.items()}), pull


def _system(overlap: Tensor, hessian: Tensor) -> Tensor:
    """I + B A for (C' + J^T B J)^-1 b = u - X (I + B A)^-1 B J u, with X = C'^-1 J^T, A = J X and u = C'^-1 b.

    Args:
        overlap: A, [m, m].
        hessian: B, [m, m].
    """
    return torch.eye(len(overlap), dtype=overlap.dtype, device=overlap.device) + hessian.to(overlap) @ overlap


def _by_block(space: Space, local: LocalRows, start: Rows, solved: Rows | DualSolution, system: Tensor, n: int) -> Rows:
    """The step with the examples' own block taken out or put in; see `_system`.

    `start` is u, one row, and `solved` the rows of X^T.
    """
    weighted = local.hessian.to(system) / n
    coefficients = torch.linalg.solve(system, weighted @ local.rows.inner(start).double())
    moved = start.flat().double() - coefficients.T @ solved.flat().double()
    return space.rows(moved.to(start.dtype))


def _by_cg(member: FittedMember, local: LocalRows, right: Rows, shift: Shift) -> Rows:
    """The same by conjugate gradients on the edited curvature, preconditioned by the fitted one."""
    space, n, operator = member.derivatives.space, len(member.derivatives.problem), member.operator
    hessian = local.hessian

    def product(rows: Rows, ids: Tensor | None = None) -> Rows:
        weighted = rows.inner(local.rows).double() @ hessian.to(rows.device) / n
        added = local.rows.combine(weighted.to(local.rows.dtype)).flat()
        return space.rows(operator.apply(rows).flat() + added.to(rows.flat()))

    edited = Implicit(space, product, operator.block_means, n)
    solver = member.composition.solver
    guide = Inverse(space, solver, solver.init(operator, shift)) if solver.vectors_held <= 1 else None
    cg = CG(max_steps=1000)
    solution = cg.solve(cg.init(edited, shift, guide), right).unwrap()
    return space.rows(solution.flat())
