"""The loss of models that mark an answer in a text: cross entropy of where it starts and of where it ends."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Final, final

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ..core.errors import InvalidInput
from ..objectives.base import AbstractLikelihood, Batch, Model, inputs_and_targets, offenders, run_model, widen
from ..objectives.draws import Randomness
from ..objectives.tokens import TokenCrossEntropy

_PLACES: Final = ("start_positions", "end_positions")
_LOGITS: Final = ("start_logits", "end_logits")
# Start and end are two "tokens", whose classes are the places of the text.
_TWO_PLACES: Final = TokenCrossEntropy()


def spans_as_labels(batch: Mapping[str, Any]) -> dict[str, Any]:
    """A batch with where answers start and end as `labels` [n, 2]; as it is where it does not hold both.

    Args:
        batch: as a collate function made it.
    """
    places = [batch.get(name) for name in _PLACES]
    if "labels" in batch or not all(isinstance(place, Tensor) for place in places):
        return dict(batch)
    labels: Int[Tensor, "n 2"] = torch.stack([place.reshape(-1) for place in places if place is not None], 1)
    return {key: value for key, value in batch.items() if key not in _PLACES} | {"labels": labels}


def labels_as_spans(batch: Mapping[str, Any]) -> dict[str, Any]:
    """What `spans_as_labels` made, as a model that marks answers is given it in training.

    Args:
        batch: with `labels` [n, 2].
    """
    places = dict(zip(_PLACES, batch["labels"].unbind(1), strict=True))
    return {key: value for key, value in batch.items() if key != "labels"} | places


@final
@dataclass(frozen=True, eq=False, repr=False)
class SpanCrossEntropy(AbstractLikelihood):
    """The mean of the cross entropies of where an answer starts and of where it ends: outputs [n, 2, T], labels [n, 2].

    It is the loss of the models `…ForQuestionAnswering` of transformers.
    """

    lower_is_better: ClassVar[bool] = True

    def outputs(self, model: Model, batch: Batch) -> Tensor:
        args, kwargs, _ = inputs_and_targets(batch)
        returned = run_model(model, args, kwargs)
        logits = [
            returned.get(name) if isinstance(returned, Mapping) else getattr(returned, name, None) for name in _LOGITS
        ]
        known = [value for value in logits if isinstance(value, Tensor)]
        if len(known) < len(_LOGITS):
            raise InvalidInput(
                f"The model returned {type(returned).__name__} without start_logits and end_logits, of which the loss "
                "of marked answers is made; pass loss=."
            )
        return widen(torch.stack(known, 1))

    def losses(self, outputs: Float[Tensor, "n *out"], batch: Batch) -> Float[Tensor, " n"]:
        return _TWO_PLACES.losses(outputs, batch)

    def losses_and_slope(self, outputs: Float[Tensor, "n *out"], batch: Batch) -> tuple[Tensor, Tensor]:
        return _TWO_PLACES.losses_and_slope(outputs, batch)

    def check(self, outputs: Tensor, batch: Batch, ids: Tensor) -> None:
        places = inputs_and_targets(batch)[2]
        if isinstance(places, Tensor) and places.shape == outputs.shape[:2]:
            outside = (places < 0) | (places >= outputs.shape[-1])
            if bool(outside.any()):
                raise InvalidInput(
                    f"An answer starts or ends at token {int(places[outside][0])} at {offenders(outside.any(1), ids)}, "
                    f"outside the text's {outputs.shape[-1]} tokens, where transformers trains on the first token or "
                    "on nothing; mark answers within the text, and 0 (or what training used) where there is none."
                )
        _TWO_PLACES.check(outputs, batch, ids)

    def sample_cotangent(
        self, outputs: Float[Tensor, "n *out"], batch: Batch, generator: Randomness = None
    ) -> Float[Tensor, "n *out"]:
        return _TWO_PLACES.sample_cotangent(outputs, batch, generator)

    def root(self, outputs: Float[Tensor, "n *out"], batch: Batch) -> Float[Tensor, "k n *out"]:
        return _TWO_PLACES.root(outputs, batch)

    def root_size(self, outputs: Float[Tensor, "n *out"]) -> int:
        return _TWO_PLACES.root_size(outputs)

    def output_directions(self, outputs: Float[Tensor, "n *out"], batch: Batch) -> float:
        return _TWO_PLACES.output_directions(outputs, batch)

    def hessian_product(
        self, outputs: Float[Tensor, "n *out"], batch: Batch, v: Float[Tensor, "n *out"]
    ) -> Float[Tensor, "n *out"]:
        return _TWO_PLACES.hessian_product(outputs, batch, v)
