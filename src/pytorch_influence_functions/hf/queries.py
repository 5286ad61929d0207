"""Questions to a language model as queries: a prompt with the answer it gave, or an answer rather than another."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from ..core.errors import InvalidInput
from ..core.validate import whole_number
from ..problem.data import BATCH_SIZE, Source
from ..problem.model_state import preserved
from ..problem.reading import Collate
from ..scores.difference import CONTRASTED
from ..scores.scores import Scores
from .chats import Chat, is_chat, is_nothing, join_answer, naming, read_chat
from .columns import listed, rows_of_frame
from .encoding import Encoded, encode_blanks, encode_chat, encode_chat_prompt, encode_pair, encode_prompt, encode_text
from .models import (
    base_model,
    classifies_tokens,
    fills_blanks,
    find_tokenizer,
    is_classifier,
    is_seq2seq,
    is_trainer,
    knows_texts,
    load_with_tokenizer,
    marks_answers,
    token_shift,
)
from .padding import KINDS, Padding
from .questions import Questions, check_alike
from .texts import Texts, longest
from .trainers import padding_as_trained, trainers_data, trainers_tokenizer

Prompt: TypeAlias = str | Sequence[Mapping[str, Any]]


@dataclass(frozen=True, eq=False)
class TextQueries(Source):
    """Queries of texts, as data by index, with their words.

    With `against`, the second half are the answers that the first half is held against: `contrast` takes the scores of
    all of them and gives those of the pairs.

    Args:
        dataset: the encoded queries.
        collate: puts them into a batch.
        batch_size: the most queries of a batch.
        num_workers: processes that read; 0: this one.
        worker_options: of those processes.
        fixed: whether the batch size was asked for.
        drops_last: whether a loader left out a last batch; no loader gave them, so False.
        columns: names of the columns of frames; texts have none.
        any_precision: whether the type of real numbers says nothing; texts have none.
        loaded_singly: whether a loader gave them one by one; what training did counts, so False.
        reading: how they were read, in words.
        ask: queries are asked nothing; None.
        pairs: how many pairs of answers they are; 0: they are no pairs.
    """

    pairs: int = 0

    @property
    def texts(self) -> Texts:
        """The encoded queries."""
        encoded: Texts = self.dataset
        return encoded

    @property
    def names(self) -> list[str]:
        """What to call each query: the beginning of the answer."""
        if not self.pairs:
            return [self.texts.name(i) for i in range(len(self))]
        return [f"{self.texts.name(i)} / {self.texts.name(self.pairs + i)}" for i in range(self.pairs)]

    @property
    def sides(self) -> tuple[TextQueries, TextQueries | None]:
        """The answers, and those that they are held against: `score(answers, contrast=others)` solves for pairs."""
        if not self.pairs:
            return self, None
        return self._part(slice(0, self.pairs)), self._part(slice(self.pairs, None))

    def _part(self, which: slice) -> TextQueries:
        texts = self.texts
        targets = None if texts.targets is None else texts.targets[which]
        some = replace(texts, encoded=texts.encoded[which], targets=targets, kinds=None)
        return replace(self, dataset=some, pairs=0, _determinism={})

    def contrast(self, scores: Scores) -> Scores:
        """Scores of each answer rather than the one it is held against: the difference of their losses is measured.

        Positive means that the training text helped the first answer more than the second. Queries without `against`
        are given back as they are, with their names.

        Args:
            scores: all training examples for all of these queries, in their order.

        Raises:
            InvalidInput: the scores are of other queries, hold some training examples only, or are cosines.
        """
        if len(scores) != len(self):
            raise InvalidInput(f"There are {len(scores)} rows of scores and {len(self)} queries; score these queries.")
        if not self.pairs:
            return replace(scores, query_names=self.names)
        if scores.indices is not None:
            raise InvalidInput("Pairs of answers need the scores of all examples; score without top=, then top(k).")
        if "scaling=Cosine(" in scores.diagnostics.method:
            raise InvalidInput(
                "These scores are cosines, and the difference of two is not that of a pair; write answers, others = "
                "queries.sides and attribution.score(answers, contrast=others)."
            )
        n = self.pairs
        return replace(
            scores,
            values=scores.values[:n] - scores.values[n:],
            query_ids=scores.query_ids[:n],
            query_labels=None,
            query_names=self.names,
            diagnostics=replace(scores.diagnostics, rows=CONTRASTED),
        )


def query(
    model: Any,
    tokenizer: Any = None,
    prompt: Any = None,
    completion: Any = None,
    *,
    against: Any = None,
    tools: Any = None,
    max_new_tokens: int = 64,
    add_eos: bool | None = None,
    padding_side: str | None = None,
) -> TextQueries:
    """What a model answers, as a query: the loss is that of the answer's tokens, given the prompt.

    Args:
        model: the model, the path of its folder, or the Trainer or pipeline that holds it; a text that it generates is
            its most likely one, token by token (greedy).
        tokenizer: its tokenizer; None: the Trainer's or pipeline's, or the one that lies beside the model.
        prompt: a text or a chat, or a list of texts or chats. A chat that ends with the assistant's turn holds the
            answer itself. Also rows, as `ptif.attribute` takes them: `{"prompt", "completion", "against"}` (or
            `{"prompt", "chosen", "rejected"}`), `{"messages"}`, or `{"text"}`, which is asked about as a whole. A model
            that fills in blanks is given a text with them, and as its answer what stands there.
        completion: the answer, or one per prompt, as a text or as the messages of a chat; None: the model generates it.
        against: another answer, or one per prompt: what is measured is the loss of the answer minus that of the other.
            Scores of both come out one below the other, and `queries.contrast(scores)` subtracts them; `ptif.attribute`
            does.
        tools: what the chat template is told of functions that can be called, for all chats; None: nothing.
        max_new_tokens: the longest answer that is generated.
        add_eos: whether the end of the answer is part of what is asked; None: of an encoder-decoder, as it is taught
            to end, and of other models not.
        padding_side: as for `problem`; it does not matter.

    Returns:
        queries that `score`, `token_scores` and `ptif.attribute` take.

    Raises:
        InvalidInput: a prompt is neither a text nor a chat, there is another number of answers than prompts, or the
            model says nothing about texts.

    Example:
        ```python
        queries = ptif.hf.query(model, tokenizer, "The capital of France is", " Paris", against=" London")
        ```
    """
    whole = model
    model, tokenizer = load_with_tokenizer(model, tokenizer)
    if knows_texts(model):
        tokenizer = (trainers_tokenizer(model) or getattr(model, "tokenizer", None)) if tokenizer is None else tokenizer
        model = model.model
    if not isinstance(model, nn.Module):
        raise InvalidInput(
            f"The model is of type {type(model).__name__}; write ptif.hf.query(model, tokenizer, prompt), with a model "
            "of transformers."
        )
    check_says_texts(model)
    tokenizer = find_tokenizer(model, tokenizer)
    if prompt is None:
        raise InvalidInput("There is no prompt; write ptif.hf.query(model, tokenizer, prompt), a text or a chat.")
    max_new_tokens = whole_number("max_new_tokens", max_new_tokens, 1)
    padding = Padding.of(model, tokenizer, padding_side)
    if is_trainer(whole) and hasattr(getattr(whole, "train_dataset", None), "__getitem__"):
        padding = padding_as_trained(padding, trainers_data(whole, None, padding, None))
    prompts = _listed(prompt)
    if not any(isinstance(one, Mapping) for one in prompts):
        prompts = prompts if tools is None else _with_tools(prompts, tools)
        return ask_texts(model, tokenizer, prompts, completion, against, padding, max_new_tokens, add_eos)
    if completion is not None or against is not None:
        name = "against" if completion is None else "completion"
        raise InvalidInput(f"The prompts are rows, which hold their answers, beside {name}=; put it into the rows.")
    check_alike(prompts)
    return ask_rows(model, tokenizer, prompts, padding, max_new_tokens, add_eos, tools)


def check_says_texts(model: nn.Module) -> None:
    """Refuse models of which a text asks nothing.

    Raises:
        InvalidInput: it gives texts, or their tokens, classes.
    """
    name = type(base_model(model)).__name__
    if classifies_tokens(model):
        raise InvalidInput(
            f"{name} gives every token a class, so a text alone asks nothing; ask ptif.attribute(..., queries=rows), "
            "rows with input_ids and labels: a class for each token, -100 where it has none."
        )
    if is_classifier(model) or marks_answers(model):
        raise InvalidInput(
            f"{name} predicts no tokens, so a text alone asks nothing; ask ptif.attribute(..., queries=rows), rows in "
            "the form of the training data with their labels."
        )


def _listed(prompt: Any) -> list[Any]:
    """Prompts, or rows, as a list, also of one."""
    if isinstance(prompt, (str, Mapping)) or is_chat(prompt):
        return [prompt]
    prompt = rows_of_frame(prompt)
    if not hasattr(prompt, "__iter__"):
        raise InvalidInput(f"The prompt is of type {type(prompt).__name__}; give a text, a chat, or a list of them.")
    return list(prompt)


def ask_rows(
    model: nn.Module,
    tokenizer: Any,
    rows: Sequence[Any],
    padding: Padding,
    max_new_tokens: int = 64,
    add_eos: bool | None = None,
    tools: Any = None,
    read_from: str | None = None,
) -> TextQueries:
    """What rows ask, by their columns.

    Args:
        model, tokenizer, padding, max_new_tokens, add_eos: as for `ask_texts`.
        rows: of `prompt` with an answer or without, of `text`, of `messages`, or single messages.
        tools: what the chat template is told, for all chats; None: what the rows say.
        read_from: the columns of the training data, in words.

    Raises:
        InvalidInput: the columns do not say what is asked.
    """
    asked = Questions.of(rows)
    if asked is None:
        columns = "" if read_from is None else f" and the training data were read from {read_from}"
        raise InvalidInput(
            f"A query has the columns {listed([str(name) for name in rows[0]])}{columns}; give "
            f"{'' if read_from is None else 'the same columns, '}'prompt' with 'completion', 'text' or 'messages', or "
            "texts and chats themselves."
        )
    prompts = asked.prompts if tools is None else _with_tools(asked.prompts, tools)
    if asked.whole:
        return ask_whole_texts(model, tokenizer, prompts, padding)
    return ask_texts(model, tokenizer, prompts, asked.answers, asked.others, padding, max_new_tokens, add_eos)


def ask_whole_texts(model: nn.Module, tokenizer: Any, asked: Sequence[str], padding: Padding) -> TextQueries:
    """Texts, each asked about as a whole.

    Raises:
        InvalidInput: a text teaches nothing or is too long, or the model reads one text and writes another, or fills in
            blanks.
    """
    if is_seq2seq(model):
        raise InvalidInput("An encoder-decoder reads one text and writes another; ask {'prompt': …, 'completion': …}.")
    if fills_blanks(model):
        raise InvalidInput(_blanks_alone(model, tokenizer))
    texts = Texts(tuple(encode_text(tokenizer, text) for text in asked), tokenizer)
    texts.check_taught("query")
    texts.check_length(longest(model, tokenizer))
    return as_queries(texts, padding)


def _blanks_alone(model: nn.Module, tokenizer: Any) -> str:
    blank = getattr(tokenizer, "mask_token", None)
    rows = "rows with input_ids and labels, -100 where nothing is hidden"
    cure = rows if blank is None else f"{{'prompt': a text with {blank}, 'completion': what stands there}}, or {rows}"
    return f"{type(base_model(model)).__name__} fills in blanks, so a text alone asks nothing; give {cure}."


def ask_texts(
    model: nn.Module,
    tokenizer: Any,
    prompt: Any,
    completion: Any,
    against: Any,
    padding: Padding,
    max_new_tokens: int = 64,
    add_eos: bool | None = None,
) -> TextQueries:
    """What `query` asks, where model, tokenizer and padding are known."""
    prompts = _listed(prompt)
    if not prompts:
        raise InvalidInput("There is no prompt; give a text or a chat.")
    for number, one in enumerate(prompts):
        with naming(f"Query {number}"):
            prompts[number] = read_chat(one) if is_chat(one) else one
    answers = _one_each("completion", completion, len(prompts))
    others = _one_each("against", against, len(prompts))
    _refuse_gaps([a is None and not _holds_answer(p) for p, a in zip(prompts, answers, strict=True)], "completion")
    _refuse_gaps([other is None for other in others], "against")
    pairs = len(prompts) if others[0] is not None else 0
    questions = list(zip(prompts, answers, strict=True))
    questions += [(_open(p), other) for p, other in zip(prompts[:pairs], others, strict=False)]
    writing, asked = Writing(model, tokenizer, max_new_tokens, padding.kinds), []
    for number, (question, answer) in enumerate(questions):
        with naming(f"Query {number % len(prompts)}"):
            asked.append(_ask(writing, question, answer, add_eos))
    texts = Texts(
        tuple(encoded for encoded, _ in asked),
        tokenizer,
        tuple(target for _, target in asked if target is not None) if is_seq2seq(model) else None,
        shift=token_shift(model) is not False,
    )
    texts.check_taught("query")
    texts.check_length(longest(model, tokenizer))
    return as_queries(texts, padding, pairs)


def as_queries(texts: Texts, padding: Collate, pairs: int = 0) -> TextQueries:
    """Encoded texts as queries."""
    return TextQueries(texts, padding, batch_size=BATCH_SIZE, pairs=pairs)


def _one_each(name: str, given: Any, count: int) -> list[Any]:
    single = isinstance(given, str) or is_chat(given)
    answers = [given] * count if given is None or single else list(given)
    if len(answers) != count or (single and count > 1):
        raise InvalidInput(f"{name}= holds {1 if single else len(answers)} for {count} prompts; give one each.")
    return [None if is_nothing(answer) else answer for answer in answers]


def _refuse_gaps(missing: list[bool], name: str) -> None:
    """Refuse answers of some queries only: nobody asked the model to write the others."""
    if any(missing) and not all(missing):
        cure = {"completion": "for answers that the model writes", "against": "and ask pairs in a call of their own"}
        raise InvalidInput(
            f"Query {missing.index(True)} has no {name!r} and query {missing.index(False)} has one; give one to each, "
            f"or to none {cure[name]}."
        )


def _holds_answer(prompt: Any) -> bool:
    return is_chat(prompt) and len(_open(prompt)) < len(prompt)


def _with_tools(prompts: list[Any], tools: Any) -> list[Any]:
    if not all(is_chat(one) for one in prompts):
        raise InvalidInput("tools= is told to a chat template, and a prompt is a text; give lists of messages.")
    return [read_chat(one, {"tools": tools}) for one in prompts]


def _open(prompt: Prompt) -> Prompt:
    """A chat without the answer it ends with."""
    return read_chat(prompt).opening if is_chat(prompt) else prompt


def _ask(writing: Writing, prompt: Any, answer: Any, end: bool | None) -> tuple[Encoded, Encoded | None]:
    """The prompt with its answer; for an encoder-decoder the prompt, and the answer beside it."""
    tokenizer = writing.tokenizer
    if not isinstance(prompt, str) and not is_chat(prompt):
        raise InvalidInput(
            f"A prompt is of type {type(prompt).__name__}; expected a text, or a chat as a list of messages with role "
            "and content."
        )
    if is_seq2seq(writing.model):
        return _ask_seq2seq(writing, prompt, answer, end)
    if fills_blanks(writing.model):
        if not isinstance(prompt, str) or not isinstance(answer, str):
            raise InvalidInput(_blanks_alone(writing.model, tokenizer))
        return encode_blanks(tokenizer, prompt, answer), None
    if answer is not None and (is_chat(prompt) or is_chat(answer)):
        whole, _ = join_answer(prompt, answer)
        return _last_answer(encode_chat(tokenizer, whole)), None
    turns: Chat | None = None
    if isinstance(prompt, str):
        if answer is not None:
            return encode_pair(tokenizer, prompt, answer, bool(end)), None
        given = encode_prompt(tokenizer, prompt)
    else:
        chat = read_chat(prompt)
        if chat[-1]["role"] == "assistant":
            return _last_answer(encode_chat(tokenizer, chat)), None
        given = encode_chat_prompt(tokenizer, chat)
        turns = chat.followed_by([{"role": "assistant", "content": ""}])
    written = writing.answer(given)
    return Encoded((*given, *written), (False,) * len(given) + (True,) * len(written), chat=turns), None


def _ask_seq2seq(writing: Writing, prompt: Any, answer: Any, end: bool | None) -> tuple[Encoded, Encoded]:
    source = encode_text(writing.tokenizer, prompt)
    if answer is not None:
        return source, encode_text(writing.tokenizer, answer, end is not False)
    written = writing.answer(list(source.ids))
    return source, Encoded(tuple(written), (True,) * len(written))


def _last_answer(chat: Encoded) -> Encoded:
    """The chat with its last answer alone taught."""
    taught, inside = list(chat.taught), False
    for place in reversed(range(len(taught))):
        if inside and not taught[place]:
            return replace(chat, taught=tuple([False] * (place + 1) + taught[place + 1 :]))
        inside = inside or taught[place]
    return chat


@dataclass(frozen=True, eq=False)
class Writing:
    """How answers are generated: the most likely continuation, token by token.

    Args:
        model: a model with `generate`.
        tokenizer: its tokenizer.
        most: the longest answer.
        kinds: whether the model is told the kind of every token.
    """

    model: nn.Module
    tokenizer: Any
    most: int
    kinds: bool = False

    def answer(self, ids: Sequence[int]) -> list[int]:
        """The answer to a prompt of these token numbers; the model is left as it was.

        Raises:
            InvalidInput: the model cannot generate.
        """
        model: Any = self.model
        if not callable(getattr(model, "generate", None)):
            raise InvalidInput(f"{type(model).__name__} cannot generate an answer; pass completion=.")
        if not ids:
            raise InvalidInput("A prompt holds no token, which nothing can be written behind; pass completion=.")
        room = longest(model, self.tokenizer)
        most = self.most if room is None else min(self.most, room - (0 if is_seq2seq(model) else len(ids)))
        if most < 1:
            raise InvalidInput(f"A prompt of {len(ids)} tokens leaves no room for an answer within {room}; shorten it.")
        given = torch.tensor([list(ids)], dtype=torch.long, device=next(model.parameters()).device)
        pad = getattr(self.tokenizer, "pad_token_id", None)
        pad = getattr(self.tokenizer, "eos_token_id", None) if pad is None else pad
        with preserved(model), torch.no_grad():
            written: Tensor = model.generate(
                input_ids=given,
                attention_mask=torch.ones_like(given),
                do_sample=False,
                num_beams=1,
                max_new_tokens=most,
                pad_token_id=0 if pad is None else pad,
                **({KINDS: torch.zeros_like(given)} if self.kinds else {}),
            )[0]
        # An encoder-decoder gives what its decoder read, the start token first.
        return written[1 if is_seq2seq(model) else len(ids) :].tolist()
