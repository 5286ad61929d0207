"""Questions of several queries, pairs, chosen examples and parts: by value, against scores of single queries."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import pytorch_influence_functions as ptif
from pytorch_influence_functions.core.distributed import World
from pytorch_influence_functions.core.errors import InvalidInput, NonFinite, UnknownName
from pytorch_influence_functions.curvature import GGN, EmpiricalFisher
from pytorch_influence_functions.gradients.per_example import Derivatives
from pytorch_influence_functions.influence.method import AbstractMethod
from pytorch_influence_functions.influence.question import Question
from pytorch_influence_functions.influence.scoring import ScoringPass
from pytorch_influence_functions.linalg.rows import Route
from pytorch_influence_functions.objectives import FromModel, Output
from pytorch_influence_functions.scaling import Leverage, RelatIF
from pytorch_influence_functions.scores.parts import PartScores
from pytorch_influence_functions.solvers import CG, Spectral
from tests.laws.test_influence import cross_entropy, mlp, relative_gap
from tests.laws.zoo import CASES, Case, build
from tests.oracles.autograd import dense_ggn, example_gradients, flat_parameters, influence
from tests.tolerance import rounding

pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same':UserWarning")
TIGHT = rounding(torch.float64)
DAMPING = 1e-3


def states(model: nn.Module) -> list[dict[str, Tensor]]:
    """Two earlier checkpoints and the model's own weights."""
    own = {k: v.clone() for k, v in model.state_dict().items()}
    return [{k: v * size for k, v in own.items()} for size in (0.3, 0.7)] + [own]


METHODS: dict[str, tuple[Callable[[nn.Module], AbstractMethod], float]] = {
    "exact": (lambda m: ptif.exact(damping=DAMPING), 1e-9),
    "dual": (lambda m: ptif.dual(damping=DAMPING), 1e-8),
    "cg": (lambda m: ptif.Influence(EmpiricalFisher(), CG(1e-9, 100), 0.1), 1e-7),
    "ekfac": (lambda m: ptif.ekfac(damping=DAMPING), 1e-9),
    "trak": (lambda m: ptif.trak(16, damping=DAMPING), 1e-9),
    "leverage": (lambda m: ptif.Influence(GGN(), Spectral(), DAMPING, scaling=Leverage()), 1e-9),
    "relatif": (lambda m: ptif.Influence(GGN(), Spectral(), DAMPING, scaling=RelatIF()), 1e-8),
    "along, raw": (lambda m: ptif.methods.along(states(m), ptif.ekfac(damping=DAMPING), units="raw"), 1e-9),
    "source": (lambda m: ptif.source(states(m), lr=0.05, steps=300, segments=2), 1e-9),
    "forward": (lambda m: ptif.Influence(GGN(), Spectral(), DAMPING, route="forward"), 1e-9),
    "vmap": (lambda m: ptif.Influence(GGN(), Spectral(), DAMPING, route="vmap"), 1e-9),
    "embedding": (lambda m: ptif.methods.EmbeddingSimilarity(), 1e-6),
}
LAYERED = [name for name in METHODS if name not in ("trak", "forward", "embedding", "cg")]
NAMES = [pytest.param(name, marks=pytest.mark.slow) if name == "cg" else name for name in METHODS]
GROUPS = torch.tensor([0, 1, 1, 2, 0, 1])


def fitted(name: str) -> tuple[Any, Any, float]:
    """A fitted method, six queries, and the tolerance of its solver."""
    model, x, y, xq, yq = mlp(n=40, q=6)
    make, tolerance = METHODS[name]
    # Each step of conjugate gradients goes through every batch.
    size = 20 if name == "cg" else 7
    return make(model).fit(ptif.Problem(model, nn.CrossEntropyLoss(), (x, y), batch_size=size)), (xq, yq), tolerance


def others(queries: Any) -> Any:
    """The same inputs under the next class."""
    return queries[0], (queries[1] + 1) % 3


# --------------------------------------------------------------------------- aggregates


@pytest.mark.parametrize("name", NAMES)
def test_rows_of_several_queries_are_the_same_sums_of_their_rows(name: str) -> None:
    attribution, queries, tolerance = fitted(name)
    each = attribution.score(queries).values.double()
    weights = torch.tensor([0.5, 0.0, -1.0, 0.0, 2.0, 0.25])
    for aggregate, expected in {
        "mean": each.mean(0, keepdim=True),
        "sum": each.sum(0, keepdim=True),
    }.items():
        assert relative_gap(attribution.score(queries, aggregate=aggregate).values, expected) < tolerance
    grouped = attribution.score(queries, aggregate=GROUPS)
    assert grouped.query_names == ["0", "1", "2"] and grouped.query_ids.tolist() == [-1, -1, -1]
    assert relative_gap(grouped.values, torch.stack([each[g == GROUPS].mean(0) for g in range(3)])) < tolerance
    named = attribution.score(queries, aggregate={"first": [0, 1], "even": torch.arange(6) % 2 == 0, "gap": weights})
    rows = [each[:2].mean(0), each[::2].mean(0), (weights[:, None].double() * each).sum(0)]
    assert relative_gap(named.values, torch.stack(rows)) < tolerance


def test_the_mean_row_is_the_dense_solve_for_the_gradient_of_the_mean() -> None:
    model, x, y, xq, yq = mlp(n=40, q=6)
    gradient = torch.autograd.grad(F.cross_entropy(model(xq), yq), list(model.parameters()))
    flat = torch.cat([g.flatten() for g in gradient])[None]
    expected = influence(
        dense_ggn(model, cross_entropy, x, y), DAMPING, flat, example_gradients(model, cross_entropy, x, y)
    )
    attribution = ptif.Influence(GGN(), Spectral(), DAMPING).fit(ptif.Problem(model, nn.CrossEntropyLoss(), (x, y)))
    assert relative_gap(attribution.score((xq, yq), aggregate="mean").values, expected) < 1e-10
    assert relative_gap(attribution.score((xq, yq), aggregate="sum", batch_size=2).values, 6 * expected) < 1e-10


def test_a_mean_takes_one_solve_and_holds_one_row(monkeypatch: pytest.MonkeyPatch) -> None:
    attribution, (xq, yq), _ = fitted("exact")
    solved: list[int] = []
    member = attribution.members[0]
    solve = type(member).solve

    def counted(self: Any, rows: Any) -> Any:
        solved.append(len(rows))
        return solve(self, rows)

    monkeypatch.setattr(type(member), "solve", counted)
    many = (xq.repeat(50, 1), yq.repeat(50))
    scores = attribution.score(many, aggregate="mean")
    assert solved == [1] and scores.shape == (1, 40)
    assert scores.diagnostics.n_queries == 1
    assert "rows    the row is the mean over 300 queries, solved as one right-hand side" in str(scores.diagnostics)
    assert "1 row x 40 training examples" in str(scores.diagnostics)
    assert not attribution.score((xq, yq)).diagnostics.rows


def test_along_the_run_an_aggregate_is_averaged_in_units_of_its_own_spread() -> None:
    model, x, y, xq, yq = mlp(n=40, q=6)
    each = [
        ptif.ekfac(damping=DAMPING)
        .fit(ptif.Problem(model, nn.CrossEntropyLoss(), (x, y), checkpoints=[state]))
        .score((xq, yq))
        .values.mean(0)
        for state in states(model)
    ]
    rows = torch.stack(each)
    spread = rows.std(1, correction=0)
    expected = spread.log().mean().exp() * (rows / spread[:, None]).mean(0)
    method = ptif.methods.along(states(model), ptif.ekfac(damping=DAMPING))
    scores = ptif.attribute(model, (x, y), (xq, yq), loss=nn.CrossEntropyLoss(), method=method, aggregate="mean")
    assert relative_gap(scores.values[0], expected) < 1e-9


def combined(derivatives: Derivatives, question: Question) -> Tensor:
    groups = ScoringPass(derivatives.problem, question).query_groups(derivatives, 4)
    return torch.cat([rows.flat() for _, rows in groups])


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_every_kind_of_layer_is_summed_and_subtracted_as_its_rows_are(case: Case) -> None:
    model, x, y = build(case)
    problem = ptif.Problem(model, ptif.CrossEntropy(), (x, y))
    derivatives = Derivatives.of(problem)
    weights = torch.linspace(-1, 1, len(problem), dtype=torch.float64)
    each = torch.cat([g.rows.flat() for g in derivatives.stream(world=World())])
    objective = derivatives.objective
    asked = Question.of(problem, objective, (x, y), aggregate={"w": weights, "two": [0, 1]})
    expected = torch.stack([weights @ each, each[:2].mean(0)])
    assert relative_gap(combined(derivatives, asked), expected) < TIGHT
    turned = (x.flip(0), y.flip(0)) if isinstance(x, Tensor) else None
    if turned is not None:
        pairs = Question.of(problem, objective, (x, y), contrast=turned)
        assert float((combined(derivatives, pairs) - (each - each.flip(0))).norm()) < TIGHT * float(each.norm())


# --------------------------------------------------------------------------- contrast


@pytest.mark.parametrize("name", NAMES)
def test_a_contrast_is_the_difference_of_two_rows(name: str) -> None:
    attribution, queries, tolerance = fitted(name)
    here, there = attribution.score(queries).values.double(), attribution.score(others(queries)).values.double()
    scale = float(here.norm() + there.norm())

    def close(scores: ptif.Scores, expected: Tensor) -> bool:
        return float((scores.values.double() - expected).norm()) < tolerance * scale

    pairs = attribution.score(queries, contrast=others(queries))
    assert close(pairs, here - there)
    assert pairs.query_names is not None and pairs.query_names[4] == "query 4 rather than contrast 4"
    one = tuple(part[:1] for part in others(queries))
    assert close(attribution.score(queries, contrast=one), here - there[:1])
    first = tuple(part[:1] for part in queries)
    against_many = attribution.score(first, contrast=others(queries))
    assert close(against_many, here[:1] - there)
    assert against_many.query_ids.tolist() == [0] * 6
    few = tuple(part[:4] for part in others(queries))
    assert close(attribution.score(queries, contrast=few, aggregate="mean"), (here.mean(0) - there[:4].mean(0))[None])
    summed = attribution.score(queries, contrast=others(queries), aggregate=GROUPS)
    assert close(summed, torch.stack([(here - there)[g == GROUPS].mean(0) for g in range(3)]))


def test_why_this_class_rather_than_that_is_a_difference_of_logits() -> None:
    attribution, (xq, yq), _ = fitted("exact")
    logits = [attribution.score((xq, yq), measure=Output(c)).values for c in range(3)]
    asked = attribution.score((xq, torch.zeros_like(yq)), measure=ptif.Logit(), contrast=(xq, torch.ones_like(yq)))
    assert relative_gap(asked.values, logits[0] - logits[1]) < 1e-9
    assert not asked.lower_is_better and asked.query_labels == [0] * 6


# --------------------------------------------------------------------------- measures


def test_several_measures_give_rows_of_each() -> None:
    attribution, queries, _ = fitted("exact")
    several = attribution.score(queries, measure=[Output(0), Output(2)])
    for j, index in enumerate((0, 2)):
        alone = attribution.score(queries, measure=Output(index))
        assert relative_gap(several.values[6 * j : 6 * (j + 1)], alone.values) < 1e-9
    assert several.query_names is not None and several.query_names[7] == "query 1, Output(index=2)"
    named = attribution.score(queries, measure={"margin": ptif.Margin(), "logit": ptif.Logit()}, aggregate="mean")
    assert named.query_names == ["mean over 6 queries, margin", "mean over 6 queries, logit"]
    margin = attribution.score(queries, measure=ptif.Margin()).values.mean(0)
    assert relative_gap(named.values[0], margin) < 1e-9


def test_an_output_is_that_number_of_the_model() -> None:
    model, _, _, xq, yq = mlp()
    outputs = model(xq)
    assert torch.equal(Output(1).losses(outputs, (xq, yq)), outputs[:, 1])
    assert torch.equal(Output(5).losses(torch.arange(12.0).reshape(2, 3, 2), (None, None)), torch.tensor([5.0, 11.0]))


@pytest.mark.parametrize("name", ["exact", "dual", "ekfac", "trak", "along, raw", "source"])
def test_a_function_of_the_model_is_asked_like_the_mean_of_queries(name: str) -> None:
    attribution, (xq, yq), tolerance = fitted(name)
    expected = attribution.score((xq, yq), aggregate="mean").values
    asked = FromModel(lambda model: F.cross_entropy(model(xq), yq), name="validation loss")
    scores = attribution.score(asked)
    assert relative_gap(scores.values, expected) < tolerance
    assert scores.query_names == ["validation loss"] and scores.query_source is None
    assert scores.diagnostics.rows == "each row is a function of the whole model"
    both = attribution.score([asked, FromModel(lambda model: -model[0].weight.norm(), name="size")])
    assert both.query_names == ["validation loss", "size"]


def test_a_norm_of_the_weights_by_the_dense_formula() -> None:
    model, x, y, *_ = mlp(n=40, q=6)
    theta = flat_parameters(model)
    g = example_gradients(model, cross_entropy, x, y)
    expected = influence(dense_ggn(model, cross_entropy, x, y), DAMPING, 2 * theta[None], g)
    asked = FromModel(lambda m: sum(p.square().sum() for p in m.parameters()), name="squared norm")
    method = ptif.Influence(GGN(), Spectral(), DAMPING)
    scores = ptif.attribute(model, (x, y), asked, loss=nn.CrossEntropyLoss(), method=method)
    assert relative_gap(scores.values, expected) < 1e-10
    assert all(p.grad is None for p in model.parameters())


# --------------------------------------------------------------------------- candidates


@pytest.mark.parametrize("name", [*NAMES, "along"])
def test_candidates_have_the_scores_that_they_have_among_all(name: str) -> None:
    if name == "along":
        model, x, y, *queries = mlp(n=40, q=6)
        method = ptif.methods.along(states(model), ptif.ekfac(damping=DAMPING))
        attribution: Any = method.fit(ptif.Problem(model, nn.CrossEntropyLoss(), (x, y)))
        queries, tolerance = tuple(queries), 1e-9
    else:
        attribution, queries, tolerance = fitted(name)
    whole = attribution.score(queries)
    few = attribution.score(queries, ids=[31, 4, 17])
    assert few.indices is not None and few.indices[2].tolist() == [31, 4, 17] and few.n_train == 40
    assert relative_gap(few.values, whole.values[:, [31, 4, 17]]) < tolerance
    own = torch.stack([torch.randperm(40, generator=torch.Generator().manual_seed(q))[:5] for q in range(6)])
    each = attribution.score(queries, ids=own)
    assert torch.equal(each.indices, own)
    assert relative_gap(each.values, whole.values.gather(1, own)) < tolerance
    best = attribution.score(queries, ids=own, top=1)
    assert best.shape == (6, 2)
    assert best.helpful(3, 1)[0][0] == int(own[3][whole.values[3, own[3]].argmax()])
    assert "5 of 40 training examples per row were asked for" in each.diagnostics.notes


class Reading(torch.utils.data.Dataset[Any]):
    """Remembers which of its examples were read."""

    def __init__(self, x: Tensor, y: Tensor) -> None:
        self.x, self.y, self.read = x, y, set[int]()

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, index: int) -> Any:
        self.read.add(index)
        return self.x[index], self.y[index]


@pytest.mark.parametrize("name", ["exact", "ekfac", "cg", "leverage", "source"])
def test_examples_that_are_no_candidates_are_not_read(name: str) -> None:
    model, x, y, xq, yq = mlp(n=40, q=6)
    data = Reading(x, y)
    problem = ptif.Problem(model, nn.CrossEntropyLoss(), data, deterministic="ignore")
    method = METHODS["ekfac"][0](model) if name == "cg" else METHODS[name][0](model)
    attribution = method.fit(problem)
    data.read.clear()
    attribution.score((xq, yq), ids=[[7, 20]] * 5 + [[3, 20]])
    assert data.read == {3, 7, 20}


def test_candidates_of_a_sampled_part_are_named_by_their_places_in_the_dataset() -> None:
    model, x, y, xq, yq = mlp(n=40, q=6)
    sampler = torch.utils.data.SubsetRandomSampler(range(0, 40, 2))
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, y), batch_size=8, sampler=sampler)
    attribution = ptif.exact(damping=DAMPING).fit(ptif.Problem(model, nn.CrossEntropyLoss(), loader))
    whole, few = attribution.score((xq, yq)), attribution.score((xq, yq), ids=[30, 6])
    assert few.indices is not None and few.indices[0].tolist() == [30, 6]
    assert relative_gap(few.values, whole.values[:, [15, 3]]) < 1e-12
    with pytest.raises(InvalidInput, match=r"^Example 7 is not among those that the loader's sampler draws"):
        attribution.score((xq, yq), ids=[6, 7])


# --------------------------------------------------------------------------- parts


@pytest.mark.parametrize("name", [*LAYERED, "along"])
def test_parts_add_up_to_the_whole(name: str) -> None:
    if name == "along":
        model, x, y, *queries = mlp(n=40, q=6)
        method = ptif.methods.along(states(model), ptif.ekfac(damping=DAMPING))
        attribution: Any = method.fit(ptif.Problem(model, nn.CrossEntropyLoss(), (x, y)))
        queries, tolerance = tuple(queries), 1e-9
    else:
        attribution, queries, tolerance = fitted(name)
    whole = attribution.score(queries)
    parts = attribution.score(queries, by="layer")
    assert isinstance(parts, PartScores) and list(parts) == ["0", "2"] and parts.values_by_part.shape == (2, 6, 40)
    assert relative_gap(parts.total().values, whole.values) < tolerance
    for part in parts.values():
        assert 0.01 < float(part.values.norm() / whole.values.norm()) < 100
    few = attribution.score(queries, by=["0"], ids=[3, 9])
    assert list(few) == ["0", "(others)"]
    assert relative_gap(few["0"].values, parts["0"].values[:, [3, 9]]) < tolerance
    if name != "along":  # in units of its own spread, a mean is no mean of rows
        mean = attribution.score(queries, by="layer", aggregate="mean")
        assert relative_gap(mean["2"].values[0], parts["2"].values.mean(0)) < tolerance
    top = attribution.score(queries, by="layer", top=2)
    assert top["2"].helpful(1, 2)[0][0] == parts["2"].helpful(1, 1)[0][0]
    with pytest.raises(InvalidInput, match=r"^Each part holds other training examples"):
        top.total()


@pytest.mark.parametrize("damping", [1e-6, 1e-9])
def test_parts_of_the_dual_add_up_in_float32_under_light_damping(damping: float) -> None:
    """Parts are several hundred times the whole there, or more, and each is what it is in float64."""
    model, x, y, xq, yq = mlp(n=5, q=3)
    several = []
    for dtype in (torch.float32, torch.float64):
        problem = ptif.Problem(copy.deepcopy(model).to(dtype), nn.CrossEntropyLoss(), (x.to(dtype), y))
        attribution, queries = ptif.dual(damping=damping).fit(problem), (xq.to(dtype), yq)
        parts, whole = attribution.score(queries, by="layer"), attribution.score(queries)
        assert whole.values.dtype == dtype and parts.values_by_part.dtype == torch.float64
        assert relative_gap(parts.total().values, whole.values.double()) < 1e-6
        several.append(parts.values_by_part)
    assert several[0].abs().max() > 1e-4 / damping * whole.values.abs().max()
    assert relative_gap(*several) < 1e-5


def test_a_part_is_the_inner_product_over_its_parameters() -> None:
    model, x, y, xq, yq = mlp(n=40, q=6)
    g, gq = example_gradients(model, cross_entropy, x, y), example_gradients(model, cross_entropy, xq, yq)
    matrix = dense_ggn(model, cross_entropy, x, y) + DAMPING * torch.eye(g.shape[1], dtype=g.dtype)
    solved = torch.linalg.solve(matrix, gq.T).T
    first = sum(p.numel() for p in model[0].parameters())
    scores = ptif.attribute(
        model,
        (x, y),
        (xq, yq),
        loss=nn.CrossEntropyLoss(),
        method=ptif.Influence(GGN(), Spectral(), DAMPING),
        by={"body": "0", "head": ["2"]},
    )
    assert relative_gap(scores["body"].values, solved[:, :first] @ g[:, :first].T / 40) < 1e-10
    assert relative_gap(scores["head"].values, solved[:, first:] @ g[:, first:].T / 40) < 1e-10
    assert scores.shares().keys() == {"body", "head"} and scores.shares()["body"] > 0


def test_layers_with_bias_apart_and_parts_by_patterns() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList([nn.Sequential(nn.LayerNorm(4), nn.Linear(4, 4)) for _ in range(2)])
            self.head = nn.Linear(4, 3)
            self.token = nn.Parameter(torch.zeros(4))

        def forward(self, x: Tensor) -> Tensor:
            for block in self.blocks:
                x = x + block(x) + self.token
            return self.head(x)

    torch.manual_seed(0)
    model, x, y = Net().double(), torch.randn(12, 4).double(), torch.arange(12) % 3
    attribution = ptif.exact().fit(ptif.Problem(model, nn.CrossEntropyLoss(), (x, y)))
    layers = attribution.score((x[:2], y[:2]), by="layer")
    assert set(layers) == {"blocks.0.0", "blocks.0.1", "blocks.1.0", "blocks.1.1", "head", "(root)"}
    blocks = attribution.score((x[:2], y[:2]), by=["blocks.0", "blocks.1"])
    assert list(blocks) == ["blocks.0", "blocks.1", "(others)"]
    assert relative_gap(blocks["blocks.1"].values, layers["blocks.1.0"].values + layers["blocks.1.1"].values) < 1e-10
    norms = attribution.score((x[:2], y[:2]), by={"norms": "blocks.?.0"})
    assert relative_gap(norms["norms"].values, layers["blocks.0.0"].values + layers["blocks.1.0"].values) < 1e-10
    frame = layers.to_frame()
    assert list(frame.columns[:3]) == ["part", "query", "train"] and len(frame) == 6 * 2 * 12


def test_weight_decay_of_every_example_is_divided_among_the_parts() -> None:
    model, x, y, xq, yq = mlp(n=40, q=6)
    decay = ptif.WeightDecay(0.05, per_example=True)
    for method in (ptif.exact(damping=DAMPING), ptif.dual(damping=DAMPING)):
        attribution = method.fit(ptif.Problem(model, nn.CrossEntropyLoss(), (x, y), weight_decay=decay))
        whole = attribution.score((xq, yq)).values
        assert relative_gap(attribution.score((xq, yq), by="layer").total().values, whole) < 1e-8


# --------------------------------------------------------------------------- the difference of two results


def test_the_difference_of_two_models_is_that_of_their_scores() -> None:
    model, x, y, xq, yq = mlp(n=40, q=6)
    other = nn.Linear(5, 3).double()
    options: dict[str, Any] = {"loss": nn.CrossEntropyLoss(), "method": "exact"}
    a, b = (ptif.attribute(m, (x, y), (xq, yq), **options) for m in (model, other))
    gap = a - b
    torch.testing.assert_close(gap.values, a.values - b.values)
    assert gap.query_labels == a.query_labels and "less those of" in gap.diagnostics.rows
    with pytest.raises(InvalidInput, match=r"^The difference of scores of 6 x 40 .* score the same queries"):
        _ = a - b[:2]
    with pytest.raises(InvalidInput, match=r"^Of one measure smaller is better .* score both with the same measure\.$"):
        _ = a - ptif.attribute(model, (x, y), (xq, yq), measure=ptif.Margin(), **options)
    with pytest.raises(InvalidInput, match=r"^The two hold other training examples per query .* without top=\.$"):
        _ = a.top(2) - b.top(2)


# --------------------------------------------------------------------------- results and their use


def test_named_rows_are_saved_tabled_and_written(tmp_path: Any) -> None:
    attribution, queries, _ = fitted("exact")
    scores = attribution.score(queries, aggregate={"women": [0, 1, 2], "men": [3, 4, 5]})
    scores.save(tmp_path / "scores.safetensors")
    loaded = ptif.Scores.load(tmp_path / "scores.safetensors")
    assert loaded.query_names == ["women", "men"] and torch.equal(loaded.values, scores.values)
    assert loaded.diagnostics == scores.diagnostics and loaded.diagnostics.rows
    assert set(scores.to_frame()["query_name"]) == {"women", "men"}
    assert set(scores.to_dict()) == {"women", "men"} and set(scores.mean().to_dict()) == {"mean"}
    assert "women, most helpful: " in repr(scores) and scores.describe_query(1) == "men"


@pytest.mark.parametrize("kind", ["aggregate", "contrast", "mean"])
def test_rows_that_are_no_single_queries_are_not_verified_as_if_they_were(kind: str) -> None:
    attribution, queries, _ = fitted("exact")
    scores = {
        "aggregate": lambda: attribution.score(queries, aggregate="mean"),
        "contrast": lambda: attribution.score(queries, contrast=others(queries)),
        "mean": lambda: attribution.score(queries).mean(),
    }[kind]()
    with pytest.raises(InvalidInput, match=r"^Rows of these scores are not single queries .* queries themselves\.$"):
        scores.verify(lambda data, seed: None, measure=nn.CrossEntropyLoss())


# --------------------------------------------------------------------------- what is refused

X, Y = torch.zeros(6, 5).double(), torch.zeros(6, dtype=torch.long)
REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "word": ({"aggregate": "median"}, r"^aggregate='median' is no way to put queries together; write 'mean', 'sum', a"),
    "number": ({"aggregate": 3}, r"^aggregate=3 is no way to put queries together"),
    "labels": ({"aggregate": [0, 1]}, r"^aggregate= holds 2 labels for 6 queries; give each query the name of its gro"),
    "real labels": ({"aggregate": torch.rand(6)}, r"^aggregate= holds 0\.\d+, expected the name or number .* weights"),
    "none": ({"aggregate": [None] * 6}, r"^aggregate= names no group; give at least one\.$"),
    "outside": ({"aggregate": {"a": [0, 6]}}, r"^In the group 'a' of aggregate=, there is no query 6: they are number"),
    "empty": ({"aggregate": {"a": []}}, r"^In the group 'a' of aggregate=, no query was picked; pick at least one\.$"),
    "weights": (
        {"aggregate": {"a": torch.ones(3)}},
        r"^In the group 'a' of aggregate=, there are weights of shape \(3",
    ),
    "whole weights": (
        {"aggregate": {"a": [1, -1, 0, 2, 3, 4]}},
        r"may be positions or weights; write weights with",
    ),
    "unordered": (
        {"aggregate": {"a": [1, 0, 2, 3, 4, 5]}},
        r"^In the group 'a' of aggregate=, \[1, 0, 2, 3, 4",
    ),
    "zeros": ({"aggregate": {"a": torch.zeros(6)}}, r"^In the group 'a' of aggregate=, the weights must be finite and"),
    "words": ({"aggregate": {"a": "b"}}, r"^The group 'a' of aggregate= is 'b'; expected positions of queries, a mask"),
    "names": ({"aggregate": {1: [0], "1": [1]}}, r"^Two groups of aggregate= are called '1'; give each a name of its"),
    "pairs": ({"contrast": (X[:4], Y[:4])}, r"^There are 6 queries and 4 examples in contrast=; give as many, or one"),
    "contrast": ({"contrast": 5}, r"^In contrast=, int cannot be used as data; expected a Dataset"),
    "wide": ({"contrast": (torch.zeros(6, 9).double(), Y)}, r"In contrast=, "),
    "output": ({"measure": Output(3)}, r"In the queries, Output\(3\) asks for an output that the model does not have"),
    "directions": ({"measure": {"a": None, "b": ptif.Margin()}}, r"^Of a smaller is better and of b larger is, so one"),
    "measures": ({"measure": []}, r"^measure= is empty; leave it out to measure the training loss\.$"),
    "twice": ({"measure": [ptif.Margin(), ptif.Margin()]}, r"^Two measures of measure= are called the same; give them"),
    "ids outside": ({"ids": [3, 40]}, r"^In ids=, there is no training example 40: they are numbered 0 to 39\.$"),
    "ids twice": ({"ids": [3, 3]}, r"^In ids=, a training example was picked twice; pick each once\.$"),
    "no ids": ({"ids": []}, r"^In ids=, no training example was picked; pick at least one\.$"),
    "ids as words": (
        {"ids": "all"},
        r"^In ids=, a training example is picked by whole numbers, a slice or a mask of 40",
    ),
    "ragged": ({"ids": [[1], [1, 2], [1], [1], [1], [1]]}, r"^ids= names between 1 and 2 training examples per query;"),
    "lists": ({"ids": [[1], [2]]}, r"^ids= holds 2 lists for 6 rows of scores; give one list for all, or one for eac"),
    "pattern": ({"by": ["1"]}, r"^The pattern '1' of by= matches no layer that takes part"),
    "shared": ({"by": {"a": "0", "b": "*"}}, r"^The parts 'a' and 'b' of by= share '0'; let each layer be in one part"),
    "by": ({"by": 3}, r"^by=3 tells no parts; write 'layer', 'head', patterns of names"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_bad_questions_are_refused_in_one_sentence(name: str) -> None:
    attribution, queries, _ = fitted("exact")
    options, message = REFUSED[name]
    with pytest.raises((InvalidInput, UnknownName), match=message):
        attribution.score(queries, **options)


FUNCTIONS: dict[str, tuple[Any, str]] = {
    "detached": (lambda m: m[0].weight.detach().norm(), r"^The function f of FromModel has no derivative in the param"),
    "number": (lambda m: 3.0, r"^The function f of FromModel returned float, expected one number as a tensor"),
    "vector": (lambda m: m[0].bias, r"^The function f of FromModel returned a tensor of shape \(6,\), expected one nu"),
    "infinite": (lambda m: m[0].bias.sum() * float("inf"), r"^The function f of FromModel is -?(inf|nan); make it fin"),
    "root": (lambda m: (0 * m[0].bias).sum().sqrt(), r"^The gradient of the function f of FromModel is NaN or infini"),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_functions_that_cannot_be_asked_are_refused(name: str) -> None:
    attribution, _, _ = fitted("exact")
    function, message = FUNCTIONS[name]
    with pytest.raises((InvalidInput, NonFinite), match=message):
        attribution.score(FromModel(function, name="f"))


def test_a_function_of_another_model_is_refused() -> None:
    attribution, _, _ = fitted("exact")
    other = nn.Linear(2, 2)
    with pytest.raises(InvalidInput, match=r"^The function f of FromModel does not depend on the parameters that take"):
        attribution.score(FromModel(lambda m: other.weight.sum(), name="f"))
    with pytest.raises(InvalidInput, match=r"^FromModel needs a function of the model, got int\.$"):
        FromModel(3)  # type: ignore[arg-type]
    with pytest.raises(InvalidInput, match=r"^aggregate= speaks of queries, and FromModel"):
        attribution.score(FromModel(lambda m: m[0].weight.sum()), aggregate="mean")
    with pytest.raises(InvalidInput, match=r"^The queries mix FromModel\(\.\.\.\) with others"):
        attribution.score([FromModel(lambda m: m[0].weight.sum()), 3])


def test_methods_without_parts_say_so() -> None:
    model, x, y, xq, yq = mlp(n=40, q=6)
    problem = ptif.Problem(model, nn.CrossEntropyLoss(), (x, y))
    for method, message in (
        (ptif.trak(16), r"^by='layer' tells layers apart, and gradients are projected all together"),
        (ptif.Influence(GGN(), Spectral(), DAMPING, route=Route.FORWARD), r"^by= takes inner products layer by layer"),
        (
            ptif.Influence(GGN(), Spectral(), DAMPING, truncation=ptif.solvers.Truncation(rank=2)),
            r"^truncation=.* certifies whole scores and not their",
        ),
        (ptif.methods.EmbeddingSimilarity(), r"^by='layer' tells apart what layers contribute, and a plain baseline"),
    ):
        with pytest.raises(InvalidInput, match=message):
            method.fit(problem).score((xq, yq), by="layer")
    with pytest.raises(InvalidInput, match=r"^A plain baseline compares examples and cannot be asked about the whole"):
        ptif.methods.EmbeddingSimilarity().fit(problem).score(FromModel(lambda m: m[0].weight.sum()))


def test_attribute_reaches_every_question() -> None:
    model, x, y, xq, yq = mlp(n=40, q=6)
    options: dict[str, Any] = {"loss": nn.CrossEntropyLoss(), "method": ptif.dual(EmpiricalFisher())}
    fit = ptif.dual(EmpiricalFisher()).fit(ptif.Problem(model, nn.CrossEntropyLoss(), (x, y)))
    for asked in (
        {"aggregate": GROUPS},
        {"contrast": (xq, (yq + 1) % 3), "top": 3},
        {"ids": [2, 5]},
        {"measure": [ptif.Margin(), ptif.Logit()]},
    ):
        scores = ptif.attribute(model, (x, y), (xq, yq), **options, **asked)
        torch.testing.assert_close(scores.values, fit.score((xq, yq), **asked).values)
    parts = ptif.attribute(model, (x, y), (xq, yq), **options, by="layer")
    assert list(parts) == ["0", "2"] and not parts.diagnostics.inferred
    for name, value in {"aggregate": "mean", "ids": [1], "by": "layer", "contrast": (xq, yq)}.items():
        with pytest.raises(InvalidInput, match=rf"^verify= retrains .* leave {name}= or verify= out\.$"):
            ptif.attribute(model, (x, y), (xq, yq), **options, verify=lambda d, s: None, **{name: value})
    with pytest.raises(InvalidInput, match=r"^forecast\(\) speaks of whole scores .* takes no ids=; leave it out\.$"):
        ptif.forecast(model, (x, y), (xq, yq), ids=[2])  # type: ignore[call-arg]
    many = ptif.forecast(model, (x, y), (xq.repeat(9, 1), yq.repeat(9)), method="gauss_newton")
    one = ptif.forecast(model, (x, y), (xq.repeat(9, 1), yq.repeat(9)), method="gauss_newton", aggregate="mean")
    assert one.passes < many.passes or one.seconds < many.seconds
