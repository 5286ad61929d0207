"""Forecasts of memory against the bytes that torch allocates at the peak: counted, so that no machine differs."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch._C._profiler import _EventType
from torch.profiler import ProfilerActivity, profile

import pytorch_influence_functions as ptif
from pytorch_influence_functions.influence.topk import TopK
from pytorch_influence_functions.linalg import chunks


def peak_of(run: Callable[[], Any]) -> int:
    """The most bytes of tensors that lived at the same time while `run` ran, of those it made."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()
    waiting = list(profiler.profiler.kineto_results.experimental_event_tree())  # type: ignore[union-attr]
    changes: list[tuple[int, int, int]] = []
    while waiting:
        event = waiting.pop()
        waiting += event.children
        if event.tag == _EventType.Allocation:
            changes.append((event.start_time_ns, event.extra_fields.ptr, event.extra_fields.alloc_size))
    living: dict[int, int] = {}
    now = most = 0
    for _, place, size in sorted(changes, key=lambda change: change[0]):
        if size > 0:
            living[place], now = size, now + size
        else:
            now -= living.pop(place, 0)  # what was there before does not count
        most = max(most, now)
    return most


def layers(*widths: int) -> nn.Module:
    parts: list[nn.Module] = []
    for a, b in itertools.pairwise(widths):
        parts += [nn.Linear(a, b), nn.ReLU()]
    return nn.Sequential(*parts[:-1])


def convolutions() -> nn.Module:
    first = (nn.Unflatten(1, (1, 20, 20)), nn.Conv2d(1, 8, 3, padding=1), nn.ReLU())
    return nn.Sequential(*first, nn.Conv2d(8, 16, 3, 2, 1), nn.ReLU(), nn.Flatten(), nn.Linear(1600, 10))


WIDE, TABLE = (400, 256, 10), (50, 64, 64, 4)


@pytest.mark.parametrize(
    ("make", "n", "q", "top", "method"),
    [
        (lambda: layers(*WIDE), 1000, 1, None, ptif.ekfac()),  # the fit
        (lambda: layers(*WIDE), 3000, 30, None, ptif.ekfac()),  # products that are not written out
        (lambda: layers(*TABLE), 1500, 300, None, ptif.ekfac()),  # gradients that are
        (lambda: layers(*TABLE), 6000, 400, None, ptif.ekfac()),  # the scores themselves
        (lambda: layers(*TABLE), 6000, 400, 10, ptif.ekfac()),  # ... of which the extremes are kept
        (lambda: layers(*TABLE), 1000, 30, None, ptif.dual()),
        (lambda: layers(*TABLE), 500, 500, 10, ptif.dual()),
        (lambda: layers(50, 20), 800, 10, None, ptif.Influence()),  # exact, by a dense matrix
        (lambda: layers(*TABLE), 6000, 300, 10, ptif.methods.grad_dot()),
        (convolutions, 600, 10, None, ptif.ekfac()),
    ],
    ids=["fit", "applied", "written", "all scores", "top", "dual", "dual, top", "dense", "grad_dot", "convolutions"],
)
def test_memory_is_forecast_near_what_is_allocated(
    make: Callable[[], nn.Module], n: int, q: int, top: int | None, method: ptif.Influence
) -> None:
    torch.manual_seed(0)
    model = make().eval()
    x, asked = torch.randn(n, 400 if make is convolutions else model[0].in_features), torch.arange(q) % 3  # type: ignore[index]
    of = ptif.Problem(model, ptif.CrossEntropy(), (x, torch.arange(n) % 4))
    forecast = method.forecast(of, q, top)
    most = peak_of(lambda: method.fit(of, n_queries=q).score((x[:q], asked), top=top))
    assert most > 4e6
    # Forecast, and not counted here: what the allocator keeps of what is freed, and LAPACK's own space for the longest
    # side, thrice its square.
    space = 3 * 4 * 1601**2 if make is convolutions else 0
    assert most / 1.2 < forecast.memory_bytes + forecast.batch_bytes < 2.2 * (most + space)


def test_extremes_are_finished_a_few_queries_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """2 k^2 comparisons of every query: all together they would be gigabytes."""
    scores = torch.randn(7, 9).round(decimals=1)
    results = []
    for room in (chunks.CHUNK_NUMBERS, 20):
        monkeypatch.setattr(chunks, "CHUNK_NUMBERS", room)
        extremes = TopK(7, 3)
        extremes.add(torch.arange(7), torch.arange(9), scores)
        results.append(extremes.result())
    for one, other in zip(*results, strict=True):
        assert torch.equal(one, other)
