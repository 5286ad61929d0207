"""The demo, small: fewer images, epochs and removals. What it prints is what it computed and what it wrote."""

from __future__ import annotations

import csv
import io
import json
import os
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import Console
from typer.testing import CliRunner

import pytorch_influence_functions as ptif
from pytorch_influence_functions import cli
from pytorch_influence_functions.core.errors import InvalidInput
from pytorch_influence_functions.damping import FromTraining
from pytorch_influence_functions.demo.data import DemoData, datasets, load, mislabel
from pytorch_influence_functions.demo.run import find_suspects, pick_queries, run
from pytorch_influence_functions.demo.screen import Screen
from pytorch_influence_functions.demo.show import signed
from pytorch_influence_functions.demo.story import Plan, Removal, Story, agreement
from pytorch_influence_functions.demo.train import Recipe, SmallCNN, initial, look, one_thread, train, train_many

RECIPE = Recipe(epochs=20, batch_size=50)
PLAN = Plan(wrong=1, right=1, shown=2, suspects=50, group=15, groups=1)


def small(n: int = 500, m: int = 100) -> DemoData:
    data = load()
    labels, planted = mislabel(data.true_labels[:n], n // 10, 10, seed=1)
    return replace(
        data,
        train_images=data.train_images[:n],
        train_labels=labels,
        true_labels=data.true_labels[:n],
        planted=planted,
        train_index=data.train_index[:n],
        test_images=data.test_images[:m],
        test_labels=data.test_labels[:m],
        test_index=data.test_index[:m],
    )


@dataclass(frozen=True)
class Ran:
    story: Story
    printed: str
    folder: Path


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> Ran:
    folder = tmp_path_factory.mktemp("demo") / "new"
    log = io.StringIO()
    threads, state = torch.get_num_threads(), torch.get_rng_state()
    story = run(Screen(console=Console(file=log, highlight=False)), folder, RECIPE, PLAN, small())
    assert torch.get_num_threads() == threads
    assert torch.equal(torch.get_rng_state(), state)
    return Ran(story, log.getvalue(), folder)


def test_every_number_printed_was_computed_in_the_run(ran: Ran) -> None:
    story = ran.story
    for removal in story.groups + story.singles:
        (line,) = [x for x in ran.printed.splitlines() if x.strip().startswith(removal.name)]
        assert signed(removal.predicted) in line and signed(removal.actual) in line
    for q in story.queries:
        for pairs in (story.scores.helpful(q, 2), story.scores.harmful(q, 2)):
            for index, score in pairs:
                label = story.data.class_names[int(story.data.train_labels[index])]
                assert f"#{index} {label}" in ran.printed and signed(score) in ran.printed
    for removals in (story.groups, story.singles):
        r, slope = agreement(removals)
        words = f"correlation {r:.3f}, slope {slope:.2f} (n = {len(removals)})"
        assert words.replace("-", "−") in ran.printed
    assert f"{story.trained.test_accuracy:.1%}" in ran.printed


def test_a_log_has_plain_lines_of_at_most_80_columns(ran: Ran) -> None:
    assert "\x1b" not in ran.printed and "\r" not in ran.printed
    assert max(len(line) for line in ran.printed.splitlines()) <= 80


def test_predictions_are_sums_of_scores_and_actual_changes_come_from_retraining(ran: Ran) -> None:
    story = ran.story
    sets = datasets(story.data)
    for removal in (story.groups[0], story.singles[0]):
        with one_thread():
            model = train(*sets.train.tensors, RECIPE, story.trained.start, removal.ids)
        losses, _ = look(model, *sets.test.tensors)
        changes = (losses - story.trained.test_losses).double()
        summed = story.scores.values[:, list(removal.ids)].double().sum(1)
        at = slice(None) if removal.query is None else slice(removal.query, removal.query + 1)
        assert removal.actual == pytest.approx(float(changes[at].mean()), abs=1e-6)
        assert removal.predicted == pytest.approx(float(summed[at].mean()), rel=1e-9)
    assert story.groups[0].predicted > 0 > story.groups[1].predicted  # helpful, then harmful


def test_influence_agrees_with_retraining_even_in_small(ran: Ran) -> None:
    assert agreement(ran.story.groups)[0] > 0.5


def test_counts_of_planted_labels_are_true(ran: Ran) -> None:
    found, planted = ran.story.suspects, ran.story.data.planted
    losses = ran.story.trained.train_losses.numpy()
    assert found.hits == int(planted[found.order[:50].numpy()].sum())
    assert found.hits_by_loss == int(planted[np.argsort(-losses, kind="stable")[:50]].sum())
    assert found.hits > 3 * found.hits_at_random


def test_files_say_the_same(ran: Ran) -> None:
    story, folder = ran.story, ran.folder
    names = {p.name for p in folder.iterdir()}
    assert names == {
        "agreement.png",
        "agreement_single.png",
        "influences.png",
        "influence_results.json",
        "label_errors.csv",
        "report.html",
        "scores.safetensors",
        "summary.json",
        "summary.txt",
    }
    assert torch.equal(ptif.Scores.load(folder / "scores.safetensors").values, story.scores.values)
    results = json.loads((folder / "influence_results.json").read_text())
    assert list(results) == [str(q) for q in story.queries]
    first = results[str(story.queries[0])]
    assert set(first) == {"label", "num_in_dataset", "time_calc_influence_s", "influence", "harmful", "helpful"}
    assert first["label"] == int(story.data.test_labels[story.queries[0]]) and len(first["influence"]) == 500
    assert first["helpful"][0] == int(np.argmax(first["influence"]))
    numbers = json.loads((folder / "summary.json").read_text())
    assert numbers["groups"]["correlation"] == agreement(story.groups)[0]
    assert numbers["label_errors"]["by_influence"] == story.suspects.hits
    for name in ("influences.png", "agreement.png", "agreement_single.png"):
        assert (folder / name).read_bytes().startswith(b"\x89PNG")
    page = (folder / "report.html").read_text()
    assert "labels are wrong on purpose" in page and 'src="http' not in page
    text = (folder / "summary.txt").read_text()
    assert all(name in text for name in names) and "lambda" in text


def test_label_errors_lists_every_image_once(ran: Ran) -> None:
    rows = list(csv.DictReader((ran.folder / "label_errors.csv").read_text().splitlines()))
    assert sorted(int(row["index"]) for row in rows) == list(range(500))
    assert sum(int(row["planted"]) for row in rows[:50]) == ran.story.suspects.hits
    assert all((row["label"] != row["true_label"]) == (row["planted"] == "1") for row in rows)
    unseen = [float(row["predicted_loss_unseen"]) for row in rows]
    assert unseen == sorted(unseen, reverse=True)
    assert all(u >= float(row["loss"]) for u, row in zip(unseen, rows, strict=True))


def test_queries_are_first_the_wrong_then_the_right(ran: Ran) -> None:
    labels = torch.from_numpy(ran.story.data.test_labels)
    right = ran.story.trained.test_odds.argmax(1) == labels
    picked = pick_queries(ran.story.trained, labels, Plan(wrong=2, right=2))
    assert [bool(right[i]) for i in picked] == [False, False, True, True]
    assert len({int(labels[i]) for i in picked}) == 4


# --------------------------------------------------------------------------- its parts


def test_suspicion_is_loss_plus_leverage_corrected_self_influence() -> None:
    own, losses = torch.tensor([0.5, 0.0, 0.8]).double(), torch.tensor([0.0, 2.0, 1.0])
    found = find_suspects(own, losses, np.array([False, False, True]), 1, seed=0)
    assert found.suspicion.tolist() == pytest.approx([1.0, 2.0, 5.0])
    assert (found.order.tolist(), found.hits, found.hits_by_loss) == ([2, 1, 0], 1, 0)


def test_training_repeats_itself_and_removal_is_as_if_absent() -> None:
    data = datasets(small(120, 10)).train.tensors
    start = initial(3)
    short = Recipe(epochs=1, batch_size=60, warmup=1)
    with one_thread():
        a, b = (train(*data, short, start).state_dict() for _ in range(2))
        spoiled = (data[0].clone(), data[1])
        spoiled[0][:5] = 100.0
        c, d = (train(*x, short, start, range(5)).state_dict() for x in (data, spoiled))
    assert all(torch.equal(a[k], b[k]) for k in a)
    assert all(torch.equal(c[k], d[k]) for k in c) and not torch.equal(a["body.7.bias"], c["body.7.bias"])
    (e,) = (m.state_dict() for m in train_many(*data, short, start, [range(5)]))
    assert all(torch.equal(c[k], e[k]) for k in c)


def test_damping_comes_from_the_training_run() -> None:
    recipe = Recipe(epochs=2, batch_size=10, lr=0.2, momentum=0.5, warmup=1)
    rates = [recipe.rate(step, 20) for step in range(20)]
    assert recipe.steps(95) == 20 and rates[0] == pytest.approx(0.2) and rates == sorted(rates, reverse=True)
    assert recipe.damping(95) == FromTraining(sum(rates) / 20, 20, 0.5)
    assert sum(p.numel() for p in SmallCNN().parameters()) == 26_698


def test_agreement_of_known_points() -> None:
    points = [Removal(str(x), (), None, float(x), 2.0 * x + 1.0) for x in range(4)]
    assert agreement(points) == (pytest.approx(1.0), pytest.approx(2.0))


def test_a_terminal_gets_bars_and_at_most_80_columns() -> None:
    log = io.StringIO()
    screen = Screen(console=Console(file=log, force_terminal=True, width=200, highlight=False))
    assert screen.console.width == 80
    with screen.bar("counting", 2) as advance:
        advance(2)
    with screen.passes() as report:
        report("gradients", 1, 2)
    assert "counting" in log.getvalue() and "gradients" in log.getvalue()


# --------------------------------------------------------------------------- the command


def test_command_passes_its_options_on(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    seen = {}

    def fake(screen: Screen, out: Path, recipe: Recipe) -> None:
        seen.update(quiet=screen.quiet, out=out, seed=recipe.seed)

    monkeypatch.setattr("pytorch_influence_functions.demo.run.run", fake)
    result = CliRunner().invoke(cli.build(), ["demo", "--out", str(tmp_path), "--seed", "7", "--quiet"])
    assert result.exit_code == 0, result.output
    assert seen == {"quiet": True, "out": tmp_path, "seed": 7}


def test_quiet_prints_the_result_in_a_few_lines(ran: Ran) -> None:
    from pytorch_influence_functions.demo import show

    log = io.StringIO()
    screen = Screen(quiet=True, console=Console(file=log, highlight=False))
    show.opening(screen, ran.story.data, RECIPE)
    show.suspected(screen, ran.story.data, ran.story.trained, ran.story.suspects)
    show.closing(screen, ran.story, ran.folder, [], 1.0)
    assert 3 <= len(log.getvalue().splitlines()) <= 8
    assert f"{ran.story.suspects.hits} by influence" in " ".join(log.getvalue().split())


def test_errors_are_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*args: object, **kwargs: object) -> None:
        raise InvalidInput("Nothing to see; look elsewhere.")

    monkeypatch.setattr("pytorch_influence_functions.demo.run.run", broken)
    result = CliRunner().invoke(cli.build(), ["demo"])
    assert result.exit_code == 2 and result.output.strip() == "ptif: Nothing to see; look elsewhere."


@pytest.mark.parametrize("missing", ["typer", "rich"])
def test_without_its_extra_the_command_says_so_in_one_line(monkeypatch: pytest.MonkeyPatch, missing: str) -> None:
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(SystemExit, match=rf"^ptif: {missing} is not installed.*\[cli\]'\.$"):
        cli.main()


def test_version_and_help() -> None:
    for arguments, words in ((["--version"], ptif.__version__), (["demo", "--help"], "--seed")):
        done = subprocess.run(
            [sys.executable, "-m", "pytorch_influence_functions.cli", *arguments],
            capture_output=True,
            text=True,
            timeout=60,
            env={**os.environ, "COLUMNS": "80", "NO_COLOR": "1", "TERM": "dumb"},
        )
        assert done.returncode == 0, done.stderr
        assert words in done.stdout
