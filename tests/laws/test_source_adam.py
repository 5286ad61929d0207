"""SOURCE after Adam in Kronecker eigenbases: exact where Adam's diagonal commutes with the curvature."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import pytorch_influence_functions as ptif
from pytorch_influence_functions.core.errors import InvalidInput
from pytorch_influence_functions.curvature import EKFAC, GGN, KFAC, Identity, Shampoo
from pytorch_influence_functions.curvature.base import AbstractCurvature, Budget, Form
from pytorch_influence_functions.gradients.per_example import Derivatives
from pytorch_influence_functions.linalg.kronecker import Kronecker
from pytorch_influence_functions.linalg.operator import apply_flat
from pytorch_influence_functions.trajectory import SOURCE, AdamState, Segment
from tests.laws.test_influence import cross_entropy, mlp, relative_gap
from tests.laws.test_source import at, dense_source, flow, moved, one, problem_of, values
from tests.oracles.autograd import example_gradients

Data = tuple[nn.Module, Tensor, Tensor, Tensor, Tensor]
EPS = 1e-3


def axes() -> Data:
    """One linear layer whose inputs lie on the axes: its curvature is diagonal, as Adam's preconditioner is."""
    torch.manual_seed(0)
    x = torch.eye(5).double().repeat(4, 1) * torch.linspace(0.3, 2.0, 20).double()[:, None]
    y = torch.randn(20, 3).double()
    model = nn.Linear(5, 3, bias=False).double()
    return model, x, y, torch.randn(4, 5).double(), torch.randn(4, 3).double()


def uneven(model: nn.Module, seed: int = 3) -> dict[str, Tensor]:
    """Second moments that differ between all weights."""
    return {k: v.square() * 0.1 + 0.01 for k, v in moved(model, 1.0, seed).items()}


def even(model: nn.Module) -> dict[str, Tensor]:
    """Second moments that are the same within a layer."""
    return {k: torch.full_like(v, 0.04) for k, v in model.state_dict().items()}


@pytest.mark.parametrize("curvature", [EKFAC(GGN()), KFAC(GGN()), Shampoo(GGN())])
@pytest.mark.parametrize("decoupled", [0.0, 0.03])
def test_a_diagonal_curvature_is_met_exactly(curvature: AbstractCurvature, decoupled: float) -> None:
    data = axes()
    adam = AdamState(uneven(data[0]), EPS, decoupled)
    segments = [one(moved(data[0], 0.2), 0.02, 30, adam=adam), one(data[0].state_dict(), 0.01, 40, adam=adam)]
    want = values(data, SOURCE(segments, GGN()), loss=ptif.SquaredError(), weight_decay=0.02)
    assert relative_gap(values(data, SOURCE(segments, curvature), weight_decay=0.02), want) < 1e-9
    without = [one(s.checkpoint_tuple[0], 0.02, 30) for s in segments]
    assert relative_gap(values(data, SOURCE(without, curvature), weight_decay=0.02), want) > 0.1


def test_one_moment_per_layer_is_met_exactly() -> None:
    torch.manual_seed(1)
    x, y = torch.randn(12, 4).double(), torch.randn(12, 2).double()
    data = nn.Linear(4, 2).double(), x, y, x[:3] + 0.1, y[:3]
    adam = AdamState(even(data[0]), EPS, 0.01)
    segments = [one(moved(data[0], 0.2), 0.02, 30, adam=adam), one(data[0].state_dict(), 0.01, 40, adam=adam)]
    want = values(data, SOURCE(segments, GGN()))
    assert relative_gap(values(data, SOURCE(segments, EKFAC(GGN()))), want) < 1e-9


def diagonal_in_basis(problem: ptif.Problem, adam: AdamState, decay: float) -> tuple[Tensor, Tensor]:
    """(P, H + D / P) as dense matrices that share the eigenvectors of EK-FAC, written out."""
    operator = EKFAC(GGN()).of(Derivatives.of(problem), Form.SPECTRAL, Budget())
    assert isinstance(operator, Kronecker)
    eye = torch.eye(problem.space.size, dtype=torch.float64)
    h = apply_flat(operator, eye)
    denominators = torch.cat([(adam.second_moments[k].sqrt() + adam.eps).flatten() for k in ("0.weight", "2.weight")])
    parts = []
    start = 0
    for block in operator.blocks.values():
        assert block.left is not None and block.right is not None
        q = torch.kron(block.left, block.right)
        d = denominators[start : start + len(q)]
        parts.append(q @ (1 / (q.square().T @ d)).diag() @ q.T)
        start += len(q)
    p = torch.block_diag(*parts)
    return p, h + decay * torch.linalg.inv(p)


def test_the_formula_in_the_eigenbasis() -> None:
    torch.manual_seed(2)
    model = nn.Sequential(nn.Linear(4, 3, bias=False), nn.Tanh(), nn.Linear(3, 2, bias=False)).double()
    x, y = torch.randn(15, 4).double(), torch.arange(15) % 2
    xq, yq = torch.randn(3, 4).double(), torch.arange(3) % 2
    data = model, x, y, xq, yq
    adam, state = AdamState(uneven(model), EPS, 0.05), moved(model, 0.3)
    p, h = at(model, state, lambda m: diagonal_in_basis(problem_of(data), adam, 0.05))
    g = at(model, state, lambda m: example_gradients(m, cross_entropy, x, y))
    want = dense_source(example_gradients(model, cross_entropy, xq, yq), [flow(h, 0.6, p)], [g])
    scores = SOURCE([one(state, 0.02, 30, adam=adam)], EKFAC(GGN())).fit(problem_of(data)).score((xq, yq))
    assert relative_gap(scores.values, want) < 1e-9
    assert scores.diagnostics.residual_max < 1e-9


def test_it_is_near_the_dense_formula_where_nothing_commutes() -> None:
    data = mlp()
    adam = AdamState(uneven(data[0]), EPS)
    segments = [one(moved(data[0], 0.3, s), 0.02, 30, adam=adam) for s in (1, 2)]

    def correlation(method: SOURCE) -> float:
        pair = torch.stack([values(data, method).flatten(), values(data, SOURCE(segments, GGN())).flatten()])
        return float(torch.corrcoef(pair)[0, 1])

    near = correlation(SOURCE(segments, EKFAC(GGN())))
    plain = correlation(SOURCE([one(s.checkpoint_tuple[0], 0.02, 30) for s in segments], EKFAC(GGN())))
    assert near > 0.9 and near > plain + 0.05, (near, plain)


def test_directions_that_no_gradient_has_move_no_score() -> None:
    """Adam divides a weight that never had a gradient by eps alone: a step of 1e8 there must not drown the others."""
    torch.manual_seed(0)
    x, y = torch.randn(30, 6), torch.arange(30) % 3
    x[:, 2] = 0.0  # an input that is always 0
    model = nn.Linear(6, 3, bias=False)
    queries = torch.randn(4, 6), torch.arange(4) % 3
    moments = {"weight": torch.full((3, 6), 0.01)}
    moments["weight"][:, 2] = 0.0
    data, adam = (model, x, y, *queries), AdamState(moments)
    narrow = values(data, SOURCE([one(model.state_dict(), 0.01, 50, adam=adam)], EKFAC(GGN())))
    wide_data = (model.double(), x.double(), y, queries[0].double(), queries[1])
    wide = values(wide_data, SOURCE([one(model.state_dict(), 0.01, 50, adam=adam)], GGN()))
    assert torch.corrcoef(torch.stack([narrow.double().flatten(), wide.flatten()]))[0, 1] > 0.99


def test_a_stretch_has_the_mean_of_its_moments(tmp_path: Path) -> None:
    model = nn.Linear(3, 2)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
    states = []
    with ptif.Recorder(model, optimizer, tmp_path, steps=2, at=(0.5, 1.0)) as recorder:
        for step in range(2):
            optimizer.zero_grad()
            (model(torch.randn(4, 3)).square().sum() * (1 + step)).backward()
            optimizer.step()
            states.append(AdamState.of(optimizer, model).second_moments["weight"].clone())
    (segment,) = recorder.recording.segments(1)
    assert segment.adam is not None
    torch.testing.assert_close(segment.adam.second_moments["weight"], (states[0] + states[1]) / 2)


def test_a_curvature_without_an_eigenbasis_is_refused() -> None:
    adam = AdamState({"weight": torch.ones(2, 3)})
    with pytest.raises(InvalidInput, match=r"^SOURCE's Adam form multiplies .*Identity.*use EKFAC\(\), or"):
        SOURCE(Segment(nn.Linear(3, 2).state_dict(), 0.1, 10, adam=adam), Identity())
