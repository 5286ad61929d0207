"""Methods made for choosing data: they follow what the optimiser does with a gradient, and rank by direction."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, final

import torch
from jaxtyping import Float
from torch import Tensor

from ..core.distributed import World, current
from ..core.errors import InvalidInput
from ..curvature.base import Budget
from ..curvature.exact import EmpiricalFisher
from ..damping.rules import AbstractDamping
from ..gradients.per_example import Derivatives
from ..gradients.projections import AbstractReduction, Rescaled
from ..influence.agreement import Units
from ..influence.assumptions import StationarityCheck
from ..influence.attribution import Influence
from ..influence.averaging import CheckpointAverage
from ..influence.checks import check_problem
from ..influence.method import AbstractMethod
from ..influence.run_attribution import RunAttribution
from ..influence.scoring import QUERY_SHARE, ScoringPass, grouped, self_influence_rows
from ..problem.agreement import entry
from ..problem.checkpoints import at_checkpoint
from ..problem.model_state import plain_autograd
from ..problem.problem import Problem
from ..problem.working_precision import in_working_precision
from ..scaling.relative import Whitened, invert
from ..trajectory.recording import Recording, RunLike
from ..trajectory.segments import AdamState
from .projected import sketched


def trackstar(
    adam: AdamState | RunLike,
    k: int | None = None,
    per_layer: bool = True,
    damping: AbstractDamping | float | None = None,
    seed: int = 0,
    projection: AbstractReduction | None = None,
) -> Influence:
    r"""TrackStar: the cosine of gradients that Adam rescaled, a projection shortened and their second moment whitened.

    phi = P^T (grad / (sqrt(v) + eps)) with Adam's second moments v and a random P; R = mean of phi_i phi_i^T + lambda;

        score[q, i] = (1/N) phi_q^T R^-1 phi_i / (|R^-1/2 phi_q| |R^-1/2 phi_i|)

    A ranking between -1/N and 1/N. The original mixes the second moment of a task's gradients into R; here R is that of
    the training data alone.

    Args:
        adam: `trajectory.AdamState`, or a recorded run of Adam, whose last second moments are taken.
        k: dimensions of the projection; `None`: 2,048.
        per_layer: give every layer its own k dimensions and its own R, as in the paper; then sizes of queries and
            examples are measured over all layers together.
        damping: lambda: `Relative(share)` of the mean eigenvalue, `Absolute(value)` or a number; `None`:
            `Relative(0.1)`, and `Relative(3.0)` with `per_layer`.
        seed: of the projection.
        projection: instead of k and seed, as for `trak()`.

    Cost: as `trak()`, and one solve per training example.
    Reference: Chang et al. (2024), "Scalable Influence and Fact Tracing for Large Language Model Pretraining".
    Identity: equals the dense formula in float64.
    """
    state = adam if isinstance(adam, AdamState) else Recording.open(adam).adam_state()
    # A weight that never had a gradient has nothing to say of any example, and would weigh 1 / eps.
    scales = {
        name: torch.where(v > 0, 1.0 / (v.double().sqrt() + state.eps), 0.0).detach()
        for name, v in state.second_moments.items()
    }
    reduction, solver = sketched("trackstar", k, per_layer, seed, projection)
    return Influence(EmpiricalFisher(), solver, damping, projection=Rescaled(reduction, scales), scaling=Whitened())


def less(run: RunLike, memory: Budget | int | str | None = None, projection: AbstractReduction | None = None) -> Less:
    r"""LESS: the cosine between a query's gradient and the step that Adam would take on a training example alone.

        score[q, i] = sum_c eta_c cos(grad m(q), Gamma_i)  at checkpoint c,
        Gamma_i = grad loss(i) / (sqrt(v_i) + eps),   v_i = (beta2 v + (1 - beta2) (grad loss(i))^2) / correction

    eta_c is the mean learning rate of the stretch that checkpoint c ends. A ranking for choosing training data that
    help the queries, not a prediction of changes: positive = helpful for a loss. The first moments, which are the same
    for all examples, are left out; the original keeps them.

    Args:
        run: a recorded run of Adam or AdamW, as `along` takes it.
        memory: the most that queries may take: bytes or words such as `"8GB"`; `None`: 4 GiB.
        projection: what both sides are projected with before the cosine, such as `ptif.gradients.Sketch(8192)`, as many
            numbers as the original keeps: for many queries of a large model; `None`: the exact cosine.

    Cost: one epoch per checkpoint, with all gradients written out.
    Reference: Xia et al. (2024), "LESS: Selecting Influential Data for Targeted Instruction Tuning".
    Identity: equals the formula on one-example autograd gradients in float64.
    """
    return Less(Recording.open(run), Budget() if memory is None else memory, projection)


@final
@dataclass(frozen=True, eq=False, repr=False)
class Less(AbstractMethod):
    """See `less`.

    Args:
        run: the recorded run.
        memory: the most that queries may take.
        projection: what gradients and steps are projected with; None: nothing.
    """

    run: Recording
    memory: Budget | int | str = field(default_factory=Budget)
    projection: AbstractReduction | None = None

    def __post_init__(self) -> None:
        if self.projection is not None and not isinstance(self.projection, AbstractReduction):
            raise InvalidInput(f"projection= must be a projection such as Sketch(8192), got {self.projection!r}.")
        object.__setattr__(self, "memory", Budget.of(self.memory))
        for position in range(len(self.run)):
            group = self.run.recorded[position].groups[:1]
            if not group or group[0].beta2 is None or self.run.recorded[position].second_moments is None:
                raise InvalidInput(
                    f"LESS follows Adam's steps, and at step {self.run.steps[position]:,} no second moments were "
                    "recorded; record an Adam or AdamW training with ptif.Recorder, or use ptif.methods.grad_cos()."
                )

    def __repr__(self) -> str:
        projected = "" if self.projection is None else f", projection={self.projection!r}"
        return f"less({self.run!r}{projected})"

    def __fingerprint__(self) -> tuple[Any, ...]:
        """What results depend on."""
        return (self.run.recorded, self.projection)

    @plain_autograd()
    def fit(self, problem: Problem, n_queries: int = 1) -> FittedLess:
        """Look at the model; nothing else is done before there are queries.

        Args:
            problem: model, loss and training data.
            n_queries: not used.

        Raises:
            InvalidInput: the problem has checkpoints of its own, or learning rates differ between parameter groups.
        """
        start = time.perf_counter()
        check_problem(problem)
        problem = in_working_precision(problem)
        if problem.checkpoints:
            raise InvalidInput(
                f"less() takes its checkpoints from the run and the problem has {len(problem.checkpoints)} of its own; "
                "leave checkpoints= out."
            )
        with at_checkpoint(problem.model, self.run.checkpoints[-1]):
            derivatives = Derivatives.of(problem)
            stationarity = StationarityCheck.of(derivatives)
        seconds = time.perf_counter() - start
        projected = derivatives if self.projection is None else derivatives.with_projection(self.projection)
        return FittedLess(self, problem, derivatives, stationarity, seconds, projected, self.run.learning_rates)


@final
@dataclass(frozen=True, eq=False)
class FittedLess(RunAttribution):
    """`less` with a problem: a number is positive where a step on the example lowers the measure.

    Attributes:
        projected: the derivatives, of the rows whose cosines are taken.
        rates: eta by checkpoint.
    """

    spec: Less
    projected: Derivatives
    rates: tuple[float, ...]

    def _add_scores(self, scoring: ScoringPass) -> tuple[str, ...]:
        """A row of several queries is one direction."""
        n, rows_asked = len(self.problem), len(scoring.question)
        average = CheckpointAverage(Units.RAW, self.rates, rows_asked, n, World())
        for moments in self._checkpoints():
            for query_ids, rows in scoring.query_groups(self.projected, self._room(self.projected)):
                unit = _unit(rows.flat())
                for ids, steps in self._steps(moments):
                    average.add(query_ids, ids, unit @ steps.T)
            average.end_checkpoint()
        scoring.add(torch.arange(rows_asked), torch.arange(n), average.result())
        return (
            f"asked along the training run: {self.spec.run.describe()}",
            "gradients and Adam's steps are divided by their length (LESS): a ranking, not predicted changes",
        )

    def _facts(self) -> dict[str, Any]:
        return {"members": len(self.rates), "approximation": "cosines with Adam's steps"}

    @entry
    def self_influence(self) -> Float[Tensor, " n"]:
        """Every training example's number on itself, shape [N]."""
        own = torch.zeros(len(self.problem), dtype=torch.float64)
        for rate, moments in zip(self.rates, self._checkpoints(), strict=True):
            room = self._room(self.derivatives)
            for ids, rows in grouped(self_influence_rows(self.derivatives, room), room):
                flat = rows.flat()
                products = self._direction(flat) * self._direction(moments.direction(flat))
                own[ids] += rate * products.sum(1).double().cpu()
        return self.problem.data.spread(current().sum_into(own))

    # ---------------------------------------------------------------- inner workings

    def _checkpoints(self) -> Iterator[_Moments]:
        """Adam's moments at every checkpoint, the model holding its weights."""
        for position, recorded in enumerate(self.spec.run.recorded):
            with at_checkpoint(self.problem.model, recorded.weights):
                yield _Moments.of(self.spec.run, position, self.derivatives)

    def _steps(self, moments: _Moments) -> Iterator[tuple[Tensor, Float[Tensor, "n p"]]]:
        """(training ids, unit directions of Adam's steps on each alone)."""
        for gradients in self.derivatives.stream(label="scoring", world=World()):
            yield gradients.ids, self._direction(moments.direction(gradients.rows.flat()))

    def _direction(self, flat: Float[Tensor, "n p"]) -> Float[Tensor, "n k"]:
        """Every row divided by its length, after the projection if there is one."""
        projector = self.projected.projector
        return _unit(flat if projector is None else projector.apply(self.derivatives.space.rows(flat)).flat())

    def _room(self, derivatives: Derivatives) -> int:
        each = derivatives.space.size * 8
        return max(1, int(Budget.of(self.spec.memory).bytes * QUERY_SHARE / each))


@final
@dataclass(frozen=True, eq=False)
class _Moments:
    """What Adam divides a gradient by at one checkpoint."""

    second: Float[Tensor, " p"]
    beta2: float
    correction: float
    eps: float

    @staticmethod
    def of(run: Recording, position: int, derivatives: Derivatives) -> _Moments:
        recorded, state = run.recorded[position], run.adam_state(position)
        beta2 = recorded.groups[0].beta2
        assert beta2 is not None, "seen when the method was made"
        space = derivatives.space
        # Recorded corrected for their start at 0; here as Adam holds them.
        second = (state.denominators(space).flat()[0] - state.eps).square() * (1.0 - beta2**recorded.step)
        like = space.like(derivatives.problem.model)
        return _Moments(second.to(like), beta2, 1.0 - beta2 ** (recorded.step + 1), float(state.eps))

    def direction(self, gradients: Float[Tensor, "n p"]) -> Float[Tensor, "n p"]:
        """Adam's step on each gradient alone, without the first moments."""
        second = (self.beta2 * self.second + (1.0 - self.beta2) * gradients.square()) / self.correction
        return gradients / (second.sqrt() + self.eps)


def _unit(flat: Float[Tensor, "n p"]) -> Float[Tensor, "n p"]:
    """Every row divided by its length; a row of zeros stays one."""
    return flat * invert(flat.double().norm(dim=1)).to(flat)[:, None]
