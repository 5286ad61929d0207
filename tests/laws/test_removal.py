"""Laws of removal curves: which examples are removed, and which way is worse, follow the measure's sense."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import pytorch_influence_functions as ptif
from pytorch_influence_functions import Scores
from pytorch_influence_functions.evaluation import Recipe, Subsets, removal_curves, retrain
from pytorch_influence_functions.evaluation.removal import RemovalCurves

N, Q = 40, 4


def drawn() -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor], Recipe]:
    """Two classes in five dimensions, a tenth of the labels wrong."""
    generator = torch.Generator().manual_seed(0)
    y = torch.arange(N + Q) % 2
    x = torch.randn(N + Q, 5, generator=generator).double() + (2.0 * y[:, None] - 1) * torch.tensor([0.8, 0, 0, 0, 0])
    labels = y[:N].clone()
    labels[:4] = 1 - labels[:4]
    recipe = Recipe(
        partial(nn.Linear, 5, 2, dtype=torch.float64), partial(torch.optim.SGD, lr=0.3), epochs=30, batch_size=None
    )
    return (x[:N], labels), (x[N:], y[N:]), recipe


def scores_of(recipe: Recipe, train: Any, queries: Any, measure: Any) -> Scores:
    model = ptif.evaluation.train_model(recipe, train)
    return ptif.exact(damping=0.05).fit(ptif.Problem(model, nn.CrossEntropyLoss(), train)).score(queries, measure)


def test_harm_is_a_fall_where_higher_is_better() -> None:
    baseline = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    change = torch.tensor([[-0.5, 0.25], [-1.5, 0.25]])
    for lower_is_better, sign in ((True, 1.0), (False, -1.0)):
        curves = RemovalCurves((5,), {"a": (baseline + change)[None]}, baseline, lower_is_better, "a test", {})
        assert curves.harm("a", 5).value == pytest.approx(sign * float(change.mean()))


@pytest.mark.parametrize("measure", [None, ptif.Margin()], ids=["loss", "margin"])
def test_what_helps_most_is_removed_and_hurts_in_the_measures_own_sense(measure: Any) -> None:
    train, queries, recipe = drawn()
    scores = scores_of(recipe, train, queries, measure)
    curves = removal_curves(recipe, {"influence": scores}, (6,), 2, train=train, queries=queries, measure=measure)
    assert curves.lower_is_better is (measure is None)
    # The six whose removal is predicted to raise the loss, or to lower the margin, most: query by query.
    orders = scores.values.argsort(dim=1, descending=measure is None)[:, :6]
    truth = retrain(recipe, Subsets.groups(N, list(orders)), 2, train=train, queries=queries, measure=measure)
    own = truth.measured.diagonal(dim1=0, dim2=2)  # [seeds, queries], each after its own removal
    torch.testing.assert_close(curves.measured["influence"][0], own)
    worse = own - truth.baseline if measure is None else truth.baseline - own
    assert curves.harm("influence", 6).value == pytest.approx(float(worse.double().mean()), rel=1e-6)
    assert float(worse.mean()) > 0 and curves.harm("influence", 6).value > curves.harm("random", 6).value


def test_a_margin_and_a_loss_of_two_classes_agree_on_what_hurts() -> None:
    """The same examples are removed: of two classes the loss is a falling function of the margin."""
    train, queries, recipe = drawn()
    curves = [
        removal_curves(
            recipe, {"influence": scores_of(recipe, train, queries, measure)}, (6,), 2,
            train=train, queries=queries, measure=measure,
        )
        for measure in (None, ptif.Margin())
    ]  # fmt: skip
    losses, margins = (c.measured["influence"][0] for c in curves)
    torch.testing.assert_close(losses, F.softplus(-margins))
    assert all(c.harm("influence", 6).low > 0 for c in curves)
