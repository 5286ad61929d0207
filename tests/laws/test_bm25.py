"""BM25 is its formula, written out word by word; features of padded texts do not depend on the padding."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

import pytorch_influence_functions as ptif
from pytorch_influence_functions.core.errors import InvalidInput
from pytorch_influence_functions.methods import BM25, EmbeddingSimilarity

TEXTS = ["the cat sat on the mat", "a dog, a DOG and the cat", "moon", "the the the"]
QUERIES = ["The dog and the moon", "nothing here"]


def formula(query: list[str], texts: list[list[str]], i: int, k1: float, b: float) -> float:
    n, mean = len(texts), sum(map(len, texts)) / len(texts)
    total = 0.0
    for word in query:
        has = sum(word in text for text in texts)
        count = texts[i].count(word)
        rarity = math.log(1 + (n - has + 0.5) / (has + 0.5))
        total += rarity * count * (k1 + 1) / (count + k1 * (1 - b + b * len(texts[i]) / mean))
    return total


@pytest.mark.parametrize(("k1", "b"), [(1.5, 0.75), (0.9, 0.0)])
def test_it_is_the_formula_on_words_in_lower_case(k1: float, b: float) -> None:
    class Words(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.zeros(1))

    problem = ptif.Problem(Words(), ptif.CrossEntropy(), [(text, 0) for text in TEXTS])
    scores = BM25(k1, b).fit(problem)
    words = [text.lower().replace(",", "").split() for text in TEXTS]
    values = scores.spec.values(problem, ptif.Problem(Words(), ptif.CrossEntropy(), [(q, 0) for q in QUERIES]).data)
    for q, query in enumerate(QUERIES):
        for i in range(len(TEXTS)):
            assert float(values[q, i]) == pytest.approx(formula(query.lower().split(), words, i, k1, b), rel=1e-5)
    own = scores.self_influence()
    assert [float(x) for x in own] == pytest.approx([formula(words[i], words, i, k1, b) for i in range(4)], rel=1e-5)


def test_examples_without_words_are_refused_and_numbers_checked() -> None:
    problem = ptif.Problem(nn.Linear(3, 2), ptif.CrossEntropy(), (torch.randn(4, 3), torch.zeros(4).long()))
    with pytest.raises(InvalidInput, match="holds no text"):
        BM25().fit(problem).score((torch.randn(2, 3), torch.zeros(2).long()))
    with pytest.raises(InvalidInput, match=r"BM25\(b=2\) must be a number from 0.0 to 1.0"):
        BM25(b=2)
    with pytest.raises(InvalidInput, match=r"BM25\(k1=-1\) must be a finite number of at least 0"):
        BM25(k1=-1)


class Tokens(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(7, 4), nn.Linear(4, 7)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        return self.head(torch.tanh(self.embed(input_ids)))


def test_padding_is_no_feature_of_a_text() -> None:
    torch.manual_seed(0)
    model = Tokens().double()
    ids, lengths = torch.randint(1, 7, (5, 6)), [6, 3, 4, 2, 5]

    def data(width: int) -> list[dict[str, Tensor]]:
        rows = []
        for row, length in zip(ids, lengths, strict=True):
            mask = (torch.arange(width) < length).long()
            text = torch.nn.functional.pad(row, (0, width - 6))
            rows.append({"input_ids": text * mask, "attention_mask": mask})
        return rows

    def similarity(width: int) -> Tensor:
        problem = ptif.Problem(model, ptif.TokenCrossEntropy(shift=True), data(width))
        return EmbeddingSimilarity().fit(problem).score(data(width)[:2]).values

    torch.testing.assert_close(similarity(6), similarity(9), rtol=1e-5, atol=1e-6)
