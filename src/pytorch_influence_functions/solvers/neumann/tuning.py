"""Step, batch and depth of the Neumann series, from measurements of the system (Klochkov & Liu 2024)."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import astuple, dataclass, field
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from ...core.distributed import current
from ...core.errors import InvalidInput
from ...core.indexing import spread_sample
from ...linalg.lanczos import estimate_extremes, power_iteration
from ...linalg.operator import AbstractOperator, AbstractSampled, AbstractSymmetric, apply_flat
from ...linalg.rows import Rows
from ...linalg.trace import hutchinson_trace
from ..base import System

# The measured largest eigenvalue is a lower bound; this much is added before it sets a step.
SAFETY = 1.1
# Depth in time constants of the weakest direction: its error is exp(-3), 5 %.
DEPTH = 3.0
SMALLEST_BATCH = 16
# Products that measure the ends of the spectrum.
PROBES = 20
# Examples on which a preconditioned step is measured where there are more.
_MEASURED = 2048
# The fewest steps of a preconditioned series.
_FEWEST = 40


@runtime_checkable
class TuningOptions(Protocol):
    """What of the series' options the tuning depends on."""

    @property
    def step(self) -> float | None: ...
    @property
    def steps(self) -> int | None: ...
    @property
    def batch_size(self) -> int | None: ...
    @property
    def seed(self) -> int: ...
    @property
    def momentum(self) -> float: ...


@dataclass(frozen=True)
class Tuning:
    """What was measured, and the step, batch and depth that follow from it.

    `largest`, `smallest` and `trace` are of C, or of M (C + D) when there is a preconditioner M.
    """

    step: float
    steps: int
    batch: int
    largest: float
    smallest: float
    trace: float
    rate: float
    """Decay rate of the weakest direction: its error after t steps is exp(-step * rate * t)."""
    products: int = 0

    def everyones(self) -> Tuning:
        """The tuning of process 0, on every process that shares the work: rounding differs between machines."""
        first = current().broadcast(torch.tensor(astuple(self), dtype=torch.float64), 0).tolist()
        step, steps, batch, largest, smallest, trace, rate, products = first
        return Tuning(step, int(steps), int(batch), largest, smallest, trace, rate, int(products))


@dataclass(frozen=True, eq=False)
class NeumannState:
    """The system, the preconditioner, and the tuning once it has been measured."""

    system: System
    preconditioner: AbstractOperator | None
    known: dict[tuple[torch.dtype, torch.device], Tuning] = field(default_factory=dict)

    def precondition(self, x: Tensor) -> Tensor:
        return x if self.preconditioner is None else apply_flat(self.preconditioner, x)

    @property
    def examples(self) -> int:
        """How many examples can be sampled from; 0 when the operator is whole."""
        operator = self.system.operator
        return operator.examples if isinstance(operator, AbstractSampled) else 0


def apply_sampled(operator: AbstractOperator, rows: Rows, ids: Tensor) -> Rows:
    assert isinstance(operator, AbstractSampled)
    return operator.apply(rows, ids)


def _trace(operator: AbstractOperator, dtype: torch.dtype, device: torch.device) -> tuple[float, int]:
    """trace(C): what the operator knows, or Hutchinson's estimate where it knows nothing."""
    if isinstance(operator, AbstractSymmetric):
        mean = operator.mean_eigenvalue()
        if math.isfinite(mean):
            return mean * operator.size, 0
    return hutchinson_trace(operator, 8, dtype=dtype, device=device), 8


def _batch(options: TuningOptions, examples: int, ratio: float, at_least: int = SMALLEST_BATCH) -> int:
    if not examples:
        return 0
    asked = options.batch_size or max(at_least, math.ceil(ratio))
    return min(asked, examples)


def bends_down(plan: Tuning, state: NeumannState, dtype: torch.dtype) -> bool:
    """Whether C + D has a negative eigenvalue for certain: only rounding takes Lanczos below the true one."""
    return plan.smallest + state.system.shift.smallest < -10 * torch.finfo(dtype).eps * abs(plan.largest)


def _check_measured(*numbers: float) -> None:
    if not all(math.isfinite(v) for v in numbers):
        raise InvalidInput("The curvature's products are not finite, so no step can be measured.")


def measure(options: TuningOptions, state: NeumannState, dtype: torch.dtype, device: torch.device) -> Tuning:
    """theory §6.3: the contraction needs 1 / step > largest + D + trace / batch."""
    operator, shift = state.system.operator, state.system.shift
    largest, smallest = estimate_extremes(operator, PROBES, options.seed, dtype=dtype, device=device)
    trace, cost = _trace(operator, dtype, device)
    _check_measured(largest, smallest, trace)
    size = max(largest, abs(smallest))
    # A Hessian's trace can be small or negative by cancellation, which says nothing about its noise.
    trace = max(trace, size)
    batch = _batch(options, state.examples, trace / size if size > 0 else 1.0)
    noise = trace / batch if 0 < batch < state.examples else 0.0
    whole = 1.0 / (SAFETY * (size + shift.largest + noise))
    step = options.step or (1.0 - options.momentum) * whole
    rate = shift.smallest
    steps = options.steps or math.ceil(DEPTH * (1.0 - options.momentum) / (step * rate))
    return Tuning(step, steps, batch, largest, smallest, trace, rate, min(PROBES, operator.size) + cost)


def measure_preconditioned(
    options: TuningOptions, state: NeumannState, dtype: torch.dtype, device: torch.device
) -> Tuning:
    """The same for M (C + D), whose spectrum is real and positive but which is not symmetric."""
    system, p, budget = state.system, state.system.operator.size, PROBES
    generator = torch.Generator().manual_seed(options.seed)
    # Where a full product is out of reach, some examples stand for all: fewer only raise the largest eigenvalue.
    some = spread_sample(state.examples, _MEASURED) if state.examples > _MEASURED else None

    def probe(n: int) -> Tensor:
        return torch.randn(n, p, generator=generator, dtype=torch.float64).to(device=device, dtype=dtype)

    def power(f: Callable[[Tensor], Tensor]) -> float:
        return power_iteration(f, probe(1), budget)

    def curved(v: Tensor) -> Tensor:
        return (
            system.curvature(v)
            if some is None
            else apply_sampled(system.operator, system.operator.space.rows(v), some).flat()
        )

    def full(v: Tensor) -> Tensor:
        return state.precondition(curved(v) + v * system.diagonal(v))

    largest = power(full)
    smallest = largest - power(lambda v: largest * v - full(v))
    z = probe(8)
    trace = max(float((z * state.precondition(curved(z))).sum()) / 8, largest)
    _check_measured(largest, smallest, trace)
    # All directions converge at about one rate here, so few steps remain to average the noise of small
    # batches.
    batch = _batch(options, state.examples, trace / largest, 8 * SMALLEST_BATCH)
    noise = trace / batch if 0 < batch < state.examples else 0.0
    step = options.step or (1.0 - options.momentum) / (SAFETY * (largest + noise))
    # Power iteration may miss the weakest direction; a preconditioner that bad is not assumed.
    rate = max(smallest, 0.05 * largest)
    steps = options.steps or max(_FEWEST, math.ceil(DEPTH * (1.0 - options.momentum) / (step * rate)))
    whole = 2 * budget + 8
    products = whole if some is None else math.ceil(whole * len(some) / state.examples)
    return Tuning(step, steps, batch, largest, smallest, trace, rate, products)
