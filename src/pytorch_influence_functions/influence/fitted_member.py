"""One fitted model, of one or several: curvature, solver and damping made ready at one set of weights."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from ..core.distributed import World, alone, current
from ..core.errors import TooLarge
from ..curvature.base import Budget
from ..curvature.spectrum import effective
from ..damping.rules import AbstractDamping
from ..gradients.per_example import Derivatives, GradientBatch
from ..linalg.operator import AbstractOperator, AbstractSymmetric
from ..linalg.rows import Rows
from ..linalg.shift import Shift
from ..problem.checkpoints import Checkpoint
from ..scaling.base import AbstractScaling, Solving
from ..solvers.base import Solution
from ..solvers.forecast import Composition, queries_at_once
from ..solvers.preconditioner import Preconditioner
from ..solvers.preconditioner_trial import PreconditionerTrial
from .held_bytes import bytes_held
from .query_store import QueryStore
from .scoring import ScoringPass, Solved, self_influence_rows


@dataclass(frozen=True, eq=False)
class FittedMember:
    """One fitted model: the problem's own weights, or one checkpoint's.

    Its methods must be called with the model at these weights, see `at_checkpoint`.
    """

    checkpoint: Checkpoint | None
    derivatives: Derivatives
    composition: Composition
    operator: AbstractSymmetric
    preconditioner: Preconditioner | None
    damping: AbstractDamping
    insists: bool
    """Whether the preconditioner was asked for; one that was not has to prove itself."""
    shift: Shift = Shift(0.0)
    state: Any = None

    def __repr__(self) -> str:
        parts = f"{self.composition.curvature!r}, {self.composition.solver!r}"
        return f"FittedMember({parts}, lambda = {self.shift.damping:.3g})"

    @staticmethod
    def fit(
        checkpoint: Checkpoint | None,
        derivatives: Derivatives,
        composition: Composition,
        damping: AbstractDamping,
        budget: Budget,
        insists: bool,
    ) -> FittedMember:
        """Do everything that does not depend on the queries."""
        operator = composition.solver.operator(composition.curvature, derivatives, budget)
        composition.solver.check_memory(operator, budget)
        preconditioner = None
        if composition.preconditioner is not None:
            preconditioner = Preconditioner.of(composition.preconditioner, derivatives, budget)
        member = FittedMember(checkpoint, derivatives, composition, operator, preconditioner, damping, insists)
        return member.with_damping(damping)

    def with_damping(self, damping: AbstractDamping) -> FittedMember:
        """The solver made ready for another damping; the curvature is not computed again."""
        space, solver = self.derivatives.space, self.composition.solver
        rule = damping.resolved(self)
        shift = Shift(rule.of(self.operator), space.decay, rule.blocks(self.operator))
        shift = solver.damped(self.operator, shift)
        inverse, composition = self._guided(shift)
        state = solver.init(self.operator, shift, inverse)
        return replace(self, damping=damping, shift=shift, composition=composition, state=state)

    def _guided(self, shift: Shift) -> tuple[AbstractOperator | None, Composition]:
        """The preconditioner under this damping. One that nobody asked for has to pay, and needs a positive D."""
        composition, preconditioner = self.composition, self.preconditioner
        if preconditioner is None:
            return None, composition
        if self.insists:
            return preconditioner.inverse(shift), composition
        if shift.smallest <= 0:
            return None, composition
        inverse = preconditioner.inverse(shift)
        row = next(iter(self.derivatives.stream(ids=torch.arange(1), label="trial", world=World()))).rows
        trial = PreconditionerTrial.of(self.operator, shift, inverse, row)
        tried = preconditioner.curvature
        verdict = f"{tried!r} {'guides it' if trial.pays else 'does not help'} ({trial})"
        why = f"{composition.why.split('; ')[0]}; {verdict}"
        used = replace(composition, why=why, preconditioner=tried if trial.pays else None)
        return inverse if trial.pays else None, used

    @property
    def stored(self) -> Rows | None:
        """All training gradients, when the curvature is made of them and keeps them."""
        return self.operator.kept_rows if self.composition.curvature.holds_gradients else None

    def solve(self, rows: Rows) -> Solution:
        """(C + D)^-1 of every row."""
        return self.composition.solver.solve(self.state, rows)

    def damped_shares(self, groups: Iterable[tuple[Tensor, Rows]], count: int) -> Float[Tensor, " q"]:
        """<g, D (C + D)^-1 g> / |g|^2 of every query: what damping takes of its squared gradient; 0 for no gradient.

        Args:
            groups: (query indices, gradients), each query once.
            count: how many queries there are.
        """
        shares = torch.zeros(count, dtype=torch.float64)
        for query_ids, rows in groups:
            sizes = rows.squared_norms().double()
            damped = self.solve(rows).unwrap().rowwise(self.shift.apply(rows)).double()
            shares[query_ids] = torch.where(sizes > 0, damped / sizes, torch.zeros_like(sizes)).cpu()
        return shares

    def training_rows(self, scaling: AbstractScaling, ids: Tensor | None = None) -> Iterator[GradientBatch]:
        """The rows that stand for the training examples `ids` (None: all) under a scaling."""
        solving = Solving(self._solve_alone, self._quadratic_alone, len(self.derivatives.problem), ids)
        return scaling.rows(self.derivatives, solving)

    def room(self, budget: Budget) -> int:
        """How many queries are solved at once within the memory budget."""
        # Where processes share them, as much as the one that has most holds: all plan alike.
        held = current().largest(self._held)
        return queries_at_once(self.composition.solver, self._numbers_each, self.number_bytes, budget, held)

    @cached_property
    def _held(self) -> int:
        """Bytes that curvature and solver hold in this process."""
        return bytes_held(self.operator, self.preconditioner, self.state)

    @property
    def number_bytes(self) -> int:
        """Bytes of one number of a gradient."""
        values = self.derivatives.whole.values(self.derivatives.problem.model).values()
        return max(p.element_size() for p in values)

    @property
    def _numbers_each(self) -> float:
        """The numbers of one solved query: of a vector, or of the factors of a gradient that stays in factors."""
        derivatives = self.derivatives
        stays = self.composition.curvature.keeps_factors or self.composition.solver.solves_in_dual
        return derivatives.numbers if stays and derivatives.numbers else float(derivatives.space.size)

    def solved_groups(
        self, scoring: ScoringPass, scaling: AbstractScaling, budget: Budget, part: Tensor | None, whole: bool
    ) -> Iterator[tuple[Tensor, Solved]]:
        """(query indices, solved queries): all that fit in memory at once, or on disk, so that they share one pass.

        Args:
            scoring: whose queries, and where what the solver says is written down.
            scaling: what the solved queries are multiplied by.
            budget: of the whole method.
            part: which queries; None: all.
            whole: whether what follows takes them whole, as truncation does, and not layer by layer.
        """
        room = self.room(budget)
        store = None if whole else self._store(len(scoring.question) if part is None else len(part), room)
        for query_ids, rows in scoring.query_groups(self.derivatives, room, part):
            solution = self.solve(rows)
            scoring.log.add_solution(solution, rows, self.shift)
            solved = solution.unwrap()
            factors = scaling.query_factors(rows, solved)
            solved = solved if factors is None else solved.scaled(factors)
            del rows, solution  # while the data stream past, nobody holds the unsolved rows
            if store is None:
                yield query_ids, solved
            else:
                store.add(query_ids, solved.rows())
        if store is not None:
            yield torch.cat(store.ids), store.rows()

    def _store(self, count: int, room: int) -> QueryStore | None:
        """Where `count` solved queries go, of which only `room` fit in memory at once.

        None where they fit, where they are not written out, where rows are not made, or the disk of a process is too
        small.
        """
        d = self.derivatives
        if count <= room or self._numbers_each < d.space.size:
            return None
        store = None
        if not (d.vmapped or d.looped):
            with suppress(TooLarge):
                store = QueryStore.of(d.space, count, self.number_bytes)
        # Each process has a disk of its own, and all have to take the same passes.
        return None if current().largest(float(store is None)) else store

    def self_influence(self, budget: Budget) -> Float[Tensor, " n"]:
        """(1/N) g_i^T (C + D)^-1 g_i of every training example, in float64 on the CPU."""
        n = len(self.derivatives.problem)
        leverages = None if self.stored is None else self.composition.solver.leverages(self.state)
        if leverages is not None:
            return leverages.double().cpu()
        own = torch.zeros(n, dtype=torch.float64)
        for ids, rows in self_influence_rows(self.derivatives, self.room(budget)):
            own[ids] = self._quadratic_alone(rows).double().cpu() / n
        return current().sum_into(own)

    def _solve_alone(self, rows: Rows) -> Solution:
        """Every process solves for examples of its own, so a product with the curvature is not shared out here."""
        with alone():
            return self.solve(rows)

    def _quadratic_alone(self, rows: Rows) -> Tensor:
        """b^T (C + D)^-1 b of every row, as `_solve_alone`."""
        with alone():
            return self.composition.solver.quadratic(self.state, rows)

    @property
    def effective_dimension(self) -> float:
        """tr(C (C + D)^-1) where the solver has used the eigenvalues, or knows it without; NaN elsewhere."""
        operator, d = self.operator, self.shift.uniform
        at_hand = operator.eigenvalues_at_hand and self.composition.solver.uses_spectrum
        if d is None or not at_hand:
            return self.composition.solver.effective_dimension(self.state)
        return operator.trace_of(lambda x: effective(x, d))
