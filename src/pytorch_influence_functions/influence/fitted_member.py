"""One fitted model of an ensemble: curvature, solver and damping made ready."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch

from ..core.distributed import World
from ..core.errors import InvalidInput
from ..curvature.base import Budget, Form
from ..curvature.exact import GGN, EmpiricalFisher, Fisher, Identity
from ..damping.rules import AbstractDamping, as_damping
from ..gradients.per_example import Derivatives
from ..linalg.gram import Gram
from ..linalg.operator import AbstractOperator, AbstractSymmetric
from ..linalg.rows import Route, Rows
from ..linalg.shift import Shift
from ..problem.checkpoints import Checkpoint
from ..problem.problem import Problem
from ..scaling.base import Raw
from ..solvers.auto import Auto, Composition, ProblemSize, choose, default_damping, form_for
from ..solvers.base import Solution
from ..solvers.blockwise import Blockwise, operator_for, shift_for
from ..solvers.preconditioner import Preconditioner
from ..solvers.trial import PreconditionerTrial
from .assumptions import StationarityCheck
from .method import weights_of

if TYPE_CHECKING:
    from .attribution import Influence


@dataclass(frozen=True, eq=False)
class FittedMember:
    """One fitted model: the problem's own weights, or one checkpoint's."""

    checkpoint: Checkpoint | None
    derivatives: Derivatives
    choice: Composition
    operator: AbstractSymmetric
    shift: Shift
    state: Any
    guide: Preconditioner | None
    standing: StationarityCheck

    @property
    def stored(self) -> Rows | None:
        """All training gradients, when the curvature is made of them and keeps them."""
        curvature = self.choice.curvature
        kept = isinstance(curvature, EmpiricalFisher) and curvature.measure is None and isinstance(self.operator, Gram)
        return self.operator.rows if kept and isinstance(self.operator, Gram) else None

    def solve(self, rows: Rows) -> Solution:
        return self.choice.solver.solve(self.state, rows)


def fit_member(spec: Influence, problem: Problem, checkpoint: Checkpoint | None, n_queries: int) -> FittedMember:
    """Do everything that does not depend on the queries, at one set of weights."""
    with weights_of(problem, checkpoint):
        derivatives = Derivatives.of(problem, gradient_route(spec))
        standing = StationarityCheck.of(derivatives)
        if spec.projection is not None:
            derivatives = derivatives.projected(spec.projection)
        choice = choice_of(spec, ProblemSize.of(derivatives, n_queries) if isinstance(spec.solver, Auto) else None)
        _check_projectable(spec, problem, choice)
        operator = operator_for(choice.solver, choice.curvature, derivatives, Budget.of(spec.memory))
        guide = None
        if choice.preconditioner is not None:
            guide = Preconditioner.of(choice.preconditioner, derivatives, Budget.of(spec.memory))
        return initialised(
            spec, FittedMember(checkpoint, derivatives, choice, operator, Shift(0.0), None, guide, standing)
        )


def _check_projectable(spec: Influence, problem: Problem, choice: Composition) -> None:
    """Refuse what needs the parameters themselves where only projections of rows are at hand."""
    if spec.projection is None:
        return
    inner = choice.solver.solver if isinstance(choice.solver, Blockwise) else choice.solver
    form = form_for(inner, choice.curvature)
    rows = isinstance(choice.curvature, (GGN, Fisher, EmpiricalFisher)) and form in (Form.MATRIX, Form.GRAM)
    if not (rows or isinstance(choice.curvature, Identity)) or choice.preconditioner is not None:
        raise InvalidInput(
            f"{choice.curvature!r} with {choice.solver!r} works on the parameters and cannot take a projection; use "
            "EmpiricalFisher(), GGN() or Fisher() with Spectral(), Cholesky() or Woodbury(), or leave it out."
        )
    if spec.route is Route.FORWARD:
        raise InvalidInput("route='forward' makes no rows that could be projected; leave the route to 'auto'.")
    if problem.weight_decay.per_example:
        raise InvalidInput(
            "Weight decay that every example carries cannot be projected; use WeightDecay(strength, per_example=False)."
        )


def initialised(spec: Influence, member: FittedMember) -> FittedMember:
    """The solver made ready for the damping of `spec`; the curvature is not computed again."""
    space = member.derivatives.space
    rule = damping_of(spec, member.choice).resolved(member)
    shift = Shift(rule.of(member.operator), space.decay, rule.blocks(member.operator))
    shift = shift_for(member.choice.solver, member.operator, shift)
    inverse, choice = _guided(spec, member, shift)
    state = choice.solver.init(member.operator, shift, inverse)
    return replace(member, shift=shift, choice=choice, state=state)


def _guided(spec: Influence, member: FittedMember, shift: Shift) -> tuple[AbstractOperator | None, Composition]:
    """The preconditioner under this damping. One that nobody asked for has to pay, and needs a positive D."""
    choice = member.choice
    if member.guide is None:
        return None, choice
    if spec.preconditioner is not None:
        return member.guide.inverse(shift), choice
    if shift.smallest <= 0:
        return None, choice
    inverse = member.guide.inverse(shift)
    row = next(iter(member.derivatives.stream(ids=torch.arange(1), label="trial", world=World()))).rows
    trial = PreconditionerTrial.of(member.operator, shift, inverse, row)
    tried = member.guide.curvature
    words = f"{tried!r} {'guides it' if trial.pays else 'does not help'} ({trial})"
    used = replace(choice, why=f"{choice.why.split('; ')[0]}; {words}", preconditioner=tried if trial.pays else None)
    return inverse if trial.pays else None, used


def choice_of(spec: Influence, facts: ProblemSize | None) -> Composition:
    """Curvature, solver and preconditioner: what was asked for, or what `Auto` chooses."""
    if isinstance(spec.solver, Auto):
        assert facts is not None
        chosen = choose(spec.curvature, facts)
        return chosen if spec.preconditioner is None else replace(chosen, preconditioner=spec.preconditioner)
    if spec.curvature is None:
        raise InvalidInput(
            f"Influence(solver={spec.solver!r}) does not say which curvature it solves with; "
            "add curvature=GGN(), Hessian() or EmpiricalFisher(), or leave the solver to Auto()."
        )
    return Composition(spec.curvature, spec.solver, "asked for", spec.preconditioner)


def gradient_route(spec: Influence) -> Route:
    """How per-example gradients are taken, where the record forces that."""
    return Route.of(spec.route) if spec.route in (Route.VMAP, Route.LOOP) else Route.AUTO


def damping_of(spec: Influence, choice: Composition) -> AbstractDamping:
    """The damping rule: the record's, or the solver's default."""
    return default_damping(choice.solver, choice.curvature) if spec.damping is None else as_damping(spec.damping)


def words_of(spec: Influence, choice: Composition) -> str:
    """The composition in use, as it would be written."""
    parts = [f"{choice.curvature!r}", f"{choice.solver!r}", f"damping={damping_of(spec, choice)!r}"]
    if choice.preconditioner is not None:
        parts.append(f"preconditioner={choice.preconditioner!r}")
    if not isinstance(spec.scaling, Raw):
        parts.append(f"scaling={spec.scaling!r}")
    if spec.projection is not None:
        parts.append(f"projection={spec.projection!r}")
    if spec.weights is not None:
        parts.append(f"weights={spec.weights}")
    if spec.truncation is not None:
        parts.append(f"truncation={spec.truncation!r}")
    return f"Influence({', '.join(parts)})"
