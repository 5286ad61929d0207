"""`ptif index build | query | info | remove | compact`: what the library does, from a command line."""

from __future__ import annotations

from pathlib import Path

import pytest

import pytorch_influence_functions as ptif
from pytorch_influence_functions.cli.task import load_task
from pytorch_influence_functions.store.representation import parse_representation
from tests.interface.cli_cases import N, Ran, task_file


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
    assert Ran("index", "remove", folder, "0:5", "--json").found["removed"] == 5
    smaller = Ran("index", "compact", folder, "--json").found
    assert smaller["bytes"] < built["bytes"]
    assert Ran("index", "info", folder, "--check", "--json").found["removed"] == 5


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
        (("info", folder), "holds no index (index.json is missing)"),
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


@pytest.mark.parametrize("text", ["", "factors:3", "two-sided", "two-sided:x", "two-sided:4:pca", "sketch:-1"])
def test_what_is_kept_in_words(text: str) -> None:
    with pytest.raises(ptif.errors.InvalidInput, match=r"is nothing that an index keeps"):
        parse_representation(text)
    assert parse_representation("Two_Sided:4:eigenvectors") == ptif.store.TwoSided(4, basis="eigenvectors")
    assert parse_representation("auto") == "auto" and parse_representation("factors") == ptif.store.Factors()
