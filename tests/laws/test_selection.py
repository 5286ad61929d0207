"""LESS and TrackStar by value: against their formulas on one-example autograd gradients in float64."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import pytorch_influence_functions as ptif
from pytorch_influence_functions.core.errors import InvalidInput
from pytorch_influence_functions.gradients import Rescaled, Sketch
from pytorch_influence_functions.methods import less, trackstar
from pytorch_influence_functions.trajectory import AdamState, Recording
from tests.laws.test_influence import cross_entropy, relative_gap
from tests.laws.test_source import at
from tests.oracles.autograd import example_gradients
from tests.tolerance import gap

BETA2, EPS = 0.9, 1e-6


def data() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(0)
    x, y = torch.randn(23, 4, generator=g).double(), torch.arange(23) % 3
    return x[:20], y[:20], x[20:], y[20:]


def recorded(folder: Path) -> tuple[nn.Module, Recording, list[dict[str, Tensor]], list[Tensor]]:
    """A short run of AdamW: the model, its recording, and weights and flat second moments at each checkpoint."""
    torch.manual_seed(1)
    x, y, *_ = data()
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05, betas=(0.8, BETA2), eps=EPS)
    states, moments = [], []
    with ptif.Recorder(model, optimizer, folder, steps=6, at=(0.5, 1.0)) as recorder:
        for step in range(6):
            optimizer.param_groups[0]["lr"] = 0.05 / (1 + step)
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x[step::6]), y[step::6]).backward()
            optimizer.step()
            if step in (2, 5):
                states.append({k: v.clone() for k, v in model.state_dict().items()})
                entries = [optimizer.state[p]["exp_avg_sq"].flatten() for p in model.parameters()]
                moments.append(torch.cat(entries).clone())
    return model, recorder.recording, states, moments


@pytest.mark.parametrize("projection", [None, Sketch(7, seed=2)], ids=repr)
def test_less_is_the_cosine_with_adams_own_step(tmp_path: Path, projection: Sketch | None) -> None:
    model, run, states, moments = recorded(tmp_path)
    x, y, xq, yq = data()
    rates = [0.05 * (1 + 1 / 2 + 1 / 3) / 3, 0.05 * (1 / 4 + 1 / 5 + 1 / 6) / 3]
    want = torch.zeros(3, 20, dtype=torch.float64)
    own = torch.zeros(20, dtype=torch.float64)
    problem = ptif.Problem(model, ptif.CrossEntropy(), (x, y))

    def unit(flat: Tensor) -> Tensor:
        if projection is not None:
            flat = projection.projector(problem.space).apply(rows_of(problem, flat)).flat()
        return nn.functional.normalize(flat, dim=1)

    for rate, state, v, step in zip(rates, states, moments, (3, 6), strict=True):
        makes = [partial(example_gradients, loss=cross_entropy, xs=a, ys=b) for a, b in ((x, y), (xq, yq))]
        g, gq = (at(model, state, make) for make in makes)
        second = (BETA2 * v + (1 - BETA2) * g.square()) / (1 - BETA2 ** (step + 1))
        steps = unit(g / (second.sqrt() + EPS))
        want += rate * unit(gq) @ steps.T
        own += rate * (unit(g) * steps).sum(1)
    fitted = less(run, projection=projection).fit(problem)
    scores = fitted.score((xq, yq))
    assert relative_gap(scores.values, want) < 1e-6  # moments are recorded through float64 files
    assert gap(fitted.self_influence(), own) < 1e-6
    assert relative_gap(less(run, memory=400, projection=projection).fit(problem).score((xq, yq)).values, want) < 1e-6
    assert any("a ranking, not predicted changes" in note for note in scores.diagnostics.notes)
    assert scores.values[0].argmax() == scores.helpful(0, 1)[0][0]


@pytest.mark.parametrize("per_layer", [False, True])
def test_trackstar_is_the_whitened_cosine_of_rescaled_projections(tmp_path: Path, per_layer: bool) -> None:
    model, run, *_ = recorded(tmp_path)
    x, y, xq, yq = data()
    moments = run.adam_state().second_moments
    p = torch.cat([1 / (v.sqrt() + EPS).flatten() for v in (moments[k] for k, _ in model.named_parameters())])
    g, gq = (example_gradients(model, cross_entropy, a, b) * p for a, b in ((x, y), (xq, yq)))
    problem = ptif.Problem(model, ptif.CrossEntropy(), (x, y))
    projector = Sketch(6, seed=3, per_layer=per_layer).projector(problem.space)
    parts = [projector.apply(rows_of(problem, v)).blocks for v in (g, gq)]
    top, left, right = 0, 0, 0
    for name in projector.space.blocks:
        phi, phi_q = (v[name].dense().flatten(1) for v in parts)
        inverse = torch.linalg.inv(phi.T @ phi / 20 + 0.3 * torch.eye(6).double())
        top = top + phi_q @ inverse @ phi.T
        left = left + (phi_q @ inverse * phi_q).sum(1)
        right = right + (phi @ inverse * phi).sum(1)
    assert isinstance(top, Tensor) and isinstance(left, Tensor) and isinstance(right, Tensor)
    want = top / (left.sqrt()[:, None] * right.sqrt()) / 20
    scores = trackstar(run, 6, per_layer, damping=0.3, seed=3).fit(problem).score((xq, yq))
    assert relative_gap(scores.values, want) < 1e-8
    assert float(scores.values.abs().max()) <= 1 / 20
    plain = ptif.Influence(
        ptif.curvature.EmpiricalFisher(),
        damping=0.3,
        projection=Sketch(6, seed=3, per_layer=per_layer),
        solver=trackstar(run, 6, per_layer).solver,
        scaling=ptif.scaling.Whitened(),
    )
    assert relative_gap(plain.fit(problem).score((xq, yq)).values, want) > 0.05


def rows_of(problem: ptif.Problem, flat: Tensor) -> ptif.linalg.rows.Rows:  # type: ignore[name-defined]
    """Flat gradients in the order of the model's parameters as rows of its space."""
    shapes = {k: v.shape for k, v in problem.model.named_parameters()}
    parts = flat.split([s.numel() for s in shapes.values()], 1)
    return problem.space.from_parameters(
        {k: part.reshape(len(flat), *s) for (k, s), part in zip(shapes.items(), parts, strict=True)}
    )


def test_weights_that_never_had_a_gradient_take_no_part() -> None:
    moments = {"weight": torch.tensor([[1.0, 0.0, 4.0]])}
    projection = trackstar(AdamState(moments, eps=0.0 + 1e-8), 2).projection
    assert isinstance(projection, Rescaled)
    torch.testing.assert_close(projection.scales["weight"].float(), torch.tensor([[1.0, 0.0, 0.5]]))


def test_whitened_queries_and_examples_have_length_one() -> None:
    """The diagonal of the cosine of examples with themselves is 1 / N."""
    x, y, *_ = data()
    model = nn.Linear(4, 3).double()
    method = ptif.Influence(ptif.curvature.GGN(), damping=0.1, scaling=ptif.scaling.Whitened())
    scores = method.fit(ptif.Problem(model, ptif.CrossEntropy(), (x, y))).score((x, y)).values
    torch.testing.assert_close(scores.diagonal(), torch.full((20,), 1 / 20, dtype=torch.float64))


def test_a_projection_that_is_none_is_refused(tmp_path: Path) -> None:
    _, run, *_ = recorded(tmp_path)
    with pytest.raises(InvalidInput, match=r"^projection= must be a projection such as Sketch\(8192\), got 8192"):
        less(run, projection=8192)  # type: ignore[arg-type]
    with pytest.raises(InvalidInput, match=r"^per_layer=True gives every layer a kernel of its own, and proj"):
        trackstar(run, projection=Sketch(7))


def test_a_run_without_adam_is_refused(tmp_path: Path) -> None:
    model = nn.Linear(4, 3)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with ptif.Recorder(model, optimizer, tmp_path, steps=1, at=(1.0,)) as recorder:
        optimizer.step()
    with pytest.raises(InvalidInput, match=r"^LESS follows Adam's steps, and at step 1 .* use ptif.methods.grad_cos"):
        less(recorder.recording)
    with pytest.raises(InvalidInput, match=r"^The run was not trained by Adam as far as is known"):
        trackstar(recorder.recording)


def test_less_is_asked_for_means_and_some_examples_and_refuses_parts(tmp_path: Path) -> None:
    model, run, *_ = recorded(tmp_path)
    x, y, xq, yq = data()
    mean = ptif.attribute(model, (x, y), (xq, yq), method=less(run), aggregate="mean")
    some = ptif.attribute(model, (x, y), (xq, yq), method=less(run), aggregate="mean", ids=[3, 7])
    assert mean.values.shape == (1, 20)
    assert gap(some.values, mean.values[:, [3, 7]]) < 1e-10
    with pytest.raises(InvalidInput, match=r"^Less takes no by=; leave it out, or use ptif\.ekfac\(\)\.$"):
        ptif.attribute(model, (x, y), (xq, yq), method=less(run), by="layer")


def test_a_method_of_a_run_by_its_name(tmp_path: Path) -> None:
    model, run, *_ = recorded(tmp_path)
    x, y, xq, yq = data()
    asked = (model, (x, y), (xq, yq))
    expected = ptif.attribute(*asked, method=less(run)).values
    for method in ("less", less):
        assert relative_gap(ptif.attribute(*asked, method=method, run=run).values, expected) < 1e-9
    with pytest.raises(InvalidInput, match=r"Sketch\(k=2048, per_layer=True\) is no smaller than the 43 parameters"):
        ptif.attribute(*asked, method="trackstar", run=run)
