"""Texts of unequal length put into one batch, so that none of them notices the others."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

import torch
from jaxtyping import Int
from torch import Tensor, nn

from ..core.errors import InvalidInput
from ..problem.random_state import same_rng
from .encoding import IGNORED
from .models import accepted_arguments, base_model, writes_labels
from .places import PLACES, counts_as_told, places_told
from .spans import spans_as_labels

Shift = Callable[[Tensor], Tensor]
KINDS: Final = "token_type_ids"


@dataclass(frozen=True)
class Padding:
    """How texts are put into a batch for one model.

    Args:
        pad: the token number of padding.
        side: where padding stands.
        positions: whether the model is told the place of every token, which then do not count the padding before them.
        shift: labels of a decoder -> what it reads; None for other models.
        mask: whether the model takes an attention mask.
        kinds: whether the model is told the kind of every token: 0, as the tokenizer says, which GPT-2 for one reads
            otherwise than nothing.
    """

    pad: int = 0
    side: str = "right"
    positions: bool = False
    shift: Shift | None = None
    mask: bool = True
    kinds: bool = False

    @staticmethod
    def of(model: nn.Module, tokenizer: Any = None, side: str | None = None) -> Padding:
        """What suits a model; any token serves as padding, because no loss and no attention sees it."""
        if side not in (None, "left", "right"):
            raise InvalidInput(f"padding_side={side!r} is none; expected 'left' or 'right'.")
        number = getattr(tokenizer, "pad_token_id", None)
        number = getattr(tokenizer, "eos_token_id", None) if number is None else number
        padding = Padding(
            0 if number is None else int(number),
            shift=shift_of(model) if writes_labels(model) else None,
            mask="attention_mask" in accepted_arguments(model),
            kinds=KINDS in accepted_arguments(model) and KINDS in (getattr(tokenizer, "model_input_names", None) or ()),
        )
        return padding.on_the_left(model) if side == "left" else padding

    def on_the_left(self, model: nn.Module) -> Padding:
        """The same with padding before the texts.

        Args:
            model: the model, asked how it counts places.
        """
        some = torch.tensor([number for number in range(4) if number != self.pad][:3])
        positions = counts_as_told(model, replace(self, side="right")([{"input_ids": some, "labels": some}]))
        return replace(self, side="left", positions=positions)

    def __call__(self, items: list[Mapping[str, Tensor]]) -> dict[str, Tensor]:
        """Items with `input_ids` [T] and `labels` [L] as one batch."""
        batch = {"input_ids": self._pad([item["input_ids"] for item in items], self.pad)}
        mask = self._pad([torch.ones_like(item["input_ids"]) for item in items], 0)
        if self.mask:
            batch["attention_mask"] = mask
        if self.kinds:
            batch[KINDS] = torch.zeros_like(batch["input_ids"])
        if self.positions:
            batch[PLACES] = places_told(mask)
        labels = self._pad([item["labels"] for item in items], IGNORED)
        if self.shift is not None:
            batch["decoder_input_ids"] = self.shift(labels)
        return batch | {"labels": labels}

    def _pad(self, rows: Sequence[Tensor], value: int) -> Int[Tensor, "n t"]:
        side = self.side if self.shift is None else "right"
        length = max(len(row) for row in rows)
        padded = torch.full((len(rows), length), value, dtype=torch.long)
        for row, values in zip(padded, rows, strict=True):
            row[slice(length - len(values), None) if side == "left" else slice(0, len(values))] = values
        return padded


def shift_of(model: nn.Module) -> Shift:
    """What turns labels into what the decoder reads: the model's own, else the start token and the labels before.

    Raises:
        InvalidInput: the model does not say with which token a decoder starts.
    """
    inside = base_model(model)
    own = getattr(inside, "prepare_decoder_input_ids_from_labels", None)
    if callable(own):
        return Shifted(own)
    config: Any = getattr(inside, "config", None)
    start = getattr(config, "decoder_start_token_id", None)
    start = (
        getattr(getattr(inside, "generation_config", None), "decoder_start_token_id", None) if start is None else start
    )
    if start is None:
        raise InvalidInput(
            f"{type(inside).__name__} does not say with which token its decoder starts; set "
            "model.config.decoder_start_token_id."
        )
    return StartThenLabels(int(start), int(getattr(config, "pad_token_id", None) or 0))


@dataclass(frozen=True, eq=False)
class Shifted:
    """The model's own way to shift labels."""

    own: Callable[..., Tensor]

    def __call__(self, labels: Tensor) -> Tensor:
        return self.own(labels=labels)


@dataclass(frozen=True)
class StartThenLabels:
    """The start token, then all labels but the last."""

    start: int
    pad: int

    def __call__(self, labels: Int[Tensor, "n t"]) -> Int[Tensor, "n t"]:
        shifted = torch.cat([torch.full_like(labels[:, :1], self.start), labels[:, :-1]], 1)
        return torch.where(shifted == IGNORED, torch.full_like(shifted, self.pad), shifted)


@dataclass(frozen=True, eq=False)
class TrainersCollate:
    """A Trainer's own collate function, with what a model must be told when it is called without labels.

    Args:
        collate: the Trainer's.
        accepted: the columns that it is given; None: all of them.
        padding: adds places that do not count padding before a text, and the decoder's inputs to labels.
    """

    collate: Callable[[list[Any]], Any]
    accepted: tuple[str, ...] | None
    padding: Padding

    def asking(self, model: nn.Module, rows: Any) -> TrainersCollate:
        """The same, with places told where the model counts as it is told.

        Args:
            model: the Trainer's, asked about the first of its examples.
            rows: the examples.
        """
        untold = replace(self, padding=replace(self.padding, positions=False))
        try:
            with same_rng():
                batch = untold([rows[0]])
        except Exception:  # said, in words, where the data are read
            return untold
        return replace(self, padding=replace(self.padding, positions=counts_as_told(model, batch)))

    def __call__(self, items: list[Any]) -> Any:
        if self.accepted is not None and isinstance(items[0], Mapping):
            named, items = items[0], [{key: item[key] for key in item if key in self.accepted} for item in items]
            if not items[0]:
                raise InvalidInput(
                    f"None of the columns {', '.join(map(repr, named))} of the Trainer's data is one that its model "
                    "takes, so it cannot train on them; tokenise them first, or name what holds the texts, as in "
                    "ptif.hf.problem(trainer, text_column='text')."
                )
        batch = self._together(items)
        if not isinstance(batch, Mapping):
            return batch
        batch = dict(batch)
        mask, labels = batch.get("attention_mask"), batch.get("labels")
        if self.padding.positions and PLACES not in batch and isinstance(mask, Tensor) and mask.dim() == 2:
            batch[PLACES] = places_told(mask, labels)
        if self.padding.shift is not None and "decoder_input_ids" not in batch and isinstance(labels, Tensor):
            batch["decoder_input_ids"] = self.padding.shift(labels)
        return spans_as_labels(batch)

    def _together(self, items: list[Any]) -> Any:
        try:
            return self.collate(items)
        except ValueError as cause:
            words = getattr(self.collate, "tokenizer", None)
            if words is None or getattr(words, "pad_token_id", 0) is not None:
                raise
            raise InvalidInput(
                "The tokenizer of the Trainer's collate function has no padding token, so it can put no examples into "
                "a batch, in training neither; set one, as in trainer.data_collator.tokenizer.pad_token = "
                "trainer.data_collator.tokenizer.eos_token."
            ) from cause
