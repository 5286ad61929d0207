"""Options: printed without what is left at its default, one bound for memory, and none that does nothing."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import jaxtyping
import pytest
import torch
from torch import nn

import pytorch_influence_functions as ptif
from pytorch_influence_functions.core.errors import IncompleteSolveWarning, InvalidInput, SolveFailed, TooLarge
from pytorch_influence_functions.curvature import EKFAC, GGN, Arnoldi, Budget, EmpiricalFisher, Fisher, Identity
from pytorch_influence_functions.curvature import Subsample as Part
from pytorch_influence_functions.damping import Absolute, FromTraining, Relative
from pytorch_influence_functions.gradients import Gaussian
from pytorch_influence_functions.scaling import Leverage, RelatIF
from pytorch_influence_functions.solvers import (
    CG,
    Auto,
    Blockwise,
    Cholesky,
    DataInf,
    Factored,
    Neumann,
    Spectral,
    Truncation,
    Woodbury,
)


@pytest.mark.parametrize(
    ("record", "printed"),
    [
        (Woodbury(), "Woodbury()"),
        (CG(), "CG()"),
        (CG(1e-3, 500), "CG(rtol=0.001, max_steps=500)"),
        (Neumann(momentum=0.9), "Neumann(momentum=0.9)"),
        (Auto(), "Auto()"),
        (EKFAC(), "EKFAC()"),
        (EKFAC(Fisher(samples=1)), "EKFAC(fisher=Fisher(samples=1))"),
        (Arnoldi(20, GGN()), "Arnoldi(rank=20, curvature=GGN())"),
        (Part(GGN(), 5), "Subsample(curvature=GGN(), examples=5)"),
        (EmpiricalFisher(ptif.Margin()), "EmpiricalFisher(measure=Margin())"),
        (Relative(), "Relative(share=0.1)"),
        (Relative(1.0, per_block=True), "Relative(share=1.0, per_block=True)"),
        (FromTraining(0.1, 100), "FromTraining(lr=0.1, steps=100)"),
        (Gaussian(5), "Gaussian(k=5)"),
        (Truncation(rank=3), "Truncation(rank=3)"),
        (RelatIF(), "RelatIF()"),
        (Blockwise(CG()), "Blockwise(solver=CG())"),
        (ptif.Influence(), "Influence()"),
        (ptif.Influence(GGN(), CG(), 0.1), "Influence(curvature=GGN(), solver=CG(), damping=Absolute(value=0.1))"),
    ],
    ids=str,
)
def test_what_is_left_at_its_default_is_not_printed(record: Any, printed: str) -> None:
    assert repr(record) == printed


@pytest.mark.parametrize(
    ("given", "size"),
    [(1000, 1000), ("1000", 1000), ("2GB", 2 * 10**9), ("1.5 GiB", 3 << 29), ("500 mb", 500 * 10**6), ("7k", 7000)],
)
def test_memory_in_bytes_or_in_words(given: Any, size: int) -> None:
    assert ptif.Influence(memory=given).memory == Budget(size)


@pytest.fixture
def unchecked() -> Iterator[None]:
    """As for a user, whose annotations nobody checks."""
    before = jaxtyping.config.jaxtyping_disable
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", before)


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("given", ["x", "", "GB", "-1", "2 XB", None, True, 0, -5, float("inf"), [4]])
def test_what_is_no_memory_is_refused_at_once(given: Any) -> None:
    with pytest.raises(InvalidInput, match=r"memory=.* is no amount of memory; give bytes such as .* or '2GB'"):
        Budget.of(given)


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "projection": ({"projection": 5}, r"^projection= must be a projection such as Sketch\(1024\), got 5 of type int"),
    "projection class": ({"projection": Gaussian}, r"^projection= is the class Gaussian"),
    "truncation": ({"truncation": 5}, r"^truncation= must be Truncation\(tolerance=0.01\) or .*, got 5 of type int"),
    "route": ({"route": "fast"}, r"route='fast' is not a route; choose one of"),
    "truncated dual": (
        {"curvature": GGN(), "solver": Woodbury(), "truncation": Truncation(rank=2)},
        r"^truncation=Truncation\(rank=2\) would gain nothing: solutions of Woodbury\(\) are combinations",
    ),
    "truncated forward mode": (
        {"truncation": Truncation(rank=2), "route": "forward"},
        r"would do nothing: route='forward' makes no inner products",
    ),
    "guided Spectral": (
        {"curvature": GGN(), "solver": Spectral(), "preconditioner": EKFAC()},
        r"^Spectral\(\) solves directly and has no use for a preconditioner; drop it, or use CG\(\)",
    ),
    "guided Cholesky": ({"curvature": GGN(), "solver": Cholesky(), "preconditioner": EKFAC()}, r"^Cholesky\(\) solves"),
    "guided dual": ({"curvature": GGN(), "solver": Woodbury(), "preconditioner": EKFAC()}, r"^Woodbury\(\) solves"),
    "guided DataInf": ({"curvature": GGN(), "solver": DataInf(), "preconditioner": EKFAC()}, r"^DataInf\(\) solves"),
    "guided factors": ({"curvature": GGN(), "solver": Factored(), "preconditioner": EKFAC()}, r"^Factored\(\) solves"),
}


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("name", REFUSED)
def test_options_that_do_nothing_are_refused_when_written(name: str) -> None:
    options, message = REFUSED[name]
    with pytest.raises(InvalidInput, match=message):
        ptif.Influence(**options)


def small(n: int = 40, width: int = 300) -> tuple[ptif.Problem, tuple[torch.Tensor, torch.Tensor]]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, width), nn.Tanh(), nn.Linear(width, 3)).double()
    x, y = torch.randn(n, 6).double(), torch.randint(0, 3, (n,))
    return ptif.Problem(model, ptif.CrossEntropy(), (x, y)), (x[:3] + 0.1, y[:3])


def test_truncation_is_refused_where_the_dual_is_chosen() -> None:
    problem, _ = small()
    assert ptif.Influence().fit(problem).members[0].composition.solver == Woodbury()
    with pytest.raises(InvalidInput, match=r"would gain nothing: solutions of Woodbury\(\)"):
        ptif.Influence(truncation=Truncation(rank=2)).fit(problem)


@pytest.mark.parametrize(
    ("method", "memory", "message"),
    [
        (ptif.Influence(GGN(), Spectral(), 0.1), 1_000_000, r"^A dense matrix over 203 parameters would take"),
        (ptif.Influence(GGN(), Cholesky(), 0.1), 1_000_000, r"^A dense matrix over 203 parameters would take"),
        (ptif.Influence(GGN(), Woodbury(), 0.1), 140_000, r"^The Gram matrix of 80 rows would take .*use CG\(\)"),
        (ptif.Influence(GGN(), Woodbury(), 0.1), 25_000, r"^Keeping the gradient rows would take"),
    ],
    ids=["dense", "Cholesky", "Gram matrix", "rows"],
)
def test_one_bound_holds_for_curvature_and_solver(method: ptif.Influence, memory: int, message: str) -> None:
    problem, queries = small(width=20)
    tight = ptif.Influence(method.curvature, method.solver, method.damping, memory=memory)
    with pytest.raises(TooLarge, match=message + r".*raise the bound with memory=, such as Influence\(memory='16GB'\)"):
        tight.fit(problem)
    method.fit(problem).score(queries)


# --------------------------------------------------------------------------- solves that end early


@pytest.mark.parametrize(
    "solver",
    [CG(rtol=1e-9, max_steps=3), Neumann(step=0.05, steps=20, batch_size=40, rtol=1e-9)],
    ids=["CG", "Neumann"],
)
def test_what_a_solve_reached_is_handed_back_with_a_bad_mark(solver: Any) -> None:
    problem, queries = small()
    fitted = ptif.Influence(GGN(), solver, 0.05).fit(problem)
    with pytest.warns(IncompleteSolveWarning, match=r"The allowed steps came before rtol.* Relative residual .* row"):
        scores = fitted.score(queries)
    member = fitted.members[0]
    rows = next(member.derivatives.stream(scores.query_source)).rows
    solution = member.solve(rows)
    want = solution.value.flat() @ next(member.derivatives.stream()).rows.flat().T / 40
    torch.testing.assert_close(scores.values, want)
    assert scores.diagnostics.residual_max == pytest.approx(float(solution.residual.max()))
    assert float(solution.residual.max()) > 1e-9 and scores.diagnostics.unsolved == 3
    line = scores.diagnostics.checks()[1]
    assert (line.name, line.status) == ("solve", "bad")
    assert line.text.startswith("3 of 3 solves ended before their tolerance; largest relative residual")
    with pytest.raises(SolveFailed, match="The allowed steps came before rtol"):
        ptif.Influence(GGN(), type(solver)(**{**vars(solver), "incomplete": "error"}), 0.05).fit(problem).score(queries)


def test_a_solve_that_reached_its_tolerance_has_no_mark() -> None:
    problem, queries = small()
    scores = ptif.Influence(GGN(), CG(rtol=1e-9), 0.05).fit(problem).score(queries)
    assert scores.diagnostics.unsolved == 0 and scores.diagnostics.checks()[1].status == "ok"


def test_identity_asks_for_nothing() -> None:
    problem, _ = small()
    assert (
        ptif.Influence(Identity(), Spectral(), 0.1).forecast(problem).passes < 8
    )  # the look at 160, the query, a pass
    assert ptif.Influence(GGN(), CG(), scaling=Leverage()).forecast(problem).passes > 100


def test_absolute_is_named_by_its_value() -> None:
    assert repr(ptif.Influence(damping=0.5)) == f"Influence(damping={Absolute(0.5)!r})"
