"""Forward changes its module: it counts its calls, keeps features in a list, or normalises an embedding in place."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import pytorch_influence_functions as ptif

X, Y = torch.randn(12, 4, generator=torch.Generator().manual_seed(0)), torch.arange(12) % 3
WORDS = torch.arange(36).reshape(12, 3) % 9


class Keeps(nn.Module):
    """Counts, logs and caches."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.calls, self.share = nn.Linear(4, 3), 7, 0.5
        self.log: list[Tensor] = [torch.ones(1)]
        self.cache: dict[str, Any] = {"before": 1}

    def forward(self, x: Tensor) -> Tensor:
        outputs: Tensor = self.layer(x)
        self.calls += 1
        self.share *= 0.9
        self.log.append(outputs)
        self.cache["before"] = outputs
        self.cache["last"] = outputs
        self.new = [outputs]
        return outputs


class Normalised(nn.Module):
    """An embedding whose forward pass shortens long rows of its weight, in place."""

    def __init__(self, kind: type[nn.Embedding] | type[nn.EmbeddingBag]) -> None:
        super().__init__()
        self.embedding, self.head = kind(9, 4, max_norm=0.5), nn.Linear(4, 3)

    def forward(self, words: Tensor) -> Tensor:
        hidden = self.embedding(words)
        return self.head(hidden.mean(1) if hidden.dim() == 3 else hidden)


@pytest.mark.parametrize("method", [None, "grad_dot", "ekfac", "dual"])
def test_what_forward_kept_is_as_it_was(method: str | None) -> None:
    model = Keeps()
    log, cache = model.log, model.cache
    first = log[0]
    ptif.attribute(model, (X, Y), (X[:2], Y[:2]), loss=nn.CrossEntropyLoss(), method=method)
    assert (model.calls, model.share) == (7, 0.5)
    assert model.log is log and len(log) == 1 and log[0] is first
    assert model.cache is cache and cache == {"before": 1}
    assert "new" not in vars(model)


@pytest.mark.parametrize("kind", [nn.Embedding, nn.EmbeddingBag])
def test_a_weight_that_forward_normalises_is_as_it_was(kind: type[nn.Embedding]) -> None:
    model = Normalised(kind)
    before = model.embedding.weight.detach().clone()
    assert float(before.norm(dim=1).max()) > 0.5, "nothing would be normalised"
    ptif.attribute(model, (WORDS, Y), (WORDS[:2], Y[:2]), loss=nn.CrossEntropyLoss(), method="grad_dot")
    ptif.forecast(model, (WORDS, Y), (WORDS[:2], Y[:2]), loss=nn.CrossEntropyLoss())
    assert torch.equal(model.embedding.weight, before)
