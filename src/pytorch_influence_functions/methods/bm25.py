"""BM25: how many of a query's words a training text has. What a search engine would answer, without a model."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Final, final

import numpy as np
import torch
from torch import Tensor

from ..core.errors import InvalidInput
from ..core.token_text import token_text_of
from ..core.validate import finite_number
from ..problem.data import Source
from ..problem.problem import Problem
from .baselines import AbstractBaseline

_WORD: Final = re.compile(r"\w+")
_TEXT_KEYS: Final = ("text", "sentence", "content", "question", "prompt", "input", "input_ids")


@final
@dataclass(frozen=True)
class BM25(AbstractBaseline):
    r"""The words that a query and a training text share, rare ones counting more. A baseline: it asks no model.

    For the words w of a query, n(w) their number in a text of length L, f(w) the number of the N texts with it:

        sum_w  log(1 + (N - f(w) + 1/2) / (f(w) + 1/2)) * n(w) (k1 + 1) / (n(w) + k1 (1 - b + b L / mean L))

    Words are runs of letters and digits in lower case; of data that hold token numbers alone, the numbers.

    Args:
        k1: how soon further occurrences of a word stop to count.
        b: how much long texts are held back, 0 (not at all) to 1.

    Raises:
        InvalidInput: the examples hold no text.

    Reference: Robertson and Zaragoza (2009), "The Probabilistic Relevance Framework: BM25 and Beyond".

    >>> BM25()
    BM25(k1=1.5, b=0.75)
    """

    k1: float = 1.5
    b: float = 0.75

    why: ClassVar[str] = "words shared with the query, rare ones counting more"

    def __post_init__(self) -> None:
        finite_number("k1", self.k1, least=0.0, owner=self)
        finite_number("b", self.b, least=0.0, most=1.0, owner=self)

    def values(self, problem: Problem, queries: Source) -> Tensor:
        texts = [Counter(_words(problem.data, i)) for i in range(len(problem.data))]
        asked = [Counter(_words(queries, q)) for q in range(len(queries))]
        return torch.from_numpy(self.match(texts, asked)).float()

    def own_values(self, problem: Problem) -> Tensor:
        texts = [Counter(_words(problem.data, i)) for i in range(len(problem.data))]
        return torch.from_numpy(np.array([self.match(texts, [text])[0, i] for i, text in enumerate(texts)])).float()

    def match(self, texts: Sequence[Mapping[Any, int]], queries: Sequence[Mapping[Any, int]]) -> np.ndarray:
        """The formula above, [queries, texts], from the counts of words.

        Args:
            texts: of every training text word -> count.
            queries: of every query word -> count.
        """
        lengths = np.array([sum(text.values()) for text in texts], dtype=float)
        room = self.k1 * (1 - self.b + self.b * lengths / max(lengths.mean(), 1e-12))
        scores = np.zeros((len(queries), len(texts)))
        for word in set().union(*queries):
            counts = np.array([text.get(word, 0) for text in texts], dtype=float)
            rarity = np.log1p((len(texts) - (counts > 0).sum() + 0.5) / ((counts > 0).sum() + 0.5))
            share = np.divide(counts * (self.k1 + 1), counts + room, out=np.zeros_like(counts), where=counts > 0)
            for q, query in enumerate(queries):
                scores[q] += query.get(word, 0) * rarity * share
        return scores


def _words(source: Source, index: int) -> list[Any]:
    """The words of an example: of its text, or its token numbers."""
    known = token_text_of(source.dataset, index)
    if known is not None:
        return _WORD.findall(known.text.lower())
    item = source.item(index)
    first = item[0] if isinstance(item, (tuple, list)) and len(item) else item
    if isinstance(first, Mapping):
        first = next((first[key] for key in _TEXT_KEYS if key in first), None)
    if isinstance(first, str):
        return _WORD.findall(first.lower())
    if isinstance(first, Tensor) and first.ndim == 1 and not first.is_floating_point():
        numbers: list[Any] = first.tolist()
        return numbers
    raise InvalidInput(
        f"Example {index} holds no text (it is a {type(item).__name__}); BM25 compares texts or token numbers."
    )
