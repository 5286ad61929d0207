"""Bugs planted in single methods (TRAK, DataInf, scores by token): each must break its law."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from pytorch_influence_functions.curvature import EmpiricalFisher
from pytorch_influence_functions.gradients.products import Products
from pytorch_influence_functions.gradients.projections import Projector
from pytorch_influence_functions.gradients.sketches import Side
from pytorch_influence_functions.solvers import CG, DataInf
from tests.laws import test_datainf, test_sketches, test_token_scores, test_trak
from tests.planted.planting import Bug, must_be_noticed, swap


def kernel_of_losses(original: Any, self: EmpiricalFisher, *args: Any) -> Any:
    return original(replace(self, measure=None), *args)


def not_scaled(original: Any, self: Projector, rows: Any) -> Any:
    """Entries N(0, 1) for N(0, 1 / k)."""
    return original(self, rows).scaled(self.projection.k**0.5)


def without_signs(original: Any, *args: Any) -> Side:
    side = original(*args)
    return replace(side, factors=side.factors.abs())


def layers_together(original: Any, self: DataInf, *args: Any) -> Any:
    return original(replace(self, per_block=False), *args)


def one_place_late(original: Any, self: Products, batch: Any, directions: Any) -> Tensor:
    return torch.roll(original(self, batch, directions), 1, -1)


DATAINF = partial(test_datainf.test_scores_are_the_papers_formula, True, 0.01)
TOKENS = partial(test_token_scores.test_every_token_has_its_own_gradients_part, CG(1e-10), False)
TRAK = partial(test_trak.test_trak_equals_its_formula, None)
GAUSSIAN = test_trak.test_inner_products_are_kept_up_to_one_over_root_k
PRODUCTS = partial(test_sketches.test_a_sketch_is_its_definition, 9)
BUGS = [
    Bug("TRAK's kernel of losses", swap(EmpiricalFisher, "of", kernel_of_losses), TRAK),
    Bug("a projection not scaled", swap(Projector, "apply", not_scaled), GAUSSIAN),
    Bug("a sketch of products without signs", swap(Side, "of_outputs", without_signs), PRODUCTS),
    Bug("DataInf over all layers together", swap(DataInf, "init", layers_together), DATAINF),
    Bug("tokens one place late", swap(Products, "token_losses_along", one_place_late), TOKENS),
]


@pytest.mark.parametrize("bug", BUGS, ids=lambda bug: bug.name)
def test_a_planted_bug_breaks_its_law(bug: Bug, monkeypatch: pytest.MonkeyPatch) -> None:
    must_be_noticed(bug, monkeypatch)
