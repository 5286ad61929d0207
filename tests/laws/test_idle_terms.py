"""What most positions of a text do not reach: zero terms are left out, and layers are measured on what they need."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import pytorch_influence_functions as ptif
from pytorch_influence_functions.core.indexing import spread_sample
from pytorch_influence_functions.curvature import EKFAC, KFAC, EmpiricalFisher
from pytorch_influence_functions.curvature.base import Budget, Form
from pytorch_influence_functions.curvature.kronecker import moments
from pytorch_influence_functions.gradients.per_example import Derivatives
from pytorch_influence_functions.linalg import rows as rows_module
from pytorch_influence_functions.linalg.blocks import Conv, Dense, Indexed, Outer, Sum
from pytorch_influence_functions.linalg.kronecker import Kronecker
from pytorch_influence_functions.linalg.kronecker_block import KroneckerBlock
from pytorch_influence_functions.linalg.rows import Route, Rows, inner
from pytorch_influence_functions.linalg.turned import Turned
from pytorch_influence_functions.linalg.window import Window
from tests.oracles.autograd import example_gradients

WIDTH, CLASSES = 5, 3


def randn(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(sum(shape)))


def some_idle(n: int = 4, terms: int = 6, idle: tuple[int, ...] = (0, 3, 5)) -> Outer:
    left, right = randn(n, terms, 3), randn(n, terms, 4)
    left[:, list(idle[:-1])] = 0
    right[:, idle[-1]] = 0
    left[1, 4] = 0  # of one row only: stays
    return Outer(left, right)


def test_terms_that_are_zero_in_all_rows_are_left_out() -> None:
    outer = some_idle()
    values = torch.where(torch.arange(6) < 2, 1.0, 0.0)[None, :, None] * randn(4, 6, 4)
    table = Indexed(torch.arange(24).view(4, 6), values, 24)
    for block, terms in ((outer, 3), (some_idle(idle=(0, 1, 2, 3, 4, 5)), 1)):
        used = block.without_idle()
        torch.testing.assert_close(used.dense(), block.dense())
        assert used.terms == terms
    assert table.without_idle().index.shape == (4, 2)
    both = Sum((outer, table)).without_idle().parts
    torch.testing.assert_close(both[1].dense(), table.dense())
    every = Outer(randn(2, 3, 3), randn(2, 3, 4))
    assert every.without_idle() is every


def test_a_nan_beside_a_zero_is_not_left_out() -> None:
    outer = some_idle()
    outer.right[2, 0, 1] = torch.nan
    assert outer.without_idle() is outer
    assert bool(outer.without_idle().sums().isnan()[2])


def test_rows_of_texts_of_several_lengths_stay_in_factors_when_joined() -> None:
    two, alone = torch.tensor([[0, 6, 2], [3, 4, 3]]), torch.tensor([[6]])
    tables = Indexed(two, randn(2, 3, 4), 7), Indexed(alone, randn(1, 1, 4), 7)
    factors = Outer(randn(2, 3, 13), randn(2, 3, 14)), Outer(randn(3, 5, 13), randn(3, 5, 14))
    head = Outer(randn(2, 2, 7), randn(2, 2, 4)), Outer(randn(1, 1, 7), randn(1, 1, 4))
    tied = Sum((tables[0], head[0])), Sum((tables[1], head[1]))
    for one, other in (factors, tables, tied):
        joined = Rows.cat([Rows({"a": one}), Rows({"a": other})]).blocks["a"]
        assert type(joined) is type(one)
        torch.testing.assert_close(joined.dense(), torch.cat([one.dense(), other.dense()]))


def test_rows_of_images_of_several_sizes_and_of_very_long_texts_are_joined() -> None:
    window = Window((3, 3), (1, 1), (1, 1), True)
    images = [Conv(randn(2, 9, s - 2, s - 2), randn(2, 7, s, s), window) for s in (3, 4)]
    long = Outer(randn(2, 3, 3), randn(2, 3, 4)), Outer(randn(1, 900, 3), randn(1, 900, 4))
    for (one, other), form in ((images, Outer), (long, Dense)):
        joined = Rows.cat([Rows({"a": one}), Rows({"a": other})]).blocks["a"]
        assert type(joined) is form
        torch.testing.assert_close(joined.dense(), torch.cat([one.dense(), other.dense()]))


class ReadsTheFirst(nn.Module):
    """Positions are mixed once, behind which only the first is read; positions beyond a text's length are masked."""

    def __init__(self, width: int = WIDTH) -> None:
        super().__init__()
        self.every, self.first, self.head = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, width), nn.Linear(width, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        there = (x[..., :1] != 0).to(x)
        h = torch.tanh(self.every(x)) * there
        h = torch.cat([h.cumsum(1).flip(1)[:, :1], h[:, 1:]], 1)
        outputs: Tensor = self.head(torch.tanh(self.first(h)))[:, 0]
        return outputs


def texts(n: int, positions: int = 6) -> tuple[Tensor, Tensor]:
    """Of lengths 1 to all positions, filled up with zeros."""
    lengths = torch.arange(n) % positions + 1
    x = randn(n, positions, WIDTH) * (torch.arange(positions) < lengths[:, None])[..., None]
    return x, torch.arange(n) % CLASSES


def fitted(curvature: Any, problem: ptif.Problem, memory: Budget | None = None) -> tuple[Kronecker, Derivatives]:
    derivatives = Derivatives.of(problem)
    operator = curvature.of(derivatives, Form.SPECTRAL, memory or Budget())
    assert isinstance(operator, Kronecker)
    return operator, derivatives


@pytest.mark.parametrize("in_turn", [True, False])
def test_eigenvalues_do_not_depend_on_what_is_left_out(in_turn: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Reference: every example's gradient by autograd, in the basis."""
    monkeypatch.setattr(moments, "IN_TURN", 0 if in_turn else 1 << 20)
    torch.manual_seed(0)
    model, (x, y) = ReadsTheFirst().double(), texts(9)
    problem = ptif.Problem(model, ptif.CrossEntropy(), (x, y), batch_size=4)
    monkeypatch.setattr(KroneckerBlock, "factors_are_cheaper", lambda self, terms: True)
    operator, derivatives = fitted(EKFAC(EmpiricalFisher()), problem)
    assert {b.terms for b in next(derivatives.stream()).rows.blocks.values() if isinstance(b, Outer)} == {1, 4}
    flat = example_gradients(model, nn.functional.cross_entropy, x, y).split([p.numel() for p in model.parameters()], 1)
    parts = {k: g.view(9, *p.shape) for (k, p), g in zip(model.named_parameters(), flat, strict=True)}
    gradients = derivatives.space.from_parameters(parts)
    for name, block in operator.blocks.items():
        turned = block.left.T @ gradients.blocks[name].dense() @ block.right  # type: ignore[union-attr]
        torch.testing.assert_close(block.values, turned.square().mean(0), rtol=1e-9, atol=1e-14)


def test_a_layer_that_few_positions_reach_does_not_make_all_read_more() -> None:
    """Reference: second moments of the layers' inputs, over the examples that each needs."""
    torch.manual_seed(0)
    model, (x, y) = ReadsTheFirst(79).double(), texts(200, 12)
    problem = ptif.Problem(model, ptif.CrossEntropy(), (x, y))
    wide = spread_sample(200, 160)  # twice the longest side of 80, of one term each; 158 of them for a side of 79
    few = wide[spread_sample(160, 158)][spread_sample(158, 128)]
    basis, _ = fitted(EKFAC(EmpiricalFisher()), problem)
    in_turn, _ = fitted(EKFAC(EmpiricalFisher()), problem, Budget(500_000))
    mean, _ = fitted(KFAC(EmpiricalFisher()), problem)
    hidden = torch.tanh(model.first(first_position(model, x))).detach()
    every = torch.cat([x, torch.ones(200, 12, 1).double()], 2)[few][x[few, :, 0] != 0]
    inputs = {"every": every, "head": torch.cat([hidden, torch.ones(200, 1).double()], 1)[wide]}
    for name, uses in inputs.items():
        for operator in (basis, in_turn):
            right = operator.blocks[name].right
            assert right is not None
            turned = right.T @ (uses.T @ uses) @ right
            torch.testing.assert_close(turned, turned.diagonal().diag(), rtol=0, atol=1e-9 * float(turned.max()))
    assert float(mean.blocks["every"].values.sum()) > 0
    for name in basis.blocks:
        torch.testing.assert_close(basis.blocks[name].values, in_turn.blocks[name].values)


def first_position(model: ReadsTheFirst, x: Tensor) -> Tensor:
    h = torch.tanh(model.every(x)) * (x[..., :1] != 0)
    return h.cumsum(1).flip(1)[:, 0]


def test_solutions_are_written_out_at_once_where_many_gradients_will_come() -> None:
    """Turning four gradients takes 4 (9 + 25) multiply-adds, writing six rows out 6 * 15 * 8."""
    sides = [torch.linalg.qr(randn(d, d))[0] for d in (3, 5)]
    for expected, written in ((1000, True), (4, False)):
        rows = Turned(KroneckerBlock(*sides, torch.ones(3, 5)), (3, 5), randn(6, 3, 5))
        dense = Dense(sides[0] @ randn(6, 3, 5) @ sides[1].T)
        Rows({"a": rows}).expect(expected)
        gradients = Outer(randn(4, 1, 3), randn(4, 1, 5))
        torch.testing.assert_close(inner(gradients, rows), inner(gradients, dense))
        assert (rows.coordinates is None) == written


def test_gradients_written_out_in_the_cache_have_the_same_products(monkeypatch: pytest.MonkeyPatch) -> None:
    outer, dense = Outer(randn(7, 4, 6), randn(7, 4, 5)), Dense(randn(3, 6, 5))
    expected = torch.einsum("noi,moi->nm", outer.dense(), dense.values)
    monkeypatch.setattr(rows_module, "_CACHED", 20)
    monkeypatch.setattr(rows_module, "_WRITTEN_TOGETHER", 3)
    monkeypatch.setattr(rows_module, "_PANEL_ROWS", 2)
    torch.testing.assert_close(inner(outer, dense, Route.MATERIALISE), expected)


def test_small_batches_meet_many_queries_together(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model, data, queries = ReadsTheFirst().double(), texts(40), texts(400)
    counts: list[int] = []
    against = Rows.against

    def watched(self: Rows, training: Rows, *more: Any) -> Tensor:
        counts.append(len(training))
        return against(self, training, *more)

    monkeypatch.setattr(Rows, "against", watched)
    scores = []
    for batch_size in (2, 40):
        counts.clear()
        problem = ptif.Problem(model, ptif.CrossEntropy(), data, batch_size=batch_size)
        scores.append(ptif.methods.grad_dot().fit(problem).score(queries).values)
        assert sum(counts) == 40 and len(counts) <= 4
    torch.testing.assert_close(*scores)
