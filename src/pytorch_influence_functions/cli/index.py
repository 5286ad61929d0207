"""`ptif index`: build an index of gradients, ask it, look at it, and free what was removed."""

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from ..core.errors import InvalidInput
from ..scores.parts import PartScores
from ..scores.scores import Scores
from ..store.compaction import compact, remove
from ..store.describe import IndexForecast
from ..store.filters import choose_examples
from ..store.folder import IndexFolder
from ..store.gradient_index import Index
from ..store.graph import build_graph
from ..store.manifest import GraphRecord
from ..store.representation import parse_representation
from . import options, show
from .by_part import by_part, file_of, influences_of, read_by, with_data, with_query_ids
from .exit import Output, exit_with_code
from .machine import format_bytes, format_duration, free_disk
from .parsing import (
    override_damping,
    parse_by,
    parse_damping,
    parse_example_positions,
    parse_method,
    parse_query_positions,
    parse_where,
)
from .progress_bars import report_progress

Folder = Annotated[Path, typer.Argument(help="Folder of the index.", metavar="FOLDER")]
TaskAndFolder = Annotated[
    list[Path],
    typer.Argument(
        help="The task file, as for ptif attribute, and the folder of the index; with --hf the folder alone.",
        metavar="[TASK] FOLDER",
    ),
]


def build_command(
    paths: TaskAndFolder,
    method: options.Method = None,
    damping: options.Damping = None,
    keep: Annotated[str, typer.Option("--keep", help="auto, factors, two-sided:K or sketch:K.")] = "auto",
    dtype: Annotated[
        str | None, typer.Option("--dtype", help="float32, float16, bfloat16, int8 or 1bit. (default: by --keep)")
    ] = None,
    budget: Annotated[str, typer.Option("--budget", help="What the index may take on the disk.")] = "20GB",
    shard: Annotated[str, typer.Option("--shard", help="The size of one file.")] = "128MB",
    batch_size: options.BatchSize = None,
    device: options.Device = None,
    hf: options.LanguageModel = None,
    dataset: options.Texts = None,
    messages_column: options.MessagesColumn = None,
    text_column: options.TextColumn = None,
    prompt_column: options.PromptColumn = None,
    completion_column: options.CompletionColumn = None,
    label_column: options.LabelColumn = None,
    source_column: options.SourceColumn = None,
    max_length: options.MaxLength = None,
    normalisation: options.Normalisation = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace another index in the folder.")] = False,
    dry_run: options.DryRun = False,
    json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Store the gradient of every training example. After Ctrl-C the same command goes on."""
    output = Output(json, quiet)
    flags = options.settings_among(locals())
    with exit_with_code(output) as interruption:
        task, folder = _split_paths(paths, hf)
        settings = options.merge_settings(flags | {"task": task})
        representation = parse_representation(keep)
        named = None if method is None else parse_method(method)
        with report_progress(output):
            loaded = settings.load(asks=False)
            chosen = override_damping(named or loaded.method or parse_method("ekfac"), damping)
            form: dict[str, Any] = {"representation": representation, "dtype": dtype, "budget": budget}
            forecast = Index.forecast(loaded.problem, chosen, **form)
            if not dry_run:
                interruption.kept = f"whole files of {str(folder)!r} are kept"
                index = Index.build(
                    loaded.problem, folder, chosen, shard=shard, overwrite=overwrite, columns=loaded.columns, **form
                )
        if dry_run:
            _print_forecast(output, forecast, folder)
            return
        _print_info(output, index.folder, "built")


def query_command(
    folder: Folder,
    task: options.TaskFile = None,
    queries: Annotated[str, typer.Option("--queries", help="Positions: 0:20, 5, or 1,4,10:20.")] = "all",
    top: Annotated[int, typer.Option("--top", help="Keep the K most helpful and K most harmful of each query.")] = 10,
    ef: Annotated[
        int | None,
        typer.Option("--ef", help="Look at so many candidates for each end, by the graph. (default: at all rows)"),
    ] = None,
    rerank: Annotated[
        int | None, typer.Option("--rerank", help="Compute exact scores for so many candidates from each end.")
    ] = None,
    normalised: Annotated[
        bool, typer.Option("--normalised", help="Divide by each example's own size (RelatIF).")
    ] = False,
    by: options.By = None,
    where: Annotated[
        list[str] | None,
        typer.Option("--where", help="Only examples with COLUMN=VALUE, such as label=3; repeatable."),
    ] = None,
    damping: options.Damping = None,
    out: Annotated[Path | None, typer.Option("--out", help="Folder for the scores. (default: none is written)")] = None,
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
    json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Which training examples helped and harmed each query, by the stored gradients."""
    output = Output(json, quiet)
    flags = options.settings_among(locals()) | {"query": query or None, "answer": answer or None, "by": by or None}
    with exit_with_code(output):
        settings = options.merge_settings(flags)
        rule = None if damping is None else parse_damping(damping)
        parts: Any = parse_by(by or ())
        parse_where(where or ())  # before anything is read
        with report_progress(output):
            loaded = settings.load()
            positions = parse_query_positions(queries, len(loaded.query_source))
            index = Index.open(folder, loaded.problem)
            texts = {name for name, values in index.columns.items() if values.dtype == object}
            scores = index.score(
                loaded.query_source.subset(positions),
                loaded.measure,
                top,
                where=parse_where(where or (), texts),
                normalised=normalised,
                damping=rule,
                ef=ef,
                rerank=rerank,
                by=parts,
            )
            named = with_data(with_query_ids(scores, positions), index.asker.train, loaded.query_source)
            mask = choose_examples(index.folder, None, parse_where(where or (), texts), lambda: index.labels)
        if out is not None:
            named.save(out / file_of(named))
        _print_scores(output, named, None if index.asker.train is None else loaded.names, out, int(mask.sum()))


def graph_command(
    folder: Folder,
    links: Annotated[int, typer.Option("--links", help="Neighbours that each row is linked with.")] = 16,
    ef: Annotated[int, typer.Option("--ef", help="Candidates that are looked at for these links.")] = 64,
    json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Make a graph of nearest neighbours, which ptif index query --ef asks instead of reading every row."""
    output = Output(json, quiet)
    with exit_with_code(output):
        with report_progress(output):
            opened = build_graph(IndexFolder.open(folder), links, ef)
        _print_info(output, opened, "linked")


def info_command(
    folder: Folder,
    check: Annotated[bool, typer.Option("--check", help="Read every file and compare its digest.")] = False,
    json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """What an index holds, and whether its files are whole."""
    output = Output(json, quiet)
    with exit_with_code(output):
        opened = IndexFolder.open(folder)
        if check:
            opened.check_all()
        _print_info(output, opened, "checked" if check else "read")


def remove_command(
    folder: Folder,
    ids: Annotated[str, typer.Argument(help="Positions of the examples: 0:20, 5, or 1,4,10:20.", metavar="IDS")],
    json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Let examples count no longer. Their bytes are freed by ptif index compact."""
    output = Output(json, quiet)
    with exit_with_code(output):
        opened = IndexFolder.open(folder)
        left = remove(opened, parse_example_positions(ids, opened.manifest.examples, "IDS"))
        _print_info(output, left, "changed")


def compact_command(folder: Folder, json: options.Json = False, quiet: options.Quiet = False) -> None:
    """Write files anew without the rows of removed examples."""
    output = Output(json, quiet)
    with exit_with_code(output):
        _print_info(output, compact(IndexFolder.open(folder)), "compacted")


def _split_paths(paths: list[Path], hf: str | None) -> tuple[Path | None, Path]:
    """The task file, where there is one, and the folder of the index.

    Raises:
        InvalidInput: there are more or fewer paths than that.
    """
    if hf is None and len(paths) == 2:
        return paths[0], paths[1]
    if hf is not None and len(paths) == 1:
        return None, paths[0]
    named = " ".join(map(str, paths))
    raise InvalidInput(
        f"{named} names {len(paths)} paths; write ptif index build TASK FOLDER, or for a language model ptif index "
        "build FOLDER --hf MODEL --dataset texts.jsonl."
    )


def _print_forecast(output: Output, forecast: IndexForecast, folder: Path) -> None:
    free = free_disk(folder)
    seconds = "unknown" if forecast.seconds is None else f"about {format_duration(forecast.seconds)}"
    total = 0 if forecast.bytes is None else forecast.bytes
    output.print_text(
        show.heading("Forecast; nothing was computed"),
        show.fact_table(
            [
                ("keeps", f"{forecast.representation} in {forecast.dtype}"),
                ("why", forecast.why),
                ("size", f"{format_bytes(total)} ({format_bytes(free)} free on the disk)"),
                ("passes", f"{forecast.passes:,.1f} over the training data"),
                *([("true", forecast.fidelity)] if forecast.fidelity else []),
                ("time", f"{seconds}, by one small batch that was timed"),
            ]
        ),
    )
    output.print_json(
        {
            "status": "forecast",
            "exit_code": 0,
            "command": "index build",
            "representation": forecast.representation,
            "dtype": forecast.dtype,
            "why": forecast.why,
            "n_train": forecast.examples,
            "bytes_each": forecast.bytes_each,
            "bytes": forecast.bytes,
            "free_disk_bytes": free,
            "passes": forecast.passes,
            "seconds": forecast.seconds,
        }
    )


def _print_info(output: Output, opened: IndexFolder, what: str) -> None:
    manifest = opened.manifest
    facts, removed = manifest.facts, sum(stop - first for first, stop in manifest.removed)
    state = "complete" if manifest.complete else "not built to its end: run ptif index build again"
    output.print_text(
        show.heading(f"{manifest.examples:,} examples in {str(opened.path)!r}, {what}"),
        show.fact_table(
            [
                ("state", state),
                ("keeps", f"{facts['described']} in {facts['dtype']}"),
                ("why", facts["why"]),
                *([("true", facts["fidelity"])] if facts.get("fidelity") else []),
                ("method", facts["method"]),
                ("model", f"{facts['model']}, {facts['loss']}"),
                ("size", f"{format_bytes(manifest.bytes)} in {len(manifest.shards) + 1:,} files"),
                ("removed", f"{removed:,} examples"),
                *([("graph", _describe_graph(manifest.graph))] if manifest.graph else []),
            ]
        ),
    )
    output.print_json(
        {
            "status": "complete" if manifest.complete else "partial",
            "exit_code": 0,
            "folder": str(opened.path),
            "n_train": manifest.examples,
            "removed": removed,
            "representation": facts["described"],
            "dtype": facts["dtype"],
            "method": facts["method"],
            "bytes": manifest.bytes,
            "files": len(manifest.shards) + 1,
            "graph": manifest.graph is not None,
        }
    )


def _describe_graph(graph: GraphRecord) -> str:
    return f"of the first {graph.stop:,} examples, without the {graph.left:,} smallest rows"


def _count(chosen: int, stored: int) -> str:
    return f"{stored:,}" if chosen == stored else f"{chosen:,} of {stored:,}"


def _print_scores(
    output: Output, scores: Scores | PartScores, names: Callable[[int], str] | None, out: Path | None, chosen: int
) -> None:
    """Print what was found.

    Args:
        output: of the command.
        scores: of the queries.
        names: what to call the examples.
        out: where they were written.
        chosen: how many examples were looked at.
    """
    d, parts = scores.diagnostics, by_part(scores)
    first = next(iter(parts.values()))
    written = (
        []
        if out is None
        else ["", show.heading("Written"), show.file_table([(out / file_of(scores), read_by(scores))])]
    )
    output.print_text(
        show.heading(
            f"{show.count_queries(len(first))} × {_count(chosen, first.n_train)} stored examples in "
            f"{format_duration(d.seconds)}"
        ),
        show.fact_table([("method", d.method)]),
        "",
        show.heading("Most helpful and most harmful"),
        *show.influence_tables(parts, names),
        "",
        show.heading("How far to trust it"),
        show.checklist(d),
        *written,
    )
    output.print_json(
        {
            "status": "complete",
            "exit_code": 0,
            "command": "index query",
            "n_queries": len(first),
            "n_train": first.n_train,
            "method": d.method,
            "seconds": d.seconds,
            "notes": list(d.notes),
            **influences_of(scores, labels=False),
        }
    )
