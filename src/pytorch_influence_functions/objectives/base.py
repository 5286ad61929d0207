"""What every objective is, and how a batch is read: inputs, target, outputs, and checks of their values."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import replace
from typing import Any, final
from weakref import WeakSet

import torch
from jaxtyping import Float
from torch import Tensor, nn

from ..core.batches import Collated, tensors_of, whole_batch
from ..core.errors import InvalidInput, name_ids
from ..core.functional import fit_arguments
from ..core.records import describe_record, settings_of
from .draws import Randomness
from .failure import lacks_graph, model_failed
from .outputs import main_output, map_outputs, without_weights

#: Where a batch that is a mapping keeps its target.
LABELS = ("labels", "label")

Batch = Any
Model = Callable[..., Any]


# --------------------------------------------------------------------------- batches


def inputs_and_targets(batch: Batch) -> tuple[tuple[Any, ...], dict[str, Any], Any]:
    """Take a batch apart into the model's arguments and the target.

    Args:
        batch: what the collate function gives. A tuple or list is `(inputs..., target)`; a mapping as its
            first member holds keyword arguments. A mapping (tokenizer output) holds the target under "labels"
            or "label", everything else are keyword arguments. An object of its own (graphs put together as one) is
            the model's only argument, and holds the target as its attribute `y`.

    Returns:
        `(args, kwargs, targets)`, so that the outputs are `model(*args, **kwargs)`.

    Raises:
        InvalidInput: the batch has no target.

    Example:
        >>> inputs_and_targets({"input_ids": 1, "labels": 2})
        ((), {'input_ids': 1}, 2)
        >>> inputs_and_targets((1, 2, 3))
        ((1, 2), {}, 3)
    """
    batch = whole_batch(batch)
    if isinstance(batch, Mapping):
        key = label_key(batch)
        if key is None:
            if "start_positions" in batch:
                raise InvalidInput(
                    "A batch has no 'labels' but 'start_positions', as models that mark answers in texts are given; "
                    "pass such a model's Trainer, which says what its loss is, as in attribute(trainer, queries=rows)."
                )
            cure = "so rename it in the dataset or the collate function"
            if "input_ids" in batch:
                cure = (
                    "for a language model the token numbers, -100 where they are not taught; "
                    "ptif.hf.problem(model, tokenizer, texts) makes them of texts"
                )
            raise InvalidInput(
                f"A batch with keys {', '.join(map(repr, batch))} has no target; expected it under "
                f"'labels' or 'label', {cure}."
            )
        return (), {k: v for k, v in batch.items() if k != key}, batch[key]
    if not isinstance(batch, (tuple, list)):
        if not isinstance(batch, Tensor) and isinstance(getattr(batch, "y", None), Tensor):
            return (batch,), {}, batch.y
        raise InvalidInput(
            f"A batch of type {type(batch).__name__} has no target; expected (inputs, target) "
            "or a mapping with 'labels', so let the dataset return both."
        )
    if len(batch) < 2:
        raise InvalidInput(
            f"A batch of {len(batch)} member{'' if len(batch) == 1 else 's'} has no target; expected "
            "(inputs, target), so let the dataset return both, (x, x) for an autoencoder."
        )
    first, *rest = batch[:-1]
    if isinstance(first, Mapping):
        return tuple(rest), dict(first), batch[-1]
    return (first, *rest), {}, batch[-1]


def label_key(batch: Mapping[str, Any]) -> str | None:
    """The key of a batch's target, if it has one."""
    return next((key for key in LABELS if key in batch), None)


def with_targets(batch: Batch, targets: Tensor) -> Batch:
    """The batch with its target replaced (or added, where a mapping has none)."""
    if isinstance(batch, Collated):
        return replace(batch, whole=with_targets(batch.whole, targets))
    if isinstance(batch, Mapping):
        return {**batch, label_key(batch) or LABELS[0]: targets}
    if not isinstance(batch, (tuple, list)):
        twin = copy.copy(batch)
        twin.y = targets
        return twin
    members = [*batch[:-1], targets]
    if hasattr(batch, "_fields"):
        return type(batch)(*members)
    return members if isinstance(batch, list) else tuple(members)


def tensor_targets(batch: Batch) -> Tensor:
    """The target of a batch, which must be a tensor.

    Raises:
        InvalidInput: it is not.
    """
    return as_tensor_targets(inputs_and_targets(batch)[2])


def as_tensor_targets(targets: Any) -> Tensor:
    """`targets`, refused unless it is a tensor."""
    if not isinstance(targets, Tensor):
        raise InvalidInput(
            f"The targets are of type {type(targets).__name__}, expected a tensor; let the dataset return a "
            "number or a tensor as target."
        )
    return targets


def call_model(model: Model, args: tuple[Any, ...], kwargs: Mapping[str, Any], otherwise: str = "") -> Tensor:
    """The model's outputs as one tensor: the only one that it returns, or `logits` or `out` of several.

    Args:
        model: the model, or any callable with its arguments.
        args: of its forward.
        kwargs: of its forward.
        otherwise: see `main_output`.

    Raises:
        InvalidInput: the model failed, or returned no tensor, or several of which any may be meant.
    """
    return widen(main_output(without_weights(run_model(model, args, kwargs)), otherwise))


def measured_outputs(measure: AbstractObjective, model: Model, batch: Batch) -> Tensor:
    """The outputs as one tensor for a measure of these, which the training loss need not be.

    Args:
        measure: which.
        model: the model, or any callable with its arguments.
        batch: see `inputs_and_targets`.
    """
    args, kwargs, _ = inputs_and_targets(batch)
    return call_model(
        model,
        args,
        kwargs,
        f"{measure!r} is of one tensor; measure the loss (measure=None, of TRAK trak(measure=None)), or a function of "
        "all that the model returns, such as measure=ptif.FromFunction(lambda out, y: ...)",
    )


def run_model(model: Model, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """Whatever the model returns; a forward that takes a batch as a mapping is given it whole, without the labels.

    Where gradients are not recorded and forward differentiates by itself, it runs with a graph that is cut afterwards.

    Raises:
        InvalidInput: the model failed.
    """
    if isinstance(model, nn.Module):
        args, kwargs = fit_arguments(model, args, kwargs)
    unmarked = [tensor for _, tensor in tensors_of((args, dict(kwargs))) if not tensor.requires_grad]
    try:
        if model in _differentiating and not torch.is_grad_enabled():
            return _run_with_graph(model, args, kwargs)
        return model(*args, **kwargs)
    except Exception as cause:
        if isinstance(model, nn.Module) and not torch.is_grad_enabled() and lacks_graph(cause):
            with suppress(RuntimeError):
                returned = _run_with_graph(model, args, kwargs)
                _differentiating.add(model)
                return returned
        error = model_failed(cause, args, kwargs)
        if error is cause:
            raise
        raise error from cause
    finally:
        # Forces: a forward that asks for the gradient in its input marks it, and would meet it marked in the next call.
        for tensor in unmarked:
            if tensor.requires_grad and tensor.is_leaf:
                tensor.requires_grad_(False)


# Models whose forward needs a graph, as one that returns forces does.
_differentiating: WeakSet[Any] = WeakSet()


def _run_with_graph(model: Model, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    with torch.enable_grad():
        return map_outputs(model(*args, **kwargs), Tensor.detach)


def widen(outputs: Tensor) -> Tensor:
    """Outputs in float32 at least: a loss is a sum of many terms, and autocast, too, computes it so."""
    return outputs.float() if outputs.dtype in (torch.bfloat16, torch.float16) else outputs


# ----------------------------------------------------------------- checks of values, never under transforms


def check_batch(outputs: Tensor, targets: Any, ids: Tensor) -> Tensor:
    """The target as a tensor, after what every objective expects of outputs and targets.

    Raises:
        InvalidInput: outputs or targets are not one per example, not tensors, or of the wrong type or device.
    """
    n = len(ids)
    check_outputs(outputs, ids)
    labels = as_tensor_targets(targets)
    if labels.dim() == 0 or labels.shape[0] != n:
        raise InvalidInput(
            f"The targets have shape {tuple(labels.shape)} for {n} examples (dataset indices "
            f"{name_ids(ids.tolist())}); expected one target per example along the first axis."
        )
    if labels.device != outputs.device:
        raise InvalidInput(
            f"The targets lie on {labels.device} and the outputs on {outputs.device}; move both to one device."
        )
    return labels


def check_outputs(outputs: Tensor, ids: Tensor) -> None:
    """Refuse outputs that are not floating point numbers, one row per example."""
    if outputs.dim() == 0 or outputs.shape[0] != len(ids):
        raise InvalidInput(
            f"The model gave outputs of shape {tuple(outputs.shape)} for {len(ids)} examples; the first axis "
            "must run over the examples, so return one output per example."
        )
    if not outputs.is_floating_point():
        raise InvalidInput(
            f"The model gave outputs of type {outputs.dtype}, expected floating point numbers; "
            "return what comes before argmax or rounding."
        )


def offenders(bad: Tensor, ids: Tensor) -> str:
    """The dataset indices, as text, of the examples where `bad` ([n, ...]) is true anywhere."""
    bad_ids = ids[bad.reshape(len(ids), -1).any(1).to(ids.device)].tolist()
    return f"dataset {'index' if len(bad_ids) == 1 else 'indices'} {name_ids(bad_ids)}"


def check_labels(
    targets: Tensor,
    classes: int,
    ids: Tensor,
    ignore_index: int | None = None,
    instead: str = "relabel from 0 or widen the last layer",
) -> None:
    """Refuse class numbers outside 0..classes-1, naming index and label.

    Raises:
        InvalidInput: the offending labels.
    """
    bad = (targets < 0) | (targets >= classes)
    if ignore_index is not None:
        bad &= targets != ignore_index
    if bool(bad.any()):
        raise InvalidInput(
            f"Label {int(targets[bad][0])} at {offenders(bad, ids)} is out of range: the model has {classes} "
            f"classes, so labels must lie in 0..{classes - 1}; {instead}."
        )


def is_integer(targets: Tensor) -> bool:
    """Whether targets can be class numbers."""
    return not (targets.is_floating_point() or targets.is_complex())


# --------------------------------------------------------------------------- objectives


class AbstractObjective(ABC):
    """What is differentiated: outputs f(x; θ), and one number per example that is a function of them.

    A frozen record: equal settings compare equal, and `repr` shows what differs from the defaults. Everything
    but `check` works under `torch.func` transforms: no branch depends on a value. Wrap one to tweak it.
    """

    @property
    @abstractmethod
    def lower_is_better(self) -> bool:
        """True for a loss: removing an example with positive score makes it worse."""

    @abstractmethod
    def outputs(self, model: Model, batch: Batch) -> Tensor:
        """The model's outputs, shape [n, *out].

        Args:
            model: the model, or any callable with its arguments.
            batch: see `inputs_and_targets`.

        Raises:
            InvalidInput: the batch has no target, or the model returned no tensor.
        """

    @abstractmethod
    def losses(self, outputs: Float[Tensor, "n *out"], batch: Batch) -> Float[Tensor, " n"]:
        """One number per example, differentiable in `outputs`; example n's own outputs only.

        Args:
            outputs: the model's outputs, one per example along the first axis.
            batch: the batch that the outputs came from.
        """

    def losses_and_slope(self, outputs: Float[Tensor, "n *out"], batch: Batch) -> tuple[Tensor, Tensor] | None:
        """The losses and their derivative in the outputs, where it is known in closed form; None: by autograd.

        Args:
            outputs: the model's outputs, without a graph.
            batch: the batch that the outputs came from.
        """
        return None

    def as_returned(self, outputs: Float[Tensor, "n *out"]) -> Any:
        """What the model returned, whose numbers `outputs` may have put side by side; by default that one tensor.

        Args:
            outputs: from `outputs`.
        """
        return outputs

    @abstractmethod
    def check(self, outputs: Tensor, batch: Batch, ids: Tensor) -> None:
        """Refuse outputs and targets that do not fit this objective.

        Args:
            outputs: from `outputs`.
            batch: the batch they came from.
            ids: [n] dataset indices, named in messages.

        Raises:
            InvalidInput: labels out of range, wrong shapes or types; one sentence, naming dataset indices.
        """

    def __eq__(self, other: object) -> bool:
        return isinstance(other, AbstractObjective) and _key(self) == _key(other)

    def __hash__(self) -> int:
        return hash(_key(self))

    def __repr__(self) -> str:
        return describe_record(self)


def _key(objective: AbstractObjective) -> tuple[Any, ...]:
    values = [value for _, value, _ in settings_of(objective)]
    return type(objective), *(
        (tuple(v.shape), str(v.dtype), *v.flatten().tolist()) if isinstance(v, Tensor) else v for v in values
    )


class AbstractOutputCurvature(ABC):
    """The Hessian H_n of every example's loss in the example's outputs; it is positive semi-definite.

    Unlocks GGN, Fisher and K-FAC.
    """

    @abstractmethod
    def sample_cotangent(
        self, outputs: Float[Tensor, "n *out"], batch: Batch, generator: Randomness = None
    ) -> Float[Tensor, "n *out"]:
        """Random c_n with mean 0 and E[c_n c_nᵀ] = H_n: rows Jᵀc are rows of the sampled Fisher.

        Args:
            outputs: the model's outputs, one per example along the first axis.
            batch: the batch that the outputs came from.
            generator: where random numbers come from; `None`: torch's own generator.
        """

    @abstractmethod
    def root(self, outputs: Float[Tensor, "n *out"], batch: Batch) -> Float[Tensor, "k n *out"]:
        """Columns with Σ_k root[k, n] root[k, n]ᵀ = H_n exactly (classes are enumerated).

        Args:
            outputs: the model's outputs, one per example along the first axis.
            batch: the batch that the outputs came from.
        """

    @abstractmethod
    def root_size(self, outputs: Float[Tensor, "n *out"]) -> int:
        """The k of `root`, without building it.

        Args:
            outputs: the model's outputs, one per example along the first axis.
        """

    def output_directions(self, outputs: Float[Tensor, "n *out"], batch: Batch) -> float:
        """In how many directions of an example's outputs its loss can have curvature, on average; by default in all.

        Args:
            outputs: the model's outputs, one per example along the first axis.
            batch: the batch that the outputs came from.
        """
        return float(outputs[0].numel())

    @abstractmethod
    def hessian_map(self, outputs: Float[Tensor, "n *out"], batch: Batch) -> Callable[[Tensor], Tensor]:
        """The map v_n -> H_n v_n at these outputs, which may be called under `torch.func.vmap`.

        Args:
            outputs: the model's outputs, one per example along the first axis.
            batch: the batch that the outputs came from.
        """

    @final
    def output_hessian(self, outputs: Float[Tensor, "n *out"], batch: Batch) -> Float[Tensor, "n c c"]:
        """H_n written out, over the outputs of an example flattened.

        Args:
            outputs: the model's outputs, one per example along the first axis.
            batch: the batch that the outputs came from.
        """
        size, product = outputs[0].numel(), self.hessian_map(outputs, batch)
        units = torch.eye(size, dtype=outputs.dtype, device=outputs.device)
        columns = [product(unit.expand(len(outputs), size).reshape(outputs.shape)) for unit in units]
        return torch.stack(columns, -1).reshape(len(outputs), size, size)


class AbstractLikelihood(AbstractObjective, AbstractOutputCurvature):
    """An objective that is -log p(y | f), up to scale, and knows its Hessian in the outputs in closed form."""

    @abstractmethod
    def hessian_product(
        self, outputs: Float[Tensor, "n *out"], batch: Batch, v: Float[Tensor, "n *out"]
    ) -> Float[Tensor, "n *out"]:
        """H_n v_n in closed form.

        Args:
            outputs: the model's outputs, one per example along the first axis.
            batch: the batch that the outputs came from.
            v: one vector per example, of the shape of the outputs.
        """

    @final
    def hessian_map(self, outputs: Float[Tensor, "n *out"], batch: Batch) -> Callable[[Tensor], Tensor]:
        return lambda v: self.hessian_product(outputs, batch, v)


def require_tensor(value: Any) -> Tensor:
    """What a loss returned, refused unless it is a tensor.

    Args:
        value: that.
    """
    if not isinstance(value, Tensor):
        holds = any(True for _ in tensors_of(value))
        way_out = "return the loss alone" if holds else "leave out .item(), float() and numpy"
        raise InvalidInput(
            f"The loss returned {type(value).__name__}, expected a tensor that can be differentiated; {way_out}."
        )
    return value


def require_one_per_example(value: Tensor, n: int) -> Tensor:
    """What a loss of reduction "none" returned, refused unless it is one number per example.

    Args:
        value: that.
        n: how many examples there are.
    """
    if value.dim() == 0 or value.shape[0] != n or value.numel() != n:
        raise InvalidInput(
            f"The loss with reduction 'none' returned shape {tuple(value.shape)} for {n} examples; expected "
            "one number per example, so reduce over everything but the first axis."
        )
    return value.reshape(n)
