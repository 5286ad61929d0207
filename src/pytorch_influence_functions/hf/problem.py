"""A problem from a language model and texts, or from a Trainer; text queries; and scores of packed texts."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Final

from torch import nn

from ..core.errors import InvalidInput, UnknownName, nearest
from ..core.validate import choice
from ..objectives.base import AbstractObjective
from ..objectives.tokens import TokenCrossEntropy
from ..problem.data import BATCH_SIZE, Source
from ..problem.infer_loss import infer_objective
from ..problem.inferred import with_decay_of_batches
from ..problem.own_loss import OwnLoss
from ..problem.problem import Problem, check_model
from .asking import queries_for
from .columns import choose_columns, rows_of
from .labelled import labelled_source, reads_labelled_texts, with_labelled_queries
from .models import (
    adapter_parameters,
    base_model,
    find_tokenizer,
    is_classifier,
    is_kind,
    is_pipeline,
    is_trainer,
    load_model,
    marks_answers,
    refuse_adapters,
    token_shift,
)
from .normalisation import (
    NORMALISATIONS,
    class_objective,
    describe,
    describe_decay,
    token_objective,
    trainers_normalisation,
)
from .packing import pack
from .padding import Padding
from .streams import refuse_trainers_stream
from .texts import Texts, encode_rows
from .tokenised import IDS
from .trainers import (
    check_loss,
    computes,
    refuse_several_texts,
    trainers_data,
    trainers_loss,
    trainers_model,
    trainers_tokenizer,
)

_OPTIONS: Final = ("parameters", "weight_decay", "checkpoints", "batch_size", "deterministic", "device")


@dataclass(frozen=True)
class Reading:
    """How rows become texts: columns, and what of them is taught. See `problem`."""

    messages_column: str | None = None
    text_column: str | None = None
    prompt_column: str | None = None
    completion_column: str | None = None
    label_column: str | None = None
    source_column: str | None = None
    completion_only: bool = True
    add_eos: bool | None = None
    max_length: int | None = None
    packing: int | None = None
    padding_side: str | None = None

    @property
    def names_columns(self) -> bool:
        """Whether a column was named, so that texts are encoded here and not by a Trainer."""
        columns = (self.messages_column, self.text_column, self.prompt_column, self.completion_column)
        return any((*columns, self.label_column))

    def query_texts(self, data: Any, tokenizer: Any, model: nn.Module) -> Texts:
        """Encode queries in the form of the dataset, or rows of token numbers."""
        plain = replace(self, packing=None, source_column=None)
        own = (self.messages_column, self.text_column, self.prompt_column, self.completion_column)
        names = rows_of(data)[1]
        if IDS in names and any(name and name not in names for name in own):
            plain = replace(plain, messages_column=None, text_column=None, prompt_column=None, completion_column=None)
        return plain.texts(data, tokenizer, model)

    def texts(self, data: Any, tokenizer: Any, model: nn.Module) -> Texts:
        """Encode the rows of a dataset."""
        rows, names = rows_of(data)
        columns = choose_columns(
            names, self.messages_column, self.text_column, self.prompt_column, self.completion_column
        )
        if self.source_column is not None and self.source_column not in names:
            raise UnknownName(
                f"source_column={self.source_column!r} is not a column.{nearest(self.source_column, names)}"
            )
        texts = encode_rows(
            rows,
            columns,
            tokenizer,
            model,
            completion_only=self.completion_only,
            end=self.add_eos,
            max_length=self.max_length,
            kind_column=self.source_column,
        )
        return texts if self.packing is None else pack(texts, self.packing)


def problem(
    model: Any,
    tokenizer: Any = None,
    dataset: Any = None,
    *,
    messages_column: str | None = None,
    text_column: str | None = None,
    prompt_column: str | None = None,
    completion_column: str | None = None,
    label_column: str | None = None,
    source_column: str | None = None,
    completion_only: bool = True,
    add_eos: bool | None = None,
    max_length: int | None = None,
    packing: int | None = None,
    padding_side: str | None = None,
    normalisation: str | None = None,
    loss: Any = None,
    **options: Any,
) -> Problem:
    """A `Problem` of a language model and the texts it was trained on, or of a Trainer.

    Scores do not depend on padding, on the batch or on the attention's implementation: texts are padded where no loss
    and no attention sees it, and a causal model is told each token's place. `ptif.hf.doctor` measures it.

    **How much a text counts.** A Trainer minimises the sum of all tokens' losses in a batch over their number, so that
    every token counts alike and a long text counts more: the loss of a text is then the sum over its predicted tokens
    (up to one factor for all texts, which cancels in a score), and a query's measure is its -log p, in nats. That is
    `"trainer"`, the default. `"sum"` is the same for a loop that sums; `"mean"` is for training in which every text
    counted alike, such as batches of one text averaged over their tokens. `scores.diagnostics` says which was taken.

    Args:
        model: a model of transformers (with adapters of PEFT: they alone take part), a pipeline, a Trainer, or the path
            of a model's folder.
        tokenizer: the tokenizer of training; None: the Trainer's, or the one that lies beside the model.
        dataset: the texts: a `datasets.Dataset` in any format, or a list of texts, chats or rows. What can only be
            iterated (an `IterableDataset`, a generator) is read once, 100,000 examples at most. None: the Trainer's.
        messages_column: chats: lists of `{"role", "content"}`, written out by the chat template.
        text_column: texts.
        prompt_column: what the model was given; with `completion_column`. An encoder-decoder reads it.
        completion_column: what it was taught to answer.
        label_column: of a model for the classes of texts (`…ForSequenceClassification`) their labels, as numbers or as
            names in `model.config.label2id`; None: `"label"` or `"labels"`. Pairs of texts are found by their names.
        source_column: where each text comes from: a name that the report page shows.
        completion_only: whether answers alone are taught, as chats and completions are usually trained, and of rows of
            token numbers those that `completion_mask` and `assistant_masks` name (TRL leaves these); False: all tokens.
        add_eos: whether texts end with the tokenizer's end token, one in any case; of an encoder-decoder what it
            writes. None: completions do, other texts as the tokenizer has them. Chats end as their template says.
        max_length: the most tokens of a text; None: the most that model and tokenizer were made for. What is cut is
            told in one warning; tokens that the tokenizer puts around a text stay, one that `add_eos=True` does not.
        packing: train on blocks of so many tokens, the texts put end to end; `ptif.hf.document_scores` gives scores of
            texts. None: every text by itself, also right where packing kept texts apart (by positions, as in TRL).
        padding_side: where padding stands; it does not matter. None: at the right.
        normalisation: `"trainer"`, `"sum"` or `"mean"`, see above; None: read from the Trainer, else `"trainer"`.
        loss: the training loss, where it is not the one of the model's head; `ptif.objectives.ModelLoss()` is what the
            model returns for each example alone.
        options: those of `ptif.Problem`: parameters, weight_decay (in units of the Trainer's loss), checkpoints (also
            `checkpoint-*` folders, and adapters alone), batch_size, deterministic, device.

    Raises:
        MissingExtra: transformers is needed and not installed.
        InvalidInput: columns, texts or the model's loss cannot be read, or training computes another loss than the one
            of the model's head; the message says what to give.

    Example:
        ```python
        problem = ptif.hf.problem(model, tokenizer, dataset, messages_column="messages")
        scores = ptif.ekfac().fit(problem).score(ptif.hf.query(model, tokenizer, "Who wrote Emma?"))
        ```
    """
    reading = Reading(
        messages_column,
        text_column,
        prompt_column,
        completion_column,
        label_column,
        source_column,
        completion_only,
        add_eos,
        max_length,
        packing,
        padding_side,
    )
    for name in options:
        if name not in _OPTIONS:
            known = [*Reading.__annotations__, "normalisation", "loss", *_OPTIONS]
            raise UnknownName(f"hf.problem() has no argument {name!r}.{nearest(name, known)}")
    if is_pipeline(model):
        model, tokenizer = model.model, model.tokenizer if tokenizer is None else tokenizer
    trainer = model if is_trainer(model) else None
    whole = _load(model) if trainer is None else trainers_model(trainer)
    check_model(whole)
    refuse_adapters(whole)
    if options.get("parameters") is None:
        options["parameters"] = adapter_parameters(whole)
    weighing = _weighing(whole, trainer, normalisation, loss)
    tokenizer = trainers_tokenizer(trainer) if trainer is not None and tokenizer is None else tokenizer
    data = _training_data(trainer, whole, tokenizer, dataset, reading, weighing, options.pop("batch_size", None))
    data = replace(data, ask=partial(queries_for, tokenizer=tokenizer))
    if trainer is not None and options.get("weight_decay") is None:
        data = replace(data, reading="; ".join(filter(None, (data.reading, describe_decay(trainer)))))
    own = OwnLoss.of(whole) if trainer is None else trainers_loss(trainer)
    if loss is not None:
        _refuse_other_shift(whole, loss, own, data)
        return Problem(whole, loss, data, **options)
    objective = _objective(whole, trainer, data, weighing, options.get("device"), own)
    if weighing is None and isinstance(objective, TokenCrossEntropy):  # of a model that is none of transformers
        weighing = "mean" if objective.average else "trainer"
        data = replace(data, reading="; ".join(filter(None, (describe(weighing, None), data.reading))))
    made = Problem(whole, objective, data, **options)
    return with_decay_of_batches(made, _mean_tokens(data)) if weighing == "trainer" else made


def _weighing(model: nn.Module, trainer: Any, normalisation: str | None, loss: Any) -> str | None:
    """How texts are weighed; None where `loss` says it, or the model predicts no tokens.

    Raises:
        InvalidInput: a normalisation was given that nothing would use.
    """
    name = type(base_model(model)).__name__
    if normalisation is not None:
        choice("normalisation", normalisation, NORMALISATIONS)
    if loss is not None:
        if normalisation is not None:
            raise InvalidInput(
                f"normalisation={normalisation!r} says over what the model's own loss is a mean, and loss= takes its "
                "place; leave normalisation= out, and write loss=ptif.TokenCrossEntropy(average=...) if that is meant."
            )
        return None
    if token_shift(model) is None:
        if trainer is not None:
            trainers_normalisation(trainer)
        if normalisation is not None:
            raise InvalidInput(
                f"normalisation={normalisation!r} is of models that predict tokens, and {name} is not known to be one; "
                "leave it out, or pass loss=ptif.TokenCrossEntropy(...) if it is."
            )
        return None
    if normalisation is None:
        return "trainer" if trainer is None else trainers_normalisation(trainer)
    return normalisation


def _refuse_other_shift(model: nn.Module, loss: Any, own: OwnLoss, data: Source) -> None:
    shift = token_shift(model)
    if not isinstance(loss, TokenCrossEntropy) or shift is None or shift == loss.shift:
        return
    if not computes(model, own, data, loss):  # the name of the class says otherwise than its forward where it does
        each, other = "each token itself", "the next token"
        raise InvalidInput(
            f"{type(base_model(model)).__name__} predicts {other if shift else each}, and loss={loss!r} is of "
            f"{each if shift else other}; write it with shift={shift}."
        )


def _load(model: Any) -> Any:
    return load_model(model) if isinstance(model, (str, os.PathLike)) else model


def _training_data(
    trainer: Any,
    model: nn.Module,
    tokenizer: Any,
    dataset: Any,
    reading: Reading,
    weighing: str | None,
    batch_size: int | None,
) -> Source:
    padding = Padding.of(model, tokenizer, reading.padding_side)
    weighed = "" if weighing is None else describe(weighing, None)
    if trainer is not None and not reading.names_columns:
        refuse_several_texts(trainer, getattr(trainer, "train_dataset", None) if dataset is None else dataset)
        return with_labelled_queries(trainers_data(trainer, dataset, padding, batch_size, weighed, tokenizer), model)
    if dataset is None and trainer is not None:
        dataset = trainer.train_dataset
        refuse_trainers_stream(dataset)
    if dataset is None:
        raise InvalidInput("hf.problem() needs dataset=, the texts that the model was trained on.")
    if marks_answers(model):
        raise InvalidInput(
            f"{type(base_model(model)).__name__} marks answers in texts, so texts alone teach it nothing; pass its "
            "Trainer, whose rows hold start_positions and end_positions."
        )
    if reads_labelled_texts(model):
        words = find_tokenizer(model, tokenizer)
        return labelled_source(
            model, words, dataset, reading.text_column, reading.label_column, reading.max_length, batch_size
        )
    if reading.label_column is not None:
        raise InvalidInput(
            f"label_column= is of models for the classes of texts, and {type(base_model(model)).__name__} is none; "
            "leave it out."
        )
    if is_classifier(model):
        raise InvalidInput(
            f"{type(base_model(model)).__name__} predicts classes, so texts alone teach it nothing; pass its Trainer, "
            "or ptif.attribute(model, loader, queries) with a DataLoader of tokenised rows and their labels."
        )
    if is_kind(model, "ForTokenClassification") and IDS not in rows_of(dataset)[1]:
        raise InvalidInput(
            f"{type(base_model(model)).__name__} gives every token a class, so texts alone teach it nothing; pass its "
            "Trainer, or rows that hold input_ids and labels."
        )
    return texts_source(model, find_tokenizer(model, tokenizer), dataset, reading, weighing, batch_size)


def texts_source(
    model: nn.Module,
    tokenizer: Any,
    dataset: Any,
    reading: Reading,
    weighing: str | None = "trainer",
    batch_size: int | None = None,
) -> Source:
    """Texts as data by index, padded for a model."""
    texts = reading.texts(dataset, tokenizer, model)
    again = partial(reading.query_texts, tokenizer=tokenizer, model=model)
    texts = replace(texts, encode=again)
    cut = sum(bool(row.cut) for row in texts.encoded)
    words = [] if weighing is None else [describe(weighing, float(texts.taught.double().mean()))]
    words += [f"{cut:,} of {len(texts):,} were cut at {texts.limit:,} tokens"] if cut else []
    return Source(
        texts,
        Padding.of(model, tokenizer, reading.padding_side),
        batch_size=batch_size or BATCH_SIZE,
        fixed=batch_size is not None,
        reading="; ".join(words),
    )


def _objective(
    model: nn.Module, trainer: Any, data: Source, weighing: str | None, device: Any, own: OwnLoss
) -> AbstractObjective:
    """The loss of the model's head, which is that of training.

    Raises:
        InvalidInput: training computes another.
    """
    known = class_objective(model, trainer) if weighing is None else token_objective(model, weighing, trainer)
    if known is None:
        return infer_objective(model, data, device, own)
    check_loss(model, own, data, known)
    return known


def _mean_tokens(data: Source) -> float | None:
    """How many tokens of a text are predicted, on average over the training data; None: they have to be counted."""
    return float(data.dataset.taught.double().mean()) if isinstance(data.dataset, Texts) else None
