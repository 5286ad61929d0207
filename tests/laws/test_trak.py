"""Projections and TRAK against explicit float64 formulas with the explicit projection matrix."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import pytorch_influence_functions as ptif
from pytorch_influence_functions.core.errors import InvalidInput, SolveFailed
from pytorch_influence_functions.curvature import EKFAC, GGN, Budget, Hessian
from pytorch_influence_functions.curvature.base import Form
from pytorch_influence_functions.gradients import AbstractReduction, Gaussian, Sketch, TwoSided, projections, sketches
from pytorch_influence_functions.gradients.per_example import Derivatives
from pytorch_influence_functions.problem.data import Source
from pytorch_influence_functions.solvers import CG, Cholesky, Spectral, Woodbury
from tests.laws.test_influence import mlp, relative_gap

K = 12


def rows_of(problem: ptif.Problem, objective: Any = None, source: Any = None) -> Tensor:
    """Explicit gradients in the order of the blocks."""
    slabs = Derivatives.of(problem).stream(source, objective)
    return torch.cat([slab.rows.flat() for slab in slabs])


# The default and the others, all K = 12 numbers wide here.
PROJECTIONS = [None, Gaussian(K, seed=3), TwoSided(2, 3, seed=3), Sketch(K, seed=4)]


def matrix(problem: ptif.Problem, projection: AbstractReduction) -> Tensor:
    """P [parameters, k]: what the identity is projected to."""
    space = problem.space
    return projection.projector(space).apply(space.rows(torch.eye(space.size, dtype=torch.float64))).flat()


def setup() -> tuple[ptif.Problem, tuple[Tensor, Tensor], Tensor, Tensor, Tensor]:
    model, x, y, xq, yq = mlp()
    problem = ptif.Problem(model, ptif.CrossEntropy(), (x, y))
    source = Source.of((xq, yq))
    with torch.no_grad():
        p = F.softmax(model(x), 1).gather(1, y[:, None])[:, 0]
    return problem, (xq, yq), rows_of(problem, ptif.Margin()), rows_of(problem, ptif.Margin(), source), p


@pytest.mark.parametrize("projection", PROJECTIONS, ids=repr)
def test_trak_equals_its_formula(projection: AbstractReduction | None) -> None:
    problem, queries, margins, query_margins, p = setup()
    sketch = matrix(problem, projection or Sketch(K))
    phi, phi_q = margins @ sketch, query_margins @ sketch
    lam = 1e-3
    kernel = torch.linalg.inv(phi.T @ phi + len(phi) * lam * torch.eye(sketch.shape[1]).double())
    trak = phi_q @ kernel @ phi.T * (1 - p)
    method = ptif.trak(K, damping=lam) if projection is None else ptif.trak(projection=projection, damping=lam)
    scores = method.fit(problem).score(queries, measure=ptif.Margin())
    assert relative_gap(scores.values, -trak) < 1e-8
    assert not scores.lower_is_better
    dot = -phi_q @ phi.T * (1 - p) / len(phi)
    assert relative_gap(dot, -trak) > 0.5
    for solver in (Woodbury(), Cholesky()):
        other = replace(method, solver=solver).fit(problem).score(queries, measure=ptif.Margin())
        assert relative_gap(other.values, -trak) < 1e-8


@pytest.mark.parametrize("projection", [None, Gaussian(K, per_layer=True, seed=1), TwoSided(2, seed=1)], ids=repr)
def test_kernels_of_single_layers_add_up(projection: AbstractReduction | None) -> None:
    problem, queries, margins, query_margins, p = setup()
    lam, total, at = 1e-3, 0.0, 0
    reduction = projection or Sketch(K, per_layer=True)
    parts = matrix(problem, reduction)
    for name, part in problem.space.slices.items():
        k = reduction.reduced(problem.space).blocks[name].numel
        sketch = parts[part, at : at + k]
        at += k
        phi, phi_q = margins[:, part] @ sketch, query_margins[:, part] @ sketch
        kernel = torch.linalg.inv(phi.T @ phi + len(phi) * lam * torch.eye(k).double())
        total = total + phi_q @ kernel @ phi.T * (1 - p)
    k = K if projection is None else None
    method = ptif.trak(k, per_layer=True, damping=lam, projection=projection)
    scores = method.fit(problem).score(queries, measure=ptif.Margin())
    assert relative_gap(scores.values, -torch.as_tensor(total)) < 1e-8


def test_inner_products_are_kept_up_to_one_over_root_k() -> None:
    problem, *_ = setup()
    g = F.normalize(rows_of(problem), dim=1)
    gaps = []
    for k in (8, 32):
        found = [g @ matrix(problem, Gaussian(k, seed=s)) for s in range(40)]
        gaps.append(float(torch.stack([(z @ z.T - g @ g.T).square().mean() for z in found]).mean()) ** 0.5)
    assert gaps[0] / gaps[1] == pytest.approx(2.0, rel=0.25)
    # Var <Pa, Pb> = (|a|^2 |b|^2 + <a, b>^2) / k
    assert gaps[1] == pytest.approx(float((1 + (g @ g.T).square()).mean() / 32) ** 0.5, rel=0.25)


@pytest.mark.parametrize("make", [Gaussian, Sketch])
def test_the_seed_alone_decides(make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither batches nor what is kept or worked on at once."""
    problem, queries, *_ = setup()
    one = ptif.trak(projection=make(K, seed=5)).fit(problem).score(queries).values
    monkeypatch.setattr(projections, "_KEPT", 0)
    monkeypatch.setattr(sketches, "_CACHED", 20)
    monkeypatch.setattr(sketches, "_WRITTEN_OUT", 60)
    again = ptif.trak(projection=make(K, seed=5)).fit(problem.with_(batch_size=7)).score(queries).values
    torch.testing.assert_close(again, one)
    assert relative_gap(ptif.trak(projection=make(K, seed=6)).fit(problem).score(queries).values, one) > 0.05


def test_self_influence_top_lists_decay_and_checkpoints() -> None:
    problem, queries, *_ = setup()
    spec = ptif.Influence(GGN(), Spectral(), 1e-2, projection=Gaussian(K))
    sketch = matrix(problem, Gaussian(K))
    g = rows_of(problem) @ sketch
    exact = GGN().of(Derivatives.of(problem), Form.MATRIX, Budget()).matrix  # type: ignore[attr-defined]
    inverse = torch.linalg.inv(sketch.T @ exact @ sketch + (1e-2 + 0.3) * torch.eye(K).double())
    decayed = spec.fit(problem.with_(weight_decay=0.3))
    torch.testing.assert_close(decayed.self_influence(), ((g @ inverse) * g).sum(1) / len(g))
    whole, few = decayed.score(queries), decayed.score(queries, top=3)
    torch.testing.assert_close(few.top(3).values, whole.top(3).values)
    state = {k: v.clone() for k, v in problem.model.state_dict().items()}
    twice = spec.fit(problem.with_(checkpoints=[state, state], weight_decay=0.3)).score(queries)
    torch.testing.assert_close(twice.values, whole.values)


def test_a_sketch_that_tells_every_example_apart_needs_damping() -> None:
    model, x, y, *_ = mlp(n=8)
    problem = ptif.Problem(model, ptif.CrossEntropy(), (x, y))
    with pytest.raises(SolveFailed, match="positive damping"):
        ptif.trak(20, damping=0.0).fit(problem)


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        (lambda: ptif.trak(10**6), "no smaller than the"),
        (
            lambda: ptif.Influence(GGN(), CG(), 0.1, projection=Gaussian(K)),
            "cannot take a projection",
        ),
        (
            lambda: ptif.Influence(EKFAC(), projection=Gaussian(K)),
            "cannot take a projection",
        ),
        (
            lambda: ptif.Influence(Hessian(), projection=Gaussian(K)),
            "cannot take a projection",
        ),
        (lambda: Gaussian(0), "at least 1"),
        (
            lambda: ptif.trak(K, projection=Gaussian(K)),
            r"^trak\(\) got k=12 and projection=Gaussian\(k=12\), which",
        ),
        (lambda: ptif.trak(seed=3, projection=Gaussian(K)), r"^trak\(\) got seed=3 and projection="),
        (lambda: ptif.trak(projection=512), r"^projection= must be a projection such as Sketch\(1024\), got 512"),
        (
            lambda: ptif.trak(per_layer=True, projection=Sketch(K)),
            r"mixes all layers; leave per_layer out, or use",
        ),
    ],
)
def test_what_cannot_be_projected_is_refused(spec: Any, words: str) -> None:
    model, x, y, *_ = mlp()
    with pytest.raises(InvalidInput, match=words):
        spec().fit(ptif.Problem(model, ptif.CrossEntropy(), (x, y)))


def test_decay_that_differs_or_is_carried_by_examples_is_refused() -> None:
    model, x, y, *_ = mlp()
    for decay, words in (({"0.weight": 0.1}, "differs"), (ptif.WeightDecay(0.1, per_example=True), "every example")):
        problem = ptif.Problem(model, ptif.CrossEntropy(), (x, y), weight_decay=decay)
        with pytest.raises(InvalidInput, match=words):
            ptif.trak(K).fit(problem)
