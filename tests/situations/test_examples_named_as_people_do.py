"""The training examples of an edit, named by whatever the data program gave: sets, masks, columns of a table."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import pytorch_influence_functions as ptif

Y = torch.arange(24) % 3
X = torch.randn(24, 1, 6, 6, generator=torch.Generator().manual_seed(0)) + 0.5 * Y[:, None, None, None]


def problem() -> ptif.Problem:
    """After a training loop: in training mode, with batch normalisation, and the loop's own shuffling loader."""
    torch.manual_seed(0)
    loader = DataLoader(TensorDataset(X, Y), batch_size=8, shuffle=True)
    layers = [nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(64, 3)]
    model = nn.Sequential(*layers)
    optimizer = torch.optim.Adam(model.parameters(), 0.01)
    for x, y in loader:
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
    return ptif.Problem(model, nn.CrossEntropyLoss(), loader)


TABLE = pd.DataFrame({"wrong": [i in (2, 5) for i in range(24)]})
NAMED: dict[str, Any] = {
    "set": {2, 5},
    "numpy": np.array([2, 5], dtype=np.int32),
    "numbers of numpy": [np.int64(2), np.int64(5)],
    "mask": TABLE.wrong.to_numpy(),
    "column": TABLE.wrong,
    "index": TABLE.index[TABLE.wrong],
    "range": range(2, 6, 3),
}


def test_examples_to_remove() -> None:
    fitted = ptif.Influence().fit(problem())
    expected = ptif.what_if(fitted, remove=[2, 5]).corrected[0].flat()
    for name, ids in NAMED.items():
        move = ptif.what_if(fitted, remove=ids).corrected[0].flat()
        torch.testing.assert_close(move, expected, rtol=1e-5, atol=1e-7, msg=name)
    one = ptif.what_if(fitted, remove=np.int64(2))
    torch.testing.assert_close(one.corrected[0].flat(), ptif.what_if(fitted, remove=2).corrected[0].flat())


def test_new_labels() -> None:
    fitted = ptif.Influence().fit(problem())
    expected = ptif.what_if(fitted, relabel={2: 0, 5: 1}).corrected[0].flat()
    # A column with gaps holds class numbers as real ones.
    named: list[Any] = [pd.Series({2: 0, 5: 1}), {np.int64(2): 0.0, 5: torch.tensor(1)}]
    for labels in named:
        move = ptif.what_if(fitted, relabel=labels).corrected[0].flat()
        torch.testing.assert_close(move, expected, rtol=1e-5, atol=1e-7)


def test_a_prediction_to_flip_needs_no_label() -> None:
    its_problem = problem()
    without = ptif.actions.flip_prediction(its_problem, X[:1], most=3)
    assert without.ids == ptif.actions.flip_prediction(its_problem, (X[:1], Y[:1]), most=3).ids


def test_a_statistic_that_left_torch() -> None:
    with pytest.raises(ptif.InfluenceError, match=r"The statistic gave float.*without \.item\(\), float\(\) or numpy"):
        ptif.actions.smallest_removal(problem(), lambda model: model(X[:1])[0, 0].item(), most=3)
