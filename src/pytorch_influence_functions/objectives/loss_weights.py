"""Losses that have weights of their own, as ArcFace and the centre loss do: the loss is a function of those too."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, final

from torch import Tensor, nn

from ..core.errors import InvalidInput
from ..core.functional import call_with
from .outputs import OutputsAndWeights


@final
@dataclass(frozen=True, eq=False)
class TrainedLoss:
    """A loss module whose weights were trained along with the model's: they come with the model's outputs.

    Example:
        >>> loss = TrainedLoss(nn.Bilinear(2, 2, 1))
        >>> loss.weights
        ('weight', 'bias')
    """

    module: nn.Module

    @property
    def __name__(self) -> str:
        return type(self.module).__name__

    @property
    def weights(self) -> tuple[str, ...]:
        """The names of its trainable parameters."""
        return tuple(name for name, parameter in self.module.named_parameters() if parameter.requires_grad)

    def __call__(self, returned: Any, targets: Any) -> Any:
        if not isinstance(returned, OutputsAndWeights):
            raise InvalidInput(
                f"The loss {self.__name__} has weights of its own, and a model trained again comes without them; "
                "measure something of the outputs alone, e.g. measure=ptif.Margin(), or let the model hold the loss."
            )
        return call_with(self.module, returned.weights, (returned.outputs, targets))


def loss_module(function: Any) -> nn.Module | None:
    """The module with trainable weights that a loss is, if it is one."""
    if isinstance(function, TrainedLoss):
        return function.module
    if isinstance(function, nn.Module) and any(p.requires_grad for p in function.parameters()):
        return function
    return None


def refuse_hidden_weights(value: Tensor, name: str, outputs: Tensor | None = None) -> None:
    """A loss of outputs and targets must not depend on trainable tensors besides: their part would be left out.

    Args:
        value: the loss, computed from outputs that were cut off from the model.
        name: what to call the loss.
        outputs: the outputs, where they are trainable for the sake of their derivative.

    Raises:
        InvalidInput: it does; the message says what to do where they were trained, and where they are fixed.
    """
    hidden = [tensor for tensor in _trainable_behind(value) if tensor is not outputs]
    if hidden:
        shapes = ", ".join(str(tuple(tensor.shape)) for tensor in hidden[:3]) + (", ..." if len(hidden) > 3 else "")
        raise InvalidInput(
            f"The loss {name} depends on trainable weights beside the model's outputs (of shape {shapes}), and what "
            "they learned would be left out; if they were trained with the model, make the loss a torch.nn.Module that "
            "holds them and they take part, if they are fixed, call requires_grad_(False) on them, and for a penalty "
            "on the model's own weights use weight_decay=."
        )


def _trainable_behind(value: Tensor) -> list[Tensor]:
    """The tensors at the leaves of a graph."""
    leaves: list[Tensor] = []
    waiting: list[Any] = [value.grad_fn]
    visited: set[Any] = set()
    while waiting:
        node = waiting.pop()
        if node is None or node in visited:
            continue
        visited.add(node)
        if hasattr(node, "variable"):
            leaves.append(node.variable)
        waiting.extend(following for following, _ in node.next_functions)
    return leaves
