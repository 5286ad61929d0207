"""Objectives from `torch.nn` losses and from functions of outputs and targets."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from ..core.errors import InvalidInput
from .base import AbstractObjective
from .batch_loss import AbstractBatchLoss, MeanOfExamples, MeanOfLabels, SumOfExamples
from .bernoulli import Bernoulli
from .likelihoods import CrossEntropy, SquaredError
from .measures import FromFunction


def as_objective(loss: Any) -> AbstractObjective:
    """An objective from an objective, a `torch.nn` loss, a loss of `torch.nn.functional`, or a function.

    `CrossEntropyLoss`, `NLLLoss`, `MSELoss`, `BCEWithLogitsLoss` and `BCELoss` become likelihoods with the
    same settings; every other loss module or function of (outputs, targets) is wrapped in `FromFunction`.
    `functools.partial(F.cross_entropy, weight=w)` is the module with these settings. A module whose forward was
    replaced on the instance, or that has hooks, is taken as it is called. Whatever the reduction, the objective gives
    one number per example; with several outputs per example "sum" adds them up, "mean" and "none" average them.

    `NLLLoss` becomes `CrossEntropy`: log-probabilities have logsumexp 0, whatever the parameters, so
    log-softmax leaves them, and hence value and parameter gradient, as they are; the Gauss-Newton matrix
    becomes that of the softmax before them, where NLL itself, linear in its outputs, would give 0.

    Raises:
        InvalidInput: it is none of these, or a class where an instance is needed.

    Example:
        >>> as_objective(nn.MSELoss())
        SquaredError(average=True, half=False)
        >>> as_objective(nn.L1Loss())
        FromFunction(function=L1Loss())
    """
    if isinstance(loss, AbstractObjective):
        return loss
    loss = _as_module(loss)
    if isinstance(loss, type):
        known = issubclass(loss, (nn.Module, AbstractObjective))
        hint = f"pass an instance, {loss.__name__}(...)" if known else "pass a loss"
        raise InvalidInput(f"The loss is the class {loss.__name__}; {hint}.")
    if isinstance(loss, nn.Module):
        # Subclasses may compute something else, so the type must be the very one.
        own = _computes_its_own(loss)
        convert = None if own else _MODULES.get(type(loss))
        takes_one = True if type(loss).__module__ == nn.modules.loss.__name__ and not own else None
        return convert(loss) if convert is not None else FromFunction(_with_mean_reduction(loss), takes_one=takes_one)
    if not callable(loss):
        raise InvalidInput(
            f"The loss is {loss!r} of type {type(loss).__name__}; expected an objective such as "
            "CrossEntropy(), a torch.nn loss, or a function of (outputs, targets)."
        )
    takes_one = True if getattr(loss, "__module__", "") == F.__name__ else None
    return FromFunction(loss, takes_one=takes_one)


def divides_by_class_weights(loss: Any) -> bool:
    """Whether it is a loss of torch whose mean is one over the total class weight, where ours is over the examples.

    Args:
        loss: any loss.
    """
    loss = _as_module(loss)
    if type(loss) not in (nn.CrossEntropyLoss, nn.NLLLoss) or loss.reduction != "mean" or _computes_its_own(loss):
        return False
    return loss.weight is not None and not bool((loss.weight == 1).all())


def as_batch_loss(loss: Any, objective: AbstractObjective) -> AbstractBatchLoss:
    """What a training step by the loss makes of a batch's examples.

    Args:
        loss: as it was given; an objective and `reduction="none"` leave the mean over the examples.
        objective: made of it, with its reduction known where it is a function.
    """
    loss = _as_module(loss)
    if type(loss) not in _MODULES or _computes_its_own(loss):
        summed = isinstance(objective, FromFunction) and objective.reduction == "sum"
        return SumOfExamples() if summed else MeanOfExamples()
    of_labels = isinstance(loss, (nn.CrossEntropyLoss, nn.NLLLoss))
    if loss.reduction == "sum":
        return SumOfExamples(positions=of_labels)
    if loss.reduction == "mean" and of_labels:
        return MeanOfLabels(_detach(loss.weight), loss.ignore_index)
    return MeanOfExamples()


def _as_module(loss: Any) -> Any:
    """The module of torch that a loss of `torch.nn.functional` with settings is; anything else as it is.

    Args:
        loss: any loss.
    """
    partial = isinstance(loss, functools.partial)
    function, settings = (loss.func, loss.keywords) if partial else (loss, {})
    module = next((module for known, module in _MODULE_OF if known is function), None)
    if module is None or (partial and loss.args):
        return loss
    if any(isinstance(value, Tensor) and value.requires_grad for value in settings.values()):
        return loss  # refused as a loss with weights of its own
    try:
        return module(**settings)
    except TypeError:  # a setting that the module does not have
        return loss


def _computes_its_own(loss: nn.Module) -> bool:
    """Whether forward was replaced on this instance, or hooks may change what it gives."""
    return "forward" in vars(loss) or bool(loss._forward_hooks or loss._forward_pre_hooks)


def _with_mean_reduction(loss: nn.Module) -> nn.Module:
    """The module, returning one number: without reduction it would return one per output, not per example."""
    if not isinstance(loss, nn.modules.loss._Loss) or getattr(loss, "reduction", None) != "none":
        return loss
    averaging = copy.copy(loss)
    averaging.reduction = "mean"
    return averaging


def _detach(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.detach()


def _cross_entropy(loss: Any) -> AbstractObjective:
    return CrossEntropy(_detach(loss.weight), loss.label_smoothing, loss.ignore_index)


def _nll(loss: Any) -> AbstractObjective:
    return CrossEntropy(_detach(loss.weight), 0.0, loss.ignore_index, from_log_probabilities=True)


def _squared(loss: Any) -> AbstractObjective:
    return SquaredError(average=loss.reduction != "sum", half=False)


def _bce(loss: Any) -> AbstractObjective:
    average = loss.reduction != "sum"
    if type(loss) is nn.BCELoss:
        return Bernoulli(_detach(loss.weight), average=average, from_probabilities=True)
    return Bernoulli(_detach(loss.weight), _detach(loss.pos_weight), average=average)


_MODULES: dict[type[nn.Module], Callable[[Any], AbstractObjective]] = {
    nn.CrossEntropyLoss: _cross_entropy,
    nn.NLLLoss: _nll,
    nn.MSELoss: _squared,
    nn.BCEWithLogitsLoss: _bce,
    nn.BCELoss: _bce,
}

# What each of these takes besides outputs and targets is what its module's constructor takes.
_MODULE_OF: tuple[tuple[Any, Callable[..., nn.Module]], ...] = (
    (F.cross_entropy, nn.CrossEntropyLoss),
    (F.nll_loss, nn.NLLLoss),
    (F.mse_loss, nn.MSELoss),
    (F.binary_cross_entropy_with_logits, nn.BCEWithLogitsLoss),
    (F.binary_cross_entropy, nn.BCELoss),
)
