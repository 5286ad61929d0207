"""Laws of `Scores`: order, ties, sign, slicing, refusals, the seed's layout; and of the checklist."""

from __future__ import annotations

import json
import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pytorch_influence_functions.core.errors import InvalidInput, MissingExtra, NonFinite, UnknownName
from pytorch_influence_functions.scores.diagnostics import Diagnostics
from pytorch_influence_functions.scores.parts import PartScores
from pytorch_influence_functions.scores.scores import Scores

ROW = [0.1, -0.3, 0.2, 0.1, 0.0]


def scores(rows: Any = (ROW,), **options: Any) -> Scores:
    return Scores(torch.tensor(rows, dtype=torch.float64), **options)


def ids(pairs: list[tuple[int, float]]) -> list[int]:
    return [i for i, _ in pairs]


def test_queries_are_gone_through_one_by_one() -> None:
    several = scores([ROW, [2 * v for v in ROW]])
    assert [row.values[0].tolist() for row in several] == several.values.tolist()
    assert [label for _, label in zip(several, "ab", strict=True)] == ["a", "b"] and 3 not in several


def test_a_part_is_asked_for_by_its_name() -> None:
    with pytest.raises(UnknownName, match=r"^There is no part 0 of the model here\.$"):
        PartScores({"0": scores()})[0]  # type: ignore[index]


# --------------------------------------------------------------------------- order


def test_for_a_loss_helpful_is_descending_and_ties_go_by_index() -> None:
    s = scores()
    assert s.helpful(0, None) == [(2, 0.2), (0, 0.1), (3, 0.1), (4, 0.0), (1, -0.3)]
    assert s.harmful(0, None) == [(1, -0.3), (4, 0.0), (0, 0.1), (3, 0.1), (2, 0.2)]


def test_for_a_measure_where_more_is_better_the_signs_turn() -> None:
    s = scores(lower_is_better=False)
    assert ids(s.helpful(0, 3)) == [1, 4, 0]
    assert ids(s.harmful(0, 3)) == [2, 0, 3]


def test_order_is_not_a_filter_by_sign() -> None:
    s = scores([[3.0, 1.0, 2.0]])
    assert s.harmful(0, 2) == [(1, 1.0), (2, 2.0)]


def test_more_than_there_are_gives_all_and_the_result_is_plain_numbers() -> None:
    found = scores().helpful(0, k=99)
    assert len(found) == 5 and type(found[0][0]) is int and type(found[0][1]) is float


tied = st.lists(st.lists(st.integers(-2, 2), min_size=6, max_size=6), min_size=1, max_size=3)


@given(rows=tied, lower=st.booleans(), k=st.integers(1, 8))
def test_top_keeps_both_ends_whatever_the_ties(rows: list[list[int]], lower: bool, k: int) -> None:
    full = scores([[float(v) for v in row] for row in rows], lower_is_better=lower)
    top = full.top(k)
    assert top.shape == (len(rows), min(2 * k, 6)) and top.n_train == 6
    for q in range(len(rows)):
        assert top.helpful(q, k) == full.helpful(q, k)
        assert top.harmful(q, k) == full.harmful(q, k)
        python = sorted(range(6), key=lambda i: ((-1 if lower else 1) * rows[q][i], i))
        assert ids(full.helpful(q, None)) == python == full.helpful_order(q).tolist()
        assert top.indices is not None
        assert top.indices[q].tolist() == [i for i in python if i in set(top.indices[q].tolist())]
    again = top.top(1)
    assert again.helpful(0, 1) == full.helpful(0, 1) and again.harmful(0, 1) == full.harmful(0, 1)


# --------------------------------------------------------------------------- mean and slicing


def test_the_mean_over_queries_orders_the_top_level_lists() -> None:
    s = scores([[1.0, 0.0, 0.5], [-3.0, 0.0, 0.5]], query_labels=[1, 2])
    mean = s.mean()
    assert mean.shape == (1, 3) and mean.values[0].tolist() == [-1.0, 0.0, 0.5]
    assert s.helpful(None, 2) == [(2, 0.5), (1, 0.0)] == mean.helpful(0, 2)
    assert s.harmful(None, 1) == [(0, -1.0)]
    assert s.helpful_order().tolist() == [2, 1, 0] and s.harmful_order().tolist() == [0, 1, 2]
    assert mean.query_ids.tolist() == [-1] and mean.describe_query(0) == "mean over 2 queries"
    assert s[0].helpful_order().tolist() == s.helpful_order(0).tolist()


def test_the_mean_of_float32_scores_is_taken_in_float64() -> None:
    values = torch.tensor([[1e8], [1.0], [-1e8]], dtype=torch.float32)
    assert Scores(values).mean().values.item() == pytest.approx(1 / 3, rel=1e-12)


def test_slicing_queries_takes_their_labels_and_names_along() -> None:
    s = scores(torch.arange(12.0).reshape(4, 3).tolist(), query_labels=torch.tensor([5, 6, 7, 8]),
               query_names=["a", "b", "c", "d"])  # fmt: skip
    part = s[1:3]
    assert part.shape == (2, 3) and part.query_ids.tolist() == [1, 2] and part.query_names == ["b", "c"]
    assert s[-1].query_ids.tolist() == [3] and len(s[-1]) == 1
    assert s[[3, 0]].query_labels.tolist() == [8, 5]  # type: ignore[union-attr]
    assert s[torch.tensor([True, False, False, True])].query_ids.tolist() == [0, 3]
    assert s[::-1].query_ids.tolist() == [3, 2, 1, 0]
    assert part[1].query_ids.tolist() == [2]


def test_picked_training_examples_keep_their_positions_in_the_dataset() -> None:
    s = scores([ROW, ROW], train_labels=[10, 11, 12, 13, 14])
    part = s[:, [4, 1]]
    assert part.shape == (2, 2) and part.n_train == 5
    assert part.helpful(0, None) == [(4, 0.0), (1, -0.3)]
    assert part.mean().helpful(0, 1) == [(4, 0.0)]
    assert part.describe_train(4) == "#4 14"
    assert s[0, 2:].helpful(0, None) == [(2, 0.2), (3, 0.1), (4, 0.0)]


# --------------------------------------------------------------------------- refusals


def bad_values(at: tuple[int, int], value: float) -> torch.Tensor:
    values = torch.zeros(3, 4)
    values[at] = value
    return values


def test_nothing_is_ranked_around_a_nan() -> None:
    with pytest.raises(NonFinite, match="NaN or infinite for query 2 at training index 3; look"):
        Scores(bad_values((2, 3), math.nan))
    with pytest.raises(NonFinite, match="for query 7 at training index 3;"):
        Scores(bad_values((2, 3), math.inf), query_ids=torch.tensor([5, 6, 7]))
    with pytest.raises(NonFinite, match="for query 0 at training index 90;"):
        Scores(torch.tensor([[1.0, -math.inf]]), indices=torch.tensor([[3, 90]]), n_train=100)


PAIR = torch.zeros(1, 2)
REFUSED = {
    "one dimension": (lambda: Scores(torch.zeros(3)), r"shape \(queries, training examples\).*got \(3,\)"),
    "integers": (lambda: Scores(torch.zeros(1, 3, dtype=torch.long)), "got .* of torch.int64"),
    "empty": (lambda: Scores(torch.zeros(0, 3)), "at least one of each"),
    "train labels": (lambda: scores(train_labels=[1, 2]), "`train_labels` has 2 entries; expected 5"),
    "query names": (lambda: scores(query_names=["a", "b"]), "`query_names` has 2 entries; expected 1"),
    "n_train": (lambda: scores(n_train=9), "5 scores per query of n_train=9.*give `indices`"),
    "no n_train": (lambda: Scores(PAIR, indices=torch.tensor([[0, 1]])), "n_train=None"),
    "indices shape": (
        lambda: Scores(PAIR, indices=torch.tensor([[0]]), n_train=5),
        r"`indices` has shape \(1, 1\) and the scores have \(1, 2\)",
    ),
    "indices range": (lambda: Scores(PAIR, indices=torch.tensor([[0, 5]]), n_train=5), "must lie in 0 to 4"),
    "indices twice": (lambda: Scores(PAIR, indices=torch.tensor([[3, 3]]), n_train=5), "example twice"),
    "k = 0": (lambda: scores().helpful(0, 0), "^k=0 must be a whole number of at least 1; None stands for all"),
    "k = -1": (lambda: scores().top(-1), "^k=-1 must be a whole number of at least 1; None stands for all"),
    "no such query": (lambda: scores().helpful(4), "There is no query 4: they are numbered 0 to 0"),
    "no such example": (lambda: scores()[:, [5]], "There is no training example 5"),
    "example twice": (lambda: scores()[:, [1, -4]], "A training example was picked twice"),
    "nothing": (lambda: scores()[5:], "No query was picked"),
    "fractions": (lambda: scores()[torch.tensor([0.5])], "picked by whole numbers.*torch.float"),
    "columns of top": (lambda: scores().top(1)[:, [0]], "Only some training examples are held"),
    "mean of top": (
        lambda: scores([[1.0, 2.0, 3.0], [3.0, 2.0, 1.0]])[:].top(1).mean(),
        "Each query holds other training examples",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_makes_no_sense_is_refused_in_one_sentence(name: str) -> None:
    make, match = REFUSED[name]
    with pytest.raises(InvalidInput, match=match) as caught:
        make()
    assert "\n" not in str(caught.value)


# --------------------------------------------------------------------------- the seed's layout


def test_json_has_the_seeds_layout() -> None:
    d = Diagnostics(seconds=3.0, n_queries=2)
    s = scores([ROW, ROW], query_labels=torch.tensor([3, 8]), query_ids=torch.tensor([4, 9]), diagnostics=d)
    found = json.loads(s.to_json(top_k=2))
    assert list(found) == ["4", "9"]
    assert found["9"] == {
        "label": 8,
        "num_in_dataset": 9,
        "time_calc_influence_s": 1.5,
        "influence": ROW,
        "harmful": [1, 4],
        "helpful": [2, 0],
    }
    assert len(json.loads(s.to_json(top_k=None))["4"]["helpful"]) == 5
    assert list(json.loads(s.mean().to_json())) == ["mean"]


def test_json_lists_are_cut_at_500_by_default() -> None:
    entry = json.loads(Scores(torch.randn(1, 600)).to_json())["0"]
    assert (len(entry["influence"]), len(entry["helpful"]), len(entry["harmful"])) == (600, 500, 500)


def test_json_of_some_examples_says_which() -> None:
    entry = scores().top(1).to_dict()["0"]
    assert entry["influence_indices"] == [2, 1] and entry["influence"] == [0.2, -0.3]


def test_json_is_written_where_asked(tmp_path: Any) -> None:
    s = scores()
    text = s.to_json(tmp_path / "new" / "s.json")
    assert (tmp_path / "new" / "s.json").read_text() == text


# --------------------------------------------------------------------------- tables and words


def test_frame_is_long_and_ranked() -> None:
    pytest.importorskip("pandas")
    s = scores([ROW, [-v for v in ROW]], train_labels=[0, 1, 0, 1, 0], query_labels=np.array([1, 0]),
               class_names=["cat", "dog"], train_names=list("abcde"))  # fmt: skip
    frame = s.to_frame()
    assert list(frame.columns) == ["query", "train", "score", "rank", "query_label", "query_class", "train_label",
                                   "train_class", "train_name"]  # fmt: skip
    assert len(frame) == 10 and frame["rank"].tolist() == [1, 2, 3, 4, 5] * 2
    assert frame[frame["query"] == 0]["train"].tolist() == ids(s.helpful(0, None))
    row = frame[(frame["query"] == 1) & (frame["train"] == 1)].iloc[0]
    assert row["score"] == 0.3 and row["rank"] == 1
    assert (row["train_class"], row["query_class"], row["train_name"]) == ("dog", "cat", "b")


def test_an_absent_pandas_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "pandas", None)
    with pytest.raises(MissingExtra, match=r"pytorch-influence-functions\[frame\]"):
        scores().to_frame()


def test_repr_says_shape_method_damping_and_extremes() -> None:
    words = repr(scores(diagnostics=Diagnostics(method="dual()", damping=0.25)).top(1))
    assert "1 query x 2 of 5 training examples, lambda = 0.25, helpful = positive)\n  dual()\n" in words
    assert "query 0, most helpful: 2 (+0.2), 1 (-0.3)" in words


def test_html_escapes_everything_from_the_data() -> None:
    evil = "<script>alert('x')</script>"
    s = scores(class_names=[evil], train_labels=[0] * 5, query_labels=[0], train_names=[evil] * 5,
               query_names=[evil], diagnostics=Diagnostics(method=evil))  # fmt: skip
    text = s._repr_html_()
    assert "<script" not in text and "&lt;script&gt;" in text
    assert "11 more" not in scores([ROW] * 12)._repr_html_() and "2 more" in scores([ROW] * 12)._repr_html_()


def test_labels_in_words() -> None:
    s = scores(class_names=["cat", "dog"])
    assert s.label_name(torch.tensor(1)) == "dog" and s.label_name(np.int64(0)) == "cat"
    assert s.label_name(7) == "7" and s.label_name(0.123456) == "0.1235" and s.label_name(None) == ""


# --------------------------------------------------------------------------- diagnostics

GOOD = Diagnostics(
    method="gauss_newton()", why="small", damping=0.1, residual_max=1e-5, residual_mean=1e-6, steps=7,
    smallest_curvature=0.0, n_train=100, n_queries=2, parameters_used=30, parameters_total=30,
    gradient_shares={"a": 0.25, "b": 0.75}, relative_gradient=0.01, gradient_examples=64, deterministic="yes",
    routes={"a": "rule", "b": "vmap"}, seconds=1.5, notes=("look here",),
)  # fmt: skip


def test_a_good_run_passes_every_check() -> None:
    assert [c.status for c in GOOD.checks()] == ["ok"] * 7 and GOOD.worst == "ok"
    words = str(GOOD)
    for part in ("gauss_newton()", "2 queries x 100", "vmap: b", "b 75%, a 25%", "look here", "1e-05", "1.5 s"):
        assert part in words
    assert words.isascii()


BROKEN = [
    ("minimum", {"relative_gradient": 0.08}, "warn", "not quite"),
    ("minimum", {"relative_gradient": 0.09, "relative_gradient_error": 0.01}, "warn", "9.0% +- 1.0% of"),
    ("minimum", {"relative_gradient": 0.14, "relative_gradient_error": 0.03}, "warn", "not quite"),
    ("minimum", {"relative_gradient": 0.9}, "bad", "far from a minimum"),
    ("minimum", {"relative_gradient": math.nan}, "warn", "not measured"),
    ("solve", {"residual_max": 0.05}, "warn", "loosely"),
    ("solve", {"residual_max": 0.5}, "bad", "not solved"),
    ("solve", {"residual_max": math.nan}, "warn", "not measured"),
    ("damping", {"smallest_curvature": -0.01}, "warn", "only lambda outweighs"),
    ("damping", {"smallest_curvature": -0.1}, "bad", "does not outweigh"),
    ("damping", {"damping": math.nan}, "warn", "not recorded"),
    ("damping", {"smallest_curvature": None}, "ok", "not measured"),
    ("parameters", {"gradient_shares": {"a": 0.5, "(left out)": 0.5}}, "warn", "with 50.0% of"),
    ("parameters", {"gradient_shares": {}, "parameters_used": 3}, "warn", "share of the gradient"),
    ("parameters", {"parameters_total": 0}, "warn", "not recorded"),
    ("mode", {"mode": "train mode"}, "warn", "train mode"),
    ("mode", {"mode": ""}, "warn", "not recorded"),
    ("data", {"deterministic": "no"}, "bad", "differently twice"),
    ("data", {"deterministic": "not checked"}, "warn", "not checked"),
    ("loss", {"reduction": ""}, "warn", "not recorded"),
]


def test_a_gradient_within_its_sampling_error_is_no_alarm() -> None:
    d = Diagnostics.from_dict(GOOD.to_dict() | {"relative_gradient": 0.08, "relative_gradient_error": 0.02})
    assert d.checks()[0].status == "ok" and "8.0% +- 2.0% of a typical example's (on 64 of 100 ex" in d.checks()[0].text


@pytest.mark.parametrize(("name", "change", "status", "text"), BROKEN)
def test_each_broken_assumption_shows_in_its_own_line_only(
    name: str, change: dict[str, Any], status: str, text: str
) -> None:
    d = Diagnostics.from_dict(GOOD.to_dict() | change)
    found = {c.name: c for c in d.checks()}
    assert found[name].status == status and text in found[name].text
    assert all(c.status == "ok" for c in d.checks() if c.name != name)
    assert d.worst == status and str(found[name]) in str(d)


def test_diagnostics_survive_json_with_their_nans() -> None:
    for d in (Diagnostics(), GOOD, Diagnostics(residual_max=math.inf, gradient_shares={"a": math.nan})):
        back = Diagnostics.from_dict(json.loads(json.dumps(d.to_dict(), allow_nan=False)))
        assert repr(back) == repr(d)
    with pytest.raises(InvalidInput, match="unknown field 'colour'"):
        Diagnostics.from_dict({"colour": 1})


def test_diagnostics_do_not_follow_their_makers_dictionaries() -> None:
    shares = {"a": 1.0}
    d = Diagnostics(gradient_shares=shares)
    shares["b"] = 2.0
    assert d.gradient_shares == {"a": 1.0}
