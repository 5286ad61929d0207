"""Metrics against definitions, closed forms and scipy; noise ceilings against simulation."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats
from sklearn.metrics import roc_auc_score
from torch import Tensor, nn

import pytorch_influence_functions as ptif
from pytorch_influence_functions import Scores
from pytorch_influence_functions.core.errors import InvalidInput, NonFinite, UnknownName
from pytorch_influence_functions.curvature import GGN, Hessian
from pytorch_influence_functions.damping import Absolute
from pytorch_influence_functions.evaluation import (
    Recipe,
    Subsets,
    Truth,
    correlate,
    evaluate,
    found_when_checking,
    lds,
    mislabel_auc,
    noise_ceiling,
    pbrf,
    precision_at,
    removal_correlation,
    removal_curves,
    removal_slope,
    retrain,
    top_overlap,
    train_model,
    verify,
)
from pytorch_influence_functions.scaling import Leverage
from pytorch_influence_functions.solvers import Cholesky

N, Q, S = 30, 7, 60


def additive(scores: Tensor, noise: float = 0.0, seeds: int = 1, subsets: Subsets | None = None) -> Truth:
    """A truth where scores add up exactly, but for noise."""
    parts = Subsets.halves(scores.shape[1], S) if subsets is None else subsets
    exact = (~parts.kept).double() @ scores.double().T
    generator = torch.Generator().manual_seed(5)
    draws = torch.randn(len(parts), seeds, len(scores), generator=generator, dtype=torch.float64)
    base = torch.zeros(seeds, len(scores), dtype=torch.float64)
    return Truth(parts, exact[:, None] + noise * draws, base, tuple(range(seeds)))


def drawn(seed: int = 0, shape: tuple[int, int] = (Q, N)) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def test_ranks_and_correlations_are_scipys() -> None:
    generator = torch.Generator().manual_seed(0)
    a = torch.randint(0, 6, (4, 25), generator=generator).double()  # many ties
    b = torch.randn(4, 25, generator=generator, dtype=torch.float64)
    for function, other in ((correlate.spearman, stats.spearmanr), (correlate.pearson, stats.pearsonr)):
        found = correlate.per_query(function, a, b)
        assert found.tolist() == pytest.approx([other(x, y).statistic for x, y in zip(a, b, strict=True)], abs=1e-12)
    slopes = correlate.per_query(correlate.slope, a, b)
    assert slopes.tolist() == pytest.approx([stats.linregress(x, y).slope for x, y in zip(a, b, strict=True)])


def test_weighted_ranks_are_ranks_of_the_repeated_sample() -> None:
    generator = torch.Generator().manual_seed(0)
    a = torch.randint(0, 6, (3, 12), generator=generator).double()
    b = torch.randn(3, 12, generator=generator, dtype=torch.float64)
    picked = torch.randint(12, (5, 12), generator=generator)
    weights = torch.stack([torch.bincount(p, minlength=12) for p in picked]).double()
    found = correlate.spearman(a, b, weights)
    for row, p in zip(found, picked, strict=True):
        expected = [stats.spearmanr(a[q, p], b[q, p]).statistic for q in range(3)]
        assert row.tolist() == pytest.approx(expected, abs=1e-12)


def test_lds_of_the_truth_is_one_and_of_random_is_zero_within_its_interval() -> None:
    scores = drawn()
    truth = additive(scores)
    exact = lds(scores, truth)
    assert exact.value == pytest.approx(1.0) and exact.low == pytest.approx(1.0)
    # Many examples: a fixed draw is then hardly related to the truth's own scores.
    wide = additive(drawn(shape=(Q, 2000)))
    misses = 0
    for seed in range(1, 21):
        estimate = lds(drawn(seed, (Q, 2000)), wide, resamples=300)
        misses += not estimate.low <= 0 <= estimate.high
    # 95 % intervals: of 20 about one misses.
    assert misses <= 4
    assert lds(-scores, truth).value == pytest.approx(-1.0)


def test_lds_is_the_definition() -> None:
    truth = additive(drawn(), noise=2.0, seeds=3)
    scores = drawn(9) + drawn()
    measured = truth.measured.mean(1)
    each = [
        stats.spearmanr((scores[q].double() * ~truth.subsets.kept).sum(1), measured[:, q]).statistic for q in range(Q)
    ]
    assert lds(scores, truth).value == pytest.approx(float(np.mean(each)), abs=1e-12)


def test_the_interval_covers_the_long_run_value() -> None:
    scores, other = drawn(), drawn() + drawn(4)
    exact = additive(scores, subsets=Subsets.halves(N, 3000, seed=99))
    long_run = lds(other, exact, resamples=1).value
    inside = 0
    for seed in range(20):
        truth = additive(scores, subsets=Subsets.halves(N, 50, seed=seed))
        estimate = lds(other, truth, resamples=300)
        inside += estimate.low <= long_run <= estimate.high
    assert inside >= 16


@pytest.mark.parametrize("seeds", [2, 3, 4, 6])
def test_the_ceiling_is_what_perfect_scores_reach(seeds: int) -> None:
    scores = drawn(shape=(40, N))
    truth = additive(scores, noise=4.0, seeds=seeds, subsets=Subsets.halves(N, 200))
    ceiling = noise_ceiling(truth)
    reached = lds(scores, truth, resamples=1).value
    assert ceiling == pytest.approx(reached, abs=0.03)
    assert 0.3 < reached < 0.95
    assert noise_ceiling(truth.first(1)) is None


def test_paired_differences() -> None:
    truth = additive(drawn(), noise=1.0)
    good, poor = drawn() + 0.5 * drawn(3), drawn() + 2.0 * drawn(3)
    table = evaluate({"good": good, "poor": poor}, truth)
    gap = table.compare("good", "poor")
    assert gap.value == pytest.approx(table["good"].value - table["poor"].value)
    assert 0 < gap.low < gap.value < gap.high
    # Pairing takes out what both share: narrower than two intervals apart.
    apart = table["good"].high - table["good"].low + table["poor"].high - table["poor"].low
    assert gap.high - gap.low < apart
    other = lds(good, additive(drawn(), subsets=Subsets.drops(N, S)))
    with pytest.raises(InvalidInput, match="different protocols cannot be compared"):
        table["good"].minus(other)


def test_protocols_are_not_mixed() -> None:
    halves, singles = additive(drawn()), additive(drawn(), subsets=Subsets.leave_one_out(N))
    with pytest.raises(InvalidInput, match="use lds"):
        removal_correlation(drawn(), halves)
    with pytest.raises(InvalidInput, match="use removal_correlation"):
        lds(drawn(), singles)
    assert "half-subset LDS" in str(evaluate(drawn(), halves)) and "small-drop" not in str(evaluate(drawn(), halves))
    assert removal_correlation(drawn(), singles).value == pytest.approx(1.0)
    assert removal_slope(2 * drawn(), singles).value == pytest.approx(0.5)


def test_self_influence_finds_planted_labels() -> None:
    generator = torch.Generator().manual_seed(0)
    wrong = torch.zeros(200, dtype=torch.bool)
    wrong[:20] = True
    suspicion = (torch.randn(200, generator=generator) + 1.5 * wrong).round(decimals=1)  # ties
    assert mislabel_auc(suspicion, wrong).value == pytest.approx(roc_auc_score(wrong, suspicion), abs=1e-12)
    assert mislabel_auc(suspicion, wrong).low < roc_auc_score(wrong, suspicion) < mislabel_auc(suspicion, wrong).high
    order = suspicion.argsort(descending=True, stable=True)
    assert precision_at(suspicion, wrong, 10).value == pytest.approx(float(wrong[order[:10]].float().mean()))
    shares = found_when_checking(suspicion, wrong, [0.0, 0.1, 1.0])
    assert shares == [0.0, float(wrong[order[:20]].sum()) / 20, 1.0]


def test_top_overlap() -> None:
    a = Scores(torch.arange(20.0)[None])
    b = Scores(torch.cat([torch.arange(15.0) + 100, torch.arange(5.0)])[None])
    assert top_overlap([a, a], 5).value == 1.0
    assert top_overlap([a, b], 5).value == 0.0
    assert top_overlap([a, b], 10).value == 0.5
    assert top_overlap([a, a, b], 10).value == pytest.approx((1 + 0.5 + 0.5) / 3)


# ------------------------------------------------------------------------------------------ with models


def ridge() -> tuple[ptif.Problem, tuple[Tensor, Tensor], Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(N, 4, generator=generator).double()
    y = x @ torch.randn(4, 1, generator=generator).double() + 0.3 * torch.randn(N, 1, generator=generator).double()
    model = nn.Linear(4, 1, bias=False).double()
    with torch.no_grad():
        model.weight.copy_(torch.linalg.solve(x.T @ x / N * 2 + 0.1 * torch.eye(4).double(), 2 * x.T @ y / N).T)
    problem = ptif.Problem(model, ptif.SquaredError(half=False), (x, y), weight_decay=0.1)
    qx = torch.randn(Q, 4, generator=generator).double()
    qy = torch.randn(Q, 1, generator=generator).double()
    return problem, (qx, qy), x, y


def test_ridge_leave_one_out_is_exact() -> None:
    """Influence over one minus leverage is leave-one-out, and retraining by L-BFGS measures it."""
    problem, (qx, qy), x, y = ridge()

    def solved(dataset: Any, seed: int) -> nn.Module:
        # (1/N) sum of squares + 0.05 |w|^2, N that of the whole: the objective that leaving out one term changes.
        rows = torch.tensor(dataset.indices)
        a, b = x[rows], y[rows]
        model = nn.Linear(4, 1, bias=False).double()
        with torch.no_grad():
            model.weight.copy_(torch.linalg.solve(2 * a.T @ a / N + 0.1 * torch.eye(4).double(), 2 * a.T @ b / N).T)
        return model

    output = ptif.FromFunction(lambda outputs, targets: outputs[:, 0])
    truth = retrain(solved, Subsets.leave_one_out(N), 1, train=(x, y), queries=(qx, qy), measure=output)
    method = ptif.Influence(GGN(), Cholesky(), Absolute(0.0), scaling=Leverage())
    scores = method.fit(problem).score((qx, qy), output)
    assert torch.allclose(scores.values.T, truth.changes()[:, 0], rtol=1e-8, atol=1e-12)
    assert removal_correlation(scores, truth).value == pytest.approx(1.0, abs=1e-12)
    assert removal_slope(scores, truth).value == pytest.approx(1.0, abs=1e-8)
    dot = ptif.methods.grad_dot().fit(problem).score((qx, qy), output)
    assert removal_correlation(dot, truth).value < 0.995


@pytest.mark.slow
def test_logistic_leave_one_out_against_real_refits() -> None:
    """With the minimum found each time, influence over one minus leverage is leave-one-out almost exactly."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(60, 4, generator=generator).double()
    y = (x @ torch.randn(4, 3, generator=generator).double() + torch.randn(60, 3, generator=generator)).argmax(1)
    qx, qy = torch.randn(9, 4, generator=generator).double(), torch.arange(9) % 3

    def refitted(dataset: Any, seed: int) -> nn.Module:
        rows = torch.tensor(dataset.indices)
        model = nn.Linear(4, 3).double()
        nn.init.zeros_(model.weight)
        nn.init.zeros_(model.bias)
        optimizer = torch.optim.LBFGS(
            model.parameters(), max_iter=60, tolerance_grad=1e-8, line_search_fn="strong_wolfe"
        )

        def closure() -> Any:
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(model(x[rows]), y[rows], reduction="sum") / 60
            loss = loss + 0.02 / 2 * sum(p.square().sum() for p in model.parameters())
            loss.backward()
            return loss

        optimizer.step(closure)
        return model

    truth = retrain(
        refitted,
        Subsets.leave_one_out(60, range(0, 60, 2)),
        1,
        train=(x, y),
        queries=(qx, qy),
        measure=nn.CrossEntropyLoss(),
    )
    problem = ptif.Problem(
        refitted(type("All", (), {"indices": range(60)}), 0), ptif.CrossEntropy(), (x, y), weight_decay=0.02
    )
    method = ptif.Influence(Hessian(), Cholesky(), Absolute(0.0))
    plain = method.fit(problem).score((qx, qy))
    assert removal_correlation(plain, truth).value > 0.99
    corrected = ptif.Influence(GGN(), Cholesky(), Absolute(0.0), scaling=Leverage())
    assert removal_slope(corrected.fit(problem).score((qx, qy)), truth).value == pytest.approx(1.0, abs=0.05)
    assert removal_correlation(ptif.methods.grad_dot().fit(problem).score((qx, qy)), truth).value < 0.98


def classes() -> tuple[Recipe, ptif.Problem, tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """A small classifier, trained by its recipe."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(120, 5, generator=generator)
    way = torch.randn(5, 3, generator=generator)
    y = (x @ way + 0.5 * torch.randn(120, 3, generator=generator)).argmax(1)
    qx = torch.randn(12, 5, generator=generator)
    qy = (qx @ way).argmax(1)
    recipe = Recipe(
        lambda: nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 3)),
        partial(torch.optim.SGD, lr=0.2, momentum=0.9, weight_decay=3e-3),
        epochs=40,
        batch_size=30,
        loss=nn.CrossEntropyLoss(),
    )
    model = train_model(recipe, (x, y))
    return recipe, ptif.Problem(model, nn.CrossEntropyLoss(), (x, y), weight_decay=3e-3), (x, y), (qx, qy)


@pytest.mark.slow
def test_pbrf_is_what_influence_predicts_at_small_steps() -> None:
    _, problem, _, queries = classes()
    scores = ptif.exact(damping=0.02).fit(problem).score(queries)
    ggn = ptif.Influence(GGN(), Cholesky(), Absolute(0.02)).fit(problem).score(queries)
    truth = pbrf(problem, range(0, 120, 12), queries, damping=0.02, step=0.05, rtol=1e-6)
    assert removal_correlation(ggn, truth).value > 0.999
    assert removal_slope(ggn, truth).value == pytest.approx(1.0, abs=0.02)
    # The full step bends: at this size of network one example is no small change.
    assert removal_correlation(ggn, pbrf(problem, range(0, 120, 12), queries, damping=0.02)).value > 0.9
    dot = ptif.methods.grad_dot().fit(problem).score(queries)
    assert removal_correlation(dot, truth).value < removal_correlation(ggn, truth).value - 0.02
    assert scores.values.shape == ggn.values.shape


@pytest.mark.slow
def test_a_table_with_its_baselines() -> None:
    recipe, problem, train, queries = classes()
    truth = retrain(recipe, Subsets.halves(120, 40), 4, train=train, queries=queries)
    table = evaluate({"influence": ptif.gauss_newton(damping=0.1)}, truth, problem=problem, queries=queries)
    names = [row.name for row in table.rows]
    assert {"influence", "random", "loss", "embedding similarity", "gradient dot product"} == set(names)
    assert table["influence"].value > 0.35 and table["gradient dot product"].value > 0.35
    assert abs(table["random"].value) < 0.15
    assert table.ceiling is not None and table["influence"].value < table.ceiling + 0.05
    text = str(table)
    assert "40 subsets of 50 % of 120 examples, 4 seeds" in text and "of ceiling" in text
    frame = table.to_frame()
    assert list(frame.index) == names and frame.loc["influence", "LDS"] == table["influence"].value
    with pytest.raises(UnknownName, match="influence"):
        table["influense"]
    figure = table.plot()
    assert [t.get_text() for t in figure.axes[0].get_yticklabels()] == names
    several = evaluate(["grad_dot", ptif.gauss_newton(damping=0.1)], truth, problem=problem, queries=queries)
    assert several["grad_dot"].value == pytest.approx(table["gradient dot product"].value)
    assert several[repr(ptif.gauss_newton(damping=0.1))].value == pytest.approx(table["influence"].value)


def test_methods_are_given_as_method_takes_them() -> None:
    torch.manual_seed(0)
    x, y = torch.randn(N, 4).double(), torch.arange(N) % 3
    problem = ptif.Problem(nn.Linear(4, 3).double(), nn.CrossEntropyLoss(), (x, y))
    curvature, method = ptif.curvature.GGN(), ptif.Influence(ptif.curvature.GGN())
    given = {"curvature": curvature, "method": method, "function": ptif.dual, "name": "dual"}
    table = evaluate(given, additive(drawn()), problem=problem, queries=(x[:7], y[:7]), resamples=10)
    assert table["curvature"].value == table["method"].value and table["function"].value == table["name"].value
    named = evaluate([curvature, "dual"], additive(drawn()), problem=problem, queries=(x[:7], y[:7]), resamples=10)
    assert named[repr(method)].value == table["method"].value and named["dual"].value == table["name"].value


@pytest.mark.slow
def test_removing_the_top_hurts_more_than_removing_at_random() -> None:
    recipe, problem, train, queries = classes()
    scores = ptif.gauss_newton(damping=0.02).fit(problem).score(queries)
    curves = removal_curves(recipe, {"influence": scores}, (5, 20), 2, train=train, queries=queries, problem=problem)
    assert set(curves.measured) == {"influence", "random", "loss", "embedding similarity", "gradient dot product"}
    assert curves.harm("influence", 20).low > curves.harm("random", 20).high
    assert curves.harm("influence", 20).value > curves.harm("influence", 5).value
    assert "influence" in str(curves)
    # Each query is measured after its own removal: by hand for one.
    ids = [i for i, _ in scores.helpful(3, 5)]
    alone = retrain(recipe, Subsets.groups(120, [ids]), 2, train=train, queries=queries)
    assert torch.allclose(curves.measured["influence"][0][:, 3], alone.measured[0, :, 3], rtol=1e-4)


@pytest.mark.slow
def test_verification_tells_influence_from_noise() -> None:
    recipe, problem, train, queries = classes()
    scores = ptif.gauss_newton(damping=0.02).fit(problem).score(queries)
    verdict = scores.verify(recipe, n=12, size=8, seeds=3)
    assert verdict.distinguishable and verdict.r.low > 0.5
    assert "is distinguishable from noise" in str(verdict) and len(verdict.removals) == 12
    generator = torch.Generator().manual_seed(3)
    noise = Scores(torch.randn(12, 120, generator=generator) * scores.values.std())
    blind = verify(noise, recipe, n=12, size=8, seeds=3, train=train, queries=queries)
    assert not blind.distinguishable and "NOT distinguishable" in blind.sentence
    assert blind.r.low < 0.3


@pytest.mark.slow
def test_attribute_verifies_at_the_door() -> None:
    recipe, problem, train, queries = classes()
    scores = ptif.attribute(problem.model, train, queries, weight_decay=3e-3, verify=recipe, top=5)
    assert any("predicted and measured change correlate" in note for note in scores.diagnostics.notes)
    assert scores.shape == (12, 10)


@pytest.mark.slow
def test_trajectory_specific_removal_is_less_noisy() -> None:
    """Held batches change one weight only: seeds agree better on what a removal does, until their runs part anyway."""
    recipe, _, train, queries = classes()

    def agreement(hold: bool) -> float:
        once = replace(recipe, epochs=1, hold_batches=hold)
        truth = retrain(once, Subsets.leave_one_out(120, range(0, 120, 2)), 4, train=train, queries=queries)
        correlations = torch.corrcoef(truth.changes().transpose(0, 1).flatten(1))
        return float(correlations[~torch.eye(4, dtype=torch.bool)].mean())

    assert agreement(hold=True) > agreement(hold=False) + 0.05


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: lds(drawn()[:3], additive(drawn())), "do not fit this truth of 7 queries and 30 training examples"),
        (lambda: lds(Scores(drawn()).top(3), additive(drawn())), "score without top="),
        (lambda: lds(Scores(drawn(), lower_is_better=False), additive(drawn())), "higher is better"),
        (lambda: lds(drawn(), additive(drawn(), subsets=Subsets.halves(N, 2))), "at least 3 subsets"),
        (lambda: evaluate({}, additive(drawn())), "No methods were given"),
        (lambda: evaluate({"a": 3}, additive(drawn())), "a is a int; expected scores"),
        (
            lambda: evaluate([drawn(), drawn()], additive(drawn())),
            "Two of the methods are called 'scores'; give them by",
        ),
        (lambda: evaluate(ptif.ekfac(), additive(drawn())), "has nothing to score; pass problem="),
        (lambda: mislabel_auc(drawn()[0], torch.zeros(N, dtype=torch.bool)), "both kinds are needed"),
        (lambda: mislabel_auc(drawn()[0], torch.zeros(3, dtype=torch.bool)), "Expected one number and one bool"),
        (lambda: precision_at(drawn()[0], torch.arange(N) < 3, 0), "k=0 must be a whole number from 1 to 30"),
        (lambda: top_overlap([Scores(drawn())]), "at least 2 scores"),
        (lambda: top_overlap([Scores(drawn()), Scores(drawn()[:2])]), "score different data"),
        (lambda: verify(Scores(drawn()), lambda d, s: None), "pass train= and queries="),
        (lambda: verify(Scores(drawn()), None, n=3, train=1, queries=1), "n=3 must be a whole number of at least 6"),
        (lambda: pbrf(ridge()[0], [0], ridge()[1], damping=0.0), "damping=0.0 must be a finite number above 0"),
        (lambda: pbrf(ridge()[0], [0], ridge()[1], damping=0.1, step=2.0), "step=2.0 must be a number above 0"),
        (lambda: removal_curves(None, {}, (0,), train=(drawn(),), queries=(drawn(),)), "counts must be different"),
    ],
)
def test_bad_input_in_one_sentence(call: Any, words: str) -> None:
    with pytest.raises(InvalidInput, match=words) as caught:
        call()
    assert "\n" not in str(caught.value)


def test_nothing_is_ranked_around_a_nan() -> None:
    bad = drawn()
    bad[2, 3] = torch.nan
    with pytest.raises(NonFinite, match="query 2"):
        lds(bad, additive(drawn()))
    with pytest.raises(NonFinite, match="example 3 is NaN"):
        mislabel_auc(bad[2], torch.arange(N) < 3)
    with pytest.raises(NonFinite, match="training diverged"):
        Truth(Subsets.halves(N, 3), torch.full((3, 1, 2), torch.nan), torch.zeros(1, 2), (0,))
