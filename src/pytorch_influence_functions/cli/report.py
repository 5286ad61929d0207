"""`ptif report`: the page for scores that an earlier run left in a folder."""

from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import Tensor

from ..core.distributed import World
from ..core.errors import InvalidInput
from ..objectives.bernoulli import Bernoulli
from ..objectives.likelihoods import CrossEntropy, SquaredError
from ..problem.data import Source
from ..problem.problem import sweep
from ..scores.scores import Scores
from . import options, show
from .exit import Output, exit_with_code
from .fingerprints import QUERIES, TRAINING_DATA, fingerprint_data
from .folder import SCORES, fingerprint_of, read_record
from .progress_bars import report_progress
from .self_influence_table import kept_self_influence
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
            scores, loaded_task = _finished(out), None
            if task is not None:
                loaded_task = load_task(task)
                scores = _with_data(scores, loaded_task, out)
            page = write_page(scores, out, loaded_task)
        output.print_text(show.heading("Written"), show.file_table([(page, "open it in a browser")]))
        output.print_json({"status": "complete", "exit_code": 0, "command": "report", "files": {"report": str(page)}})


def _finished(out: Path) -> Scores:
    record = read_record(out)
    if record.get("status") != "complete":
        raise InvalidInput(f"The run in {str(out)!r} is not finished; run its ptif attribute command again first.")
    return Scores.load(out / SCORES, fingerprint_of(record).identity)


def _with_data(scores: Scores, task: Task, out: Path) -> Scores:
    """The scores with the data they were made from, which is checked."""
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
    return replace(scores, train_source=task.problem.data, query_source=queries)


def write_page(scores: Scores, out: Path, task: Task | None) -> Path:
    """`report.html` in `out`, with self-influence where that lies there and the model's answers where the task is."""
    own = kept_self_influence(out)
    said = None if task is None else predictions(task, scores.query_ids.tolist())
    scores.report(out / PAGE, self_influence=own, predictions=said)
    return out / PAGE


def predictions(task: Task, ids: list[int]) -> Tensor | None:
    """What the model says about the queries: probabilities [Q, C], or a number each [Q]; None where neither fits."""
    problem, answers = task.problem, []
    source: Source = task.query_source
    for _, batch in sweep(problem, source, ids, label="the model's answers", world=World()):
        with torch.no_grad():
            outputs = problem.objective.outputs(problem.model, batch).double().cpu()
        answers.append(_said(problem.objective, outputs))
    parts: list[Any] = [part for part in answers if part is not None]
    return torch.cat(parts) if len(parts) == len(answers) else None


def _said(objective: Any, outputs: Tensor) -> Tensor | None:
    if isinstance(objective, CrossEntropy) and outputs.ndim == 2:
        return outputs.softmax(1)
    if isinstance(objective, Bernoulli) and outputs.numel() == len(outputs):
        p = outputs.reshape(-1).sigmoid()
        return torch.stack([1 - p, p], 1)
    if isinstance(objective, SquaredError) and outputs.numel() == len(outputs):
        return outputs.reshape(-1)
    return None
