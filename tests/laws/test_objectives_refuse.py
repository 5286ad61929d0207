"""Objectives: what cannot be meant is refused, in one sentence that names indices and the way out."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pytorch_influence_functions.core.errors import InvalidInput, NonFinite
from pytorch_influence_functions.objectives import (
    AbstractObjective,
    Bernoulli,
    CrossEntropy,
    FromFunction,
    Logit,
    Margin,
    SquaredError,
    TokenCrossEntropy,
)
from pytorch_influence_functions.objectives.base import inputs_and_targets
from pytorch_influence_functions.objectives.convert import as_objective
from pytorch_influence_functions.objectives.measures import detect_reduction


def randn(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


IDS = torch.tensor([10, 11, 12])
F3 = torch.zeros(3, 4)
Y3 = torch.tensor([0, 1, 2])
NAN = float("nan")


def checks(objective: AbstractObjective, outputs: Tensor, targets: Any) -> Callable[[], Any]:
    return lambda: objective.check(outputs, (None, targets), IDS)


ERRORS: list[tuple[Callable[[], Any], str]] = [
    # batches and models
    (lambda: inputs_and_targets(F3), "type Tensor has no target; expected \\(inputs, target\\)"),
    (lambda: inputs_and_targets((F3,)), "of 1 member has no target"),
    (lambda: inputs_and_targets({"x": F3}), "keys 'x' has no target; expected it under 'labels' or 'label'"),
    (lambda: CrossEntropy().outputs(lambda x: None, (F3, Y3)), "model returned NoneType, expected a tensor"),
    (lambda: Margin().outputs(lambda x: ("a",), (F3, Y3)), "model returned tuple, expected a tensor"),
    (lambda: Logit().losses(F3, (None, [0, 1, 2])), "targets are of type list, expected a tensor"),
    (checks(CrossEntropy(), F3, [0, 1, 2]), "targets are of type list"),
    (checks(CrossEntropy(), F3[:2], Y3), "outputs of shape \\(2, 4\\) for 3 examples"),
    (checks(CrossEntropy(), F3.long(), Y3), "outputs of type torch.int64, expected floating point"),
    (checks(CrossEntropy(), F3, Y3[:2]), "targets have shape \\(2,\\) for 3 examples .*10, 11, 12"),
    (checks(CrossEntropy(), F3, Y3.to("meta")), "targets lie on meta and the outputs on cpu"),
    (checks(FromFunction(F.l1_loss), F3[:1], {"y": Y3}), "outputs of shape \\(1, 4\\) for 3 examples"),
    # classes
    (
        checks(CrossEntropy(), F3, Y3 + 2),
        "Label 4 at dataset index 12 is out of range: the model has 4 classes",
    ),
    (checks(CrossEntropy(), F3, Y3 - 2), "Label -2 at dataset indices 10, 11 is out of range.*0..3"),
    (checks(CrossEntropy(), F3, Y3.float()), "class numbers must be integers, .*\\.long\\(\\)"),
    (checks(CrossEntropy(), F3, F3.long()), "one-hot targets must be floating point"),
    (checks(CrossEntropy(), F3, Y3[:, None]), "remove the last axis of the targets"),
    (checks(CrossEntropy(), torch.zeros(3, 5, 4), torch.zeros(3, 5).long()), "use TokenCrossEntropy\\(\\)"),
    (
        checks(CrossEntropy(label_smoothing=0.1), torch.zeros(3, 5, 4), torch.zeros(3, 5).long()),
        "use TokenCrossEntropy\\(label_smoothing=0.1\\)",
    ),
    (
        lambda: TokenCrossEntropy(label_smoothing=-1),
        "^TokenCrossEntropy\\(label_smoothing=-1\\) must be a",
    ),
    (checks(CrossEntropy(), F3, torch.zeros(3, 2)), "expected class numbers of shape \\(3,\\)"),
    (checks(CrossEntropy(), F3[:, :1], Y3), "two classes or more; for one logit .*use Bernoulli"),
    (checks(CrossEntropy(), F3[:, 0], Y3), "got outputs of shape \\(3,\\), expected \\[n, C\\]"),
    (checks(CrossEntropy(), F3, F3 - 1), "target probabilities at dataset indices 10, 11, 12 are negative"),
    (checks(CrossEntropy(torch.ones(2)), F3, Y3), "There are 2 class weights and 4 classes"),
    (checks(as_objective(nn.NLLLoss()), F3, Y3), "not log-probabilities, which NLLLoss .*log_softmax"),
    (lambda: CrossEntropy(torch.ones(2, 2)), "class weights have shape \\(2, 2\\), expected \\[C\\]"),
    (lambda: CrossEntropy(-torch.ones(2)), "class weight is negative or not finite"),
    (lambda: CrossEntropy(label_smoothing=2.0), "^CrossEntropy\\(label_smoothing=2.0\\) must be a number from 0 to 1"),
    # tokens
    (checks(TokenCrossEntropy(), F3, Y3), "outputs of shape \\(3, 4\\), expected \\[n, T, C\\]"),
    (checks(TokenCrossEntropy(), torch.zeros(3, 2, 4), Y3), "expected integers of shape \\(3, 2\\)"),
    (checks(TokenCrossEntropy(), torch.zeros(3, 2, 4), torch.full((3, 2), 4)), "Label 4 at .* out of range"),
    (
        checks(TokenCrossEntropy(), torch.zeros(3, 1, 4), torch.tensor([[0], [-100], [1]])),
        "sequences at dataset index 11 have no token to predict \\(all are ignore_index=-100\\)",
    ),
    (
        checks(TokenCrossEntropy(shift=True), torch.zeros(3, 1, 4), torch.zeros(3, 1).long()),
        "no token to predict .*after the shift",
    ),
    # real numbers, yes or no
    (checks(SquaredError(), F3, Y3), "expected as many numbers .*use CrossEntropy"),
    (checks(SquaredError(), torch.zeros(3, 2, 5), torch.zeros(3, 5, 2)), "in the same order"),
    (checks(Bernoulli(), F3[:, :2], Y3), "Bernoulli\\(\\) got targets of shape \\(3,\\) for .*\\(3, 2\\)"),
    (checks(Bernoulli(), F3[:, 0], Y3), "Target 2 at dataset index 12 is not from 0 to 1"),
    (checks(Bernoulli(), F3[:, 0], torch.tensor([0.0, NAN, 1.0])), "Target nan at dataset index 11"),
    (checks(Bernoulli(torch.ones(3)), F3, F3), "weight of shape \\(3,\\) does not fit outputs"),
    (lambda: Bernoulli(pos_weight=-1.0), "positive weight is negative or not finite"),
    (
        lambda: (b := Bernoulli(from_probabilities=True)).check(
            b.outputs(lambda x: x, (Y3 * 1.0, Y3)), (None, Y3), IDS
        ),
        "outputs at dataset index 12 are not probabilities",
    ),
    # measures
    (checks(Margin(), F3, Y3 + 2), "Label 4 at dataset index 12 is out of range"),
    (checks(Margin(), torch.zeros(3, 2, 4), torch.zeros(3, 2)), "Margin.*for tokens or dense outputs"),
    (checks(Logit(), F3, F3), "Logit\\(\\) got targets of shape \\(3, 4\\).*one class number per example"),
    (checks(Logit(), F3, Y3.float()), "integer class numbers; convert"),
    (checks(Margin(), F3[:, 0], torch.tensor([0.5, 0.0, 1.0])), "soft targets for one logit"),
    (checks(Margin(), F3[:, 0], Y3), "Label 2 at dataset index 12 is out of range: the model has 2 classes"),
    # what is no objective
    (lambda: as_objective(None), "loss is None of type NoneType; expected an objective"),
    (lambda: as_objective("cross_entropy"), "loss is 'cross_entropy' of type str"),
    (lambda: as_objective(nn.MSELoss), "loss is the class MSELoss; pass an instance, MSELoss\\(...\\)"),
    (lambda: as_objective(Margin), "pass an instance, Margin"),
    (lambda: as_objective(int), "loss is the class int; pass a loss"),
    (lambda: FromFunction(3), "needs a function of \\(outputs, targets\\), got int"),
    (
        lambda: FromFunction(abs, reduction="max"),
        "^FromFunction\\(reduction='max'\\) must be 'none', 'mean', 'sum' or None; None finds it out",
    ),
]


@pytest.mark.parametrize(("act", "message"), ERRORS, ids=[m[:40] for _, m in ERRORS])
def test_refused_in_words(act: Callable[[], Any], message: str) -> None:
    with pytest.raises(InvalidInput, match=message):
        act()


def token_mean(f: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(f.flatten(0, 1), y.flatten())


FUNCTION_ERRORS: list[tuple[Any, str]] = [
    (token_mean, "token_mean of two examples is neither .*together .*apart .* and .*TokenCrossEntropy"),
    (lambda f, y: f.sum().pow(2), "neither the mean nor the sum"),
    (lambda f, y: f.sum((1, 2)) - f.mean(), "neither the mean nor the sum"),
    (lambda f, y: f, "returned shape \\(1, 3, 4\\), expected one number, or one per example"),
    (lambda f, y: f.sum().item(), "returned float, expected a tensor .*leave out .item"),
    (lambda f, y: f.sum((1, 2)).detach(), "no derivative in the model's outputs"),
    (lambda f, y: (f.argmax(-1) != y).sum(), "no derivative in the model's outputs"),
    (lambda f, y: f.detach().sum(), "no derivative in the model's outputs"),
    (lambda f: f, "failed on outputs of shape \\(2, 3, 4\\) and targets of shape \\(2, 3\\)"),
    (nn.GaussianNLLLoss(), "The loss GaussianNLLLoss failed on outputs"),
]


@pytest.mark.parametrize(("function", "message"), FUNCTION_ERRORS, ids=[m[:30] for _, m in FUNCTION_ERRORS])
def test_functions_refused_in_words(function: Any, message: str) -> None:
    f, y = randn(2, 3, 4), torch.tensor([[0, 1, 2], [3, -100, -100]])
    with pytest.raises(InvalidInput, match=message):
        as_objective(function).resolved(f, y)


def test_a_loss_that_is_nan_is_named() -> None:
    with pytest.raises(NonFinite, match=r"NaN or infinite on the first two examples \(together nan; apart nan"):
        detect_reduction(lambda f, y: f.log().sum(), torch.tensor([-1.0, 1.0]), torch.zeros(2))


def test_a_declared_reduction_is_held_to() -> None:
    f, y = randn(3, 2), randn(3, 2)
    with pytest.raises(InvalidInput, match=r"reduction 'none' returned shape \(\) for 3 examples"):
        FromFunction(F.l1_loss, reduction="none").losses(f, (None, y))
    with pytest.raises(InvalidInput, match=r"returned shape \(1, 2\), expected one number"):
        FromFunction(lambda f, y: f - y, reduction="mean").losses(f, (None, y))
