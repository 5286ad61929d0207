"""A problem whose training loss is inferred: what it says of texts, and weight decay beside a sum over their tokens."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from ..objectives.tokens import TokenCrossEntropy
from .data import Source
from .infer_loss import infer_objective
from .problem import Problem
from .weight_decay import WeightDecay


def inferred_problem(
    model: nn.Module, source: Source, device: torch.device | str | None = None, **options: Any
) -> Problem:
    """A problem with the loss that model and data suggest.

    Args:
        model: the trained model.
        source: its training data.
        device: where to compute; None: where the model is.
        options: further arguments of `Problem`; a weight decay is one beside the loss of a training batch.

    Raises:
        InvalidInput: as `infer_objective` and `Problem`.
    """
    objective = infer_objective(model, source, device)
    if not isinstance(objective, TokenCrossEntropy):
        return Problem(model, objective, source, device=device, **options)
    said = ""
    if not objective.average:
        said = "a text counts with the sum over its predicted tokens, as in the model's mean over the tokens of a batch"
    elif source.loaded_singly:
        said = "every text counts alike, with the mean over its predicted tokens, as in batches of one text"
    source = replace(source, reading="; ".join(filter(None, (source.reading, said))))
    made = Problem(model, objective, source, device=device, **options)
    return made if objective.average else with_decay_of_batches(made, None)


def with_decay_of_batches(made: Problem, tokens: float | None) -> Problem:
    """The decay beside a sum over tokens: beside their mean it is the number that was given, so that times as large.

    Args:
        made: a problem of texts, each of which counts with the sum over its tokens.
        tokens: how many tokens of a text are predicted, on average; None: they are counted.
    """
    decay = made.weight_decay
    if decay.is_zero or not isinstance(made.objective, TokenCrossEntropy):
        return made
    tokens = _mean_tokens(made, made.objective) if tokens is None else tokens
    strength: Any = decay.strength
    scaled = {k: v * tokens for k, v in strength.items()} if isinstance(strength, Mapping) else strength * tokens
    return made.with_(weight_decay=WeightDecay(scaled, decay.per_example))


def _mean_tokens(made: Problem, objective: TokenCrossEntropy) -> float:
    return sum(int(objective.taught(batch).sum()) for _, batch in made.data.batches()) / len(made)
