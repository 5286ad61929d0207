"""Law: the residual that a Kronecker solve reports is that of the dense system, for one query or for many.

`Factored` is what the law asks: its answer is another formula than (C + lambda)^-1, so its residual is large, and a
wrong one is seen.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import pytorch_influence_functions as ptif
from pytorch_influence_functions.curvature import KFAC, Budget
from pytorch_influence_functions.curvature.base import Form
from pytorch_influence_functions.gradients.per_example import Derivatives
from pytorch_influence_functions.linalg.operator import AbstractSymmetric
from pytorch_influence_functions.linalg.rows import Rows
from pytorch_influence_functions.linalg.shift import Shift
from pytorch_influence_functions.solvers import Factored
from tests.laws.solver_cases import dense_residual

SHIFTS = [Shift(0.05), Shift(0.01, {"0": 0.1, "2": 0.02})]
MANY = 1000


def operator() -> AbstractSymmetric:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 3)).double()
    x, y = torch.randn(40, 5).double(), torch.arange(40) % 3
    return KFAC().of(Derivatives.of(ptif.Problem(model, ptif.CrossEntropy(), (x, y))), Form.SPECTRAL, Budget())


def queries(curvature: AbstractSymmetric) -> Rows:
    """Of very different lengths, for what is reported is relative to them."""
    lengths = torch.logspace(-2, 2, MANY, dtype=torch.float64)[torch.randperm(MANY)]
    return curvature.space.rows(torch.randn(MANY, curvature.space.size).double() * lengths[:, None])


def reported_and_true(curvature: AbstractSymmetric, shift: Shift, rows: Rows) -> tuple[Tensor, Tensor]:
    solution = Factored().solve(Factored().init(curvature, shift), rows)
    assert isinstance(solution.value, Rows)
    space = curvature.space
    matrix = curvature.apply(space.rows(torch.eye(space.size, dtype=torch.float64))).flat()
    return solution.residual, dense_residual(space, matrix, shift, solution.value.flat(), rows.flat())


@pytest.mark.parametrize("shift", SHIFTS, ids=str)
def test_the_residual_of_one_or_two_queries_is_their_own(shift: Shift) -> None:
    curvature = operator()
    rows = queries(curvature)
    for ids in ([0], [3, 7]):
        reported, true = reported_and_true(curvature, shift, rows.take(torch.tensor(ids)))
        torch.testing.assert_close(reported, true, rtol=1e-9, atol=0)
        assert float(true.min()) > 0.05


@pytest.mark.parametrize("shift", SHIFTS, ids=str)
def test_the_residual_of_many_queries_is_the_root_of_the_sum_of_all_squares(shift: Shift) -> None:
    """Estimated from two random combinations of all rows: over many orders of the rows their squares are the sum.

    The combinations are drawn from one seed. Of the sum of their squared weights the error is 1 / sqrt(rows), which no
    order of the rows averages away; that of the cross terms falls with the orders.
    """
    curvature = operator()
    rows = queries(curvature)
    orders = 30
    ratios = []
    for _ in range(orders):
        reported, true = reported_and_true(curvature, shift, rows.take(torch.randperm(MANY)))
        assert float(reported.max() - reported.min()) == 0.0  # one number that stands for every row
        ratios.append(float(reported[0].square() / true.square().sum()))
    error = (1 / MANY + 1 / (orders * curvature.space.size)) ** 0.5
    assert sum(ratios) / orders == pytest.approx(1.0, abs=4 * error)
    assert 4 * error < 0.2, "a factor of two would pass unseen"
