"""Law: what an error message tells people to write is not refused in its turn.

A row is a call that is refused, the advice in its message, and the calls that follow the advice. Where the message
holds code to write (`loss=...`), that very code is run.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import pytorch_influence_functions as ptif
from pytorch_influence_functions.core.errors import InfluenceError
from pytorch_influence_functions.curvature import (
    Hessian,
)
from pytorch_influence_functions.damping import Absolute
from pytorch_influence_functions.solvers import (
    Cholesky,
    Spectral,
)
from tests.interface.advice_cases import Advice, curvature, damping, influence, methods, probabilities, scored, sigmoid
from tests.interface.advice_on_runs import edits, numbers, runs, trainings
from tests.interface.advice_on_values import parts, targets
from tests.interface.bad_input_cases import (
    C,
    X,
    Y,
    ask,
    net,
    single,
    through,
)
from tests.interface.more_advice_cases import objectives, problem, solvers

SUBJECTS = (methods, influence, curvature, damping, solvers, objectives, problem, parts, targets)
ADVICE = [
    pytest.param(row, id=f"{make.__name__}: {row.name}")
    for make in (*SUBJECTS, edits, runs, numbers, trainings)
    for row in make()
]


@pytest.mark.parametrize("row", ADVICE)
@pytest.mark.filterwarnings("ignore::pytorch_influence_functions.core.errors.IncompleteSolveWarning")
@pytest.mark.filterwarnings("ignore::pytorch_influence_functions.core.errors.TrainingDataWarning")
def test_what_is_recommended_is_not_refused(row: Advice) -> None:
    with pytest.raises(InfluenceError, match=row.says):
        row.refused(row.model())
    for call in row.follow:
        call(row.model())


# --------------------------------------------------------------------------- code in a message


# Models and data whose loss cannot be told: every `loss=...` of the message is run.
TOKENS = torch.arange(12 * 3).reshape(12, 3) % 3
UNCLEAR: dict[str, tuple[Callable[[], Any], Any]] = {
    "softmax": (probabilities, Y),
    "sigmoids": (lambda: nn.Sequential(net(), nn.Sigmoid()), Y),
    "one sigmoid": (sigmoid, (Y > 0).long()),
    "near the labels": (lambda: nn.Sequential(single(), nn.Tanh()), (Y > 0).long()),
    "counts": (single, Y),
    "distributions": (net, torch.rand(12, C).softmax(1)),
    "two distributions": (probabilities, torch.rand(12, C).softmax(1)),
    "two shares": (sigmoid, torch.rand(12, 1)),
    "several flags": (net, (torch.arange(12 * C).reshape(12, C) % 2).float()),
    "several whole flags": (net, torch.arange(12 * C).reshape(12, C) % 2),
    "one-hot": (net, F.one_hot(Y, C)),
    "a column of classes": (net, Y[:, None]),
    "as many positions as classes": (through(lambda f: f[:, None].expand(-1, 3, 3) * torch.arange(1, 4)), TOKENS),
}


END = re.compile(r"[;,.] |[.;,]$| (?:if|for|or|and|to|with)\b")


def code_in(message: str) -> list[str]:
    """Every `loss=...` of a message, with balanced brackets."""
    pieces = []
    for start in (m.end() for m in re.finditer(r"\bloss=(?=[\w(])", message)):
        depth, end = 0, start
        named = re.match(r"lambda [\w, ]+:", message[start:])  # a comma there ends nothing
        end += named.end() if named else 0
        while end < len(message) and (
            depth or not re.match(r"[;,.] |[.;,]$| (?:if|for|or|and|to|with)\b", message[end:])
        ):
            depth += {"(": 1, "[": 1, ")": -1, "]": -1}.get(message[end], 0)
            end += 1
        pieces.append(message[start:end])
    return pieces


@pytest.mark.parametrize("case", UNCLEAR)
def test_every_loss_that_a_message_offers_is_taken(case: str) -> None:
    make, targets = UNCLEAR[case]
    given = {"train": (X, targets), "queries": (X[:2], targets[:2])}
    with pytest.raises(InfluenceError, match="loss=") as caught:
        ask(make(), loss=None, **given)
    codes = code_in(str(caught.value))
    assert codes, str(caught.value)
    for code in codes:
        changed = re.search(rf"{re.escape(code)} with (targets\.\w+\([-\d]*\))", str(caught.value))
        target = eval(changed[1], {"targets": targets}) if changed else targets
        loss = eval(code, {"torch": torch, "ptif": ptif})
        ask(make(), loss=loss, method="dual", train=(X, target), queries=(X[:2], target[:2]))


@pytest.mark.parametrize("solver", [Spectral(), Cholesky()], ids=repr)
def test_the_damping_that_a_message_gives_is_enough(solver: Any) -> None:
    model = net()
    with pytest.raises(InfluenceError) as caught:
        scored(curvature=Hessian(), solver=solver, damping=1e-6)(model)
    (value,) = re.findall(r"at least Absolute\(([-+.\de]+)\)", str(caught.value))
    scored(curvature=Hessian(), solver=solver, damping=Absolute(float(value)))(model)
