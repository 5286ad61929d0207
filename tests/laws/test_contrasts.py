"""Contrasts of queries with themselves, and with others that are nearly the same: by value, against each score."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import pytorch_influence_functions as ptif
from pytorch_influence_functions.curvature import EKFAC, GGN, KFAC
from pytorch_influence_functions.scaling import RelatIF
from pytorch_influence_functions.solvers import Blockwise, Factored, Woodbury
from tests.laws.test_influence import cross_entropy, mlp, relative_gap
from tests.laws.test_questions import NAMES, fitted
from tests.oracles.autograd import example_gradients
from tests.tolerance import rounding


@pytest.mark.parametrize("name", NAMES)
def test_a_query_contrasted_with_itself_scores_0_and_the_others_what_they_did(name: str) -> None:
    attribution, (xq, yq), tolerance = fitted(name)
    each = attribution.score((xq, yq)).values.double()
    contrasted = attribution.score((xq, yq), contrast=(xq[2:3], yq[2:3]))
    assert float((contrasted.values.double() - (each - each[2])).norm()) < 2 * tolerance * float(each.norm())
    assert name == "embedding" or not bool(contrasted.values[2].any())
    assert bool(contrasted.values[[0, 1, 3]].any(1).all())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("name", ["dual", "ekfac", "factored", "blockwise", "relatif"])
def test_a_contrast_of_two_that_are_nearly_the_same_is_as_exact_as_both(name: str, dtype: torch.dtype) -> None:
    """Solvers that keep gradients in factors judge themselves by them, where the sides cancel."""
    method = {
        "dual": lambda: ptif.dual(),
        "ekfac": lambda: ptif.Influence(EKFAC(), damping=100.0),
        "factored": lambda: ptif.Influence(KFAC(), Factored()),
        "blockwise": lambda: ptif.Influence(EKFAC(), Blockwise()),
        "relatif": lambda: ptif.Influence(GGN(), Woodbury(), scaling=RelatIF()),
    }[name]()
    model, x, y, xq, yq = mlp(n=40, q=6)
    model, x, xq = model.to(dtype), x.to(dtype), xq.to(dtype)
    moves = torch.tensor([0.0, 1e-6, 1e-5, 1e-3, 1e-2, 0.1], dtype=dtype)[:, None]
    near = xq[:1] + moves * torch.ones_like(xq[:1])
    attribution = method.fit(ptif.Problem(model, nn.CrossEntropyLoss(), (x, y)))
    each = attribution.score((near, yq[:1].repeat(6))).values.double()
    contrasted = attribution.score((near, yq[:1].repeat(6)), contrast=(xq[:1], yq[:1])).values.double()
    assert float((contrasted - (each - each[0])).abs().max()) < rounding(dtype) * float(each.abs().max())
    assert not bool(contrasted[0].any()) and bool(contrasted[3:].any(1).all())


def test_the_cosine_of_a_difference_is_that_of_the_true_one_and_0_where_it_vanishes() -> None:
    model, x, y, xq, yq = mlp(n=40, q=6)
    near = torch.cat([xq[:1], xq[:1] + 1e-5, xq[1:3]])
    labels = torch.cat([yq[:1], yq[:1], yq[1:3]])
    gradients = example_gradients(model, cross_entropy, near, labels)
    differences = F.normalize(gradients[1:] - gradients[:1])
    expected = differences @ F.normalize(example_gradients(model, cross_entropy, x, y)).T / 40
    attribution = ptif.methods.grad_cos().fit(ptif.Problem(model, nn.CrossEntropyLoss(), (x, y)))
    asked = attribution.score((near, labels), contrast=(xq[:1], yq[:1]))
    assert not bool(asked.values[0].any()) and relative_gap(asked.values[1:], expected) < 1e-7
    # Groups that hold the same examples, as a weighted sum.
    gap = torch.tensor([0.5, 0.5, -0.5, -0.5], dtype=torch.float64)
    same = attribution.score((near[[0, 1, 1, 0]], labels[[0, 1, 1, 0]]), aggregate={"gap": gap}, batch_size=3)
    assert not bool(same.values.any())
