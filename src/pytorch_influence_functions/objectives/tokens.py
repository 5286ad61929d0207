"""The loss of tokens, whose Hessian in the outputs is known in closed form: texts, labels of words."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, final

import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor

from ..core.batches import whole_batch
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
    label_key,
    offenders,
)
from .draws import Randomness
from .softmax import positions_that_count, softmax_cotangent, softmax_product, softmax_rank, softmax_root


@final
@dataclass(frozen=True, eq=False, repr=False)
class TokenCrossEntropy(AbstractLikelihood):
    """Cross entropy of a sequence: outputs [n, T, C], targets [n, T], averaged over the example's own tokens.

    Args:
        ignore_index: class number of tokens that do not count (padding, prompt).
        average: the mean over an example's own tokens that count; False: their sum, -log p(sequence).
        shift: for causal language models, whose outputs at position t predict token t + 1 and whose labels
            are the input ids. A batch without "labels" then takes "input_ids", where "attention_mask" is not
            0. What a padding position predicts (the first token, where texts are padded on the left) does not
            count, so that the loss of a text does not depend on how it is padded; unless padding itself has labels,
            which then all count, as in the loss of a model that is given them.
        label_smoothing: share ε of every target that is spread evenly over the C classes, in [0, 1]: a token's loss is
            -(1 - ε) log p_y - ε/C Σ_c log p_c, as in `torch.nn.CrossEntropyLoss` and in a Trainer with
            `label_smoothing_factor`. The Hessian in the outputs stays that of the softmax.

    Raises:
        InvalidInput: a setting out of its range.

    Note:
        A training loop that averages over all tokens of a batch weights a sequence by its length: that is
        `average=False` (up to one factor for all examples).

    Example:
        >>> batch = {"input_ids": torch.tensor([[0, 1, 1]])}
        >>> TokenCrossEntropy(shift=True).losses(torch.zeros(1, 3, 2), batch)
        tensor([0.6931])
    """

    ignore_index: int = -100
    average: bool = True
    shift: bool = False
    label_smoothing: float = 0.0
    lower_is_better: ClassVar[bool] = True

    def __post_init__(self) -> None:
        finite_number("label_smoothing", self.label_smoothing, least=0, most=1, owner=self)

    def outputs(self, model: Model, batch: Batch) -> Tensor:
        args, kwargs, _ = self._split(batch)
        return call_model(model, args, kwargs)

    def losses(self, outputs: Float[Tensor, "n *out"], batch: Batch) -> Float[Tensor, " n"]:
        return self._parts(outputs, batch).sum(1)

    def token_losses(self, outputs: Float[Tensor, "n *out"], batch: Batch) -> Float[Tensor, "n l"]:
        """Each token's part of its example's loss, at the token's own position; 0 where it does not count.

        With `average` the parts are divided by the number of tokens that count, so that they add up to `losses`.

        Args:
            outputs: the model's outputs [n, T, C].
            batch: the batch that the outputs came from.

        >>> batch = {"input_ids": torch.tensor([[0, 1, 1]])}
        >>> TokenCrossEntropy(shift=True).token_losses(torch.zeros(1, 3, 2), batch)
        tensor([[0.0000, 0.3466, 0.3466]])
        """
        parts = self._parts(outputs, batch)
        # Outputs at t predict token t + 1; the last of them predicts nothing.
        return torch.cat([parts[:, -1:], parts[:, :-1]], 1) if self.shift else parts

    def taught(self, batch: Batch) -> Bool[Tensor, "n l"]:
        """Which tokens count, each at its own position: where `token_losses` is not 0 by definition.

        Args:
            batch: texts as they are read, with their labels.

        >>> TokenCrossEntropy(shift=True).taught({"input_ids": torch.tensor([[0, 1, 1]])})
        tensor([[False,  True,  True]])
        """
        counts = self._predicted(self._split(batch)[2], batch) != self.ignore_index
        return torch.cat([counts[:, -1:], counts[:, :-1]], 1) if self.shift else counts

    def _parts(self, outputs: Tensor, batch: Batch) -> Tensor:
        label, factor = self._labels(outputs, batch)
        return _counted(self._expected(outputs.log_softmax(-1), label), factor)

    def _expected(self, logp: Float[Tensor, "n l c"], label: Int[Tensor, "n l"]) -> Float[Tensor, "n l"]:
        """Σ_c a_c log p_c, with the smoothed target a."""
        hard = logp.gather(-1, label[..., None])[..., 0]
        share = self.label_smoothing
        return (1 - share) * hard + share * logp.mean(-1) if share else hard

    def losses_and_slope(self, outputs: Float[Tensor, "n *out"], batch: Batch) -> tuple[Tensor, Tensor]:
        # Softmax minus the target takes a third of autograd's passes over the logits.
        label, factor = self._labels(outputs, batch)
        slope = outputs.log_softmax(-1)
        losses, share = _counted(self._expected(slope, label), factor).sum(1), self.label_smoothing
        hard = torch.full((), share - 1.0, dtype=slope.dtype, device=slope.device).expand(*label.shape, 1)
        slope = slope.exp_().scatter_add_(-1, label[..., None], hard)
        slope = slope.sub_(share / slope.shape[-1]) if share else slope
        return losses, slope.mul_(factor[..., None])

    def check(self, outputs: Tensor, batch: Batch, ids: Tensor) -> None:
        targets = check_batch(outputs, self._split(batch)[2], ids)
        _, factor = self._labels(outputs, batch)
        predicted = targets[:, 1:] if self.shift else targets
        check_labels(predicted, outputs.shape[-1], ids, self.ignore_index)
        if bool((bad := factor.sum(1) == 0).any()):
            raise InvalidInput(
                f"The sequences at {offenders(bad, ids)} have no token to predict (all are ignore_index="
                f"{self.ignore_index}{' after the shift' if self.shift else ''}); remove them from the "
                "dataset."
            )

    def sample_cotangent(
        self, outputs: Float[Tensor, "n *out"], batch: Batch, generator: Randomness = None
    ) -> Float[Tensor, "n *out"]:
        return softmax_cotangent(outputs, self._labels(outputs, batch)[1], generator)

    def root(self, outputs: Float[Tensor, "n *out"], batch: Batch) -> Float[Tensor, "k n *out"]:
        return softmax_root(outputs, self._labels(outputs, batch)[1])

    def root_size(self, outputs: Float[Tensor, "n *out"]) -> int:
        return math.prod(outputs.shape[1:-1]) * softmax_rank(outputs.shape[-1])

    def output_directions(self, outputs: Float[Tensor, "n *out"], batch: Batch) -> float:
        return positions_that_count(self._labels(outputs, batch)[1]) * (outputs.shape[-1] - 1)

    def hessian_product(
        self, outputs: Float[Tensor, "n *out"], batch: Batch, v: Float[Tensor, "n *out"]
    ) -> Float[Tensor, "n *out"]:
        return softmax_product(outputs, self._labels(outputs, batch)[1], v)

    def _split(self, batch: Batch) -> tuple[tuple[Any, ...], dict[str, Any], Any]:
        batch = whole_batch(batch)
        bare = isinstance(batch, Mapping) and label_key(batch) is None
        if self.shift and bare and "input_ids" in batch:
            targets, mask = batch["input_ids"], batch.get("attention_mask")
            if mask is not None:
                targets = torch.where(mask == 0, torch.full_like(targets, self.ignore_index), targets)
            return (), dict(batch), targets
        return inputs_and_targets(batch)

    def _labels(self, outputs: Tensor, batch: Batch) -> tuple[Int[Tensor, "n l"], Float[Tensor, "n l"]]:
        """The class number each position predicts, and its factor in the loss (0 where it does not count)."""
        targets = self._split(batch)[2]
        shape = tuple(outputs.shape)
        if len(shape) != 3:
            raise InvalidInput(
                f"TokenCrossEntropy() got outputs of shape {shape}, expected [n, T, C], one row of logits "
                "per token; for one label per example use CrossEntropy()."
            )
        if not isinstance(targets, Tensor) or not is_integer(targets) or tuple(targets.shape) != shape[:2]:
            described = f"{tuple(targets.shape)} and type {targets.dtype}" if isinstance(targets, Tensor) else "none"
            raise InvalidInput(
                f"TokenCrossEntropy() got targets of shape {described} for outputs of shape {shape}; "
                f"expected integers of shape {shape[:2]}, one class number per token."
            )
        label = self._predicted(targets, batch)
        counts = label != self.ignore_index
        factor = counts.to(outputs.dtype)
        if self.average:
            factor = factor / factor.sum(1, keepdim=True).clamp_min(1.0)
        return torch.where(counts, label, torch.zeros_like(label)), factor

    def _predicted(self, targets: Tensor, batch: Batch) -> Int[Tensor, "n l"]:
        """The class number that the output at each position predicts, `ignore_index` where none counts."""
        label = targets.long()
        if self.shift:
            last = torch.full_like(label[:, :1], self.ignore_index)
            label = torch.cat([label[:, 1:], last], 1)
            # Padding on the left would be taught to predict the text's first token, and only where there is padding.
            mask = attention_mask_of(batch)
            if mask is not None and mask.shape == label.shape:
                taught = labels_at_padding(targets, mask, self.ignore_index).any(1, keepdim=True)
                label = torch.where((mask == 0) & ~taught, torch.full_like(label, self.ignore_index), label)
        return label


def _counted(logp: Float[Tensor, "n l"], factor: Float[Tensor, "n l"]) -> Float[Tensor, "n l"]:
    """`where` rather than a product: 0 · inf would be NaN at a token that does not count."""
    return torch.where(factor > 0, -logp * factor, torch.zeros_like(logp))


def labels_at_padding(
    targets: Int[Tensor, "n l"], mask: Shaped[Tensor, "n l"], ignore_index: int = -100
) -> Bool[Tensor, "n l"]:
    """Which labels stand at padding, so that padding is taught.

    Args:
        targets: class numbers of tokens.
        mask: 0 at padding.
        ignore_index: what labels that do not count are.

    >>> labels_at_padding(torch.tensor([[5, 7, 0, -100]]), torch.tensor([[1, 1, 0, 0]]))
    tensor([[False, False,  True, False]])
    """
    return (mask == 0) & (targets != ignore_index)


def attention_mask_of(batch: Batch) -> Tensor | None:
    """The attention mask of a batch of texts, 0 at padding; None where it has none."""
    batch = whole_batch(batch)
    given = batch[0] if isinstance(batch, (tuple, list)) and batch and isinstance(batch[0], Mapping) else batch
    mask = given.get("attention_mask") if isinstance(given, Mapping) else None
    return mask if isinstance(mask, Tensor) else None
