"""Does a text's gradient depend on what it is batched with? Measured on the user's own model and texts."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final, final

import torch
from torch import Tensor, nn

from ..core.batches import to_device
from ..core.errors import InvalidInput
from ..core.notebook import Printable
from ..gradients.vjp import weighted_gradient
from ..linalg.space import Selection
from ..problem.model_state import derivative_safe, plain_autograd, preserved
from ..problem.problem import Problem, model_device
from .chats import is_chat
from .models import accepts_positions, find_tokenizer, is_causal, is_seq2seq, load_model
from .normalisation import token_objective
from .padding import Padding
from .problem import Reading
from .texts import Item, Texts

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
        model: a causal or masked model of transformers, or the path of its folder.
        tokenizer: its tokenizer; None: the one that lies beside the model.
        texts: some texts or chats of unequal length; two at least.
        parameters: whose gradients are compared, see `ptif.Problem`; None: all that are trainable.
        collate: your own, from items `{"input_ids", "labels"}` to a batch: it is tried too.
        most: how many texts are looked at.

    Returns:
        a `Checkup`: `print` it; `.healthy` says whether all cosines are above 0.99.

    Raises:
        InvalidInput: fewer than two texts, or texts that cannot be encoded.

    Example:
        ```python
        print(ptif.hf.doctor(model, tokenizer, ["A short text.", "A text that is quite a bit longer than the other."]))
        ```
    """
    if isinstance(model, (str, os.PathLike)):
        tokenizer = model if tokenizer is None else tokenizer
        model = load_model(model)
    if is_seq2seq(model):
        raise InvalidInput("doctor() looks at models that read one text; an encoder-decoder pads labels by itself.")
    tokenizer = find_tokenizer(model, tokenizer)
    chosen = list(texts)[: max(2, most)] if not isinstance(texts, str) and not is_chat(texts) else [texts]
    if len(chosen) < 2:
        raise InvalidInput("doctor() compares texts beside each other; give at least two, of unequal length.")
    encoded = Reading().texts(chosen, tokenizer, model)
    gradients = _Gradients.of(model, encoded, parameters)
    padding = Padding.of(model, tokenizer)
    with preserved(model, gradients.names), derivative_safe(model):
        alone = [gradients.of_text([encoded[i]], 0, padding) for i in range(len(encoded))]
        findings = [
            gradients.compare(words, make, alone, cure, neighbours)
            for words, make, cure, neighbours in _situations(model, padding, collate)
        ]
    return Checkup(tuple(findings), str(next(model.parameters()).dtype).removeprefix("torch."))


def _situations(
    model: nn.Module, padding: Padding, collate: Collate | None
) -> Iterator[tuple[str, Collate, str, bool]]:
    """(words, collate function, cure, whether other texts stand beside it rather than padding alone)."""
    places = "tell the model its tokens' places: position_ids = attention_mask.cumsum(1) - 1, as ptif.hf.problem does"
    mask = "the model does not hide padding from a text; use batches of one (batch_size=1) or texts of one length"
    mixed = "texts of a batch see each other (experts with a capacity, normalisation over the batch); use batch_size=1"
    right, left = replace(padding, side="right"), replace(padding, side="left")
    yield "padded on the right", right, mask, False
    if is_causal(model) or accepts_positions(model):
        yield "padded on the left", left, mask, False
        if accepts_positions(model):
            cure = f"pad on the right (tokenizer.padding_side = 'right'), or {places}"
            yield "padded on the left, places not told", replace(left, positions=False), cure, False
    yield "beside another text", right, mixed, True
    if collate is not None:
        yield "by your collate function", collate, f"{places}, or leave padding to ptif.hf.problem", True


@dataclass(frozen=True, eq=False)
class _Gradients:
    """Gradients of single texts of a batch."""

    problem: Problem
    texts: Texts

    @staticmethod
    def of(model: nn.Module, texts: Texts, parameters: Selection) -> _Gradients:
        made = Problem(model, token_objective(model, "sum"), texts, parameters, device=model_device(model))
        return _Gradients(made, texts)

    @property
    def names(self) -> tuple[str, ...]:
        return self.problem.space.names

    def of_text(self, items: list[Item], place: int, collate: Collate) -> Tensor:
        """The gradient of the loss of the text at a place of a batch, as one vector on the CPU."""
        made = self.problem
        batch = to_device(collate(items), made.device)
        outputs = made.objective.outputs(made.model, batch)
        loss = made.objective.losses(outputs, batch)[place]
        weights = list(made.space.values(made.model).values())
        gradients = weighted_gradient(loss, weights, torch.ones_like(loss))
        return torch.cat([gradient.flatten().float().cpu() for gradient in gradients])

    def compare(self, words: str, collate: Collate, alone: list[Tensor], cure: str, neighbours: bool) -> Finding:
        """The text that a situation changes most."""
        count, worst = len(self.texts), Finding(words, 2.0, 1.0, 0)
        longest = max(range(count), key=lambda i: len(self.texts[i]["input_ids"]))
        for i in range(count):
            beside = self.texts[longest if i != longest else (i + 1) % count]
            if not neighbours:
                beside = _filler(self.texts[i])
            gradient = self.of_text([self.texts[i], beside], 0, collate)
            cosine = float(torch.nn.functional.cosine_similarity(gradient.double(), alone[i].double(), dim=0))
            if cosine < worst.cosine:
                worst = Finding(words, cosine, float(gradient.norm() / alone[i].norm()), i)
        return worst if worst.cosine >= SAME else replace(worst, cure=cure)


def _filler(item: Item) -> Item:
    """A text twice as long and more, which makes the other one be padded."""
    times = 2 + 8 // len(item["input_ids"])
    return {name: values.repeat(times) for name, values in item.items()}
