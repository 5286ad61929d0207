"""How the member of a checkpoint is fitted, and fitted again, as records: a fitted method can be pickled with them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import final

from torch import nn

from ..curvature.base import Budget
from ..damping.rules import AbstractDamping
from ..gradients.per_example import Derivatives
from ..linalg.eigh import Decompositions
from ..problem.checkpoints import Checkpoint, at_checkpoint
from ..solvers.forecast import Composition
from .fitted_member import FittedMember


@final
@dataclass(frozen=True, eq=False)
class FitMember:
    """Fits the member of one checkpoint, counted from 0.

    Args:
        checkpoints: of the problem; `(None,)`: the model's own weights.
        derivatives: how gradients are taken, at all of them.
        composition: curvature, solver and preconditioner.
        damping: the rule for lambda.
        budget: what a member may take.
        insists: whether the preconditioner was asked for.
    """

    checkpoints: Sequence[Checkpoint | None]
    derivatives: Derivatives
    composition: Composition
    damping: AbstractDamping
    budget: Budget
    insists: bool
    decompositions: Decompositions = field(default_factory=Decompositions)

    def __call__(self, k: int) -> FittedMember:
        """The member of checkpoint `k`."""
        checkpoint, model = self.checkpoints[k], self.derivatives.problem.model
        with at_checkpoint(model, checkpoint), self.decompositions.in_use():
            return FittedMember.fit(
                checkpoint, self.derivatives, self.composition, self.damping, self.budget, self.insists
            )


@final
@dataclass(frozen=True, eq=False)
class ChangeDamping:
    """Gives a fitted member another damping."""

    model: nn.Module
    damping: AbstractDamping

    def __call__(self, member: FittedMember) -> FittedMember:
        """The member under it."""
        with at_checkpoint(self.model, member.checkpoint):
            return member.with_damping(self.damping)


@final
@dataclass(frozen=True, eq=False)
class FitChanged:
    """Fits the member of a checkpoint and changes it.

    Args:
        members: those of all checkpoints.
        change: what becomes of each.
    """

    members: Sequence[FittedMember]
    change: Callable[[FittedMember], FittedMember]

    def __call__(self, k: int) -> FittedMember:
        """The changed member of checkpoint `k`."""
        return self.change(self.members[k])
