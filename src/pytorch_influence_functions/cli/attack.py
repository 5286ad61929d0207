"""`ptif attack`: training inputs changed by a little, so that the model trained on them answers wrongly."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.text import Text
from torch import Tensor, nn

from ..actions.training_once import train_once
from ..actions.training_set_attack import SignSteps, TrainingSetAttack, attack_training_set
from ..core.errors import InvalidInput, name_ids
from ..core.files import write_tensors
from . import options, show
from .action_run import ActionRun, QueryLook, require_queries, write_result
from .exit import Output, exit_with_code
from .folder import check_folder
from .parsing import parse_bounds, parse_fraction
from .progress_bars import report_progress

RESULT, INPUTS = "attack.json", "attack.safetensors"
KIND = "changed inputs"
_SHOWN = 10


def attack_command(
    task: options.TaskFile = None,
    queries: Annotated[
        str | None, typer.Option("--queries", help="Which predictions, all at once: 5, 0:20, or 1,4,10:20.")
    ] = None,
    count: Annotated[int, typer.Option("--count", help="How many training examples are changed.")] = 1,
    size: Annotated[
        str, typer.Option("--size", help="The largest change of any number of an input: 0.3, or 2/255.")
    ] = "2/255",
    bounds: Annotated[
        str | None, typer.Option("--bounds", help="What an input may be: 0:1 for pictures. (default: any value)")
    ] = None,
    rounds: Annotated[int, typer.Option("--rounds", help="The most steps, each with a training after it.")] = 4,
    out: options.ResultFolder = None,
    method: options.Method = None,
    damping: options.Damping = None,
    weight_decay: options.WeightDecay = None,
    batch_size: options.BatchSize = None,
    device: options.Device = None,
    config: options.ConfigFile = None,
    json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """How robust is an answer to its training data being tampered with?

    Changes a few training inputs by a little, trains again by the task's recipe, and so on until answers are wrong.
    Beside it: training on unchanged data, and on random signs of the same size. Trains up to --rounds + 5 times.
    """
    output = Output(json, quiet)
    flags = options.settings_among(locals())
    with exit_with_code(output):
        settings = options.merge_settings(flags, config)
        if out is not None:
            check_folder(out)
        steps = SignSteps(parse_fraction(size, "--size"), rounds, bounds=parse_bounds(bounds, "--bounds"))
        require_queries(queries, settings, "; they are attacked at once")
        with report_progress(output):
            run = ActionRun.of(settings)
            recipe = run.required("recipe", "ptif.evaluation.Recipe(make_model, epochs=20)")
            look = _look(run)
            _refuse_wrong(look)
            source = run.task.query_source.subset(look.ids)
            outcome = attack_training_set(run.task.problem, source, recipe, count, steps, method=run.method)
            originals = _originals(run, outcome)
            again = _look(run, train_once(recipe, run.task.problem.data, 0))
            then = _look(run, outcome.model)
        result = _describe(run, outcome, look, again, then, originals)
        files = _write(out, result, outcome, originals, look.ids)
        _print_result(output, result, files)
        output.print_json(result)


def _look(run: ActionRun, model: nn.Module | None = None) -> QueryLook:
    """The queries by the loss of training, which is what is attacked, whatever the task measures."""
    return QueryLook.of(replace(run.task, measure=None), run.query_ids(), model)


def _refuse_wrong(look: QueryLook) -> None:
    if look.labels is not None and look.answers is not None:
        answered = zip(look.ids, look.labels, look.answers.tolist(), strict=True)
        wrong = [q for q, label, answer in answered if int(label) != answer]
        if wrong:
            raise InvalidInput(f"Query {name_ids(wrong)} is already answered wrongly; attack queries that are right.")


def _originals(run: ActionRun, outcome: TrainingSetAttack) -> Tensor:
    data = run.task.problem.data
    return torch.stack([data.item(data.index_of(place))[0] for place in outcome.ids]).to(outcome.inputs)


def _describe(
    run: ActionRun,
    outcome: TrainingSetAttack,
    look: QueryLook,
    again: QueryLook,
    then: QueryLook,
    originals: Tensor,
) -> dict[str, Any]:
    moves = (outcome.inputs - originals).flatten(1).abs()
    before, after = float(outcome.before.mean()), float(outcome.after.mean())
    return {
        "status": "complete",
        "exit_code": 0,
        "command": "attack",
        "method": str(run.method),
        "n_train": run.n_train,
        "mean_before": before,
        "mean_unchanged": float(again.values.mean()),
        "mean_after": after,
        "predicted_first_step": outcome.predicted / len(look.ids),
        "rounds": list(outcome.path),
        "random_signs": list(outcome.control),
        "beats_random_signs": after > max(outcome.control),
        "wrong": int(outcome.wrong.sum()),
        "examples": [
            {
                "index": place,
                "label": run.example_label(place),
                "numbers_changed": int((moves[k] > 0).sum()),
                "largest_change": float(moves[k].max()),
                "mean_change": float(moves[k].mean()),
            }
            for k, place in enumerate(outcome.ids)
        ],
        "queries": [
            {
                "query": q,
                "label": None if look.labels is None else run.label_name(look.labels[row]),
                "before": float(outcome.before[row]),
                "unchanged": float(again.values[row]),
                "after": float(outcome.after[row]),
                "answer": _answer(run, look, row),
                "answer_unchanged": _answer(run, again, row),
                "answer_after": _answer(run, then, row),
                "wrong": bool(outcome.wrong[row]),
                "wrong_by_random_signs": int(outcome.control_wrong[row]),
            }
            for row, q in enumerate(look.ids)
        ],
    }


def _answer(run: ActionRun, look: QueryLook, row: int) -> str | None:
    return None if look.answers is None else run.label_name(int(look.answers[row]))


def _write(
    out: Path | None, result: dict[str, Any], outcome: TrainingSetAttack, originals: Tensor, ids: Sequence[int]
) -> list[tuple[Path, str]]:
    if out is None:
        return []
    tensors = {
        "examples": torch.tensor(outcome.ids),
        "inputs": outcome.inputs,
        "originals": originals,
        "queries": torch.tensor(ids),
    }
    file = write_result(out, RESULT, result)
    write_tensors(out / INPUTS, KIND, tensors, {"method": result["method"]})
    return [(file, "as --json"), (out / INPUTS, "the changed inputs and the original ones")]


def _print_result(output: Output, result: dict[str, Any], files: Sequence[tuple[Path, str]]) -> None:
    changed, rows, tries = result["examples"], result["queries"], result["random_signs"]
    largest = max(one["largest_change"] for one in changed)
    q = len(rows)
    facts = [
        ("mean loss", f"{result['mean_before']:.4g} now; the rest after training again"),
        ("unchanged data", f"{result['mean_unchanged']:.4g}"),
        ("random signs", f"{min(tries):.4g} to {max(tries):.4g} in {len(tries)} tries of the same size"),
        ("attacked", f"{result['mean_after']:.4g}, by round {', '.join(f'{loss:.4g}' for loss in result['rounds'])}"),
        ("predicted", f"{show.format_score(result['predicted_first_step'])} by the first step"),
    ]
    output.print_text(
        show.heading(
            f"{len(changed):,} of {result['n_train']:,} training inputs changed by at most {largest:.3g}: "
            f"{result['wrong']:,} of {q:,} {'answer' if q == 1 else 'answers'} wrong"
        ),
        show.fact_table(facts),
        "",
        show.heading("Queries" if q <= _SHOWN else f"First {_SHOWN} of {q:,} queries"),
        show.indent("again: trained on unchanged data; random: wrong by random signs"),
        show.indent(_query_table(rows[:_SHOWN], len(tries))),
        "",
        show.heading("Changed" if len(changed) <= _SHOWN else f"Most effective {_SHOWN} of {len(changed):,} changed"),
        show.indent(_example_table(changed[:_SHOWN])),
        *(["", show.heading("Written"), show.file_table(files)] if files else []),
        *_cautions(result),
    )


def _cautions(result: dict[str, Any]) -> list[Any]:
    """What forbids to read the answers as the attack's doing."""
    told = [] if result["beats_random_signs"] else ["Random signs do as much: this attack found nothing."]
    lost = sum(one["answer_unchanged"] != one["answer"] for one in result["queries"])
    if lost:
        told.append(f"Training again on unchanged data changes {lost:,} of the answers: no attack did that.")
    return [item for text in told for item in ("", Text(text))]


def _query_table(rows: Sequence[dict[str, Any]], tries: int) -> Any:
    labelled, answered = rows[0]["label"] is not None, rows[0]["answer"] is not None
    columns = [("query", "right"), *([("label", "left")] if labelled else [])]
    columns += [("loss", "right"), ("again", "right"), ("attacked", "right")]
    columns += [("answer", "left"), ("again", "left"), ("attacked", "left")] if answered else [("wrong", "left")]
    table = show.borderless_table([*columns, ("random", "right")])
    for one in rows:
        cells = [str(one["query"]), *([show.printable(one["label"], 8)] if labelled else [])]
        cells += [f"{one[name]:.2g}" for name in ("before", "unchanged", "after")]
        if answered:
            cells += [show.printable(one[name], 8) for name in ("answer", "answer_unchanged", "answer_after")]
        else:
            cells.append("yes" if one["wrong"] else "no")
        table.add_row(*map(Text, [*cells, f"{one['wrong_by_random_signs']} of {tries}"]))
    return table


def _example_table(examples: Sequence[dict[str, Any]]) -> Any:
    labelled = any(one["label"] is not None for one in examples)
    columns = [("example", "right"), *([("label", "left")] if labelled else []), ("numbers changed", "right")]
    table = show.borderless_table([*columns, ("largest change", "right"), ("mean change", "right")])
    for one in examples:
        cells = [f"#{one['index']}", *([show.printable(one["label"] or "", 16)] if labelled else [])]
        cells += [f"{one['numbers_changed']:,}", f"{one['largest_change']:.3g}", f"{one['mean_change']:.3g}"]
        table.add_row(*map(Text, cells))
    return table
