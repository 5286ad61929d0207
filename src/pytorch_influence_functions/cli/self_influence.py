"""`ptif self-influence`: which labels the model had to learn by heart, the most suspicious first."""

import time
from typing import Annotated, Any

import torch
import typer
from torch import Tensor

from ..influence.method import AbstractMethod
from . import options, self_influence_table, show
from .folder import Folder
from .machine import duration, free_memory, size
from .marks import marks, words
from .outcome import State, Voice, ending
from .run import chosen, forecast, versions
from .spelled import method_of
from .task import Task, load
from .watch import watching


def self_influence(
    task: options.TaskFile = None,
    method: options.Method = None,
    out: options.Out = None,
    top: Annotated[
        int | None, typer.Option("--top", help="Examples to show; the files hold all. (default: 20)")
    ] = None,
    damping: options.Damping = None,
    weight_decay: options.WeightDecay = None,
    batch_size: options.BatchSize = None,
    device: options.Device = None,
    config: options.ConfigFile = None,
    overwrite: options.Overwrite = False,
    dry_run: options.DryRun = False,
    json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """How much the model leans on each label of its training data: large is suspicious.

    The predicted rise of an example's own loss when it is removed. Wrong labels stand out: nothing else supports them.
    """
    voice = Voice(json, quiet)
    flags = {
        "task": task,
        "method": method,
        "out": out,
        "top": top,
        "damping": damping,
        "weight_decay": weight_decay,
        "batch_size": batch_size,
        "device": device,
    }
    with ending(voice) as state:
        settings = options.settled(flags, config)
        named = None if settings.method is None else method_of(settings.method)
        if dry_run:
            _forecast(voice, settings, named)
            return
        with watching(voice):
            found = load(settings.task_file, settings.overrides)
            values, labels, made = _computed(found, chosen(named, found, settings), settings, overwrite, state)
        _say(voice, settings, values, labels, made)


def _forecast(voice: Voice, settings: options.Settings, named: AbstractMethod | None) -> None:
    with watching(voice):
        task = load(settings.task_file, settings.overrides)
        n = len(task.problem)
        costs = forecast(chosen(named, task, settings), task, n)
    memory = free_memory()
    pairs = [
        ("size", f"{n:,} training examples, each as a query about itself"),
        ("method", costs.method),
        ("why", costs.why),
        ("passes", f"{costs.passes:,.0f} over the training data"),
        ("memory", f"{size(costs.memory_bytes)} beside the model{'' if memory is None else f' ({size(memory)} free)'}"),
        ("time", f"about {duration(costs.seconds)}, by one small batch that was timed"),
    ]
    voice.say(show.heading("Forecast; nothing was computed"), show.facts(pairs))
    voice.whole(
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


def _computed(
    task: Task, method: AbstractMethod, settings: options.Settings, overwrite: bool, state: State
) -> tuple[Tensor, list[str] | None, dict[str, Any]]:
    """The numbers, from the folder where this very run had been finished there."""
    out, problem = settings.out, task.problem
    record = {
        "command": "self-influence",
        "task": str(task.path),
        "marks": marks(task, method, {}, None),
        "settings": words(task, method, {}),
        "n_train": len(problem),
        "versions": versions(),
    }
    folder = Folder.opened(out, record, overwrite, self_influence_table.RECORD)
    labels = self_influence_table.label_words(problem)
    if folder.complete and (out / self_influence_table.NUMBERS).exists():
        return self_influence_table.read(out), labels, folder.record
    state.kept = "self-influence is computed in one go and nothing of it was kept"
    start = time.perf_counter()
    fitted = method.fit(problem, n_queries=len(problem))
    values = torch.as_tensor(fitted.self_influence()).double().cpu()
    self_influence_table.save(out, values, labels, fitted.method)
    seconds = time.perf_counter() - start
    folder.write(status="complete", seconds=seconds, method=fitted.method, why=fitted.why)
    return values, labels, folder.record


def _say(
    voice: Voice, settings: options.Settings, values: Tensor, labels: list[str] | None, made: dict[str, Any]
) -> None:
    out, top = settings.out, min(settings.top or 20, len(values))
    order = self_influence_table.worst(values)
    files = [
        (out / self_influence_table.TABLE, "all of them, most suspicious first"),
        (out / self_influence_table.NUMBERS, "in training order"),
        (out / self_influence_table.RECORD, "what they were made from"),
    ]
    voice.say(
        show.heading(f"{len(values):,} training examples in {duration(made['seconds'])}"),
        show.facts([("method", made["method"]), ("why", made["why"])]),
        "",
        show.heading(f"Most suspicious {top:,}"),
        show.indented("by how much an example's own loss would rise without it"),
        show.worst_first(values, order, labels, top),
        "",
        show.heading("Written"),
        show.written(files),
    )
    voice.whole(
        {
            "status": "complete",
            "exit_code": 0,
            "command": "self-influence",
            "out": str(out),
            "files": {"table": str(files[0][0]), "numbers": str(files[1][0]), "run": str(files[2][0])},
            "n_train": len(values),
            "method": made["method"],
            "why": made["why"],
            "seconds": made["seconds"],
            "worst": [
                {"index": i, "label": None if labels is None else labels[i], "self_influence": float(values[i])}
                for i in order[:top].tolist()
            ],
        }
    )
