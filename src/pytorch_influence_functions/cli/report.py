"""`ptif report`: the report page for the scores of an earlier run."""

from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import Tensor

from ..core.distributed import World
from ..core.errors import InvalidInput
from ..objectives.likelihoods import TokenCrossEntropy
from ..problem.data import Source
from ..problem.problem import sweep
from ..scores.scores import Scores
from . import options, show
from .exit import Output, exit_with_code
from .fingerprints import QUERIES, TRAINING_DATA, fingerprint_data
from .folder import SCORES, fingerprint_of, read_record
from .predictions import as_predictions
from .progress_bars import report_progress
from .self_influence_table import find_self_influence
from .task import Task, load_task

PAGE = "report.html"


def report_command(
    out: Annotated[Path, typer.Argument(help="Folder of a finished ptif attribute.", metavar="RESULTS")],
    task: Annotated[
        Path | None, typer.Option("--task", help="The task file: its data give pictures and texts, its model answers.")
    ] = None,
    json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Write report.html into a folder of results: one page to open, sort and hand on.

    Without --task it shows numbers and labels only: the results do not hold the data, and a program named inside a
    folder of results is never run unasked.
    """
    output = Output(json, quiet)
    with exit_with_code(output) as interruption:
        interruption.kept = f"the scores in {str(out)!r} are as they were"
        with report_progress(output):
            scores, loaded = _load_finished(out), None
            if task is not None:
                loaded = load_task(task)
                scores = _with_data(scores, loaded, out)
            page = write_page(scores, out, loaded)
        output.print_text(show.heading("Written"), show.file_table([(page, "open it in a browser")]))
        output.print_json({"status": "complete", "exit_code": 0, "command": "report", "files": {"report": str(page)}})


def _load_finished(out: Path) -> Scores:
    record = read_record(out)
    if record.get("status") != "complete":
        raise InvalidInput(f"The run in {str(out)!r} is not finished; run its ptif attribute command again first.")
    return Scores.load(out / SCORES, fingerprint_of(record).identity)


def _with_data(scores: Scores, task: Task, out: Path) -> Scores:
    """The scores with the task's data, after a check that they were made from these."""
    queries = task.query_source
    ids = scores.query_ids
    last = int(ids.max())
    if last >= len(queries):
        raise InvalidInput(f"{task.path.name} has {len(queries):,} queries and the scores reach to query {last}.")
    data = fingerprint_data(task.problem.data, queries.subset(ids.tolist()))
    names = data.differences(fingerprint_of(read_record(out)), among=(TRAINING_DATA, QUERIES))
    if names:
        raise InvalidInput(
            f"The {names[0]} of {task.path.name} are not those of the run in {str(out)!r}; give the task it was made "
            "with, or run ptif attribute again."
        )
    return replace(scores, train_source=task.problem.data.whole, query_source=queries)


def write_page(scores: Scores, out: Path, task: Task | None, tokens: Any = None) -> Path:
    """Write `report.html` into `out`, with self-influence if it is there, and with predictions if there is a task.

    `tokens` is the fitted method by which the tokens of texts are coloured, or None.
    """
    self_influence = find_self_influence(out)
    predictions = train_predictions = None
    if task is not None and not isinstance(task.problem.objective, TokenCrossEntropy):
        predictions = predict(task, task.query_source, scores.query_ids.tolist())
        train_predictions = predict(task, task.problem.data.whole, list(range(scores.n_train)))
    scores.report(
        out / PAGE,
        self_influence=self_influence,
        predictions=predictions,
        train_predictions=train_predictions,
        tokens=tokens,
    )
    return out / PAGE


def predict(task: Task, source: Source, ids: list[int]) -> Tensor | None:
    """The model's predictions for examples: probabilities [n, C], or a number each [n]; None if neither fits."""
    problem, batches = task.problem, []
    for _, batch in sweep(problem, source, ids, label="the model's answers", world=World()):
        with torch.no_grad():
            outputs = problem.objective.outputs(problem.model, batch).double().cpu()
        batches.append(as_predictions(problem.objective, outputs))
    predictions: list[Any] = [part for part in batches if part is not None]
    return torch.cat(predictions) if len(predictions) == len(batches) else None
