"""Binary decisions, one or several per example."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, final

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from ..core.errors import InvalidInput
from .base import (
    AbstractLikelihood,
    Batch,
    Model,
    call_model,
    check_batch,
    inputs_and_targets,
    offenders,
    tensor_targets,
)
from .draws import Randomness, draw
from .likelihoods import check_weight, diagonal_root, match_shape


@final
@dataclass(frozen=True, eq=False, repr=False)
class Bernoulli(AbstractLikelihood):
    """-w (p_w y log σ(f) + (1 - y) log σ(-f)), summed over an example's outputs: `BCEWithLogitsLoss`.

    Outputs are logits [n], [n, 1] or [n, L] (multi-label); targets from 0 to 1 take the outputs' shape. The
    Hessian in the outputs is diagonal, w (p_w y + 1 - y) σ(f) σ(-f).

    Args:
        weight: factor of each output, [L] or one number.
        pos_weight: factor of each output's positive part, [L] or one number.
        average: divide by the number of outputs per example. `torch.nn.BCEWithLogitsLoss()` does.
        from_probabilities: the model returns probabilities (`torch.nn.BCELoss`): `outputs` takes them back to
            logits, kept finite where they have saturated to 0 or 1 (there the derivative is 0, as in torch).

    Raises:
        InvalidInput: a weight is negative or not finite.

    Example:
        >>> Bernoulli().losses(torch.zeros(2), (None, torch.tensor([0, 1])))
        tensor([0.6931, 0.6931])
    """

    weight: Tensor | float | None = None
    pos_weight: Tensor | float | None = None
    average: bool = False
    from_probabilities: bool = False
    lower_is_better: ClassVar[bool] = True

    def __post_init__(self) -> None:
        for name, value in (("weight", self.weight), ("pos_weight", self.pos_weight)):
            if value is not None:
                check_weight("output" if name == "weight" else "positive", torch.as_tensor(value))

    def outputs(self, model: Model, batch: Batch) -> Tensor:
        args, kwargs, _ = inputs_and_targets(batch)
        outputs = call_model(model, args, kwargs)
        return _logits(outputs) if self.from_probabilities else outputs

    def losses(self, outputs: Float[Tensor, "n *out"], batch: Batch) -> Float[Tensor, " n"]:
        y = match_shape(outputs, tensor_targets(batch), "Bernoulli()")
        yes, no = self._factors(outputs, y)
        loss = -yes * F.logsigmoid(outputs) - no * F.logsigmoid(-outputs)
        return loss.reshape(len(outputs), -1).sum(1)

    def check(self, outputs: Tensor, batch: Batch, ids: Tensor) -> None:
        targets = check_batch(outputs, inputs_and_targets(batch)[2], ids)
        if self.from_probabilities and bool((bad := torch.isnan(outputs)).any()):
            raise InvalidInput(
                f"The outputs at {offenders(bad, ids)} are not probabilities from 0 to 1, which BCELoss and "
                "from_probabilities=True expect; use Bernoulli() or BCEWithLogitsLoss() for logits."
            )
        y = match_shape(outputs, targets, "Bernoulli()")
        if bool((bad := ~((y >= 0) & (y <= 1))).any()):
            raise InvalidInput(
                f"Target {float(y[bad][0]):g} at {offenders(bad, ids)} is not from 0 to 1; "
                "Bernoulli() expects 0 for no and 1 for yes, so recode the labels."
            )
        self._factors(outputs, y)

    def sample_cotangent(
        self, outputs: Float[Tensor, "n *out"], batch: Batch, generator: Randomness = None
    ) -> Float[Tensor, "n *out"]:
        labels = (draw(outputs, generator) < outputs.sigmoid()).to(outputs.dtype)
        return self._size(outputs, batch).sqrt() * (outputs.sigmoid() - labels)

    def root(self, outputs: Float[Tensor, "n *out"], batch: Batch) -> Float[Tensor, "k n *out"]:
        return diagonal_root(self._diagonal(outputs, batch).sqrt())

    def root_size(self, outputs: Float[Tensor, "n *out"]) -> int:
        return math.prod(outputs.shape[1:])

    def hessian_product(
        self, outputs: Float[Tensor, "n *out"], batch: Batch, v: Float[Tensor, "n *out"]
    ) -> Float[Tensor, "n *out"]:
        return self._diagonal(outputs, batch) * v

    def _diagonal(self, outputs: Tensor, batch: Batch) -> Tensor:
        return self._size(outputs, batch) * outputs.sigmoid() * (-outputs).sigmoid()

    def _size(self, outputs: Tensor, batch: Batch) -> Tensor:
        yes, no = self._factors(outputs, match_shape(outputs, tensor_targets(batch), "Bernoulli()"))
        return yes + no

    def _factors(self, outputs: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """The factors of -log σ(f) and -log σ(-f)."""
        scale = 1.0 / math.prod(outputs.shape[1:]) if self.average else 1.0
        weight = _per_output(self.weight, "weight", outputs) * scale
        return weight * _per_output(self.pos_weight, "pos_weight", outputs) * y, weight * (1 - y)


def _per_output(factor: Tensor | float | None, name: str, outputs: Tensor) -> Tensor:
    """A factor that broadcasts against an example's outputs."""
    value = torch.as_tensor(1.0 if factor is None else factor, dtype=outputs.dtype, device=outputs.device)
    if value.numel() == 1:
        return value.reshape(())
    try:
        return value.expand(outputs.shape[1:])
    except RuntimeError:
        raise InvalidInput(
            f"The {name} of shape {tuple(value.shape)} does not fit outputs of shape {tuple(outputs.shape)}; "
            "expected one number, or one per output of an example (a weight per example of a batch cannot be "
            "kept)."
        ) from None


def _logits(p: Tensor) -> Tensor:
    """log(p / (1 - p)), finite for saturated probabilities, NaN for what is none (`check` names it)."""
    eps = torch.finfo(p.dtype).eps
    inside = torch.where((p >= 0) & (p <= 1), p.clamp(eps, 1 - eps), torch.full_like(p, torch.nan))
    return inside.log() - (-inside).log1p()
