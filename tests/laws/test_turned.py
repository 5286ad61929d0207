"""Solutions that stay in an eigenbasis equal those that are written out, whatever they meet."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import pytorch_influence_functions as ptif
from pytorch_influence_functions.linalg.blocks import AbstractBlock, Conv, Dense, Indexed, Outer, Sum
from pytorch_influence_functions.linalg.kronecker_block import KroneckerBlock
from pytorch_influence_functions.linalg.rows import Rows, inner, inner_in
from pytorch_influence_functions.linalg.turned import Turned
from pytorch_influence_functions.linalg.window import Window

OUT, IN = 3, 5


def randn(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def turned(n: int = 6, left: bool = True, right: bool = True) -> tuple[Turned, Dense]:
    """Rows in a random basis, and the same written out."""
    torch.manual_seed(n)
    sides = [torch.linalg.qr(randn(d, d))[0] if there else None for d, there in ((OUT, left), (IN, right))]
    coordinates = randn(n, OUT, IN)
    u, v = (torch.eye(d).double() if side is None else side for side, d in zip(sides, (OUT, IN), strict=True))
    return Turned(KroneckerBlock(*sides, torch.ones(OUT, IN)), (OUT, IN), coordinates), Dense(u @ coordinates @ v.T)


OTHERS: dict[str, AbstractBlock] = {
    "one outer product": Outer(randn(4, 1, OUT), randn(4, 1, IN)),
    "several": Outer(randn(4, 3, OUT), randn(4, 3, IN)),
    "written out": Dense(randn(4, OUT, IN)),
    "table": Indexed(torch.randint(0, OUT, (4, 2)), randn(4, 2, IN), OUT),
    "convolution": Conv(randn(4, OUT, 3), randn(4, 2, 4), Window((2,), (1,), (1,), True)),
    "sum": Sum((Outer(randn(4, 1, OUT), randn(4, 1, IN)), Dense(randn(4, OUT, IN)))),
}


@pytest.mark.parametrize("name", OTHERS)
@pytest.mark.parametrize(("left", "right"), [(True, True), (False, True), (True, False)])
def test_products_are_those_of_the_rows_written_out(name: str, left: bool, right: bool) -> None:
    other = OTHERS[name]
    rows, dense = turned(6, left, right)
    expected = torch.einsum("noi,moi->nm", other.dense().reshape(4, OUT, IN), dense.dense())
    torch.testing.assert_close(inner(other, rows), expected)
    torch.testing.assert_close(inner(rows, other), expected.T)
    torch.testing.assert_close(inner_in(other, turned(6, left, right)[0], torch.float64), expected)
    few, few_dense = turned(4, left, right)
    of_each = torch.einsum("noi,noi->n", other.dense().reshape(4, OUT, IN), few_dense.dense())
    torch.testing.assert_close(Rows({"a": few}).rowwise(Rows({"a": other})), of_each)
    torch.testing.assert_close(Rows({"a": other}).rowwise(Rows({"a": few})), of_each)


def test_rows_are_written_out_once_turning_others_has_cost_as_much() -> None:
    rows, dense = turned(6)
    gradients = Outer(randn(4, 1, OUT), randn(4, 1, IN))
    expected = inner(gradients, dense)
    # Turning four gradients takes 4 (9 + 25) multiply-adds, writing six rows out 6 * 15 * 8.
    for met in range(1, 9):
        torch.testing.assert_close(inner(gradients, rows), expected)
        assert (rows.coordinates is None) == (met * 4 * 34 > 6 * 15 * 8)
    assert rows.coordinates is None and rows.numbers == 6 * OUT * IN


def test_what_is_done_with_rows_needs_no_writing_out() -> None:
    for written in (False, True):
        rows, dense = turned(6)
        if written:
            rows.dense()
        weights, factors = randn(2, 6), randn(6)
        torch.testing.assert_close(rows.combine(weights), dense.combine(weights))
        torch.testing.assert_close(rows.squared_norms(), dense.squared_norms())
        torch.testing.assert_close(rows.take(slice(1, 3)).dense(), dense.dense()[1:3])
        torch.testing.assert_close(rows.scale(factors).dense(), dense.scale(factors).dense())
        assert (rows.coordinates is None) == written and rows.shape == (OUT, IN) and len(rows) == 6
        torch.testing.assert_close(rows.to(torch.float32).dense(), dense.dense().float())


def test_many_queries_have_the_scores_of_few(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 3, 3), nn.Tanh(), nn.Flatten(), nn.Linear(48, 10), nn.Tanh(), nn.Linear(10, 3))
    x, y = torch.randn(60, 1, 6, 6), torch.randint(0, 3, (60,))
    problem = ptif.Problem(model.double(), ptif.CrossEntropy(), (x.double(), y))
    asked = torch.randn(80, 1, 6, 6).double(), torch.randint(0, 3, (80,))
    attribution = ptif.ekfac().fit(problem)
    kept: list[bool] = []
    meets = Turned.meets

    def watched(self: Turned, other: AbstractBlock) -> tuple[AbstractBlock, AbstractBlock]:
        pair = meets(self, other)
        kept.append(self.coordinates is not None)
        return pair

    monkeypatch.setattr(Turned, "meets", watched)
    many = attribution.score(asked)
    assert any(kept)
    few = torch.cat([attribution.score((asked[0][k : k + 1], asked[1][k : k + 1])).values for k in range(0, 80, 20)])
    torch.testing.assert_close(many.values[::20], few, rtol=1e-9, atol=1e-12)
    top = attribution.score(asked, top=3)
    torch.testing.assert_close(top.values[:, 0], many.values.max(1).values, rtol=1e-9, atol=1e-12)
