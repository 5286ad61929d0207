"""The Neumann series on random batches: LiSSA (Agarwal et al. 2017; Koh & Liang 2017), tuned by measurement.

The paper's recursion `h <- v + (1 - d) h - H_B h / s` is this one with step 1/s, lambda = d s and x = h / s.
It is stochastic gradient descent on x^T (C + D) x / 2 - b^T x, whose rate and stability follow from the
largest eigenvalue and the trace of C alone (Klochkov & Liu 2024).
"""

from __future__ import annotations

import enum
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from ...core.distributed import current
from ...core.errors import InvalidInput
from ...core.validate import choice, finite_number, whole_number
from ...curvature.base import AbstractCurvature
from ...curvature.cost import Cost, ProblemSize
from ...linalg.operator import AbstractOperator
from ...linalg.rows import Rows
from ...linalg.shift import Shift
from ..base import (
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
from ..energy import error_bound
from .tuning import (
    DEPTH,
    PROBES,
    SAFETY,
    SMALLEST_BATCH,
    NeumannState,
    Tuning,
    apply_sampled,
    bends_down,
    measure,
    measure_preconditioned,
)

# Steps between two looks at the norm: each look costs a synchronisation on a GPU.
_LOOK = 10


class Start(enum.Enum):
    """Where the series starts."""

    B = "b"
    """At step * M b, as the paper does: zero with the first step taken."""
    SOLVED = "solved"
    """At M b, the preconditioner's own answer."""


@dataclass(frozen=True, repr=False)
class Neumann(AbstractSolver[NeumannState]):
    """x <- x + step * M (b - (C_B + D) x) on random batches B, all rows at once.

    What is left None is measured, on the first solve (20 products of Lanczos, and the operator's own trace):
    `batch = max(16, ceil(trace / largest))`, `1 / step = 1.1 (largest + D + trace / batch)`,
    `steps = ceil(3 / (step * D))`. With a batch of all examples, or an operator that cannot be sampled,
    every product is the full one and the trace term is dropped.

    **Stops early** when, over a window of k steps (a quarter of the weakest direction's time constant), the
    estimate moved by no more than `tolerance * (exp(step * D * k) - 1)` of its norm: with full products the
    remaining error is then at most `tolerance`. The estimate is the last iterate; with random batches and a
    measured step, the mean over the last windows. With random batches and a step of the user's own the iterate goes on
    moving, and it stops when what is left of its start is at most `tolerance`: later iterates are other draws of the
    same noise. `repeats` runs with different batches are averaged.

    A row fails when it is no closer to the answer than zero is, in the norm of C + D: depth is a choice here. The true
    residual is judged only where `rtol` is given: random batches keep it large in strong directions even where the
    answer is good.

    Args:
        step: the step; 1 / scale in the paper's words.
        steps: how many: the depth of the recursion.
        batch_size: examples per batch.
        repeats: runs with different batches, which are averaged.
        seed: of the batches.
        tolerance: how far from settled the series may stop early; 0 runs every step.
        start: `Start.B`, the paper's, or `Start.SOLVED`, the preconditioner's own answer.
        rtol: the largest true relative residual; `None`: a row need only be closer to the answer than zero is.
        momentum: the share of the last move that is kept (heavy ball); a measured step is lowered to (1 - momentum) of
            itself, so that a move as a whole stays as long.
        halve_every: the step is halved every so many steps, which lets the noise of random batches die away: with a
            preconditioner and `start="solved"` this is ASTRA.
        incomplete: what becomes of rows that miss `rtol`: `"warn"` hands back what was reached, with an
            `IncompleteSolveWarning` and a bad mark in the diagnostics; `"error"` raises `SolveFailed`.

    >>> state = Neumann(step=1 / 25, steps=5000, batch_size=1).init(operator, Shift(0.01))  # doctest: +SKIP
    >>> Neumann().solve(Neumann().init(operator, Shift(0.01)), rows).unwrap()  # doctest: +SKIP
    """

    step: float | None = None
    steps: int | None = None
    batch_size: int | None = None
    repeats: int = 1
    seed: int = 0
    tolerance: float = 1e-3
    start: Start | str = Start.B
    rtol: float | None = None
    momentum: float | int = 0.0
    halve_every: int | None = None
    incomplete: str = "warn"
    vectors_held: ClassVar[int] = 5

    def __post_init__(self) -> None:
        for name in ("step", "rtol"):
            if getattr(self, name) is not None:
                finite_number(name, getattr(self, name), above=0, owner=self)
        for name in ("steps", "batch_size", "halve_every"):
            if getattr(self, name) is not None:
                whole_number(name, getattr(self, name), owner=self)
        whole_number("repeats", self.repeats, owner=self)
        finite_number("tolerance", self.tolerance, least=0, owner=self, hint="0 runs every step")
        finite_number("momentum", self.momentum, least=0, below=1, owner=self, hint="0.9 is usual")
        if not isinstance(self.start, Start):
            choice("start", self.start, [start.value for start in Start], owner=self)
        check_incomplete("Neumann", self.incomplete)

    def cost(self, size: ProblemSize, curvature: AbstractCurvature, guided: bool = False) -> Cost:
        # The strongest direction sets the step and the weakest the depth; noise of the batches halves the step.
        depth = DEPTH * SAFETY * (1 + 2 * size.top_eigenvalue / (5.0 if guided else 1.0))
        steps = self.steps or depth
        share = min(1.0, (self.batch_size or SMALLEST_BATCH) / size.examples)
        products = curvature.product_cost(size, size.n_queries)
        tuned = Cost() if self.step is not None and self.steps is not None else curvature.product_cost(size, PROBES)
        form = self.form(curvature)
        return curvature.cost(size, form) + tuned + products.repeated(1 + self.repeats * steps * share)

    def init(
        self, operator: AbstractOperator, shift: Shift, preconditioner: AbstractOperator | None = None
    ) -> NeumannState:
        state = NeumannState(System.of(operator, shift), preconditioner)
        if self.batch_size is not None and not state.examples:
            raise InvalidInput(
                f"{type(operator).__name__} is not a mean over examples that can be sampled; leave batch_size unset."
            )
        if shift.smallest <= 0 and self.steps is None:
            raise InvalidInput(
                "Neumann() takes its depth from the damping, which is 0 here; give a positive damping or `steps`."
            )
        return state

    def tuning(self, state: NeumannState, dtype: torch.dtype, device: torch.device) -> Tuning:
        """Step, batch and depth; measured once per state.

        Args:
            state: from `init`.
            dtype: of the rows.
            device: where the rows are.
        """
        key = (dtype, device)
        if key not in state.known:
            tune = measure if state.preconditioner is None else measure_preconditioned
            state.known[key] = tune(self, state, dtype, device)
        return state.known[key]

    def solve(self, state: NeumannState, rows: Rows) -> Solution:
        b = rows.flat()
        if bad := nonfinite_rows(b):
            return refuse_input(rows, bad, state.system.shift)
        fixed = self.step is not None and self.steps is not None
        if self.step is not None and self.steps is not None and (self.batch_size or not state.examples):
            rate = state.system.shift.smallest
            batch = min(self.batch_size or 0, state.examples)
            plan = Tuning(self.step, self.steps, batch, math.nan, math.nan, math.nan, rate)
        else:
            plan = self.tuning(state, b.dtype, b.device).everyones()
        measured = not fixed and state.preconditioner is None
        if measured and current().decides(bends_down(plan, state, b.dtype)):
            return self._negative(state, rows, b, plan)
        run = _Series(self, state, plan, b)
        total = torch.zeros_like(b)
        for repeat in range(self.repeats):
            x = run.once(self.seed + repeat)
            if run.grew:
                return self._diverged(state, x, b, run)
            total.add_(x, alpha=1.0 / self.repeats)
        return self._finish(state, total, b, run)

    def _notes(self, state: NeumannState, plan: Tuning) -> dict[str, Any]:
        notes: dict[str, Any] = {"damping": state.system.shift.damping, "step": plan.step}
        notes |= {"batch_size": plan.batch, "depth": plan.steps}
        if state.preconditioner is None and math.isfinite(plan.largest):
            notes |= {
                "largest_curvature": plan.largest,
                "smallest_curvature": plan.smallest,
                "trace": plan.trace,
            }
        return notes

    def _finish(self, state: NeumannState, x: Tensor, b: Tensor, run: _Series) -> Solution:
        product = state.system.product(x)
        residual = relative((product - b).norm(dim=1), b.norm(dim=1))
        notes = self._notes(state, run.plan) | {"stopped_early": run.early}
        value = state.system.operator.space.rows(x)
        steps = run.taken + run.plan.products
        if bad := nonfinite_rows(residual):
            return Solution(value, residual, Result.nonfinite_output, steps, notes, bad)
        # |x - x*|_A >= |x*|_A in the norm of A = C + D: no closer than zero is
        useless = ((x * product).sum(1) >= 2 * (x * b).sum(1)) & (b != 0).any(1)
        rough = useless if self.rtol is None else residual > self.rtol
        result, wrong = (Result.unsettled, useless) if bool(useless.any()) else (Result.max_steps_reached, rough)
        failed = tuple(int(i) for i in wrong.nonzero().flatten())
        smallest = state.system.shift.smallest
        error = error_bound(x, b, b - product, smallest).double() if smallest > 0 else None
        if not failed:
            return Solution(value, residual, Result.successful, steps, notes, error=error)
        return Solution(value, residual, result, steps, notes, failed, incomplete=self.incomplete, error=error)

    def _negative(self, state: NeumannState, rows: Rows, b: Tensor, plan: Tuning) -> Solution:
        """Growth is certain whatever the depth: say so before spending it."""
        x = torch.zeros_like(b)
        detail = (
            f"The smallest eigenvalue of C is about {plan.smallest:.3g}, below minus the damping: "
            f"Absolute({damping_that_works(plan.smallest, plan.largest):.3g}) would do."
        )
        residual = state.system.residual(x, b)
        everything = tuple(range(len(rows)))
        value = state.system.operator.space.rows(x)
        notes = self._notes(state, plan)
        return Solution(value, residual, Result.negative_curvature, plan.products, notes, everything, detail)

    def _diverged(self, state: NeumannState, x: Tensor, b: Tensor, run: _Series) -> Solution:
        """Measure what the step should have been, or find the negative curvature that no step survives."""
        system = state.system
        residual = system.residual(x, b)
        failed = tuple(int(i) for i in (~(residual < 1.0)).nonzero().flatten()) or tuple(range(len(b)))
        value, notes = system.operator.space.rows(x), self._notes(state, run.plan)
        automatic = Neumann(batch_size=self.batch_size, steps=run.plan.steps)
        try:
            measured = automatic.tuning(NeumannState(system, state.preconditioner), b.dtype, b.device)
        except InvalidInput as cause:
            return Solution(value, residual, Result.nonfinite_output, run.taken, notes, failed, str(cause))
        if state.preconditioner is None and current().decides(bends_down(measured, state, b.dtype)):
            negative = self._negative(state, system.operator.space.rows(b), b, measured)
            return Solution(value, residual, negative.result, run.taken, notes, failed, negative.detail)
        detail = (
            f"The step was {run.plan.step:.3g} (scale {1 / run.plan.step:.3g}); "
            f"with batches of {measured.batch or 'all'}, step={measured.step:.3g} "
            f"(scale {1 / measured.step:.3g}) is stable: "
            f"largest eigenvalue {measured.largest:.3g}, trace {measured.trace:.3g}."
        )
        notes["step_that_works"] = measured.step
        return Solution(value, residual, Result.diverged, run.taken, notes, failed, detail)


@dataclass
class _Series:
    """One solve's moving parts."""

    options: Neumann
    state: NeumannState
    plan: Tuning
    b: Float[Tensor, "n p"]
    taken: int = 0
    early: bool = False
    grew: bool = False

    def _batches(self, seed: int) -> Callable[[], Tensor | None]:
        """Batches without replacement, reshuffled when used up; None stands for all examples."""
        examples, size = self.state.examples, self.plan.batch
        if not size or size >= examples:
            return lambda: None
        generator = torch.Generator().manual_seed(seed)
        order, start = torch.randperm(examples, generator=generator), 0

        def draw() -> Tensor:
            nonlocal order, start
            if start + size > examples:
                order, start = torch.randperm(examples, generator=generator), 0
            start += size
            return order[start - size : start]

        return draw

    def _begin(self) -> Tensor:
        first = self.state.precondition(self.b)
        return first.clone() if Start(self.options.start) is Start.SOLVED else first * self.plan.step

    def once(self, seed: int) -> Tensor:
        """One run of the series; sets `grew` when it diverges. A row that has settled stays as it is."""
        plan, draw, x = self.plan, self._batches(seed), self._begin()
        watch, bound, answer = _Watch.of(self, x), self._bound(x), x.clone()
        moved = torch.zeros_like(x) if self.options.momentum else None
        rows, b = torch.arange(len(x), device=x.device), self.b
        for t in range(1, plan.steps + 1):
            self._advance(x, b, watch.forgetting, moved, draw(), t)
            self.taken += 1
            if t % _LOOK == 0 or t == plan.steps:
                self.grew = bool(current().decided(~(x.norm(dim=1) <= bound[rows]).all()))
                if self.grew:
                    answer[rows] = x
                    return answer
            settled = watch.settled(x, t)
            if settled is None or not bool((settled := current().decided(settled)).any()):
                continue
            answer[rows[settled]] = watch.estimate(x)[settled]
            going = ~settled
            rows, x, b, moved = rows[going], x[going], b[going], None if moved is None else moved[going]
            watch.keep(going)
            if not len(rows):
                self.early = t < plan.steps
                return answer
        answer[rows] = watch.estimate(x)
        return answer

    def _advance(
        self, x: Tensor, b: Tensor, forgetting: Tensor | None, moved: Tensor | None, ids: Tensor | None, t: int
    ) -> None:
        """One step of the series, in place, and of the difference that is to be forgotten: without b."""
        plan, operator, n = self.plan, self.state.system.operator, len(x)
        stacked = operator.space.rows(x if forgetting is None else torch.cat([x, forgetting]))
        product = (operator.apply(stacked) if ids is None else apply_sampled(operator, stacked, ids)).flat()
        shift = self.state.system.diagonal(self.b)
        if self.plain:
            keep = 1.0 - shift * plan.step
            x.mul_(keep).add_(b, alpha=plan.step).sub_(product[:n], alpha=plan.step)
            if forgetting is not None:
                forgetting.mul_(keep).sub_(product[n:], alpha=plan.step)
            return
        z = self.state.precondition(b - product - x * shift)
        step = plan.step * 0.5 ** ((t - 1) // (self.options.halve_every or plan.steps))
        if moved is None:
            x.add_(z, alpha=step)
        else:
            x.add_(moved.mul_(self.options.momentum).add_(z, alpha=step))

    @property
    def plain(self) -> bool:
        """Whether every step is the paper's: no preconditioner, no momentum, no halving."""
        return self.state.preconditioner is None and not self.options.momentum and not self.options.halve_every

    def _bound(self, x: Tensor) -> Tensor:
        """No stable run leaves this ball: the answer is at most |b| / D long, and errors only shrink.

        Preconditioned, errors shrink in another norm, so room is left for that; a D of 0 leaves only
        overflow.
        """
        d = self.state.system.shift.smallest
        room = 10.0 if self.state.preconditioner is None else 1e3
        if d <= 0:
            return torch.full_like(self.b[:, 0], torch.finfo(self.b.dtype).max ** 0.5)
        radius: Tensor = room * (self.b.norm(dim=1) / d + x.norm(dim=1))
        return radius


@dataclass
class _Watch:
    """Decides when the running estimate has settled, and what it is: the iterate, or its mean over a tail.

    With random batches and a measured step the estimate is the mean over windows of a quarter time constant
    each, of which the last three make the answer: their noise averages out, at the price of 7 % instead of 5
    % left in the very weakest direction. With a step of the user's own, or full products, it is the iterate
    itself, row by row.

    With random batches and a step of the user's own the iterate never comes to rest. It has settled when it has
    forgotten where it started. Of two runs on the same batches from two starts the difference obeys the recursion
    without b, whatever the noise; it is carried along (`forgetting`), from the first step `step * b`, where the room it
    takes is likely to pay: where the tolerance is due in half the steps or fewer.
    """

    tolerance: float
    reach: float
    """The share of its error that the weakest direction loses in a step."""
    window: int
    averaged: bool
    before: Tensor
    """What the next window is compared with: the estimate, or the norms of the difference."""
    sum: Tensor
    forgetting: Tensor | None = None
    means: list[Tensor] = field(default_factory=list)

    @staticmethod
    def of(series: _Series, x: Tensor) -> _Watch:
        """The watch over one run that starts at `x`."""
        options, plan = series.options, series.plan
        reach = plan.step * plan.rate / (1.0 - options.momentum)
        window = max(_LOOK, math.ceil(0.25 / reach)) if reach > 0 else plan.steps + 1
        noisy = 0 < plan.batch < series.state.examples
        if noisy and options.step is None:
            return _Watch(options.tolerance, reach, window, True, x.clone(), torch.zeros_like(x))
        due = -math.log(options.tolerance) / reach if reach > 0 and 0 < options.tolerance < 1 else math.inf
        if noisy and series.plain and 2 * due < plan.steps:
            return _Watch(options.tolerance, reach, window, False, x.norm(dim=1), x, x.clone())
        return _Watch(options.tolerance, reach, window, False, x.clone(), x)

    def settled(self, x: Tensor, t: int) -> Tensor | None:
        """Which rows moved, over the last window, by no more than the tolerance allows; None inside a window."""
        if self.averaged:
            self.sum.add_(x)
        if t % self.window:
            return None
        if self.forgetting is not None:
            return self._forgotten(self.forgetting, x)
        now = x
        if self.averaged:
            now = self.sum / self.window
            self.means = [*self.means[-2:], now]
            self.sum.zero_()
        moved = (now - self.before).norm(dim=1)
        self.before = now if self.averaged else now.clone()
        settled: Tensor = moved <= self.tolerance * math.expm1(min(self.reach * self.window, 50.0)) * now.norm(dim=1)
        return settled.all().expand_as(settled) if self.averaged else settled

    def _forgotten(self, difference: Tensor, x: Tensor) -> Tensor:
        """Where the difference that is left, and all that it would still add to the series, is within the tolerance.

        It shrinks at least as fast as `exp(-reach)` a step where the curvature is semidefinite; where it was seen to
        shrink more slowly, that rate counts.
        """
        size = difference.norm(dim=1)
        seen = (self.before / size).log() / self.window
        self.before = size
        left = size / torch.expm1(seen.clamp(0.0, self.reach))
        forgotten: Tensor = (size == 0) | (left <= self.tolerance * x.norm(dim=1))
        return forgotten

    def keep(self, going: Tensor) -> None:
        """Forget the rows that have settled."""
        self.before = self.before[going]
        if self.forgetting is not None:
            self.forgetting = self.forgetting[going]

    def estimate(self, x: Tensor) -> Tensor:
        return torch.stack(self.means).mean(0) if self.means else x
