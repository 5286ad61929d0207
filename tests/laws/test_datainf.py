"""Laws of DataInf: its formula, example by example in float64, and honesty about what it does not solve."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import pytorch_influence_functions as ptif
from pytorch_influence_functions.core.errors import InvalidInput, NonFinite
from pytorch_influence_functions.linalg.gram import Gram
from pytorch_influence_functions.linalg.shift import Shift
from pytorch_influence_functions.solvers.datainf import DataInf
from tests.laws.solver_cases import (
    F64,
    a_space,
    dense_gram,
    dense_residual,
    dense_solve,
    outer_rows,
    some_rows,
    uneven,
    worst,
)
from tests.laws.test_influence import SMALL, cross_entropy, mlp, oracle, relative_gap
from tests.oracles.autograd import example_gradients


def loop(g: Tensor, d: Tensor, parts: list[slice], b: Tensor) -> Tensor:
    """(1/N) sum_j (g_j g_j^T + D)^-1 b in every part, one dense inverse per example."""
    out = torch.zeros_like(b)
    for part in parts:
        for row in g[:, part]:
            out[:, part] += torch.linalg.solve(torch.outer(row, row) + d[part].diag(), b[:, part].T).T / len(g)
    return out


@pytest.mark.parametrize("terms", [1, 3])
@pytest.mark.parametrize("shift", ["uniform", "uneven"])
def test_it_is_the_mean_of_the_inverses(shift: str, terms: int) -> None:
    space = a_space()
    rows, b = outer_rows(space, 12, terms=terms), some_rows(space, 3, seed=1)
    gram = Gram(space, rows, 12)
    given = Shift(0.03) if shift == "uniform" else uneven(space)
    d = torch.cat([torch.full((space.numel(k),), v, dtype=F64) for k, v in given.over(space.blocks).items()])
    solution = DataInf().solve(DataInf().init(gram, given), b)
    parts = list(space.slices.values())
    assert worst(solution.unwrap().flat(), loop(rows.flat(), d, parts, b.flat())) < 1e-12
    true = dense_residual(space, dense_gram(gram), given, solution.unwrap().flat(), b.flat())
    assert torch.allclose(solution.residual, true)
    assert float(solution.residual.min()) > 1e-3 and solution.notes["approximation"] == "DataInf"
    if shift == "uniform":
        whole = DataInf(per_block=False)
        solution = whole.solve(whole.init(gram, given), b)
        assert worst(solution.unwrap().flat(), loop(rows.flat(), d, [slice(None)], b.flat())) < 1e-12


def test_one_example_is_exact() -> None:
    space = a_space()
    gram, b, shift = Gram(space, outer_rows(space, 1), 1), some_rows(space, 2, seed=1), Shift(0.01)
    whole = DataInf(per_block=False)
    solution = whole.solve(whole.init(gram, shift), b)
    assert worst(solution.unwrap().flat(), dense_solve(space, dense_gram(gram), shift, b.flat())) < 1e-10
    assert float(solution.residual.max()) < 1e-8


def test_nan_on_the_right_is_named() -> None:
    space = a_space()
    gram, b = Gram(space, outer_rows(space, 4), 4), some_rows(space, 2).flat()
    b[1, 3] = float("nan")
    solution = DataInf().solve(DataInf().init(gram, Shift(0.1)), space.rows(b))
    with pytest.raises(NonFinite, match=r"Rows: 1\."):
        solution.unwrap()


def by_hand(data: Any, per_block: bool, damping: float | None) -> Tensor:
    model, x, y, xq, yq = data
    g, gq = example_gradients(model, cross_entropy, x, y), example_gradients(model, cross_entropy, xq, yq)
    sizes = [sum(p.numel() for p in m.parameters()) for m in (model[0], model[2])]
    parts = [slice(0, sizes[0]), slice(sizes[0], sum(sizes))] if per_block else [slice(None)]
    d = torch.empty(g.shape[1], dtype=F64)
    for part in parts:
        d[part] = 0.1 * g[:, part].square().sum() / len(g) / g[:, part].shape[1] if damping is None else damping
    return loop(g, d, parts, gq) @ g.T / len(g)


@pytest.mark.parametrize("damping", [None, SMALL])
@pytest.mark.parametrize("per_block", [True, False])
def test_scores_are_the_papers_formula(per_block: bool, damping: float | None) -> None:
    data = mlp()
    model, x, y, xq, yq = data
    method = ptif.methods.datainf(damping, per_block)
    got = ptif.attribute(model, (x, y), (xq, yq), loss=nn.CrossEntropyLoss(), method=method)
    want = by_hand(data, per_block, damping)
    assert relative_gap(got.values, want) < 1e-9
    dot = oracle("identity", data, 0.0)
    scale = (dot * want).sum() / (dot * dot).sum()
    assert relative_gap(scale * dot, want) > 0.05, "near a gradient dot product, but not one"
    assert got.diagnostics is not None and got.diagnostics.residual_max > 1e-3


def test_order_batches_dtype_and_self_scores() -> None:
    data = mlp()
    model, x, y, xq, yq = data

    def scores(x: Tensor, y: Tensor, batch: int = 64) -> Tensor:
        values: Tensor = ptif.attribute(
            model.to(x.dtype),
            (x, y),
            (xq.to(x.dtype), yq),
            loss=nn.CrossEntropyLoss(),
            method=ptif.methods.datainf(),
            batch_size=batch,
        ).values
        return values

    exact = scores(x, y)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    assert relative_gap(scores(x[order], y[order]), exact[:, order]) < 1e-10
    assert relative_gap(scores(x, y, 7), exact) < 1e-10
    own = ptif.methods.datainf().fit(ptif.Problem(model, nn.CrossEntropyLoss(), (x, y))).self_influence()
    want = by_hand((model, x, y, x, y), True, None).diagonal()
    assert torch.allclose(own, want, rtol=1e-9)
    assert relative_gap(scores(x.float(), y), exact) < 1e-3


def test_it_refuses_what_has_no_row_per_example() -> None:
    space = a_space()
    with pytest.raises(InvalidInput, match="one gradient row per example and got 6 rows for a count of 3"):
        DataInf().init(Gram(space, outer_rows(space, 6), 3), Shift(0.1))
    with pytest.raises(InvalidInput, match="one damping plus weight decay"):
        DataInf(per_block=False).init(Gram(space, outer_rows(space, 3), 3), uneven(space))
    with pytest.raises(InvalidInput, match="use a positive damping"):
        DataInf().init(Gram(space, outer_rows(space, 3), 3), Shift(0.0))
