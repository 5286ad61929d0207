"""Losses whose Hessian in the outputs is known in closed form: classes and real numbers."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, final

import torch
from jaxtyping import Float, Num
from torch import Tensor

from ..core.errors import InvalidInput
from ..core.validate import finite_number
from .base import (
    AbstractLikelihood,
    Batch,
    Model,
    call_model,
    check_batch,
    check_labels,
    inputs_and_targets,
    is_integer,
    offenders,
    tensor_targets,
)
from .draws import Randomness, draw
from .softmax import positions_that_count, softmax_cotangent, softmax_product, softmax_rank, softmax_root

# --------------------------------------------------------------------------- classes


@final
@dataclass(frozen=True, eq=False, repr=False)
class CrossEntropy(AbstractLikelihood):
    """-Σ_c a_c log softmax(f)_c, as `torch.nn.CrossEntropyLoss` means it, one number per example.

    The coefficients a_c come from the target (a class number, or probabilities), `label_smoothing` and the
    class `weight`. The Hessian in the outputs is S (diag p - p pᵀ), p = softmax(f), S = Σ_c a_c; zero where
    ignored.

    Outputs are [n, C] with targets [n] (integers) or [n, C] (probabilities), or dense, [n, C, d1, ...] with
    [n, d1, ...] (segmentation): then the loss is the mean over the example's own positions, ignored ones
    counted. torch's own mean divides by the total weight (or the count not ignored) of a batch instead, and so is
    this one times a factor, the same for all examples; dividing by each example's own count would not be. A query's
    loss is measured without that factor. Beside a `weight_decay` it matters: give the decay divided by it (where most
    positions are ignored a decay is too strong for this loss), which the check `minimum` tells where it shows.

    Args:
        weight: [C] factor of each class.
        label_smoothing: share of the target spread evenly over the classes, in [0, 1].
        ignore_index: class number of targets that do not count.
        from_log_probabilities: the outputs are log-probabilities (a model trained with `NLLLoss`), which
            `check` makes sure of. Nothing else changes: log-softmax leaves normalised values as they are.
        from_probabilities: the model returns probabilities (it ends in a softmax): `outputs` takes their
            logarithm, kept finite at 0. The Gauss-Newton matrix is then that of the probabilities p with the
            expected Hessian diag(1/p), which is the same matrix as that of the logits before the softmax.

    Raises:
        InvalidInput: a setting out of its range, or outputs said to be two things.

    Example:
        >>> batch = (torch.zeros(1, 2), torch.tensor([1]))
        >>> CrossEntropy().losses(torch.zeros(1, 2), batch)
        tensor([0.6931])
    """

    weight: Tensor | None = None
    label_smoothing: float = 0.0
    ignore_index: int = -100
    from_log_probabilities: bool = False
    from_probabilities: bool = False
    lower_is_better: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.from_log_probabilities and self.from_probabilities:
            raise InvalidInput(
                "CrossEntropy() got from_log_probabilities=True and from_probabilities=True; outputs are one or the "
                "other, so leave one out."
            )
        finite_number("label_smoothing", self.label_smoothing, least=0, most=1, owner=self)
        if self.weight is not None:
            if self.weight.dim() != 1:
                raise InvalidInput(
                    f"The class weights have shape {tuple(self.weight.shape)}, expected [C], one number per class."
                )
            check_weight("class", self.weight)

    def outputs(self, model: Model, batch: Batch) -> Tensor:
        args, kwargs, _ = inputs_and_targets(batch)
        outputs = call_model(model, args, kwargs)
        return _log_probabilities(outputs) if self.from_probabilities else outputs

    def losses(self, outputs: Float[Tensor, "n *out"], batch: Batch) -> Float[Tensor, " n"]:
        targets = self._targets(outputs, batch)
        logp = _classes_last(outputs).log_softmax(-1)
        weight, classes = self._weight(outputs), outputs.shape[1]
        if targets.dtype.is_floating_point:
            return -(self._coefficients(outputs, targets) * logp).sum(-1).mean(1)
        counts, label = self._labels(targets)
        hard = -logp.gather(-1, label[..., None])[..., 0]
        loss = hard if weight is None else hard * weight[label]
        if self.label_smoothing:
            even = -(logp if weight is None else logp * weight).sum(-1) / classes
            loss = (1 - self.label_smoothing) * loss + self.label_smoothing * even
        return torch.where(counts, loss, torch.zeros_like(loss)).mean(1)

    def check(self, outputs: Tensor, batch: Batch, ids: Tensor) -> None:
        targets = check_batch(outputs, inputs_and_targets(batch)[2], ids)
        self._targets(outputs, batch)
        classes = outputs.shape[1]
        if self.weight is not None and len(self.weight) != classes:
            raise InvalidInput(
                f"There are {len(self.weight)} class weights and {classes} classes; give one weight per class."
            )
        if is_integer(targets):
            check_labels(targets, classes, ids, self.ignore_index)
        elif bool((bad := ~(targets >= 0)).any()):
            raise InvalidInput(
                f"The target probabilities at {offenders(bad, ids)} are negative or NaN; expected numbers from 0 to 1."
            )
        if self.from_log_probabilities or self.from_probabilities:
            self._check_normalised(outputs, ids)

    def _check_normalised(self, outputs: Tensor, ids: Tensor) -> None:
        # Rounding leaves three digits in single precision.
        allowed = max(torch.finfo(outputs.dtype).eps ** 0.5, 1e-3)
        if not bool((bad := ~(outputs.logsumexp(1).abs() <= allowed)).any()):
            return
        if self.from_probabilities:
            raise InvalidInput(
                f"The outputs at {offenders(bad, ids)} are not probabilities that sum to 1, which "
                "from_probabilities=True expects; end the model with softmax, or use CrossEntropy() for logits."
            )
        raise InvalidInput(
            f"The outputs at {offenders(bad, ids)} are not log-probabilities, which NLLLoss and "
            "from_log_probabilities=True expect; end the model with log_softmax, or use CrossEntropy()."
        )

    def sample_cotangent(
        self, outputs: Float[Tensor, "n *out"], batch: Batch, generator: Randomness = None
    ) -> Float[Tensor, "n *out"]:
        cotangent = softmax_cotangent(_classes_last(outputs), self._factor(outputs, batch), generator)
        return cotangent.movedim(-1, 1).reshape(outputs.shape)

    def root(self, outputs: Float[Tensor, "n *out"], batch: Batch) -> Float[Tensor, "k n *out"]:
        root = softmax_root(_classes_last(outputs), self._factor(outputs, batch))
        return root.movedim(-1, 2).reshape(-1, *outputs.shape)

    def root_size(self, outputs: Float[Tensor, "n *out"]) -> int:
        return softmax_rank(outputs.shape[1]) * math.prod(outputs.shape[2:])

    def output_directions(self, outputs: Float[Tensor, "n *out"], batch: Batch) -> float:
        # Of every position's probabilities one is what the others leave.
        return positions_that_count(self._factor(outputs, batch)) * (outputs.shape[1] - 1)

    def hessian_product(
        self, outputs: Float[Tensor, "n *out"], batch: Batch, v: Float[Tensor, "n *out"]
    ) -> Float[Tensor, "n *out"]:
        product = softmax_product(_classes_last(outputs), self._factor(outputs, batch), _classes_last(v))
        return product.movedim(-1, 1).reshape(outputs.shape)

    def _weight(self, outputs: Tensor) -> Tensor | None:
        return None if self.weight is None else self.weight.to(outputs)

    def _labels(self, targets: Tensor) -> tuple[Tensor, Tensor]:
        """[n, l]: which positions count, and their class numbers (0 elsewhere)."""
        flat = targets.long().reshape(targets.shape[0], -1)
        counts = flat != self.ignore_index
        return counts, torch.where(counts, flat, torch.zeros_like(flat))

    def _coefficients(self, outputs: Tensor, targets: Tensor) -> Float[Tensor, "n l c"]:
        """a_c where targets are probabilities."""
        even = self.label_smoothing / outputs.shape[1]
        a = _classes_last(targets.to(outputs.dtype)) * (1 - self.label_smoothing) + even
        weight = self._weight(outputs)
        return a if weight is None else a * weight

    def _factor(self, outputs: Tensor, batch: Batch) -> Float[Tensor, "n l"]:
        """S of each position, divided by the number of positions."""
        targets = self._targets(outputs, batch)
        if targets.dtype.is_floating_point:
            total = self._coefficients(outputs, targets).sum(-1)
        else:
            counts, label = self._labels(targets)
            weight = self._weight(outputs)
            if weight is None:
                total = torch.ones_like(label, dtype=outputs.dtype)
            else:
                total = (1 - self.label_smoothing) * weight[label] + self.label_smoothing * weight.mean()
            total = torch.where(counts, total, torch.zeros_like(total))
        return total / total.shape[1]

    def _targets(self, outputs: Tensor, batch: Batch) -> Tensor:
        """The targets, if their shape fits; shapes are known even under transforms."""
        targets = tensor_targets(batch)
        shape, target_shape = tuple(outputs.shape), tuple(targets.shape)
        if len(shape) < 2 or shape[1] < 2:
            raise InvalidInput(
                f"CrossEntropy() got outputs of shape {shape}, expected [n, C] with two classes or more; "
                "for one logit per example use Bernoulli()."
            )
        if is_integer(targets) and target_shape == shape[:1] + shape[2:]:
            return targets
        if not is_integer(targets) and target_shape == shape:
            return targets
        raise InvalidInput(_describe_misfit(shape, target_shape, targets, self.label_smoothing))


def _describe_misfit(shape: tuple[int, ...], target_shape: tuple[int, ...], targets: Tensor, smoothing: float) -> str:
    """Why CrossEntropy cannot read these targets, and what to do about it."""
    what = f"CrossEntropy() got targets of shape {target_shape} and type {targets.dtype} for outputs of shape {shape}"
    labels = shape[:1] + shape[2:]
    if target_shape == labels:
        return f"{what}; class numbers must be integers, so convert them with .long()."
    if target_shape == shape:
        return f"{what}; one-hot targets must be floating point, so convert them with .float()."
    if len(shape) == 3 and target_shape == shape[:2]:
        smoothed = f"label_smoothing={smoothing:g}" if smoothing else ""
        return f"{what}; for one class per token, outputs [n, T, C], use TokenCrossEntropy({smoothed})."
    if target_shape == (*labels, 1):
        return f"{what}; remove the last axis of the targets with .squeeze(-1)."
    return f"{what}; expected class numbers of shape {labels} or probabilities of shape {shape}."


def _classes_last(outputs: Tensor) -> Float[Tensor, "n l c"]:
    """[n, C, d1, ...] as [n, positions, C]."""
    return outputs.reshape(*outputs.shape[:2], -1).movedim(1, -1)


def _log_probabilities(p: Tensor) -> Tensor:
    """log p, finite where p is 0, NaN for what is no probability (`check` names it)."""
    room = torch.finfo(p.dtype).eps ** 0.5  # a softmax may exceed 1 by rounding
    inside = torch.where(
        (p >= 0) & (p <= 1 + room), p.clamp_min(torch.finfo(p.dtype).tiny), torch.full_like(p, torch.nan)
    )
    return inside.log()


def check_weight(name: str, weight: Tensor) -> None:
    if weight.is_meta:
        raise InvalidInput(f"A {name} weight lies on the meta device, which holds no values; give numbers.")
    if not bool((torch.isfinite(weight) & (weight >= 0)).all()):
        raise InvalidInput(f"A {name} weight is negative or not finite; weights must be 0 or more.")


# --------------------------------------------------------------------------- real numbers


@final
@dataclass(frozen=True, eq=False, repr=False)
class SquaredError(AbstractLikelihood):
    """½ ‖f - y‖², i.e. -log N(y; f, I) up to a constant; the Hessian in the outputs is the identity.

    Targets are given the shape of the outputs when an example has as many numbers ([n] and [n, 1], which
    torch's own loss would broadcast to [n, n]).

    Args:
        average: divide by the number of outputs per example.
        half: the factor ½. `torch.nn.MSELoss()` is `SquaredError(average=True, half=False)`.

    Example:
        >>> SquaredError().losses(torch.tensor([[3.0]]), (None, torch.tensor([1.0])))
        tensor([2.])
    """

    average: bool = False
    half: bool = True
    lower_is_better: ClassVar[bool] = True

    def outputs(self, model: Model, batch: Batch) -> Tensor:
        args, kwargs, _ = inputs_and_targets(batch)
        return call_model(model, args, kwargs)

    def losses(self, outputs: Float[Tensor, "n *out"], batch: Batch) -> Float[Tensor, " n"]:
        error = outputs - match_shape(outputs, tensor_targets(batch), "SquaredError()")
        total: Tensor = error.pow(2).reshape(len(outputs), -1).sum(1)
        return 0.5 * self._scale(outputs) * total

    def check(self, outputs: Tensor, batch: Batch, ids: Tensor) -> None:
        match_shape(outputs, check_batch(outputs, inputs_and_targets(batch)[2], ids), "SquaredError()")

    def sample_cotangent(
        self, outputs: Float[Tensor, "n *out"], batch: Batch, generator: Randomness = None
    ) -> Float[Tensor, "n *out"]:
        return draw(outputs, generator, normal=True).to(outputs.dtype) * math.sqrt(self._scale(outputs))

    def root(self, outputs: Float[Tensor, "n *out"], batch: Batch) -> Float[Tensor, "k n *out"]:
        return diagonal_root(torch.full_like(outputs, math.sqrt(self._scale(outputs))))

    def root_size(self, outputs: Float[Tensor, "n *out"]) -> int:
        return math.prod(outputs.shape[1:])

    def hessian_product(
        self, outputs: Float[Tensor, "n *out"], batch: Batch, v: Float[Tensor, "n *out"]
    ) -> Float[Tensor, "n *out"]:
        return self._scale(outputs) * v

    def _scale(self, outputs: Tensor) -> float:
        """The second derivative in one output."""
        return (1.0 if self.half else 2.0) / (math.prod(outputs.shape[1:]) if self.average else 1)


def match_shape(outputs: Tensor, targets: Num[Tensor, "..."] | Tensor, name: str) -> Tensor:
    """Targets with the shape and type of the outputs, where an example has as many numbers.

    Raises:
        InvalidInput: an example has another number of targets, or their axes are in another order.
    """
    shape, target_shape = tuple(outputs.shape), tuple(targets.shape)
    axes, target_axes = [d for d in shape[1:] if d != 1], [d for d in target_shape[1:] if d != 1]
    transposed = len(axes) == len(target_axes) > 1 and axes != target_axes
    if not target_shape or target_shape[0] != shape[0] or math.prod(target_shape) != math.prod(shape) or transposed:
        labels = len(shape) == 2 and len(target_shape) == 1
        hint = "; for one class number per example use CrossEntropy()" if labels else ""
        raise InvalidInput(
            f"{name} got targets of shape {target_shape} for outputs of shape {shape}; expected as many numbers per "
            f"example, in the same order{hint}."
        )
    return targets.to(outputs.dtype).reshape(shape)


def diagonal_root(values: Float[Tensor, "n *out"]) -> Float[Tensor, "k n *out"]:
    """Column k holds the k-th number of every example, at its place."""
    return torch.diag_embed(values.reshape(len(values), -1)).movedim(1, 0).reshape(-1, *values.shape)
