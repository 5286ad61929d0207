"""Conjugate gradients on many right-hand sides at once, each stopping by itself."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from ..core.distributed import current
from ..core.validate import finite_number, whole_number
from ..linalg.lanczos import estimate_extremes
from ..linalg.operator import AbstractOperator, apply_flat
from ..linalg.rows import Rows
from ..linalg.shift import Shift
from .base import (
    ENDED_EARLY,
    AbstractSolver,
    Result,
    Solution,
    System,
    check_incomplete,
    damping_that_works,
    nonfinite_rows,
    refuse_input,
    relative,
)
from .energy import energy, error_bound

# How far the recursive residual may drift from the true one before rounding is blamed for a standstill.
_DRIFT = 0.1
# The gains of so many last steps tell the error where the smallest eigenvalue does not.
_RECENT = 4


@dataclass(frozen=True, eq=False)
class CGState:
    """The system and, if given, what approximates its inverse."""

    system: System
    preconditioner: AbstractOperator | None


@dataclass(frozen=True, repr=False)
class CG(AbstractSolver[CGState]):
    """Preconditioned conjugate gradients (Hestenes & Stiefel 1952), all rows in one product per step.

    A row is done when its *true* relative residual is at most `rtol`, and so is its relative error in the norm of
    C + D, which is what scores are wrong by: where columns of the data differ in scale, one step makes the residual
    small and leaves all directions but the steepest unsolved. The error is at most |r| / sqrt(smallest number in D),
    for a C without negative curvature; where rounding ends before that, or D is 0, it is what the last steps gained.

    Done rows drop out of the product. Rounding makes the recursive residual too rosy: it is replaced by the true one
    when a row claims to be done, and the row goes on, or is given up as `stagnated` when that no longer helps.

    Args:
        rtol: the relative residual, and relative error in the norm of C + D, that are asked for; `None`: 1e-6 in
            float64 and 1e-3 in float32, about what rounding allows there. Products in bfloat16 or float16 (autocast)
            allow less, which is then enough.
        max_steps: at most so many products with the curvature.
        patience: after so many steps without progress the recursive residual is compared with the true one.
        incomplete: what becomes of rows that `max_steps` or rounding stop before `rtol`: `"warn"` hands back what was
            reached, with an `IncompleteSolveWarning` and a bad mark in the diagnostics; `"error"` raises `SolveFailed`.

    This differs from the textbook in: 1. each row meets its own end; 2. negative curvature along a search
    direction ends that row with its Rayleigh quotient instead of an arbitrary step; 3. the residual reported
    is recomputed.

    >>> state = CG(rtol=1e-8).init(operator, Shift(1e-3))  # doctest: +SKIP
    >>> CG(rtol=1e-8).solve(state, rows).unwrap()  # doctest: +SKIP
    """

    rtol: float | None = None
    max_steps: int = 200
    patience: int = 50
    incomplete: str = "warn"
    vectors_held: ClassVar[int] = 5

    def __post_init__(self) -> None:
        if self.rtol is not None:
            finite_number("rtol", self.rtol, above=0, below=1, owner=self, hint="None follows the precision")
        whole_number("max_steps", self.max_steps, owner=self)
        whole_number("patience", self.patience, owner=self)
        check_incomplete("CG", self.incomplete)

    def init(self, operator: AbstractOperator, shift: Shift, preconditioner: AbstractOperator | None = None) -> CGState:
        return CGState(System.of(operator, shift), preconditioner)

    def solve(self, state: CGState, rows: Rows, start: Rows | None = None) -> Solution:
        """Solve for every row.

        Args:
            state: from `init`.
            rows: the right-hand sides.
            start: where to begin; None: at zero.
        """
        b = rows.flat()
        if bad := nonfinite_rows(b):
            return refuse_input(rows, bad, state.system.shift)
        # More than the product itself is accurate to cannot be reached.
        rtol = max(self._tolerance(b.dtype), state.system.operator.product_rounding)
        run = _Run(state, b, rtol, self.patience, self.incomplete)
        x = torch.zeros_like(b) if start is None else start.flat().to(b).clone()
        return run.finish(run.until(x, self.max_steps, started=start is not None))

    def limited_to(self, products: int) -> CG | None:
        return replace(self, max_steps=min(self.max_steps, products)) if products else None

    def _tolerance(self, dtype: torch.dtype) -> float:
        if self.rtol is not None:
            return self.rtol
        return 1e-6 if dtype == torch.float64 else 1e-3


@dataclass
class _Live:
    """The rows still being worked on, packed together. `best` and `since` watch for progress.

    `gains` [n, 4]: by how much the last steps lowered the squared error in the norm of C + D.
    """

    index: Tensor
    x: Tensor
    r: Tensor
    p: Tensor
    rz: Tensor
    claimed: Tensor
    best: Tensor
    since: Tensor
    gains: Tensor

    def keep(self, mask: Tensor) -> _Live:
        return _Live(*(getattr(self, name)[mask] for name in self.__dataclass_fields__))


@dataclass
class _Run:
    """One solve: everything that changes while it runs."""

    state: CGState
    b: Float[Tensor, "n p"]
    rtol: float
    patience: int
    incomplete: str
    norms: Tensor = field(init=False)
    shift: Tensor | float = field(init=False)
    settled_errors: dict[int, float] = field(default_factory=dict)
    """Relative errors, by row, that recent gains told where the bound could not."""
    steps: int = 0
    smallest: float = math.inf
    largest: float = 0.0
    negative: dict[int, float] = field(default_factory=dict)
    outcome: dict[int, Result] = field(default_factory=dict)
    history: list[float] = field(default_factory=list)
    """The largest relative residual after every step, over the rows still being solved."""

    def __post_init__(self) -> None:
        self.norms = self.b.norm(dim=1)
        self.shift = self.state.system.diagonal(self.b)

    def precondition(self, r: Tensor) -> Tensor:
        return r if self.state.preconditioner is None else apply_flat(self.state.preconditioner, r)

    def until(self, x: Tensor, max_steps: int, started: bool) -> Tensor:
        """Run until every row is done or given up; returns the answers [n, P]."""
        r = self.b.clone()
        if started:
            r = self.b - self.state.system.product(x)
            self.steps += 1
        x[self.norms == 0] = 0.0
        live = self._begin(torch.arange(len(x), device=x.device), x, r)
        solved = self._reached(live, live.r) | (self.norms == 0)
        live = self._retire(live, x, current().decided(solved))
        while len(live.index) and self.steps < max_steps:
            self._step(live)
            self.steps += 1
            live = self._settle(live, x)
        if len(live.index):
            self._close(live, x, Result.max_steps_reached)
        return x

    def _begin(
        self, index: Tensor, x: Tensor, r: Tensor, claimed: Tensor | None = None, gains: Tensor | None = None
    ) -> _Live:
        z = self.precondition(r)
        rz = (r * z).sum(1)
        best = r.norm(dim=1)
        fresh = torch.full_like(best, math.inf) if claimed is None else claimed
        gains = best.new_full((len(best), _RECENT), math.inf) if gains is None else gains
        # p is updated in place, and without a preconditioner z is r itself
        return _Live(index, x.clone(), r, z.clone(), rz, fresh, best, torch.zeros_like(best), gains)

    def _reached(self, live: _Live, r: Tensor) -> Tensor:
        """Which rows have a small residual `r`, and for certain a small error."""
        b, smallest = self.b[live.index], self.state.system.shift.smallest
        bound = error_bound(live.x, b, r, smallest) if smallest > 0 else self._recent_error(live, r)
        small: Tensor = r.norm(dim=1) <= self.rtol * self.norms[live.index]
        return small & ((bound <= self.rtol) | (r == 0).all(1))

    def _recent_error(self, live: _Live, r: Tensor) -> Tensor:
        """The relative error before the last steps, by what these gained: too little by what later ones would gain."""
        return (live.gains.sum(1) / energy(live.x, self.b[live.index], r)).sqrt()

    def _step(self, live: _Live) -> None:
        """One step for every live row, in place. Rows that must not step get a zero step."""
        cp = self.state.system.curvature(live.p)
        pp = live.p.square().sum(1)
        pcp = (live.p * cp).sum(1)
        ap = cp + live.p * self.shift
        pap = (live.p * ap).sum(1)
        quotient = pcp / pp
        known = quotient[torch.isfinite(quotient)]
        if len(known):
            self.smallest = min(self.smallest, float(known.min()))
            self.largest = max(self.largest, float(known.abs().max()))
        going = (pap > 0) & (live.rz > 0) & torch.isfinite(pap)
        self._fail_rows(live, ~torch.isfinite(pap), Result.nonfinite_output)
        self._fail_rows(live, torch.isfinite(pap) & ~(live.rz > 0), Result.bad_preconditioner)
        # A quotient of rounding size says nothing about the sign of the curvature.
        below = -10 * torch.finfo(pap.dtype).eps * self.largest
        down = (pap <= 0) & (live.rz > 0)
        self._fail_rows(live, down & (pap / pp < below), Result.negative_curvature, quotient)
        self._fail_rows(live, down & ~(pap / pp < below), Result.stagnated)
        zero = torch.zeros_like(pap)
        alpha = torch.where(going, live.rz / pap, zero)[:, None]
        live.x.addcmul_(alpha, live.p)
        live.r.addcmul_(alpha, torch.where(going[:, None], ap, torch.zeros_like(ap)), value=-1.0)
        z = self.precondition(live.r)
        rz = (live.r * z).sum(1)
        beta = torch.where(going, rz / live.rz, zero)[:, None]
        live.p = torch.addcmul(z, beta, live.p)
        live.gains = torch.cat([live.gains[:, 1:], alpha * live.rz[:, None]], dim=1)
        live.rz = rz

    def _fail_rows(self, live: _Live, bad: Tensor, why: Result, quotient: Tensor | None = None) -> None:
        for position in bad.nonzero().flatten().tolist():
            row = int(live.index[position])
            self.outcome.setdefault(row, why)
            if quotient is not None:
                self.negative[row] = float(quotient[position])

    def _settle(self, live: _Live, x: Tensor) -> _Live:
        """Let go of rows that are done, have failed or are stuck."""
        size = live.r.norm(dim=1)
        self.history.append(float((size / self.norms[live.index]).max()))
        better = size < 0.99 * live.best
        live.best = torch.where(better, size, live.best)
        live.since = torch.where(better, torch.zeros_like(live.since), live.since + 1)
        done = self._reached(live, live.r)
        stuck = live.since >= self.patience
        done, stuck = self._decided(live, done, stuck)
        if self.outcome:
            failed = torch.tensor([int(i) in self.outcome for i in live.index], device=size.device)
            live = self._retire(live, x, failed)
            done, stuck = done[~failed], stuck[~failed]
        return self._verify(live, x, done, stuck) if bool((done | stuck).any()) else live

    def _decided(self, live: _Live, done: Tensor, stuck: Tensor) -> tuple[Tensor, Tensor]:
        """Which rows are done and stuck, and in `outcome` which have failed, as process 0 finds."""
        if current().size == 1:
            return done, stuck
        names = list(Result)
        why = [names.index(self.outcome[i]) + 1 if i in self.outcome else 0 for i in live.index.tolist()]
        first = current().decided(torch.stack([done.long(), stuck.long(), torch.tensor(why).to(done.device)]))
        for i, number in zip(live.index.tolist(), first[2].tolist(), strict=True):
            self.outcome.pop(i, None)
            if number:
                self.outcome[i] = names[number - 1]
        return first[0].bool(), first[1].bool()

    def _verify(self, live: _Live, x: Tensor, done: Tensor, stuck: Tensor) -> _Live:
        """Replace the recursive residual of rows that claim to be done, or stand still, by the true one."""
        asked = live.keep(done | stuck)
        is_done = done[done | stuck]
        b = self.b[asked.index]
        r = b - self.state.system.product(asked.x)
        true, recursive = r.norm(dim=1), asked.r.norm(dim=1)
        reached = self._reached(asked, r)
        # A second claim that is hardly better than the first is rounding, not progress.
        lost = is_done & ~reached & (true > 0.9 * asked.claimed)
        lost |= ~is_done & ~reached & ((true - recursive).abs() > _DRIFT * recursive)
        # Where rounding allows no more, what the last steps gained has to do for the bound.
        recent = self._recent_error(asked, r)
        enough = lost & (true <= self.rtol * self.norms[asked.index]) & (recent <= self.rtol)
        reached, lost, enough = current().decided(torch.stack([reached | enough, lost & ~enough, enough]))
        self.settled_errors |= zip(asked.index[enough].tolist(), recent[enough].tolist(), strict=True)
        for position in lost.nonzero().flatten().tolist():
            self.outcome[int(asked.index[position])] = Result.stagnated
        x[asked.index] = asked.x
        rest = live.keep(~(done | stuck))
        again = ~reached & ~lost & is_done
        waiting = ~reached & ~lost & ~is_done
        parts = [rest]
        if bool(again.any()):
            parts.append(self._begin(asked.index[again], asked.x[again], r[again], true[again], asked.gains[again]))
        if bool(waiting.any()):
            patient = asked.keep(waiting)
            patient.since = torch.zeros_like(patient.since)
            parts.append(patient)
        if len(parts) == 1:
            return rest
        joined = (torch.cat([getattr(p, name) for p in parts]) for name in _Live.__dataclass_fields__)
        return _Live(*joined)

    def _retire(self, live: _Live, x: Tensor, mask: Tensor) -> _Live:
        if not bool(mask.any()):
            return live
        gone = live.keep(mask)
        x[gone.index] = gone.x
        return live.keep(~mask)

    def _close(self, live: _Live, x: Tensor, why: Result) -> None:
        x[live.index] = live.x
        for row in live.index.tolist():
            self.outcome.setdefault(row, why)

    def finish(self, x: Tensor) -> Solution:
        """The true residual of every row, and in words what went wrong with the worst."""
        system = self.state.system
        remainder = self.b - system.product(x)
        residual = relative(remainder.norm(dim=1), self.norms)
        error = self._errors(x, remainder)
        notes: dict[str, Any] = {"damping": system.shift.damping, "rtol": self.rtol}
        notes["residual_history"] = tuple(self.history)
        if math.isfinite(self.smallest):
            notes["smallest_curvature"] = self.smallest
        # Rows cut off in the very step that brought them there have succeeded.
        failed = {
            row: why
            for row, why in self.outcome.items()
            if why not in ENDED_EARLY or not max(float(residual[row]), float(error[row])) <= self.rtol
        }
        value = system.operator.space.rows(x)
        if not failed:
            return Solution(value, residual, Result.successful, self.steps, notes, error=error)
        result = min(failed.values(), key=_GRAVITY.index)
        rows = tuple(sorted(row for row, why in failed.items()))
        detail = self._describe_negative() if result is Result.negative_curvature else ""
        return Solution(value, residual, result, self.steps, notes, rows, detail, self.incomplete, error)

    def _errors(self, x: Tensor, remainder: Tensor) -> Tensor:
        """The relative error of every row in the norm of C + D, at most; by the last gains where there is no bound."""
        smallest = self.state.system.shift.smallest
        error = error_bound(x, self.b, remainder, smallest) if smallest > 0 else x.new_full((len(x),), math.nan)
        for row, recent in self.settled_errors.items():
            error[row] = recent
        return error.double()

    def _describe_negative(self) -> str:
        """Where C bends down, how much, and a lambda above the most negative curvature Lanczos can find."""
        system = self.state.system
        # Of several processes only the first is sure to have met it.
        row, quotient = min(self.negative.items(), key=lambda item: item[1], default=(0, self.smallest))
        ends = estimate_extremes(system.operator, 40, dtype=self.b.dtype, device=self.b.device)
        lowest = min(quotient, ends.smallest, self.smallest)
        return (
            f"In row {row}, p^T C p / p^T p = {quotient:.3g}; the smallest eigenvalue of C is about "
            f"{lowest:.3g}: Absolute({damping_that_works(lowest, ends.largest):.3g}) would do."
        )


# The gravest comes first: it names the whole solve.
_GRAVITY = [
    Result.nonfinite_output,
    Result.bad_preconditioner,
    Result.negative_curvature,
    Result.stagnated,
    Result.max_steps_reached,
]
