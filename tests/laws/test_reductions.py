"""Mean, sum or none: whatever a loss does to a batch, the losses of its examples are the same."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from pytorch_influence_functions.objectives import FromFunction
from pytorch_influence_functions.objectives.convert import as_objective
from pytorch_influence_functions.objectives.measures import detect_reduction


def randn(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def close(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


REDUCTIONS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "none": lambda f, y: (f - y).abs().mean(1),
    "mean": lambda f, y: (f - y).abs().mean(),
    "sum": lambda f, y: (f - y).abs().mean(1).sum(),
}


@settings(max_examples=30)
@given(st.sampled_from(sorted(REDUCTIONS)), st.integers(1, 5), st.integers(0, 2**31))
def test_every_reduction_gives_the_same_losses(reduction: str, n: int, seed: int) -> None:
    torch.manual_seed(seed)
    f, y = randn(n, 3), randn(n, 3)
    made = as_objective(REDUCTIONS[reduction])
    assert isinstance(made, FromFunction)
    resolved = made.resolved(f, y)
    if n > 1:
        assert resolved.reduction == reduction
    for objective in (made, resolved):
        close(objective.losses(f, (None, y)), REDUCTIONS["none"](f, y))


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@pytest.mark.parametrize(
    "kind", [nn.CrossEntropyLoss, nn.NLLLoss, nn.MSELoss, nn.BCEWithLogitsLoss, nn.L1Loss, nn.HuberLoss]
)
def test_every_module_reduction_is_read_as_per_example(kind: type[nn.Module], reduction: str) -> None:
    discrete = kind in (nn.CrossEntropyLoss, nn.NLLLoss)
    f = randn(4, 3).log_softmax(1) if discrete else randn(4, 1)
    y = torch.randint(3, (4,)) if discrete else torch.rand(4, 1, dtype=torch.float64)
    expected = kind(reduction="none")(f, y).reshape(-1)
    objective = as_objective(kind(reduction=reduction))
    if isinstance(objective, FromFunction):
        objective = objective.resolved(f, y)
    close(objective.losses(f, (None, y)), expected)


def test_an_unreduced_loss_of_many_outputs_is_averaged() -> None:
    f, y = randn(4, 3), randn(4, 3)
    for loss in (nn.SmoothL1Loss(reduction="none"), nn.SmoothL1Loss()):
        made = as_objective(loss)
        assert isinstance(made, FromFunction)
        close(made.resolved(f, y).losses(f, (None, y)), F.smooth_l1_loss(f, y, reduction="none").mean(1))
    assert loss.reduction == "mean"


def test_functions_that_cannot_be_vectorised_are_looped() -> None:
    def branching(f: Tensor, y: Tensor) -> Tensor:
        return (f - y).abs().sum() if float((f - y).sum()) > 0 else 2 * (f - y).abs().sum()

    f, y = randn(6), randn(6)
    expected = (f - y).abs() * torch.where(f > y, 1, 2)
    close(FromFunction(branching).losses(f, (None, y)), expected)


def test_reduction_of_losses_that_are_zero_or_cancel_is_called_mean() -> None:
    zero = torch.zeros(2)
    assert detect_reduction(lambda f, y: (f - y).sum(), zero, zero) == "mean"
    assert detect_reduction(lambda f, y: (f - y).sum(), torch.tensor([1.0, -1.0]), zero) == "mean"
    assert detect_reduction(lambda f, y: (f - y).sum(), torch.ones(1), zero[:1]) == "mean"


def test_low_precision_does_not_hide_the_reduction() -> None:
    f, y = torch.randn(2, 50).bfloat16(), torch.randn(2, 50).bfloat16()
    assert detect_reduction(F.mse_loss, f, y) == "mean"
    assert detect_reduction(nn.MSELoss(reduction="sum"), f, y) == "sum"
