"""Averaging over checkpoints: against the formula on every checkpoint's own scores, in float64."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import pytorch_influence_functions as ptif
from pytorch_influence_functions.core.errors import InvalidInput
from pytorch_influence_functions.curvature import GGN, EmpiricalFisher
from pytorch_influence_functions.curvature.convexity import is_convex
from pytorch_influence_functions.influence import averaging
from pytorch_influence_functions.influence.members import Members, bytes_of
from pytorch_influence_functions.methods import along
from pytorch_influence_functions.solvers import CG, Spectral, Truncation
from tests.tolerance import gap, rounding

State = dict[str, Tensor]


def setting(n: int = 30, q: int = 5, dtype: torch.dtype = torch.float64) -> tuple[ptif.Problem, Any, list[State]]:
    """A small network, queries, and four sets of weights whose gradients differ greatly in size."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)).to(dtype)
    x, y = torch.randn(n + q, 4).to(dtype), torch.randint(0, 3, (n + q,))
    states = [{k: v * size + 0.1 * torch.randn_like(v) for k, v in model.state_dict().items()} for size in (0, 1, 3, 6)]
    model.load_state_dict(states[-1])
    return ptif.Problem(model, ptif.CrossEntropy(), (x[:n], y[:n]), batch_size=7), (x[n:], y[n:]), states


def at(problem: ptif.Problem, state: State) -> ptif.Problem:
    return problem.with_(checkpoints=[state])


def formula(rows: list[Any], units: str) -> np.ndarray[Any, Any]:
    """G * mean_c(s_c / sigma_c), written out: [C, Q, N] in float64."""
    s = np.stack([np.asarray(r, dtype=np.float64) for r in rows])
    if units == "raw":
        return np.asarray(s.mean(0))
    sigma = s.std(2)
    unit = sigma[-1] if units == "final" else np.exp(np.log(sigma).mean(0))
    return np.asarray(unit[:, None] * (s / sigma[:, :, None]).mean(0))


METHODS: dict[str, tuple[Callable[[], ptif.Influence], float]] = {
    "ekfac": (ptif.ekfac, 1e-10),
    "shampoo": (ptif.methods.shampoo, 1e-10),
    "kfac": (ptif.methods.kfac, 1e-10),
    "exact": (ptif.exact, 1e-10),
    "dual": (ptif.dual, 1e-8),
    "dual of all classes": (lambda: ptif.dual(GGN()), 1e-8),
    "guided": (lambda: ptif.gauss_newton(rtol=1e-9, preconditioner=ptif.curvature.EKFAC()), 1e-7),
    "gradients": (ptif.methods.grad_dot, 1e-10),
    "trak": (lambda: ptif.trak(8), 1e-10),
    "cosine": (ptif.methods.grad_cos, 1e-10),
}


THREE = ("ekfac", "exact", "dual")
PAIRS = [*((name, "spread") for name in METHODS), *((name, units) for name in THREE for units in ("final", "raw"))]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "units"), PAIRS)
def test_the_average_is_the_formula(name: str, units: str) -> None:
    make, tolerance = METHODS[name]
    problem, queries, states = setting()
    singles = [make().fit(at(problem, state)).score(queries).values for state in states]
    want = formula(singles, units)
    values = along(states, make(), units).fit(problem).score(queries).values
    assert gap(values, want) < tolerance
    other = formula(singles, "raw" if units == "spread" else "spread")
    assert gap(values, other) > 0.05  # a plain mean, or other units, is far away


@pytest.mark.slow
@pytest.mark.parametrize("units", ["spread", "final", "raw"])
def test_float32_has_the_rounding_of_float32(units: str) -> None:
    problem, queries, states = setting(dtype=torch.float32)
    singles = [ptif.ekfac().fit(at(problem, state)).score(queries).values for state in states]
    values = along(states, units=units).fit(problem).score(queries).values
    assert values.dtype == torch.float32
    assert gap(values, formula(singles, units)) < rounding(torch.float32)


@pytest.mark.slow
@pytest.mark.parametrize("room", [None, 1, 2])
@pytest.mark.parametrize("units", ["spread", "raw"])
def test_the_extremes_are_those_of_all_scores(units: str, room: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where only one or two queries' scores are held at a time."""
    problem, queries, states = setting()
    fitted = along(states, units=units).fit(problem)
    whole = fitted.score(queries)
    if room is not None:
        parts = lambda question, n, budget: torch.split(torch.arange(len(question)), room)  # noqa: E731
        monkeypatch.setattr("pytorch_influence_functions.influence.rounds.split_queries", parts)
    top = fitted.score(queries, top=4)
    assert top.values.shape == (5, 8) and top.indices is not None
    for q in range(5):
        assert [i for i, _ in top.helpful(q, 4)] == [i for i, _ in whole.helpful(q, 4)]
        assert [i for i, _ in top.harmful(q, 4)] == [i for i, _ in whole.harmful(q, 4)]
    assert gap(top.values, whole.values.gather(1, top.indices)) < 1e-12


def test_queries_are_split_by_the_memory_that_their_scores_take() -> None:
    problem, queries, _ = setting()
    fitted = ptif.ekfac().fit(problem)
    each = averaging._MATRICES * 8 * 30
    for top, held, sizes in ((2, 2, [2, 2, 1]), (2, 99, [5]), (None, 2, [5]), (2, 0, [1] * 5)):
        question = fitted._question(queries, None, top)
        budget = ptif.curvature.Budget(max(1, int(held * each / averaging.QUERY_SHARE)))
        assert [len(part) for part in averaging.split_queries(question, 30, budget)] == sizes


@pytest.mark.parametrize("units", ["spread", "final"])
@pytest.mark.parametrize("factor", [1e-6, 7.0, 1e6])
def test_the_size_of_one_checkpoints_scores_does_not_change_the_order(units: str, factor: float) -> None:
    """In units of its spread a checkpoint counts alike, however large its scores are."""
    torch.manual_seed(1)
    rows = torch.randn(4, 3, 20).double()

    def average(rows: Tensor, units: str) -> Tensor:
        mean = averaging.CheckpointAverage(averaging.Units.of(units), (0.25,) * 4, 3, 20)
        for scores in rows:
            mean.add(torch.arange(3), torch.arange(20), scores)
            mean.end_checkpoint()
        return mean.result()

    scaled = rows.clone()
    scaled[1] *= factor
    before, after = average(rows, units), average(scaled, units)
    want = before if units == "final" else before * factor ** (1 / 4)
    assert gap(after, want) < rounding(torch.float64)
    assert gap(before, formula(list(rows), units)) < rounding(torch.float64)
    plain = average(rows, "raw"), average(scaled, "raw")
    assert gap(plain[1] / plain[1].std(), plain[0] / plain[0].std()) > 0.05


def test_a_checkpoint_that_ranks_nothing_is_left_out_of_that_querys_average() -> None:
    rows = torch.randn(3, 2, 20, generator=torch.Generator().manual_seed(0)).double()
    rows[1, 0] = 0.7
    mean = averaging.CheckpointAverage(averaging.Units.SPREAD, (1 / 3,) * 3, 2, 20)
    for scores in rows:
        mean.add(torch.arange(2), torch.arange(20), scores)
        mean.end_checkpoint()
    assert gap(mean.result()[0], formula([rows[0, :1], rows[2, :1]], "spread")[0]) < rounding(torch.float64)
    assert gap(mean.result()[1], formula(list(rows[:, 1:]), "spread")[0]) < rounding(torch.float64)


@pytest.mark.slow
def test_self_influence_is_averaged_as_one_row() -> None:
    problem, _, states = setting()
    singles = [ptif.ekfac().fit(at(problem, state)).self_influence()[None] for state in states]
    for units in ("spread", "final", "raw"):
        own = along(states, units=units).fit(problem).self_influence()
        assert gap(own, formula(singles, units)[0]) < 1e-10


def test_tokens_add_up_to_the_score() -> None:
    from tests.laws.test_token_scores import setting as texts

    problem, queries = texts()
    torch.manual_seed(3)
    own = problem.model.state_dict()
    states = [{k: size * v + 0.05 * torch.randn_like(v) for k, v in own.items()} for size in (0.3, 1.0, 2.0)]
    for units in ("spread", "raw"):
        fitted = along(states, units=units).fit(problem)
        scores, parts = fitted.score(queries), fitted.token_scores(queries, range(9))
        sums = torch.stack([parts[i].sum(1) for i in range(9)], 1)
        torch.testing.assert_close(sums, scores.values, rtol=1e-9, atol=1e-12)


def test_several_trainings_count_alike() -> None:
    problem, queries, states = setting()
    runs = [ptif.Recording.of(states[:2]), ptif.Recording.of(states[2:])]
    singles = [ptif.ekfac().fit(at(problem, s)).score(queries).values for s in states]
    fitted = along(runs).fit(problem)
    assert gap(fitted.score(queries).values, formula(singles, "spread")) < 1e-10
    assert along([states[:2], states[2:]]).checkpoints == along(runs).checkpoints
    # The first run's end is the model's: in its units the result is given.
    last_first = [singles[2], singles[3], singles[0], singles[1]]
    assert gap(along(runs, units="final").fit(problem).score(queries).values, formula(last_first, "final")) < 1e-10


def test_tracin_is_made_of_the_recordings_numbers() -> None:
    problem, queries, states = setting()
    run = ptif.Recording.of(states, steps=[2, 5, 9, 20], lr=[0.1, 0.05, 0.05, 0.01])
    dots = [ptif.methods.grad_dot().fit(at(problem, s)).score(queries).values for s in states]
    want = sum(w * d for w, d in zip((0.2, 0.15, 0.2, 0.11), dots, strict=True))
    tracin = ptif.tracin(run.learning_rates, run.stretches)
    assert gap(along(run, tracin, units="raw").fit(problem).score(queries).values, want) < 1e-10


# --------------------------------------------------------------------------- memory


@pytest.mark.slow
def test_memory_does_not_grow_with_the_number_of_checkpoints(monkeypatch: pytest.MonkeyPatch) -> None:
    problem, queries, states = setting()
    roomy = along(states).fit(problem)
    assert bytes_of(roomy.members[0]) > 8 * (5 * 5 + 6 * 6 + 7 * 7 + 3 * 3)
    half = int(ptif.curvature.Budget().bytes / 2.5)
    monkeypatch.setattr("pytorch_influence_functions.influence.members.bytes_of", lambda member: half)
    fitted = along(states).fit(problem)
    assert fitted.members.kept == 2 and roomy.members.kept == 4 and len(fitted.members) == 4
    assert fitted.members[1] is fitted.members[1] and fitted.members[2] is not fitted.members[2]
    assert gap(fitted.score(queries).values, roomy.score(queries).values) < 1e-12
    again = [f.with_damping(0.3).score(queries).values for f in (fitted, roomy)]
    assert gap(*again) < 1e-12 and gap(again[0], roomy.score(queries).values) > 0.01


def test_the_rows_that_a_dual_keeps_are_counted() -> None:
    problem, *_ = setting()
    fitted = ptif.dual().fit(problem)
    rows = 30 * (4 + 6 + 6 + 3)  # both factors of every layer's gradient
    assert bytes_of(fitted.members[0]) >= 8 * (rows + 30 * 30)


def test_members_are_read_as_a_sequence() -> None:
    made: list[int] = []

    def fit_one(k: int) -> Any:
        made.append(k)
        return ptif.methods.grad_dot().fit(setting()[0]).members[0]

    members = Members.fit(fit_one, 3, ptif.curvature.Budget(1))
    assert made == [0, 1, 2]
    assert members[0] is members[0] and len(list(members)) == 3 and len(members[1:]) == 2
    with pytest.raises(IndexError):
        members[3]


# --------------------------------------------------------------------------- what is said, what is refused


def test_the_diagnostics_say_how_far_the_sizes_can_be_trusted() -> None:
    problem, queries, states = setting()
    scores = along(ptif.Recording.of(states, steps=[1, 4, 10, 20])).fit(problem).score(queries)
    notes = " ".join(scores.diagnostics.notes)
    assert "asked along the training run: 4 checkpoints at 5%, 20%, 50%, 100% of 20 steps" in notes
    singles = np.stack([ptif.ekfac().fit(at(problem, s)).score(queries).values.numpy() for s in states])
    pairs = [(a, b) for a in range(4) for b in range(a)]
    each = [np.mean([np.corrcoef(singles[a, q], singles[b, q])[0, 1] for a, b in pairs]) for q in range(5)]
    assert f"correlate {np.median(each):.2f}," in notes
    ratio = np.median(singles.std(2).max(0) / singles.std(2).min(0))
    assert f"by a factor of up to {ratio:.2g} " in notes
    minimum = scores.diagnostics.checks()[0]
    assert minimum.status == "ok" and "needs no minimum" in minimum.text
    assert "own weights" not in notes
    with torch.no_grad():
        problem.model[0].weight += 1  # type: ignore[operator, union-attr]
    moved = along(states).fit(problem).score(queries).diagnostics.notes
    assert any(note.startswith("the model's own weights are not those of the run's last checkpoint") for note in moved)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda s: along(s, units="sigma"), r"^units='sigma' are none; choose one of 'raw', 'spread', 'final'\.$"),
        (lambda s: along([]), r"^run= holds no checkpoint; give at least one"),
        (lambda s: along(s[0]), r"^run= must be a recorded run, .* got one state dict\.$"),
        (lambda s: along(3), r"^run= must be a recorded run, .* got int\.$"),
        (lambda s: along([ptif.Recording.of(s), s[0]]), r"^run= holds runs beside single checkpoints; give one kind"),
        (
            lambda s: along(s, ptif.source(s, 0.1, 10)),  # type: ignore[arg-type]
            r"^along\(\) asks an Influence such as ptif.ekfac\(\) at every checkpoint, got SOURCE; .*segments\(\)\)\.$",
        ),
        (lambda s: along(s, ptif.tracin([0.1] * 4)), r"^weights=\(0.1, .* would be undone by units='spread'"),
        (
            lambda s: along(s, ptif.Influence(GGN(), CG(), truncation=Truncation(rank=2))),
            r"^truncation=.* certifies scores as they are, not their average in units='spread'",
        ),
        (
            lambda s: along(s).fit(setting()[0].with_(checkpoints=s)),
            r"^along\(\) takes its checkpoints from the run and the problem has 4 of its own; leave checkpoints= out",
        ),
        (
            lambda s: along(s, "shampoo"),
            r"^along\(\) asks a method at every checkpoint, got 'shampoo'; write its call, ptif.methods.shampoo\(\)",
        ),
        (
            lambda s: along(s, along(s)),
            r"^This method follows a run already; leave out along\(\), or run=",
        ),
        (
            lambda s: along(s, ptif.tracin([0.1] * 3), units="raw").fit(setting()[0]),
            r"^There are 3 weights and the problem has 4 checkpoints",
        ),
    ],
)
def test_what_cannot_be_averaged_is_refused(make: Any, words: str) -> None:
    with pytest.raises(InvalidInput, match=words):
        make(setting()[2])


@pytest.mark.slow
def test_attribute_takes_a_run() -> None:
    problem, queries, states = setting()
    x, y = problem.data.dataset.tensors  # type: ignore[union-attr]
    want = along(states).fit(problem).score(queries).values
    options: dict[str, Any] = {"loss": ptif.CrossEntropy(), "run": states, "batch_size": 7}
    scores = ptif.attribute(problem.model, (x, y), queries, **options)
    assert gap(scores.values, want) < 1e-12 and scores.diagnostics.members == 4
    dual = ptif.attribute(problem.model, (x, y), queries, method="dual", damping=0.3, **options)
    assert gap(dual.values, along(states, ptif.dual(damping=0.3)).fit(problem).score(queries).values) < 1e-10
    method = along(states, ptif.dual())
    again = ptif.attribute(problem.model, (x, y), queries, loss=ptif.CrossEntropy(), method=method, damping=0.3)
    assert gap(again.values, dual.values) < 1e-12
    costs, once = (ptif.forecast(problem.model, (x, y), queries, loss=ptif.CrossEntropy(), method="ekfac", run=r)
                   for r in (states, None))  # fmt: skip
    assert costs.passes == pytest.approx(4 * once.passes)
    with pytest.raises(InvalidInput, match="leave checkpoints= out"):
        ptif.attribute(problem.model, (x, y), queries, checkpoints=states, **options)


def test_the_diagnostics_say_where_training_has_one_minimum() -> None:
    problem, queries, states = setting()
    heads = [{k: s[k] if k.startswith("2") else states[-1][k] for k in s} for s in states]
    for part, convex in ((None, False), ("2", True)):
        notes = along(heads).fit(problem.with_(parameters=part)).score(queries).diagnostics.notes
        assert any("convex in the parameters" in note for note in notes) is convex


@pytest.mark.parametrize(
    ("parameters", "loss", "convex"),
    [
        (None, nn.CrossEntropyLoss(), False),  # a network
        ("0", nn.CrossEntropyLoss(), False),  # its first layer, under a bend
        ("2", nn.CrossEntropyLoss(), True),
        ("2.bias", nn.CrossEntropyLoss(), True),
        ("2", lambda outputs, targets: -outputs.square().sum(1), False),
    ],
)
def test_convexity_is_seen_in_the_outputs(parameters: str | None, loss: Any, convex: bool) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3), nn.Dropout())
    before = [p.clone() for p in model.parameters()]
    problem = ptif.Problem(model, loss, (torch.randn(20, 4), torch.arange(20) % 3), parameters=parameters)
    assert is_convex(problem) is convex
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True)) and model.training


def test_a_stored_result_depends_on_the_weights_of_the_run() -> None:
    from pytorch_influence_functions.core.digest import digest

    *_, states = setting()
    same = [{k: v.clone() for k, v in s.items()} for s in states]
    other = [*same[:-1], {k: v + 1e-9 for k, v in same[-1].items()}]
    assert digest(along(states)) == digest(along(same)) != digest(along(other))
    assert len({digest(along(states, units=u)) for u in ("raw", "spread", "final")}) == 3
    assert digest(along(states)) != digest(along(states, ptif.Influence(EmpiricalFisher(), Spectral())))


def test_what_does_not_depend_on_the_weights_is_decomposed_twice_at_most(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first layer's inputs are the data. Other matrices of the same name are never taken for each other."""
    from pytorch_influence_functions.linalg import eigh

    counts: dict[str, int] = {}

    def counted(matrix: Tensor, what: str = "the matrix", single: bool = False) -> Any:
        counts[what] = counts.get(what, 0) + 1
        return original(matrix, what, single)

    original = eigh.eigh
    monkeypatch.setattr(eigh, "eigh", counted)
    problem, _, states = setting()
    along(states).fit(problem)
    assert counts == {
        "the inputs of '0'": 2,
        "the outputs of '0'": 4,
        "the inputs of '2'": 4,
        "the outputs of '2'": 4,
    }
    shared, a, b = eigh.Decompositions(), torch.eye(2), torch.tensor([[2.0, 1], [1, 3]])
    with shared.in_use():
        for matrix in (a, b, b, b, a, b):
            values, vectors = eigh.eigh_shared(matrix, "x")
            torch.testing.assert_close(vectors @ values.diag() @ vectors.T, matrix.double())
    assert counts["x"] == 5 and eigh.eigh_shared(a, "x") and counts["x"] == 6


def test_actions_refuse_an_average_in_units() -> None:
    problem, _, states = setting()
    fitted = along(states, ptif.exact()).fit(problem)
    with pytest.raises(InvalidInput, match=r"^what_if\(\) moves the parameters, whose changes at several"):
        ptif.actions.what_if(fitted, remove=[1])
    raw = along(states, ptif.exact(), units="raw").fit(problem)
    assert ptif.actions.what_if(raw, remove=[1]).parameter_change
