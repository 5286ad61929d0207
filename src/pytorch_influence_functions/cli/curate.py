"""`ptif curate`: decisions about training examples carried out, and what training again on the edited data gives."""

from pathlib import Path
from typing import Annotated, Any

import typer

from ..actions.curate import CuratedData, CurationEffect, curate
from ..evaluation.correlate import Estimate
from ..objectives.likelihoods import SquaredError
from . import options, show
from .action_run import ActionRun, write_result
from .exit import Output, exit_with_code
from .folder import check_folder
from .progress_bars import report_progress

RESULT, TRAININGS = "curation.json", "trainings"


def curate_command(
    task: options.TaskFile = None,
    decisions: Annotated[
        Path | None,
        typer.Argument(help="What the report page downloaded, or the table of ptif label-issues.", metavar="DECISIONS"),
    ] = None,
    seeds: Annotated[
        int, typer.Option("--seeds", min=1, help="Trainings on each: more make the interval smaller.")
    ] = 5,
    out: options.Out = None,
    batch_size: options.BatchSize = None,
    device: options.Device = None,
    json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Carry out decisions about training examples, train again, and compare on the queries.

    Wrong labels with a new one get it; other wrong labels and duplicates are left out. Training follows the recipe of
    get_options(). Finished trainings are kept in --out: after Ctrl-C the same command goes on from there.
    """
    output = Output(json, quiet)
    flags = options.settings_among(locals())
    with exit_with_code(output) as interruption:
        settings = options.merge_settings(flags)
        if decisions is None:
            raise options.missing_argument("DECISIONS", "decisions.json of the report page, or label_issues.csv")
        check_folder(settings.out)
        with report_progress(output):
            run = ActionRun.of(settings)
            recipe = run.required("recipe", "ptif.evaluation.Recipe(make_model, epochs=20)")
            test = run.task.query_source
            curated = curate(run.task.problem.data, decisions)
            interruption.kept = f"finished trainings are kept in {str(settings.out / TRAININGS)!r}"
            effect = curated.retrain(recipe, test, seeds, measure=_measure(run), folder=settings.out / TRAININGS)
        result = _describe(curated, effect)
        path = write_result(settings.out, RESULT, result)
        _print_result(output, result, path)
        output.print_json(result)


def _measure(run: ActionRun) -> Any:
    """What the trainings are judged by: the task's measure, else accuracy where there are classes, else the loss."""
    if run.task.measure is not None:
        return run.task.measure
    objective = run.task.problem.objective
    return objective if isinstance(objective, SquaredError) else None


def _describe(curated: CuratedData, effect: CurationEffect) -> dict[str, Any]:
    return {
        "status": "complete",
        "exit_code": 0,
        "command": "curate",
        "edit": effect.edit,
        "measure": effect.measure,
        "seeds": len(effect.truth.seeds),
        "n_test": int(effect.truth.baseline.shape[1]),
        "recipe": effect.truth.recipe,
        "before": _estimate(effect.before),
        "after": _estimate(effect.after),
        "gain": _estimate(effect.gain),
        "removed": list(curated.removed),
        "relabelled": {str(i): label for i, label in curated.relabelled.items()},
    }


def _estimate(estimate: Estimate) -> dict[str, float | None]:
    """Value and interval; None where one seed has no interval."""
    known = estimate.low == estimate.low
    return {"value": estimate.value, "low": estimate.low if known else None, "high": estimate.high if known else None}


def _print_result(output: Output, result: dict[str, Any], path: Path) -> None:
    gain = result["gain"]
    around = "one seed has no interval" if gain["low"] is None else f"{gain['low']:+.4f} to {gain['high']:+.4f}"
    output.print_text(
        show.heading(f"{result['edit']}, then trained again"),
        show.fact_table(
            [
                ("recipe", result["recipe"]),
                ("judged by", f"{result['measure']} on {result['n_test']:,} queries, {result['seeds']:,} seeds"),
                ("before", f"{result['before']['value']:.4f}"),
                ("after", f"{result['after']['value']:.4f}"),
                ("gain", f"{gain['value']:+.4f} ({around}{'' if gain['low'] is None else ', 95 % over seeds'})"),
            ]
        ),
        "",
        show.heading("Written"),
        show.file_table([(path, "the numbers, and which examples"), (path.parent / TRAININGS, "kept trainings")]),
    )
