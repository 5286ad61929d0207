"""The loss that a model itself returns where it is given the labels, as models of transformers do."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar, final

import torch
from jaxtyping import Float, Num
from torch import Tensor

from ..core.batches import batch_slice, count_examples
from ..core.errors import InvalidInput
from .base import AbstractObjective, Batch, Model, check_outputs, inputs_and_targets, run_model, widen

_IGNORED = -100
_NONE = (
    "ModelLoss() is the loss that a model returns for labels=, and this one returns none; pass loss=, a function of "
    "(outputs, targets)."
)


@final
@dataclass(frozen=True, eq=False, repr=False)
class ModelLoss(AbstractObjective):
    """The loss that the model itself returns for `labels=`, `outputs.loss` or `outputs["loss"]`, of each example alone.

    For models whose forward computes a loss that cannot be told from outputs and targets: a focal loss, weights of
    classes, the balance of experts. Every example is run by itself, so it costs more time than a loss of outputs and
    targets; nothing is known of its Hessian in the outputs (GGN, Fisher and K-FAC need a likelihood). The model is
    in eval mode, so a loss that it returns in training mode alone is not found.

    Args:
        average: the loss as the model returns it, a mean over an example's own tokens; False: times the number of its
            tokens that count (labels that are not -100), as where training averaged over all tokens of a batch.
        shift: whether outputs predict the next token, so that an example's first label does not count.

    Example:
        >>> class Net(torch.nn.Linear):
        ...     def forward(self, x, labels=None):
        ...         outputs = super().forward(x)[:, 0]
        ...         return {"logits": outputs, "loss": None if labels is None else (outputs - labels).abs().mean()}
        >>> batch = {"x": torch.zeros(3, 2), "labels": torch.ones(3)}
        >>> ModelLoss().outputs(Net(2, 1), batch).shape
        torch.Size([3])
    """

    average: bool = True
    shift: bool = False
    lower_is_better: ClassVar[bool] = True

    def outputs(self, model: Model, batch: Batch) -> Float[Tensor, " n"]:
        losses = []
        n = count_examples(batch, inputs_and_targets(batch)[2])
        for e in range(n):
            one = batch_slice(batch, n, slice(e, e + 1))
            try:
                loss = returned_loss(model, one)
            except InvalidInput as failure:
                if "unexpected keyword argument 'labels'" not in str(failure):
                    raise
                raise InvalidInput(_NONE) from failure
            if loss is None:
                raise InvalidInput(_NONE)
            losses.append(loss if self.average else loss * self.counts(one)[0])
        return torch.stack(losses)

    def losses(self, outputs: Float[Tensor, "n *out"], batch: Batch) -> Float[Tensor, " n"]:
        return outputs

    def check(self, outputs: Tensor, batch: Batch, ids: Tensor) -> None:
        check_outputs(outputs, ids)

    def counts(self, batch: Batch) -> Num[Tensor, " n"]:
        """How many labels of each example count: of a loss of tokens, over how many it is a mean.

        Args:
            batch: with targets; of what is no tensor (boxes in pictures) each example counts once.
        """
        targets = inputs_and_targets(batch)[2]
        if not isinstance(targets, Tensor):
            return torch.ones(count_examples(batch, targets))
        predicted = targets[:, 1:] if self.shift else targets
        counts: Tensor = (predicted != _IGNORED).reshape(len(targets), -1).sum(1)
        return counts


def returned_loss(model: Model, batch: Batch) -> Tensor | None:
    """The loss of a batch that the model returns where it is given the labels, without axes; None: it has none.

    Args:
        model: the model, or any callable with its arguments.
        batch: see `inputs_and_targets`.

    Raises:
        InvalidInput: the model failed, as where it takes no labels.
    """
    args, kwargs, targets = inputs_and_targets(batch)
    with same_config(model):
        returned = run_model(model, args, {**kwargs, "labels": targets})
    loss: Any = returned.get("loss") if isinstance(returned, Mapping) else getattr(returned, "loss", None)
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        return None
    return widen(loss.reshape(()))


@contextmanager
def same_config(model: Model) -> Iterator[None]:
    """Put the settings of a model back, into which classifiers of transformers write what labels they were given.

    Args:
        model: the model, with a `config` or without.
    """
    config: Any = getattr(model, "config", None)
    settings: dict[str, Any] = vars(config) if hasattr(config, "__dict__") else {}
    before = dict(settings)
    try:
        yield
    finally:
        settings.update(before)
