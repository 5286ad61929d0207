"""`ptif attribute`: what it writes is what the library computes; what it prints fits a terminal."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import pytorch_influence_functions as ptif
from pytorch_influence_functions.cli.task import load_task
from tests.interface.cli_cases import QUERIES, N, Ran, task_file


@pytest.fixture
def task(tmp_path: Path) -> Path:
    return task_file(tmp_path)


def by_library(task: Path, **options: object) -> ptif.Scores:
    found = load_task(task)
    return ptif.attribute(found.problem.model, found.problem.data, found.query_source, **options)  # type: ignore[call-overload,no-any-return]


def test_scores_are_those_of_the_library_under_the_queries_own_positions(task: Path, tmp_path: Path) -> None:
    out = tmp_path / "results"
    ran = Ran("attribute", task, "--method", "exact", "--queries", "3:9:2,11", "--out", out, "--json")
    assert (ran.code, ran.stderr) == (0, "")
    scores = ptif.Scores.load(out / "scores.safetensors")
    expected = by_library(task, method=ptif.exact())
    assert scores.query_ids.tolist() == [3, 5, 7, 11]
    assert torch.allclose(scores.values, expected.values[[3, 5, 7, 11]], rtol=1e-5, atol=1e-8)
    assert scores.query_labels == [expected.query_labels[q] for q in (3, 5, 7, 11)]  # type: ignore[index]
    assert scores.class_names == ["low", "high"]
    found = ran.found
    assert found["exit_code"] == 0 and (found["n_queries"], found["n_train"]) == (4, N)
    assert found["method"] == expected.diagnostics.method
    (index, score), *_ = found["influences"][1]["helpful"]
    assert found["influences"][1]["query"] == 5 and index == expected.helpful(5, 1)[0][0]
    assert score == pytest.approx(expected.helpful(5, 1)[0][1], rel=1e-5)
    assert {c["name"] for c in found["checks"]} == {c.name for c in expected.diagnostics.checks()}


def test_blocks_join_to_the_very_scores_of_one_go(task: Path, tmp_path: Path) -> None:
    for block, out in ((100, "whole"), (5, "parts")):
        assert (
            Ran("attribute", task, "--method", "dual", "--block", block, "--out", tmp_path / out, "--quiet").code == 0
        )
    whole, parts = (ptif.Scores.load(tmp_path / name / "scores.safetensors") for name in ("whole", "parts"))
    assert torch.allclose(whole.values, parts.values, rtol=1e-5, atol=1e-9)
    assert parts.query_ids.tolist() == list(range(QUERIES)) and parts.query_labels == whole.query_labels
    assert parts.diagnostics.n_queries == QUERIES
    assert parts.diagnostics.residual_max == pytest.approx(whole.diagnostics.residual_max, rel=0.5, abs=1e-6)
    assert not (tmp_path / "parts/blocks").exists()


def test_top_keeps_both_ends_and_says_how_many(task: Path, tmp_path: Path) -> None:
    ran = Ran("attribute", task, "--method", "exact", "--top", 3, "--block", 5, "--out", tmp_path / "r", "--json")
    scores, expected = ptif.Scores.load(tmp_path / "r/scores.safetensors"), by_library(task, method=ptif.exact())
    assert scores.shape == (QUERIES, 6) and ran.found["kept_per_query"] == 6
    assert [i for i, _ in scores.harmful(7, 3)] == [i for i, _ in expected.harmful(7, 3)]


def test_parts_of_the_model_are_told_apart_and_kept_block_by_block(tmp_path: Path) -> None:
    layers = "torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.Tanh(), torch.nn.Linear(3, 2))"
    task = task_file(tmp_path, f"\ntorch.manual_seed(0)\nnet = {layers}\ndef get_model():\n    return net\n")
    out = tmp_path / "r"
    ask = ("attribute", task, "--method", "ekfac", "--block", 5, "--out", out, "--by", "layer")
    ran = Ran(*ask, "--top", 3, "--json")
    parts = ptif.PartScores.load(out / "parts.safetensors")
    found = load_task(task)
    fitted = ptif.ekfac().fit(found.problem)
    expected = fitted.score(found.query_source, top=3, by="layer")
    assert list(parts) == ["0", "2"] == list(ran.found["parts"])
    assert ran.found["files"]["scores"] == str(out / "parts.safetensors")
    for name, scores in parts.items():
        assert scores.shape == (QUERIES, 6) and scores.indices is not None
        torch.testing.assert_close(scores.values, expected[name].values)
        assert ran.found["parts"][name][7]["helpful"] == [list(pair) for pair in scores.helpful(7, 5)]
    again = Ran(*ask, "--top", 3)
    assert "all were kept" in again.stdout and max(map(len, again.stdout.splitlines())) <= 80
    assert "told parts of the model apart with --by" in Ran("report", out).sentence
    refused = {
        ("--report",): "--report shows scores of the whole model, and --by tells parts apart; leave one out.",
        ("--top", "2"): "it differs in top (3 there, 2 here)",
        ("--overwrite", "--by", "1"): "The pattern 'layer' of by= matches no layer",
    }
    baseline = task_file(tmp_path, "\ndef get_options():\n    return {'method': ptif.methods.TrainingLoss()}\n", "b.py")
    baseline.write_text("import pytorch_influence_functions as ptif\n" + baseline.read_text())
    ran = Ran("attribute", baseline, "--out", tmp_path / "b", "--by", "layer")
    assert ran.sentence.startswith("by='layer' tells apart what layers contribute, and a plain baseline is no sum")
    for flags, sentence in refused.items():
        ran = Ran(*ask, *flags)
        assert ran.code == 2 and sentence in ran.sentence, ran.stderr


def test_quiet_says_nothing_and_a_log_has_plain_lines_of_at_most_80_columns(task: Path, tmp_path: Path) -> None:
    quiet = Ran("attribute", task, "--out", tmp_path / "a", "--quiet")
    assert (quiet.code, quiet.stdout, quiet.stderr) == (0, "", "")
    told = Ran("attribute", task, "--out", tmp_path / "b")
    lines = told.stdout.splitlines()
    assert told.code == 0 and max(map(len, lines)) <= 80 and "\x1b" not in told.stdout
    assert lines[0].startswith(f"{QUERIES} queries × {N} training examples in")
    assert "and 7 more queries" in told.stdout and "[ok]   solve" in told.stdout
    (index, _), *_ = by_library(task).helpful(0, 1)
    assert f"#{index} +" in told.stdout
    assert "scores.safetensors" in told.stdout


def test_a_finished_run_is_shown_again_and_not_computed_again(task: Path, tmp_path: Path) -> None:
    out = tmp_path / "r"
    first = Ran("attribute", task, "--out", out, "--json").found
    stamp = (out / "scores.safetensors").stat().st_mtime_ns
    again = Ran("attribute", task, "--out", out, "--json").found
    assert (first["resumed_queries"], again["resumed_queries"]) == (0, QUERIES)
    assert again["influences"] == first["influences"]
    assert (out / "scores.safetensors").stat().st_mtime_ns == stamp


def test_run_json_says_what_the_scores_were_made_from(task: Path, tmp_path: Path) -> None:
    Ran("attribute", task, "--method", "ekfac", "--damping", "relative:0.5", "--out", tmp_path / "r", "--quiet")
    record = json.loads((tmp_path / "r/run.json").read_text())
    assert record["status"] == "complete" and record["command"] == "attribute"
    assert set(record["fingerprint"]["digests"]) == {
        *("weights", "model code", "loss", "measure", "method", "training data", "queries", "settings", "version")
    }
    assert set(record["fingerprint"]["probes"]) == {"model outputs"}
    assert "EKFAC" in record["settings"]["method"] and "share=0.5" in record["settings"]["method"]
    assert record["settings"]["queries"] == list(range(QUERIES))
    assert record["versions"]["pytorch_influence_functions"] == ptif.__version__


@pytest.mark.parametrize(
    ("change", "word"),
    [
        (("200", "201"), "weights"),
        (("Points(40, 0), batch", "Points(40, 2), batch"), "training data"),
        (("Points(12, 1)", "Points(12, 3)"), "queries"),
    ],
)
def test_another_run_in_the_folder_is_refused_by_what_differs(
    task: Path, tmp_path: Path, change: tuple[str, str], word: str
) -> None:
    out = tmp_path / "r"
    assert Ran("attribute", task, "--out", out, "--quiet").code == 0
    before = (out / "scores.safetensors").read_bytes()
    task.write_text(task.read_text().replace(*change))
    other = Ran("attribute", task, "--out", out, "--quiet")
    assert other.code == 2 and f"differs in {word}; give another --out" in other.sentence
    assert (out / "scores.safetensors").read_bytes() == before
    assert Ran("attribute", task, "--out", out, "--quiet", "--overwrite").code == 0
    assert (out / "scores.safetensors").read_bytes() != before


def test_a_changed_loss_of_the_users_own_is_noticed(tmp_path: Path) -> None:
    extra = "\ndef get_options():\n    return {'loss': mine}\n\ndef mine(o, t):\n    return (o[:, 0] - t).square()\n"
    task, out = task_file(tmp_path, extra), tmp_path / "r"
    assert Ran("attribute", task, "--method", "grad-dot", "--out", out, "--quiet").code == 0
    assert Ran("attribute", task, "--method", "grad-dot", "--out", out, "--json").found["resumed_queries"] == QUERIES
    task.write_text(task.read_text().replace(".square()", ".abs()"))
    other = Ran("attribute", task, "--method", "grad-dot", "--out", out, "--quiet")
    assert other.code == 2 and "differs in loss;" in other.sentence


def test_a_dry_run_forecasts_and_writes_nothing(task: Path, tmp_path: Path) -> None:
    arguments = ("attribute", task, "--method", "ekfac", "--top", 5, "--out", tmp_path / "r", "--dry-run")
    found = Ran(*arguments, "--json").found
    expected = ptif.ekfac().forecast(load_task(task).problem, QUERIES, 5)
    assert (found["passes"], found["memory_bytes"]) == (expected.passes, expected.memory_bytes)
    assert found["seconds"] > 0 and found["blocks"] == 2 and found["result_bytes"] == QUERIES * 10 * 12
    told = Ran(*arguments)
    assert told.code == 0 and "nothing was computed" in told.stdout and "passes" in told.stdout
    assert not (tmp_path / "r").exists()


# --------------------------------------------------------------------------- the task file


def test_a_problem_with_queries_works_as_well_and_flags_win(tmp_path: Path) -> None:
    extra = (
        "\nimport pytorch_influence_functions as ptif\nproblem = ptif.Problem(get_model(), ptif.CrossEntropy(), "
        "Points(40, 0), weight_decay=0.01)\nqueries = Points(12, 1)\ndel get_model\n"
        "def get_options():\n    return {'measure': ptif.Margin(), 'method': ptif.exact()}\n"
    )
    task = task_file(tmp_path, extra)
    assert Ran("attribute", task, "--out", tmp_path / "a", "--quiet").code == 0
    scores = ptif.Scores.load(tmp_path / "a/scores.safetensors")
    problem = load_task(task).problem
    expected = ptif.exact().fit(problem).score(load_task(task).query_source, ptif.Margin())
    assert not scores.lower_is_better and torch.allclose(scores.values, expected.values, rtol=1e-5, atol=1e-8)
    assert Ran("attribute", task, "--out", tmp_path / "b", "--quiet", "--weight-decay", 0.5).code == 0
    other = ptif.exact().fit(problem.with_(weight_decay=0.5)).score(load_task(task).query_source, ptif.Margin())
    values = ptif.Scores.load(tmp_path / "b/scores.safetensors").values
    assert torch.allclose(values, other.values, rtol=1e-5, atol=1e-8) and not torch.allclose(values, scores.values)


def test_the_old_readmes_names_work(tmp_path: Path) -> None:
    task = task_file(tmp_path, "\nget_my_model, get_my_dataloaders = get_model, get_dataloaders\ndel get_model\n")
    task.write_text(task.read_text() + "del get_dataloaders\n")
    assert len(load_task(task).problem) == N


def test_the_task_may_import_its_neighbours_and_leaves_no_bytecode(tmp_path: Path) -> None:
    (tmp_path / "beside_the_task.py").write_text("WIDTH = 4\n")
    task = task_file(tmp_path, "\nfrom beside_the_task import WIDTH\nassert WIDTH == 4\n")
    assert load_task(task).problem.space.size == 10
    assert not list(tmp_path.glob("__pycache__/task*"))


# --------------------------------------------------------------------------- settings in a file


@pytest.mark.parametrize("name", ["run.toml", "run.json"])
def test_settings_come_from_a_file_seen_from_where_it_lies_and_flags_win(tmp_path: Path, name: str) -> None:
    (tmp_path / "below").mkdir()
    task_file(tmp_path / "below")
    settings = {"task": "task.py", "out": "made", "method": "exact", "queries": "0:4", "weight-decay": 0.01, "top": 2}
    toml = "".join(f"{k} = {json.dumps(v)}\n" for k, v in settings.items())
    (tmp_path / "below" / name).write_text(toml if name.endswith("toml") else json.dumps(settings))
    assert Ran("attribute", "--config", tmp_path / "below" / name, "--queries", "5:7", "--quiet").code == 0
    scores = ptif.Scores.load(tmp_path / "below/made/scores.safetensors")
    assert scores.query_ids.tolist() == [5, 6] and scores.shape == (2, 4)
    assert "weight_decay" not in scores.provenance and "GGN" in scores.provenance


def test_along_a_recorded_run(task: Path, tmp_path: Path) -> None:
    """`--run` is `ptif.methods.along` of the folder; the folder's name does not matter, its weights do."""
    found = load_task(task)
    states = [{k: v * size for k, v in found.problem.model.state_dict().items()} for size in (0.1, 0.5, 1.0)]
    optimizer = torch.optim.SGD(found.problem.model.parameters(), lr=0.0)
    for name, factor in (("run", 1.0), ("other", 2.0)):
        with ptif.Recorder(found.problem.model, optimizer, tmp_path / name, steps=3, at=(0.3, 0.6, 1.0)):
            for state in states:
                found.problem.model.load_state_dict({k: v * factor for k, v in state.items()})
                optimizer.step()
    expected = {name: by_library(task, method=name, run=tmp_path / "run") for name in ("ekfac", "dual")}
    for name, flags in (("ekfac", ()), ("dual", ("--method", "dual"))):
        out = tmp_path / name
        ran = Ran("attribute", task, "--run", tmp_path / "run", *flags, "--block", 5, "--out", out, "--json")
        assert (ran.code, ran.stderr) == (0, "")
        scores = ptif.Scores.load(out / "scores.safetensors")
        torch.testing.assert_close(scores.values, expected[name].values, rtol=1e-4, atol=1e-7)
        assert scores.diagnostics.members == 3
    (tmp_path / "run").rename(tmp_path / "moved")
    again = ["attribute", task, "--block", 5, "--out", tmp_path / "ekfac", "--json", "--run"]
    assert Ran(*again, tmp_path / "moved").found["resumed_queries"] == QUERIES
    assert "it differs in method" in Ran(*again, tmp_path / "other").sentence
    forecast = Ran("attribute", task, "--run", tmp_path / "moved", "--dry-run", "--json").found
    assert forecast["status"] == "forecast" and forecast["passes"] > 3
    own = Ran("self-influence", task, "--run", tmp_path / "moved", "--out", tmp_path / "self", "--json")
    assert own.code == 0 and any("along(3 checkpoints" in f.read_text() for f in (tmp_path / "self").glob("*.json"))
    absent = Ran("attribute", task, "--run", tmp_path / "nowhere", "--out", tmp_path / "x")
    assert "There is no run at" in absent.sentence
