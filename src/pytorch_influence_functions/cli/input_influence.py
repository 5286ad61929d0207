"""`ptif input-influence`: which numbers in the inputs of which training examples matter to a prediction."""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.text import Text
from torch import Tensor

from ..actions.fitted_system import fit_system
from ..actions.inputs import input_influence
from ..core.errors import InvalidInput, require
from ..core.files import write_tensors
from ..influence.attribution import Attribution
from ..plots.inputs import plot_input_influence
from . import options, show
from .action_run import ActionRun, QueryLook, require_queries, write_result
from .exit import Output, exit_with_code
from .folder import check_folder
from .parsing import parse_example_positions
from .progress_bars import report_progress

RESULT, SLOPES = "input_influence.json", "input_influence.safetensors"
KIND = "input slopes"
_PICTURES = (".png", ".pdf", ".svg")
_QUERIES, _SHOWN, _DRAWN = 5, 10, 6


def input_influence_command(
    task: options.TaskFile = None,
    queries: Annotated[
        str | None, typer.Option("--queries", help="Which predictions: 5, 0:20, or 1,4,10:20; all takes long.")
    ] = None,
    examples: Annotated[
        str | None, typer.Option("--examples", help="Training examples to look at: 0:20, 5, 1,4. (default: all)")
    ] = None,
    out: options.ResultFolder = None,
    plot: Annotated[
        Path | None,
        typer.Option("--plot", help="Draw one query's strongest examples, their pixels or columns: heat.png."),
    ] = None,
    top: Annotated[
        int | None, typer.Option("--top", help="Training examples to show. (default: 10; in the picture 6)")
    ] = None,
    method: options.Method = None,
    damping: options.Damping = None,
    weight_decay: options.WeightDecay = None,
    batch_size: options.BatchSize = None,
    device: options.Device = None,
    config: options.ConfigFile = None,
    json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """What in a training example matters to a prediction: which pixels, which columns?

    The slope of a query's loss (or of the task's measure) in every number of the inputs of training examples, as if
    trained again: one backward pass over the examples for each query.
    """
    output = Output(json, quiet)
    flags = options.settings_among(locals())
    with exit_with_code(output):
        settings = options.merge_settings(flags, config)
        if out is not None:
            check_folder(out)
        if plot is not None:
            _check_picture(plot)
        require_queries(queries, settings, ", each of which is a pass over the training examples")
        with report_progress(output):
            run = ActionRun.of(settings)
            ids = run.query_ids()
            if plot is not None and len(ids) > 1:
                raise InvalidInput(f"--plot draws one query, and {len(ids):,} are asked about; name one: --queries 5.")
            chosen = _examples(run, examples)
            look = QueryLook.of(run.task, ids)
            source = run.task.query_source.subset(ids)
            fitted = fit_system(run.task.problem, run.method, "input_influence")
            slopes = input_influence(fitted, source, chosen, run.task.measure)
        result = _describe(run, fitted, look, chosen, slopes, settings.top or _SHOWN)
        files = _write(out, result, slopes, look.ids, chosen)
        if plot is not None:
            files.append((_draw(run, slopes[0], chosen, settings.top or _DRAWN, plot), "the strongest, as a picture"))
        _print_result(output, run, result, files)
        output.print_json(result)


def _check_picture(path: Path) -> None:
    """Before anything is computed: can the picture be drawn?

    Raises:
        InvalidInput: its ending names no kind of picture.
        MissingExtra: matplotlib is not installed.
    """
    require("matplotlib", "plot")
    if path.suffix.lower() not in _PICTURES:
        raise InvalidInput(f"--plot {path} must end in {', '.join(_PICTURES[:-1])} or {_PICTURES[-1]}.")


def _examples(run: ActionRun, text: str | None) -> list[int]:
    """The places that are looked at; without the flag all that training saw."""
    if text is not None:
        return parse_example_positions(text, run.n_train, "--examples")
    positions = run.task.problem.data.positions
    return list(range(run.n_train)) if positions is None else positions.tolist()


def strongest(slopes: Tensor, top: int) -> list[int]:
    """The rows with the largest sum of absolute slopes, [n, ...]: what moving every number by 1 could do at most."""
    order: list[int] = slopes.flatten(1).abs().sum(1).argsort(descending=True, stable=True)[:top].tolist()
    return order


def _describe(
    run: ActionRun, fitted: Attribution, look: QueryLook, chosen: Sequence[int], slopes: Tensor, top: int
) -> dict[str, Any]:
    rows = [
        {
            "query": q,
            "label": None if look.labels is None else run.label_name(look.labels[row]),
            "answer": None if look.answers is None else run.label_name(int(look.answers[row])),
            "now": float(look.values[row]),
            "examples": [_example(run, chosen[k], slopes[row, k]) for k in strongest(slopes[row], top)],
        }
        for row, q in enumerate(look.ids)
    ]
    return {
        "status": "complete",
        "exit_code": 0,
        "command": "input-influence",
        "method": fitted.method,
        "why": fitted.why,
        "measured": "loss" if run.task.measure is None else repr(run.task.measure),
        "n_train": run.n_train,
        "n_examples": len(chosen),
        "input_shape": list(slopes.shape[2:]),
        "queries": rows,
    }


def _example(run: ActionRun, place: int, slopes: Tensor) -> dict[str, Any]:
    steepest = int(slopes.abs().argmax())
    return {
        "index": place,
        "label": run.example_label(place),
        "size": float(slopes.abs().sum()),
        "steepest": _place_in(steepest, slopes.shape),
        "slope": float(slopes.reshape(-1)[steepest]),
    }


def _place_in(flat: int, shape: Sequence[int]) -> list[int]:
    """The index in an input of this shape of its `flat`-th number."""
    place: list[int] = []
    for size in reversed(shape):
        place.insert(0, flat % size)
        flat //= size
    return place


def _write(
    out: Path | None, result: dict[str, Any], slopes: Tensor, ids: Sequence[int], chosen: Sequence[int]
) -> list[tuple[Path, str]]:
    if out is None:
        return []
    tensors = {"slopes": slopes, "queries": torch.tensor(ids), "examples": torch.tensor(chosen)}
    file = write_result(out, RESULT, result)
    write_tensors(out / SLOPES, KIND, tensors, {"measured": result["measured"], "method": result["method"]})
    return [(file, "the strongest, as --json"), (out / SLOPES, "all slopes, [queries, examples, *input shape]")]


def _draw(run: ActionRun, slopes: Tensor, chosen: Sequence[int], top: int, path: Path) -> Path:
    rows = strongest(slopes, top)
    plot_input_influence(slopes[rows], run.task.problem.data.whole, [chosen[k] for k in rows], path=path)
    return path


def _print_result(output: Output, run: ActionRun, result: dict[str, Any], files: Sequence[tuple[Path, str]]) -> None:
    measured = "loss" if run.task.measure is None else "measure"
    more = len(result["queries"]) - _QUERIES
    parts: list[Any] = []
    for one in result["queries"][:_QUERIES]:
        parts += [show.heading(_title(one, measured)), show.indent(_table(one["examples"])), ""]
    parts += [Text(f"and {more:,} more queries"), ""] if more > 0 else []
    output.print_text(
        show.heading(f"Inputs of {result['n_examples']:,} of {result['n_train']:,} training examples"),
        show.fact_table(
            [
                ("method", result["method"]),
                ("why", result["why"]),
                ("size", f"the most that the {measured} moves when each number of an input moves by 1"),
                ("slope", f"of the {measured} in the one steepest number of the input"),
            ]
        ),
        "",
        *parts,
        *([show.heading("Written"), show.file_table(files), ""] if files else []),
        Text("Slopes of a small change, as if trained again; nothing is trained."),
    )


def _title(one: dict[str, Any], measured: str) -> str:
    told = [f"label {show.printable(one['label'], 16)}"] if one["label"] is not None else []
    told += [f"answer {show.printable(one['answer'], 16)}"] if one["answer"] is not None else []
    told.append(f"{measured} {one['now']:.3g}")
    return f"Query {one['query']} ({', '.join(told)})"


def _table(examples: Sequence[dict[str, Any]]) -> Any:
    labelled = any(one["label"] is not None for one in examples)
    columns = [("example", "right"), *([("label", "left")] if labelled else []), ("size", "right")]
    table = show.borderless_table([*columns, ("steepest at", "right"), ("slope", "right")])
    for one in examples:
        cells = [f"#{one['index']}", *([show.printable(one["label"] or "", 16)] if labelled else [])]
        place = ", ".join(map(str, one["steepest"]))
        table.add_row(*map(Text, [*cells, f"{one['size']:.3g}", f"[{place}]", show.format_score(one["slope"])]))
    return table
