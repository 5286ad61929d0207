"""The training loss, inferred from a model's outputs and its targets, or refused with the readings that fit."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Final

import torch
from torch import Tensor, nn

from ..core.batches import to_device, whole_batch
from ..core.errors import InvalidInput
from ..core.indexing import spread_sample
from ..objectives.base import AbstractObjective, check_outputs, inputs_and_targets
from ..objectives.bernoulli import Bernoulli
from ..objectives.likelihoods import CrossEntropy, SquaredError
from ..objectives.tokens import TokenCrossEntropy
from .data import Source
from .model_state import preserved
from .own_loss import OwnLoss, is_half, warn_of_taught_padding
from .problem import check_weights, model_device

# Values are judged on up to this many examples, evenly spaced.
_LOOK: Final = 16
# Outputs of a regression on 0 and 1 lie in this range, but for a few; logits of a trained classifier do not.
_NEAR_LABELS: Final = (-1.0, 2.0)
_MOST_OUTSIDE: Final = 0.25


def infer_objective(
    model: nn.Module, source: Source, device: torch.device | str | None = None, own: OwnLoss | None = None
) -> AbstractObjective:
    """The training loss, from shapes, types and values of outputs and targets of a few examples.

    Where the model returns a loss of its own for labels, as models of transformers do, this says what outputs and
    targets leave open (whether a loss of tokens is shifted, and over what it is a mean), and must be the same.

    Args:
        model: the trained model.
        source: its training data.
        device: where to compute; None: where the model is.
        own: what training computes for a batch; None: what the model returns.

    Raises:
        InvalidInput: more than one loss fits, or the model returns another; the message names the readings and what to
            write for each.
    """
    check_weights(model)
    source = replace(source, batch_size=min(_LOOK, source.batch_size))
    device, looks, every = model_device(model, device), list[tuple[Any, Tensor]](), list[Tensor]()
    for ids, batch in source.batches(spread_sample(len(source), _LOOK)):
        source.check_finite(ids, batch)
        batch = source.in_precision_of(to_device(batch, device), model)
        with preserved(model), torch.no_grad():
            looks.append((batch, CrossEntropy().outputs(model, batch)))
        check_outputs(looks[-1][1], ids)
        every.append(ids)
    own = OwnLoss.of(model) if own is None else own
    try:
        objective = _from_values(looks)
    except InvalidInput:
        said = _from_own_loss(looks, own, is_half(model))
        if said is None:
            raise
        return said
    if isinstance(objective, TokenCrossEntropy):
        warn_of_taught_padding([batch for batch, _ in looks])
    return _as_training_computes(objective, list(zip(every, looks, strict=True)), model, own, source.loaded_singly)


def _as_training_computes(
    objective: AbstractObjective,
    looks: list[tuple[Tensor, tuple[Any, Tensor]]],
    model: nn.Module,
    own: OwnLoss,
    singly: bool,
) -> AbstractObjective:
    """The objective, or what it leaves open, as training's own loss of the same batches says it.

    Args:
        objective: what outputs and targets suggest.
        looks: the indices of each batch that was looked at, the batch, and its outputs.
        model: the model.
        own: what training computes.
        singly: whether training saw batches of one example.

    Raises:
        InvalidInput: training's own loss is another.
    """
    ids, (batch, outputs) = looks[0]
    try:
        objective.check(outputs, batch, ids)
    except InvalidInput:
        return objective  # refused in its own words, with the examples named, where the losses are used
    if (own.is_models and not _meets_its_labels(objective, batch)) or own.value(batch) is None:
        return objective
    half, first = is_half(model), None
    for candidate in _readings(objective):
        for ids, (batch, outputs) in looks:
            gap = own.gap(candidate, batch, outputs, half)
            if gap is not None:
                first = (ids.tolist(), gap) if first is None else first
                break
        else:
            if singly and isinstance(candidate, TokenCrossEntropy):
                return replace(candidate, average=True)
            return candidate
    assert first is not None, "some reading differed"
    looked, gap = first
    # What another reading gives for one batch it does not give for all.
    raise own.refusal(objective, looked, replace(gap, otherwise=None), "which their outputs and targets suggest")


def _meets_its_labels(objective: AbstractObjective, batch: Any) -> bool:
    """Whether training gave the model these labels: named ones, or in a tuple those that repeat the inputs.

    Labels that are moved by one already are for a loss of the outputs.
    """
    batch = whole_batch(batch)
    if isinstance(batch, Mapping):
        inputs, targets = batch.get("input_ids"), inputs_and_targets(batch)[2]
        if not isinstance(objective, TokenCrossEntropy) or not isinstance(inputs, Tensor):
            return True
        moved = inputs.shape == targets.shape and _repeats(inputs[:, 1:], targets[:, :-1])
        return not moved or _repeats(inputs, targets) or not bool((targets[:, :-1] >= 0).any())
    return isinstance(objective, TokenCrossEntropy) and _is_causal(batch, inputs_and_targets(batch)[2])


def _from_own_loss(looks: list[tuple[Any, Tensor]], own: OwnLoss, half: bool) -> AbstractObjective | None:
    """Where values suggest several losses, the one that training computes for named labels; None where it is none."""
    batch, outputs = looks[0]
    if not isinstance(whole_batch(batch), Mapping) or outputs.dim() != 2:
        return None
    targets = inputs_and_targets(batch)[2]
    candidates: list[AbstractObjective] = []
    if isinstance(targets, Tensor) and targets.is_floating_point() and targets.numel() == outputs.numel():
        candidates = [Bernoulli(average=True), Bernoulli(), SquaredError(average=True, half=False), SquaredError()]
    elif isinstance(targets, Tensor) and not targets.is_floating_point() and targets.shape == outputs.shape[:1]:
        candidates = [CrossEntropy()] if outputs.shape[1] > 1 else []
    if not candidates or any(own.value(batch) is None for batch, _ in looks):
        return None
    for candidate in candidates:
        if all(own.gap(candidate, batch, outputs, half) is None for batch, outputs in looks):
            return candidate
    return None


def _readings(objective: AbstractObjective) -> list[AbstractObjective]:
    """What outputs and targets leave open, the likeliest first."""
    if isinstance(objective, TokenCrossEntropy):
        shifts = (objective.shift, not objective.shift)
        return [replace(objective, shift=shift, average=average) for shift in shifts for average in (False, True)]
    if isinstance(objective, SquaredError):
        return [objective, SquaredError(average=True, half=False)]
    return [objective, Bernoulli(average=True)] if isinstance(objective, Bernoulli) else [objective]


def _from_values(looks: list[tuple[Any, Tensor]]) -> AbstractObjective:
    """The loss that shapes, types and values suggest."""
    batch, outputs = looks[0]
    targets = inputs_and_targets(batch)[2]
    if not isinstance(targets, Tensor):
        raise InvalidInput(
            f"The loss cannot be told from outputs {tuple(outputs.shape)} and targets {_describe(targets)}; pass "
            "loss=, e.g. torch.nn.CrossEntropyLoss()."
        )
    outputs = _together([outputs for _, outputs in looks])
    targets = _together([inputs_and_targets(batch)[2] for batch, _ in looks])
    shapes = f"outputs {tuple(outputs.shape)} and targets {_describe(targets)}"
    if not targets.is_floating_point():
        if outputs.dim() == 2 and outputs.shape[1] > 1 and targets.shape == outputs.shape[:1]:
            return _infer_classes(outputs)
        if outputs.dim() == 3 and targets.shape == outputs.shape[:2]:
            return _infer_tokens(outputs, targets, batch)
        if outputs.numel() == len(outputs) == targets.numel():
            return _infer_decisions(outputs, targets)
        if outputs.dim() > 3 and _one_class_each(outputs, targets) and not _in_unit_interval(outputs):
            return CrossEntropy()
    elif outputs.numel() == targets.numel() and not bool(((targets == 0) | (targets == 1)).all()):
        return _infer_numbers(outputs, targets)
    raise InvalidInput(f"The loss cannot be told from {shapes}; {_offer_losses(outputs, targets)}")


def _offer_losses(outputs: Tensor, targets: Tensor) -> str:
    """The losses that take outputs and targets of these shapes, as they would be written."""
    yes_or_no = "torch.nn.BCELoss()" if _in_unit_interval(outputs) else "torch.nn.BCEWithLogitsLoss()"
    whole = not targets.is_floating_point()
    fits = targets.numel() == outputs.numel()
    if fits and bool(((targets == 0) | (targets == 1)).all()):
        if outputs.dim() == 2 and outputs.shape == targets.shape and bool((targets.sum(-1) == 1).all()):
            converted = " with targets.float()" if whole else ""
            return (
                f"write loss=torch.nn.CrossEntropyLoss(){converted} if the targets are one-hot, each example having "
                f"one class, or loss={yes_or_no} if it may have several."
            )
        return f"write loss={yes_or_no} for a yes or no per output, or loss=torch.nn.MSELoss() for a regression."
    if whole and targets.shape[-1:] == (1,) and _one_class_each(outputs, targets[..., 0]):
        return "write loss=torch.nn.CrossEntropyLoss() with targets.squeeze(-1), class numbers without an axis of 1."
    if whole and _one_class_each(outputs, targets):
        return "write loss=torch.nn.CrossEntropyLoss() if that loss was given these outputs as they are."
    if fits:
        return "write loss=torch.nn.MSELoss() for a regression, or pass the loss that training minimised."
    return "pass loss=, the loss that training minimised: a torch.nn loss, or a function of (outputs, targets)."


def _one_class_each(outputs: Tensor, targets: Tensor) -> bool:
    """Whether there is one target per example and position, and the second axis of the outputs runs over classes."""
    return outputs.dim() > 1 and targets.shape == (outputs.shape[0], *outputs.shape[2:])


def _infer_classes(outputs: Tensor) -> AbstractObjective:
    if _in_unit_interval(outputs):
        if _sums_to_one(outputs):
            raise InvalidInput(
                f"The loss cannot be told: {_looked_at(outputs)} are probabilities (a softmax at the end); write "
                "loss=ptif.CrossEntropy(from_probabilities=True) if training took their logarithm, or "
                "loss=torch.nn.CrossEntropyLoss() if that loss was given the probabilities as they are."
            )
        raise InvalidInput(
            f"The loss cannot be told: {_looked_at(outputs)} all lie in [0, 1] but do not sum to 1 (a sigmoid at the "
            "end), and targets are class numbers; write loss=torch.nn.CrossEntropyLoss() if that loss was given these "
            "outputs as they are, or, for one yes or no per class, loss=lambda p, y: "
            "torch.nn.functional.binary_cross_entropy(p, torch.eye(p.shape[1])[y].to(p))."
        )
    # Log-probabilities are their own log-softmax, so both readings are the same loss.
    return CrossEntropy(from_log_probabilities=_are_log_probabilities(outputs))


def _infer_tokens(outputs: Tensor, targets: Tensor, batch: Any) -> AbstractObjective:
    # Of a tuple only a model that returns a loss for such labels says so: an autoencoder's repeat the inputs too.
    shift = isinstance(whole_batch(batch), Mapping) and _is_causal(batch, targets)
    if outputs.shape[1] == outputs.shape[2]:
        length = outputs.shape[1]
        raise InvalidInput(
            f"The loss cannot be told: outputs {tuple(outputs.shape)} have {length} positions and {length} classes; "
            f"write loss=ptif.TokenCrossEntropy({'shift=True' if shift else ''}) if they are (examples, tokens, "
            "classes), or loss=torch.nn.CrossEntropyLoss() if they are (examples, classes, positions)."
        )
    if _in_unit_interval(outputs) and _sums_to_one(outputs):
        raise InvalidInput(
            f"The loss cannot be told: {_looked_at(outputs)} are probabilities of tokens (a softmax at the end); write "
            "loss=lambda p, y: torch.nn.functional.nll_loss(p.log().flatten(0, 1), y.flatten()) if training took "
            f"their logarithm, or loss=ptif.TokenCrossEntropy({'shift=True' if shift else ''}) if cross entropy was "
            "given them as they are."
        )
    return TokenCrossEntropy(shift=shift)


def _infer_decisions(outputs: Tensor, targets: Tensor) -> AbstractObjective:
    """One output per example and whole numbers as targets: logits, probabilities or numbers."""
    if not bool(((targets == 0) | (targets == 1)).all()):
        raise InvalidInput(
            "The loss cannot be told: there is one output per example, and targets are whole numbers from "
            f"{int(targets.min())} to {int(targets.max())}; write loss=torch.nn.MSELoss() for a regression on them, or "
            "loss=lambda f, y: torch.nn.functional.poisson_nll_loss(f.flatten(), y.flatten()) for counts, the model "
            "giving their logarithm."
        )
    if _in_unit_interval(outputs):
        raise InvalidInput(
            f"The loss cannot be told: {_looked_at(outputs)} all lie in [0, 1], and targets are 0 or 1; write "
            "loss=torch.nn.BCELoss() if they are probabilities (a sigmoid at the end), loss=torch.nn.MSELoss() for a "
            "regression on 0 and 1, or loss=torch.nn.BCEWithLogitsLoss() if they are logits."
        )
    low, high = _NEAR_LABELS
    if float(((outputs < low) | (outputs > high)).float().mean()) <= _MOST_OUTSIDE:
        raise InvalidInput(
            f"The loss cannot be told: {_looked_at(outputs)} lie near the targets 0 and 1, so they may be logits or a "
            "regression; write loss=torch.nn.BCEWithLogitsLoss() if they are logits, or loss=torch.nn.MSELoss() for a "
            "regression on 0 and 1."
        )
    return Bernoulli()


def _infer_numbers(outputs: Tensor, targets: Tensor) -> AbstractObjective:
    """Real numbers as targets, as many as outputs."""
    if _in_unit_interval(targets.to(outputs.dtype)):
        if outputs.dim() == 2 and outputs.shape[1] > 1 and _sums_to_one(targets.to(outputs.dtype).view_as(outputs)):
            reading = (
                "loss=ptif.CrossEntropy(from_probabilities=True)"
                if _in_unit_interval(outputs) and _sums_to_one(outputs)
                else "loss=torch.nn.CrossEntropyLoss()"
            )
            raise InvalidInput(
                "The loss cannot be told: the targets of each example sum to 1; write "
                f"{reading} if they are probabilities of classes, or loss=torch.nn.MSELoss() for a regression on them."
            )
        if _in_unit_interval(outputs):
            raise InvalidInput(
                f"The loss cannot be told: {_looked_at(outputs)} and the targets all lie in [0, 1]; write "
                "loss=torch.nn.BCELoss() if both are probabilities, or loss=torch.nn.MSELoss() for a regression."
            )
    return SquaredError()


# --------------------------------------------------------------------------- values


def _together(parts: list[Tensor]) -> Tensor:
    """All batches as one, or the first alone where padding gives them different shapes."""
    return torch.cat(parts) if len({part.shape[1:] for part in parts}) == 1 else parts[0]


def _in_unit_interval(values: Tensor) -> bool:
    """Whether all values lie in [0, 1] and say something: a model that gives 0 everywhere has no last layer to see."""
    room = torch.finfo(values.dtype).eps ** 0.5
    return bool(((values >= 0) & (values <= 1 + room)).all()) and bool((values != values.flatten()[0]).any())


def _sums_to_one(values: Tensor) -> bool:
    allowed = max(torch.finfo(values.dtype).eps ** 0.5, 1e-3)
    return bool(((values.sum(-1) - 1).abs() <= allowed).all())


def _are_log_probabilities(outputs: Tensor) -> bool:
    allowed = max(torch.finfo(outputs.dtype).eps ** 0.5, 1e-3)
    return bool((outputs.logsumexp(-1).abs() <= allowed).all())


def _looked_at(outputs: Tensor) -> str:
    return f"the outputs of the {len(outputs)} examples looked at"


def _is_causal(batch: Any, targets: Tensor) -> bool:
    """Whether the labels repeat the inputs, so that position t predicts token t + 1."""
    batch = whole_batch(batch)
    inputs = batch.get("input_ids") if isinstance(batch, Mapping) else None
    if isinstance(batch, (tuple, list)):
        inputs = batch[0].get("input_ids") if isinstance(batch[0], Mapping) else batch[0]
    return isinstance(inputs, Tensor) and inputs.shape == targets.shape and _repeats(inputs, targets)


def _repeats(inputs: Tensor, targets: Tensor) -> bool:
    """Whether the labels that count are the inputs beside them."""
    counted = targets >= 0
    return bool((inputs[counted] == targets[counted]).all())


def _describe(targets: Any) -> str:
    return f"{tuple(targets.shape)} of {targets.dtype}" if isinstance(targets, Tensor) else type(targets).__name__
