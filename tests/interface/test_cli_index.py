"""`ptif index build | query | info | remove | compact`: what the library does, from a command line."""

from __future__ import annotations

from pathlib import Path

import pytest

import pytorch_influence_functions as ptif
from pytorch_influence_functions.cli.task import load_task
from pytorch_influence_functions.store.representation import parse_representation
from tests.interface.cli_cases import N, Ran, task_file

OF_LAYERS = """
def get_model():
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.Tanh(), torch.nn.Linear(3, 2))

def get_options():
    columns = {"source": ["web", "book"] * 20, "year": list(range(1980, 2020)), "label of mine": ["1", "2"] * 20}
    return {"columns": columns}
"""


def test_build_ask_remove_and_compact(tmp_path: Path) -> None:
    task, folder = task_file(tmp_path), tmp_path / "index"
    forecast = Ran("index", "build", task, folder, "--dry-run", "--json").found
    assert forecast["status"] == "forecast" and forecast["n_train"] == N and not folder.exists()
    built = Ran("index", "build", task, folder, "--json", "--shard", "800B").found
    assert built["representation"] == forecast["representation"] == "Factors()"
    assert built["status"] == "complete" and built["n_train"] == N and built["files"] > 2
    loaded = load_task(task)
    expected = ptif.ekfac().fit(loaded.problem).score(loaded.query_source)
    asked = Ran("index", "query", folder, task, "--queries", "3,7", "--top", 4, "--out", tmp_path / "r", "--json").found
    scores = ptif.Scores.load(tmp_path / "r" / "scores.safetensors")
    assert scores.query_ids.tolist() == [3, 7] and scores.shape == (2, 8)
    for row, query in enumerate((3, 7)):
        assert asked["influences"][row]["query"] == query
        assert [i for i, _ in scores.helpful(row, 4)] == [i for i, _ in expected.helpful(query, 4)]
    assert Ran("index", "remove", folder, "99").sentence == "IDS 99 asks for example 99, and there are 40 (0 to 39)."
    assert Ran("index", "remove", folder, "0:5", "--json").found["removed"] == 5
    assert "Example 3 was removed from the index before" in Ran("index", "remove", folder, "3").sentence
    smaller = Ran("index", "compact", folder, "--json").found
    assert smaller["bytes"] < built["bytes"]
    assert Ran("index", "info", folder, "--check", "--json").found["removed"] == 5


def test_a_graph_is_made_and_asked(tmp_path: Path) -> None:
    task, folder = task_file(tmp_path), tmp_path / "index"
    built = Ran("index", "build", task, folder, "--keep", "sketch:7", "--json").found
    assert built["status"] == "complete" and not built["graph"]
    assert Ran("index", "graph", folder, "--links", 4, "--ef", 8, "--json").found["graph"]
    assert "without the" in Ran("index", "info", folder, "--check").stdout
    ask = ("index", "query", folder, task, "--queries", "3", "--top", 2, "--json")
    plain, asked = Ran(*ask).found, Ran(*ask, "--ef", N).found
    assert asked["influences"] == plain["influences"] and "ef=40 names no few" in asked["notes"][-1]


def test_parts_and_columns_are_told_apart(tmp_path: Path) -> None:
    task = task_file(tmp_path, OF_LAYERS)
    folder, out = tmp_path / "index", tmp_path / "r"
    assert Ran("index", "build", task, folder, "--json").found["status"] == "complete"
    ask = ("index", "query", folder, task, "--queries", "3,7", "--top", 4, "--out", out, "--json")
    loaded = load_task(task)
    index, queries = ptif.Index.open(folder, loaded.problem), loaded.query_source.subset([3, 7])
    for flags, where in {
        ("source=book", "year=1981", "year=1985"): {"source": "book", "year": [1981, 1985]},
        ("label of mine=2", "label=1"): {"label of mine": "2", "label": 1},
    }.items():
        asked = Ran(*ask, *(word for flag in flags for word in ("--where", flag))).found
        expected = index.score(queries, top=4, where=where)
        assert asked["influences"][1]["helpful"] == [list(pair) for pair in expected.helpful(1, 5)]
    asked = Ran(*ask, "--by", "body=0", "--by", "head=2").found["parts"]
    parts, expected = (
        ptif.PartScores.load(out / "parts.safetensors"),
        index.score(queries, top=4, by={"body": "0", "head": "2"}),
    )
    assert list(parts) == ["body", "head"] == list(asked) and parts["head"].query_ids.tolist() == [3, 7]
    assert parts["head"].values.equal(expected["head"].values) and asked["head"][0]["query"] == 3
    screen = Ran("index", "query", folder, task, "--by", "layer")
    assert screen.code == 0 and max(map(len, screen.stdout.splitlines())) <= 80
    for flags, sentence in {
        ("--where", "source"): "--where source names no value of a column; write --where COLUMN=VALUE",
        ("--where", "source=wob"): "No example has 'wob' in the column 'source'. Did you mean 'web'",
        ("--where", "kind=web"): "The index has no column 'kind'; its columns are",
        ("--where", "year=old"): (
            "The column 'year' of --where holds numbers, and 'old' was asked for; give a value of that kind; --where"
        ),
        ("--by", "=2"): "--by =2 names no part; write --by layer, --by head, --by '0.*', or --by top=4,5.",
        ("--by", "a=0", "--by", "a=2"): "--by names the part a twice; write its patterns with commas",
    }.items():
        ran = Ran("index", "query", folder, task, *flags)
        assert ran.code == 2 and sentence in ran.sentence


def test_on_a_screen(tmp_path: Path) -> None:
    task, folder = task_file(tmp_path), tmp_path / "index"
    for command in (
        ("build", task, folder, "--keep", "two-sided:2", "--dtype", "int8", "--dry-run"),
        ("build", task, folder, "--keep", "two-sided:2", "--dtype", "int8", "--method", "kfac"),
        ("query", folder, task, "--top", 2, "--rerank", 5, "--damping", "0.01"),
        ("query", folder, task, "--top", 2, "--normalised"),
        ("info", folder),
    ):
        ran = Ran("index", *command)
        assert ran.code == 0, ran.stderr
        assert max(map(len, ran.stdout.splitlines())) <= 80
    assert "TwoSided(k_in=2) in int8" in ran.stdout and "complete" in ran.stdout


def test_what_cannot_be_done_is_one_sentence(tmp_path: Path) -> None:
    task, folder = task_file(tmp_path), tmp_path / "index"
    for command, sentence in (
        (
            ("build", task, folder, "--keep", "halves"),
            "--keep halves is nothing that an index keeps; write auto, factors",
        ),
        (("build", task, folder, "--dtype", "int7"), "dtype='int7' is none of those that are stored"),
        (("info", folder), "holds no index (index.json is missing); build one there with ptif index build."),
        (("query", folder, task), "holds no index (index.json is missing)"),
    ):
        ran = Ran("index", *command)
        assert ran.code == 2 and sentence in ran.sentence
    assert Ran("index", "build", task, folder).code == 0
    (broken,) = folder.glob("rows-*")
    broken.write_bytes(broken.read_bytes()[:-1] + b"!")
    assert "is damaged" in Ran("index", "info", folder, "--check").sentence
    other = Ran("index", "build", task, folder, "--keep", "sketch:4")
    assert other.code == 2 and "holds an index that differs in representation" in other.sentence
    assert other.sentence.endswith("or --overwrite to replace it.")


@pytest.mark.parametrize("text", ["", "factors:3", "two-sided", "two-sided:x", "two-sided:4:pca", "sketch:-1"])
def test_what_is_kept_in_words(text: str) -> None:
    with pytest.raises(ptif.errors.InvalidInput, match=r"is nothing that an index keeps"):
        parse_representation(text)
    assert parse_representation("Two_Sided:4:eigenvectors") == ptif.store.TwoSided(4, basis="eigenvectors")
    assert parse_representation("auto") == "auto" and parse_representation("factors") == ptif.store.Factors()
