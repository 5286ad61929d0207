"""`ptif attribute --hf`: what it writes is what the library computes; what it cannot read it says."""

from __future__ import annotations

import json
import re
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.progress import Progress

import pytorch_influence_functions as ptif
from pytorch_influence_functions.cli.progress_bars import ProgressBars, ProgressLines, Speed
from pytorch_influence_functions.hf.models import load_model
from tests.hf.tiny import llama, texts, tokenizer
from tests.interface.cli_cases import Ran
from tests.interface.report_cases import Page

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("hf") / "model"
    llama(dtype=torch.float32).save_pretrained(path)
    tokenizer().save_pretrained(path)
    return path


def write(path: Path, rows: list[Any]) -> Path:
    path.write_text("\n".join(json.dumps(row) for row in rows), encoding="utf-8")
    return path


def test_texts_give_the_scores_of_the_library_and_a_page(folder: Path, tmp_path: Path) -> None:
    rows = [{"text": text, "from": "ab"[i % 2]} for i, text in enumerate(texts(6))]
    file, out = write(tmp_path / "t.jsonl", rows), tmp_path / "r"
    options = ("--hf", folder, "--dataset", file, "--source-column", "from", "--method", "grad-dot", "--out", out)
    asked = ("--query", "who wrote this book", "--query", "the moon")
    forecast = Ran("attribute", *options, *asked, "--report", "--dry-run", "--json").found
    assert forecast["page_seconds"] > 0 and not out.exists()
    assert Ran("attribute", *options, *asked, "--dry-run", "--json").found["page_seconds"] is None
    ran = Ran("attribute", *options, *asked, "--report", "--json")
    assert (ran.code, ran.stderr) == (0, "")
    scores = ptif.Scores.load(out / "scores.safetensors")
    problem = ptif.hf.problem(folder, None, rows)
    expected = ptif.attribute(problem, queries=["who wrote this book", "the moon"], method="grad-dot")
    torch.testing.assert_close(scores.values, expected.values, rtol=1e-4, atol=1e-6)
    page = Page(out / "report.html")
    assert page.index["tokens"] and page.index["sources"]["counts"] == [3, 3]
    assert all("v" in record for record in page.queries)
    again = Ran("attribute", *options, *asked, "--report")
    assert again.code == 0 and "kept from before" in again.stdout and "#" in again.stdout
    assert all("v" in record for record in Page(out / "report.html").queries)
    assert "who" in Page(out / "report.html").queries[0]["t"] and not page.index["labelled"]
    assert printed_names(again.stdout) <= {text[:4] for text in texts(6)} != set()

    (out / "report.html").unlink()
    told = ("--hf", folder, "--dataset", file, "--source-column", "from", *asked)
    ran = Ran("report", out, *told, "--method", "grad-dot")
    assert ran.code == 0 and "not coloured" not in ran.stdout
    assert Page(out / "report.html").queries == page.queries
    ran = Ran("report", out, *told, "--method", "grad-cos")
    assert ran.code == 0 and "made by another method" in ran.stdout
    assert "p" in Page(out / "report.html").queries[0] and "v" not in Page(out / "report.html").queries[0]
    ran = Ran("report", out, *told[:-1], "the cat")
    assert ran.code == 2 and "The queries of model are not those of the run" in ran.sentence


def test_an_index_of_texts_is_built_and_asked_without_a_task_file(folder: Path, tmp_path: Path) -> None:
    rows = [
        {"text": text, "from": "ab"[i % 2], "year": i, "long": "w" * 101, "tags": [i]}
        for i, text in enumerate(texts(6))
    ]
    file, index = write(tmp_path / "t.jsonl", rows), tmp_path / "index"
    told = ("--hf", folder, "--dataset", file)
    forecast = Ran("index", "build", index, *told, "--dry-run", "--json").found
    assert forecast["n_train"] == 6 and not index.exists()
    assert Ran("index", "build", index, *told, "--keep", "two-sided:8", "--json").found["status"] == "complete"
    problem = ptif.hf.problem(folder, None, rows)
    opened = ptif.Index.open(index, problem)
    assert set(opened.columns) == {"from", "year"}
    ask = ("index", "query", index, *told, "--query", "who wrote this book", "--query", "the moon", "--top", 2)
    asked = Ran(*ask, "--where", "from=b", "--json").found["influences"]
    expected = opened.score(["who wrote this book", "the moon"], top=2, where={"from": "b"})
    assert [row["helpful"] for row in asked] == [[list(pair) for pair in expected.helpful(q, 5)] for q in (0, 1)]
    assert printed_names(Ran(*ask).stdout) <= {text[:4] for text in texts(6)} != set()
    for wrong, match in (
        (("build", index), "names 1 paths; write ptif index build TASK FOLDER, or for a language model"),
        (("build", "task.py", index, *told), "names 2 paths"),
        (("query", index, *told), "--hf needs --query"),
        (("query", index), "There is no task file"),
    ):
        ran = Ran("index", *wrong)
        assert ran.code == 2 and match in ran.sentence


def test_self_influence_names_the_texts(folder: Path, tmp_path: Path) -> None:
    file, out = write(tmp_path / "t.jsonl", list(texts(6))), tmp_path / "r"
    ran = Ran("self-influence", "--hf", folder, "--dataset", file, "--method", "ekfac", "--out", out, "--json")
    expected = ptif.ekfac().fit(ptif.hf.problem(folder, None, list(texts(6)))).self_influence()
    assert ran.code == 0
    for row in ran.found["worst"]:
        assert row["self_influence"] == pytest.approx(float(expected[row["index"]]), rel=1e-3)
        assert row["label"][:8] == texts(6)[row["index"]][:8]


def printed_names(output: str) -> set[str]:
    """The first letters of what stands behind a score in the table of a run."""
    return {name[:4] for name in re.findall(r"#\d+ [+−][\d.e−+-]+ (\w+ \w+)", output)}


def test_chats_are_asked_as_a_users_turn_and_prompts_as_prompts(folder: Path, tmp_path: Path) -> None:
    chats = [
        {"messages": [{"role": "user", "content": "who wrote"}, {"role": "assistant", "content": text}]}
        for text in texts(4)
    ]
    pairs = [{"prompt": "who wrote", "completion": " " + text} for text in texts(4)]
    given: list[tuple[list[Any], Any]] = [
        (chats, [{"role": "user", "content": "the cat"}, {"role": "assistant", "content": "sat on a mat"}]),
        (pairs, ptif.hf.query(folder, prompt="the cat", completion="sat on a mat")),
    ]
    for kind, (rows, query) in enumerate(given):
        out = tmp_path / str(kind)
        options = ("--hf", folder, "--dataset", write(tmp_path / "t.jsonl", rows), "--method", "grad-dot", "--out", out)
        assert Ran("attribute", *options, "--query", "the cat", "--answer", "sat on a mat", "--quiet").code == 0
        expected = ptif.attribute(ptif.hf.problem(folder, None, rows), queries=query, method="grad-dot")
        values = ptif.Scores.load(out / "scores.safetensors").values
        torch.testing.assert_close(values, expected.values, rtol=1e-4, atol=1e-6)


def test_adapters_are_a_folder_too(folder: Path, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    model = load_model(folder)
    peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")).save_pretrained(
        tmp_path / "adapters"
    )
    tokenizer().save_pretrained(tmp_path / "adapters")
    file = write(tmp_path / "t.jsonl", list(texts(4)))
    options = ("--hf", tmp_path / "adapters", "--dataset", file, "--method", "grad-dot", "--out", tmp_path / "r")
    ran = Ran("attribute", *options, "--query", "the moon", "--json")
    assert ran.code == 0 and ran.found["n_train"] == 4


@pytest.mark.parametrize(
    ("flags", "match"),
    [
        (("--query", "a"), "--query belongs to a language model; give its folder with --hf"),
        (("--hf", "m", "--query", "a"), "--hf needs --dataset"),
        (("--hf", "m", "--dataset", "t.jsonl"), "--hf needs --query"),
        (("task.py", "--hf", "m"), "A task file and --hf name two tasks"),
        (("--hf", "m", "--dataset", "t.csv", "--query", "a"), "is no .jsonl or .json file"),
        (("--hf", "m", "--dataset", "none.jsonl", "--query", "a"), "cannot be read"),
        (("--hf", "m", "--dataset", "bad.jsonl", "--query", "a"), "bad.jsonl, line 2: not JSON"),
        (("--hf", "m", "--dataset", "bad.jsonl", "--query", "a", "--answer", "b", "--answer", "c"), "2 --answer for 1"),
    ],
)
def test_what_is_missing_is_said(flags: Any, match: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "bad.jsonl").write_text('{"text": "a"}\n{"text": ', encoding="utf-8")
    ran = Ran("attribute", *flags)
    assert ran.code == 2 and match in ran.sentence


def test_progress_counts_tokens() -> None:
    class Clock:
        now = 0.0

        def __call__(self) -> float:
            return self.now

    class File:
        lines: list[str] = []  # noqa: RUF012

        def write(self, text: str) -> None:
            self.lines.append(text)

        def flush(self) -> None: ...

    clock, file = Clock(), File()
    lines = ProgressLines(file, clock, speed=Speed({200: 64.0}))
    lines("scoring", 0, 200)
    clock.now = 20.0
    lines("scoring", 100, 200)
    assert "320 tokens/s" in "".join(file.lines)
    lines("queries", 0, 7)
    clock.now = 40.0
    lines("queries", 3, 7)
    assert "tokens" not in file.lines[-2]


def test_a_step_with_a_name_is_shown_at_once_and_a_look_at_a_first_batch_leaves_no_bar() -> None:
    bars = ProgressBars(Progress(), clock=lambda: 0.0)
    bars("", 0, 1)
    assert bars.display.tasks == []
    bars("loading the model", 0, 1)
    assert [task.description for task in bars.display.tasks] == ["loading the model"]
    bars("loading the model", 1, 1)
    assert bars.display.tasks == []


def test_the_command_line_says_what_was_asked_and_warns_in_its_own_words(folder: Path, tmp_path: Path) -> None:
    rows = [{"text": text, "from": "ab"[i % 2]} for i, text in enumerate(texts(6))]
    told = ("--hf", folder, "--dataset", write(tmp_path / "t.jsonl", rows), "--max-length", 4)
    with warnings.catch_warnings():
        warnings.simplefilter("default")
        ran = Ran("index", "build", tmp_path / "i", *told, "--keep", "two-sided:8", "--normalisation", "mean")
    assert ran.code == 0
    assert re.search(
        r"^ptif: \d of 6 texts are longer than 4 tokens \(max_length\) .*; give --max-length as training did\.$",
        ran.stderr,
        re.MULTILINE,
    )
    ask = ("index", "query", tmp_path / "i", *told, "--query", "who wrote this", "--query", "the moon")
    ran = Ran(*ask)
    assert ran.code == 2 and "built with another loss" in ran.sentence.splitlines()[-1]
    ran = Ran(*ask, "--normalisation", "mean", "--where", "from=b", "--top", 2)
    assert ran.stdout.startswith("2 queries × 3 of 6 stored examples in")
    assert re.search(r"query 0 +who wrote this\s+query 1 +the moon\s", ran.stdout)
    assert Ran(*ask, "--normalisation", "mean", "--quiet").stderr == ""
    ran = Ran(*ask, "--normalisation", "median")
    assert ran.code == 2 and "--normalisation is 'median'; it must be one of trainer, sum, mean." in ran.stderr
    other = write(tmp_path / "o.jsonl", [*rows[1:], rows[0]])
    ran = Ran("index", "query", tmp_path / "i", "--hf", folder, "--dataset", other, *told[4:], "--query", "the moon")
    assert ran.code == 2 and "These are not the data that the index in" in ran.stderr
    ran = Ran("self-influence", *told, "--source-column", "from", "--method", "ekfac", "--out", tmp_path / "s")
    assert ran.code == 0
