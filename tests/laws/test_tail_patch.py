"""Laws of the tail patch: a step is a step by hand, small ones are gradient dot products, the model stays as it was."""

from __future__ import annotations

import copy
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import pytorch_influence_functions as ptif
from pytorch_influence_functions.errors import InvalidInput, NonFinite, UnknownName
from pytorch_influence_functions.evaluation import tail_patch

N, Q = 12, 3


def drawn() -> tuple[nn.Module, tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """A network with dropout, in training mode, and data of three classes."""
    torch.manual_seed(0)
    x, y = torch.randn(N + Q, 4, dtype=torch.float64), torch.arange(N + Q) % 3
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Dropout(0.5), nn.Linear(5, 3)).double()
    return model.train(), (x[:N], y[:N]), (x[N:], y[N:])


def after_a_step(model: nn.Module, example: Any, query: Any, optimizer: Any, measure: Any) -> Any:
    """The measure's change by one step on a copy of the model: the definition."""
    moved = copy.deepcopy(model).eval()
    before = measure(moved(query[0]), query[1]).item()
    nn.functional.cross_entropy(moved(example[0]), example[1]).backward()
    optimizer(moved.parameters()).step()
    return measure(moved(query[0]), query[1]).item() - before


@pytest.mark.parametrize(
    "optimizer",
    [partial(torch.optim.SGD, lr=0.3), partial(torch.optim.AdamW, lr=0.01, weight_decay=0.0)],
    ids=["sgd", "adamw"],
)
@pytest.mark.parametrize("measure", [None, ptif.Margin()], ids=["loss", "margin"])
def test_it_is_one_step_on_each_example_alone_and_the_model_stays_as_it_was(optimizer: Any, measure: Any) -> None:
    model, train, queries = drawn()
    problem = ptif.Problem(model, nn.CrossEntropyLoss(), train)
    scores = torch.randn(Q, N, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    scores = ptif.Scores(scores, lower_is_better=measure is None)
    weights, rng = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    patch = tail_patch(problem, {"given": scores}, queries, k=4, optimizer=optimizer, measure=measure)
    assert model.training and all(p.grad is None and p.requires_grad for p in model.parameters())
    assert torch.equal(rng, torch.get_rng_state())
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())
    by_hand = nn.functional.cross_entropy if measure is None else lambda z, y: measure.losses(z, (None, y)).sum()
    order = scores.values.argsort(dim=1, descending=measure is None)[:, :4]
    expected = [
        [after_a_step(model, [t[[i]] for t in train], [t[[q]] for t in queries], optimizer, by_hand) for i in row]
        for q, row in enumerate(order.tolist())
    ]
    torch.testing.assert_close(patch.changes["given"], torch.tensor(expected, dtype=torch.float64))
    sign = -1.0 if measure is None else 1.0
    assert patch.gain("given").value == pytest.approx(sign * float(torch.tensor(expected).mean()), rel=1e-5)
    assert {"random", "loss", "gradient dot product"} <= set(patch.changes)


def test_small_steps_are_the_gradient_dot_product_which_is_therefore_first() -> None:
    model, train, queries = drawn()
    problem, rate = ptif.Problem(model, nn.CrossEntropyLoss(), train), 1e-5
    scores = ptif.methods.grad_dot().fit(problem).score(queries)
    patch = tail_patch(problem, {"dot": scores}, queries, k=N, optimizer=partial(torch.optim.SGD, lr=rate))
    order = scores.values.argsort(dim=1, descending=True)
    torch.testing.assert_close(patch.changes["dot"], -rate * N * scores.values.gather(1, order), rtol=1e-3, atol=1e-9)
    few = tail_patch(problem, {"dot": scores}, queries, k=2, optimizer=partial(torch.optim.SGD, lr=rate))
    assert all(few.gain("dot").value >= few.gain(name).value for name in few.changes)
    assert few.gain("dot").minus(few.gain("random")).value > 0


def test_it_says_what_it_cannot_do() -> None:
    model, train, queries = drawn()
    problem = ptif.Problem(model, nn.CrossEntropyLoss(), train)
    method = {"dot": ptif.methods.grad_dot()}
    with pytest.raises(InvalidInput, match="k=13 must be a whole number"):
        tail_patch(problem, method, queries, k=N + 1)
    with pytest.raises(InvalidInput, match=r"optimizer must be a function of parameters .* got SGD; every step"):
        tail_patch(problem, method, queries, k=1, optimizer=torch.optim.SGD(model.parameters(), lr=0.1))  # type: ignore[arg-type]
    with pytest.raises(InvalidInput, match="do not fit 3 queries and 12 training examples"):
        tail_patch(problem, {"given": torch.zeros(Q, N - 1)}, queries, k=1)
    with pytest.raises(NonFinite, match=r"After one step on training example \d+ the measure of queries"):
        tail_patch(problem, method, queries, k=1, optimizer=partial(torch.optim.SGD, lr=1e308))
    with pytest.raises(UnknownName, match=r"No method 'dots' in this tail patch\. Did you mean 'dot'"):
        tail_patch(problem, method, queries, k=1).gain("dots")
