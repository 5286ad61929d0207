"""The training loss, inferred from a model's outputs and its targets."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..core.batches import to_device
from ..core.errors import InvalidInput
from ..objectives.base import AbstractObjective, check_outputs, inputs_and_targets
from ..objectives.bernoulli import Bernoulli
from ..objectives.likelihoods import CrossEntropy, SquaredError, TokenCrossEntropy
from .data import Source
from .model_state import preserved
from .problem import check_weights, model_device


def infer_objective(model: nn.Module, source: Source, device: torch.device | str | None = None) -> AbstractObjective:
    """The training loss, guessed from two examples' outputs and targets; refused when it could be more than one."""
    check_weights(model)
    ids, batch = next(iter(source.batches(torch.arange(min(2, len(source))))))
    source.check_finite(ids, batch)
    batch = to_device(batch, model_device(model, device))
    with preserved(model), torch.no_grad():
        outputs = CrossEntropy().outputs(model, batch)
    targets = inputs_and_targets(batch)[2]
    check_outputs(outputs, ids)
    shapes = f"outputs {tuple(outputs.shape)} and targets {_describe(targets)}"
    if not isinstance(targets, Tensor):
        raise InvalidInput(f"The loss cannot be told from {shapes}; pass loss=, e.g. torch.nn.CrossEntropyLoss().")
    whole = not targets.is_floating_point()
    if (
        whole
        and outputs.dim() >= 2
        and targets.shape == outputs.shape[:1]
        and outputs.dim() == 2
        and outputs.shape[1] > 1
    ):
        return CrossEntropy()
    if whole and outputs.dim() == 3 and targets.shape == outputs.shape[:2]:
        return TokenCrossEntropy(shift=_is_causal(batch, targets))
    single = outputs.numel() == len(ids)
    if whole and single and targets.numel() == len(ids):
        return Bernoulli()
    binary = bool(((targets == 0) | (targets == 1)).all())
    if not whole and not binary and outputs.numel() == targets.numel():
        return SquaredError()
    raise InvalidInput(
        f"The loss cannot be told from {shapes}; pass loss=, e.g. torch.nn.CrossEntropyLoss(), MSELoss() or "
        "BCEWithLogitsLoss()."
    )


def _is_causal(batch: Any, targets: Tensor) -> bool:
    """Whether the labels repeat the inputs, so that position t predicts token t + 1."""
    inputs = batch.get("input_ids") if isinstance(batch, Mapping) else None
    if not isinstance(inputs, Tensor) or inputs.shape != targets.shape:
        return False
    counted = targets >= 0
    return bool((inputs[counted] == targets[counted]).all())


def _describe(targets: Any) -> str:
    return f"{tuple(targets.shape)} of {targets.dtype}" if isinstance(targets, Tensor) else type(targets).__name__
