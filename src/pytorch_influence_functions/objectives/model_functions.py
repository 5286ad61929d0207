"""Measures of the model's own numbers: one of its outputs, or any function of the whole model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, final

from jaxtyping import Float
from torch import Tensor

from ..core.errors import InvalidInput
from ..core.records import Record
from ..core.validate import whole_number
from .base import AbstractObjective, Batch, Model, check_outputs, measured_outputs


@final
@dataclass(frozen=True, eq=False, repr=False)
class Output(AbstractObjective):
    """f_j, one number of the model's outputs, whatever the target: a class's logit, a column of a regression.

    Several at once, `measure=[Output(0), Output(1)]`, give a row of scores per query and output.

    Args:
        index: which, counted from 0 over the outputs of an example flattened.
        lower_is_better: whether a smaller number is better; it only says which end is called helpful.

    Example:
        >>> import torch
        >>> Output(1).losses(torch.tensor([[2.0, 0.5]]), (None, torch.tensor([0])))
        tensor([0.5000])
    """

    index: int
    lower_is_better: bool = False

    def __post_init__(self) -> None:
        whole_number("index", self.index, 0, owner=self, hint="outputs are counted from 0")

    def outputs(self, model: Model, batch: Batch) -> Tensor:
        return measured_outputs(self, model, batch)

    def losses(self, outputs: Float[Tensor, "n *out"], batch: Batch) -> Float[Tensor, " n"]:
        return outputs.reshape(len(outputs), -1)[:, self.index]

    def check(self, outputs: Tensor, batch: Batch, ids: Tensor) -> None:
        check_outputs(outputs, ids)
        width = outputs[0].numel()
        if self.index >= width:
            raise InvalidInput(
                f"Output({self.index}) asks for an output that the model does not have: it gives {width} per example, "
                f"0 to {width - 1}."
            )


@final
@dataclass(frozen=True, repr=False)
class FromModel(Record):
    """A question about the whole model rather than about single queries: any differentiable function of it.

    It stands in the place of queries, `attribution.score(FromModel(f))`, and gives one row of scores: the predicted
    change of `f(model)` when each training example is removed. For what is no sum over examples: the area under a ROC
    curve (smoothed), the worst group's loss, a calibration error, the norm of a layer, a single coefficient. A list of
    several gives a row each.

    Args:
        function: from the model to one number, a tensor with a derivative. It must use the model that it is given,
            which is in eval mode and may be a copy in another precision, and not one of its own.
        lower_is_better: whether a smaller number is better.
        name: what the row is called; `""`: the function's name.

    Example:
        >>> FromModel(lambda model: model.weight.norm(), name="size of the weights").name
        'size of the weights'
    """

    function: Callable[[Any], Any]
    lower_is_better: bool = True
    name: str = ""

    def __post_init__(self) -> None:
        if not callable(self.function):
            raise InvalidInput(f"FromModel needs a function of the model, got {type(self.function).__name__}.")

    @property
    def called(self) -> str:
        """The row's name."""
        own = str(getattr(self.function, "__name__", type(self.function).__name__))
        return self.name or ("a function of the model" if own == "<lambda>" else own)

    def value(self, model: Any) -> Tensor:
        """The number, as a tensor without axes.

        Args:
            model: the model.

        Raises:
            InvalidInput: it is no single number, or no tensor that depends on the model.
        """
        value = self.function(model)
        if not isinstance(value, Tensor) or value.numel() != 1 or not value.is_floating_point():
            shape = f"a tensor of shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
            raise InvalidInput(
                f"The function {self.called} of FromModel returned {shape}, expected one number as a tensor that can "
                "be differentiated; leave out .item(), float() and numpy."
            )
        if not value.requires_grad:
            raise InvalidInput(
                f"The function {self.called} of FromModel has no derivative in the parameters: it was detached, or "
                "computed with another model than the one it was given; use its argument."
            )
        return value.reshape(())
