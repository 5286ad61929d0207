"""`ptif classic`: the calculation of version 0.1, with its settings, file names and results."""

from pathlib import Path
from typing import Annotated, Any

import typer

from ..classic.calc import calc_influences
from ..classic.config import Config
from ..core.errors import InvalidInput
from . import options, show
from .exit import Output, exit_with_code
from .progress_bars import report_progress
from .task import Task, load_task


def classic_command(
    config: Annotated[Path, typer.Argument(help="JSON or TOML file with the old settings.", metavar="CONFIG")],
    task: Annotated[
        Path | None, typer.Option("--task", help="Task file. (default: the setting 'task' of the config)")
    ] = None,
    json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """The calculation of version 0.1: its settings, its file names, its results in outdir.

    CONFIG holds any of the old settings (recursion_depth, r, damp, scale, test_sample_num, outdir, …), and `task`: the
    Python file with get_model() and get_dataloaders(), relative to the config.
    """
    output = Output(json, quiet)
    with exit_with_code(output) as interruption:
        settings, path = _read_settings(config, task)
        interruption.kept = f"what was finished lies in {str(settings['outdir'])!r}, and a new start begins anew"
        with report_progress(output):
            loaded = load_task(path)
            result = calc_influences(
                _add_weight_decay(settings, loaded, given="weight_decay" in options.read_table(config)),
                loaded.problem.model,
                loaded.problem.data,
                loaded.query_source,
                loss_fn=loaded.problem.objective,
                params=loaded.problem.parameters,
            )
        scores = result.scores
        files = [] if result.path is None else [(result.path, "the results, as version 0.1 laid them out")]
        output.print_text(
            show.heading(f"{len(scores):,} test examples × {scores.n_train:,} training examples"),
            show.indent("by how much the test loss would rise (+) or fall (−) without the example"),
            *show.influence_table(scores),
            "",
            show.heading("Written"),
            show.file_table(files),
        )
        output.print_json(
            {
                "status": "complete",
                "exit_code": 0,
                "command": "classic",
                "files": {"results": str(result.path)},
                "n_queries": len(scores),
                "n_train": scores.n_train,
                "helpful": result.helpful[:10],
                "harmful": result.harmful[:10],
            }
        )


def _add_weight_decay(settings: dict[str, Any], task: Task, given: bool) -> dict[str, Any]:
    """Add the task's weight decay to the settings, unless the config has its own.

    Raises:
        InvalidInput: the task uses features that version 0.1 did not have.
    """
    if task.measure is not None or task.problem.checkpoints:
        feature = "checkpoints" if task.measure is None else "measure"
        raise InvalidInput(f"{task.path.name} gives {feature}, which ptif classic does not have; use ptif attribute.")
    decay = task.problem.weight_decay
    if given or decay.is_zero:
        return settings
    if not isinstance(decay.strength, (int, float)):
        raise InvalidInput(
            f"{task.path.name} gives a weight decay per parameter, and ptif classic knows one number; write "
            "weight_decay into the config, or use ptif attribute."
        )
    return settings | {"weight_decay": float(decay.strength)}


def _read_settings(path: Path, task: Path | None) -> tuple[dict[str, Any], Path]:
    """Read and check the old settings, and find the task file."""
    table = options.read_table(path)
    task_name = table.pop("task", None)
    if task is None and (not isinstance(task_name, str) or not task_name):
        raise InvalidInput(f"{path.name} names no task file; add the setting task to it, or give --task task.py.")
    for loader in ("train_loader", "test_loader"):
        if loader in table:
            raise InvalidInput(f"{path.name} holds {loader}, which a file cannot; the task file gives the loaders.")
    settings = dict(Config.of(table))
    try:
        Path(settings["outdir"]).mkdir(parents=True, exist_ok=True)
    except OSError as cause:
        raise InvalidInput(
            f"The outdir {str(settings['outdir'])!r} of {path.name} cannot be made ({cause.strerror}); give another."
        ) from cause
    return settings, task or path.parent / str(task_name)
