"""`ptif flip` and `ptif smallest-removal`: the few training examples on which a prediction or a conclusion hangs."""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.text import Text

from ..actions.smallest_removal import SmallestRemoval, flip_prediction, smallest_removal
from . import options, show
from .action_run import ActionRun, QueryLook, require_queries, write_result
from .exit import Output, exit_with_code
from .folder import check_folder
from .parsing import parse_amount
from .progress_bars import QUERIES, report_progress

FLIPS, REMOVAL = "flip.json", "smallest_removal.json"
_LISTED = 6
# From this share of the predicted difference on, what training again does by itself is told.
_DRIFT = 0.25
Most = Annotated[str, typer.Option("--most", help="The largest set to try: 20 examples, or a share such as 0.1.")]
Confirm = Annotated[
    bool, typer.Option("--confirm", help="Train again without the set and with all, by the task's recipe.")
]


def flip_command(
    task: options.TaskFile = None,
    queries: Annotated[
        str | None, typer.Option("--queries", help="Which predictions: 5, 0:20, or 1,4,10:20; all takes long.")
    ] = None,
    most: Most = "0.5",
    confirm: Confirm = False,
    out: options.ResultFolder = None,
    method: options.Method = None,
    damping: options.Damping = None,
    weight_decay: options.WeightDecay = None,
    batch_size: options.BatchSize = None,
    device: options.Device = None,
    config: options.ConfigFile = None,
    json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """The fewest training examples without which the model would answer otherwise.

    Found by one Newton step after another; --confirm trains again without them.
    """
    output = Output(json, quiet)
    flags = options.settings_among(locals())
    with exit_with_code(output):
        settings = options.merge_settings(flags, config)
        if out is not None:
            check_folder(out)
        largest = parse_amount(most, "--most")
        require_queries(queries, settings, ", each of which is a search")
        with report_progress(output) as report_queries:
            run = ActionRun.of(settings)
            recipe = _recipe(run) if confirm else None
            look = QueryLook.of(run.task, run.query_ids())
            sets = []
            for done, q in enumerate(look.ids):
                report_queries(QUERIES, done, len(look.ids))
                query = run.task.query_source.subset([q])
                sets.append(flip_prediction(run.task.problem, query, largest, run.method, recipe))
            report_queries(QUERIES, len(look.ids), len(look.ids))
        flips = [_flip(run, look, row, removal) for row, removal in enumerate(sets)]
        result = {"status": "complete", "exit_code": 0, "command": "flip", "n_train": run.n_train, "queries": flips}
        file = None if out is None else write_result(out, FLIPS, result)
        _print_flips(output, run, flips, file)
        output.print_json(result)


def smallest_removal_command(
    task: options.TaskFile = None,
    threshold: Annotated[float, typer.Option("--threshold", help="What the statistic has to pass.")] = 0.0,
    most: Most = "0.5",
    confirm: Confirm = False,
    out: options.ResultFolder = None,
    method: options.Method = None,
    damping: options.Damping = None,
    weight_decay: options.WeightDecay = None,
    batch_size: options.BatchSize = None,
    device: options.Device = None,
    config: options.ConfigFile = None,
    json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """The fewest training examples whose removal carries a statistic past a threshold.

    The statistic is an entry of get_options(): a function of the model, such as lambda m: m.weight[0, 0].
    """
    output = Output(json, quiet)
    flags = options.settings_among(locals())
    with exit_with_code(output):
        settings = options.merge_settings(flags, config)
        if out is not None:
            check_folder(out)
        largest = parse_amount(most, "--most")
        with report_progress(output):
            run = ActionRun.of(settings)
            recipe = _recipe(run) if confirm else None
            statistic = run.required("statistic", "lambda model: model.weight[0, 0]")
            removal = smallest_removal(run.task.problem, statistic, threshold, largest, run.method, recipe)
        result = {"status": "complete", "exit_code": 0, "command": "smallest-removal"} | _describe(run, removal)
        file = None if out is None else write_result(out, REMOVAL, result)
        _print_removal(output, run, removal, file)
        output.print_json(result)


def _recipe(run: ActionRun) -> Any:
    return run.required("recipe", "ptif.evaluation.Recipe(make_model, epochs=20)")


def _describe(run: ActionRun, removal: SmallestRemoval) -> dict[str, Any]:
    return {
        "found": removal.found,
        "ids": list(removal.ids),
        "share": len(removal.ids) / run.n_train,
        "before": removal.before,
        "predicted": removal.predicted,
        "threshold": removal.threshold,
        "measured": removal.measured,
        "retrained": removal.retrained,
        "confirmed": removal.confirmed,
    }


def _flip(run: ActionRun, look: QueryLook, row: int, removal: SmallestRemoval) -> dict[str, Any]:
    return {
        "query": look.ids[row],
        "label": None if look.labels is None else run.label_name(look.labels[row]),
        "answer": None if look.answers is None else run.label_name(int(look.answers[row])),
    } | _describe(run, removal)


def _print_flips(output: Output, run: ActionRun, rows: Sequence[dict[str, Any]], file: Path | None) -> None:
    flipped, confirmed = sum(one["found"] for one in rows), [one["confirmed"] for one in rows]
    tried = [one for one in confirmed if one is not None]
    title = f"{flipped:,} of {len(rows):,} predictions flip"
    if tried:
        title += f"; training again confirms {sum(tried):,} of {len(tried):,}"
    columns = [("query", "right"), ("label", "left"), ("answer", "left"), ("without", "right"), ("lead", "left")]
    table = show.borderless_table([*columns, ("training examples", "left")])
    for one in rows:
        count = f"{len(one['ids']):,}" if one["found"] else "none found"
        cells = [str(one["query"]), show.printable(one["label"] or "", 12), show.printable(one["answer"] or "", 12)]
        cells += [count, _moved(one), _listed(one["ids"], 3 if tried else _LISTED) if one["found"] else ""]
        table.add_row(*map(Text, cells))
    output.print_text(
        show.heading(title),
        show.indent("lead: how far the answer's score lies above the next, now → without them"),
        *([show.indent("and after training again, where that was tried")] if tried else []),
        show.indent(table),
        *_end(file, flipped > 0 and not tried),
    )


def _moved(one: dict[str, Any]) -> str:
    text = f"{one['before']:.3g} → {one['predicted']:.3g}"
    return text if one["measured"] is None else f"{text} ({one['measured']:.3g})"


def _listed(ids: Sequence[int], most: int) -> str:
    more = f" +{len(ids) - most:,}" if len(ids) > most else ""
    return " ".join(f"#{i}" for i in ids[:most]) + more


def _print_removal(output: Output, run: ActionRun, removal: SmallestRemoval, file: Path | None) -> None:
    k, share = len(removal.ids), 100 * len(removal.ids) / run.n_train
    without = f"without {k:,} of {run.n_train:,} training examples ({share:.2g} %)"
    title = f"Predicted to pass {removal.threshold:.4g} {without}"
    if not removal.found:
        title = f"None found: {without} it is not past {removal.threshold:.4g}"
    facts = [("statistic", f"{removal.before:.4g} now, {removal.predicted:.4g} predicted without them")]
    facts += _trained_again(removal)
    facts.append(("examples", " ".join(f"#{i}" for i in removal.ids[:40]) + (" …" if k > 40 else "")))
    output.print_text(
        show.heading(title), show.fact_table(facts), *_end(file, removal.found and removal.measured is None)
    )


def _trained_again(removal: SmallestRemoval) -> list[tuple[str, str]]:
    """What training again says of the set, beside training again with all of the data."""
    if removal.measured is None or removal.retrained is None:
        return []
    predicted, drift = removal.predicted - removal.before, removal.retrained - removal.before
    facts = [
        (
            "trained again",
            f"{removal.measured:.4g} without them, {removal.retrained:.4g} with all: "
            f"{'confirmed' if removal.confirmed else 'not confirmed'}",
        ),
        (
            "difference",
            f"{show.format_score(predicted)} predicted, "
            f"{show.format_score(removal.measured - removal.retrained)} measured",
        ),
    ]
    if abs(drift) > _DRIFT * abs(predicted):
        told = (
            f"training again with all of the data moves the statistic by {show.format_score(drift)} already: the "
            "recipe does not lead back to this model, so compare the differences"
        )
        facts.append(("recipe", told))
    return facts


def _end(file: Path | None, untried: bool) -> list[Any]:
    written = [] if file is None else ["", show.heading("Written"), show.file_table([(file, "as --json")])]
    return [*written, "", Text("Predicted, not trained: --confirm trains again without them.")] if untried else written
