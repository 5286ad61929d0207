"""An index against explicit formulas in float64: what is stored, and what is asked of it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from scipy import stats
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

import pytorch_influence_functions as ptif
from pytorch_influence_functions.core.errors import InvalidInput, SolveFailed, TooLarge
from pytorch_influence_functions.curvature import EKFAC, GGN, EmpiricalFisher
from pytorch_influence_functions.damping import Relative
from pytorch_influence_functions.gradients.per_example import Derivatives
from pytorch_influence_functions.problem.data import Source
from pytorch_influence_functions.solvers import Blockwise, Spectral
from pytorch_influence_functions.store import Factors, Sketch, TwoSided, integer_products
from pytorch_influence_functions.store.audit import Recall
from pytorch_influence_functions.store.codecs import CODECS
from pytorch_influence_functions.store.fidelity import Fidelity, estimate_fidelity
from tests.laws.test_influence import mlp
from tests.laws.test_sketches import matrix
from tests.laws.zoo import CASES, build
from tests.tolerance import gap

LAMBDA = 3e-3


def problem_of(n: int = 60) -> tuple[ptif.Problem, tuple[Tensor, Tensor]]:
    model, x, y, xq, yq = mlp(n)
    return ptif.Problem(model, ptif.CrossEntropy(), (x, y)), (xq, yq)


def gradients(problem: ptif.Problem, source: Any = None, measure: Any = None) -> Tensor:
    """Explicit gradients [n, P] in the order of the blocks."""
    source = None if source is None else Source.of(source)
    return torch.cat([g.rows.flat() for g in Derivatives.of(problem).stream(source, measure)])


def single(problem: ptif.Problem, queries: Any) -> tuple[ptif.Problem, Any]:
    """The same in float32."""
    x, y = problem.data.dataset.tensors
    return problem.with_(model=problem.model.float(), data=(x.float(), y)), (queries[0].float(), queries[1])


# --------------------------------------------------------------------------- scores


@pytest.mark.parametrize("representation", [TwoSided(3), TwoSided(2, 4, seed=1), Sketch(20)], ids=repr)
@pytest.mark.parametrize("curvature", [EmpiricalFisher(), GGN()], ids=repr)
def test_projected_scores_are_the_explicit_formula(representation: Any, curvature: Any, tmp_path: Path) -> None:
    problem, queries = problem_of()
    problem = problem.with_(weight_decay=2e-3)
    n, p = len(problem), matrix(problem, representation)
    g, m = gradients(problem) @ p, gradients(problem, queries, ptif.Margin()) @ p
    c = g.T @ g / n if isinstance(curvature, EmpiricalFisher) else p.T @ dense_ggn(problem) @ p
    for damping in (LAMBDA, 10 * LAMBDA):
        inverse = torch.linalg.inv(c + (damping + 2e-3) * torch.eye(len(c)).double())
        expected = m @ inverse @ g.T / n
        method = ptif.Influence(curvature, Spectral(), LAMBDA)
        index = ptif.Index.build(problem, tmp_path / "i", method, representation, "float64")
        scores = index.score(queries, ptif.Margin(), damping=damping)
        assert gap(scores.values, expected) < 1e-9
        assert not scores.lower_is_better and scores.values.dtype == torch.float64
    own = (g @ inverse * g).sum(1) / n
    assert gap(index.self_influence(10 * LAMBDA), own) < 1e-9
    assert (
        gap(index.score(queries, normalised=True, damping=10 * LAMBDA).values, normalised(problem, queries, p, c))
        < 1e-9
    )


def normalised(problem: ptif.Problem, queries: Any, p: Tensor, c: Tensor) -> Tensor:
    """RelatIF's formula."""
    g, m = gradients(problem) @ p, gradients(problem, queries) @ p
    inverse = torch.linalg.inv(c + (10 * LAMBDA + 2e-3) * torch.eye(len(c)).double())
    return m @ inverse @ g.T / len(g) / (g @ inverse * g).sum(1).sqrt()


def dense_ggn(problem: ptif.Problem) -> Tensor:
    operator = GGN().of(Derivatives.of(problem), GGN().forms[0], ptif.curvature.Budget())
    return operator.matrix


def test_without_reduction_a_projection_is_the_method_itself(tmp_path: Path) -> None:
    problem, queries = problem_of()
    for method in (ptif.ekfac(), ptif.methods.kfac(), ptif.methods.shampoo(), ptif.exact(), ptif.methods.grad_dot()):
        live = method.fit(problem).score(queries)
        for name, representation in (("wide", TwoSided(100)), ("factors", Factors())):
            index = ptif.Index.build(problem, tmp_path / name, method, representation, "float64", overwrite=True)
            assert gap(index.score(queries).values, live.values) < 1e-8
        assert gap(index.self_influence(), method.fit(problem).self_influence()) < 1e-8


def test_blocks_that_are_solved_one_by_one(tmp_path: Path) -> None:
    problem, queries = problem_of()
    method = ptif.Influence(GGN(), Blockwise(Spectral()), Relative(0.2, per_block=True))
    index = ptif.Index.build(problem, tmp_path / "i", method, Factors())
    assert gap(index.score(queries).values, method.fit(problem).score(queries).values) < 1e-8


@pytest.mark.filterwarnings("ignore:Using padding='same':UserWarning")
@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_factors_of_every_form_give_the_live_scores(case: Any, tmp_path: Path) -> None:
    model, x, y = build(case)
    problem = ptif.Problem(model, ptif.CrossEntropy(), (x, y))
    live = ptif.ekfac().fit(problem).score((x[:2], y[:2]))
    index = ptif.Index.build(problem, tmp_path / "i", representation=Factors(), shard=2000)
    assert gap(index.score((x[:2], y[:2])).values, live.values) < 1e-8


def test_exact_scores_in_single_precision(tmp_path: Path) -> None:
    problem, queries = single(*problem_of())
    live = ptif.ekfac().fit(problem).score(queries)
    index = ptif.Index.build(problem, tmp_path / "i")
    assert repr(index).endswith("60 examples, Factors() in float32)")
    assert gap(index.score(queries).values, live.values) < 1e-6


def test_a_sketch_comes_closer_as_it_grows(tmp_path: Path) -> None:
    """Correlation with exact products over seeds, for a curvature that keeps everything equal."""
    problem, queries = problem_of(40)
    live = ptif.methods.grad_dot().fit(problem).score(queries).values.flatten()
    means = []
    for k in (4, 14, 50):
        closeness = []
        for seed in range(6):
            index = ptif.Index.build(
                problem, tmp_path / f"{k}-{seed}", ptif.methods.grad_dot(), Sketch(k, seed=seed), "float64"
            )
            sketched = index.score(queries).values.flatten()
            closeness.append(float(torch.corrcoef(torch.stack([live, sketched]))[0, 1]))
        means.append(sum(closeness) / len(closeness))
    assert means[0] < means[1] < means[2] and means[2] > 0.9


def test_leading_eigenvectors_keep_more_than_random_signs(tmp_path: Path) -> None:
    problem, queries = problem_of()
    live = ptif.methods.grad_dot().fit(problem).score(queries).values.flatten()
    closeness = {}
    for basis in ("random signs", "eigenvectors"):
        index = ptif.Index.build(
            problem, tmp_path / basis, ptif.methods.grad_dot(), TwoSided(3, basis=basis), "float64"
        )
        closeness[basis] = float(torch.corrcoef(torch.stack([live, index.score(queries).values.flatten()]))[0, 1])
    assert closeness["eigenvectors"] > max(0.9, closeness["random signs"])


def test_rows_of_several_queries_are_those_of_the_live_method(tmp_path: Path) -> None:
    problem, queries = problem_of()
    live, index = ptif.ekfac().fit(problem), ptif.Index.build(problem, tmp_path / "i")
    other = (queries[0][:1] + 1, queries[1][:1])
    ways: tuple[dict[str, Any], ...] = (
        {"aggregate": "mean"}, {"aggregate": "sum"}, {"aggregate": ["a", "b", "a", "b"]}, {"contrast": other},
        {"aggregate": "mean", "contrast": other},
    )  # fmt: skip
    for way in ways:
        expected, scores = live.score(queries, **way), index.score(queries, **way)
        assert gap(scores.values, expected.values) < 1e-8
        assert scores.query_names == expected.query_names and torch.equal(scores.query_ids, expected.query_ids)
        few = index.score(queries, top=3, rerank=5, **way)
        assert gap(few.values, expected.values.gather(1, few.indices)) < 1e-9
    several = index.score(queries, [ptif.Margin(), ptif.Logit()])
    assert gap(several.values, live.score(queries, [ptif.Margin(), ptif.Logit()]).values) < 1e-8


@pytest.mark.parametrize("make", [lambda k: Sketch(k), lambda k: TwoSided(k // 8)], ids=["sketch", "two sides"])
def test_two_seeds_tell_how_true_a_projection_is(make: Any) -> None:
    """Against the correlation with exact cosines, over seeds."""
    problem, _ = problem_of()
    rows = gradients(problem)
    above = torch.triu_indices(60, 60, 1)

    def cosines(g: Tensor) -> Tensor:
        g = g / g.norm(dim=1, keepdim=True)
        return (g @ g.T)[above[0], above[1]]

    derivatives, exact = Derivatives.of(problem), cosines(rows)
    for k in (24, 40):
        told, true = [], []
        for seed in range(0, 16, 2):
            representation = replace(make(k), seed=seed)
            fidelity = estimate_fidelity(representation, derivatives)
            assert fidelity is not None
            told.append(fidelity.agreement)
            sketched = cosines(rows @ matrix(problem, representation))
            true.append(float(torch.corrcoef(torch.stack([exact, sketched]))[0, 1]) ** 2)
        assert abs(sum(told) - sum(true)) / 8 < 0.1
    assert f"{fidelity.expected:.2f} (correlation)" in str(fidelity)


def test_how_large_a_sketch_must_be() -> None:
    """corr = s / sqrt(s^2 + 1/k) for cosines of standard deviation s (Johnson and Lindenstrauss)."""
    spread = 0.05
    for k in (64, 256, 1024):
        agreement = spread**2 / (spread**2 + 1 / k)
        needed = Fidelity(agreement, k, 256).needed
        assert spread / (spread**2 + 1 / needed) ** 0.5 == pytest.approx(0.95, abs=1e-3)
    assert Fidelity(-0.1, 8, 9).expected == 0.0 and "a far larger k is needed" in str(Fidelity(-0.1, 8, 9))
    assert "needs" not in str(Fidelity(0.99, 8, 9))
    assert estimate_fidelity(Factors(), None) is None  # type: ignore[arg-type]


# --------------------------------------------------------------------------- what must not matter


def test_batches_order_and_shards_do_not_matter(tmp_path: Path) -> None:
    problem, queries = problem_of()
    whole = ptif.Index.build(problem, tmp_path / "whole", representation=TwoSided(3), dtype="float64")
    expected = whole.score(queries).values
    for name, settings in {"shards": {"shard": 900}, "one": {"shard": 1}}.items():
        index = ptif.Index.build(problem, tmp_path / name, representation=TwoSided(3), dtype="float64", **settings)
        assert len(index.folder.manifest.shards) > 5
        assert gap(index.score(queries).values, expected) < 1e-12
        top, all_top = index.score(queries, top=4), whole.score(queries, top=4)
        assert torch.equal(top.indices, all_top.indices)
    small = ptif.Index.build(
        problem.with_(batch_size=7), tmp_path / "batches", representation=TwoSided(3), dtype="float64"
    )
    assert gap(small.score(queries, memory=4000, top=1).top(1).values, whole.score(queries, top=1).values) < 1e-10
    assert gap(small.score(queries).values, expected) < 1e-10


def test_the_extremes_are_those_of_all_scores(tmp_path: Path) -> None:
    problem, queries = problem_of()
    index = ptif.Index.build(problem, tmp_path / "i", shard=2000)
    whole, few = index.score(queries), index.score(queries, top=5)
    assert few.shape == (len(queries[1]), 10)
    for q in range(len(queries[1])):
        assert [i for i, _ in few.helpful(q, 5)] == [i for i, _ in whole.helpful(q, 5)]
        assert [i for i, _ in few.harmful(q, 5)] == [i for i, _ in whole.harmful(q, 5)]


@pytest.mark.parametrize(("dtype", "bound"), [("float32", 1e-6), ("float16", 2e-3), ("bfloat16", 2e-2), ("int8", 3e-2)])
@pytest.mark.parametrize("representation", [TwoSided(3), Factors()], ids=repr)
def test_numbers_of_every_type_are_off_by_their_rounding(
    representation: Any, dtype: str, bound: float, tmp_path: Path
) -> None:
    problem, queries = single(*problem_of())
    exact = ptif.Index.build(problem, tmp_path / "e", representation=representation, dtype="float32")
    index = ptif.Index.build(problem, tmp_path / "i", representation=representation, dtype=dtype)
    assert gap(index.score(queries).values, exact.score(queries).values) < bound
    if dtype != "float32":
        assert index.folder.manifest.bytes < exact.folder.manifest.bytes


@pytest.mark.parametrize("queries", [1, 3, 70])
def test_products_of_stored_numbers_are_those_of_float64(queries: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """In pieces that do not divide the rows, with one query and with many."""
    monkeypatch.setattr(integer_products, "_CACHED", 4 * 40 * 9)
    monkeypatch.setattr(integer_products, "_NUMBERS", 300)
    generator = torch.Generator().manual_seed(0)
    rows, q = torch.randn(100, 40, generator=generator), torch.randn(queries, 40, generator=generator)
    for codec in CODECS.values():
        stored = codec.encode(rows)
        exact = q.double() @ codec.decode(stored, 40).double().T
        products = codec.products(q.to(codec.decode(stored, 40).dtype), stored)
        assert products.shape == (queries, 100) and gap(products, exact) < 2e-4


def test_signs_alone_still_rank(tmp_path: Path) -> None:
    problem, queries = single(*problem_of())
    exact = ptif.Index.build(problem, tmp_path / "e", representation=TwoSided(6), dtype="float32").score(queries).values
    signs = ptif.Index.build(problem, tmp_path / "i", representation=TwoSided(6), dtype="1bit").score(queries).values
    assert float(torch.corrcoef(torch.stack([exact.flatten(), signs.flatten()]))[0, 1]) > 0.6
    with pytest.raises(InvalidInput, match=r"Factors\(\) in 1 bit would lose the products of its signs"):
        ptif.Index.build(problem, tmp_path / "f", representation=Factors(), dtype="1bit")


# --------------------------------------------------------------------------- opening


def test_the_model_alone_is_enough_to_ask(tmp_path: Path) -> None:
    problem, queries = problem_of()
    built = ptif.Index.build(problem, tmp_path / "i", representation=TwoSided(3))
    index = ptif.Index.open(tmp_path / "i", problem.model.train())
    scores = index.score(queries, top=3)
    assert torch.equal(scores.values, built.score(queries, top=3).values)
    assert scores.train_labels is not None and scores.n_train == 60 and problem.model.training
    assert index.score((queries[0][:1], queries[1][:1])).shape == (1, 60)


def test_a_loss_of_ones_own_must_be_given_again(tmp_path: Path) -> None:
    problem, queries = problem_of()

    def halved(outputs: Tensor, y: Tensor) -> Tensor:
        return nn.functional.cross_entropy(outputs, y, reduction="none") / 2

    ptif.Index.build(problem.with_(objective=halved), tmp_path / "i", ptif.methods.grad_dot())
    with pytest.raises(InvalidInput, match=r"was built with a loss of your own, .*; give it as loss="):
        ptif.Index.open(tmp_path / "i", problem.model)
    assert ptif.Index.open(tmp_path / "i", problem.model, loss=halved).score(queries).shape == (4, 60)
    with pytest.raises(InvalidInput, match=r"was built with another loss; give the same"):
        ptif.Index.open(tmp_path / "i", problem.model, loss=nn.CrossEntropyLoss()).score(queries)


def test_another_model_is_refused(tmp_path: Path) -> None:
    problem, _ = problem_of()
    ptif.Index.build(problem, tmp_path / "i", representation=TwoSided(3))
    with torch.no_grad():
        problem.model[0].weight[0, 0] += 0.1
    with pytest.raises(
        InvalidInput, match=r"The model is not the one that the index in .* its weights differ; load that"
    ):
        ptif.Index.open(tmp_path / "i", problem.model)
    other = nn.Sequential(nn.Linear(5, 6), nn.ReLU(), nn.Linear(6, 3)).double()
    with pytest.raises(InvalidInput, match=r"its weights and model code differ"):
        ptif.Index.open(tmp_path / "i", other)


# --------------------------------------------------------------------------- filters


def test_only_what_was_asked_for_is_scored(tmp_path: Path) -> None:
    problem, queries = problem_of()
    index = ptif.Index.build(problem, tmp_path / "i", shard=2000)
    whole = index.score(queries)
    y = torch.as_tensor(whole.train_labels)
    for chosen, settings in (
        (torch.tensor([3, 17, 41]), {"ids": [41, 3, 17]}),
        (torch.arange(20), {"ids": slice(20)}),
        ((y == 1).nonzero().flatten(), {"where": lambda labels: labels == 1}),
        (
            (y == 1).nonzero().flatten()[:4],
            {"ids": (y == 1).nonzero().flatten()[:4], "where": lambda labels: labels == 1},
        ),
        ((y != 2).nonzero().flatten(), {"ids": y != 2}),
    ):
        some = index.score(queries, **settings)
        assert torch.equal(some.indices[0], chosen)
        assert gap(some.values, whole.values[:, chosen]) < 1e-12
    assert index.score(queries, top=10**9).shape == (4, 60)
    few = index.score(queries, top=2, ids=slice(20))
    assert int(few.indices.max()) < 20 and few.helpful(0, 1)[0][0] == int(whole.values[0, :20].argmax())


# --------------------------------------------------------------------------- parts of the model


@pytest.mark.parametrize("method", [ptif.ekfac(), ptif.exact(damping=1e-3)], ids=["ekfac", "exact"])
@pytest.mark.parametrize("dtype", ["float64", "int8"])
def test_scores_of_every_layer_are_those_of_the_live_method(method: Any, dtype: str, tmp_path: Path) -> None:
    problem, queries = problem_of()
    index = ptif.Index.build(problem, tmp_path / "i", method, Factors(), dtype, shard=2000)
    live = method.fit(problem).score(queries, by="layer")
    for batch_size, memory in ((None, "1GB"), (1, 20_000)):
        stored = index.score(queries, by="layer", batch_size=batch_size, memory=memory)
        assert list(stored) == list(live) and stored.values_by_part.shape == (len(live), 4, 60)
        assert gap(stored.values_by_part, live.values_by_part) < (1e-10 if dtype == "float64" else 3e-2)
    first = next(iter(live))
    few = index.score(queries, by={"head": first}, top=2, where={"label": [0, 1]})
    labels = torch.as_tensor(few["head"].train_labels)
    allowed = (labels != 2).nonzero().flatten().tolist()
    best = max(allowed, key=lambda i: float(stored[first].values[0, i]))
    assert few["head"].helpful(0, 1)[0][0] == best
    lists = index.score(queries, by="layer", ids=[[0, 3], [1, 2], [5, 4], [9, 7]], normalised=True)
    whole = index.score(queries, ids=[[0, 3], [1, 2], [5, 4], [9, 7]], normalised=True)
    assert gap(lists.total().values, whole.values) < 1e-5


@pytest.mark.parametrize("representation", [TwoSided(3), Sketch(20, per_layer=True)], ids=repr)
@pytest.mark.parametrize("curvature", [EmpiricalFisher(), EKFAC()], ids=repr)
def test_projected_scores_of_every_layer(representation: Any, curvature: Any, tmp_path: Path) -> None:
    """Rows of one layer of the projection: the explicit formula where the eigenbasis mixes layers and where not."""
    problem, queries = problem_of()
    if isinstance(curvature, EKFAC) and isinstance(representation, Sketch):
        pytest.skip("a sketch has no Kronecker factors")
    method = ptif.Influence(curvature, damping=LAMBDA)
    index = ptif.Index.build(problem, tmp_path / "i", method, representation, "float64")
    parts, whole = index.score(queries, by="layer"), index.score(queries)
    assert gap(parts.total().values, whole.values) < 1e-10
    if isinstance(curvature, EmpiricalFisher):
        p = matrix(problem, representation)
        g, m = gradients(problem) @ p, gradients(problem, queries) @ p
        solved = torch.linalg.solve(g.T @ g / len(g) + LAMBDA * torch.eye(g.shape[1]), m.T).T
        start = 0
        for name, block in representation.reduced(problem.space).blocks.items():
            own = slice(start, start := start + torch.Size(block.shape).numel())
            assert gap(parts[name].values, solved[:, own] @ g[:, own].T / len(g)) < 1e-8


def test_layers_that_are_mixed_are_not_told_apart(tmp_path: Path) -> None:
    problem, queries = problem_of()
    index = ptif.Index.build(problem, tmp_path / "i", ptif.dual(), Sketch(20))
    with pytest.raises(InvalidInput, match=r"Sketch\(k=20\) mixes all of them .* Sketch\(k, per_layer=True\)"):
        index.score(queries, by="layer")
    with pytest.raises(TooLarge, match="parts x 4 queries x 60 scores would take"):
        ptif.Index.build(problem, tmp_path / "j").score(queries, by="layer", memory=2000)


# --------------------------------------------------------------------------- columns


def test_examples_are_chosen_by_columns(tmp_path: Path) -> None:
    problem, queries = problem_of()
    source = [("web", "book", None)[i % 3] for i in range(60)]
    columns = {"source": source, "year": torch.arange(60) % 7 + 2000, "weight": [i / 60 for i in range(60)]}
    columns["clean"] = [i % 2 == 0 for i in range(60)]
    index = ptif.Index.build(problem, tmp_path / "i", columns=columns, shard=2000)
    index = ptif.Index.open(tmp_path / "i", problem)
    whole, number = index.score(queries), torch.arange(60)
    y = torch.as_tensor(whole.train_labels)
    for where, chosen in (
        ({"source": "web"}, number % 3 == 0),
        ({"source": ["web", "book"]}, number % 3 < 2),
        ({"source": None, "year": 2001}, (number % 3 == 2) & (number % 7 == 1)),
        ({"year": lambda year: year >= 2004}, number % 7 >= 4),
        ({"clean": True, "weight": lambda w: w < 0.5}, (number % 2 == 0) & (number < 30)),
        ({"label": 1}, y == 1),
    ):
        some = index.score(queries, where=where)
        assert torch.equal(some.indices[0], chosen.nonzero().flatten())
        assert gap(some.values, whole.values[:, chosen]) < 1e-12
    assert index.columns["source"].tolist() == source and index.columns["clean"].dtype == bool
    some = index.score(queries, ids=(index.columns["year"] > 2003) | (index.columns["source"] == "web"))
    assert torch.equal(some.indices[0], ((number % 7 > 3) | (number % 3 == 0)).nonzero().flatten())
    # More examples bring their own; removal keeps the numbers.
    x, y = problem.data.dataset.tensors
    with pytest.raises(InvalidInput, match=r"'year' .* and the appended examples have no columns; give columns="):
        index.append((x[:2], y[:2]))
    more = [{"source": s, "year": 2001, "weight": 0.5, "clean": False} for s in ("film", "web")]
    index = index.append((x[:2], y[:2]), columns=more).remove([0]).compact()
    assert index.score(queries, where={"source": "film"}).indices[0].tolist() == [60]
    assert index.score(queries, where={"source": "web"}).indices[0].tolist() == [*range(3, 60, 3), 61]
    index = index.annotate({"kept": [*number.tolist(), 60, 61]})
    assert list(index.columns) == ["kept"] and index.score(queries, where={"kept": [5, 61]}).shape == (4, 2)
    index.folder.check_all()
    assert len(list((tmp_path / "i").glob("columns-*"))) == 1


def test_columns_of_a_stream_are_compared_at_its_end(tmp_path: Path) -> None:
    """Their number is not known before; the index is whole without them, and takes them afterwards."""
    problem, queries = problem_of()
    x, y = problem.data.dataset.tensors
    want = ptif.ekfac().fit(problem).score(queries).values

    def build(stop: int, count: int) -> ptif.Index:
        columns = {"n": range(count)}
        return ptif.Index.build(problem, tmp_path / "i", data=Stream(x[:stop], y[:stop]), columns=columns)

    with pytest.raises(InvalidInput, match=r"Column 'n' has 39 values for 40 examples; the index holds all 40 .*annot"):
        build(40, 39)
    index = ptif.Index.open(tmp_path / "i", problem)
    in_fortieths = want[:, :40] * 60 / 40
    assert index.columns == {} and gap(index.score(queries).values, in_fortieths) < 1e-12
    index = build(40, 40)
    with pytest.raises(InvalidInput, match=r"'n' has 21 values for 20 examples; the index holds all 60 .*annotate\("):
        index.append(Stream(x[40:], y[40:]), columns={"n": range(21)})
    index = ptif.Index.open(tmp_path / "i", problem)
    assert gap(index.score(queries).values, want) < 1e-12
    with pytest.raises(InvalidInput, match=r"columns for 40 of its 60 examples: .* with index.annotate\(columns\)"):
        index.score(queries, where={"n": 3})
    index = index.annotate({"n": range(60)})
    assert len(index) == 60 and index.columns["n"].tolist() == list(range(60))
    assert index.score(queries, where={"n": [3, 57]}).indices[0].tolist() == [3, 57]


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"a": [1, 2]}, "Column 'a' has 2 values for 60 examples"),
        ({"a": [[1, 2]] * 60}, r"Column 'a' holds int64 of shape \(60, 2\)"),
        ({"a": [object()] * 60}, "Column 'a' holds object; a column has one text, number"),
        (["a"] * 60, r"columns= must be columns by name such as .*, got list"),
    ],
)
def test_columns_that_cannot_be_stored(columns: Any, message: str, tmp_path: Path) -> None:
    problem, _ = problem_of()
    with pytest.raises(InvalidInput, match=message):
        ptif.Index.build(problem, tmp_path / "i", columns=columns)
    assert not (tmp_path / "i").exists()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"ids": [60]}, "Example 60 is outside the index, which holds 0 to 59"),
        ({"ids": []}, "No example is left to score"),
        ({"ids": [0.5]}, "ids= must be whole numbers in one row"),
        ({"ids": "all"}, "ids= must be positions such as"),
        ({"ids": torch.ones(3, dtype=torch.bool)}, r"The mask ids= has shape \(3,\); the index holds 60 examples"),
        ({"where": 3}, "where= must be values by the name of a column such as"),
        ({"where": {}}, "names no column"),
        ({"where": {"sorce": "web"}}, "The index has no column 'sorce'; its columns are 'source', 'year'.*'source'"),
        ({"where": {"source": "wbe"}}, "No example has 'wbe' in the column 'source'.*'web'"),
        ({"where": {"source": 3}}, "The column 'source' of where= holds texts, and 3 was asked for"),
        ({"where": {"year": "2001"}}, "The column 'year' of where= holds numbers, and '2001' was asked for"),
        ({"where": {"year": lambda v: v.nonsense}}, "The function of the column 'year' in where= failed with Attr"),
        ({"where": {"year": lambda v: v}}, "it must give True or False for each"),
        ({"ids": ["web-3"]}, "names of examples are a column: where="),
        ({"where": lambda y: y.nonsense}, "where= failed on the labels with AttributeError"),
        ({"where": lambda y: y}, "it must give True or False for each"),
        ({"where": lambda y: y > 99}, "No example is left to score"),
        ({"normalised": 1}, "normalised=1 must be True or False"),
        ({"top": 0}, "top=0 must be a whole number of at least 1"),
        ({"memory": 100}, r"4 queries x 60 scores would take .* ask for fewer with top="),
        ({"damping": 0.0}, "The smallest eigenvalue of the curvature with damping is"),
    ],
)
def test_questions_that_cannot_be_answered(settings: dict[str, Any], message: str, tmp_path: Path) -> None:
    problem, queries = problem_of()
    columns = {"source": ["web"] * 60, "year": [2001] * 60}
    index = ptif.Index.build(problem, tmp_path / "i", ptif.exact(), representation=Factors(), columns=columns)
    with pytest.raises((InvalidInput, TooLarge, SolveFailed), match=message):
        index.score(queries, **settings)


# --------------------------------------------------------------------------- more, and less, data


class Stream(IterableDataset[Any]):
    def __init__(self, x: Tensor, y: Tensor) -> None:
        self.x, self.y = x, y

    def __iter__(self) -> Iterator[Any]:
        return iter(zip(self.x, self.y, strict=True))


def test_data_that_can_only_be_iterated(tmp_path: Path) -> None:
    problem, queries = problem_of()
    x, y = problem.data.dataset.tensors
    expected = ptif.Index.build(problem, tmp_path / "e", representation=TwoSided(3), dtype="float64").score(queries)
    for number, data in enumerate(
        (Stream(x, y), DataLoader(Stream(x, y), batch_size=7), iter(list(zip(x, y, strict=True))))
    ):
        index = ptif.Index.build(
            problem, tmp_path / str(number), representation=TwoSided(3), dtype="float64", data=data, shard=900
        )
        assert gap(index.score(queries).values, expected.values) < 1e-12


def test_examples_can_be_added(tmp_path: Path) -> None:
    problem, queries = problem_of()
    x, y = problem.data.dataset.tensors
    expected = ptif.Index.build(problem, tmp_path / "e", representation=TwoSided(3), dtype="float64").score(queries)
    index = ptif.Index.build(
        problem, tmp_path / "i", representation=TwoSided(3), dtype="float64", data=(x[:25], y[:25]), shard=900
    )
    longer = index.append((x[25:40], y[25:40])).append(TensorDataset(x[40:], y[40:]))
    assert len(index) == 25 and len(longer) == 60
    scores = longer.score(queries)
    assert gap(scores.values, expected.values) < 1e-12
    assert "35 of the examples were appended" in str(scores.diagnostics)
    with pytest.raises(InvalidInput, match=r"needs the training data; open the index with"):
        ptif.Index.open(tmp_path / "i", problem.model).append((x, y))
    with pytest.raises(InvalidInput, match=r"The data hold no example"):
        longer.append(Stream(x[:0], y[:0]))
    assert len(ptif.Index.open(tmp_path / "i", problem)) == 60


def test_examples_can_be_removed(tmp_path: Path) -> None:
    problem, queries = problem_of()
    index = ptif.Index.build(problem, tmp_path / "i", shard=2000)
    whole = index.score(queries)
    gone = [0, 7, 8, 59]
    left = torch.tensor([i for i in range(60) if i not in gone])
    smaller = index.remove(gone)
    before = smaller.folder.manifest.bytes
    steps = (lambda i: i, lambda i: i.compact(), lambda i: ptif.Index.open(tmp_path / "i", problem.model))
    for step in steps:
        open_index = step(smaller)
        scores = open_index.score(queries)
        assert scores.indices is not None and torch.equal(scores.indices[0], left) and scores.n_train == 60
        assert gap(scores.values, whole.values[:, left]) < 1e-12
        assert open_index.self_influence()[gone].tolist() == [0.0] * 4
        assert "4 examples were removed" in str(scores.diagnostics)
    assert open_index.folder.manifest.bytes < before
    with pytest.raises(InvalidInput, match=r"Example 7 was removed from the index; leave it out"):
        open_index.score(queries, ids=[6, 7])
    for gone_or_none, words in (
        ([99], r"Example 99 is outside the index"),
        ([6, 7], r"Example 7 was removed from the index before; name only what it still holds"),
        ([], r"No example was named that the index still holds"),
    ):
        with pytest.raises(InvalidInput, match=words):
            open_index.remove(gone_or_none)
    assert open_index.score(queries, ids={9, 6}).indices[0].tolist() == [6, 9]  # type: ignore[index]
    # A mask is one, and not the positions 0 and 1.
    mask = torch.zeros(60, dtype=torch.bool).index_fill_(0, torch.tensor([1, 2, 3, 4, 5]), True)
    again = open_index.remove(mask).remove(6).compact()  # a whole file
    assert again.score(queries).shape == (4, 50) and again.labels is not None


def test_every_query_may_have_its_own_candidates(tmp_path: Path) -> None:
    problem, queries = problem_of()
    index = ptif.Index.build(problem, tmp_path / "i", representation=TwoSided(3), dtype="float64", shard=900)
    whole = index.score(queries)
    own = torch.stack([torch.randperm(60, generator=torch.Generator().manual_seed(q))[:5] for q in range(4)])
    for ids in (own, own.tolist()):
        each = index.score(queries, ids=ids)
        assert torch.equal(each.indices, own) and each.n_train == 60
        assert gap(each.values, whole.values.gather(1, own)) < 1e-12
    best = index.score(queries, ids=own, top=2)
    assert [i for i, _ in best.helpful(3, 2)] == own[3][whole.values[3, own[3]].argsort(descending=True)][:2].tolist()
    index = index.remove([int(own[1, 2])])
    for settings, message in (
        ({"ids": own}, r"Example \d+ was removed from the index; leave it out of ids="),
        ({"ids": own[:3]}, r"ids= holds 3 lists for 4 rows of scores"),
        (
            {"ids": [[1], [2], [3], [4]], "where": lambda y: y == 1},
            r"where= chooses for all queries, and ids= is a list",
        ),
        ({"ids": [[1], [2], [3], [4]], "top": 1, "rerank": 2}, r"rerank= finds candidates, and ids= names them for"),
    ):
        with pytest.raises(InvalidInput, match=message):
            index.score(queries, **settings)  # type: ignore[arg-type]


# --------------------------------------------------------------------------- choosing


def test_the_most_exact_representation_that_fits_is_chosen() -> None:
    problem, _ = single(*problem_of())
    described = {
        budget: ptif.Index.forecast(problem, budget=budget, dtype="float16").representation
        for budget in (60 * 70, 60 * 120, 60 * 1000)
    }
    assert list(described.values())[2] == "Factors()"
    forecast = ptif.Index.forecast(problem)
    assert forecast.representation == "Factors()" and forecast.examples == 60 and forecast.dtype == "float32"
    assert "60 examples of" in str(forecast) and "which fit (20 GB / 60 examples" in forecast.why
    with pytest.raises(TooLarge, match=r"Nothing useful fits into 1 bytes per example"):
        ptif.Index.forecast(problem, budget=60)
    with pytest.raises(TooLarge, match=r"60 examples of .* bytes each in TwoSided\(k_in=3\) would take"):
        ptif.Index.forecast(problem, representation=TwoSided(3), budget=60)


def test_a_forecast_counts_the_bytes(tmp_path: Path) -> None:
    problem, _ = single(*problem_of())
    for representation in (Factors(), TwoSided(3), Sketch(20)):
        forecast = ptif.Index.forecast(problem, representation=representation)
        index = ptif.Index.build(problem, tmp_path / repr(representation), representation=representation)
        stored = sum(
            sum(t.nbytes for t in index.folder.read(s.file).tensors.values()) for s in index.folder.manifest.shards
        )
        assert stored == pytest.approx(forecast.bytes, rel=0.01)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"method": "source"}, "needs run|does not give"),
        ({"method": ptif.methods.nystrom()}, "An index has no use for preconditioner="),
        ({"method": ptif.methods.grad_cos()}, "An index holds raw scores, not scaling="),
        (
            {"method": ptif.ekfac(ptif.damping.FromTraining(0.1, 9, adam_batch=8))},
            r"An index cannot measure damping=FromTraining\(.*adam_batch=8\), .* PerDirection\(\), or Absolute",
        ),
        ({"method": ptif.trak(10)}, "the projection of an index is its representation="),
        ({"method": ptif.methods.arnoldi()}, r"has no eigenbasis in which rows could be stored; use ptif.ekfac\(\)"),
        ({"representation": "facters"}, "representation='facters' is none; write 'auto', Factors"),
        ({"representation": TwoSided}, r"representation= is the class TwoSided; write TwoSided\(\.\.\.\), an instance"),
        ({"dtype": "float8"}, "dtype='float8' is none of those that are stored; choose one of float32, float16"),
        ({"overwrite": "yes"}, "overwrite='yes' must be True or False"),
        ({"budget": "much"}, "is no amount of memory"),
    ],
)
def test_an_index_that_cannot_be_built(settings: dict[str, Any], message: str, tmp_path: Path) -> None:
    problem, _ = problem_of()
    with pytest.raises((InvalidInput, TooLarge), match=message):
        ptif.Index.build(problem, tmp_path / "i", **settings)
    if "method" in settings and "eigenbasis" not in message:
        with pytest.raises(InvalidInput, match=message):
            ptif.Index.forecast(problem, settings["method"])
    assert not (tmp_path / "i" / "index.json").exists()


def test_an_index_of_a_method_that_damps_layers_apart_and_one_without_a_folder(tmp_path: Path) -> None:
    problem, _ = problem_of()
    with pytest.raises(InvalidInput, match=r"the one asked for \(the method's default where none was\) differs"):
        ptif.Index.build(problem, tmp_path / "i", "datainf")
    with pytest.raises(InvalidInput, match=r"named ''; give the path of a folder of its own"):
        ptif.Index.build(problem, "")


def test_an_index_neither_takes_nor_advises_a_damping_that_measures_gradients(tmp_path: Path) -> None:
    problem, queries = problem_of()
    index = ptif.Index.build(problem, tmp_path / "i")
    for rule in (ptif.damping.FromTraining(0.1, 9, adam_batch=8), ptif.damping.FromCurve()):
        with pytest.raises(InvalidInput, match=r"An index cannot measure damping=From"):
            index.score(queries, damping=rule)
    far = replace(index.score(queries).diagnostics, relative_gradient=0.9, relative_gradient_error=0.0)
    advice = str(far.checks()[0])
    assert "far from a minimum" in advice and "FromTraining(lr, steps) after SGD" in advice
    assert "adam_batch" not in advice


def test_problems_that_have_no_index(tmp_path: Path) -> None:
    problem, _ = problem_of()
    with pytest.raises(InvalidInput, match=r"Index.build\(\) takes a Problem, got Sequential; write ptif.Index.build"):
        ptif.Index.build(problem.model, tmp_path / "i")  # type: ignore[arg-type]
    with pytest.raises(InvalidInput, match=r"the problem has checkpoints; load one of them"):
        ptif.Index.build(problem.with_(checkpoints=[problem.model.state_dict()]), tmp_path / "i")
    every = ptif.WeightDecay(0.1, per_example=True)
    with pytest.raises(InvalidInput, match=r"Weight decay that every example carries is no part of stored gradients"):
        ptif.Index.build(problem.with_(weight_decay=every), tmp_path / "i")


# --------------------------------------------------------------------------- two stages


def test_candidates_are_ranked_by_exact_scores(tmp_path: Path) -> None:
    problem, queries = problem_of()
    exact = ptif.ekfac().fit(problem).score(queries)
    index = ptif.Index.build(problem, tmp_path / "i", representation=TwoSided(2), shard=2000)
    everything = index.score(queries, top=5, rerank=30)
    for q in range(4):
        assert [i for i, _ in everything.helpful(q, 5)] == [i for i, _ in exact.helpful(q, 5)]
        assert [i for i, _ in everything.harmful(q, 5)] == [i for i, _ in exact.harmful(q, 5)]
    some = ptif.Index.open(tmp_path / "i", problem).score(queries, top=3, rerank=8, audit=20)
    assert some.shape == (4, 6) and some.provenance == exact.provenance
    assert gap(some.values, exact.values.gather(1, some.indices)) < 1e-9
    named = index.score(queries, top=8).indices
    for q in range(4):
        best = named[q][exact.values[q, named[q]].argsort(descending=True)]
        assert [i for i, _ in some.helpful(q, 3)] == best[:3].tolist()
    other = index.score(queries, top=3, rerank=8, method=ptif.gauss_newton(), audit=0)
    assert gap(other.values, ptif.gauss_newton().fit(problem).score(queries).values.gather(1, other.indices)) < 1e-2


def test_what_the_first_stage_missed_is_bounded(tmp_path: Path) -> None:
    """Counted by hand from all exact scores."""
    problem, queries = problem_of()
    exact = ptif.ekfac().fit(problem).score(queries).values
    index = ptif.Index.build(problem, tmp_path / "i", representation=Sketch(6))
    scores = index.score(queries, top=2, rerank=4, audit=1000)
    candidates = index.score(queries, top=4).indices.unique()
    others = [i for i in range(60) if i not in candidates.tolist()]
    better = sum(
        int((exact[q, others] > scores.values[q, 1]).sum() + (exact[q, others] < scores.values[q, 2]).sum())
        for q in range(4)
    )
    tried = 4 * len(others)
    (note,) = (note for note in scores.diagnostics.notes if "candidates of the index" in note)
    assert f"of all {len(others)} other examples {better} of {tried} scores would have entered a top list" in note
    assert "at most" not in note, "no example is left that was not looked at"
    bound = Recall("", len(others), tried, better, 7).bound
    assert bound == pytest.approx(float(stats.beta.ppf(0.95, better + 1, tried - better)), rel=0.03)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rerank": 10}, r"rerank= gives exact scores to the ends of a ranking, and no top= was asked for"),
        ({"rerank": 10, "top": 3, "normalised": True}, r"and normalised=True was asked for; write top=10, rerank=10"),
        ({"rerank": 2, "top": 3}, r"rerank=2 must be a whole number of at least 3; it is how many candidates"),
        ({"rerank": 3, "top": 3, "audit": -1}, r"audit=-1 must be a whole number of at least 0"),
        ({"top": 3, "method": "ekfac"}, r"method= is that of rerank=, which is not given"),
        ({"top": 3, "rerank": 5, "by": "layer"}, "by= tells the index's own scores apart, and rerank= replaces them"),
        (
            {"rerank": 3, "top": 3, "method": ptif.methods.Random()},
            r"rerank= needs an Influence\(...\) such as method=ptif.ekf",
        ),
    ],
)
def test_reranking_that_cannot_be_done(settings: dict[str, Any], message: str, tmp_path: Path) -> None:
    problem, queries = problem_of()
    index = ptif.Index.build(problem, tmp_path / "i", representation=TwoSided(2))
    with pytest.raises(InvalidInput, match=message):
        index.score(queries, **settings)


def test_reranking_needs_the_data_and_the_method(tmp_path: Path) -> None:
    problem, queries = problem_of()
    x, y = problem.data.dataset.tensors
    method = ptif.ekfac(examples=30)
    index = ptif.Index.build(problem, tmp_path / "i", method, representation=TwoSided(2))
    with pytest.raises(InvalidInput, match=r"rerank= needs the 60 training examples of the index, and none are given"):
        ptif.Index.open(tmp_path / "i", problem.model).score(queries, top=3, rerank=5)
    with pytest.raises(InvalidInput, match=r"and the index was built with a method of your own; give method="):
        index.score(queries, top=3, rerank=5)
    assert index.score(queries, top=3, rerank=5, method=method).shape == (4, 6)
    with pytest.raises(InvalidInput, match=r"and this index has appended ones; build an index of all data"):
        index.append((x, y)).score(queries, top=3, rerank=5, method=method)


# --------------------------------------------------------------------------- the data that it was built from


def test_other_data_than_those_of_the_index_are_refused(tmp_path: Path) -> None:
    """They would name scores by other examples; earlier versions kept no digests, and their indices open as before."""
    problem, queries = problem_of()
    x, y = problem.data.dataset.tensors
    more = (torch.cat([x, x[:7] + 1]), torch.cat([y, y[:7]]))
    index = ptif.Index.build(problem, tmp_path / "i", data=(x[:40], y[:40]), shard=2000)
    assert index.score(queries).train_source.dataset.tensors[0].shape == (40, 5)
    index = index.append((x[40:], y[40:])).append((more[0][60:], more[1][60:])).remove([0, 5]).compact()
    for n in (40, 60, 67):
        for same in ((more[0][:n], more[1][:n]), [(more[0][i], int(more[1][i])) for i in range(n)]):
            opened = ptif.Index.open(tmp_path / "i", problem.with_(data=same))
            assert opened.score(queries).train_source is not None
    for other, match in (
        ((x.flip(0), y.flip(0)), r"holds 67 examples, and example 0 is another one; give the same data in the same"),
        ((x[:50], y[:50]), r"These are not the data that the index in .* it holds 67 examples, and 50 were given"),
        ((x, 1 - y), "example 0 is another one"),
        ((torch.cat([x[:59], x[:1]]), y), "example 59 is another one"),
    ):
        with pytest.raises(InvalidInput, match=match):
            ptif.Index.open(tmp_path / "i", problem.with_(data=other))
        with pytest.raises(InvalidInput, match=match):
            ptif.Index.open(tmp_path / "i", problem.model, train=other)
    # An index of other examples than its curvature is of opens with either, and names only its own.
    index = ptif.Index.build(problem, tmp_path / "s", data=Stream(more[0][7:], more[1][7:]))
    opened = ptif.Index.open(tmp_path / "s", problem)
    assert index.score(queries).train_source is None and opened.score(queries).train_source is None
    with pytest.raises(InvalidInput, match="needs the 60 training examples of the index, and 60 others are given"):
        opened.score(queries, top=2, rerank=5)
    file = tmp_path / "i" / "index.json"
    stored = json.loads(file.read_text())
    del stored["facts"]["curvature data"]
    for shard in stored["shards"]:
        del shard["sample"]
    file.write_text(json.dumps(stored))
    assert ptif.Index.open(tmp_path / "i", problem.with_(data=(x[:50], y[:50]))).score(queries).shape == (4, 65)
