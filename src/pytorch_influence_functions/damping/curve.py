r"""Damping chosen by the data, without retraining: what removing examples would do, for a whole grid of lambdas.

With one eigendecomposition of the dual or of the dense curvature, `J_i (C + lambda)^-1 J_i^T` is known for every
example and every lambda, and with it the loss that every example would have, had the model never seen it.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, final, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from ..core.cut_up import whole
from ..core.distributed import World
from ..core.errors import InvalidInput, NonFinite
from ..core.notebook import Printable
from ..curvature.base import AbstractCurvature
from ..gradients.output_rows import OutputRows
from ..gradients.per_example import Derivatives
from ..linalg.operator import AbstractSymmetric
from ..linalg.resolvent import Resolvent
from ..linalg.rows import Rows
from ..objectives.base import AbstractObjective
from ..problem.problem import sweep
from .rules import Absolute, AbstractDamping, HasMeanEigenvalue

log = logging.getLogger("pytorch_influence_functions")

# Shares of the mean eigenvalue that are tried when no lambdas are given.
_GRID = torch.logspace(-3, 3, 37, dtype=torch.float64)


@runtime_checkable
class HasCurvature(Protocol):
    """The composition of a fitted model, as far as its curvature."""

    @property
    def curvature(self) -> AbstractCurvature: ...


@runtime_checkable
class FittedCurvature(Protocol):
    """What the choice looks at: a fitted member of an attribution."""

    @property
    def operator(self) -> AbstractSymmetric: ...
    @property
    def derivatives(self) -> Derivatives: ...
    @property
    def composition(self) -> HasCurvature: ...


@final
@dataclass(frozen=True, repr=False)
class DampingCurve(Printable):
    """The curve along which a damping was chosen; `print` it, or plot `losses` over `lambdas` (logarithmic axes).

    Args:
        lambdas: the dampings, ascending.
        losses: for each, the mean loss of the training examples, each predicted without itself.
        chosen: the lambda that was chosen; it may lie between two of them.
        held_out: the measured mean loss on held-out examples, which the prediction was to meet; None: the smallest
            predicted loss was looked for.
        training: the mean loss on the training examples as they are.
        at_edge: whether the best lambda lies at an end of `lambdas`, so that a better one may lie outside.
    """

    lambdas: tuple[float, ...]
    losses: tuple[float, ...]
    chosen: float
    training: float
    held_out: float | None = None
    at_edge: bool = False

    def __str__(self) -> str:
        aim = (
            "where the predicted leave-one-out loss of the refitted linearisation is least"
            if self.held_out is None
            else f"where the predicted leave-one-out loss is the held-out loss, {self.held_out:.4g}"
        )
        edge = " (at the edge of the lambdas tried: look further)" if self.at_edge else ""
        lines = [f"lambda {self.chosen:.3g}, {aim}{edge}", f"training loss {self.training:.4g}"]
        return "\n".join([*lines, *(f"{x:>10.3g}  {y:.5g}" for x, y in zip(self.lambdas, self.losses, strict=True))])


@final
@dataclass(frozen=True, eq=False)
class FromCurve(AbstractDamping):
    r"""Lambda by leave-one-out prediction in closed form, without retraining.

    It needs `Woodbury()` or a dense `Spectral()` with `GGN()`, `Fisher()` or `EmpiricalFisher()`.

    With `held_out` (recommended), lambda is **calibrated**: it is the one at which the predicted leave-one-out loss of
    the training examples equals the measured mean loss on held-out ones. Each example is removed by one Newton step,

        loss_i(f_i + A_i (I - H_i A_i / N)^-1 s_i / N),    A_i = J_i (C + lambda)^-1 J_i^T,

    with f_i, s_i, H_i the example's outputs and its loss's slope and Hessian in them. Too small a lambda predicts that
    every example is irreplaceable, too large a one that none matters. For ridge regression the prediction is the exact
    leave-one-out loss. Under `EmpiricalFisher()`, loss_i + h_i / (1 - h_i) with h_i the self-influence.

    Without, lambda minimises the leave-one-out error of the model's quadratic approximation, fitted anew from zero:
    theta_lambda = (C + lambda)^-1 (C theta - mean gradient), example by example left out in closed form. For ridge
    regression this is PRESS, whatever the weights. The features (Jacobians) of a network have seen the examples that
    are left out, so this errs to small lambdas there.

    Measured where the truth was known by retraining (784-64-10 perceptron, 2,000 Fashion-MNIST images, 60 half-subsets
    x 3 seeds; held-out loss on the 100 query images), LDS at the choice beside the best LDS over lambda, first on clean
    and then on partly wrong labels. Calibrated: empirical Fisher .39 of .39, .41 of .41; Gauss-Newton (its three
    largest output directions) .38 of .42, .39 of .40. Without held-out data: empirical Fisher .37 of .39, .40 of .41;
    Gauss-Newton .34 of .42, .40 of .40. One architecture on one data set: a sensible choice, not a law.

    Weight decay of the problem is part of D and kept. Cost: outputs x one epoch, the eigendecomposition, and
    m outputs^2 operations per example and lambda.

    Args:
        held_out: examples not trained on, as `ptif.attribute` takes queries; a hundred are enough.
        lambdas: the dampings to try, positive numbers; None: 37 from 0.001 to 1,000 times the mean eigenvalue.

    References: Allen (1974), PRESS; Rad & Maleki (2020), approximate leave-one-out; Giordano et al. (2019), "A Swiss
    Army infinitesimal jackknife".

    >>> FromCurve()
    FromCurve()
    >>> FromCurve(lambdas=[0.1, 1.0])
    FromCurve(lambdas=(0.1, 1.0))
    """

    held_out: Any = None
    lambdas: Any = None

    def __post_init__(self) -> None:
        if self.lambdas is not None:
            object.__setattr__(self, "lambdas", _parse_lambdas(self.lambdas))

    def __repr__(self) -> str:
        parts = [] if self.held_out is None else ["held_out=..."]
        parts += [] if self.lambdas is None else [f"lambdas={self.lambdas!r}"]
        return f"FromCurve({', '.join(parts)})"

    def of(self, operator: HasMeanEigenvalue) -> float:
        raise InvalidInput(
            "FromCurve() looks at the model and its data and works as Influence(damping=FromCurve(...)) only; "
            "give a number, Relative() or FromTraining() here."
        )

    @property
    def measures_gradients(self) -> bool:
        return True

    def resolved(self, fitted: object) -> AbstractDamping:
        """The lambda that was found, as a number for this curvature.

        Args:
            fitted: as for `path`.
        """
        curve = self.path(fitted)  # type: ignore[arg-type]
        if curve.at_edge:
            log.warning(
                "FromCurve() chose %.3g, at the edge of the lambdas it tried; give a wider range.", curve.chosen
            )
        return Absolute(curve.chosen)

    def path(self, fitted: FittedCurvature) -> DampingCurve:
        """The whole curve for one fitted curvature.

        Args:
            fitted: the fitted member of an attribution: its operator, derivatives and choice.

        Raises:
            InvalidInput: the curvature has no eigenvalues at hand, does not hold the examples one by one, or no lambda
                tried predicts the held-out loss.
        """
        derivatives, operator = fitted.derivatives, fitted.operator
        curvature = fitted.composition.curvature
        _refuse_inexact(curvature, derivatives)
        resolvent = _resolvent(operator)
        lambdas = self.lambdas or tuple((_GRID * _mean_eigenvalue(operator)).tolist())
        target = None if self.held_out is None else _held_out_loss(derivatives, self.held_out)
        losses, training = _predict_losses(
            resolvent,
            derivatives,
            curvature.holds_gradients,
            lambdas,
            _refit(operator, derivatives) if target is None else None,
        )
        return _choose(lambdas, losses, training, target)


def _parse_lambdas(lambdas: Any) -> tuple[float, ...]:
    try:
        values = sorted(float(x) for x in lambdas)
    except (TypeError, ValueError) as cause:
        raise InvalidInput(
            f"FromCurve(lambdas=) takes several damping values, numbers such as [0.01, 0.1], got {lambdas!r}."
        ) from cause
    if len(set(values)) < 2 or not all(math.isfinite(x) and x > 0 for x in values):
        raise InvalidInput(
            f"FromCurve(lambdas=) has {values[:5]}; it needs at least two different values, finite and positive."
        )
    return tuple(values)


def _mean_eigenvalue(operator: AbstractSymmetric) -> float:
    mean = operator.mean_eigenvalue()
    if not math.isfinite(mean):
        raise NonFinite(f"The mean eigenvalue of the curvature is {mean}; look for NaN in weights or data.")
    if mean <= 0:
        raise InvalidInput(
            f"The mean eigenvalue of the curvature is {mean:.3g}; give FromCurve(lambdas=) numbers to try."
        )
    return mean


def _refuse_inexact(curvature: AbstractCurvature, derivatives: Derivatives) -> None:
    if not curvature.splits_by_example:
        raise InvalidInput(
            f"FromCurve() takes each example's own part out of the curvature, which {curvature!r} does not hold "
            "example by example; use GGN() or EmpiricalFisher(), or Relative()."
        )
    decay = derivatives.problem.weight_decay
    if decay.per_example and not decay.is_zero:
        raise InvalidInput(
            "FromCurve() keeps the weight decay whole when an example is removed and the problem has "
            "WeightDecay(per_example=True); give a number or Relative() instead."
        )


def _choose(
    lambdas: Sequence[float], losses: Float[Tensor, " l"], training: float, target: float | None
) -> DampingCurve:
    if target is None:
        best = int(torch.where(torch.isnan(losses), math.inf, losses).argmin())
        chosen, edge = lambdas[best], best in (0, len(lambdas) - 1)
    else:
        above = (losses >= target).nonzero().flatten()
        last = int(above[-1]) if len(above) else -1
        if last in (-1, len(lambdas) - 1):
            side = "above" if last == -1 else "below"
            raise InvalidInput(
                f"The held-out loss is {target:.4g} (training loss {training:.4g}), {side} the leave-one-out loss that "
                f"any of the lambdas tried predicts ({float(losses[-1]):.4g} to {float(losses[0]):.4g}); give other "
                "lambdas=, or use FromCurve() without held-out data."
            )
        low, high = float(losses[last + 1]), float(losses[last])
        # Between two lambdas the curve is interpolated in the logarithm of lambda.
        share = (high - target) / (high - low) if math.isfinite(high) else 1.0
        chosen = math.exp(math.log(lambdas[last]) * (1 - share) + math.log(lambdas[last + 1]) * share)
        edge = False
    return DampingCurve(tuple(lambdas), tuple(losses.tolist()), chosen, training, target, edge)


# --------------------------------------------------------------------------- what one decomposition gives


def _resolvent(operator: AbstractSymmetric) -> Resolvent:
    resolvent = operator.resolvent()
    if resolvent is None:
        raise InvalidInput(
            f"FromCurve() reads every lambda off one eigendecomposition, which {type(operator).__name__} does not "
            "have; use Woodbury() or Spectral() with GGN() or EmpiricalFisher(), or Relative()."
        )
    return resolvent


@final
@dataclass(frozen=True, eq=False)
class _LocalModel:
    """A few examples: rows of their outputs (or their gradients) in the coordinates of the decomposition."""

    u: Float[Tensor, "n c m"]
    own: Float[Tensor, "n c c"]
    slope: Float[Tensor, "n c"]
    hessian: Float[Tensor, "n c c"]
    along: Float[Tensor, "n c"]
    """Rows times the right-hand side of the refit."""
    trained: Float[Tensor, "n c"]
    """Rows times the trained weights."""
    loss: Callable[[Tensor], Tensor]
    """The examples' losses after their outputs moved by [n, c]."""


def _predict_losses(
    resolvent: Resolvent,
    derivatives: Derivatives,
    empirical: bool,
    lambdas: Sequence[float],
    refit: tuple[Rows, Rows] | None,
) -> tuple[Float[Tensor, " l"], float]:
    """The mean leave-one-out loss for every lambda, and the mean loss as it is."""
    n = len(derivatives.problem)
    sums, training = torch.zeros(len(lambdas), dtype=torch.float64), 0.0
    theta, goal = (None, None) if refit is None else refit
    goal_coordinates = None if goal is None else resolvent.project(goal)[0]
    batches = (
        _gradients(resolvent, derivatives, theta, goal, refit is not None)
        if empirical
        else _outputs(resolvent, derivatives, theta, goal)
    )
    for examples in batches:
        training += float(examples.loss(torch.zeros_like(examples.slope)).double().sum())
        for k, damping in enumerate(lambdas):
            moves = _leave_one_out(resolvent, examples, damping, goal_coordinates, n)
            sums[k] += float(examples.loss(moves).double().sum())
    return sums / n, training / n


def _leave_one_out(
    resolvent: Resolvent, examples: _LocalModel, damping: float, goal_coordinates: Tensor | None, count: int
) -> Float[Tensor, "n c"]:
    """How far every example's outputs move when it is left out."""
    plain, weights = resolvent.plain(damping), resolvent.weights(damping)
    a = plain * examples.own + (examples.u * weights) @ examples.u.mT
    start = torch.zeros_like(examples.slope)
    if goal_coordinates is not None:
        start = plain * examples.along + examples.u @ (weights * goal_coordinates) - examples.trained
    slope = examples.slope + (examples.hessian @ start[..., None])[..., 0]
    system = torch.eye(a.shape[-1], dtype=a.dtype, device=a.device) - examples.hessian @ a / count
    step: Tensor = torch.linalg.solve(system, slope[..., None])
    return start + (a @ step)[..., 0] / count


def _refit(operator: AbstractSymmetric, derivatives: Derivatives) -> tuple[Rows, Rows]:
    """The trained weights, and C theta - mean gradient, each as one row in float64."""
    space, problem = derivatives.space, derivatives.problem
    theta = space.from_parameters({k: whole(v).detach()[None] for k, v in space.values(problem.model).items()})
    total = torch.zeros(1, space.size, dtype=torch.float64, device=problem.device)
    for gradients in derivatives.stream(label="mean gradient", world=World()):
        rows = gradients.rows
        ones = torch.ones(1, len(rows), dtype=rows.dtype, device=rows.device)
        total += rows.combine(ones).flat().double()
    goal = operator.apply(theta).flat().double() - total / len(problem)
    return theta, space.rows(goal.to(theta.flat()))


def _gradients(
    resolvent: Resolvent, derivatives: Derivatives, theta: Rows | None, goal: Rows | None, quadratic: bool
) -> Iterator[_LocalModel]:
    """One row per example, its gradient: C holds it squared, whatever the outputs."""
    for gradients in derivatives.stream(label="leave one out", world=World()):
        rows, n = gradients.rows, len(gradients.ids)
        one = rows.squared_norms().double().new_ones(n, 1)
        yield _LocalModel(
            resolvent.project(rows)[:, None],
            rows.squared_norms().double()[:, None, None],
            one,
            one[..., None],
            _multiply(rows, goal),
            _multiply(rows, theta),
            _loss_model(gradients.losses.double(), quadratic),
        )


def _loss_model(losses: Tensor, quadratic: bool) -> Callable[[Tensor], Tensor]:
    # A refit minimises this quadratic. A removal is judged by the slope alone: far from the trained weights the loss
    # grows no faster than linearly, so the square of a predicted change would be far too large.
    return lambda moves: losses + moves[:, 0] + (0.5 * moves[:, 0].square() if quadratic else 0.0)


def _outputs(
    resolvent: Resolvent, derivatives: Derivatives, theta: Rows | None, goal: Rows | None
) -> Iterator[_LocalModel]:
    """One row per example and output."""
    for ids, batch in sweep(derivatives.problem, label="leave one out", world=World()):
        examples = OutputRows.of(derivatives, ids, batch)
        rows, width = examples.rows, len(examples.rows)
        own = examples.hessian.new_zeros(len(ids), width, width, dtype=torch.float64)
        if resolvent.dual:
            for k in range(width):
                for j in range(k + 1):
                    own[:, k, j] = own[:, j, k] = rows[k].rowwise(rows[j]).double()
        yield _LocalModel(
            torch.stack([resolvent.project(r) for r in rows], 1),
            own,
            examples.slopes.double(),
            examples.hessian.double(),
            torch.cat([_multiply(r, goal) for r in rows], 1),
            torch.cat([_multiply(r, theta) for r in rows], 1),
            _exact_loss(derivatives.objective, examples.outputs, batch),
        )


def _exact_loss(objective: AbstractObjective, outputs: Tensor, batch: Any) -> Callable[[Tensor], Tensor]:
    def loss(moves: Tensor) -> Tensor:
        with torch.no_grad():
            losses: Tensor = objective.losses(outputs + moves.to(outputs).reshape(outputs.shape), batch)
        return losses

    return loss


def _multiply(rows: Rows, vector: Rows | None) -> Float[Tensor, "n 1"]:
    """<row, vector> for every row; zeros where there is no vector."""
    if vector is None:
        return torch.zeros(len(rows), 1, dtype=torch.float64, device=rows.device)
    return rows.inner(vector).double()


def _held_out_loss(derivatives: Derivatives, data: Any) -> float:
    """The mean training loss on examples that were not trained on."""
    problem, objective = derivatives.problem, derivatives.objective
    source = problem.data.read_alike(data, problem.batch_size)
    total = 0.0
    for ids, batch in sweep(problem, source, label="held-out loss", world=World()):
        with torch.no_grad():
            outputs = objective.outputs(problem.model, batch)
            objective.check(outputs, batch, ids)
            total += float(objective.losses(outputs, batch).double().sum())
    if not math.isfinite(total):
        raise NonFinite(f"The mean loss on the held-out data is {total / len(source)}; look for NaN in them.")
    return total / len(source)
