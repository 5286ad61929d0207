"""Exact unrolling: the derivative of one training run in the weight on each of its examples."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, final

import torch
from jaxtyping import Float
from torch import Tensor

from ..core.distributed import current
from ..core.errors import InvalidInput, first_line
from ..core.progress import track
from ..core.validate import finite_number, whole_number
from ..curvature.base import Budget
from ..gradients.per_example import Derivatives
from ..gradients.products import Products
from ..influence.assumptions import StationarityCheck
from ..influence.checks import check_problem
from ..influence.method import AbstractMethod
from ..influence.question import Question
from ..influence.run_attribution import RunAttribution
from ..influence.scoring import QUERY_SHARE, ScoringPass, grouped, self_influence_rows
from ..linalg.rows import Rows
from ..problem.agreement import entry
from ..problem.model_state import plain_autograd
from ..problem.problem import Problem
from ..problem.working_precision import in_working_precision
from .metasmoothness import Metasmoothness, measure_metasmoothness
from .replay import Replayable, Runner
from .update_rules import Weights

# The share of the memory budget that weights along the run may take.
_STATES_SHARE = 0.5
# How far from the model's weights the run may end, as a share of the way it went.
_SAME = 0.05
# Below this metasmoothness exact derivatives did not predict removals on some of the networks that were tried.
_SMOOTH = 0.5


@final
@dataclass(frozen=True, eq=False, repr=False)
class Unrolled(AbstractMethod):
    """The exact derivative of one training run; see `unrolled`.

    Args:
        run: a `Replay`, or an `evaluation.Recipe`.
        seed: of a recipe's weights and order.
        least_smoothness: below this metasmoothness `fit` refuses.
        memory: the most bytes that queries and weights along the run may take.
    """

    run: Replayable
    seed: int = 0
    least_smoothness: float = _SMOOTH
    memory: Budget | int | str = field(default_factory=Budget)

    def __post_init__(self) -> None:
        given: Any = self.run
        if not isinstance(given, Replayable) or isinstance(given, type):
            raise InvalidInput(
                "unrolled() takes a run that can be repeated: an evaluation.Recipe, or trajectory.Replay(start, "
                f"batches, optimizer), got {type(given).__name__}; a recording holds too few of its steps, use "
                "ptif.methods.along(run) with it."
            )
        whole_number("seed", self.seed, 0, owner="unrolled")
        finite_number("least_smoothness", self.least_smoothness, least=-1, most=1, owner="unrolled")
        object.__setattr__(self, "memory", Budget.of(self.memory))

    def __repr__(self) -> str:
        seed = f", seed={self.seed}" if self.seed else ""
        return f"unrolled({self.run!r}{seed})"

    @plain_autograd()
    def fit(self, problem: Problem, n_queries: int = 1) -> UnrolledAttribution:
        """Train three times: as it was, and for its metasmoothness.

        Args:
            problem: model, loss and training data.
            n_queries: not used.

        Raises:
            InvalidInput: the run cannot be repeated, does not end at the model's weights, or is not smooth.
            NonFinite: it diverges.
        """
        start = time.perf_counter()
        check_problem(problem)
        problem = in_working_precision(problem)
        if problem.checkpoints:
            raise InvalidInput(
                f"unrolled() follows its run and the problem has {len(problem.checkpoints)} checkpoints of its own; "
                "leave checkpoints= out."
            )
        run = self.run.replay(len(problem), self.seed)
        derivatives = Derivatives.of(problem)
        stationarity = StationarityCheck.of(derivatives)
        runner = Runner.of(run, problem, derivatives)
        own = runner.read()
        end = runner.train().theta
        with runner.open():
            way = float((end - runner.read()).norm())
        apart = float((end - own).norm()) / max(way, torch.finfo(end.dtype).tiny)
        smoothness = measure_metasmoothness(runner, end)
        if smoothness.value < self.least_smoothness:
            raise InvalidInput(_do_not_use(smoothness, self.least_smoothness))
        if not apart <= _SAME:
            raise InvalidInput(
                f"The run trained again ends {apart:.2g} of its way from the model's weights ({smoothness}): it is "
                "another run, by recipe, seed or data, one that rounding alone changes, or one whose loss divides by "
                "the labels that count (ignore_index); give the very run, or use ptif.methods.along(run)."
            )
        seconds = time.perf_counter() - start
        return UnrolledAttribution(self, problem, derivatives, stationarity, seconds, runner, smoothness, apart)


def unrolled(
    run: Replayable, seed: int = 0, least_smoothness: float = _SMOOTH, memory: Budget | int | str | None = None
) -> Unrolled:
    r"""Exact unrolling of a short training run: what *this very run* would have become.

    score[q, i] = -d m(q; theta_T) / d w_i, with w_i the weight on example i's loss in every step of the run that ended
    at theta_T: same start, same batches, same learning rates. Computed backwards through all steps of SGD with momentum
    or AdamW (the adjoint), to rounding.

    It answers another question than influence functions do: not what training without the example gives on average,
    but what this one run would have given. Where a run is not smooth in the weights on its data (`Metasmoothness`), the
    derivative is exact and worthless: on ordinary small networks linear datamodelling scores were .03 to .11, where
    EK-FAC had .44. Three trainings measure that; below `least_smoothness` `fit` refuses, above it the diagnostics tell.
    Short fine-tuning with small learning rates, smooth activations and large batches are its place.

    Args:
        run: an `evaluation.Recipe`, or `trajectory.Replay(start, batches, optimizer)` for a loop of one's own. It must
            end at the model's weights.
        seed: of a recipe's weights and order.
        least_smoothness: between -1 and 1; `-1`: whatever it is.
        memory: the most that queries and the weights along the run may take: bytes or words; `None`: 4 GiB. Of longer
            runs every k-th step is kept, and the steps between are taken again.

    Cost: three or four trainings, then per query about two of them; queries share what does not depend on them.

    Raises:
        InvalidInput: what is given cannot be repeated.

    Reference: Engstrom et al. (2025), "Optimizing ML Training with Metagradient Descent"; Ilyas & Engstrom (2025),
    "MAGIC". Identity: equals finite differences of retraining to 1e-6 in float64.

    >>> from pytorch_influence_functions.trajectory import Replay
    >>> model, x, y = torch.nn.Linear(3, 2), torch.randn(20, 3), torch.arange(20) % 2
    >>> optimizer, start, batches = torch.optim.SGD(model.parameters(), lr=0.1), dict(model.state_dict()), []
    >>> start = {name: value.clone() for name, value in start.items()}
    >>> for step in range(10):
    ...     ids = torch.randperm(20)[:5]
    ...     optimizer.zero_grad()
    ...     torch.nn.functional.cross_entropy(model(x[ids]), y[ids]).backward()
    ...     optimizer.step()
    ...     batches.append(ids)
    >>> method = unrolled(Replay(start, batches, optimizer))
    >>> method.fit(Problem(model, torch.nn.CrossEntropyLoss(), (x, y))).score((x[:2], y[:2])).values.shape
    torch.Size([2, 20])
    """
    return Unrolled(run, seed, least_smoothness, Budget() if memory is None else memory)


def _do_not_use(smoothness: Metasmoothness, least: float) -> str:
    return (
        f"Do not use unrolled() here: the training is not smooth in the weights on its data, {smoothness} below "
        f"{least:g}, so that its exact derivative does not predict a removal; use ptif.methods.along(run), or "
        "least_smoothness=-1 to have it all the same."
    )


@final
@dataclass(frozen=True, eq=False)
class UnrolledAttribution(RunAttribution):
    """A run that can be gone backwards: a score is the change of the measure per unit of weight taken from an example.

    Attributes:
        runner: the run with the problem.
        smoothness: how smooth the run is.
        apart: how far from the model's weights it ends, as a share of its way.
    """

    spec: Unrolled
    runner: Runner
    smoothness: Metasmoothness
    apart: float

    def _add_scores(self, scoring: ScoringPass) -> Iterator[str]:
        question, everyone = scoring.question, torch.arange(len(self.problem))
        with self.runner.open():
            states = _States.of(self.runner, self._states_bytes())
            self.runner.load(states.end.theta)
            predicted = torch.zeros(len(question), dtype=torch.float64)
            for query_ids, rows in list(scoring.query_groups(self.derivatives, self._room())):
                values = self._backwards(states, rows)
                predicted[query_ids] = -self.smoothness.step * (values @ self.smoothness.signs)
                scoring.add(query_ids, everyone, values)
            change = self._measure(question, self.smoothness.perturbed) - self._measure(question, states.end.theta)
        return self._notes(_correlation(predicted, change))

    @entry
    def self_influence(self) -> Float[Tensor, " n"]:
        """Every training example's score on its own loss, shape [N]: N queries, so about 2 N trainings' time."""
        own = torch.zeros(len(self.problem), dtype=torch.float64)
        with self.runner.open():
            states = _States.of(self.runner, self._states_bytes())
            self.runner.load(states.end.theta)
            room = self._room()
            for ids, rows in list(grouped(self_influence_rows(self.derivatives, room), room)):
                own[ids] = self._backwards(states, rows)[torch.arange(len(ids)), ids]
        return self.problem.data.spread(current().sum_into(own))

    # ---------------------------------------------------------------- inner workings

    def _backwards(self, states: _States, rows: Rows) -> Float[Tensor, "q n"]:
        """-d m / d w for a group of queries: through all steps, from the last to the first."""
        runner, space = self.runner, self.problem.space
        rule, rates = runner.run.rule, runner.run.rates
        assert isinstance(rates, tuple), "made so"
        theta = rows.flat()
        adjoint = Weights(theta, tuple(torch.zeros_like(theta) for _ in range(rule.moments)))
        total = torch.zeros(len(theta), len(self.problem), dtype=torch.float64)
        products: Products | None = None
        for step, at in track(states.backwards(), len(runner), "unrolling", unit="step"):
            runner.load(at.theta)
            adjoint, of_gradient = rule.pull(adjoint, at, runner.gradient(step), rates[step], step)
            with runner.batch(step) as (ids, batch):
                if products is None:
                    products = _checked_products(runner.derivatives, ids, batch)
                along = space.rows(of_gradient / len(ids))
                products_of_losses = products.losses_along(ids, batch, along)
                curved = products.hessian_product(ids, batch, along).flat()
            total.index_add_(1, ids, -products_of_losses.T.double().cpu())
            adjoint = Weights(adjoint.theta + curved, adjoint.moments)
        return total

    def _measure(self, question: Question, theta: Float[Tensor, " p"]) -> Float[Tensor, " q"]:
        """What every row measures at these weights."""
        self.runner.load(theta)
        return torch.cat([ask.values(self.problem) for ask in question.asks])

    def _states_bytes(self) -> int:
        return int(Budget.of(self.spec.memory).bytes * _STATES_SHARE)

    def _room(self) -> int:
        """How many queries fit: their adjoints, and the products taken of them."""
        like = self.runner.read()
        each = len(like) * like.element_size() * (self.runner.run.rule.moments + 4)
        return max(1, int(Budget.of(self.spec.memory).bytes * QUERY_SHARE / each))

    def _facts(self) -> dict[str, Any]:
        return {"approximation": "the derivative of one training run"}

    def _notes(self, agreement: float | None) -> Iterator[str]:
        yield (
            f"this very run of {len(self.runner):,} steps, gone backwards: same start, batches and learning rates; "
            "another seed is another run"
        )
        yield str(self.smoothness) + (
            ": do not trust these scores, removals will hardly follow them"
            if self.smoothness.value < _SMOOTH
            else ": 1 is smooth, and scores predict removals as far as it is"
        )
        if agreement is not None:
            yield (
                f"with the weights on all data changed at random by {self.smoothness.step:.2g}, the queries changed as "
                f"these scores say with a correlation of {agreement:.2f}"
            )
        if self.apart > math.sqrt(torch.finfo(torch.float32).eps):
            yield f"the run trained again ends {self.apart:.2g} of its way from the model's weights"


def _correlation(a: Float[Tensor, " q"], b: Float[Tensor, " q"]) -> float | None:
    """Pearson's, from three queries on; None where there is none."""
    if len(a) < 3:
        return None
    value = float(torch.corrcoef(torch.stack([a, b]))[0, 1])
    return value if math.isfinite(value) else None


def _checked_products(derivatives: Derivatives, ids: Tensor, batch: Any) -> Products:
    products = Products.of(derivatives, batch, len(ids))
    try:
        products.check_hessian(ids, batch)
    except InvalidInput as cause:
        raise InvalidInput(
            f"unrolled() needs second derivatives of this model ({first_line(cause)}); use ptif.methods.along(run)."
        ) from cause
    return products


@final
@dataclass(frozen=True, eq=False)
class _States:
    """Weights and moments before every step: every k-th kept, those between taken again when they are needed."""

    runner: Runner
    kept: tuple[Weights, ...]
    stride: int
    end: Weights

    @staticmethod
    def of(runner: Runner, room: int) -> _States:
        """Train once more, and keep what fits into `room` bytes; the model holds the start."""
        at, kept = runner.begin(), []
        fit = max(1, room // at.bytes)
        # With every k-th kept, T / k + k states are held at once.
        stride = 1 if len(runner) <= fit else max(2, math.ceil(math.sqrt(len(runner))))
        for step in track(range(len(runner)), len(runner), "training again", unit="step"):
            if step % stride == 0:
                kept.append(at)
            at = runner.advance(at, step)
        return _States(runner, tuple(kept), stride, at)

    def backwards(self) -> Iterator[tuple[int, Weights]]:
        """(step, what was before it) from the last step to the first."""
        for k in reversed(range(len(self.kept))):
            first = k * self.stride
            stretch = [self.kept[k]]
            for step in range(first, min(first + self.stride, len(self.runner)) - 1):
                stretch.append(self.runner.advance(stretch[-1], step))
            for j in reversed(range(len(stretch))):
                yield first + j, stretch[j]
