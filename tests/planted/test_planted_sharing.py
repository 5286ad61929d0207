"""Bugs planted in how processes share work: with each, some process has something else than one computes alone."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeAlias

import pytest
import torch
from jaxtyping import TypeCheckError
from torch import Tensor

import pytorch_influence_functions as ptif
from pytorch_influence_functions.core.distributed import World
from pytorch_influence_functions.influence.topk import TopK
from pytorch_influence_functions.linalg import rows_together
from pytorch_influence_functions.linalg.panels import Panels
from pytorch_influence_functions.problem.labels import Labels
from tests.laws.several import run_on
from tests.laws.test_processes import METHODS, ask, extremes, labels_of_many, own
from tests.planted.planting import Patch, swap

Program: TypeAlias = Callable[[], Tensor]


def one_example_twice(original: Any, self: World, count: int) -> slice:
    share = original(self, count)
    return slice(max(0, share.start - 1), share.stop)


def left_out(original: Any, self: World, tensor: Tensor) -> Tensor:
    """No exchange: each process goes on with its own."""
    return tensor


def own_extremes(original: Any, self: TopK, world: World) -> TopK:
    return original(self, World())


def one_process_dropped(original: Any, self: World, tensor: Tensor) -> list[Tensor]:
    return original(self, tensor)[:1]


def own_labels(original: Any, self: Labels, world: World) -> Any:
    return original(self, World())


def one_triangle(original: Any, k: Tensor) -> Tensor:
    return k.tril()


def from_the_second_panel(original: Any, self: Panels, b: Tensor, begin: int = 0) -> Tensor:
    return original(self, b, max(begin, self.width))


def scores_of(method: str) -> Program:
    return lambda: ask(method=METHODS[method]).values


def top_three() -> Tensor:
    return extremes(ask(method="ekfac", top=3))


BUGS: dict[str, tuple[Patch, Program]] = {
    "an example counted by two processes": (swap(World, "share", one_example_twice), scores_of("ekfac")),
    "counts not added up": (swap(World, "all_sum", left_out), scores_of("kfac")),
    "covariances not added up": (swap(World, "sum_into", left_out), scores_of("kfac")),
    "extremes of one's own examples": (swap(TopK, "everyones", own_extremes), top_three),
    "a process dropped from the extremes": (swap(World, "gather", one_process_dropped), top_three),
    "labels of one's own examples": (swap(Labels, "_together", own_labels), labels_of_many),
    "self-influence of one's own examples": (swap(World, "sum_into", left_out), lambda: own(METHODS["ekfac"])),
    "half a Gram matrix": (swap(rows_together, "symmetrised", one_triangle), scores_of("dual, damped by its curve")),
    "the first panel left out of a solve": (swap(Panels, "_forward", from_the_second_panel), scores_of("dual")),
}


def everything(_: int) -> dict[str, Any]:
    told: dict[str, Any] = {}
    for name, (plant, program) in BUGS.items():
        with pytest.MonkeyPatch.context() as monkeypatch, ptif.distributed(timeout=900):
            plant(monkeypatch)
            try:
                told[name] = program()
            except (ptif.InfluenceError, TypeCheckError) as error:  # noticed by the library itself, or by its shapes
                told[name] = str(error)
    return told


@pytest.mark.slow
def test_every_bug_in_sharing_is_noticed(tmp_path: Path) -> None:
    processes = run_on(2, everything, tmp_path)
    unnoticed = []
    for name, (_, program) in BUGS.items():
        alone, several = program(), [told[name] for told in processes]
        if all(isinstance(v, Tensor) and v.shape == alone.shape and torch.allclose(v, alone, 1e-6) for v in several):
            unnoticed.append(name)
    assert not unnoticed
