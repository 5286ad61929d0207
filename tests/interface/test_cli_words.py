"""What the command line shows while it works, and the words it is spoken to with."""

from __future__ import annotations

import io
import re
from dataclasses import fields
from pathlib import Path

import pytest
import torch
from rich.console import Console
from rich.progress import Progress

import pytorch_influence_functions as ptif
from pytorch_influence_functions.cli import blocks, options, show
from pytorch_influence_functions.cli.exit import Output
from pytorch_influence_functions.cli.parsing import parse_damping, parse_method, parse_query_positions
from pytorch_influence_functions.cli.progress_bars import ProgressBars, ProgressLines, report_progress
from pytorch_influence_functions.damping import Absolute, FromTraining, PerDirection, Relative
from pytorch_influence_functions.errors import InvalidInput, UnknownName
from pytorch_influence_functions.methods.names import METHODS

# --------------------------------------------------------------------------- progress


class Clock:
    """Time that passes when it is told to."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def test_a_log_has_a_line_every_ten_seconds_and_one_at_the_end() -> None:
    log, clock = io.StringIO(), Clock()
    lines = ProgressLines(log, clock)
    for second in range(25):
        lines("scoring", second * 100, 2400)
        clock.now += 1.0
    found = log.getvalue().splitlines()
    assert [line.split(", ")[0] for line in found] == [f"ptif: scoring: {n}/2,400" for n in ("1,000", "2,000", "2,400")]
    assert found[0].startswith("ptif: scoring: 1,000/2,400, 100 ex/s, 0:14 left, ") and found[0].endswith("MiB")
    assert "done in 0:24" in found[-1]


def test_a_short_pass_is_not_worth_a_line() -> None:
    log, clock = io.StringIO(), Clock()
    lines = ProgressLines(log, clock)
    for done in (0, 50, 100):
        lines("labels", done, 100)
        clock.now += 0.1
    assert log.getvalue() == "" and not lines.passes


def test_queries_kept_before_do_not_count_as_speed() -> None:
    log, clock = io.StringIO(), Clock()
    lines = ProgressLines(log, clock)
    lines("queries", 80, 100)
    clock.now += 20.0
    lines("queries", 90, 100)
    assert log.getvalue().startswith("ptif: queries: 90/100, 0.5/s, 0:20 left, ")
    lines("loading the model", 0, 1)
    clock.now += 12.0
    lines("loading the model", 1, 1)
    assert log.getvalue().splitlines()[-1].startswith("ptif: loading the model: done in 0:12, ")


def test_bars_fit_80_columns_and_short_passes_have_none() -> None:
    log, clock = io.StringIO(), Clock()
    console = Console(file=log, force_terminal=True, width=80)
    from pytorch_influence_functions.cli.progress_bars import bar_columns

    with Progress(*bar_columns(), console=console, auto_refresh=False) as bars:
        watch = ProgressBars(bars, clock)
        watch("queries", 0, 1000)
        watch("labels", 0, 10)
        watch("labels", 10, 10)
        watch("looking at the gradient", 0, 60_000)
        clock.now += 10.0
        watch("looking at the gradient", 12_345, 60_000)
        assert [task.description for task in bars.tasks] == ["queries", "looking at the gradient"]
        bars.refresh()
        clock.now += 10.0
        watch("looking at the gradient", 60_000, 60_000)
        assert [task.description for task in bars.tasks] == ["queries"]
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", log.getvalue())
    line = next(line for line in re.split(r"[\r\n]", text) if "12,345" in line)
    assert re.search(r"12,345/60,000, 1,23\d ex/s, 0:39 left, [\d.,]+ [MG]iB$", line.rstrip()) and len(line) <= 80


def test_quiet_and_the_environment_silence_progress(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from pytorch_influence_functions.core.progress import track

    def work() -> None:
        monkeypatch.setattr("pytorch_influence_functions.cli.progress_bars.SHOW_AFTER", 0.0)
        list(track(range(3), 3, "counting"))

    with report_progress(Output(quiet=True)):
        work()
    monkeypatch.setenv("PTIF_PROGRESS", "0")
    with report_progress(Output()):
        work()
    assert capsys.readouterr().err == ""
    monkeypatch.delenv("PTIF_PROGRESS")
    with report_progress(Output()):
        work()
    assert capsys.readouterr().err.startswith("ptif: counting: 3/3")


# --------------------------------------------------------------------------- words


def test_a_method_is_given_by_name() -> None:
    assert parse_method("Gauss-Newton") == ptif.gauss_newton() and parse_method("auto") == ptif.Influence()
    with pytest.raises(UnknownName, match=r"Did you mean 'ekfac'\? .* can be made in get_options\(\) of the task file"):
        parse_method("ekfak")
    with pytest.raises(InvalidInput, match=r"needs learning_rates, .* can be made in get_options\(\) of the task file"):
        parse_method("tracin")


def test_dampings_in_words() -> None:
    assert parse_damping("0.01") == Absolute(0.01)
    assert parse_damping("training:0.1:200:0.9") == FromTraining(0.1, 200, 0.9)
    assert parse_damping("per-direction:0.3") == PerDirection(0.3)
    assert parse_damping("per-block:0.1") == Relative(0.1, per_block=True)
    with pytest.raises(InvalidInput, match=r"'per-block:' is no damping; .* per-block:0.1 .*, per-direction:0.2"):
        parse_damping("per-block:")
    with pytest.raises(InvalidInput, match=r"must be a finite number above 0; 0.2 is a good start"):
        parse_damping("per-direction:0")


def test_ranges_of_queries() -> None:
    assert (
        parse_query_positions("8:", 10) == [8, 9]
        and parse_query_positions(":2", 10) == [0, 1]
        and parse_query_positions("::4", 10) == [0, 4, 8]
    )
    assert parse_query_positions("9", 10) == [9]


@pytest.mark.parametrize(("queries", "block"), [(1, None), (8, None), (1000, None), (10, 3), (3, 10)])
def test_blocks_cover_every_query_once(queries: int, block: int | None) -> None:
    found = list(blocks.block_ranges(queries, block))
    assert [q for a, b in found for q in range(a, b)] == list(range(queries))
    assert max(b - a for a, b in found) <= (block or blocks.LARGEST)
    assert block is not None or len(found) <= 9


def test_what_one_block_did_not_measure_is_not_known_of_the_whole() -> None:
    def part(residual: float, queries: int, seconds: float) -> ptif.Scores:
        d = ptif.Diagnostics(residual_max=residual, residual_mean=residual, n_queries=queries, seconds=seconds)
        return ptif.Scores(torch.ones(queries, 2), diagnostics=d)

    whole = blocks.join_blocks([part(0.1, 1, 2.0), part(0.4, 3, 1.0)]).diagnostics
    assert (whole.residual_max, whole.n_queries, whole.seconds) == (0.4, 4, 3.0)
    assert whole.residual_mean == pytest.approx((0.1 + 3 * 0.4) / 4)
    unknown = blocks.join_blocks([part(0.1, 1, 2.0), part(float("nan"), 3, 1.0)]).diagnostics
    assert unknown.residual_max != unknown.residual_max


def test_every_setting_can_be_checked() -> None:
    assert {f.name for f in fields(options.RunSettings)} == set(options._KINDS)


def test_text_from_data_cannot_steer_the_terminal() -> None:
    scores = ptif.Scores(
        torch.tensor([[0.1, -0.2]]), query_labels=[0], train_labels=[0, 0], class_names=["\x1b[2J[bold]red[/]\n"]
    )
    log = io.StringIO()
    for one in show.influence_table(scores):
        Console(file=log, width=80, force_terminal=True, markup=True).print(one)
    assert "?[2J[bold]red[/]?" in log.getvalue() and "\x1b[2J" not in log.getvalue()


def test_the_page_of_the_command_line_names_every_flag_method_and_setting() -> None:
    page = (Path(__file__).parents[2] / "docs/command-line.md").read_text(encoding="utf-8")
    for name in ("--dry-run", "--json", "--quiet", "--overwrite", "--config", "--task", *METHODS):
        assert f"`{name}" in page, name
    for field in fields(options.RunSettings):
        assert f"`{field.name}`" in page, field.name
    for code in ("| 0 |", "| 1 |", "| 2 |", "| 130 |"):
        assert code in page
