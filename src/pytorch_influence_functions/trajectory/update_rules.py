"""One step of an optimiser as a formula, and its adjoint: what the end of training says of every step before.

Vectors are flat: weights and moments [P], adjoints [q, P] with one row per query.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, final

import torch
from jaxtyping import Float
from torch import Tensor

from ..core.errors import InvalidInput
from ..core.validate import finite_number

Flat = Float[Tensor, " p"]
Rows = Float[Tensor, "q p"]


@final
@dataclass(frozen=True, eq=False)
class Weights:
    """Where a training stands: weights and the optimiser's moments before a step; or the adjoints of both."""

    theta: Tensor
    moments: tuple[Tensor, ...]

    @property
    def bytes(self) -> int:
        """What they take."""
        return sum(t.numel() * t.element_size() for t in (self.theta, *self.moments))


class AbstractUpdateRule(ABC):
    """An optimiser that moves every weight by a formula of its own history."""

    moments: ClassVar[int]
    """How many numbers it remembers for each weight."""

    def start(self, theta: Flat) -> Weights:
        """A training that begins at these weights.

        Args:
            theta: [P].
        """
        return Weights(theta, tuple(torch.zeros_like(theta) for _ in range(self.moments)))

    @abstractmethod
    def step(self, at: Weights, gradient: Flat, lr: float, count: int) -> Weights:
        """The weights after one step.

        Args:
            at: before it.
            gradient: of the mean loss of the step's examples, [P].
            lr: its learning rate.
            count: how many steps were taken before.
        """

    @abstractmethod
    def pull(self, after: Weights, at: Weights, gradient: Flat, lr: float, count: int) -> tuple[Weights, Rows]:
        """The adjoint of `step`: derivatives in what is after it become derivatives in what is before.

        Args:
            after: adjoints of the weights and moments after the step, [q, P] each.
            at: weights and moments before it.
            gradient: as for `step`.
            lr: as for `step`.
            count: as for `step`.

        Returns:
            The adjoints before the step as far as they do not come by the gradient, and that of the gradient.
        """


@final
@dataclass(frozen=True)
class SGDRule(AbstractUpdateRule):
    """Stochastic gradient descent with heavy-ball or Nesterov momentum, as `torch.optim.SGD` has it.

    v <- momentum v + (1 - dampening)(g + decay theta), theta <- theta - lr v; the first v is the gradient itself.

    Args:
        momentum: the share of the last move that is kept.
        dampening: of the gradient's part in it.
        nesterov: whether a step looks ahead.
        weight_decay: added to the gradient.
    """

    momentum: float = 0.0
    dampening: float = 0.0
    nesterov: bool = False
    weight_decay: float = 0.0
    moments: ClassVar[int] = 1

    def step(self, at: Weights, gradient: Flat, lr: float, count: int) -> Weights:
        gradient = gradient + self.weight_decay * at.theta
        velocity = self.momentum * at.moments[0] + self._share(count) * gradient
        move = gradient + self.momentum * velocity if self.nesterov else velocity
        return Weights(at.theta - lr * move, (velocity,))

    def pull(self, after: Weights, at: Weights, gradient: Flat, lr: float, count: int) -> tuple[Weights, Rows]:
        move = -lr * after.theta
        velocity = after.moments[0] + (self.momentum * move if self.nesterov else move)
        of_gradient = self._share(count) * velocity + (move if self.nesterov else 0.0)
        return Weights(after.theta + self.weight_decay * of_gradient, (self.momentum * velocity,)), of_gradient

    def _share(self, count: int) -> float:
        """What of the gradient goes into the velocity; nothing is dampened at the first step."""
        return 1.0 - self.dampening if count and self.momentum else 1.0


@final
@dataclass(frozen=True)
class AdamRule(AbstractUpdateRule):
    """Adam and AdamW, as `torch.optim` has them.

    m <- beta1 m + (1 - beta1) g, v <- beta2 v + (1 - beta2) g^2, theta <- theta - lr m_c / (sqrt(v_c) + eps), where m_c
    and v_c are m and v corrected for their start at 0.

    Args:
        beta1: how slowly the first moments forget.
        beta2: how slowly the second moments forget.
        eps: what is added to the root of the second.
        weight_decay: its strength.
        decoupled: whether the decay is AdamW's, apart from the loss, or a term of the gradient.
    """

    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
    weight_decay: float = 0.0
    decoupled: bool = False
    moments: ClassVar[int] = 2

    def step(self, at: Weights, gradient: Flat, lr: float, count: int) -> Weights:
        first, second = self._moments(at, gradient)
        corrected, root = self._corrected(first, second, count)
        theta = at.theta * (1.0 - lr * self.weight_decay) if self.decoupled else at.theta
        return Weights(theta - lr * corrected / (root + self.eps), (first, second))

    def pull(self, after: Weights, at: Weights, gradient: Flat, lr: float, count: int) -> tuple[Weights, Rows]:
        first, second = self._moments(at, gradient)
        corrected, root = self._corrected(first, second, count)
        inverse = 1.0 / (root + self.eps)
        # Where no gradient ever was, the root has no slope, and nothing is moved to first order.
        moved = root > 0
        slope = torch.where(moved, corrected * inverse.square() / (2 * torch.where(moved, root, 1.0)), 0.0)
        one, two = 1.0 - self.beta1 ** (count + 1), 1.0 - self.beta2 ** (count + 1)
        of_first = after.moments[0] - lr * inverse * after.theta / one
        of_second = after.moments[1] + lr * slope * after.theta / two
        inner = gradient if self.decoupled else gradient + self.weight_decay * at.theta
        of_gradient = (1.0 - self.beta1) * of_first + 2.0 * (1.0 - self.beta2) * of_second * inner
        theta = after.theta * (1.0 - lr * self.weight_decay) if self.decoupled else after.theta
        theta = theta if self.decoupled else theta + self.weight_decay * of_gradient
        return Weights(theta, (self.beta1 * of_first, self.beta2 * of_second)), of_gradient

    def _moments(self, at: Weights, gradient: Flat) -> tuple[Flat, Flat]:
        """Both moments after the step."""
        gradient = gradient if self.decoupled else gradient + self.weight_decay * at.theta
        first = self.beta1 * at.moments[0] + (1.0 - self.beta1) * gradient
        return first, self.beta2 * at.moments[1] + (1.0 - self.beta2) * gradient.square()

    def _corrected(self, first: Flat, second: Flat, count: int) -> tuple[Flat, Flat]:
        """The first moment, and the root of the second, corrected for their start at 0."""
        one, two = 1.0 - self.beta1 ** (count + 1), 1.0 - self.beta2 ** (count + 1)
        return first / one, second.sqrt() / two**0.5


def rule_of(optimizer: Any) -> AbstractUpdateRule:
    """The rule of a `torch.optim` optimiser, by its settings.

    Args:
        optimizer: SGD, Adam or AdamW with one parameter group, or a rule.

    Raises:
        InvalidInput: it is another optimiser, has several groups, or settings that the rules do not have.
    """
    if isinstance(optimizer, AbstractUpdateRule):
        return optimizer
    kind = type(optimizer).__name__
    if kind not in ("SGD", "Adam", "AdamW") or not isinstance(optimizer, torch.optim.Optimizer):
        raise InvalidInput(
            f"Unrolling knows the steps of torch.optim.SGD, Adam and AdamW, got {kind}; use another method, such as "
            "ptif.methods.along(run)."
        )
    if len(optimizer.param_groups) != 1:
        raise InvalidInput(
            f"Unrolling takes an optimiser with one parameter group, this {kind} has {len(optimizer.param_groups)}; "
            "use another method, such as ptif.methods.along(run)."
        )
    group: Mapping[str, Any] = optimizer.param_groups[0]
    for name in ("amsgrad", "maximize"):
        if group.get(name):
            raise InvalidInput(
                f"Unrolling has no {name}=True, with which this {kind} was made; use another method, such as "
                "ptif.methods.along(run)."
            )
    numbers = {k: finite_number(k, v) for k, v in group.items() if k in ("momentum", "dampening", "eps")}
    decay = finite_number("weight_decay", group["weight_decay"])
    if kind == "SGD":
        return SGDRule(numbers["momentum"], numbers["dampening"], bool(group["nesterov"]), decay)
    beta1, beta2 = (float(b) for b in group["betas"])
    decoupled = bool(group.get("decoupled_weight_decay", kind == "AdamW"))
    return AdamRule(beta1, beta2, numbers["eps"], decay, decoupled)
