"""lambda is damping plus weight decay: where both are there, the result tells both."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import pytorch_influence_functions as ptif
from pytorch_influence_functions.scores.diagnostics import Diagnostics


def diagnostics(weight_decay: Any) -> Diagnostics:
    torch.manual_seed(0)
    x, y = torch.randn(30, 4), torch.arange(30) % 3
    return ptif.attribute(
        nn.Linear(4, 3), (x, y), (x[:2], y[:2]), method=ptif.exact(damping=0.25), weight_decay=weight_decay
    ).diagnostics


@pytest.mark.parametrize(
    ("weight_decay", "told"),
    [
        (0.0, "lambda = 0.25,"),
        (0.05, "lambda = 0.3 (damping 0.25 + weight decay 0.05)"),
        ({"weight": 0.05}, "lambda = 0.25 to 0.3 (damping 0.25 + weight decay 0 to 0.05)"),
    ],
)
def test_both_are_printed(weight_decay: Any, told: str) -> None:
    assert told in str(diagnostics(weight_decay)) + ","


def test_the_first_line_of_scores_and_the_page_tell_it_too(tmp_path: Path) -> None:
    scores = ptif.Scores(torch.ones(1, 2), diagnostics=Diagnostics(damping=0.25, weight_decay=0.05))
    assert "lambda = 0.3 (damping 0.25 + weight decay 0.05)" in repr(scores).splitlines()[0]
    assert len(repr(scores).splitlines()[0]) < 121
    page = Path(scores.report(tmp_path / "r.html").path).read_text(encoding="utf-8")
    assert "0.3 (damping 0.25 + weight decay 0.05)" in page


def test_negative_curvature_is_weighed_against_all_of_lambda() -> None:
    d = Diagnostics(damping=0.1, smallest_curvature=-0.12)
    assert d.checks()[2].status == "bad"
    assert dataclasses.replace(d, weight_decay=0.05, weight_decay_most=0.05).checks()[2].status == "warn"
