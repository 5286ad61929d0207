"""The place that a model counts each token of a padded text at."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

import torch
from jaxtyping import Int
from torch import Tensor, nn

from ..core.batches import to_device
from ..objectives.likelihoods import CrossEntropy
from ..objectives.tokens import labels_at_padding
from ..problem.model_state import preserved
from ..problem.own_loss import is_half
from ..problem.problem import model_device
from .models import accepted_arguments, is_seq2seq, marks_answers

PLACES: Final = "position_ids"


def places_told(mask: Int[Tensor, "n t"], labels: Any = None) -> Int[Tensor, "n t"]:
    """The places of all tokens, without the padding before a text; those behind it are as a model counts by itself.

    Args:
        mask: 0 at padding.
        labels: of tokens, with which padding may be taught: it has places too then, those of all tokens.

    >>> places_told(torch.tensor([[0, 0, 1, 1], [1, 1, 1, 0]]))
    tensor([[0, 0, 0, 1],
            [0, 1, 2, 3]])
    """
    before = ((mask != 0).cumsum(1) == 0).sum(1, keepdim=True)
    if isinstance(labels, Tensor) and labels.shape == mask.shape and not labels.is_floating_point():
        before = before.masked_fill(labels_at_padding(labels, mask).any(1, keepdim=True), 0)
    return (torch.arange(mask.shape[1], device=mask.device) - before).clamp_min(0)


def counts_as_told(model: nn.Module, batch: Any) -> bool:
    """Whether a model that is told no places counts all tokens from 0, hidden ones too; found by telling it these.

    Others count from the padding token's number on, or leave out padding themselves. Where padding takes part in the
    loss, as of models that mark answers, it keeps the places of training, so nothing is told either.

    Args:
        model: the model.
        batch: a text or more, told no places.
    """
    if PLACES not in accepted_arguments(model) or is_seq2seq(model) or marks_answers(model):
        return False
    ids = batch.get("input_ids") if isinstance(batch, Mapping) else None
    if not isinstance(ids, Tensor) or ids.dim() != 2 or PLACES in batch:
        return False
    batch = to_device(dict(batch), model_device(model))
    mask = batch.get("attention_mask")
    if isinstance(mask, Tensor) and mask.shape == ids.shape:
        batch["attention_mask"] = mask.index_fill(1, torch.arange(1, min(2, ids.shape[1]), device=mask.device), 0)
    told = {**batch, PLACES: torch.arange(ids.shape[1], device=batch["input_ids"].device).expand(ids.shape)}
    try:
        with preserved(model), torch.no_grad():
            untold, outputs = (CrossEntropy().outputs(model, one) for one in (batch, told))
    except Exception:  # what fails with the data as they are is refused, in words, where these are used
        return False
    # The same computation, up to what another kernel rounds.
    rounded = torch.finfo(torch.bfloat16 if is_half(model) else untold.dtype).eps ** 0.5
    return bool((outputs - untold).abs().max() <= rounded * untold.abs().max())
