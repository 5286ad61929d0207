"""My dataset gives texts, my model takes the batch itself, my loss returns more than the loss."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

import pytorch_influence_functions as ptif

N = 9
torch.manual_seed(0)
X, Y = torch.randn(N, 4), torch.arange(N) % 3
TEXTS = ["a b", "b c a", "c", "a c c"] * 3


class Reads(nn.Module):
    """Tokenises in forward."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 3)

    def forward(self, texts: Any) -> Tensor:
        out: Tensor = self.layer(torch.tensor([[float(text.count(letter)) for letter in "abc"] for text in texts]))
        return out


class Takes(nn.Module):
    """Takes the batch itself."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 3)

    def forward(self, batch: Any, scale: float = 2.0) -> Tensor:
        out: Tensor = self.layer(batch["x"]) * scale + batch["shift"]
        return out


class Plain(Takes):
    def forward(self, x: Tensor, shift: Tensor) -> Tensor:  # type: ignore[override]
        out: Tensor = self.layer(x) * 2 + shift
        return out


@pytest.mark.parametrize("method", ["grad_dot", "ekfac", "exact"])
def test_a_dataset_of_texts_and_labels(method: str) -> None:
    model, loss = Reads(), nn.CrossEntropyLoss()
    data = [(TEXTS[i], int(Y[i])) for i in range(N)]
    scores = ptif.attribute(model, data, data[:3], loss, method=method).values
    counts = torch.tensor([[float(text.count(letter)) for letter in "abc"] for text, _ in data])
    expected = ptif.attribute(model.layer, (counts, Y), (counts[:3], Y[:3]), loss, method=method).values
    torch.testing.assert_close(scores, expected, rtol=1e-4, atol=1e-6)
    loader = DataLoader(data, batch_size=4)  # type: ignore[arg-type]
    torch.testing.assert_close(ptif.attribute(model, loader, data[:3], loss, method=method).values, scores)


@pytest.mark.parametrize("method", ["grad_dot", "ekfac", "exact"])
@pytest.mark.parametrize("form", ["mapping", "pair"])
def test_a_model_that_takes_the_batch_itself(form: str, method: str) -> None:
    shift = torch.linspace(-1, 1, N)[:, None]
    inputs = [{"x": X[i], "shift": shift[i]} for i in range(N)]
    data: Any = (
        [row | {"labels": Y[i]} for i, row in enumerate(inputs)]
        if form == "mapping"
        else [(row, Y[i]) for i, row in enumerate(inputs)]
    )
    model, plain, loss = Takes(), Plain(), nn.CrossEntropyLoss()
    plain.load_state_dict(model.state_dict())
    scores = ptif.attribute(model, data, data[:3], loss, method=method).values
    expected = ptif.attribute(plain, (X, shift, Y), (X[:3], shift[:3], Y[:3]), loss, method=method).values
    torch.testing.assert_close(scores, expected, rtol=1e-4, atol=1e-6)
    assert ptif.what_if(ptif.Problem(model, loss, data), remove=[1], method="dual").change(data[:2]).isfinite().all()


def test_keys_that_forward_does_not_take() -> None:
    more = [{"x": X[i], "uid": torch.tensor(i), "labels": Y[i]} for i in range(N)]
    model, loss = nn.Sequential(nn.Linear(4, 3)), nn.CrossEntropyLoss()

    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = model

        def forward(self, x: Tensor) -> Any:
            return self.inner(x)

    class Wrapped(Named):
        def forward(self, **batch: Any) -> Any:  # type: ignore[override]
            return self.inner(batch["x"])

    with pytest.raises(ptif.errors.InvalidInput, match=r"argument 'uid'.*wrap the model .* forward\(self, \*\*batch\)"):
        ptif.attribute(Named(), more, more[:2], loss)
    ptif.attribute(Wrapped(), more, more[:2], loss, method="grad_dot")
    other = [{"image": X[i], "labels": Y[i]} for i in range(N)]
    with pytest.raises(ptif.errors.InvalidInput, match=r"\('image'\) are no arguments of forward, .*name the keys"):
        ptif.attribute(Named(), other, other[:2], loss)


@pytest.mark.parametrize(
    "loss", [lambda o, t: (F.cross_entropy(o, t), {}), lambda o, t: {"loss": F.cross_entropy(o, t)}]
)
def test_a_loss_that_returns_more_than_the_loss(loss: Any) -> None:
    with pytest.raises(ptif.errors.InvalidInput, match=r"The loss returned (tuple|dict), .*; return the loss alone"):
        ptif.attribute(nn.Linear(4, 3), (X, Y), (X[:2], Y[:2]), loss)
