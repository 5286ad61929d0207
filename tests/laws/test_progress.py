"""Progress: a callback hears everything, bars show only in long passes, and silence is silent."""

from __future__ import annotations

import io
import sys

import pytest
import torch

from pytorch_influence_functions.core.distributed import World, current
from pytorch_influence_functions.core.errors import InvalidInput
from pytorch_influence_functions.core.progress import Meter, progress, track

# The package gives the class `progress` that name; the module of the same name is found by its full one.
module = sys.modules["pytorch_influence_functions.core.progress"]


def test_a_callback_hears_every_step() -> None:
    heard: list[tuple[str, int, int]] = []
    with progress(lambda *step: heard.append(step)):
        assert list(track([3, 4], 7, "pass", size=lambda x: x)) == [3, 4]
    assert heard == [("pass", 0, 7), ("pass", 3, 7), ("pass", 7, 7)]
    list(track([1], 1, "after"))
    assert len(heard) == 3  # the switch went back


def test_an_exception_in_the_callback_stops_the_pass() -> None:
    def stop(label: str, done: int, total: int) -> None:
        if done:
            raise InterruptedError

    with pytest.raises(InterruptedError), progress(stop):
        list(track(range(3), 3))


def _shown(monkeypatch: pytest.MonkeyPatch, delay: float, nested: bool = False) -> str:
    monkeypatch.setattr(module, "DELAY", delay)
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    for _ in track(range(2), 2, "outer"):
        if nested:
            list(track(range(2), 2, "inner"))
    return sys.stderr.getvalue()  # type: ignore[attr-defined]


def test_short_passes_show_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PTIF_PROGRESS", raising=False)
    assert _shown(monkeypatch, delay=60.0) == ""


def test_bars_go_to_stderr_and_nested_ones_are_cleared(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PTIF_PROGRESS", raising=False)
    text = _shown(monkeypatch, delay=0.0, nested=True)
    assert "outer: 100%" in text.splitlines()[-1] and "inner" in text


def test_bars_are_silenced_by_switch_and_by_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    with progress(False):
        assert _shown(monkeypatch, delay=0.0) == ""
    monkeypatch.setenv("PTIF_PROGRESS", "0")
    assert _shown(monkeypatch, delay=0.0) == ""


def test_called_alone_it_switches_until_called_again() -> None:
    heard: list[int] = []
    before = progress(lambda label, done, total: heard.append(done))
    with Meter(2) as meter:
        meter.advance()
        meter.close()
    before.__exit__(None, None, None)
    list(track([1], 1))
    assert heard == [0, 1]


def test_a_world_of_one_has_everything_and_sums_nothing() -> None:
    assert current() == World() and World().share(2) == slice(0, 2)
    x = torch.ones(2)
    assert World().all_sum(x) is x


@pytest.mark.parametrize("size", [1, 2, 3, 7])
def test_shares_cover_everything_once(size: int) -> None:
    shares = [list(range(5))[World(r, size).share(5)] for r in range(size)]
    assert [i for share in shares for i in share] == list(range(5))


def test_impossible_worlds_are_refused() -> None:
    with pytest.raises(InvalidInput, match="got rank 2 of size 2"):
        World(2, 2)
    with pytest.raises(InvalidInput, match="are not joined; open one with"):
        World(0, 2).all_sum(torch.ones(1))
