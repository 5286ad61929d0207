"""Bugs planted in the recorder and in the average along the run: each must break its law."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch

from pytorch_influence_functions.influence import averaging
from pytorch_influence_functions.influence.agreement import Units
from pytorch_influence_functions.trajectory import recorder, schedule
from tests.laws import test_along, test_recorder
from tests.planted.planting import Bug, Law, must_be_noticed, swap


def average() -> None:
    test_along.test_the_average_is_the_formula("exact", "spread")


def final() -> None:
    test_along.test_the_average_is_the_formula("exact", "final")


def doubling() -> None:
    test_recorder.test_at_any_step_the_kept_ones_are_within_a_factor_of_two()


def in_folder(law: Any, *arguments: Any) -> Law:
    def run() -> None:
        with tempfile.TemporaryDirectory() as folder:
            law(*arguments, Path(folder))

    return run


recorded = in_folder(test_recorder.test_every_checkpoint_holds_the_weights_of_its_step, "groups", 1, None)
scaled = in_folder(test_recorder.test_a_step_that_the_scaler_leaves_out_is_not_counted, True)
resumed = in_folder(test_recorder.test_a_resumed_training_goes_on, test_recorder.sgd)


def every_plain(original: Any, value: Any) -> Units:
    return Units.RAW


def all_of_one(original: Any, self: Any) -> Any:
    """The unit of one query for all of them."""
    return original(self)[:1].expand(self.n_queries)


def mean_of_squares(original: Any, scores: Any, eps: float, world: Any) -> Any:
    return scores.square().mean(1).sqrt()


def arithmetic(original: Any, self: Any) -> Any:
    return torch.stack(self.spreads).mean(0)


def never_drops(original: Any, self: Any, steps: Any) -> list[int]:
    return list(steps)[-self.most :]


def live(original: Any, tensors: Any, dtype: Any) -> Any:
    return {k: v * (1 + 1e-6) if v.is_floating_point() else v for k, v in tensors}


def counts_all(original: Any, self: Any, optimizer: Any, *rest: Any) -> Any:
    found = optimizer.__dict__.pop("found_inf", None)
    try:
        return original(self, optimizer, *rest)
    finally:
        if found is not None:
            optimizer.found_inf = found


BUGS = [
    Bug("a plain mean", swap(Units, "of", every_plain), average),
    Bug("one unit for all queries", swap(averaging.CheckpointAverage, "_unit", all_of_one), average),
    Bug("root mean square for spread", swap(averaging, "spread_of", mean_of_squares), average),
    Bug("arithmetic mean of spreads", swap(averaging.CheckpointAverage, "_unit", arithmetic), average),
    Bug("geometric for final", swap(averaging.CheckpointAverage, "_unit", arithmetic), final),
    Bug("thins nothing", swap(schedule.Doubling, "keep", never_drops), doubling),
    Bug("writes other numbers", swap(recorder, "named_state", live), recorded),
    Bug("counts steps that were left out", swap(recorder.Recorder, "_after_step", counts_all), scaled),
    Bug(
        "resumes at the last listed step",
        swap(recorder.Recorder, "_find_step", lambda original, self, known: known.recorded[-1].step + 17),
        resumed,
    ),
]


QUICK = ("a plain mean", "geometric for final", "writes other numbers", "counts steps that were left out")


@pytest.mark.parametrize(
    "bug", [pytest.param(b, id=b.name, marks=() if b.name in QUICK else pytest.mark.slow) for b in BUGS]
)
def test_the_law_notices(bug: Bug, monkeypatch: pytest.MonkeyPatch) -> None:
    must_be_noticed(bug, monkeypatch)
