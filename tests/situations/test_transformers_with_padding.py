"""`nn.TransformerEncoder` with a padding mask: in eval mode torch turns its input into a nested tensor."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader

import pytorch_influence_functions as ptif
from tests.tolerance import gap, rounding


class Texts(nn.Module):
    """A classifier of padded texts, as the tutorials write it."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(9, 8, padding_idx=0)
        self.encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 12, dropout=0.1, batch_first=True), 2)
        self.head = nn.Linear(8, 2)

    def forward(self, words: Tensor) -> Tensor:
        padding = words == 0
        hidden = self.encoder(self.embedding(words), src_key_padding_mask=padding)
        hidden = hidden.masked_fill(padding[..., None], 0.0)
        return self.head(hidden.sum(1) / (~padding).sum(1, keepdim=True))


def collate(items: list[Any]) -> tuple[Tensor, Tensor]:
    return pad_sequence([words for words, _ in items], batch_first=True), torch.tensor([label for _, label in items])


TEXTS = [(torch.randint(1, 9, (2 + i % 4,), generator=torch.Generator().manual_seed(i)), i % 2) for i in range(12)]


@pytest.mark.filterwarnings("ignore:enable_nested_tensor", "ignore:The PyTorch API of nested tensors")
def test_scores_are_those_of_each_text_alone() -> None:
    model = Texts().double().train()
    train, queries = DataLoader(TEXTS, 4, True, collate_fn=collate), DataLoader(TEXTS[:3], 3, collate_fn=collate)
    scores = ptif.attribute(model, train, queries, loss=nn.CrossEntropyLoss(), method="grad_dot")
    assert model.training and torch.backends.mha.get_fastpath_enabled()
    model.eval()
    rows = []
    for item in TEXTS:
        words, label = collate([item])
        loss = F.cross_entropy(model(words), label)
        rows.append(torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(model.parameters()))]))
    gradients = torch.stack(rows)
    assert gap(scores.values, gradients[:3] @ gradients.T / 12) < rounding(torch.float64, 100)
