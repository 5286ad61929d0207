"""Processes whose machines differ (disk, memory, clock, rounding) take the same steps, and agree on every plan."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.multiprocessing.spawn import ProcessRaisedException

import pytorch_influence_functions as ptif
from pytorch_influence_functions import curvature, solvers
from pytorch_influence_functions.core.distributed import World, current
from pytorch_influence_functions.influence import fitted_member, members
from pytorch_influence_functions.linalg import lanczos
from pytorch_influence_functions.solvers import dual, forecast
from pytorch_influence_functions.solvers.neumann import series, tuning
from tests.laws.several import run_on

LOSS = nn.CrossEntropyLoss()


def problem(dtype: torch.dtype = torch.float64, **options: Any) -> ptif.Problem:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).to(dtype)
    return ptif.Problem(model, LOSS, data(0, 21, dtype), **options)


def data(first: int, last: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(1)
    x, y = torch.randn(27, 4, generator=g, dtype=torch.float64), torch.randint(3, (27,), generator=g)
    return x[first:last].to(dtype), y[first:last]


def ask(method: ptif.Influence, **options: Any) -> Tensor:
    return method.fit(problem(**options)).score(data(21, 27)).values


def along() -> Tensor:
    weights = problem().model.state_dict()
    states = [{name: w * (1 + 0.1 * k) for name, w in weights.items()} for k in range(3)]
    return ask(ptif.ekfac(), checkpoints=states)


PROGRAMS: dict[str, Callable[[], Tensor]] = {
    "conjugate gradients": lambda: ask(ptif.Influence(curvature.GGN(), solvers.CG(rtol=1e-9), damping=0.1)),
    "guided": lambda: ask(ptif.gauss_newton(damping=0.1)),
    "series": lambda: ask(ptif.Influence(curvature.GGN(), solvers.Neumann(), damping=0.5)),
    "along the run": along,
    "dual": lambda: ask(ptif.dual()),
    "dual of float32": lambda: (
        ptif.dual(damping=0.1).fit(problem(torch.float32)).score(data(21, 27, torch.float32)).values
    ),
    "leading eigenpairs": lambda: ask(
        ptif.Influence(curvature.Arnoldi(4, curvature.GGN()), solvers.Spectral(), damping=0.1)
    ),
}


def differ(rank: int, patch: pytest.MonkeyPatch) -> None:
    """This process's machine: the second has no disk, a slow clock, full memory, and rounds in another way."""
    patch.setattr(fitted_member.FittedMember, "room", lambda self, budget: 2)
    if rank == 0:
        return
    seconds = time.perf_counter
    patch.setattr(time, "perf_counter", lambda: 50 * seconds())
    patch.setattr(os, "cpu_count", lambda: 1)
    patch.setattr("shutil.disk_usage", lambda path: type("usage", (), {"free": 10}))
    patch.setattr(forecast, "_own_operations_per_second", lambda: 1e6)
    patch.setattr(members, "bytes_of", lambda member: 1 << 40)
    patch.setattr(solvers.CG, "_tolerance", lambda self, dtype: 1e-3)
    settled = series._Watch.settled
    patch.setattr(series._Watch, "settled", lambda self, x, t: None if (s := settled(self, x, t)) is None else ~s)
    patch.setattr(tuning, "SAFETY", 2.0)
    patch.setattr(series, "bends_down", lambda *_: True)
    rounding = dual._rounding
    patch.setattr(dual, "_rounding", lambda *taken: 1.0 + rounding(*taken))
    patch.setattr(lanczos, "_CONVERGED", {torch.float64: 1.0})
    patch.setattr(lanczos, "_ROUNDING", 1e12)


def on_machines_that_differ(rank: int) -> dict[str, Any]:
    with pytest.MonkeyPatch.context() as patch, ptif.distributed(timeout=60):
        differ(rank, patch)
        results: dict[str, Any] = {name: program() for name, program in PROGRAMS.items()}
        results["forecast"] = str(ptif.Influence(curvature.GGN(), solvers.CG()).forecast(problem(), n_queries=4))
        results["speed"] = forecast.operations_per_second()
    return results


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return run_on(2, on_machines_that_differ, tmp_path_factory.mktemp("a name with spaces"))


@pytest.mark.parametrize("name", PROGRAMS)
def test_machines_that_differ_compute_what_one_does(both: list[dict[str, Any]], name: str) -> None:
    expected = PROGRAMS[name]()
    for results in both:
        single = name == "dual of float32"
        rtol, atol = (1e-4, 1e-6) if single else (1e-6, 1e-9)
        torch.testing.assert_close(results[name], expected, rtol=rtol, atol=atol)


def test_all_forecast_what_the_slowest_takes(both: list[dict[str, Any]]) -> None:
    first, second = both
    assert first["forecast"] == second["forecast"] and first["speed"] == second["speed"] == pytest.approx(1e6)


def fail(rank: int) -> None:
    if rank == 1:
        raise OSError("the disk is full")
    time.sleep(300)


def test_a_process_that_fails_ends_the_wait_for_the_others(tmp_path: Path) -> None:
    began = time.monotonic()
    with pytest.raises(ProcessRaisedException, match="the disk is full"):
        run_on(2, fail, tmp_path / "a name with spaces")
    assert time.monotonic() - began < 120


def test_one_process_decides_and_measures_for_itself() -> None:
    assert World().largest(0.5) == 0.5 == current().largest(0.5)
    assert World().decided(torch.tensor([True, False])).tolist() == [True, False]
