"""What a Trainer was given: its model, its training data with the columns it takes, and its collate function."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, is_dataclass, replace
from typing import Any, Final

import torch
from torch import Tensor, nn

from ..core.batches import to_device
from ..core.errors import InvalidInput, first_line
from ..core.indexing import spread_sample, while_cheap
from ..objectives.base import AbstractObjective
from ..objectives.model_loss import same_config
from ..objectives.tokens import TokenCrossEntropy
from ..problem.data import BATCH_SIZE, Source
from ..problem.model_state import preserved
from ..problem.own_loss import OwnLoss, is_half, warn_of_taught_padding
from ..problem.problem import model_device
from ..problem.random_state import same_rng
from .models import accepted_arguments, marks_answers, token_shift
from .padding import KINDS, Padding, TrainersCollate
from .spans import labels_as_spans
from .streams import refuse_trainers_stream
from .tokenised import TokenisedRows

# What TRL calls columns: how long the texts of a block are, and what the names of a pair's answers hold.
_PACKED: Final = "seq_lengths"
_PAIR: Final = ("chosen", "rejected")
# Examples whose loss together is compared with that of training.
_TOGETHER: Final = 8
# Among how many texts a short and a long one are taken; beyond the fewest only while it is cheap.
_FEWEST, _MOST, _SECONDS = 2, 16, 0.02


def trainers_model(trainer: Any) -> nn.Module:
    """The model as it was trained, without what accelerate wrapped around it."""
    model: nn.Module = trainer.model
    return model


def trainers_tokenizer(trainer: Any) -> Any:
    """The tokenizer that the Trainer was given, or None; of a processor its tokenizer."""
    processor = getattr(trainer, "processing_class", None)
    if processor is None:
        processor = getattr(getattr(trainer, "data_collator", None), "tokenizer", None)
    return getattr(processor, "tokenizer", processor)


def trainers_data(
    trainer: Any, dataset: Any, padding: Padding, batch_size: int | None, reading: str = "", tokenizer: Any = None
) -> Source:
    """Examples through the Trainer's own columns and collate function.

    Args:
        trainer: the Trainer.
        dataset: examples in the form of its training set; None: its training set.
        padding: what the model has to be told about padded texts.
        batch_size: the most examples of a batch.
        reading: how the texts are weighed, in words.
        tokenizer: shows token numbers as texts; None: the Trainer's.

    Raises:
        InvalidInput: there is no training set, or it can only be iterated.
    """
    data = getattr(trainer, "train_dataset", None) if dataset is None else dataset
    if data is None:
        raise InvalidInput("The Trainer has no train_dataset; pass the data it was trained on as dataset=.")
    refuse_trainers_stream(data)
    if callable(getattr(data, "with_format", None)) and getattr(data, "format", {}).get("type") not in (None, "torch"):
        data = data.with_format(None)
    collate = TrainersCollate(_collator(trainer.data_collator, padding), _accepted(trainer), padding)
    collate = collate.asking(trainers_model(trainer), data)
    words = trainers_tokenizer(trainer) if tokenizer is None else tokenizer
    return Source(
        TokenisedRows.of(data, words, collate, token_shift(trainer.model)),
        collate,
        batch_size=batch_size or BATCH_SIZE,
        fixed=batch_size is not None,
        reading=reading,
    )


def refuse_several_texts(trainer: Any, data: Any) -> None:
    """Refuse a Trainer whose examples hold several texts each.

    Args:
        trainer: the Trainer.
        data: its examples.

    Raises:
        InvalidInput: they are blocks of texts, or pairs of answers; the message says what can be asked instead.
    """
    if not hasattr(data, "__getitem__") or not hasattr(data, "__len__") or not len(data):
        return  # said, in words, where the data are read
    with same_rng():
        first = data[0]
    names = [str(name) for name in first] if isinstance(first, Mapping) else []
    if _PACKED in names:
        most = getattr(trainer.args, "max_length", None)
        raise InvalidInput(
            "The Trainer's examples are packed from several texts (packing=True), which are trained as if each stood "
            "alone; pass the texts themselves, which TRL ends, ptif.hf.problem(trainer.model, tokenizer, texts, "
            f"add_eos=True{'' if most is None else f', max_length={most}'})."
        )
    if all(any(kind in name for name in names) for kind in _PAIR) and not _is_one_row(trainer, first):
        cure = (
            "pass what an answer teaches as a text, ptif.hf.problem(trainer.model, tokenizer, rows, "
            "prompt_column='prompt', completion_column='chosen')"
        )
        if token_shift(trainer.model) is None:
            cure = (
                "pass the model with rows of single texts and their loss, ptif.attribute(model, loader, queries, loss)"
            )
        raise InvalidInput(
            "The Trainer's examples are pairs of a chosen and a rejected answer, whose loss is one of both and of no "
            f"single text; {cure}."
        )


def _is_one_row(trainer: Any, example: Any) -> bool:
    """Whether the Trainer's collate function makes one text of an example, whatever other columns it has."""
    with same_rng():
        try:
            accepted = _accepted(trainer)
            row = {name: cell for name, cell in example.items() if accepted is None or name in accepted}
            return len(trainer.data_collator([row])["input_ids"]) == 1
        except Exception:
            return False


def _collator(collator: Any, padding: Padding) -> Any:
    """The collate function that gives each text a row of its own, where the Trainer's puts them end to end.

    Such blocks keep texts apart by their positions, so that each is trained as if it stood alone.

    Raises:
        InvalidInput: it hides other tokens in every epoch, so that no text has one loss.
    """
    if getattr(collator, "mlm", False):
        raise InvalidInput(
            "The Trainer's collate function hides other tokens in every epoch (mlm=True), so no text has one loss; "
            "hide them once, in rows with input_ids and labels, and give the Trainer these with "
            "DataCollatorForTokenClassification(tokenizer)."
        )
    if getattr(collator, "padding_free", False) and is_dataclass(collator) and not isinstance(collator, type):
        return replace(collator, padding_free=False)
    return (
        OneRowEach(replace(padding, kinds=False))
        if type(collator).__name__ == "DataCollatorWithFlattening"
        else collator
    )


@dataclass(frozen=True, eq=False)
class OneRowEach:
    """Texts padded beside each other, where a collate function puts them end to end.

    Args:
        padding: what suits the model.
    """

    padding: Padding

    def __call__(self, items: list[Any]) -> dict[str, Tensor]:
        rows = [
            {name: torch.as_tensor(item[name]) for name in ("input_ids", "labels") if name in item} for item in items
        ]
        return self.padding([row if "labels" in row else row | {"labels": row["input_ids"]} for row in rows])


def padding_as_trained(padding: Padding, data: Source) -> Padding:
    """What texts are told as the training data are: of kinds of tokens where those hold them.

    Args:
        padding: what suits the model and its tokenizer.
        data: the training data.
    """
    if not isinstance(data.collate, TrainersCollate):
        return data.collate if isinstance(data.collate, Padding) else padding
    with same_rng():
        batch = data.collate([data.dataset[0]])
    return replace(padding, kinds=isinstance(batch, Mapping) and KINDS in batch)


def trainers_loss(trainer: Any) -> OwnLoss:
    """What a Trainer's `compute_loss` gives for a batch, as `OwnLoss` describes it.

    Args:
        trainer: the Trainer; it is left as it is.
    """
    own = not type(trainer).compute_loss.__module__.startswith("transformers")
    marks = marks_answers(trainer.model)

    def value(batch: Any) -> float | None:
        # A copy, as some count in themselves what they have seen.
        twin = copy.copy(trainer)
        twin.__dict__ |= {k: copy.deepcopy(v) for k, v in vars(trainer).items() if k in ("_metrics", "_logs")}
        with preserved(trainer.model), torch.no_grad(), same_config(trainer.model):
            try:
                return float(twin.compute_loss(trainer.model, labels_as_spans(batch) if marks else dict(batch)))
            except Exception as cause:
                if not own:
                    return None  # the model gives no loss for such labels, so the Trainer never trained on them
                raise InvalidInput(
                    f"{type(trainer).__name__}.compute_loss failed on training examples ({type(cause).__name__}: "
                    f"{first_line(cause)}), so its loss is not known; pass loss=, an objective or a function of "
                    "(outputs, targets) that computes the loss of each example."
                ) from cause

    smooths = getattr(trainer, "label_smoother", None) is not None
    return OwnLoss(f"{type(trainer).__name__}.compute_loss", value, not (own or smooths))


def check_loss(model: nn.Module, own: OwnLoss, data: Source, objective: Any) -> None:
    """Compare the loss that training computes with the one that is taken for it, on the first examples alone.

    Weights of classes cancel in the mean over one example, so some are looked at together too, spread over the data.

    Args:
        model: the model.
        own: what training computes.
        data: the training data.
        objective: what is taken for it.

    Raises:
        InvalidInput: they differ.
    """
    if not isinstance(objective, AbstractObjective):
        return
    looks, readings = [[i] for i in range(min(2, len(data)))], [objective]
    if isinstance(objective, TokenCrossEntropy):
        # A Trainer averages over the tokens of a batch, as the models do, which of batches of one text makes a mean.
        readings = [replace(objective, average=False), *([objective] if objective.average else ())]
        looks.append(_short_and_long(data, objective))
    if not isinstance(objective, TokenCrossEntropy) or not own.is_models:  # two texts hold many tokens already
        looks.append(sorted({place * len(data) // _TOGETHER for place in range(_TOGETHER)}))
    ours = readings[0]
    device, half, batches = model_device(model), is_half(model), list[Any]()
    with preserved(model), torch.no_grad():
        for ids in looks:
            try:
                batch = data.collate([data.dataset[i] for i in ids])
            except InvalidInput:
                raise
            except Exception:
                if len(ids) > 1:
                    break  # examples that only batches of one can hold
                _, batch = next(data.batches(ids))  # where it fails with the example named
            batch = to_device(batch, device)
            batches.append(batch)
            outputs = ours.outputs(model, batch)
            try:
                ours.check(outputs, batch, torch.tensor(ids))
            except InvalidInput:
                return  # refused in its own words where the losses are used
            gaps = [own.gap(reading, batch, outputs, half) for reading in readings]
            if gaps[0] is not None and None not in gaps:
                raise own.refusal(objective, ids, gaps[0], "the loss taken for it")
    if isinstance(objective, TokenCrossEntropy):
        warn_of_taught_padding(batches)


def computes(model: nn.Module, own: OwnLoss, data: Source, objective: TokenCrossEntropy) -> bool:
    """Whether training computes this loss for the first example.

    Args:
        model: the model.
        own: what training computes.
        data: the training data.
        objective: the loss.
    """
    with preserved(model), torch.no_grad():
        _, batch = next(data.batches([0]))
        batch = to_device(batch, model_device(model))
        outputs = objective.outputs(model, batch)
        return own.value(batch) is not None and own.gap(objective, batch, outputs, is_half(model)) is None


def _short_and_long(data: Source, objective: TokenCrossEntropy) -> list[int]:
    """The texts with the fewest and the most tokens that count, of a few: over what a loss is a mean shows there."""
    counts: dict[int, int] = {}
    with same_rng(), suppress(Exception):  # what cannot be read is said, in words, where it is looked at
        for i in while_cheap(spread_sample(len(data), _MOST).tolist(), _FEWEST, _SECONDS):
            counts[i] = int(objective.taught(data.collate([data.dataset[i]])).sum())
    if len(set(counts.values())) < 2:
        return sorted({0, len(data) // 2})
    return sorted({min(counts, key=counts.__getitem__), max(counts, key=counts.__getitem__)})


def _accepted(trainer: Any) -> tuple[str, ...] | None:
    """The columns that reach the collate function; None: all."""
    if not getattr(trainer.args, "remove_unused_columns", True):
        return None
    before = getattr(trainer, "_signature_columns", None)
    look = getattr(trainer, "_set_signature_columns_if_needed", None)
    columns: Sequence[str] | None = None
    if callable(look):
        # Trainers of other libraries add the columns of their own collate functions here.
        look()
        columns = trainer._signature_columns
        trainer._signature_columns = before
    names = accepted_arguments(trainer.model) if columns is None else columns
    return tuple(
        dict.fromkeys([*names, "labels", "label", "label_ids", *(getattr(trainer, "label_names", None) or ())])
    )
