"""Models of many kinds, asked as one first would: right gradients, and the diagnostics say what was taken for what."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import pytorch_influence_functions as ptif
from tests.laws.pictures import differences, picture
from tests.tolerance import gap, rounding

N, QUERIES = 12, 2


class LastState(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table, self.rnn, self.head = nn.Embedding(9, 4), nn.LSTM(4, 4, batch_first=True), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Any:
        return 5 * self.head(self.rnn(self.table(x))[0][:, -1])


class Encoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table, self.head = nn.Embedding(9, 4), nn.Linear(4, 3)
        self.encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(4, 2, 8, batch_first=True), 1)

    def forward(self, x: Tensor) -> Any:
        return 5 * self.head(self.encoder(self.table(x)).mean(1))


class Siamese(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))

    def forward(self, a: Tensor, b: Tensor) -> Any:
        return (self.body(a) * self.body(b)).sum(1)


class OwnLoss(nn.Module):
    """As the models of Hugging Face: labels in, loss and logits out."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(4, 3)

    def forward(self, x: Tensor, labels: Tensor | None = None) -> Any:
        logits = self.body(x)
        return {"loss": None if labels is None else F.cross_entropy(logits, labels), "logits": logits}


def cross_entropy(f: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(f, y)


def squares(f: Tensor, y: Tensor) -> Tensor:
    """Without the mean over several outputs, as an inferred loss is."""
    return (f.flatten() - y.flatten()).square().sum() / 2


def flags(f: Tensor, y: Tensor) -> Tensor:
    return F.binary_cross_entropy_with_logits(f, y)


class Case(NamedTuple):
    make: Callable[[], nn.Module]
    data: tuple[Tensor, ...]
    true: Callable[[Tensor, Tensor], Tensor]
    objective: str
    loss: Any = None


G = torch.Generator().manual_seed(0)


def randn(*shape: int) -> Tensor:
    return torch.randn(N + QUERIES, *shape, generator=G).double()


Y = torch.arange(N + QUERIES) % 3
TOKENS = torch.randint(9, (N + QUERIES, 5), generator=G)
X, IMAGES, MASKS = randn(4), randn(1, 4, 4), torch.randint(3, (N + QUERIES, 4, 4), generator=G)
FLAGS, NUMBERS = (randn(3) > 0).double(), randn()
INFERRED, GIVEN = "inferred from outputs and targets", "given"

CASES = {
    "pictures": Case(
        lambda: nn.Sequential(nn.Conv2d(1, 2, 2), nn.BatchNorm2d(2), nn.ReLU(), nn.Flatten(), nn.Linear(18, 3)),
        (IMAGES, Y), cross_entropy, "CrossEntropy()",
    ),
    "LSTM": Case(LastState, (TOKENS, Y), cross_entropy, "CrossEntropy()"),
    "transformer": Case(Encoder, (TOKENS, Y), cross_entropy, "CrossEntropy()"),
    "bag of words": Case(
        lambda: nn.Sequential(nn.EmbeddingBag(9, 4), nn.Linear(4, 3)), (TOKENS, Y), cross_entropy, "CrossEntropy()"
    ),
    "table, numbers": Case(
        lambda: nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 1)), (X, NUMBERS), squares, "SquaredError()"
    ),
    "several labels": Case(
        lambda: nn.Linear(4, 3), (X, FLAGS), flags, "Bernoulli(average=True)", nn.BCEWithLogitsLoss()
    ),
    "segmentation": Case(lambda: nn.Conv2d(1, 3, 3, padding=1), (IMAGES, MASKS), cross_entropy, "CrossEntropy()"),
    "autoencoder": Case(lambda: nn.Sequential(nn.Linear(4, 2), nn.Linear(2, 4)), (X, X), squares, "SquaredError()"),
    "pairs": Case(Siamese, (X, X.flip(0), NUMBERS), squares, "SquaredError()"),
    "its own loss": Case(OwnLoss, (X, Y), cross_entropy, "CrossEntropy()"),
}  # fmt: skip


def gradients(model: nn.Module, case: Case, ids: range) -> Tensor:
    """One example at a time, by autograd, in eval mode."""
    rows = []
    for i in ids:
        *inputs, target = (column[i : i + 1] for column in case.data)
        outputs: Any = model(*inputs)
        outputs = outputs["logits"] if isinstance(outputs, dict) else outputs
        parts = torch.autograd.grad(case.true(outputs, target), list(model.parameters()))
        rows.append(torch.cat([part.flatten() for part in parts]))
    return torch.stack(rows)


@pytest.mark.parametrize("name", CASES)
def test_the_first_call_is_right_and_says_what_it_took(name: str) -> None:
    torch.manual_seed(1)
    case = CASES[name]
    model = case.make().double().eval()
    g, q = gradients(model, case, range(N)), gradients(model, case, range(N, N + QUERIES))
    model.train()
    train, queries = (tuple(column[part] for column in case.data) for part in (slice(N), slice(N, None)))
    before = picture(model, train, queries)
    scores = ptif.attribute(model, train, queries, loss=case.loss, method="grad_dot")
    assert differences(before, picture(model, train, queries)) == []
    dot = q @ g.T / N
    constant = float((scores.values * dot).sum() / dot.square().sum())  # an inferred loss may be half of the squares
    assert constant in (pytest.approx(1.0), pytest.approx(2.0))
    assert gap(scores.values, constant * dot) < rounding(torch.float64, 1e3)

    d = scores.diagnostics
    total = sum(p.numel() for p in model.parameters())
    assert (d.objective, d.inferred, d.n_train) == (case.objective, case.loss is None, N)
    assert (d.parameters_used, d.parameters_total) == (total, total)
    checks = {check.name: check for check in d.checks()}
    source = INFERRED if case.loss is None else GIVEN
    assert checks["loss"].text == f"{case.objective} ({source}), mean of per-example losses; N = {N} examples"
    assert checks["parameters"].text.startswith(f"{total} of {total} took part")
    assert checks["data"].text == "an example reads the same twice"


def test_how_a_loader_was_read_stands_beside_the_loss() -> None:
    sampler = torch.utils.data.SubsetRandomSampler(range(0, N, 2))
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(X[:N], Y[:N]), 3, sampler=sampler)
    model = nn.Linear(4, 3).double()
    model.bias.requires_grad_(False)
    d = ptif.attribute(model, loader, (X[N:], Y[N:])).diagnostics
    checks = {check.name: check.text for check in d.checks()}
    assert checks["loss"].endswith(f"N = {N // 2} examples")
    assert "SubsetRandomSampler" in checks["data"] and f"{N // 2} of {N}" in checks["data"]
    assert checks["parameters"].startswith("12 of 15 took part")


class Forces(nn.Module):
    """An energy whose slope in the positions is what was trained, as in models of molecules."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.energy, self.way = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 1)), way

    def forward(self, x: Tensor) -> Any:
        if self.way == "torch.func":
            return torch.func.vmap(torch.func.grad(lambda z: self.energy(z).sum()))(x)
        with nullcontext() if self.way == "plain" else torch.enable_grad():
            x = x.detach().requires_grad_(True)
            return torch.autograd.grad(self.energy(x).sum(), x, create_graph=True)[0]


def test_forces_are_right_however_forward_differentiates() -> None:
    train, queries = (X[:N], X[:N].flip(1)), (X[N:], X[N:].flip(1))
    torch.manual_seed(1)
    plain = Forces("plain").double()
    rows = []
    for i in range(N + QUERIES):
        loss = (plain(X[i : i + 1]) - X[i : i + 1].flip(1)).square().mean()
        parts = torch.autograd.grad(loss, list(plain.parameters()), allow_unused=True)
        rows.append(torch.cat([torch.zeros(1) if part is None else part.flatten() for part in parts]))
    g = torch.stack(rows)
    for way in ("plain", "enable_grad", "torch.func"):
        plain.way = way
        scores = ptif.attribute(plain, train, queries, loss=nn.MSELoss(), method="grad_dot")
        assert gap(scores.values, g[N:] @ g[:N].T / N) < rounding(torch.float64, 1e3)


def test_the_loss_may_follow_the_queries() -> None:
    model, data = nn.Linear(4, 3), (torch.randn(12, 4), torch.arange(12) % 3)
    queries = (data[0][:2], data[1][:2])
    scores = ptif.attribute(model, data, queries, nn.CrossEntropyLoss())
    torch.testing.assert_close(scores.values, ptif.attribute(model, data, queries, loss=nn.CrossEntropyLoss()).values)
    assert ptif.forecast(model, data, queries, nn.CrossEntropyLoss()).passes > 0
