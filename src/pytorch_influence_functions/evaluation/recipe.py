"""The built-in training recipe. The alternative is a user's own training function."""

from __future__ import annotations

import inspect
import math
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any, TypeAlias, final

import torch
from jaxtyping import Int
from torch import Tensor, nn

from ..core.errors import InvalidInput
from ..core.validate import whole_number
from ..objectives.base import AbstractObjective
from ..objectives.batch_loss import AbstractBatchLoss
from ..objectives.convert import as_batch_loss, as_objective
from ..objectives.loss_weights import loss_module
from ..objectives.measures import FromFunction
from ..trajectory.replay import Replay

# All threads share one random generator, so models are made one after the other.
_seeding = threading.Lock()

Optimizer: TypeAlias = Callable[[Iterable[Tensor]], torch.optim.Optimizer]
TrainFunction: TypeAlias = Callable[[Any, int], nn.Module]
"""`(dataset, seed) -> trained model`; the dataset holds what is kept, with `.indices` into the whole one."""


@final
@dataclass(frozen=True)
class ConstantRate:
    """The same learning rate at every step."""

    def __call__(self, step: int, steps: int) -> float:
        """The factor on the learning rate at `step` of `steps`."""
        return 1.0


@final
@dataclass(frozen=True)
class LinearDecay:
    """The rate rises from zero during the share `warmup` of all steps, then falls to zero in a straight line.

    >>> [LinearDecay(warmup=0.0)(step, 4) for step in range(4)]
    [1.0, 0.75, 0.5, 0.25]
    """

    warmup: float = 0.1

    def __call__(self, step: int, steps: int) -> float:
        """The factor on the learning rate at `step` of `steps`."""
        return _rising(step, steps, self.warmup) * (1.0 - step / steps)


@final
@dataclass(frozen=True)
class CosineDecay:
    """The rate rises from zero during the share `warmup` of all steps, and falls to zero along half a cosine."""

    warmup: float = 0.1

    def __call__(self, step: int, steps: int) -> float:
        """The factor on the learning rate at `step` of `steps`."""
        return _rising(step, steps, self.warmup) * 0.5 * (1.0 + math.cos(math.pi * step / steps))


def _rising(step: int, steps: int, warmup: float) -> float:
    return min(1.0, (step + 1) / max(1.0, warmup * steps))


Schedule: TypeAlias = ConstantRate | LinearDecay | CosineDecay


@final
@dataclass(frozen=True)
class Recipe:
    """Mini-batch training with an optimiser of `torch.optim`: the built-in recipe.

    Everything follows from the seed: initial weights, and the order of examples. The order is one of the whole
    training set, from which a subset takes what it keeps, so that models of one seed differ by the subset alone.

    Args:
        model: makes the untrained model, a new one at every call; called under the seed. A class, or a function without
            arguments.
        optimizer: makes the optimiser from parameters, such as `partial(torch.optim.Adam, lr=1e-3)`. Weight decay
            belongs to it.
        epochs: passes over the subset.
        batch_size: examples per step; `None`: all of them (for L-BFGS, say). An epoch's last batch holds what is left
            over. Where that is one example, and the model has batch normalisation that cannot be trained on one, it
            joins the batch before; where the training data are a loader with `drop_last=True` it is left out, as that
            loader does.
        schedule: `ConstantRate()`, `LinearDecay(warmup)` or `CosineDecay(warmup)`, per step.
        loss: the training loss, as `ptif.attribute` takes it. A step minimises what the loss makes of its batch:
            torch's mean divides by the class weights of the labels (`weight=`) and leaves ignored ones out
            (`ignore_index=`), and `reduction="sum"` sums. Of an objective such as `ptif.CrossEntropy(weight=w)`, or of
            `reduction="none"`, it is the mean over the examples. `None`: inferred.
        start: weights to begin with instead of the seed's own: a warm start.
        hold_batches: leave all batches as they are in training on everything, and give what is left out weight 0 (the
            mean still divides by the full batch): trajectory-specific removal. Otherwise batches are filled up again.

    Reference for the last: Wang et al. (2025), "Capturing the temporal dependence of training data influence".

    >>> Recipe(lambda: nn.Linear(3, 2), epochs=5).steps(100)
    10
    """

    model: Callable[[], nn.Module]
    optimizer: Optimizer = field(default=partial(torch.optim.SGD, lr=0.05, momentum=0.9))
    epochs: int = 20
    batch_size: int | None = 64
    schedule: Schedule = LinearDecay()
    loss: Any = None
    start: Mapping[str, Tensor] | None = field(default=None, compare=False)
    hold_batches: bool = False

    def __post_init__(self) -> None:
        for name in ("epochs", "batch_size"):
            if getattr(self, name) is not None:
                whole_number(name, getattr(self, name), owner=self)
        for name in ("model", "optimizer"):
            if not callable(getattr(self, name)) or isinstance(getattr(self, name), nn.Module):
                raise InvalidInput(
                    f"{name} must be a function that makes one, got {type(getattr(self, name)).__name__}; every "
                    "training needs its own, so give a class or a lambda."
                )

    def steps(self, examples: int) -> int:
        """Optimiser steps for so many examples, where no last batch of one joins another; see `batch_size`.

        Args:
            examples: how many examples are trained on.
        """
        return self.epochs * -(-examples // (self.batch_size or examples))

    def replay(self, examples: int, seed: int) -> Replay:
        """The training on all of so many examples as a run that `ptif.methods.unrolled` goes backwards.

        Args:
            examples: how many training examples there are.
            seed: of weights and order.

        Raises:
            InvalidInput: the optimiser is none that can be gone backwards, or the loss of a batch is not the mean over
                its examples.
        """
        objective = self.objective()
        if objective is not None and self.batch_loss(objective).differs:
            raise InvalidInput(
                f"The recipe's loss is {name_callable(self.loss)}, with which {self.batch_loss(objective).words}, and "
                "unrolling goes back along steps of the mean over the examples; train with the mean, such as "
                "loss=ptif.CrossEntropy(weight=...)."
            )
        model = self.fresh(seed)
        optimizer = self.optimizer([p for p in model.parameters() if p.requires_grad])
        rates = [float(group["lr"]) for group in optimizer.param_groups]
        orders = draw_orders(examples, self.epochs, seed)
        steps = [ids for order in orders for ids in torch.split(order, self.batch_size or examples)]
        factors = [self.schedule(step, len(steps)) for step in range(len(steps))]
        return Replay(model.state_dict(), steps, optimizer, [rates[0] * factor for factor in factors])

    def objective(self) -> AbstractObjective | None:
        """The loss as an objective, `None` where it is to be inferred."""
        objective = None if self.loss is None else as_objective(self.loss)
        if isinstance(objective, FromFunction) and loss_module(objective.function) is not None:
            raise InvalidInput(
                f"The loss {type(self.loss).__name__} has weights of its own, and the built-in recipe trains those of "
                "the model alone; give a training function instead, and what to measure with measure=."
            )
        return objective

    def batch_loss(self, objective: AbstractObjective) -> AbstractBatchLoss:
        """What a step makes of the losses of its examples.

        Args:
            objective: the loss as an objective, with its reduction known.
        """
        return as_batch_loss(self.loss, objective)

    def fresh(self, seed: int) -> nn.Module:
        """The model before its first step. The global random state is left alone.

        Args:
            seed: of the initial weights.

        Raises:
            InvalidInput: `model` makes no module, or gives weights that it gave before; or `start` does not fit.
        """
        with _seeding, torch.random.fork_rng(devices=[]):
            if self._gives_old_weights:
                raise InvalidInput(
                    f"The recipe's model {name_callable(self.model)} gives the same weights at every call, which "
                    "training would change in place, and each training needs its own; build the model in it, or write "
                    "lambda: copy.deepcopy(model)."
                )
            torch.manual_seed(seed)
            model = self.model()
        if not isinstance(model, nn.Module):
            raise InvalidInput(f"The recipe's model() gave {type(model).__name__}, expected a torch.nn.Module.")
        if self.start is not None:
            try:
                model.load_state_dict(dict(self.start))
            except RuntimeError as cause:
                raise InvalidInput(
                    f"The recipe's start does not fit its model: {str(cause).splitlines()[-1].strip()}"
                ) from cause
        return model.train()

    @cached_property
    def _gives_old_weights(self) -> bool:
        """Whether two calls of `model` give the same module, or share what would be trained."""
        one: Any = self.model()
        other: Any = self.model()
        if not (isinstance(one, nn.Module) and isinstance(other, nn.Module)):
            return False  # said by whoever uses it
        trained = {id(p) for p in one.parameters() if p.requires_grad}
        return one is other or any(id(p) in trained for p in other.parameters())

    def __repr__(self) -> str:
        """The settings; a warm start is only mentioned, without its numbers."""
        parts = [name_callable(self.model), f"optimizer={name_callable(self.optimizer)}", f"epochs={self.epochs}"]
        parts += [f"batch_size={self.batch_size}", f"schedule={self.schedule!r}"]
        parts += [] if self.loss is None else [f"loss={name_callable(self.loss)}"]
        parts += [] if self.start is None else ["start=given weights"]
        parts += ["hold_batches=True"] if self.hold_batches else []
        return f"Recipe({', '.join(parts)})"


def draw_orders(examples: int, epochs: int, seed: int) -> Iterator[Int[Tensor, " n"]]:
    """Yield the order of all examples in every epoch.

    Args:
        examples: how many.
        epochs: how many.
        seed: what the orders follow from.
    """
    generator = torch.Generator().manual_seed(seed)
    for _ in range(epochs):
        yield torch.randperm(examples, generator=generator)


def name_callable(function: Any) -> str:
    """What to call a function, a partial, or a record in a description: without addresses, the same in every run."""
    if isinstance(function, partial):
        arguments = [repr(a) for a in function.args] + [f"{k}={v!r}" for k, v in function.keywords.items()]
        return f"{name_callable(function.func)}({', '.join(arguments)})"
    if any(check(function) for check in (inspect.isfunction, inspect.isclass, inspect.ismethod, inspect.isbuiltin)):
        return str(function.__qualname__).replace("<locals>.", "")
    return repr(function)
