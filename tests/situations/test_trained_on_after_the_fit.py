"""A program that fits, trains on, and asks: what was computed at the old weights is not mixed with the new ones."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import pytorch_influence_functions as ptif
from pytorch_influence_functions.actions import what_if
from pytorch_influence_functions.core.errors import InvalidInput

X, Y = torch.randn(24, 4, generator=torch.Generator().manual_seed(0)), torch.arange(24) % 3
TRAIN, QUERIES, LOSS = (X, Y), (X[:2], Y[:2]), nn.CrossEntropyLoss()


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))


def step(model: nn.Sequential) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    LOSS(model(X), Y).backward()
    optimizer.step()
    optimizer.zero_grad()


def through_data(model: nn.Sequential) -> None:
    model[0].weight.data[0, 0] += 1e-3


def another_layer(model: nn.Sequential) -> None:
    model[2] = nn.Linear(5, 3)


def half_precision(model: nn.Sequential) -> None:
    model.bfloat16()


CHANGES: list[Callable[[nn.Sequential], None]] = [step, through_data, another_layer, half_precision]
ASKS: dict[str, Callable[[Any], Any]] = {
    "score": lambda fitted: fitted.score(QUERIES),
    "self_influence": lambda fitted: fitted.self_influence(),
    "with_damping": lambda fitted: fitted.with_damping(0.1),
    "spectrum": lambda fitted: fitted.spectrum(),
    "what_if": lambda fitted: what_if(fitted, remove=[0]),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_fitted_method_refuses_other_weights(change: Callable[[nn.Sequential], None]) -> None:
    model = net()
    fitted = ptif.ekfac().fit(ptif.Problem(model, LOSS, TRAIN))
    change(model)
    for ask in ASKS.values():
        with pytest.raises(InvalidInput, match=r"weights have changed .* in '[02]\.\w+'.* call fit\(\) again, or load"):
            ask(fitted)


def test_what_the_refusal_advises_and_what_is_no_change() -> None:
    model = net()
    then = copy.deepcopy(model.state_dict())
    problem = ptif.Problem(model, LOSS, TRAIN)
    fitted = ptif.ekfac().fit(problem)
    scores, change = fitted.score(QUERIES).values, what_if(fitted, remove=[0])
    step(model)
    with pytest.raises(InvalidInput, match=r"ask what_if\(\) again"):
        change.model()
    with pytest.raises(InvalidInput, match=r"ask what_if\(\) again"):
        change.change(QUERIES)
    fitted.spec.fit(problem).score(QUERIES)
    model.load_state_dict(then)
    model.requires_grad_(False).train()
    model[0].weight = nn.Parameter(model[0].weight.clone())
    torch.testing.assert_close(fitted.score(QUERIES).values, scores)


def test_half_precision_weights_are_watched_though_a_copy_is_computed_with() -> None:
    model = net().bfloat16()
    fitted = ptif.ekfac().fit(ptif.Problem(model, LOSS, TRAIN))
    assert fitted.score(QUERIES).shape == (2, 24)
    through_data(model)
    model[0].weight.data.mul_(2)
    with pytest.raises(InvalidInput, match=r"weights have changed since they were fitted, in '0\.weight',"):
        fitted.score(QUERIES)


def test_an_embedding_that_shortens_its_rows_has_not_changed() -> None:
    model = nn.Sequential(nn.Embedding(6, 4, max_norm=0.5), nn.Flatten(), nn.Linear(4, 3))
    ids = torch.arange(24)[:, None] % 6
    fitted = ptif.ekfac().fit(ptif.Problem(model, LOSS, (ids, Y)))
    before = model[0].weight.detach().clone()
    scores = fitted.score((ids[:2], Y[:2])).values
    model(ids)
    assert not torch.equal(model[0].weight, before), "a forward of the user's own has shortened them"
    torch.testing.assert_close(fitted.score((ids[:2], Y[:2])).values, scores)


def test_weights_at_checkpoints_are_not_the_models() -> None:
    model, states = net(), [net().state_dict(), copy.deepcopy(net().state_dict())]
    fitted = ptif.ekfac().fit(ptif.Problem(model, LOSS, TRAIN, checkpoints=states))
    scores = fitted.score(QUERIES).values
    step(model)
    torch.testing.assert_close(fitted.score(QUERIES).values, scores)


def test_an_index_refuses_other_weights(tmp_path: Path) -> None:
    model = net()
    problem = ptif.Problem(model, LOSS, TRAIN)
    index = ptif.Index.build(problem, tmp_path / "index")
    opened = ptif.Index.open(tmp_path / "index", model, train=TRAIN)
    assert index.score(QUERIES).shape == opened.score(QUERIES).shape
    step(model)
    for asked in (index, opened):
        for options in ({}, {"top": 2, "rerank": 4}):
            with pytest.raises(InvalidInput, match=r"weights have changed .* build another index, or load"):
                asked.score(QUERIES, **options)
        with pytest.raises(InvalidInput, match=r"weights have changed .* build another index, or load"):
            asked.append(TRAIN)
    assert ptif.Index.build(problem, tmp_path / "another").score(QUERIES).shape == (2, 24)


def test_running_statistics_that_a_forward_pass_in_training_mode_moved_are_refused() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Tanh(), nn.Linear(5, 3))
    fitted = ptif.ekfac().fit(ptif.Problem(model, LOSS, TRAIN))
    assert model.training
    fitted.score(QUERIES)  # our own passes move nothing
    model.eval()(X)
    before = copy.deepcopy(model.state_dict())
    model.train()(X)
    with pytest.raises(InvalidInput, match=r"in '1.running_mean' and 1 more"):
        fitted.score(QUERIES)
    model.load_state_dict(before)
    fitted.score(QUERIES)
