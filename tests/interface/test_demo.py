"""The demo, small: fewer images, epochs and removals. What it prints is what it computed and what it wrote."""

from __future__ import annotations

import csv
import io
import json
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import Console
from torch import Tensor, nn
from torch.nn import functional
from typer.testing import CliRunner

import pytorch_influence_functions as ptif
from pytorch_influence_functions import cli
from pytorch_influence_functions.core.errors import InvalidInput
from pytorch_influence_functions.demo.data import DemoData, datasets, load, mislabel
from pytorch_influence_functions.demo.model import LR, MOMENTUM, WEIGHT_DECAY, SmallCNN, make_recipe, training_damping
from pytorch_influence_functions.demo.run import find_suspects, pick_queries, run_demo
from pytorch_influence_functions.demo.screen import Screen
from pytorch_influence_functions.demo.show import format_change
from pytorch_influence_functions.demo.story import Comparison, Extent, Story, agreement
from pytorch_influence_functions.evaluation import train_model

RECIPE = make_recipe(epochs=20, batch_size=50)
EXTENT = Extent(wrong=1, right=1, shown=2, suspects=50, group=15, groups=1)


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
    screen = Screen(console=Console(file=log, highlight=False))
    story = run_demo(screen, folder, seed=0, recipe=RECIPE, extent=EXTENT, data=small())
    assert torch.get_num_threads() == threads
    assert torch.equal(torch.get_rng_state(), state)
    return Ran(story, log.getvalue(), folder)


def test_every_number_printed_was_computed_in_the_run(ran: Ran) -> None:
    story = ran.story
    for removal in story.groups + story.singles:
        (line,) = [x for x in ran.printed.splitlines() if x.strip().startswith(removal.name)]
        assert format_change(removal.predicted) in line and format_change(removal.actual) in line
    for q in story.queries:
        for pairs in (story.scores.helpful(q, 2), story.scores.harmful(q, 2)):
            for index, score in pairs:
                label = story.data.class_names[int(story.data.train_labels[index])]
                assert f"#{index} {label}" in ran.printed and format_change(score) in ran.printed
    for removals in (story.groups, story.singles):
        r, slope = agreement(removals)
        words = f"correlation {r:.3f}, slope {slope:.2f} (n = {len(removals)})"
        assert words.replace("-", "−") in ran.printed
    assert f"{story.trained.test_accuracy:.1%}" in ran.printed


def test_a_log_has_plain_lines_of_at_most_80_columns(ran: Ran) -> None:
    assert "\x1b" not in ran.printed and "\r" not in ran.printed
    assert max(len(line) for line in ran.printed.splitlines()) <= 80


def train_by_hand(images: Tensor, labels: Tensor, epochs: int, size: int, without: tuple[int, ...] = ()) -> SmallCNN:
    """The demo's training in an ordinary loop: SGD with momentum from seed 0; removed images weigh nothing."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = SmallCNN()
    weight = torch.ones(len(images))
    weight[list(without)] = 0.0
    order = torch.Generator().manual_seed(0)
    optimizer = torch.optim.SGD(model.parameters(), lr=LR, momentum=MOMENTUM, weight_decay=WEIGHT_DECAY)
    steps, step = epochs * -(-len(images) // size), 0
    for _ in range(epochs):
        for ids in torch.split(torch.randperm(len(images), generator=order), size):
            optimizer.param_groups[0]["lr"] = LR * min(1.0, (step + 1) / (steps / 30)) * (1.0 - step / steps)
            losses = functional.cross_entropy(model(images[ids]), labels[ids], reduction="none")
            optimizer.zero_grad()
            (losses @ weight[ids] / len(ids)).backward()
            optimizer.step()
            step += 1
    return model.eval()


@torch.no_grad()
def losses_of(model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
    return functional.cross_entropy(model(images), labels, reduction="none")


def test_predictions_are_sums_of_scores_and_actual_changes_come_from_retraining(ran: Ran) -> None:
    story = ran.story
    sets = datasets(story.data)
    for removal in (story.groups[0], story.singles[0]):
        losses = losses_of(train_by_hand(*sets.train.tensors, 20, 50, removal.ids), *sets.test.tensors)
        changes = (losses - story.trained.test_losses).double()
        summed = story.scores.values[:, list(removal.ids)].double().sum(1)
        at = slice(None) if removal.query is None else slice(removal.query, removal.query + 1)
        assert removal.actual == pytest.approx(float(changes[at].mean()), abs=1e-4)
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
    assert numbers["recipe"] == repr(RECIPE) and numbers["seed"] == 0
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
    right = ran.story.trained.test_probabilities.argmax(1) == labels
    picked = pick_queries(ran.story.trained, labels, Extent(wrong=2, right=2))
    assert [bool(right[i]) for i in picked] == [False, False, True, True]
    assert len({int(labels[i]) for i in picked}) == 4


# --------------------------------------------------------------------------- its parts


def test_suspicion_is_loss_plus_leverage_corrected_self_influence() -> None:
    own, losses = torch.tensor([0.5, 0.0, 0.8]).double(), torch.tensor([0.0, 2.0, 1.0])
    found = find_suspects(own, losses, np.array([False, False, True]), 1, seed=0)
    assert found.suspicion.tolist() == pytest.approx([1.0, 2.0, 5.0])
    assert (found.order.tolist(), found.hits, found.hits_by_loss) == ([2, 1, 0], 1, 0)


def test_training_is_the_loop_written_out() -> None:
    images, labels = datasets(small(120, 10)).train.tensors
    model = train_model(make_recipe(epochs=3, batch_size=60), (images, labels), seed=0)
    by_hand = train_by_hand(images, labels, 3, 60)
    # Six steps from the same weights in float32: rounding is all that may differ.
    for ours, theirs in zip(model.parameters(), by_hand.parameters(), strict=True):
        assert torch.allclose(ours, theirs, rtol=1e-4, atol=1e-6)


def test_damping_comes_from_the_training_run() -> None:
    recipe = make_recipe(epochs=2, batch_size=10)
    rates = [0.05 * min(1.0, (step + 1) / (20 / 30)) * (1 - step / 20) for step in range(20)]
    damping = training_damping(recipe, 95)
    assert (damping.steps, damping.momentum) == (20, 0.9)
    assert damping.lr == pytest.approx(sum(rates) / 20, rel=1e-12)
    assert sum(p.numel() for p in SmallCNN().parameters()) == 26_698


def test_agreement_of_known_points() -> None:
    points = [Comparison(str(x), (), None, float(x), 2.0 * x + 1.0) for x in range(4)]
    assert agreement(points) == (pytest.approx(1.0), pytest.approx(2.0))


def test_a_terminal_gets_bars_and_at_most_80_columns() -> None:
    log = io.StringIO()
    screen = Screen(console=Console(file=log, force_terminal=True, width=200, highlight=False))
    assert screen.console.width == 80
    with screen.bars() as report:
        report("gradients", 1, 2)
        report("retraining", 0, 3)
    assert "gradients" in log.getvalue() and "retraining" in log.getvalue()


# --------------------------------------------------------------------------- the command


def test_command_passes_its_options_on(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    seen = {}

    def fake(screen: Screen, out: Path, seed: int) -> None:
        seen.update(quiet=screen.quiet, out=out, seed=seed)

    monkeypatch.setattr("pytorch_influence_functions.demo.run.run_demo", fake)
    result = CliRunner().invoke(cli.build(), ["demo", "--out", str(tmp_path), "--seed", "7", "--quiet"])
    assert result.exit_code == 0, result.output
    assert seen == {"quiet": True, "out": tmp_path, "seed": 7}


def test_quiet_prints_the_result_in_a_few_lines(ran: Ran) -> None:
    from pytorch_influence_functions.demo import show

    log = io.StringIO()
    screen = Screen(quiet=True, console=Console(file=log, highlight=False))
    show.show_setting(screen, ran.story.data, RECIPE)
    show.show_suspects(screen, ran.story.data, ran.story.trained, ran.story.suspects)
    show.show_files(screen, ran.story, ran.folder, [], 1.0)
    assert 3 <= len(log.getvalue().splitlines()) <= 8
    assert f"{ran.story.suspects.hits} by influence" in " ".join(log.getvalue().split())


def test_errors_are_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*args: object, **kwargs: object) -> None:
        raise InvalidInput("Nothing to see; look elsewhere.")

    monkeypatch.setattr("pytorch_influence_functions.demo.run.run_demo", broken)
    result = CliRunner().invoke(cli.build(), ["demo"])
    assert result.exit_code == 2 and result.output.strip() == "ptif: Nothing to see; look elsewhere."


@pytest.mark.parametrize("missing", ["typer", "rich"])
def test_without_its_extra_the_command_says_so_in_one_line(monkeypatch: pytest.MonkeyPatch, missing: str) -> None:
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(SystemExit, match=rf"^ptif: {missing} is not installed.*\[cli\]'\.$"):
        cli.main()


def test_version_and_help() -> None:
    version = CliRunner().invoke(cli.build(), ["--version"])
    assert version.exit_code == 0 and ptif.__version__ in version.output
    plain = {"COLUMNS": "80", "NO_COLOR": "1", "TERM": "dumb"}
    shown = CliRunner().invoke(cli.build(), ["demo", "--help"], env=plain)
    assert shown.exit_code == 0 and "--seed" in shown.output
