"""Bugs planted in the guard that keeps a model in eval mode: each must break its law."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from pytorch_influence_functions.problem import model_state
from pytorch_influence_functions.problem.problem import first_batch
from tests.laws import test_nothing_is_changed as interruptions
from tests.laws import test_training_mode as laws
from tests.planted.planting import Bug, Patch, must_be_noticed, swap, swap_everywhere


@contextmanager
def ended_before_the_block(original: Any, *args: Any, **kwargs: Any) -> Iterator[Any]:
    """The guard ends as soon as the batch is there, and what is done with it runs in the caller's mode."""
    with original(*args, **kwargs) as batch:
        pass
    yield batch


ENDS_EARLY: Patch = swap_everywhere(first_batch, ended_before_the_block)


def law(entry: str, net: str, folder: Path) -> None:
    laws.test_a_model_in_training_mode_is_neither_moved_nor_judged_so(entry, net, folder)


def kept_in_training(original: Any, self: Any) -> None:
    original(self)
    for module, training in self.modes:
        module.training = training


@pytest.mark.parametrize("net", laws.NETS)
@pytest.mark.parametrize("entry", ["ekfac", "kfac", "shampoo", "forecast", "attribute", "own loss and measure"])
def test_a_guard_that_ends_early_breaks_its_law(
    entry: str, net: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    must_be_noticed(Bug("guard ends early", ENDS_EARLY, partial(law, entry, net, tmp_path)), monkeypatch)


@contextmanager
def not_ended(original: Any) -> Iterator[None]:
    """A guard that waits for its generator to be dropped, which an exception that is kept prevents."""
    yield


def test_a_guard_that_outlives_a_failed_call_breaks_its_law(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plant = swap(model_state, "_ended_on_failure", not_ended)
    law = partial(interruptions.test_an_interruption_in_the_middle_changes_nothing, "classic, auto_tune", tmp_path)
    must_be_noticed(Bug("guard outlives a failed call", plant, law), monkeypatch)
    gc.collect()  # now the generators that were left end


@pytest.mark.parametrize("entry", ["exact", "TrainingLoss"])
def test_a_guard_that_forgets_the_mode_breaks_its_law(
    entry: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plant = swap(model_state._Snapshot, "enter", kept_in_training)
    must_be_noticed(Bug("left in training mode", plant, partial(law, entry, "perceptron", tmp_path)), monkeypatch)
