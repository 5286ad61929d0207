"""A training run that can be repeated step by step: where it began, which examples each step saw, how it moved."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, Protocol, final, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from ..core.errors import InvalidInput, NonFinite
from ..core.progress import track
from ..core.validate import finite_number
from ..gradients.per_example import Derivatives
from ..gradients.products import Products
from ..gradients.vjp import weighted_gradient
from ..problem.checkpoints import Checkpoint, at_checkpoint
from ..problem.data import Source
from ..problem.problem import Problem, first_batch
from .update_rules import AbstractUpdateRule, Weights, rule_of

# Layers whose training steps depend on the random state or on running statistics, which eval mode does not repeat.
_NOT_REPEATED = (nn.modules.dropout._DropoutNd, nn.modules.batchnorm._BatchNorm, nn.RReLU)


@final
@dataclass(frozen=True, eq=False, repr=False)
class Replay:
    """A training run by its steps: everything that follows from nothing but the data.

    Args:
        start: the weights before the first step, a state dict or a path.
        batches: for every step the indices of its examples in the training dataset; the step follows the mean of
            their losses.
        optimizer: `torch.optim.SGD`, `Adam` or `AdamW` as it was made, or `SGDRule`, `AdamRule`; it began without
            moments.
        rates: the learning rate, one number or one per step; `None`: the optimiser's.

    Raises:
        InvalidInput: no step, an optimiser without a known rule, or numbers of rates and steps that differ.

    >>> model = nn.Linear(2, 1)
    >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    >>> Replay(model.state_dict(), [torch.tensor([0, 1]), torch.tensor([2, 3])], optimizer)
    Replay(2 steps, SGDRule(momentum=0.9, dampening=0.0, nesterov=False, weight_decay=0.0))
    """

    start: Checkpoint
    batches: Sequence[Int[Tensor, " b"]]
    optimizer: torch.optim.Optimizer | AbstractUpdateRule
    rates: float | Sequence[float] | None = None
    rule: AbstractUpdateRule = field(init=False)

    def __post_init__(self) -> None:
        batches = tuple(torch.as_tensor(ids, dtype=torch.long) for ids in self.batches)
        if not batches or any(ids.dim() != 1 or not len(ids) for ids in batches):
            raise InvalidInput(
                "Replay takes the indices of every step's examples, a list of tensors [examples] with at least one "
                f"step, got {len(batches)} steps; note the indices in the training loop."
            )
        given: Any = self.rates
        if given is None:
            if isinstance(self.optimizer, AbstractUpdateRule):
                raise InvalidInput("Replay does not know the learning rates; give rates=, one number or one per step.")
            given = float(self.optimizer.param_groups[0]["lr"])
        rates = [given] * len(batches) if isinstance(given, (int, float)) else list(given)
        if len(rates) != len(batches):
            raise InvalidInput(
                f"Replay got {len(rates)} rates for {len(batches)} steps; give one number, or one per step."
            )
        object.__setattr__(self, "rule", rule_of(self.optimizer))
        object.__setattr__(self, "batches", batches)
        object.__setattr__(self, "rates", tuple(finite_number("A rate", r, least=0) for r in rates))
        # The live state_dict() of a model moves on with its training.
        if not isinstance(self.start, (str, bytes)) and hasattr(self.start, "items"):
            object.__setattr__(self, "start", {k: v.detach().clone() for k, v in self.start.items()})

    def __repr__(self) -> str:
        return f"Replay({len(self.batches)} steps, {self.rule!r})"

    def __fingerprint__(self) -> tuple[Any, ...]:
        """What results depend on."""
        return self.start, list(self.batches), self.rates, self.rule

    def __len__(self) -> int:
        return len(self.batches)

    def replay(self, examples: int, seed: int) -> Replay:
        """This run; see `Replayable`.

        Args:
            examples: how many training examples there are.
            seed: not used.

        Raises:
            InvalidInput: a step has an example that is not there.
        """
        most = max(int(ids.max()) for ids in self.batches)
        least = min(int(ids.min()) for ids in self.batches)
        if most >= examples or least < 0:
            raise InvalidInput(
                f"Replay has steps with example {most if most >= examples else least}, and there are {examples}; "
                "give indices in the training dataset."
            )
        return self


@runtime_checkable
class Replayable(Protocol):
    """What a run can be made from: a `Replay`, or an `evaluation.Recipe`."""

    def replay(self, examples: int, seed: int) -> Replay:
        """The run that trains on so many examples.

        Args:
            examples: how many.
            seed: of weights and order.
        """


@final
@dataclass(frozen=True, eq=False)
class Runner:
    """A run with a problem: its steps can be taken again, with other weights on the data.

    Args:
        run: the steps.
        problem: model, loss and training data.
        derivatives: how gradients are taken.
        data: the training data, read a step's examples at a time.
    """

    run: Replay
    problem: Problem
    derivatives: Derivatives
    data: Source

    @staticmethod
    def of(run: Replay, problem: Problem, derivatives: Derivatives) -> Runner:
        """Check that the run is one of this problem.

        Raises:
            InvalidInput: parameters take no part that training moves, or layers behave differently in training.
        """
        trained = sum(p.numel() for p in problem.model.parameters() if p.requires_grad)
        if problem.space.size != trained:
            raise InvalidInput(
                f"Unrolling follows all {trained:,} parameters that training moved, and {problem.space.size:,} were "
                "named; leave parameters= out."
            )
        random = next(
            (type(m).__name__ for m in problem.model.modules() if isinstance(m, _NOT_REPEATED) and _is_active(m)), None
        )
        if random is not None:
            raise InvalidInput(
                f"{random} makes training steps that cannot be repeated from the data alone; use another method, such "
                "as ptif.methods.along(run)."
            )
        widest = max(len(ids) for ids in run.batches)
        return Runner(run, problem, derivatives, replace(problem.data, batch_size=widest, fixed=True))

    def __len__(self) -> int:
        return len(self.run)

    @contextmanager
    def open(self) -> Iterator[None]:
        """Have the weights of the run in the model for a while, then its own back."""
        with at_checkpoint(self.problem.model, self.run.start):
            yield

    def begin(self) -> Weights:
        """Before the first step; the model holds the start."""
        return self.run.rule.start(self.read())

    def read(self) -> Float[Tensor, " p"]:
        """The model's present weights, [P]."""
        values = {k: v.detach()[None] for k, v in self.problem.space.values(self.problem.model).items()}
        return self.problem.space.from_parameters(values).flat()[0].clone()

    def load(self, theta: Float[Tensor, " p"]) -> None:
        """Give the model these weights.

        Args:
            theta: [P].
        """
        space = self.problem.space
        values = space.to_parameters(space.rows(theta[None]))
        with torch.no_grad():
            for name, parameter in space.values(self.problem.model).items():
                parameter.copy_(values[name][0])

    def gradient(self, step: int, on_data: Float[Tensor, " n"] | None = None) -> Float[Tensor, " p"]:
        """The mean gradient of a step's examples at the model's present weights, [P].

        Args:
            step: which step.
            on_data: a weight on every training example's loss; `None`: 1.

        Raises:
            NonFinite: a loss or gradient is.
        """
        objective, space, model = self.derivatives.objective, self.problem.space, self.problem.model
        with self.batch(step) as (ids, batch), torch.enable_grad():
            outputs = objective.outputs(model, batch)
            losses = objective.losses(outputs, batch)
            share = torch.full_like(losses, 1.0 / len(ids))
            share = share if on_data is None else share * on_data[ids].to(share)
            parameters = space.values(model)
            parts = weighted_gradient(losses, list(parameters.values()), share)
        values = {k: part[None] for k, part in zip(parameters, parts, strict=True)}
        flat = space.from_parameters(values).flat()[0]
        if not bool(torch.isfinite(flat).all()):
            raise NonFinite(f"The gradient of step {step + 1:,} of the run is NaN or infinite: the training diverged.")
        return flat

    @contextmanager
    def batch(self, step: int) -> Iterator[tuple[Tensor, Any]]:
        """(ids, batch) of a step."""
        with first_batch(self.problem, self.data, self.run.batches[step], "steps of the run") as pair:
            yield pair

    def advance(self, at: Weights, step: int, on_data: Float[Tensor, " n"] | None = None) -> Weights:
        """Take one step.

        Args:
            at: weights and moments before it.
            step: which step.
            on_data: as for `gradient`.
        """
        self.load(at.theta)
        assert isinstance(self.run.rates, tuple), "made so"
        return self.run.rule.step(at, self.gradient(step, on_data), self.run.rates[step], step)

    def train(self, on_data: Float[Tensor, " n"] | None = None) -> Weights:
        """Take all steps from the start, and give what comes out.

        Args:
            on_data: as for `gradient`.
        """
        with self.open():
            at = self.begin()
            for step in track(range(len(self)), len(self), "training again", unit="step"):
                at = self.advance(at, step, on_data)
        return at

    def products(self, step: int) -> Products:
        """Products with the Hessian of a step's examples at the model's present weights."""
        with self.batch(step) as (ids, batch):
            return Products.of(self.derivatives, batch, len(ids))


def _is_active(module: nn.Module) -> bool:
    return getattr(module, "p", 1.0) != 0
