"""Bugs planted where queries are put together, candidates picked and parts told apart: each must break its law."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch

from pytorch_influence_functions.influence import asks, rounds
from pytorch_influence_functions.influence.candidates import Candidates
from pytorch_influence_functions.influence.combination import Combination
from pytorch_influence_functions.influence.scoring import TrainingStream
from tests.laws import test_questions
from tests.planted.planting import Bug, must_be_noticed, swap

sums = partial(test_questions.test_rows_of_several_queries_are_the_same_sums_of_their_rows, "ekfac")
pairs = partial(test_questions.test_a_contrast_is_the_difference_of_two_rows, "ekfac")
chosen = partial(test_questions.test_candidates_have_the_scores_that_they_have_among_all, "ekfac")
parts = partial(test_questions.test_parts_add_up_to_the_whole, "exact")
along = partial(test_questions.test_parts_add_up_to_the_whole, "along")
read = partial(test_questions.test_examples_that_are_no_candidates_are_not_read, "ekfac")


def one_part_lost(original: Any, self: Any) -> Any:
    for ids, by_part in original(self):
        yield ids, [torch.zeros_like(by_part[0]), *by_part[1:]]


BUGS = [
    Bug("weights of the queries lost", swap(asks, "_add_sums", lambda f, t, r, w: f(t, r, (w != 0).to(w))), sums),
    Bug("sum in place of the difference", swap(Combination, "scaled", lambda f, self, factor: self), pairs),
    Bug("candidates in ascending order", swap(Candidates, "of_rows", lambda f, self, r: f(self, r).sort(1)[0]), chosen),
    Bug(
        "everything read",
        swap(rounds.Rounds, "_stream", lambda f, self, m, s, log, ids=None, p=None: f(self, m, s, log)),
        read,
    ),
    Bug("a part lost", swap(TrainingStream, "part_blocks", one_part_lost), parts),
    Bug(
        "parts in units of their weights",
        swap(rounds.Rounds, "factors", lambda f, self, s: list(self._even_factors(s.question))),
        along,
    ),
]


@pytest.mark.parametrize("bug", BUGS, ids=lambda bug: bug.name)
def test_a_planted_bug_breaks_its_law(bug: Bug, monkeypatch: pytest.MonkeyPatch) -> None:
    must_be_noticed(bug, monkeypatch)
