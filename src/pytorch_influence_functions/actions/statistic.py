"""A number that a conclusion is about: of the model alone, or of the model and of which training examples are in."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, final

import torch
from jaxtyping import Float
from torch import Tensor, nn

from ..core.errors import InvalidInput
from ..core.validate import finite_number, whole_number
from ..influence.attribution import Attribution
from ..linalg.rows import Rows
from ..objectives.base import call_model
from ..problem.model_state import preserved
from ..problem.problem import Problem


@final
@dataclass(frozen=True, eq=False)
class DataStatistic:
    """A user's statistic, which may take a weight for every training example beside the model.

    Args:
        function: `model -> number`, or `(model, weights) -> number`.
        size: how many training examples there are.
        weighed: whether it takes the weights.
    """

    function: Callable[..., Any]
    size: int
    weighed: bool

    @classmethod
    def of(cls, function: Any, size: int) -> DataStatistic:
        """Read which of the two it is from its parameters.

        Args:
            function: the statistic.
            size: how many training examples there are.

        Raises:
            InvalidInput: it is no function of one or two arguments.
        """
        if not callable(function):
            raise InvalidInput(
                f"The statistic is of type {type(function).__name__}; give a function of the model, or of the model "
                "and the weights of the training examples."
            )
        needed = [
            p
            for p in inspect.signature(function).parameters.values()
            if p.default is p.empty and p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)
        ]
        if not 1 <= len(needed) <= 2:
            raise InvalidInput(
                f"The statistic takes {len(needed)} arguments; give a function of the model, or of the model and the "
                "weights of the training examples."
            )
        return cls(function, size, len(needed) == 2)

    def value(self, model: nn.Module, kept: Tensor) -> float:
        """The number itself.

        Args:
            model: trained on the examples that are in.
            kept: their positions.

        Raises:
            InvalidInput: it is not one number, or not finite.
        """
        with preserved(model, ()):
            value = self._call(model, self._weights(kept))
        if not isinstance(value, Tensor) or value.numel() != 1:
            if not isinstance(value, Tensor):
                raise InvalidInput(
                    f"The statistic gave {type(value).__name__}, expected one number as a tensor; write it with "
                    "tensors, without .item(), float() or numpy."
                )
            raise InvalidInput(
                f"The statistic gave a tensor of shape {tuple(value.shape)}, expected one number as a tensor; reduce "
                "it, with .mean() say."
            )
        return finite_number("The statistic", float(value.detach()))

    def gradients(self, fitted: Attribution, kept: Tensor) -> tuple[Rows, Float[Tensor, " n"]]:
        """In the parameters, as one row, and in the weights of the examples that are in, [n] in float64.

        Args:
            fitted: a method fitted to them.
            kept: their positions.

        Raises:
            InvalidInput: it does not depend on the parameters through autograd.
        """
        problem, space = fitted.problem, fitted.members[0].derivatives.whole
        values, weights = space.values(problem.model), self._weights(kept).requires_grad_()
        with preserved(problem.model, space.names), torch.enable_grad():
            value = self._call(problem.model, weights)
            if not value.requires_grad:
                raise InvalidInput(
                    "The statistic does not depend on the parameters through autograd; write it with tensors, without "
                    ".item(), .detach() or numpy."
                )
            *gradients, by_weights = torch.autograd.grad(value, [*values.values(), weights], materialize_grads=True)
        rows = space.from_parameters({k: g.detach()[None] for k, g in zip(values, gradients, strict=True)})
        return rows, by_weights[kept].double().cpu()

    def check_reads(self, problem: Problem, kept: Tensor) -> None:
        """Refuse a statistic that reads another model than the one it is given.

        Args:
            problem: whose model it is given.
            kept: the positions of the examples that are in.

        Raises:
            InvalidInput: it depends neither on that model's parameters nor on the weights.
        """
        weights = self._weights(kept).requires_grad_()
        with preserved(problem.model, problem.space.names), torch.enable_grad():
            value = self._call(problem.model, weights)
            asked = [*problem.space.values(problem.model).values(), weights]
            slopes = torch.autograd.grad(value, asked, allow_unused=True) if value.requires_grad else ()
        if all(slope is None for slope in slopes):
            raise InvalidInput(
                "The statistic does not change with the parameters of the model it is given, so it reads another "
                "model, perhaps a global variable, or parameters that take no part; write it with its argument, such "
                "as lambda m: m.weight[0, 0]."
            )

    def _weights(self, kept: Tensor) -> Tensor:
        return torch.zeros(self.size, dtype=torch.float64).index_fill(0, kept, 1.0)

    def _call(self, model: nn.Module, weights: Tensor) -> Any:
        return self.function(model, weights) if self.weighed else self.function(model)


@final
@dataclass(frozen=True, eq=False)
class TStatistic:
    """The t statistic of one coefficient of least squares: how many standard errors it is from 0.

    With X the columns (and a column of ones, where there is an intercept), r the residuals, W the weights of the
    training examples and p columns: t = b_j / sqrt(s^2 [(X^T W X)^-1]_jj), s^2 = sum(W r^2) / (sum(W) - p).
    A statistic for `smallest_removal`: with `threshold=1.96` it asks how few examples make a significant coefficient
    insignificant (or, from below, an insignificant one significant).

    Args:
        x: the training inputs, [N, d].
        y: the targets, [N] or [N, 1].
        column: which coefficient, counted from 0.
        weight: the name of the model's weight, [1, d]; None: its first parameter.
        intercept: whether the model has one.

    Example:
        >>> x = torch.tensor([[0.0], [1.0], [2.0], [4.0]])
        >>> y = torch.tensor([0.0, 1.0, 2.5, 3.5])
        >>> line = nn.Linear(1, 1)
        >>> with torch.no_grad():
        ...     _ = line.weight.fill_(0.9), line.bias.fill_(0.175)
        >>> round(TStatistic(x, y)(line, torch.ones(4)).item(), 3)
        6.048
    """

    x: Float[Tensor, "n d"]
    y: Tensor
    column: int = 0
    weight: str | None = None
    intercept: bool = True

    def __post_init__(self) -> None:
        if self.x.dim() != 2 or self.y.numel() != len(self.x):
            raise InvalidInput(
                f"TStatistic got inputs of shape {tuple(self.x.shape)} and targets of shape {tuple(self.y.shape)}; "
                "expected [N, columns] and one target each."
            )
        whole_number("column", self.column, 0, self.x.shape[1] - 1, owner="TStatistic")

    def __call__(self, model: nn.Module, weights: Float[Tensor, " n"]) -> Tensor:
        """The t statistic under a model and weights, differentiable in both.

        Args:
            model: the fitted line.
            weights: of every training example, [N].
        """
        named = dict(model.named_parameters())
        coefficients = next(iter(named.values())) if self.weight is None else named[self.weight]
        columns = self.x.double()
        if self.intercept:
            columns = torch.cat([columns, columns.new_ones(len(columns), 1)], 1)
        residuals = self.y.double().reshape(-1) - model(self.x).double().reshape(-1)
        weights = weights.double()
        variance = (weights * residuals.square()).sum() / (weights.sum() - columns.shape[1])
        inverse = torch.linalg.inv((columns * weights[:, None]).T @ columns)
        error: Tensor = (variance * inverse[self.column, self.column]).sqrt()
        return coefficients.double().reshape(-1)[self.column] / error


@final
@dataclass(frozen=True, eq=False)
class AccuracyStatistic:
    """The share of right answers on some data: a statistic for `smallest_removal`.

    The number is the accuracy itself, in steps of one example. It has no slope, so that of a smooth one is taken: of
    the mean of sigmoid(margin / width), with a margin of log p - log(1 - p) for the right class. So examples count
    whose answer is nearest to tipping over.

    Args:
        x: inputs as the model takes them, [m, ...].
        y: right classes, [m].
        width: over which range of margins an answer is half right; above 0.

    Example:
        >>> x, y = torch.tensor([[2.0], [-1.0], [-3.0]]), torch.tensor([1, 1, 0])
        >>> line = nn.Linear(1, 1)
        >>> with torch.no_grad():
        ...     _ = line.weight.fill_(1.0), line.bias.fill_(0.0)
        >>> round(AccuracyStatistic(x, y)(line).item(), 3)
        0.667
    """

    x: Tensor
    y: Tensor
    width: float = 1.0

    def __post_init__(self) -> None:
        if self.y.dim() != 1 or len(self.y) != len(self.x) or self.y.is_floating_point():
            raise InvalidInput(
                f"AccuracyStatistic got {len(self.x)} inputs and labels of shape {tuple(self.y.shape)} and type "
                f"{self.y.dtype}; expected one whole class number for each input."
            )
        finite_number("width", self.width, above=0, owner="AccuracyStatistic")

    def __call__(self, model: nn.Module) -> Tensor:
        """The accuracy, differentiable in the model.

        Args:
            model: gives a score for each class, [m, C], or one logit, [m] or [m, 1].
        """
        otherwise = "AccuracyStatistic is of one tensor; write a statistic of your own, a function of the model"
        outputs = call_model(model, (self.x,), {}, otherwise).double()
        if outputs.numel() == len(self.y):
            margins = (2 * self.y - 1) * outputs.reshape(-1)
            right = margins > 0
        else:
            own = outputs.gather(1, self.y[:, None])[:, 0]
            others = outputs.scatter(1, self.y[:, None], -math.inf)
            margins = own - others.logsumexp(1)
            right = own > others.max(1).values
        smooth = (margins / self.width).sigmoid().mean()
        accuracy: Tensor = right.double().mean() + smooth - smooth.detach()
        return accuracy
