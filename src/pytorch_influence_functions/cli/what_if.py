"""`ptif what-if`: what would change if training examples were removed, relabelled or weighted otherwise."""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.text import Text
from torch import nn

from ..actions.curate import curate
from ..actions.edits import label_from_text
from ..actions.what_if import WhatIf, what_if
from ..core.errors import InvalidInput
from ..problem.edited import label_of
from . import options, show
from .action_run import ActionRun, QueryLook, write_result
from .exit import Output, exit_with_code
from .folder import check_folder
from .parsing import parse_assignments, parse_example_positions
from .progress_bars import report_progress

RESULT = "what_if.json"
_SHOWN = 10


def what_if_command(
    task: options.TaskFile = None,
    remove: Annotated[
        str | None, typer.Option("--remove", help="Training examples to leave out: 0:20, 5, or 1,4,10:20.")
    ] = None,
    relabel: Annotated[
        list[str] | None, typer.Option("--relabel", help="New labels: 20=LABEL, or 3,7=LABEL; repeatable.")
    ] = None,
    reweight: Annotated[
        list[str] | None, typer.Option("--reweight", help="New weights, 1 is the present one: 5=0.5; repeatable.")
    ] = None,
    decisions: Annotated[
        Path | None, typer.Option("--decisions", help="The file that the report page downloaded, instead of these.")
    ] = None,
    queries: options.Queries = None,
    out: options.ResultFolder = None,
    top: Annotated[int | None, typer.Option("--top", help="Queries to show. (default: 10)")] = None,
    method: options.Method = None,
    damping: options.Damping = None,
    weight_decay: options.WeightDecay = None,
    batch_size: options.BatchSize = None,
    device: options.Device = None,
    config: options.ConfigFile = None,
    json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """What would change if training examples were removed, relabelled or weighted otherwise?

    Predicted around the trained weights; nothing is trained. ptif curate trains again, to know.
    """
    output = Output(json, quiet)
    flags = options.settings_among(locals())
    with exit_with_code(output):
        settings = options.merge_settings(flags, config)
        if out is not None:
            check_folder(out)
        with report_progress(output):
            run = ActionRun.of(settings)
            edit = _read_edit(run, remove, relabel or [], reweight or [], decisions)
            ids = run.query_ids()
            outcome = what_if(run.task.problem, **edit, method=run.method)
            now = QueryLook.of(run.task, ids)
            result = _describe(run, outcome, now, _edited(run, outcome, ids))
        file = None if out is None else write_result(out, RESULT, result)
        _print_result(output, run, result, settings.top or _SHOWN, file)
        output.print_json(result)


def _read_edit(
    run: ActionRun, remove: str | None, relabel: list[str], reweight: list[str], decisions: Path | None
) -> dict[str, Any]:
    """The edit as `what_if` takes it."""
    data, n = run.task.problem.data, run.n_train
    if decisions is not None:
        if remove or relabel or reweight:
            raise InvalidInput("--decisions and --remove, --relabel or --reweight say two things; give one of them.")
        decided = curate(data, decisions)
        return {"remove": list(decided.removed) or None, "relabel": dict(decided.relabelled) or None}
    if not (remove or relabel or reweight):
        raise InvalidInput("Nothing is changed; give --remove, --relabel, --reweight or --decisions.")
    labels = {
        i: label_from_text(label_of(data.item(data.index_of(i))), text, data.class_names)
        for i, text in parse_assignments(relabel, n, "--relabel").items()
    }
    weights = {i: _number(i, text) for i, text in parse_assignments(reweight, n, "--reweight").items()}
    removed = None if remove is None else parse_example_positions(remove, n, "--remove")
    return {"remove": removed, "relabel": labels or None, "reweight": weights or None}


def _number(place: int, text: str) -> float:
    try:
        return float(text)
    except ValueError as cause:
        raise InvalidInput(f"--reweight {place}={text} is no weight; give a number of at least 0.") from cause


def _edited(run: ActionRun, outcome: WhatIf, ids: list[int]) -> QueryLook | None:
    """The queries under the edited model; None where there are several checkpoints, and so no one model."""
    if len(outcome.corrected) > 1:
        return None
    edited: nn.Module = outcome.model()
    return QueryLook.of(run.task, ids, edited)


def _describe(run: ActionRun, outcome: WhatIf, now: QueryLook, edited: QueryLook | None) -> dict[str, Any]:
    source = run.task.query_source.subset(now.ids)
    change = outcome.change(source, run.task.measure).tolist()
    first = outcome.change(source, run.task.measure, order="first").tolist()
    rows = []
    for row, q in enumerate(now.ids):
        one: dict[str, Any] = {
            "query": q,
            "label": None if now.labels is None else run.label_name(now.labels[row]),
            "now": float(now.values[row]),
            "change": change[row],
            "first_order": first[row],
        }
        if now.answers is not None and edited is not None and edited.answers is not None:
            one["answer"] = run.label_name(int(now.answers[row]))
            one["edited_answer"] = run.label_name(int(edited.answers[row]))
        rows.append(one)
    mean = sum(change) / len(change)
    return {
        "status": "complete",
        "exit_code": 0,
        "command": "what-if",
        "edit": outcome.edit.description,
        "how": outcome.how,
        "method": outcome.attribution.method,
        "why": outcome.attribution.why,
        "n_train": run.n_train,
        "n_queries": len(rows),
        "measured": "loss" if run.task.measure is None else repr(run.task.measure),
        "mean_now": float(now.values.mean()),
        "mean_change": mean,
        "correction": outcome.correction,
        "queries": rows,
    }


def _print_result(output: Output, run: ActionRun, result: Mapping[str, Any], top: int, file: Path | None) -> None:
    rows = result["queries"]
    q = len(rows)
    most = sorted(rows, key=lambda one: -abs(one["change"]))[:top]
    other = [one for one in rows if one.get("answer") != one.get("edited_answer")]
    measured = "loss" if run.task.measure is None else "measure"
    facts = [
        (f"mean {measured}", f"{result['mean_now']:.4g}, predicted change {show.format_score(result['mean_change'])}"),
        *([("answers", _answers(other, q))] if "answer" in rows[0] else []),
    ]
    output.print_text(
        show.heading(f"What if? {result['edit']} of {result['n_train']:,}"),
        show.fact_table([("method", result["method"]), ("why", result["why"]), ("step", result["how"])]),
        "",
        show.heading(f"{q:,} {'query' if q == 1 else 'queries'}"),
        show.fact_table(facts),
        "",
        show.heading("Most changed" if q > len(most) else "Each of them"),
        show.indent(_table(most)),
        *([] if file is None else ["", show.heading("Written"), show.file_table([(file, "all queries, as --json")])]),
        "",
        Text("A prediction, to first order in the queries: ptif curate trains again."),
    )


def _answers(other: list[Mapping[str, Any]], q: int) -> str:
    if not other:
        return f"none of {q:,} would change"
    named = ", ".join(f"query {one['query']} ({one['answer']} → {one['edited_answer']})" for one in other[:3])
    more = f" and {len(other) - 3:,} more" if len(other) > 3 else ""
    return f"{len(other):,} of {q:,} would change: {show.printable(named, 200)}{more}"


def _table(rows: list[Mapping[str, Any]]) -> Any:
    labelled, answered = rows[0]["label"] is not None, "answer" in rows[0]
    columns = [("query", "right"), *([("label", "left")] if labelled else []), ("now", "right"), ("change", "right")]
    columns += [("first order", "right"), *([("answer", "left"), ("then", "left")] if answered else [])]
    table = show.borderless_table(columns)
    for one in rows:
        cells = [str(one["query"])]
        cells += [show.printable(one["label"], 14)] if labelled else []
        cells += [f"{one['now']:.3g}", show.format_score(one["change"]), show.format_score(one["first_order"])]
        if answered:
            same = one["answer"] == one["edited_answer"]
            cells += [show.printable(one["answer"], 12), "same" if same else show.printable(one["edited_answer"], 12)]
        table.add_row(*map(Text, cells))
    return table
