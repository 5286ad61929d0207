"""`ptif attribute`: scores of queries, computed and kept block by block."""

from typing import Annotated, Any

import typer

from ..scores.scores import Scores
from . import options, show
from .by_part import by_part, file_of, read_by
from .exit import Output, exit_with_code
from .folder import RUN
from .machine import format_bytes, format_duration, free_disk, free_memory
from .progress_bars import Speed, report_progress
from .report import write_page
from .run import AttributionRun, FinishedRun, describe_run


def attribute_command(
    task: options.TaskFile = None,
    method: options.Method = None,
    queries: Annotated[
        str | None, typer.Option("--queries", help="Positions: 0:20, 5, or 1,4,10:20. (default: all)")
    ] = None,
    out: options.Out = None,
    top: Annotated[
        int | None, typer.Option("--top", help="Keep only the K most helpful and K most harmful of each query.")
    ] = None,
    by: options.By = None,
    report: Annotated[bool | None, typer.Option("--report/--no-report", help="Write report.html too.")] = None,
    run: options.Run = None,
    damping: options.Damping = None,
    weight_decay: options.WeightDecay = None,
    batch_size: options.BatchSize = None,
    block: Annotated[
        int | None, typer.Option("--block", help="Queries per kept block. (default: 8, 16, … 256)")
    ] = None,
    device: options.Device = None,
    hf: options.LanguageModel = None,
    dataset: options.Texts = None,
    query: options.Query = None,
    answer: options.Answer = None,
    messages_column: options.MessagesColumn = None,
    text_column: options.TextColumn = None,
    prompt_column: options.PromptColumn = None,
    completion_column: options.CompletionColumn = None,
    label_column: options.LabelColumn = None,
    source_column: options.SourceColumn = None,
    max_length: options.MaxLength = None,
    normalisation: options.Normalisation = None,
    config: options.ConfigFile = None,
    overwrite: options.Overwrite = False,
    dry_run: options.DryRun = False,
    json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Which training examples helped and harmed each query, and by how much.

    A task file says which model and data; for a language model --hf, --dataset and --query do.

    Finished blocks of queries are kept in --out: after Ctrl-C the same command goes on from there.
    """
    output = Output(json, quiet)
    flags = options.settings_among(locals()) | {"query": query or None, "answer": answer or None, "by": by or None}
    with exit_with_code(output) as interruption:
        settings = options.merge_settings(flags, config)
        if dry_run:
            _print_forecast(output, settings)
            return
        speed = Speed()
        with report_progress(output, speed) as report_queries:
            started = AttributionRun.of(settings)
            speed.tokens = started.tokens
            finished = started.score(overwrite, interruption, report_queries)
            result = describe_run(started, finished)
            if settings.report and isinstance(finished.scores, Scores):  # of parts there is none
                page = write_page(finished.scores, settings.out, started.task, started.fitted(finished))
                result["files"]["report"] = str(page)
        _print_result(output, started, finished, result)
        output.print_json(result)


def _print_forecast(output: Output, settings: options.RunSettings) -> None:
    """Print the cost of the run, as text and as one object."""
    with report_progress(output):
        run = AttributionRun.of(settings)
        costs, colours = run.forecast(), run.forecast_colours()
    n, q, blocks = len(run.task.problem), len(run.ids), run.block_ranges
    memory, disk = free_memory(), free_disk(settings.out)
    result = {
        "status": "forecast",
        "exit_code": 0,
        "command": "attribute",
        "n_train": n,
        "n_queries": q,
        "method": costs.method,
        "why": costs.why,
        "passes": costs.passes,
        "memory_bytes": costs.memory_bytes,
        "free_memory_bytes": memory,
        "seconds": costs.seconds,
        "page_seconds": colours,
        "blocks": len(blocks),
        "result_bytes": run.result_bytes,
        "free_disk_bytes": disk,
    }
    free = "" if memory is None else f" ({format_bytes(memory)} free)"
    largest = max(last - first for first, last in blocks)
    page = [] if colours is None else [("page", f"about {format_duration(colours)} more, to colour tokens one by one")]
    output.print_text(
        show.heading("Forecast; nothing was computed"),
        show.fact_table(
            [
                ("size", f"{show.count_queries(q)} × {n:,} training examples"),
                ("method", costs.method),
                ("why", costs.why),
                ("passes", f"{costs.passes:,.0f} over the training data, and one more per further block"),
                ("blocks", f"{len(blocks):,}, of at most {show.count_queries(largest)}, each kept when it is finished"),
                ("memory", f"{format_bytes(costs.memory_bytes)} beside the model{free}"),
                ("time", f"about {format_duration(costs.seconds)}, by one small batch that was timed"),
                *page,
                ("result", f"{format_bytes(run.result_bytes)} ({format_bytes(disk)} free on the disk)"),
            ]
        ),
    )
    output.print_json(result)


def _print_result(output: Output, run: AttributionRun, finished: FinishedRun, result: dict[str, Any]) -> None:
    parts, out = by_part(finished.scores), run.settings.out
    scores, d = next(iter(parts.values())), finished.scores.diagnostics
    q = len(scores)
    title = f"{show.count_queries(q)} × {scores.n_train:,} training examples in {format_duration(d.seconds)}"
    if finished.resumed:
        title += f"; {'all' if finished.resumed == q else f'{finished.resumed:,}'} were kept from before"
    meaning = "by how much its loss would rise (+) or fall (−) without the example"
    if run.task.measure is not None:
        meaning = "by how much the measure would change without the example"
    files = [(out / file_of(finished.scores), read_by(finished.scores)), (out / RUN, "what it was made from")]
    if "report" in result["files"]:
        files.append((out / "report.html", "open it in a browser"))
    output.print_text(
        show.heading(title),
        show.fact_table([("method", d.method), ("why", d.why)]),
        "",
        show.heading("Most helpful and most harmful"),
        show.indent(meaning),
        *show.influence_tables(parts, run.task.names),
        "",
        show.heading("How far to trust it"),
        show.checklist(d),
        "",
        show.heading("Written"),
        show.file_table(files),
    )
