"""Frames whose columns stand in another order than the training data's: columns go together by name."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import pytorch_influence_functions as ptif

pd = pytest.importorskip("pandas")

torch.manual_seed(0)
N, NAMES = 20, list("abcde")
X, Y = torch.randn(N, 5), torch.arange(N) % 3
MODEL, LOSS = nn.Linear(5, 3), nn.CrossEntropyLoss()
FRAME, LABELS = pd.DataFrame(X.numpy(), columns=NAMES), pd.Series(Y.numpy())
# What is asked, in training order as arrays, and as frames with the columns turned around.
PLAIN, TURNED = (X[:3], Y[:3]), (FRAME[NAMES[::-1]][:3], LABELS[:3])
OTHER, OTHER_TURNED = (X[5:8], Y[5:8]), (FRAME[NAMES[::-1]][5:8], LABELS[5:8])


def problem(frames: bool) -> ptif.Problem:
    return ptif.Problem(MODEL, LOSS, (FRAME, LABELS) if frames else (X, Y))


def indexed(frames: bool, folder: Path) -> Tensor:
    where = folder / str(frames)
    ptif.Index.build(problem(frames), where, method="grad_dot")
    index = ptif.Index.open(where, problem(frames)).append(OTHER_TURNED if frames else OTHER)
    del index
    # Opened by the model alone: the index knows the columns.
    return ptif.Index.open(where, MODEL, LOSS).score(TURNED if frames else PLAIN).values


CALLS: dict[str, Callable[[bool, Path], Tensor]] = {
    "queries": lambda frames, folder: (
        ptif.attribute(
            MODEL, (FRAME, LABELS) if frames else (X, Y), TURNED if frames else PLAIN, LOSS, method="grad_dot"
        ).values
    ),
    "mapping": lambda frames, folder: (
        ptif.attribute(
            MODEL,
            {"input": FRAME, "labels": LABELS} if frames else {"input": X, "labels": Y},
            {"input": TURNED[0], "labels": TURNED[1]} if frames else {"input": PLAIN[0], "labels": PLAIN[1]},
            LOSS,
            method="grad_dot",
        ).values
    ),
    "contrast of a problem": lambda frames, folder: (
        ptif.attribute(
            problem(frames),
            queries=TURNED if frames else PLAIN,
            contrast=OTHER_TURNED if frames else OTHER,
            method="grad_dot",
        ).values
    ),
    "contrast": lambda frames, folder: (
        ptif.methods.grad_dot()
        .fit(problem(frames))
        .score(TURNED if frames else PLAIN, contrast=OTHER_TURNED if frames else OTHER)
        .values
    ),
    "added": lambda frames, folder: ptif.what_if(
        problem(frames), add=OTHER_TURNED if frames else OTHER, method="dual"
    ).change(TURNED if frames else PLAIN),
    "replaced": lambda frames, folder: ptif.what_if(
        problem(frames), replace={3: OTHER_TURNED[0].iloc[0] if frames else OTHER[0][0]}, method="dual"
    ).change(PLAIN),
    "index": indexed,
}


@pytest.mark.parametrize("name", CALLS)
def test_columns_in_another_order_are_read_by_name(name: str, tmp_path: Path) -> None:
    call = CALLS[name]
    torch.testing.assert_close(call(True, tmp_path), call(False, tmp_path), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("frame", "message"),
    [
        (FRAME[NAMES[:4]], r"array 0 lacks 'e', and columns go together by name with those of the training data \('a'"),
        (FRAME.rename(columns={"a": "z"}), r"array 0 lacks 'a' and has 'z' besides, .*or pass frame.to_numpy\(\)"),
        (FRAME[[*NAMES, "a"]], "array 0 has a name twice"),
    ],
)
def test_other_columns_are_refused(frame: Any, message: str) -> None:
    with pytest.raises(ptif.errors.InvalidInput, match=message):
        ptif.attribute(MODEL, (FRAME, LABELS), (frame[:3], LABELS[:3]), LOSS, method="grad_dot")
    with pytest.raises(ptif.errors.InvalidInput, match=r"The new input lacks 'a'.*or pass row.to_numpy\(\)"):
        ptif.what_if(problem(True), replace={3: FRAME.rename(columns={"a": "z"}).iloc[0]})


def test_what_has_no_names_is_read_by_place() -> None:
    expected = CALLS["queries"](False, Path())
    for frame in (pd.DataFrame(X.numpy()[:3]), FRAME[:3].to_numpy(), np.asarray(X[:3])):
        scores = ptif.attribute(MODEL, (FRAME, LABELS), (frame, Y[:3]), LOSS, method="grad_dot")
        torch.testing.assert_close(scores.values, expected)
    renamed = FRAME.rename(columns={"a": "z"})[:3].to_numpy()  # what the refusal recommends
    scores = ptif.attribute(MODEL, (FRAME, LABELS), (renamed, Y[:3]), LOSS, method="grad_dot")
    torch.testing.assert_close(scores.values, expected)
