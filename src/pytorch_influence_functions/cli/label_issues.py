"""`ptif label-issues`: training examples by how doubtful their labels are, as a table to look at and to decide in."""

import csv
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.text import Text

from ..actions.label_issues import LabelIssues, find_label_issues
from ..core.files import write_bytes
from ..core.text import printable
from ..methods.papers import ekfac
from . import options, show
from .action_run import ActionRun
from .exit import Output, exit_with_code
from .folder import check_folder
from .progress_bars import report_progress
from .self_influence_table import text_cell

TABLE = "label_issues.csv"


def label_issues_command(
    task: options.TaskFile = None,
    out: options.Out = None,
    top: Annotated[
        int | None, typer.Option("--top", help="Examples to show; the file holds all. (default: 20)")
    ] = None,
    csv: Annotated[bool, typer.Option("--csv", help="Print the whole table to stdout, and write no file.")] = False,
    method: options.Method = None,
    damping: options.Damping = None,
    weight_decay: options.WeightDecay = None,
    batch_size: options.BatchSize = None,
    device: options.Device = None,
    hf: options.LanguageModel = None,
    dataset: options.Texts = None,
    text_column: options.TextColumn = None,
    label_column: options.LabelColumn = None,
    max_length: options.MaxLength = None,
    config: options.ConfigFile = None,
    json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Which training labels are wrong? The most doubtful first.

    With validation in get_options() (labelled data that neither trained the model nor will judge it) these vote too,
    and the harm that each example does is told. ptif curate carries out what you decide in the table. Of a language
    model for classes of texts --hf and --dataset stand for the task file.
    """
    output = Output(json, quiet or csv)
    flags = options.settings_among(locals())
    with exit_with_code(output):
        settings = options.merge_settings(flags, config)
        if not csv:
            check_folder(settings.out)
        with report_progress(output):
            run = ActionRun.of(settings, ekfac())
            issues = find_label_issues(run.task.problem, run.task.validation, run.method)
        table = csv_table(issues)
        if csv:
            print(table, end="")
            return
        path = settings.out / TABLE
        write_bytes(path, table.encode())
        rows = _first(issues, settings.top or 20)
        _print_result(output, run, issues, rows, path)
        output.print_json(
            {
                "status": "complete",
                "exit_code": 0,
                "command": "label-issues",
                "files": {"table": str(path)},
                "n_train": len(issues),
                "issues": int(issues.is_issue.sum()),
                "harm_reliability": issues.harm_reliability,
                "worst": rows,
            }
        )


def csv_table(issues: LabelIssues) -> str:
    """All examples, the most doubtful first, with `decision` and `relabel_as` to fill in for `ptif curate`."""
    columns = issues.columns()
    flagged: Sequence[bool] = columns["is_label_issue"]
    decided = ["wrong_label" if flag else "" for flag in flagged]
    named = {"index": issues.order.tolist(), "decision": decided, "relabel_as": [""] * len(issues)} | columns
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(named)
    for row in zip(*named.values(), strict=True):
        writer.writerow([text_cell(cell) if isinstance(cell, str) else cell for cell in row])
    return printable(text.getvalue())


def _first(issues: LabelIssues, top: int) -> list[dict[str, Any]]:
    columns, ids = issues.columns(), issues.order.tolist()
    return [
        {"index": ids[k]} | {name: column[k] for name, column in columns.items()} for k in range(min(top, len(ids)))
    ]


def _print_result(
    output: Output, run: ActionRun, issues: LabelIssues, rows: Sequence[Mapping[str, Any]], path: Path
) -> None:
    harmed = "harm" in rows[0]
    evidence = "what all other examples say of the label"
    if issues.harm_reliability is not None:
        evidence += f", and validation data (reliability of the harm: {issues.harm_reliability:.2f})"
    columns = [("rank", "right"), ("example", "right"), ("given", "left"), ("suggested", "left")]
    columns += [("p given", "right"), ("loss", "right"), ("doubt", "right")] + ([("harm", "right")] * harmed)
    table = show.borderless_table(columns)
    for rank, one in enumerate(rows, 1):
        cells = [f"{rank}{' *' if one['is_label_issue'] else '  '}", f"#{one['index']}"]
        cells += [show.printable(str(one[name]), 12) for name in ("given_label", "suggested_label")]
        cells += [f"{one['probability_of_given']:.2g}", f"{one['loss']:.3g}", f"{one['doubt']:.3g}"]
        table.add_row(*map(Text, [*cells, *([show.format_score(one["harm"])] if harmed else [])]))
    count = int(issues.is_issue.sum())
    agreed = "the others would give another class"
    output.print_text(
        show.heading(f"{count:,} of {len(issues):,} labels in doubt (*: {agreed})"),
        show.fact_table([("evidence", evidence)]),
        "",
        show.heading(f"Most doubtful {len(rows):,}"),
        show.indent(table),
        "",
        show.heading("Written"),
        show.file_table([(path, "all of them; decide in it, then ptif curate")]),
    )
