"""`ptif attribute`: scores of queries, block by block, kept as they are finished."""

from typing import Annotated, Any

import typer

from . import options, show
from .folder import RUN, SCORES
from .machine import duration, free_disk, free_memory, size
from .outcome import Voice, ending
from .report import write_page
from .run import Asked, Done, told
from .watch import watching


def attribute(
    task: options.TaskFile = None,
    method: options.Method = None,
    queries: Annotated[
        str | None, typer.Option("--queries", help="Positions: 0:20, 5, or 1,4,10:20. (default: all)")
    ] = None,
    out: options.Out = None,
    top: Annotated[
        int | None, typer.Option("--top", help="Keep only the K most helpful and K most harmful of each query.")
    ] = None,
    report: Annotated[bool | None, typer.Option("--report/--no-report", help="Write report.html too.")] = None,
    damping: options.Damping = None,
    weight_decay: options.WeightDecay = None,
    batch_size: options.BatchSize = None,
    block: Annotated[
        int | None, typer.Option("--block", help="Queries per kept block. (default: 8, 16, … 256)")
    ] = None,
    device: options.Device = None,
    config: options.ConfigFile = None,
    overwrite: options.Overwrite = False,
    dry_run: options.DryRun = False,
    json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Which training examples helped and harmed each query, and by how much.

    Finished blocks of queries are kept in --out: after Ctrl-C the same command goes on from there.
    """
    voice = Voice(json, quiet)
    flags = {
        "task": task,
        "method": method,
        "queries": queries,
        "out": out,
        "top": top,
        "report": report,
        "damping": damping,
        "weight_decay": weight_decay,
        "batch_size": batch_size,
        "block": block,
        "device": device,
    }
    with ending(voice) as state:
        settings = options.settled(flags, config)
        if dry_run:
            _forecast(voice, settings)
            return
        with watching(voice) as tell:
            asked = Asked.of(settings)
            done = asked.run(overwrite, state, tell)
            found = told(asked, done)
            if settings.report:
                page = write_page(done.scores, settings.out, asked.task)
                found["files"]["report"] = str(page)
        _say(voice, asked, done, found)
        voice.whole(found)


def _forecast(voice: Voice, settings: options.Settings) -> None:
    """What it would cost, in words and as one object."""
    with watching(voice):
        asked = Asked.of(settings)
        costs = asked.forecast()
    n, q, plan = len(asked.task.problem), len(asked.ids), asked.plan
    memory, disk = free_memory(), free_disk(settings.out)
    found = {
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
        "blocks": len(plan),
        "result_bytes": asked.result_bytes,
        "free_disk_bytes": disk,
    }
    had = "" if memory is None else f" ({size(memory)} free)"
    largest = max(last - first for first, last in plan)
    voice.say(
        show.heading("Forecast; nothing was computed"),
        show.facts(
            [
                ("size", f"{q:,} queries × {n:,} training examples"),
                ("method", costs.method),
                ("why", costs.why),
                ("passes", f"{costs.passes:,.0f} over the training data, and one more per further block"),
                ("blocks", f"{len(plan):,}, of at most {largest:,} queries, each kept when it is finished"),
                ("memory", f"{size(costs.memory_bytes)} beside the model{had}"),
                ("time", f"about {duration(costs.seconds)}, by one small batch that was timed"),
                ("result", f"{size(asked.result_bytes)} ({size(disk)} free on the disk)"),
            ]
        ),
    )
    voice.whole(found)


def _say(voice: Voice, asked: Asked, done: Done, found: dict[str, Any]) -> None:
    scores, out = done.scores, asked.settings.out
    d = scores.diagnostics
    q = len(scores)
    head = f"{q:,} {'query' if q == 1 else 'queries'} × {scores.n_train:,} training examples in {duration(d.seconds)}"
    if done.resumed:
        head += f"; {'all' if done.resumed == q else f'{done.resumed:,}'} were kept from before"
    meaning = "by how much its loss would rise (+) or fall (−) without the example"
    if asked.task.measure is not None:
        meaning = "by how much the measure would change without the example"
    files = [(out / SCORES, "ptif.Scores.load reads it"), (out / RUN, "what it was made from")]
    if "report" in found["files"]:
        files.append((out / "report.html", "open it in a browser"))
    voice.say(
        show.heading(head),
        show.facts([("method", d.method), ("why", d.why)]),
        "",
        show.heading("Most helpful and most harmful"),
        show.indented(meaning),
        *show.influences(scores),
        "",
        show.heading("How far to trust it"),
        show.checklist(d),
        "",
        show.heading("Written"),
        show.written(files),
    )
