"""`ptif report`: the report page for the scores of an earlier run."""

from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.text import Text
from torch import Tensor

from ..core.distributed import World
from ..core.errors import InvalidInput
from ..core.fingerprint import Fingerprint
from ..objectives.tokens import TokenCrossEntropy
from ..problem.data import Source
from ..problem.ingredients import OUTPUTS, WEIGHTS, describe_model
from ..problem.problem import sweep
from ..scores.scores import Scores
from . import options, show
from .by_part import PARTS, SCORES
from .exit import Output, exit_with_code
from .fingerprints import QUERIES, TRAINING_DATA, fingerprint_data
from .folder import fingerprint_of, read_record
from .predictions import as_predictions
from .progress_bars import report_progress
from .run import AttributionRun, FinishedRun
from .self_influence_table import find_self_influence
from .task import Task, load_task

PAGE = "report.html"


def report_command(
    out: Annotated[Path, typer.Argument(help="Folder of a finished ptif attribute.", metavar="RESULTS")],
    task: Annotated[
        Path | None, typer.Option("--task", help="The task file: its data give pictures and texts, its model answers.")
    ] = None,
    hf: options.LanguageModel = None,
    dataset: options.Texts = None,
    query: options.Query = None,
    answer: options.Answer = None,
    method: options.Method = None,
    damping: options.Damping = None,
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
    """Write report.html into a folder of results: one page to open, sort and hand on.

    Without --task, or the --hf, --dataset and --query of the run, it shows numbers and labels only: the results do not
    hold the data, and a program named inside a folder of results is never run unasked.
    """
    output = Output(json, quiet)
    flags = {
        "task": task,
        "method": method,
        "damping": damping,
        "hf": hf,
        "dataset": dataset,
        "query": query or None,
        "answer": answer or None,
        "messages_column": messages_column,
        "text_column": text_column,
        "prompt_column": prompt_column,
        "completion_column": completion_column,
        "label_column": label_column,
        "source_column": source_column,
        "max_length": max_length,
        "normalisation": normalisation,
    }
    notes: list[Text] = []
    with exit_with_code(output) as interruption:
        interruption.kept = f"the scores in {str(out)!r} are as they were"
        settings = options.merge_settings(flags)
        with report_progress(output):
            scores, loaded, fitted = _load_finished(out), None, None
            if settings.texts.given:
                run = AttributionRun.of(settings)
                loaded = run.task
                scores = _with_data(scores, loaded, out)
                fitted, notes = _fitted_as_then(run, scores, out)
            elif task is not None:
                loaded = load_task(task)
                scores = _with_data(scores, loaded, out)
            page = write_page(scores, out, loaded, fitted)
        output.print_text(show.heading("Written"), show.file_table([(page, "open it in a browser")]), *notes)
        output.print_json({"status": "complete", "exit_code": 0, "command": "report", "files": {"report": str(page)}})


def _load_finished(out: Path) -> Scores:
    record = read_record(out)
    if record.get("status") != "complete":
        raise InvalidInput(f"The run in {str(out)!r} is not finished; run its ptif attribute command again first.")
    if (out / PARTS).exists():
        raise InvalidInput(
            f"The run in {str(out)!r} told parts of the model apart with --by, and the page shows whole scores; run "
            "ptif attribute without --by, into another --out."
        )
    return Scores.load(out / SCORES, fingerprint_of(record).identity)


def _with_data(scores: Scores, task: Task, out: Path) -> Scores:
    """The scores with the task's data, after a check that they were made from these and from this model."""
    queries = task.query_source
    ids = scores.query_ids
    last = int(ids.max())
    if last >= len(queries):
        raise InvalidInput(f"{task.path.name} has {len(queries):,} queries and the scores reach to query {last}.")
    data = fingerprint_data(task.problem.data, queries.subset(ids.tolist()))
    then = fingerprint_of(read_record(out))
    names = data.differences(then, among=(TRAINING_DATA, QUERIES))
    # What the model answers stands on the page. With another version of a library only its code differs.
    names = names or Fingerprint.of(*describe_model(task.problem)).differences(then, among=(WEIGHTS, OUTPUTS))
    if names:
        raise InvalidInput(
            f"The {names[0]} of {task.path.name} are not those of the run in {str(out)!r}; give the task it was made "
            "with (of a language model the same --dataset, columns and --query), or run ptif attribute again."
        )
    return replace(scores, train_source=task.problem.data.whole, query_source=queries)


def _fitted_as_then(run: AttributionRun, scores: Scores, out: Path) -> tuple[Any, list[Text]]:
    """The method that the run was made with, fitted, which colours tokens; else None, and a line that says why."""
    then = read_record(out).get("settings", {}).get("method")
    if then == repr(run.method):
        return run.fitted(FinishedRun(scores, len(scores))), []
    why = "Tokens are not coloured: the run was made by another method; give the same --method and --damping as then."
    return None, [Text(why)]


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
