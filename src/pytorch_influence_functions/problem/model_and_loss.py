"""A model and a loss that has weights of its own, as one module: both were trained, so both take part."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any, Final

from torch import nn

from ..core.functional import fit_arguments
from ..objectives.base import AbstractObjective
from ..objectives.loss_weights import TrainedLoss, loss_module
from ..objectives.measures import FromFunction
from ..objectives.outputs import OutputsAndWeights

# What the loss is called among the model's layers: the first that the model does not have.
_NAMES: Final = ("loss", "criterion", "loss_module")


class ModelAndLoss(nn.Module):
    """The model under its own names, and the loss under `loss`; it returns the outputs beside the loss's weights.

    The model is neither copied nor changed. Its parameters keep their names, so selections, weight decay and state
    dicts are written as for the model alone.

    Example:
        >>> joined = ModelAndLoss(nn.Linear(2, 3), nn.Bilinear(3, 3, 1, bias=False))
        >>> [name for name, _ in joined.named_parameters()]
        ['weight', 'bias', 'loss.weight']
    """

    def __init__(self, model: nn.Module, loss: nn.Module) -> None:
        super().__init__()
        # Written past `__setattr__`, which would make `inner` a layer and so put its name before every other.
        own = self.__dict__
        own["inner"], own["trained"] = model, TrainedLoss(loss)
        own["loss_name"] = next(name for name in _NAMES if name not in model._modules)
        own["_parameters"], own["_buffers"] = model._parameters, model._buffers
        own["_non_persistent_buffers_set"] = model._non_persistent_buffers_set
        own["_modules"] = {**model._modules, self.loss_name: loss}
        # Noted now: passes over the data switch requires_grad for a while.
        own["weights"] = self.trained.weights

    inner: nn.Module
    trained: TrainedLoss
    loss_name: str
    weights: tuple[str, ...]

    @property
    def prefix(self) -> str:
        """What stands before the names of the loss's parameters."""
        return f"{self.loss_name}."

    def forward(self, *args: Any, **kwargs: Any) -> OutputsAndWeights:
        args, kwargs = fit_arguments(self.inner, args, kwargs)
        outputs = self.inner(*args, **kwargs)
        present = dict(self.trained.module.named_parameters())
        return OutputsAndWeights(outputs, {name: present[name] for name in self.weights})

    def named_modules(
        self, memo: set[nn.Module] | None = None, prefix: str = "", remove_duplicate: bool = True
    ) -> Iterator[tuple[str, nn.Module]]:
        """The model's modules, the model itself among them, and the loss's."""
        memo = set() if memo is None else memo
        yield from self.inner.named_modules(memo, prefix, remove_duplicate)
        inside = f"{prefix}.{self.loss_name}" if prefix else self.loss_name
        yield from self.trained.module.named_modules(memo, inside, remove_duplicate)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if "inner" not in self.__dict__:
                raise
            return getattr(self.__dict__["inner"], name)


def join_loss(model: nn.Module, objective: AbstractObjective) -> tuple[nn.Module, AbstractObjective]:
    """The model and the objective as they are; or, where the loss has trainable weights, both with these taking part.

    Args:
        model: the model, alone or with the loss of before.
        objective: the training loss.
    """
    inner = model.inner if isinstance(model, ModelAndLoss) else model
    if isinstance(model, ModelAndLoss) and isinstance(getattr(objective, "function", None), TrainedLoss):
        # Also where the model is a copy in another precision: its loss is a copy then too.
        return model, replace(objective, function=model.trained)  # type: ignore[type-var]
    loss = loss_module(objective.function) if isinstance(objective, FromFunction) else None
    if loss is None or not isinstance(objective, FromFunction):
        return inner, objective
    joined = ModelAndLoss(inner, loss)
    return joined, replace(objective, function=joined.trained)
