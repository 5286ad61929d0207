"""Embeddings with `sparse=True`, whose gradients leave out the rows that no example names."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import pytorch_influence_functions as ptif

WORDS = torch.randint(9, (14, 3), generator=torch.Generator().manual_seed(0))
Y = torch.arange(14) % 3
CE = nn.CrossEntropyLoss()


class Text(nn.Module):
    """A table of words, by layer or by function, and a head."""

    def __init__(self, kind: type[nn.Module] | None, sparse: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table: Any = nn.Embedding(9, 4) if kind is None else kind(9, 4, sparse=sparse)
        self.head, self.by_function, self.leaves_out = nn.Linear(4, 3), kind is None, sparse

    def forward(self, words: Tensor) -> Tensor:
        by_function = self.by_function
        hidden = F.embedding(words, self.table.weight, sparse=self.leaves_out) if by_function else self.table(words)
        outputs: Tensor = self.head(hidden.mean(1) if hidden.dim() == 3 else hidden)
        return outputs


@pytest.mark.parametrize("kind", [nn.Embedding, nn.EmbeddingBag, None])
@pytest.mark.parametrize("method", ["ekfac", "dual", "grad_dot"])
def test_scores_are_those_of_the_dense_layer(method: str, kind: type[nn.Module] | None) -> None:
    dense, sparse = (
        ptif.attribute(Text(kind, flag), (WORDS, Y), (WORDS[:2], Y[:2]), loss=CE, method=method).values
        for flag in (False, True)
    )
    assert float(dense.abs().max()) > 0
    torch.testing.assert_close(sparse, dense, rtol=1e-3, atol=1e-4 * float(dense.abs().max()))


def test_the_flag_stays_as_it_was() -> None:
    model = Text(nn.Embedding, sparse=True)
    ptif.forecast(model, (WORDS, Y), (WORDS[:2], Y[:2]), loss=CE)
    assert model.table.sparse is True
