"""`ptif self-influence`: training examples by self-influence, the most suspicious labels first."""

import time
from contextlib import suppress
from typing import Annotated, Any

import torch
import typer
from torch import Tensor

from ..core.errors import InvalidInput
from ..influence.method import AbstractMethod
from . import options, self_influence_table, show
from .exit import Interruption, Output, exit_with_code
from .fingerprints import describe_settings, fingerprint_run
from .folder import RunFolder
from .machine import format_bytes, format_duration, free_memory
from .parsing import parse_method
from .progress_bars import report_progress
from .run import choose_method, versions
from .task import Task


def self_influence_command(
    task: options.TaskFile = None,
    method: options.Method = None,
    out: options.Out = None,
    top: Annotated[
        int | None, typer.Option("--top", help="Examples to show; the files hold all. (default: 20)")
    ] = None,
    run: options.Run = None,
    damping: options.Damping = None,
    weight_decay: options.WeightDecay = None,
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
    config: options.ConfigFile = None,
    overwrite: options.Overwrite = False,
    dry_run: options.DryRun = False,
    json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """How much the model leans on each label of its training data: large is suspicious.

    The predicted rise of an example's own loss when it is removed. Wrong labels stand out: nothing else supports them.
    """
    output = Output(json, quiet)
    flags = options.settings_among(locals())
    with exit_with_code(output) as interruption:
        settings = options.merge_settings(flags, config)
        named = None if settings.method is None else parse_method(settings.method, settings.run)
        if dry_run:
            _print_forecast(output, settings, named)
            return
        with report_progress(output):
            loaded = settings.load(asks=False)
            fitted_by = choose_method(named, loaded, settings)
            values, labels, record = _compute(loaded, fitted_by, settings, overwrite, interruption)
        _print_result(output, settings, values, labels, record)


def _print_forecast(output: Output, settings: options.RunSettings, named: AbstractMethod | None) -> None:
    with report_progress(output):
        task = settings.load(asks=False)
        n = len(task.problem)
        costs = choose_method(named, task, settings).forecast(task.problem, n)
    memory = free_memory()
    free = "" if memory is None else f" ({format_bytes(memory)} free)"
    pairs = [
        ("size", f"{n:,} training examples, each as a query about itself"),
        ("method", costs.method),
        ("why", costs.why),
        ("passes", f"{costs.passes:,.0f} over the training data"),
        ("memory", f"{format_bytes(costs.memory_bytes)} beside the model{free}"),
        ("time", f"about {format_duration(costs.seconds)}, by one small batch that was timed"),
    ]
    output.print_text(show.heading("Forecast; nothing was computed"), show.fact_table(pairs))
    output.print_json(
        {
            "status": "forecast",
            "exit_code": 0,
            "command": "self-influence",
            "n_train": n,
            "method": costs.method,
            "why": costs.why,
            "passes": costs.passes,
            "memory_bytes": costs.memory_bytes,
            "free_memory_bytes": memory,
            "seconds": costs.seconds,
        }
    )


def _compute(
    task: Task, method: AbstractMethod, settings: options.RunSettings, overwrite: bool, interruption: Interruption
) -> tuple[Tensor, list[str] | None, dict[str, Any]]:
    """Compute the self-influence, or read it from the folder if this very run was finished there."""
    out, problem = settings.out, task.problem
    record = {
        "command": "self-influence",
        "task": str(task.path),
        "settings": describe_settings(task, method, {}),
        "n_train": len(problem),
        "versions": versions(),
    }
    fingerprint = fingerprint_run(task, method, {}, None)
    with RunFolder.open(out, fingerprint, record, overwrite, self_influence_table.RECORD) as folder:
        labels = self_influence_table.label_names(problem)
        if folder.is_complete:
            with suppress(InvalidInput):  # damaged, or of another run: computed again
                return self_influence_table.read_numbers(out, folder.identity), labels, folder.record
        interruption.kept = "self-influence is computed in one go and nothing of it was kept"
        start = time.perf_counter()
        fitted = method.fit(problem, n_queries=len(problem))
        values = torch.as_tensor(fitted.self_influence()).double().cpu()
        self_influence_table.write_files(out, values, labels, fitted.method, folder.identity)
        seconds = time.perf_counter() - start
        folder.write(status="complete", seconds=seconds, method=fitted.method, why=fitted.why)
    return values, labels, folder.record


def _print_result(
    output: Output, settings: options.RunSettings, values: Tensor, labels: list[str] | None, record: dict[str, Any]
) -> None:
    out, top = settings.out, min(settings.top or 20, len(values))
    order = self_influence_table.most_suspicious_first(values)
    files = [
        (out / self_influence_table.TABLE, "all of them, most suspicious first"),
        (out / self_influence_table.NUMBERS, "in training order"),
        (out / self_influence_table.RECORD, "what they were made from"),
    ]
    output.print_text(
        show.heading(f"{len(values):,} training examples in {format_duration(record['seconds'])}"),
        show.fact_table([("method", record["method"]), ("why", record["why"])]),
        "",
        show.heading(f"Most suspicious {top:,}"),
        show.indent("by how much an example's own loss would rise without it"),
        show.ranking_table(values, order, labels, top),
        "",
        show.heading("Written"),
        show.file_table(files),
    )
    output.print_json(
        {
            "status": "complete",
            "exit_code": 0,
            "command": "self-influence",
            "out": str(out),
            "files": {"table": str(files[0][0]), "numbers": str(files[1][0]), "run": str(files[2][0])},
            "n_train": len(values),
            "method": record["method"],
            "why": record["why"],
            "seconds": record["seconds"],
            "worst": [
                {"index": i, "label": None if labels is None else labels[i], "self_influence": float(values[i])}
                for i in order[:top].tolist()
            ],
        }
    )
