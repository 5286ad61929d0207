"""Bugs planted in what judges scores and in what they are judged against: each must break its law."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

import pytorch_influence_functions as ptif
from pytorch_influence_functions.evaluation import explanations, removal, training
from tests.interface import test_interop
from tests.laws import test_baselines, test_batch_loss, test_removal, test_retraining
from tests.planted.planting import Bug, must_be_noticed, swap, swap_everywhere


def divided_by_what_is_kept(original: Any, how: Any, losses: Tensor, batch: Any, weights: Tensor | None) -> Tensor:
    return original(how, losses, batch, None) if weights is None else (losses * weights).sum(-1) / weights.sum(-1)


def always_a_loss(original: Any, self: Any, *args: Any) -> Any:
    return original(replace(self, lower_is_better=True), *args)


def by_raw_sign(original: Any, scores: Any, shape: Any) -> Tensor:
    return (scores.values if isinstance(scores, ptif.Scores) else scores).argsort(dim=1, descending=True)


def not_turned(original: Any, scores: Any) -> Tensor:
    return scores.values


def dot_product(original: Any, x: Tensor, dim: int) -> Tensor:
    return x


MARGIN = partial(test_removal.test_what_helps_most_is_removed_and_hurts_in_the_measures_own_sense, ptif.Margin())
BUGS = [
    Bug(
        "held batches divided by what is kept",
        swap(training, "combine_losses", divided_by_what_is_kept),
        partial(test_retraining.test_one_by_one_is_the_loop_written_out, True, 5),
    ),
    Bug(
        "a batch's class weights not divided by",
        swap(training, "combine_losses", lambda original, how, losses, *others: losses.mean(-1)),
        partial(
            test_batch_loss.test_the_recipe_trains_what_the_users_own_loop_trains, "weight", 5, test_batch_loss.linear
        ),
    ),
    Bug(
        "harm of a margin taken for that of a loss",
        swap(removal.RemovalCurves, "harm", always_a_loss),
        test_removal.test_harm_is_a_fall_where_higher_is_better,
    ),
    Bug("the top of a margin by its raw sign", swap_everywhere(removal.helpful_orders, by_raw_sign), MARGIN),
    Bug(
        "exports not turned for margins",
        swap_everywhere(explanations, not_turned),
        test_interop.test_exports_are_positive_for_proponents_whatever_was_measured,
    ),
    Bug(
        "features of a baseline not normalised",
        swap(torch.nn.functional, "normalize", dot_product),
        test_baselines.test_similarity_is_the_cosine_of_the_features_before_the_last_layer,
    ),
]


@pytest.mark.parametrize("bug", BUGS, ids=lambda bug: bug.name)
def test_a_planted_bug_breaks_its_law(bug: Bug, monkeypatch: pytest.MonkeyPatch) -> None:
    must_be_noticed(bug, monkeypatch)
