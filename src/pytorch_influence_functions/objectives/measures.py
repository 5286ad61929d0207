"""Any function of outputs and targets, as a loss or a measure, taken one example at a time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Literal, final

import torch
from jaxtyping import Float, Num
from torch import Tensor, nn
from torch.func import vmap

from ..core.batches import Collated, batch_slice, count_examples, example_tensors, map_tensors, with_example_tensors
from ..core.errors import InfluenceError, InvalidInput, NonFinite, first_line
from ..core.validate import choice
from ..core.warn import silence_torch
from .base import (
    AbstractObjective,
    Batch,
    Model,
    check_batch,
    check_outputs,
    inputs_and_targets,
    require_one_per_example,
    require_tensor,
    run_model,
    widen,
)
from .draws import refuse_draws
from .failure import way_to_write
from .loss_weights import TrainedLoss, refuse_hidden_weights
from .networks import in_eval_mode, networks_of
from .outputs import (
    OutputLayouts,
    describe_outputs,
    has_main,
    has_rows,
    map_outputs,
    refuse_broadcast,
    with_main,
    without_weights,
)

Reduction = Literal["none", "mean", "sum"]
_REDUCTIONS = ("none", "mean", "sum")


@final
@dataclass(frozen=True, eq=False, repr=False)
class FromFunction(AbstractObjective):
    """`function(outputs, targets)`, taken one example at a time.

    On a batch the function may return one number per example ("none"), their "mean" or their "sum": on a
    single example all three agree, so each example is given alone (by `torch.func.vmap`; in a loop, if the
    function cannot be vectorised). It is given what the model returned: a tensor, a dictionary, a tuple or an object
    of several outputs. Where outputs have no row per example (a list with an entry for each), every example is run by
    itself, and its loss stands for its outputs. Nothing is known of its Hessian in the outputs: GGN, Fisher and K-FAC
    need a likelihood.

    Args:
        function: from outputs and targets of a batch to a tensor.
        lower_is_better: False for a score such as accuracy-like margins.
        reduction: what the function does to a batch; `None`: not determined yet, see `resolved`.
        takes_one: of a model that returns several outputs, the function takes the one called `logits` or `out`;
            False: all that the model returns. `None`: found out, all where the function does not fail on it.
        layouts: how several outputs were put side by side as one tensor; filled by `outputs`.

    Raises:
        InvalidInput: not a function, an unknown reduction, or (when used) a result that is no number per
            example.

    Example:
        >>> loss = FromFunction(lambda f, y: (f - y).abs().mean())
        >>> loss.losses(torch.tensor([1.0, 3.0]), (None, torch.tensor([0.0, 0.0])))
        tensor([1., 3.])
    """

    # Checked below, in words a type checker at run time would not find.
    function: Any
    lower_is_better: bool = True
    reduction: str | None = None
    takes_one: bool | None = field(default=None, repr=False)
    layouts: OutputLayouts = field(default_factory=OutputLayouts, repr=False, metadata={"fingerprint": False})

    def __post_init__(self) -> None:
        if not callable(self.function):
            raise InvalidInput(
                f"FromFunction needs a function of (outputs, targets), got {type(self.function).__name__}."
            )
        choice("reduction", self.reduction, (*_REDUCTIONS, None), owner=self, hint="None finds it out")

    def outputs(self, model: Model, batch: Batch) -> Tensor:
        args, kwargs, targets = inputs_and_targets(batch)
        if self.layouts.one_by_one:
            return self._losses_alone(model, batch, count_examples(batch, targets))
        returned = self._read(run_model(model, args, kwargs))
        n = count_examples(batch, targets)
        is_tensor = isinstance(without_weights(returned), Tensor)
        if has_rows(returned, n) or (is_tensor and not isinstance(batch, Collated)):
            return widen(self.layouts.flatten(returned, n))
        losses = self._losses_alone(model, batch, n)
        cut_off = map_outputs(returned, Tensor.detach)
        refuse_hidden_weights(self._value(cut_off, targets), _name(self.function))
        if n > 1:
            self._reduction_of(self._value(cut_off, targets), losses.detach())
        self.layouts.one_by_one = True
        return losses

    def look(self, model: Model, batch: Batch, n: int) -> Tensor:
        """The outputs of a batch of `n` examples, after a look at one less.

        A tensor that examples share may have as many rows as the batch has examples; with one less it has not.

        Args:
            model: the model, or any callable with its arguments.
            batch: the batch.
            n: how many examples it holds.
        """
        if n > 1 and not self.takes_one:
            self.outputs(model, batch)
            self.outputs(model, batch_slice(batch, n, slice(0, n - 1)))
        return self.outputs(model, batch)

    def _read(self, returned: Any) -> Any:
        """What the function is given of what the model returned."""
        returned = returned if isinstance(self.function, TrainedLoss) else without_weights(returned)
        return with_main(returned) if self.takes_one else returned

    def _losses_alone(self, model: Model, batch: Batch, n: int) -> Tensor:
        """Each example's loss from a forward pass of its own, [n]."""
        losses = []
        for e in range(n):
            args, kwargs, targets = inputs_and_targets(batch_slice(batch, n, slice(e, e + 1)))
            value = self._value(self._read(run_model(model, args, kwargs)), targets)
            if value.numel() != 1:
                raise InvalidInput(_describe_not_scalar(self.function, value))
            losses.append(value.reshape(()))
        return torch.stack(losses)

    def losses(self, outputs: Float[Tensor, "n *out"], batch: Batch) -> Num[Tensor, " n"]:
        if self.layouts.one_by_one:
            return outputs
        targets = inputs_and_targets(batch)[2]
        if self.reduction == "none" and not self.layouts.has_shared(outputs):
            return require_one_per_example(require_tensor(self.apply(outputs, targets)), len(outputs))
        if _has_rows(targets, batch, len(outputs)):
            return _evaluate_one_by_one(self.apply, self.function, outputs, targets)
        return torch.stack([self.evaluate(outputs, batch, [e]).reshape(()) for e in range(len(outputs))])

    def as_returned(self, outputs: Float[Tensor, "n *out"]) -> Any:
        return self.layouts.restore(outputs)

    def apply(self, outputs: Tensor, targets: Any) -> Any:
        """The function of outputs and targets, the outputs being what the model returned.

        Args:
            outputs: from `outputs`, or some rows of it.
            targets: as many targets.
        """
        # Copies: a loss may write to what it is given, as it may in training.
        returned, targets = self.layouts.restore(outputs.clone()), map_tensors(targets, Tensor.clone)
        if self.takes_one:
            return self._call(with_main(returned), targets)
        if self.takes_one is None and has_main(returned):
            try:
                return self._call(returned, targets)
            except Exception:  # it was written for the logits of an output object: a fault of its own shows again
                return self._call(with_main(returned), targets)
        return self._call(returned, targets)

    def evaluate(self, outputs: Tensor, batch: Batch, examples: Sequence[int]) -> Tensor:
        """The function of some examples of a batch together.

        Args:
            outputs: the outputs of the batch.
            batch: the batch that they came from.
            examples: places in the batch.
        """
        index = torch.tensor(examples, device=outputs.device)
        if self.layouts.one_by_one:
            return outputs[index]
        return _evaluate(self.apply, self.function, outputs[index], _targets_of(batch, len(outputs), index))

    def _value(self, returned: Any, targets: Any) -> Tensor:
        return _evaluate(self._call, self.function, returned, targets)

    def _call(self, returned: Any, targets: Any) -> Any:
        with in_eval_mode(self._networks):
            return self.function(returned, targets)

    @cached_property
    def _networks(self) -> tuple[nn.Module, ...]:
        return networks_of(self.function)

    def check(self, outputs: Tensor, batch: Batch, ids: Tensor) -> None:
        targets = inputs_and_targets(batch)[2]
        if isinstance(targets, Tensor) and _has_rows(targets, batch, len(ids)):
            check_batch(outputs, targets, ids)
        else:
            check_outputs(outputs, ids)

    def resolved(self, outputs: Tensor, targets: Any) -> FromFunction:
        """As `resolved_on`, for targets along the first axis.

        Args:
            outputs: the outputs of at least two examples.
            targets: their targets.
        """
        return self.resolved_on(outputs, (None, targets))

    def resolved_on(self, outputs: Tensor, batch: Batch) -> FromFunction:
        """The same with its reduction determined on the first two examples, after a check that it has a derivative.

        Args:
            outputs: the outputs of at least two examples.
            batch: the batch that they came from.

        Raises:
            InvalidInput: see `detect_reduction`; or the result does not depend differentiably on the outputs.
        """
        if self.layouts.one_by_one:
            return self if self.reduction else replace(self, reduction="none")
        with torch.enable_grad():
            leaf = outputs.detach()[:2].clone().requires_grad_()
            first = batch_slice(batch, len(outputs), slice(0, 2))
            reads = replace(self, takes_one=self._reading(leaf, first))
            reduction = self.reduction or reads._detect(leaf, first)
            resolved = replace(reads, reduction=reduction)
            losses = resolved.losses(leaf, first)
        refuse_hidden_weights(losses, _name(self.function), leaf)
        if not losses.requires_grad:
            raise InvalidInput(
                f"The loss {_name(self.function)} has no derivative in the model's outputs; it was probably "
                "detached or computed through argmax, .item() or numpy, so use a differentiable loss."
            )
        return resolved

    def _reading(self, outputs: Tensor, batch: Batch) -> bool | None:
        """Whether the function is one of the logits of an output object, because it fails on the whole object."""
        if self.takes_one is not None or not has_main(self.layouts.restore(outputs)):
            return self.takes_one
        try:
            replace(self, takes_one=False).evaluate(outputs, batch, range(len(outputs)))
        except Exception:
            return True
        return False

    def _detect(self, outputs: Tensor, batch: Batch) -> Reduction:
        n = min(2, len(outputs))
        together = self.evaluate(outputs, batch, range(n))
        refuse_draws(_name(self.function), together, self.evaluate(outputs, batch, range(n)))
        try:
            return self._reduction_of(together, [self.evaluate(outputs, batch, [e]).detach() for e in range(n)])
        except InvalidInput:
            refuse_broadcast(_name(self.function), outputs, inputs_and_targets(batch)[2])
            raise

    def _reduction_of(self, together: Tensor, alone: Any) -> Reduction:
        return _compare(self.function, together, list(alone))


def _has_rows(targets: Any, batch: Batch, n: int) -> bool:
    """Whether targets lie along the first axis, one for each of `n` examples."""
    if not isinstance(batch, Collated):
        return True
    return isinstance(targets, Tensor) and targets.dim() > 0 and targets.shape[0] == n


def _targets_of(batch: Batch, n: int, index: slice | Tensor) -> Any:
    """The targets of some examples of a batch."""
    targets = inputs_and_targets(batch)[2]
    if _has_rows(targets, batch, n):
        return batch_slice(targets, n, index)
    return inputs_and_targets(batch_slice(batch, n, index))[2]


def detect_reduction(function: Callable[[Any, Any], Any], outputs: Tensor, targets: Any) -> Reduction:
    """What a loss does to a batch: the first two examples together, against each alone.

    Where both losses are 0, or cancel, mean and sum cannot be told apart, and the answer is "mean": on one example at a
    time, which is how the function is used, the two are the same. The same holds for a batch of one example.

    Args:
        function: a loss of (outputs, targets).
        outputs: [n, *out].
        targets: n targets, possibly nested.

    Returns:
        "none" if there is one number per example, else "mean" or "sum".

    Raises:
        InvalidInput: it is none of these (the three numbers are printed), not a tensor, or cannot be
            computed.
        NonFinite: a loss is NaN or infinite.

    Example:
        >>> detect_reduction(torch.nn.functional.l1_loss, torch.ones(2), torch.zeros(2))
        'mean'
    """
    return FromFunction(function)._detect(outputs, (None, targets))


def _compare(function: Callable[..., Any], together: Tensor, alone: list[Tensor]) -> Reduction:
    """What a loss did to the examples of a batch, from its value on all and on each."""
    n = len(alone)
    if any(v.numel() != 1 for v in alone):
        raise InvalidInput(_describe_not_scalar(function, alone[0]))
    precise = together.dtype if together.dtype.is_floating_point else torch.float32
    whole, each = together.detach().cpu().double(), torch.stack([v.reshape(()) for v in alone]).cpu().double()
    if not bool(torch.isfinite(whole).all() and torch.isfinite(each).all()):
        raise NonFinite(
            f"The loss {_name(function)} is NaN or infinite on the first two examples "
            f"({_format_losses(whole, each)}); look at their outputs and targets."
        )
    allowed = min(1e3 * torch.finfo(precise).eps, 2e-2) * float(each.abs().max()) * n
    if whole.dim() > 0 and whole.numel() == n:
        if bool(((whole.reshape(-1) - each).abs() <= allowed).all()):
            return "none"
    elif whole.numel() == 1:
        if abs(float(whole) - float(each.mean())) <= allowed:
            return "mean"
        if abs(float(whole) - float(each.sum())) <= allowed:
            return "sum"
    else:
        raise InvalidInput(_describe_not_scalar(function, together))
    raise InvalidInput(
        f"The loss {_name(function)} of {'two' if n == 2 else n} examples is neither the mean nor the sum of their own "
        f"({_format_losses(whole, each)}), so no loss per example can be read from it; for a mean over tokens of "
        "sequences of unequal length use TokenCrossEntropy(), for class weights CrossEntropy(weight=...), "
        "for a loss that compares the examples of a batch (contrastive) make one item of the dataset a whole group, "
        "otherwise return one number per example."
    )


def _format_losses(whole: Tensor, each: Tensor) -> str:
    together = ", ".join(f"{x:.6g}" for x in whole.reshape(-1).tolist())
    return f"together {together}; apart {' and '.join(f'{x:.6g}' for x in each.tolist())}"


def _name(function: Callable[..., Any]) -> str:
    return str(getattr(function, "__name__", type(function).__name__))


def _describe_not_scalar(function: Callable[..., Any], value: Tensor) -> str:
    return (
        f"The loss {_name(function)} returned shape {tuple(value.shape)}, expected one number, or one per "
        "example; reduce over everything but the first axis, e.g. .flatten(1).mean(1)."
    )


def _evaluate(apply: Callable[[Any, Any], Any], function: Any, outputs: Any, targets: Any) -> Tensor:
    try:
        value = apply(outputs, targets)
    except InfluenceError:
        raise
    except Exception as cause:
        shape = f"shape {tuple(targets.shape)}" if isinstance(targets, Tensor) else f"type {type(targets).__name__}"
        raise InvalidInput(
            f"The loss {_name(function)} failed on outputs of {describe_outputs(outputs)} and targets of "
            f"{shape} ({type(cause).__name__}: {first_line(cause)}); {way_to_write(function, outputs)}."
        ) from cause
    return require_tensor(value)


def _evaluate_one_by_one(apply: Callable[[Any, Any], Any], function: Any, outputs: Tensor, targets: Any) -> Tensor:
    """The function's value on each example alone, [n]."""
    n = len(outputs)

    def evaluate_one(f: Tensor, *parts: Tensor) -> Tensor:
        own = with_example_tensors(targets, n, [x[None] for x in parts])
        value = require_tensor(apply(f[None], own))
        if value.numel() != 1:
            raise InvalidInput(_describe_not_scalar(function, value))
        return value.reshape(())

    parts = example_tensors(targets, n)
    try:
        with silence_torch():
            return vmap(evaluate_one, randomness="different")(outputs, *parts)
    except InfluenceError:
        raise
    except Exception:
        # Branches on values, or an operator without a batching rule. A fault of the function itself shows again here.
        return torch.stack([evaluate_one(outputs[e], *(x[e] for x in parts)) for e in range(n)])
