"""The report page without a browser: what it holds, for any data, and that nothing in it can run."""

from __future__ import annotations

import base64
import hashlib
import io
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from pytorch_influence_functions.core.errors import InvalidInput, NonFinite
from pytorch_influence_functions.report import effects
from pytorch_influence_functions.report import page as pages
from pytorch_influence_functions.report.ranking import Classes, Sums, extremes, histogram, score_columns
from pytorch_influence_functions.scores.scores import Scores
from tests.interface.report_cases import ATTACK, CLASSES, Page, pictures, probabilities, tables, texts, values

pytest.importorskip("jinja2")
images = pytest.importorskip("PIL.Image")


def written(scores: Scores, folder: Path, **options: Any) -> Page:
    return Page(scores.report(folder / "report.html", **options).path)


# --------------------------------------------------------------------------- contents


@pytest.mark.parametrize("lower_is_better", [True, False])
@pytest.mark.parametrize("top", [None, 4])
def test_the_lists_are_those_of_the_scores(tmp_path: Path, lower_is_better: bool, top: int | None) -> None:
    s = pictures(lower_is_better=lower_is_better)
    s = s if top is None else s.top(top)
    page = written(s, tmp_path, k=3)
    assert len(page.queries) == 6
    for q, record in enumerate(page.queries):
        for side, found in (("help", s.helpful(q, 3)), ("harm", s.harmful(q, 3))):
            assert [i for i, _ in record[side]] == [i for i, _ in found]
            assert [x for _, x in record[side]] == pytest.approx([x for _, x in found], rel=1e-3)
        assert sum(record["hist"]["n"]) == s.shape[1]
        assert {i for side in ("help", "harm") for i, _ in record[side]} <= set(page.examples)


def test_examples_that_were_not_scored_are_not_ranked(tmp_path: Path) -> None:
    some = Scores(torch.tensor([[0.3, -0.1, 0.2]]), indices=torch.tensor([[7, 2, 4]]), n_train=9)
    index = written(some, tmp_path).index
    assert [i for i, _ in index["top"]["help"]] == [7, 4, 2]
    assert [i for i, _ in index["top"]["harm"]] == [2, 4, 7]


@pytest.mark.parametrize("k", [1, 3, 50])
def test_ends_are_those_of_the_scores_also_among_equals(k: int) -> None:
    s = Scores(torch.tensor([[1.0, 2.0, 2.0, 0.0, 0.0, 2.0, 0.0], [0.0] * 7]))
    for held in (s, replace(s, lower_is_better=False), s.top(2), s[:, [6, 0, 3, 1]]):
        for q in (0, 1):
            assert extremes(held, q, k) == (held.helpful(q, k), held.harmful(q, k))


def test_sums_over_queries_are_means_and_classes_split_them() -> None:
    s = pictures()
    classes = Classes.of(s)
    assert classes is not None and classes.names == CLASSES
    sums = Sums.of(s, classes)
    assert sums.harm is not None
    assert torch.allclose(sums.mean, s.values.double().mean(0))
    assert torch.allclose(sums.harm[1], -s.values.double()[[1, 4]].mean(0))
    held = Sums.of(s.top(3), None)
    full = torch.zeros(6, 40).scatter_(1, s.top(3).indices, s.top(3).values)
    assert torch.allclose(held.mean, full.double().mean(0))


def test_numbers_are_not_classes() -> None:
    assert Classes.of(pictures(train_labels=torch.rand(40), query_labels=torch.rand(6))) is None
    assert Classes.of(pictures(train_labels=list(range(100, 140)), query_labels=[0] * 6)) is not None
    many = Scores(torch.randn(1, 90), train_labels=list(range(90)), query_labels=[0])
    assert Classes.of(many) is None and Classes.of(Scores(values())) is None


def test_the_histogram_counts_every_score_once_and_a_constant_row_too() -> None:
    found = histogram(torch.tensor([0.0, 1.0, 1.0, 0.5]))
    assert sum(found["n"]) == 4 and found["n"][0] == 1 and found["n"][-1] == 2
    assert histogram(torch.ones(5))["n"] == [5]


def test_the_queue_is_worst_first_with_its_evidence(tmp_path: Path) -> None:
    own = torch.arange(40.0).flip(0)
    page = written(pictures(), tmp_path, self_influence=own)
    assert [e["i"] for e in page.index["queue"]] == list(range(20))  # at most a tenth, at least 20
    assert [e["o"] for e in page.index["queue"][:2]] == [39.0, 38.0] and page.index["queue"][0]["p"] == 39 / 40
    assert page.examples[3]["o"] == 36.0
    s = pictures()
    by_mean = written(s, tmp_path).index["queue"]
    assert [e["i"] for e in by_mean[:5]] == [i for i, _ in s.harmful(None, 5)]
    for entry in by_mean:
        for q, score in entry["q"]:
            assert score < 0 and q % 3 != entry["i"] % 3  # harm, to queries of other classes
        assert entry.get("g") != CLASSES[entry["i"] % 3]


def test_a_planted_wrong_label_is_suggested_the_right_one(tmp_path: Path) -> None:
    v = values() * 0.01
    v[[1, 4], 6] = -1.0  # example 6 is a cat by label, and harms the dogs
    labels = torch.arange(40) % 3
    page = written(Scores(v, train_labels=labels, query_labels=labels[:6], class_names=CLASSES), tmp_path)
    first = page.index["queue"][0]
    assert (first["i"], first["g"]) == (6, "dog")
    assert [q for q, _ in first["q"][:2]] == [1, 4]


def test_duplicates_and_conflicts_are_found_and_nothing_else(tmp_path: Path) -> None:
    s = pictures()
    x = s.train_source[0]
    x[13], x[10] = x[7], x[20]  # 7 and 13 share a label, 10 and 20 do not
    x[30] = x[31] + 0.01
    found = written(s, tmp_path).index["pairs"]
    assert [(p["a"], p["b"], p["d"]) for p in found["same"]] == [(7, 13, 0.0)]
    assert [(p["a"], p["b"]) for p in found["other"]] == [(10, 20), (30, 31)]
    assert found["other"][0]["d"] == 0 < found["other"][1]["d"] < 0.25
    assert found["same"][0]["c"] == pytest.approx(
        float(torch.nn.functional.cosine_similarity(s.values[:, 7], s.values[:, 13], 0)), abs=1e-3
    )


def test_duplicates_are_found_in_tables_and_texts(tmp_path: Path) -> None:
    s = tables()
    s.train_source[0][13] = s.train_source[0][7]
    assert [(p["a"], p["b"]) for p in written(s, tmp_path).index["pairs"]["same"]] == [(7, 13)]
    words = [("one two three " * 3 + f"w{i} v{i} u{i} " * 9, i % 3) for i in range(40)]
    words[13] = (words[7][0] + " too", 1)
    found = written(pictures(train_source=words), tmp_path).index["pairs"]
    assert [(p["a"], p["b"]) for p in found["same"]] == [(7, 13)] and found["other"] == []


def test_the_class_matrix_is_the_mean_score(tmp_path: Path) -> None:
    s = pictures()
    found = written(s, tmp_path, predictions=probabilities()).index["classes"]
    # Queries first, as in the scores and in plot_class_matrix.
    assert found["matrix"][1][2] == pytest.approx(float(s.values[1::3, 2::3].mean()), rel=1e-3)
    assert found["train"] == [14, 13, 13] and found["asked"] == [2, 2, 2] and sum(found["doubtful"]) == 20
    wrong = probabilities().argmax(1) != torch.arange(6) % 3
    assert sum(found["mistakes"]) == int(wrong.sum()) > 0


def test_predictions_become_words_confidence_and_mistakes(tmp_path: Path) -> None:
    p = probabilities()
    found = written(pictures(), tmp_path, predictions=p)
    asked = found.index["queries"]
    assert asked["said"] == [CLASSES[c] for c in p.argmax(1).tolist()]
    assert asked["sure"] == pytest.approx(p.max(1).values.tolist(), rel=1e-3)
    assert asked["wrong"] == [int(c != q % 3) for q, c in enumerate(p.argmax(1).tolist())]
    assert found.queries[0]["likely"][0] == [asked["said"][0], asked["sure"][0]]
    numbers = written(pictures(query_labels=None), tmp_path, predictions=[1.5] * 6).index["queries"]
    assert numbers["said"] == ["1.5"] * 6 and numbers["sure"] == numbers["wrong"] == [None] * 6


def test_the_overview_says_what_the_diagnostics_say(tmp_path: Path) -> None:
    s = pictures()
    words = written(s, tmp_path, about="Two lambs", predictions=probabilities()).words
    for part in ("the loss on each of 6 queries", "40 training examples", "exact()", "0.01", "1.5 s", "Two lambs",
                 "1 of 7 assumptions is broken", "not solved; more steps"):  # fmt: skip
        assert part in words
    for check in s.diagnostics.checks():
        assert check.text in words
    assert "All 7 assumptions" not in words
    other = written(pictures(lower_is_better=False), tmp_path).words
    assert "the measure on each of 6 queries" in other and "Negative: it would fall, so the example helped." in other


# --------------------------------------------------------------------------- pictures, texts, tables


def unpacked(record: dict[str, Any]) -> Tensor:
    unit, text = record["each"]
    return unit * torch.from_numpy(np.frombuffer(base64.b64decode(text), dtype="<i2").astype(float))


@pytest.mark.parametrize("top", [None, 12])
def test_an_example_holds_its_effect_on_every_query(tmp_path: Path, top: int | None) -> None:
    s = pictures() if top is None else pictures().top(top)
    page = written(s, tmp_path)
    assert page.index["summed"] == "all"
    for i, record in page.examples.items():
        column = score_columns(s, torch.tensor([i]))[:, 0]
        torch.testing.assert_close(unpacked(record), column, rtol=0, atol=2e-5 * float(column.abs().max()) + 1e-12)
        assert record["all"] == pytest.approx(float(column.mean()), rel=1e-3, abs=1e-12)


def test_where_there_is_little_room_only_the_queue_holds_its_effects(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(effects, "_ROOM", 8 / 3 * 6 * 25)
    page = written(pictures(n=400), tmp_path, self_influence=torch.arange(400.0))
    queue = [entry["i"] for entry in page.index["queue"]]
    assert page.index["summed"] == "queue" and len(queue) == 40
    assert sorted(i for i, record in page.examples.items() if "each" in record) == sorted(queue[:25])


def test_the_suggested_label_is_what_the_model_says(tmp_path: Path) -> None:
    p = probabilities(40)
    page = written(pictures(), tmp_path, train_predictions=p)
    assert page.index["suggestedBy"] == "model"
    for entry in page.index["queue"]:
        others = p[entry["i"]].clone()
        others[entry["i"] % 3] = -1
        assert entry["g"] == CLASSES[int(others.argmax())]
    assert written(pictures(), tmp_path).index["suggestedBy"] == "harm"


def decoded(record: dict[str, Any]) -> Any:
    kind, _, data = record["s"].partition(";base64,")
    assert kind in ("data:image/png", "data:image/webp")
    return images.open(io.BytesIO(base64.b64decode(data)))


@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 9, 7), (4, 9, 7), (3, 300, 200), (1, 5, 900)])
def test_pictures_come_back_small_and_in_their_shape(tmp_path: Path, shape: tuple[int, ...]) -> None:
    s = pictures(n=12, shape=shape)
    page = written(s, tmp_path)
    picture = decoded(page.examples[5])
    height, width = shape[1:]
    shrunk = min(1.0, 96 / max(height, width))
    assert picture.size == (max(1, round(width * shrunk)), max(1, round(height * shrunk)))
    assert page.examples[5]["w"] == picture.size[0]
    if shape == (1, 8, 8):
        seen = torch.from_numpy(np.array(picture)) / 255
        assert torch.allclose(seen, s.train_source[0][5, 0], atol=1 / 255)


def test_a_table_row_keeps_names_and_values(tmp_path: Path) -> None:
    s = tables()
    page = written(s, tmp_path, columns=["age", "<i>height</i>"])
    rows = page.examples[5]["t"]
    assert page.examples[5]["k"] == "table" and [r[0] for r in rows[:3]] == ["age", "<i>height</i>", "x2"]
    assert float(rows[0][1]) == pytest.approx(float(s.train_source[0][5, 0]), rel=1e-2)
    assert len(rows) == 7 and page.examples[5]["m"] == 0


def test_whole_numbers_stay_whole(tmp_path: Path) -> None:
    s = tables()
    s.train_source[0][5, :4] = torch.tensor([1001.0, -25478.0, 0.012345, 3e9])
    rows = written(s, tmp_path).examples[5]["t"]
    assert [value for _, value in rows[:4]] == ["1001", "-25478", "0.012345", "3000000000"]


def test_the_lines_of_a_text_are_kept(tmp_path: Path) -> None:
    page = written(texts("first\r\n  second\n\nthird\n"), tmp_path)
    assert page.examples[5]["t"] == "5 first\n  second\n\nthird" == page.queries[5]["t"]


def test_texts_are_cut_in_cards_and_kept_in_queries(tmp_path: Path) -> None:
    long = "wörd 🐈 " * 1500  # 10 kB of letters
    page = written(texts(long), tmp_path)
    example, query = page.examples[5], page.queries[2]
    assert example["k"] == "text" and len(example["t"]) == 2000 and example["t"].startswith("5 wörd 🐈")
    assert len(example["t"]) + example["m"] == len(query["t"]) > 10_000 and query["m"] == 0
    assert page.index["queries"]["text"][2] == query["t"][:160]


def test_long_captions_are_cut(tmp_path: Path) -> None:
    s = pictures(query_names=["Q" * 10_000] * 6, train_names=["N" * 10_000] * 40, class_names=["C" * 10_000] * 3)
    page = written(s, tmp_path, title="T" * 10_000)
    assert len(page.index["queries"]["name"][0]) == 400 and len(page.examples[0]["n"]) == 200
    assert len(page.text) < 500_000


# --------------------------------------------------------------------------- nothing runs, nothing is fetched


def attacked(tmp_path: Path) -> Page:
    s = replace(texts(ATTACK), class_names=[ATTACK] * 3, train_names=[ATTACK] * 40, query_names=[ATTACK] * 6)
    s = replace(s, diagnostics=replace(s.diagnostics, method=ATTACK, notes=(ATTACK,)), provenance=ATTACK)
    return written(s, tmp_path, title=ATTACK, about=ATTACK, predictions=probabilities(), columns=[ATTACK])


def test_a_script_in_any_text_stays_text(tmp_path: Path) -> None:
    page, plain = attacked(tmp_path), written(texts("calm"), tmp_path / "plain", about="x")
    executable = [a for tag, a in page.tags if tag == "script" and a.get("type") != "application/json"]
    assert executable == [{}]
    known = {tag for tag, _ in plain.tags}
    assert {tag for tag, _ in page.tags} <= known and "img" not in known
    assert not [a for _, attributes in page.tags for a in attributes if a.startswith("on") or a == "style"]
    assert "</script><script>window.broken=1" in page.examples[5]["t"] and "window.broken=2" in page.words
    for name, text in page.scripts.items():
        if name.startswith("data-"):
            assert not re.search("[<>&\u2028\u2029]", text)


def test_the_policy_allows_this_script_and_this_style_and_nothing_else(tmp_path: Path) -> None:
    page = attacked(tmp_path)
    policy = next(a["content"] for tag, a in page.tags if a.get("http-equiv") == "Content-Security-Policy")
    assert policy is not None and policy.startswith("default-src 'none'; img-src data:;")
    for kind in ("script", "style"):
        digest = base64.b64encode(hashlib.sha256(page.scripts[kind].encode()).digest()).decode()
        assert f"{kind}-src 'sha256-{digest}'" in policy
    assert "unsafe" not in policy and "http" not in policy
    assert not [a for _, attributes in page.tags for a in attributes if a in ("src", "action", "srcset")]
    assert not re.search(
        r"innerHTML|outerHTML|insertAdjacent|document\.write|\beval\b|new Function", page.scripts["script"]
    )
    links = [a["href"] for tag, a in page.tags if tag == "a"]
    assert links and all(link is not None and link.startswith("#") for link in links)


def test_equal_scores_give_equal_pages(tmp_path: Path) -> None:
    a, b = (pictures().report(tmp_path / f"{n}.html").path.read_bytes() for n in "ab")
    assert a == b


# --------------------------------------------------------------------------- what is missing or broken


def test_missing_data_are_said_and_cards_stay(tmp_path: Path) -> None:
    s = pictures(train_source=None, query_source=None)
    page = written(s, tmp_path)
    assert {k: page.examples[5][k] for k in "ktil"} == {"k": "none", "t": "", "i": 5, "l": "<b>owl</b>"}
    assert "The training data were not at hand" in page.words and page.index["compared"] == 0
    x = pictures().train_source
    assert written(s, tmp_path, train=x, queries=x).examples[5]["k"] == "image"


class Broken(torch.utils.data.Dataset[Any]):
    """Pictures of which one file is missing, one holds NaN and one is nothing."""

    def __init__(self) -> None:
        self.x = pictures().train_source[0]

    def __len__(self) -> int:
        return 40

    def __getitem__(self, i: int) -> Any:
        if i == 3:
            raise FileNotFoundError("cats/<3>.png")
        if i == 4:
            return torch.full((1, 8, 8), float("nan")), 0
        return (None if i == 5 else self.x[i]), 0


def test_unreadable_examples_are_cards_that_say_why(tmp_path: Path) -> None:
    report = pictures(train_source=Broken()).report(tmp_path / "r.html")
    page = Page(report.path)
    assert report.unreadable == 3 and "3 could not be shown" in str(report)
    assert "3 training examples could not be shown; the first is 3:" in page.words
    assert (
        "cats/<3>.png" in page.examples[3]["t"] and "NaN" in page.examples[4]["t"] and "None" in page.examples[5]["t"]
    )
    assert [page.examples[i]["k"] for i in (2, 3, 4, 5, 6)] == ["image", "none", "none", "none", "image"]


def test_queries_outside_the_data_and_means_have_no_picture(tmp_path: Path) -> None:
    s = pictures(query_ids=torch.tensor([0, 1, 2, 3, 4, 99]))
    assert "no example 99" in written(s, tmp_path).queries[5]["t"]
    page = written(pictures().mean(), tmp_path)
    assert page.queries[0]["k"] == "none" and page.index["queries"]["name"] == ["mean over 6 queries"]


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"predictions": torch.tensor([[0.5, float("nan"), 0.5]]).repeat(6, 1)}, NonFinite, "predictions= holds NaN"),
        ({"self_influence": torch.tensor([1.0] * 39 + [float("inf")])}, NonFinite, "at position 39"),
        ({"self_influence": torch.ones(39)}, InvalidInput, r"shape \(39,\) and there are 40 training examples"),
        ({"predictions": torch.ones(5, 3) / 3}, InvalidInput, "there are 6 queries"),
        ({"predictions": torch.randn(6, 3) * 9}, InvalidInput, "apply softmax"),
        ({"predictions": object()}, InvalidInput, "must be numbers"),
        ({"k": 0}, InvalidInput, "at least 1"),
        ({"train": torch.zeros(39, 1, 8, 8)}, InvalidInput, "has 39 examples and the scores are of 40"),
        ({"denormalize": ([0.5, 0.5], [1.0, 1.0])}, InvalidInput, "one number per channel"),
    ],
)
def test_bad_side_inputs_are_refused_in_words(
    tmp_path: Path, options: dict[str, Any], error: type[Exception], words: str
) -> None:
    with pytest.raises(error, match=words):
        pictures().report(tmp_path / "r.html", **options)
    assert list(tmp_path.iterdir()) == []


def test_the_path_must_be_a_page(tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match=r"does not end in \.html"):
        pictures().report(tmp_path / "report.pdf")
    (tmp_path / "x.html").mkdir()
    with pytest.raises(InvalidInput, match="is a folder"):
        pictures().report(tmp_path / "x.html")


# --------------------------------------------------------------------------- size


@pytest.mark.parametrize("kind", ["pictures", "texts", "tables"])
def test_the_forecast_meets_the_size_and_a_dry_run_writes_nothing(tmp_path: Path, kind: str) -> None:
    made: dict[str, Scores] = {
        "pictures": pictures(30, 800, (3, 48, 48)),
        "texts": texts("some words " * 60, 30, 800),
        "tables": tables(30, 800, 30),
    }
    forecast = made[kind].report(tmp_path / "r.html", dry_run=True)
    assert list(tmp_path.iterdir()) == [] and forecast.written == 0 and "would be about" in str(forecast)
    report = made[kind].report(tmp_path / "r.html")
    assert report.written == report.path.stat().st_size
    assert report.forecast == forecast.forecast == pytest.approx(report.written, rel=0.1, abs=60_000)


def big(seed: int = 0) -> Tensor:
    return torch.rand(100, 3, 120, 120, generator=torch.Generator().manual_seed(seed))


def test_too_large_pages_shrink_their_pictures_and_then_become_a_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    s = pictures(10, 100, train_source=(big(), torch.zeros(100)), query_source=(big()[:10], torch.zeros(10)))
    size = s.report(tmp_path / "r.html").written
    shown = set(Page(tmp_path / "r.html").examples)
    for side in (64, 48):
        monkeypatch.setattr(pages, "LIMIT", int(0.9 * size))
        report = s.report(tmp_path / "r.html")
        assert (report.folder, report.side) == (False, side) and report.written < size
        size = report.written
    monkeypatch.setattr(pages, "LIMIT", 100_000)
    report = s.report(tmp_path / "r.html")
    beside = tmp_path / "r_files"
    assert report.folder and report.side == 96 and "folder r_files beside it" in str(report)
    assert report.written == sum(f.stat().st_size for f in [report.path, *beside.iterdir()])
    assert report.path.stat().st_size < 200_000
    page = Page(report.path)
    assert len(page.queries) == 10 and set(page.examples) == shown and page.blocks["meta"]["folder"] == "r_files"
    # A later, smaller report takes its folder along, but not what is not its own.
    (beside / "mine.txt").write_text("kept")
    monkeypatch.undo()
    assert not s.report(tmp_path / "r.html").folder
    assert [f.name for f in beside.iterdir()] == ["mine.txt"]


def test_the_notebook_form_stays_small() -> None:
    assert len(pictures()._repr_html_()) < 10_000 and "<script" not in pictures()._repr_html_()
