"""Does a text's gradient depend on what it is batched with? Measured on the user's own model and texts."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final, final

import torch
from torch import Tensor, nn

from ..core.batches import to_device
from ..core.errors import InvalidInput, first_line
from ..core.notebook import Printable
from ..gradients.vjp import weighted_gradient
from ..linalg.space import Selection
from ..problem.model_state import derivative_safe, plain_autograd, preserved
from ..problem.problem import Problem, model_device
from .chats import is_chat
from .columns import rows_of
from .encoding import IGNORED
from .labelled import reads_labelled_texts
from .models import (
    accepted_arguments,
    base_model,
    is_causal,
    is_seq2seq,
    load_with_tokenizer,
    marks_answers,
    token_shift,
)
from .normalisation import token_objective
from .padding import Padding, Shift
from .problem import problem

SAME: Final = 0.99
"""A text whose gradient has a smaller cosine with that of the text alone is another text for the scores."""

Collate = Callable[[list[Any]], Any]


@final
@dataclass(frozen=True)
class Finding:
    """One way to put a text into a batch, and how far that changes its gradient.

    Attributes:
        situation: what was done, in words.
        cosine: the smallest cosine of a text's gradient with that of the text alone.
        size: the ratio of their lengths that is farthest from 1.
        text: the text that this was.
        cure: the cheapest mend, in words; empty where none is needed.
    """

    situation: str
    cosine: float
    size: float
    text: int
    cure: str = ""

    def __str__(self) -> str:
        mark = "[ok]  " if not self.cure else "[bad] "
        words = f"{mark} {self.situation}: cosine {self.cosine:.6f}, length × {self.size:.4g} (text {self.text})"
        return words + (f"; {self.cure}" if self.cure else "")


@final
@dataclass(frozen=True, repr=False)
class Checkup(Printable):
    """What `doctor` measured; `print` it.

    Attributes:
        findings: one per situation.
        dtype: of the model's weights.
    """

    findings: tuple[Finding, ...]
    dtype: str

    @property
    def healthy(self) -> bool:
        """Whether every text has the same gradient everywhere."""
        return not any(finding.cure for finding in self.findings)

    def __str__(self) -> str:
        head = "A text has the same gradient" if self.healthy else "A text does NOT have the same gradient"
        return "\n".join([f"{head} whatever its batch ({self.dtype} weights).", *map(str, self.findings)])


@plain_autograd()
def doctor(
    model: Any,
    tokenizer: Any,
    texts: Sequence[Any],
    *,
    parameters: Selection = None,
    collate: Collate | None = None,
    most: int = 4,
) -> Checkup:
    """Measure whether a text's gradient depends on its padding, its place in the batch, or its neighbours.

    Each text is taken alone, padded on either side, with and without being told its tokens' places, and beside a longer
    text; the gradient of its loss in the trainable parameters is compared with that of the text alone. One forward and
    backward pass per text and situation.

    Args:
        model: a causal, masked or encoder-decoder model of transformers, or one for classes of texts; or its folder.
        tokenizer: its tokenizer; None: the one that lies beside the model.
        texts: some texts or chats of unequal length; two at least. Rows as for `ptif.hf.problem` too: an
            encoder-decoder needs `{"prompt", "completion"}`, a model for classes `{"text", "label"}`.
        parameters: whose gradients are compared, see `ptif.Problem`; None: all that are trainable.
        collate: your own, as a `DataLoader` or a Trainer has it, from items `{"input_ids", "labels"}` to a batch: it is
            tried too, on the items without labels where it cannot put those together.
        most: how many texts are looked at.

    Returns:
        a `Checkup`: `print` it; `.healthy` says whether all cosines are above 0.99.

    Raises:
        InvalidInput: fewer than two texts, or texts that cannot be encoded or put into a batch.

    Example:
        ```python
        print(ptif.hf.doctor(model, tokenizer, ["A short text.", "A text that is quite a bit longer than the other."]))
        ```
    """
    rows = [texts] if isinstance(texts, str) or is_chat(texts) else rows_of(texts)[0]
    chosen = [rows[i] for i in range(min(len(rows), max(2, most)))]
    if len(chosen) < 2:
        raise InvalidInput("doctor() compares texts beside each other; give at least two, of unequal length.")
    model, tokenizer = load_with_tokenizer(model, tokenizer)
    _refuse_texts_alone(model, chosen[0])
    loss = None if token_shift(model) is None else token_objective(model, "sum")
    made = problem(model, tokenizer, chosen, parameters=parameters, loss=loss, device=model_device(model))
    gradients = _Gradients(made)
    with preserved(model, gradients.names), derivative_safe(model):
        alone = gradients.alone(made.data.collate)
        findings = [
            gradients.compare(words, make, alone, cure, neighbours)
            for words, make, cure, neighbours in _situations(model, made.data.collate)
        ]
        if collate is not None:
            findings += gradients.try_users(_UsersCollate(collate, getattr(made.data.collate, "shift", None)), alone)
    return Checkup(tuple(findings), str(next(model.parameters()).dtype).removeprefix("torch."))


def _refuse_texts_alone(model: nn.Module, first: Any) -> None:
    """Refuse texts that teach a model nothing by themselves.

    Raises:
        InvalidInput: it says which rows do.
    """
    name = type(base_model(model)).__name__
    if marks_answers(model):
        raise InvalidInput(
            f"{name} marks answers by a softmax over all places of a batch, padding too, so its gradients depend on "
            'what a text is batched with; pad every text to one length (padding="max_length").'
        )
    if set(first) == {"text"} and is_seq2seq(model):
        raise InvalidInput(
            f"{name} reads one text and writes another; give doctor() rows {{'prompt': …, 'completion': …}}."
        )
    if set(first) == {"text"} and reads_labelled_texts(model):
        raise InvalidInput(f"{name} gives every text a class; give doctor() rows {{'text': …, 'label': …}}.")


_PLACES: Final = (
    "tell the model its tokens' places: position_ids = attention_mask.cumsum(1) - 1, as ptif.hf.problem does"
)


def _situations(model: nn.Module, padding: Collate) -> Iterator[tuple[str, Collate, str, bool]]:
    """(words, collate function, cure, whether other texts stand beside it rather than padding alone)."""
    mask = "the model does not hide padding from a text; use batches of one (batch_size=1) or texts of one length"
    mixed = "texts of a batch see each other (experts with a capacity, normalisation over the batch); use batch_size=1"
    if not isinstance(padding, Padding):  # as the tokenizer of a model for classes pads
        yield "padded by its tokenizer", padding, mask, False
        yield "beside another text", padding, mixed, True
        return
    right, left = replace(padding, side="right"), padding.on_the_left(model)
    yield "padded on the right", right, mask, False
    if is_causal(model) or left.positions:
        yield "padded on the left", left, mask, False
        if left.positions:
            cure = f"pad on the right (tokenizer.padding_side = 'right'), or {_PLACES}"
            yield "padded on the left, places not told", replace(left, positions=False), cure, False
    yield "beside another text", right, mixed, True


@dataclass(frozen=True, eq=False)
class _UsersCollate:
    """A collate function of the user's, given items in the form that it can put together.

    Args:
        own: the function.
        shift: labels of a decoder -> what it reads; None for other models.
    """

    own: Collate
    shift: Shift | None = None

    def __call__(self, items: list[Any]) -> Any:
        """A batch with labels.

        Raises:
            InvalidInput: it fails, draws what it hides anew every time, or gives no labels.
        """
        if getattr(self.own, "mlm", False):
            raise InvalidInput(
                "The collate function hides other tokens every time (mlm=True), so no text has one gradient; hide "
                "them once, in rows with input_ids and labels, and give doctor() these."
            )
        batch = self._together(items)
        if not isinstance(batch, Mapping) or not isinstance(batch.get("labels"), Tensor):
            keys = f"a mapping of {', '.join(map(repr, batch))}" if isinstance(batch, Mapping) else type(batch).__name__
            raise InvalidInput(
                f"The collate function gives {keys}, from which no loss of a text can be told; give one that returns a "
                "mapping with 'labels', as the one of training does."
            )
        if self.shift is not None and "decoder_input_ids" not in batch:  # what the model makes of labels by itself
            return {**batch, "decoder_input_ids": self.shift(batch["labels"])}
        return batch

    def _together(self, items: list[Any]) -> Any:
        try:
            return self.own([dict(item) for item in items])
        except Exception as cause:
            # DataCollatorForLanguageModeling and the like make labels themselves, and cannot pad those of items.
            try:
                return self.own([{k: v for k, v in item.items() if k != "labels"} for item in items])
            except Exception:
                raise InvalidInput(
                    f"The collate function failed on items with {', '.join(map(repr, items[0]))}, and without labels "
                    f"too ({type(cause).__name__}: {first_line(cause)}); give one that takes these items."
                ) from cause


@dataclass(frozen=True, eq=False)
class _Gradients:
    """Gradients of single texts of a batch."""

    problem: Problem

    @property
    def names(self) -> tuple[str, ...]:
        return self.problem.space.names

    def of_text(self, items: list[Any], place: int, collate: Collate) -> Tensor:
        """The gradient of the loss of the text at a place of a batch, as one vector on the CPU."""
        made = self.problem
        batch = to_device(collate(items), made.device)
        outputs = made.objective.outputs(made.model, batch)
        loss = made.objective.losses(outputs, batch)[place]
        weights = list(made.space.values(made.model).values())
        gradients = weighted_gradient(loss, weights, torch.ones_like(loss))
        return torch.cat([gradient.flatten().float().cpu() for gradient in gradients])

    def alone(self, collate: Collate) -> list[Tensor]:
        """Of every text in a batch of its own."""
        texts = self.problem.data.dataset
        return [self.of_text([texts[i]], 0, collate) for i in range(len(texts))]

    def compare(self, words: str, collate: Collate, alone: list[Tensor], cure: str, neighbours: bool) -> Finding:
        """The text that a situation changes most."""
        texts = self.problem.data.dataset
        longest = max(range(len(texts)), key=lambda i: len(texts[i]["input_ids"]))
        gradients = []
        for i in range(len(texts)):
            beside = texts[longest if i != longest else (i + 1) % len(texts)] if neighbours else _filler(texts[i])
            gradients.append(self.of_text([texts[i], beside], 0, collate))
        return _most_changed(words, gradients, alone, cure)

    def try_users(self, collate: _UsersCollate, alone: list[Tensor]) -> list[Finding]:
        """Whether a collate function leaves texts as they are, and whether a text's gradient depends on its batch."""
        changes = (
            "it changes a text by itself, such as what is cut off or taught; give ptif.hf.problem the same, by "
            "max_length=, completion_only=False, or rows with input_ids and labels"
        )
        own, beside = self.alone(collate), f"{self._cause(collate)}, or leave padding to ptif.hf.problem"
        return [
            _most_changed("alone, by your collate function", own, alone, changes),
            self.compare("by your collate function", collate, own, beside, True),
        ]

    def _cause(self, collate: _UsersCollate) -> str:
        """What to mend in a collate function that changes a text which it pads, in words."""
        texts = self.problem.data.dataset
        alone, padded = collate([texts[0]]), collate([texts[0], _filler(texts[0])])
        counts = [int((batch["labels"][0] != IGNORED).sum()) for batch in (alone, padded)]
        if counts[1] > counts[0]:
            return "teach no padding: labels[attention_mask == 0] = -100"
        if "attention_mask" not in padded and "attention_mask" in accepted_arguments(self.problem.model):
            return "give the model an attention_mask, 0 at padding"
        return _PLACES


def _most_changed(words: str, gradients: list[Tensor], alone: list[Tensor], cure: str) -> Finding:
    worst = Finding(words, 2.0, 1.0, 0)
    for i, (gradient, single) in enumerate(zip(gradients, alone, strict=True)):
        cosine = float(torch.nn.functional.cosine_similarity(gradient.double(), single.double(), dim=0))
        if cosine < worst.cosine:
            worst = Finding(words, cosine, float(gradient.norm() / single.norm()), i)
    return worst if worst.cosine >= SAME else replace(worst, cure=cure)


def _filler(item: Mapping[str, Any]) -> dict[str, Any]:
    """A text twice as long and more, which makes the other one be padded."""
    times = 2 + 8 // len(item["input_ids"])
    return {name: _repeated(values, times) if _is_long(values) else values for name, values in item.items()}


def _is_long(values: Any) -> bool:
    return isinstance(values, list) or (isinstance(values, Tensor) and values.ndim > 0)


def _repeated(values: Any, times: int) -> Any:
    return values.repeat(times) if isinstance(values, Tensor) else values * times
