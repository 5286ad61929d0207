"""`attribution.spectrum()`: every number by a dense float64 decomposition, estimates within their stated error."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import pytorch_influence_functions as ptif
from pytorch_influence_functions.core.errors import InvalidInput
from pytorch_influence_functions.curvature import EKFAC, GGN, KFAC, EmpiricalFisher, Hessian, Identity
from pytorch_influence_functions.linalg.lanczos import estimate_density
from pytorch_influence_functions.solvers import CG, Spectral, Woodbury

F64 = torch.float64
N = 12


def _problem(n: int = N, decay: Any = 0.0) -> ptif.Problem:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()
    return ptif.Problem(
        model, ptif.CrossEntropy(), (torch.randn(n, 4, dtype=F64), torch.arange(n) % 3), weight_decay=decay
    )


def _queries() -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(5)
    return torch.randn(6, 4, generator=g, dtype=F64), torch.arange(6) % 3


def _dense(curvature: Any, problem: ptif.Problem) -> Tensor:
    found: Tensor = ptif.Influence(curvature, Spectral(), 10.0).fit(problem).members[0].operator.matrix
    return found


def _gradients(problem: ptif.Problem) -> Tensor:
    member = ptif.Influence(GGN(), Spectral(), 1.0).fit(problem).members[0]
    from pytorch_influence_functions.problem.data import Source

    return torch.cat([s.rows.flat() for s in member.derivatives.stream(Source.of(_queries(), 3))])


EXACT = {
    "dense GGN": (GGN(), Spectral()),
    "dual GGN": (GGN(), Woodbury()),
    "dual Fisher": (EmpiricalFisher(), Woodbury()),
    "Hessian": (Hessian(), Spectral()),
}


@pytest.mark.parametrize("n", [N, 40])
@pytest.mark.parametrize("name", EXACT)
def test_equals_the_dense_decomposition(name: str, n: int) -> None:
    curvature, solver = EXACT[name]
    problem, lam = _problem(n, decay=0.01), 0.05 if name != "Hessian" else 5.0
    spectrum = ptif.Influence(curvature, solver, lam).fit(problem).spectrum(_queries())
    c = _dense(curvature, problem)
    values = torch.linalg.eigvalsh(c)
    d = lam + 0.01
    assert spectrum.exact and spectrum.trace_error == spectrum.effective_dimension_error == 0.0
    assert spectrum.parameters == len(c) and spectrum.damping == lam
    assert spectrum.largest == pytest.approx(float(values[-1]), rel=1e-9)
    assert spectrum.smallest == pytest.approx(float(values[0]), rel=1e-6, abs=1e-14)
    assert spectrum.trace == pytest.approx(float(c.trace()), rel=1e-9)
    assert spectrum.effective_dimension == pytest.approx(float((values / (values + d)).sum()), rel=1e-9)
    g = _gradients(problem)
    wanted = ((g @ torch.linalg.inv(c + d * torch.eye(len(c), dtype=F64))) * g).sum(1) * d / g.square().sum(1)
    torch.testing.assert_close(spectrum.lost, wanted, rtol=1e-8, atol=0)
    edges, counts = spectrum.density(20)
    assert len(edges) == 21 and float(counts.sum()) == pytest.approx(len(c))
    mean = sum(m * problem.space.numel(k) for k, m in spectrum.block_means.items())
    assert mean == pytest.approx(spectrum.trace, rel=1e-9) and spectrum.mean == pytest.approx(mean / len(c))


@pytest.mark.parametrize("curvature", [KFAC(), EKFAC(), Identity()], ids=repr)
def test_operators_that_know_their_eigenvalues(curvature: Any) -> None:
    problem = _problem()
    fitted = ptif.Influence(curvature, Spectral(), 0.1).fit(problem)
    operator, p = fitted.members[0].operator, problem.space.size
    c = operator.apply(problem.space.rows(torch.eye(p, dtype=F64))).flat()
    values = torch.linalg.eigvalsh((c + c.T) / 2)
    spectrum = fitted.spectrum()
    assert spectrum.exact and spectrum.lost is None
    assert spectrum.largest == pytest.approx(float(values[-1]), rel=1e-8)
    assert spectrum.effective_dimension == pytest.approx(float((values / (values + 0.1)).sum()), rel=1e-8)


def test_quadrature_lies_within_its_error_and_sees_the_ends() -> None:
    problem = _problem(40)
    fitted = ptif.Influence(GGN(), CG(rtol=1e-10), 0.02).fit(problem)
    values = torch.linalg.eigvalsh(_dense(GGN(), problem))
    trace, dimension = float(values.sum()), float((values / (values + 0.02)).sum())
    spectrum = fitted.spectrum(_queries(), probes=16)
    assert not spectrum.exact and "±" in str(spectrum) and "16 probes" in str(spectrum)
    assert 0 < spectrum.trace_error < 0.3 * trace
    assert abs(spectrum.trace - trace) < 4 * spectrum.trace_error
    assert abs(spectrum.effective_dimension - dimension) < 4 * spectrum.effective_dimension_error
    assert spectrum.largest == pytest.approx(float(values[-1]), rel=1e-6)
    exact = ptif.Influence(GGN(), Spectral(), 0.02).fit(problem).spectrum(_queries())
    torch.testing.assert_close(spectrum.lost, exact.lost, rtol=1e-6, atol=0)
    # The stated error is the real one: over seeds, errors in units of it are about standard.
    operator = fitted.members[0].operator
    scores = []
    for seed in range(12):
        found, error = estimate_density(operator, steps=20, probes=16, seed=seed, dtype=F64).sum(lambda x: x)
        scores.append((found - trace) / error)
    assert 0.4 < float(torch.tensor(scores).square().mean().sqrt()) < 2.0


def test_quadrature_is_exact_where_every_probe_is() -> None:
    problem = _problem(40)
    operator = ptif.Influence(Identity(), Spectral(), 0.1).fit(problem).members[0].operator
    found = estimate_density(operator, steps=10, probes=2, dtype=F64)
    assert found.sum(lambda x: x)[0] == pytest.approx(problem.space.size)
    assert found.extremes == pytest.approx((1.0, 1.0))


def test_words_and_density_name_negative_curvature() -> None:
    problem = _problem()
    spectrum = ptif.Influence(Hessian(), Spectral(), 10.0).fit(problem).spectrum(_queries())
    assert spectrum.smallest < 0 and "(negative curvature)" in str(spectrum)
    edges, counts = spectrum.density(7)
    assert float(edges[0]) < spectrum.smallest and float(counts.sum()) == pytest.approx(problem.space.size)
    assert "lost to damping" in str(spectrum) and "block 0" in str(spectrum)


def test_bad_input_is_refused_in_words() -> None:
    fitted = ptif.Influence(GGN(), CG(), 0.1).fit(_problem())
    with pytest.raises(InvalidInput, match=r"^spectrum\(probes=1\) must be a whole number of at least 2"):
        fitted.spectrum(probes=1)
    with pytest.raises(InvalidInput, match="use fewer probes or steps"):
        fitted.spectrum(probes=1 << 28)
    with pytest.raises(InvalidInput, match=r"^bins=0 must be a whole number of at least 1"):
        fitted.spectrum().density(0)
    with pytest.raises(InvalidInput, match="must be 0; checkpoints are counted from 0"):
        fitted.spectrum(checkpoint=3)


@pytest.mark.parametrize("solver", [Spectral(), Woodbury(), CG(rtol=1e-10)], ids=repr)
def test_diagnostics_tell_what_is_free(solver: Any) -> None:
    # The dual decomposes its Gram matrix for the second damping.
    fitted = ptif.Influence(GGN(), solver, 1.0).fit(_problem()).with_damping(0.1)
    scores, spectrum = fitted.score(_queries()), fitted.spectrum(_queries())
    told = scores.diagnostics
    assert spectrum.lost is not None
    assert told.lost_to_damping == pytest.approx(float(spectrum.lost.float().median()), rel=1e-5)
    line = next(str(c) for c in told.checks() if c.name == "damping")
    assert "of a query's squared gradient norm" in line
    if spectrum.exact:
        assert told.effective_dimension == pytest.approx(spectrum.effective_dimension, rel=1e-9)
        assert f"effective dimension {told.effective_dimension:,.4g}" in line
    else:
        assert told.effective_dimension != told.effective_dimension and "effective" not in line
    again = ptif.Diagnostics.from_dict(told.to_dict())
    assert again.lost_to_damping == told.lost_to_damping
    old = {k: v for k, v in told.to_dict().items() if k not in ("lost_to_damping", "effective_dimension")}
    assert "lambda = 0.1" in str(ptif.Diagnostics.from_dict(old))
