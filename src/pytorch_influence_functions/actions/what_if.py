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
from ..problem.problem import Problem, first_batch
from ..problem.working_precision import deep_copy, own_model
from ..solvers.cg import CG
from ..solvers.preconditioner import Inverse
from .edited_minimum import EditedMinimum, least_share_left
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
        corrected: the change of the parameters to the minimum of the edited objective, a row per checkpoint.
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
        fitted.fitted_at.check("ask what_if() again")
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
        self.attribution.fitted_at.check("ask what_if() again")
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

    The minimum of the edited objective around the trained weights, where old losses are their quadratics and new ones
    themselves. With H = C + D, the edited examples' Jacobian rows J, A = J H^-1 J^T, their outputs f and changes of
    weight w (-1 takes out, +1 puts in),

        step = -H^-1 J^T c,   c = (1/N) sum w loss'(f - A c),

    solved through the few rows of J. Where nothing is put in, or all losses are quadratic, it is one Newton step: for
    one removal the influence divided by one minus the leverage; for groups it holds how their members overlap, so
    duplicates are not underestimated as in the sum of single influences. Exact for ridge regression without damping.
    Where Kronecker factors (EK-FAC) do not hold the curvature of what is taken out, that leaves to first order; with
    more than 4,096 outputs the new losses are quadratics too: `.how` says what was done.

    Args:
        problem: model, loss and training data; or what a method's `fit(problem)` gave, which is then used again.
        remove: indices of training examples, pairs (index, score) such as `scores.harmful(0, 5)`, or a bool mask.
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
    """(the step, the first-order step, how it was solved), each step as one row."""
    derivatives, n = member.derivatives, len(member.derivatives.problem)
    by_gradient, curved, local = _look(member, edit)
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
        quadratic = f", with the new losses as quadratics because there are {len(local):,} outputs"
        by_cg = f"one Newton step by conjugate gradients{quadratic if edit.adds else ''}"
        return _by_cg(member, local, right_rows, shift), plain, by_cg
    solver, state, start = member.composition.solver, member.state, plain
    if shift != member.shift:
        state = solver.init(member.operator, shift)
        start = space.rows(solver.solve(state, right_rows).unwrap().flat())
    block = _Block.of(space, local, start, solver.solve(state, local.rows).unwrap(), n)
    if edit.adds and local.losses:
        step = block.to_minimum(factored)
        if step is not None:
            return step[0], plain, step[1]
    least = least_share_left(block.overlap, local.hessian / n)
    if factored and least < 1.0 - _MOST_LEVERAGE:
        return start, plain, _FACTORED
    if least <= 1e-9:
        raise SolveFailed(
            "After the edit the curvature is no longer positive: the examples taken out hold more of it than the "
            "damping leaves; raise the damping, or change fewer examples."
        )
    return block.one_step(), plain, "one Newton step through the examples' own block"


def _look(member: FittedMember, edit: Edit) -> tuple[bool, bool, LocalRows]:
    """(whether the curvature holds gradients, whether the loss has a Hessian in the outputs, the edited examples)."""
    derivatives = member.derivatives
    by_gradient = member.composition.curvature.holds_gradients
    # A row for every output is needed for the loss's Hessian, and for what a new loss does further away.
    wanted = edit.adds and _outputs(derivatives.problem) * len(edit) <= _DENSE_ROWS if by_gradient else True
    curved = wanted and find_obstacle(derivatives) is None
    if curved:
        return by_gradient, True, LocalRows.per_output(derivatives, edit, by_gradient)
    return by_gradient, False, LocalRows.per_example(derivatives, edit)


def _outputs(problem: Problem) -> int:
    """How many outputs an example has."""
    with first_batch(problem, ids=[0]) as (_, batch), torch.no_grad():
        return problem.objective.outputs(problem.model, batch)[0].numel()


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


@final
@dataclass(frozen=True, eq=False)
class _Block:
    """The system in the few rows J of the edited examples, with X = H^-1 J^T, A = J X and N examples."""

    space: Space
    local: LocalRows
    start: Rows
    """u = H^-1 b, the step to first order with the weight decay of what is left, one row."""
    solved: Rows | DualSolution
    """The rows of X^T."""
    overlap: Float[Tensor, "m m"]
    """A."""
    n: int

    @staticmethod
    def of(space: Space, local: LocalRows, start: Rows, solved: Rows | DualSolution, n: int) -> _Block:
        overlap = solved.inner(local.rows).double()
        return _Block(space, local, start, solved, (overlap + overlap.T) / 2, n)

    def one_step(self) -> Rows:
        """(H + J^T B J)^-1 b = u - X (I + B A)^-1 B J u, with B the change of the losses' Hessians over N."""
        weighted = self.local.hessian / self.n
        system = torch.eye(len(weighted), dtype=weighted.dtype, device=weighted.device) + weighted @ self.overlap
        return self._moved(torch.linalg.solve(system, weighted @ self._start_moves())[:, 0])

    def to_minimum(self, factored: bool) -> tuple[Rows, str] | None:
        """The step with the new losses themselves, and how; None where the objective need not be convex."""
        local, n = self.local, self.n
        how = "the new losses themselves"
        left = least_share_left(self.overlap, local.removed_hessian / n)
        if factored and left < 1.0 - _MOST_LEVERAGE:
            # What the factors do not hold cannot be taken out of them.
            local = local.with_flat_removals()
            how += " and the old ones to first order, because Kronecker factors do not hold their curvature"
        elif left <= 1e-9:
            return None
        linear = self.local.slopes / n
        moves = self._start_moves()[:, 0] + self.overlap @ linear
        precision = float(torch.finfo(local.rows.dtype).eps)
        least = EditedMinimum.of(local, self.overlap, moves, n, precision)
        if not least.converged:
            return None
        return self._moved(
            least.coefficients - linear
        ), f"{least.steps} Newton step{'' if least.steps == 1 else 's'} with {how}"

    def _start_moves(self) -> Float[Tensor, "m 1"]:
        return self.local.rows.inner(self.start).double()

    def _moved(self, coefficients: Float[Tensor, " m"]) -> Rows:
        moved = self.start.flat().double() - coefficients[None] @ self.solved.flat().double()
        return self.space.rows(moved.to(self.start.dtype))


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
