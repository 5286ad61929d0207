"""The commands of actions, from `what-if` to `attack` and `curate`: what they print and write is the library's."""

from __future__ import annotations

import csv
import importlib
import io
import json
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import pytorch_influence_functions as ptif
from pytorch_influence_functions.cli.task import load_task
from tests.interface.cli_cases import QUERIES, N, Ran, task_file

EXTRA = """
import pytorch_influence_functions as ptif

def make_model():
    return torch.nn.Linear(4, 2)

def get_options():
    held = Points(16, 7)
    return {
        "recipe": ptif.evaluation.Recipe(make_model, epochs=3, loss=torch.nn.CrossEntropyLoss()),
        "validation": (held.x, held.y),
        "statistic": lambda model: model.bias[0] - model.bias[1],
        "weight_decay": 0.01,
    }
"""


@pytest.fixture
def task(tmp_path: Path) -> Path:
    return task_file(tmp_path, EXTRA)


def downloaded(path: Path, *rows: dict[str, object]) -> Path:
    """A file as the report page downloads it."""
    head = {"format": "pytorch-influence-functions/decisions", "version": 2, "report": "0" * 16, "title": ""}
    path.write_text(json.dumps(head | {"training_examples": N, "decisions": rows}))
    return path


def fits(ran: Ran) -> bool:
    return ran.code == 0 and max(map(len, ran.stdout.splitlines())) <= 80 and "\x1b" not in ran.stdout


# --------------------------------------------------------------------------- what-if


def test_what_if_is_the_librarys(task: Path, tmp_path: Path) -> None:
    edit = ("--remove", "3,7:9", "--relabel", "20=low", "--relabel", "21=1", "--reweight", "5=0.5")
    arguments = ("what-if", task, *edit, "--method", "exact", "--queries", "2:6", "--out", tmp_path / "r")
    found = Ran(*arguments, "--json").found
    loaded = load_task(task)
    outcome = ptif.what_if(
        loaded.problem, remove=[3, 7, 8], relabel={20: 0, 21: 1}, reweight={5: 0.5}, method=ptif.exact()
    )
    queries = loaded.query_source.subset(range(2, 6))
    assert [one["query"] for one in found["queries"]] == [2, 3, 4, 5]
    assert [one["change"] for one in found["queries"]] == pytest.approx(outcome.change(queries).tolist())
    first = outcome.change(queries, order="first").tolist()
    assert [one["first_order"] for one in found["queries"]] == pytest.approx(first)
    x, y = loaded.query_source.dataset.x[2:6], loaded.query_source.dataset.y[2:6]
    now = nn.functional.cross_entropy(loaded.problem.model(x), y, reduction="none")
    assert [one["now"] for one in found["queries"]] == pytest.approx(now.tolist(), rel=1e-5)
    then = [["low", "high"][c] for c in outcome.model()(x).argmax(1)]
    assert [one["edited_answer"] for one in found["queries"]] == then
    assert json.loads((tmp_path / "r/what_if.json").read_text()) == found
    told = Ran(*arguments)
    assert fits(told) and "3 examples removed, 2 examples relabelled" in told.stdout and "what_if.json" in told.stdout


def test_what_the_page_downloaded_can_be_foreseen(task: Path, tmp_path: Path) -> None:
    decided = downloaded(
        tmp_path / "decisions.json",
        {"index": 3, "decision": "wrong_label", "relabel_as": "high"},
        {"index": 9, "decision": "duplicate"},
    )
    found = Ran("what-if", task, "--decisions", decided, "--json").found
    by_flags = Ran("what-if", task, "--remove", "9", "--relabel", "3=high", "--json").found
    assert found == by_flags and found["edit"] == "1 example removed, 1 example relabelled"


# --------------------------------------------------------------------------- flip, smallest-removal


def test_a_flip_is_the_librarys_and_confirmed_by_the_recipe(task: Path, tmp_path: Path) -> None:
    loaded = load_task(task)
    with torch.no_grad():
        outputs = loaded.problem.model(loaded.query_source.dataset.x)
    q = int((outputs[:, 0] - outputs[:, 1]).abs().argmin())
    arguments = ("flip", task, "--queries", q, "--most", "20", "--confirm", "--out", tmp_path / "r")
    (found,) = Ran(*arguments, "--json").found["queries"]
    recipe = loaded.recipe
    expected = ptif.actions.flip_prediction(loaded.problem, loaded.query_source.subset([q]), 20, recipe=recipe)
    assert (found["ids"], found["found"]) == (list(expected.ids), expected.found)
    assert expected.found and found["measured"] == pytest.approx(expected.measured) and found["query"] == q
    assert found["answer"] == ["low", "high"][int(outputs[q].argmax())]
    told = Ran(*arguments)
    assert fits(told) and "1 of 1 predictions flip; training again confirms" in told.stdout
    assert (tmp_path / "r/flip.json").exists()


def test_a_conclusion_of_the_task_file_has_its_smallest_removal(task: Path, tmp_path: Path) -> None:
    loaded = load_task(task)
    now = float(loaded.statistic(loaded.problem.model).detach())
    threshold = now - 0.05 * (1 if now > 0 else -1)
    arguments = ("smallest-removal", task, "--threshold", threshold, "--most", "0.2", "--out", tmp_path / "r")
    found = Ran(*arguments, "--json").found
    expected = ptif.actions.smallest_removal(loaded.problem, loaded.statistic, threshold, 0.2)
    assert expected.found and found["ids"] == list(expected.ids) and found["before"] == pytest.approx(now)
    assert json.loads((tmp_path / "r/smallest_removal.json").read_text()) == found
    told = Ran(*arguments)
    assert fits(told) and "Predicted to pass" in told.stdout and f"#{expected.ids[0]}" in told.stdout


def test_a_recipe_that_does_not_lead_back_to_the_model_is_told(task: Path) -> None:
    loaded = load_task(task)
    now = float(loaded.statistic(loaded.problem.model).detach())
    arguments = ("smallest-removal", task, "--threshold", now - 0.05 * (1 if now > 0 else -1), "--confirm")
    found = Ran(*arguments, "--json").found
    again = ptif.evaluation.train_model(loaded.recipe, loaded.problem.data, 0)
    assert found["retrained"] == pytest.approx(float(loaded.statistic(again).detach()))
    assert abs(found["retrained"] - now) > 0.05 and found["measured"] is not None
    told = Ran(*arguments)
    assert fits(told) and "does not lead back to this model" in told.stdout and "measured" in told.stdout


# --------------------------------------------------------------------------- input-influence, attack


def test_input_influence_is_the_librarys(task: Path, tmp_path: Path) -> None:
    out, chosen = tmp_path / "r", [3, 8, 9, 21]
    arguments = ("input-influence", task, "--queries", "2,5", "--examples", "3,8:10,21", "--top", "2", "--out", out)
    found = Ran(*arguments, "--method", "exact", "--json").found
    loaded = load_task(task)
    queries = loaded.query_source.subset([2, 5])
    slopes = ptif.actions.input_influence(loaded.problem, queries, chosen, method="exact")
    tensors = load_file(out / "input_influence.safetensors")
    torch.testing.assert_close(tensors["slopes"], slopes)
    assert tensors["queries"].tolist() == [2, 5] and tensors["examples"].tolist() == chosen
    sizes = slopes[1].abs().sum(1)
    first, second = sizes.argsort(descending=True)[:2].tolist()
    one = found["queries"][1]
    assert [example["index"] for example in one["examples"]] == [chosen[first], chosen[second]]
    assert one["examples"][0]["size"] == pytest.approx(float(sizes[first])) and found["method"].startswith("Influence")
    column = int(slopes[1, first].abs().argmax())
    assert one["examples"][0]["steepest"] == [column]
    assert one["examples"][0]["slope"] == pytest.approx(float(slopes[1, first, column]))
    assert json.loads((out / "input_influence.json").read_text()) == found
    told = Ran(*arguments)
    assert fits(told) and f"#{chosen[first]}" in told.stdout and "input_influence.safetensors" in told.stdout


def test_the_slopes_of_one_query_are_drawn(task: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    picture = tmp_path / "heat.png"
    told = Ran("input-influence", task, "--queries", "5", "--plot", picture, "--quiet")
    assert told.code == 0 and told.stdout == "" and picture.read_bytes().startswith(b"\x89PNG")
    assert [path.name for path in tmp_path.iterdir() if path.suffix == ".png" or "part" in path.name] == ["heat.png"]


def test_an_attack_is_the_librarys_beside_an_unchanged_training(task: Path, tmp_path: Path) -> None:
    out = tmp_path / "r"
    arguments = ("attack", task, "--queries", "5,8", "--count", "3", "--size", "1/2", "--rounds", "2", "--out", out)
    found = Ran(*arguments, "--json").found
    loaded = load_task(task)
    steps = ptif.actions.SignSteps(0.5, rounds=2, bounds=None)
    queries = loaded.query_source.subset([5, 8])
    attack = ptif.actions.attack_training_set(loaded.problem, queries, loaded.recipe, 3, steps)
    assert [one["index"] for one in found["examples"]] == list(attack.ids)
    assert [one["after"] for one in found["queries"]] == pytest.approx(attack.after.tolist())
    assert found["random_signs"] == pytest.approx(attack.control) and found["rounds"] == pytest.approx(attack.path)
    x, y = (torch.stack(part) for part in zip(*(loaded.query_source.dataset[i] for i in (5, 8)), strict=True))
    unchanged = ptif.evaluation.train_model(loaded.recipe, loaded.problem.data, 0)
    for model, loss, answer in ((unchanged, "unchanged", "answer_unchanged"), (attack.model, "after", "answer_after")):
        outputs = model(x).detach()
        expected = nn.functional.cross_entropy(outputs, y, reduction="none").tolist()
        assert [one[loss] for one in found["queries"]] == pytest.approx(expected, rel=1e-4)
        assert [one[answer] for one in found["queries"]] == [["low", "high"][c] for c in outputs.argmax(1)]
    tensors = load_file(out / "attack.safetensors")
    torch.testing.assert_close(tensors["inputs"], attack.inputs)
    moved = tensors["inputs"] - torch.stack([loaded.problem.data.item(i)[0] for i in attack.ids])
    assert [one["largest_change"] for one in found["examples"]] == pytest.approx(moved.abs().amax(1).tolist())
    assert moved.abs().max() == pytest.approx(0.5)
    told = Ran(*arguments)
    assert fits(told) and "3 of 40 training inputs changed by at most 0.5" in told.stdout
    assert "attack.safetensors" in told.stdout


# --------------------------------------------------------------------------- label-issues, curate


def test_label_issues_are_the_librarys_and_go_on_to_curate(task: Path, tmp_path: Path) -> None:
    # Example 4 gets the label of the other side, far from the border.
    spoiled = task.read_text().replace(
        "> 0).long()", "> 0).long()\n        if n == 40:\n            self.y[4] = 1 - self.y[4]"
    )
    task.write_text(spoiled)
    out = tmp_path / "r"
    told = Ran("label-issues", task, "--out", out, "--top", 3)
    assert fits(told) and "label_issues.csv" in told.stdout and "reliability" in told.stdout
    loaded = load_task(task)
    issues = ptif.find_label_issues(loaded.problem, loaded.validation)
    text = (out / "label_issues.csv").read_text()
    rows = list(csv.DictReader(io.StringIO(text)))
    assert [int(row["index"]) for row in rows] == issues.order.tolist() and len(rows) == N
    assert [row["is_label_issue"] == "True" for row in rows] == issues.is_issue[issues.order].tolist()
    assert [float(row["harm"]) for row in rows] == pytest.approx(issues.columns()["harm"], rel=1e-4, abs=1e-9)
    assert {row["given_label"] for row in rows} == {"low", "high"}
    assert Ran("label-issues", task, "--csv").stdout == text
    found = Ran("label-issues", task, "--out", out, "--json").found
    assert [one["index"] for one in found["worst"]] == issues.ids(20) and found["issues"] == int(issues.is_issue.sum())
    flagged = sorted(issues.is_issue.nonzero()[:, 0].tolist())
    assert ptif.report.read_decisions(out / "label_issues.csv", N).wrong_labels == flagged and flagged

    curated = Ran("curate", task, out / "label_issues.csv", "--out", out, "--seeds", 2, "--json").found
    truth = ptif.actions.curate(loaded.problem.data, flagged).retrain(loaded.recipe, loaded.query_source, seeds=2)
    assert curated["removed"] == flagged and curated["measure"] == "accuracy" and curated["n_test"] == QUERIES
    for name in ("before", "after", "gain"):
        assert curated[name]["value"] == pytest.approx(getattr(truth, name).value)
    assert curated["gain"]["low"] == pytest.approx(truth.gain.low)
    again = Ran("curate", task, out / "label_issues.csv", "--out", out, "--seeds", 2)
    assert fits(again) and "curation.json" in again.stdout and "95 % over seeds" in again.stdout
    assert json.loads((out / "curation.json").read_text()) == curated


def test_an_interrupted_curation_keeps_its_trainings(
    task: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    decided = downloaded(tmp_path / "decisions.json", {"index": 3, "decision": "wrong_label"})
    module = importlib.import_module("pytorch_influence_functions.actions.curate")

    def interrupted(*arguments: object, **options: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "retrain", interrupted)
    ran = Ran("curate", task, decided, "--out", tmp_path / "r")
    assert ran.code == 130 and "finished trainings are kept in" in ran.stderr


# --------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("what-if",), r"^Nothing is changed; give --remove, --relabel, --reweight or --decisions\.$"),
        (("what-if", "--remove", "40"), r"^--remove 40 asks for example 40, and there are 40 \(0 to 39\)\.$"),
        (("what-if", "--remove", "all"), r"^--remove all is no range of positions; write 0:20"),
        (("what-if", "--remove", "1,0:3"), r"^--remove 1,0:3 names an example twice; name each once\.$"),
        (("what-if", "--remove", "0:40"), r"nothing would be left; leave some in"),
        (("what-if", "--relabel", "3"), r"^--relabel 3 gives nothing to an example; write --relabel 20=VALUE"),
        (("what-if", "--relabel", "3=lwo"), r"'lwo' is no class of the training data\. Did you mean 'low'\?"),
        (("what-if", "--relabel", "3=0", "--relabel", "2:5=1"), r"^--relabel names example 3 twice"),
        (("what-if", "--reweight", "3=much"), r"^--reweight 3=much is no weight; give a number of at least 0\.$"),
        (("what-if", "--remove", "3", "--reweight", "3=2"), r"Example 3 is both removed and reweighted"),
        (("what-if", "--remove", "3", "--decisions", "d.json"), r"say two things; give one of them\.$"),
        (("what-if", "--decisions", "no.json"), r"'no.json' cannot be read"),
        (("flip",), r"^Say which predictions: --queries 5, 0:20, or all"),
        (("flip", "--queries", "12"), r"asks for query 12, and there are 12"),
        (("flip", "--queries", "1", "--most", "some"), r"^--most some is no amount; write a number of examples"),
        (
            ("flip", "--queries", "1", "--most", "1.5"),
            r"^most=1.5 must be a number above 0 and below 1; or a whole number of examples",
        ),
        (("flip", "--queries", "1", "--confirm"), r"^bare.py gives no recipe; let get_options\(\) return \{'recipe': "),
        (("smallest-removal",), r"^bare.py gives no statistic; let get_options\(\) return \{'statistic': lambda model"),
        (("input-influence",), r"^Say which predictions: --queries 5, 0:20, or all, each of which is a pass"),
        (("input-influence", "--queries", "1:3", "--plot", "h.png"), r"^--plot draws one query, and 2 are asked about"),
        (("input-influence", "--queries", "1", "--plot", "h.txt"), r"^--plot h.txt must end in .png, .pdf or .svg\.$"),
        (("input-influence", "--queries", "1", "--examples", "40"), r"^--examples 40 asks for example 40"),
        (("attack",), r"^Say which predictions: --queries 5, 0:20, or all; they are attacked at once\.$"),
        (("attack", "--size", "big"), r"^--size big is no number; write one such as 0.3, or 2/255\.$"),
        (
            ("attack", "--bounds", "1:0"),
            r"^--bounds 1:0 is no pair of bounds; write the smallest",
        ),
        (("attack", "--queries", "1"), r"^bare.py gives no recipe; let get_options\(\) return \{'recipe': "),
        (("label-issues", "--method", "grad_dotty"), r"There is no method 'grad_dotty'"),
        (("curate",), r"^DECISIONS is missing; give decisions.json of the report page, or label_issues.csv"),
        (("curate", "no.csv"), r"^bare.py gives no recipe; let get_options\(\) return \{'recipe': "),
    ],
)
def test_bad_input_is_one_sentence(tmp_path: Path, arguments: tuple[str, ...], words: str) -> None:
    bare = task_file(tmp_path, name="bare.py")
    verb, *rest = arguments
    ran = Ran(verb, bare, *rest)
    assert ran.code == 2 and ran.stdout == "" and re.search(words, ran.sentence), ran.sentence


def test_a_wrong_answer_is_not_attacked_and_goes_by_its_place(task: Path) -> None:
    task.write_text(
        task.read_text().replace("> 0).long()", "> 0).long()\n        if n == 12:\n            self.y[7] ^= 1")
    )
    ran = Ran("attack", task, "--queries", "5:8")
    assert ran.code == 2 and ran.sentence == "Query 7 is already answered wrongly; attack queries that are right."


def test_several_measures_and_a_place_that_is_a_file(tmp_path: Path, task: Path) -> None:
    task.write_text(task.read_text().replace('"weight_decay": 0.01', '"measure": {"m": ptif.Margin(), "l": None}'))
    ran = Ran("what-if", task, "--remove", "3")
    assert ran.code == 2 and "has 2 measures, and this command shows one" in ran.sentence
    for verb in (("what-if", task, "--remove", "3"), ("label-issues", task), ("curate", task, "d.json")):
        ran = Ran(*verb, "--out", task)
        assert ran.code == 2 and "is a file, and --out names a folder" in ran.sentence
