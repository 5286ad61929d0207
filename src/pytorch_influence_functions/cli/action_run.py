"""What the commands of actions share: the task and the method, the queries as they are, and the result as one file."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

import torch
from jaxtyping import Float
from torch import Tensor, nn

from ..core.distributed import World
from ..core.errors import InvalidInput
from ..core.files import write_bytes
from ..influence.attribution import Influence
from ..influence.method import AbstractMethod
from ..influence.question import resolve_measure
from ..plots.examples import example_target
from ..problem.labels import labels_of
from ..problem.problem import Problem, sweep
from ..scores.indexing import plain_value
from .options import RunSettings
from .parsing import override_damping, parse_method, parse_query_positions
from .predictions import as_predictions
from .task import Task


@final
@dataclass(frozen=True, eq=False)
class ActionRun:
    """A task with the method that an action asks, and the positions of the queries.

    Args:
        settings: of the command.
        task: what the task file holds.
        method: by the flags, else the task's own, else what the action takes by itself.
    """

    settings: RunSettings
    task: Task
    method: AbstractMethod

    @staticmethod
    def of(settings: RunSettings, default: AbstractMethod | None = None) -> "ActionRun":
        """Run the task file.

        Raises:
            InvalidInput: a setting or the task file cannot be used.
        """
        named = None if settings.method is None else parse_method(settings.method)
        task = settings.load(asks=False)
        method = override_damping(named or task.method or default or Influence(), settings.damping)
        return ActionRun(settings, task, method)

    @property
    def n_train(self) -> int:
        """How many training examples there are, with what a sampler leaves out: an index is a place among them."""
        return len(self.task.problem.data.whole)

    def query_ids(self) -> list[int]:
        """The positions of the queries that are asked about.

        Raises:
            InvalidInput: there is no such query, or the task has none.
        """
        return parse_query_positions(self.settings.queries, len(self.task.query_source))

    def required(self, name: str, use: str) -> Any:
        """An entry of `get_options()` that the command cannot do without.

        Args:
            name: of the entry.
            use: what to write there, as the end of the sentence.

        Raises:
            InvalidInput: the task file does not give it.
        """
        value = getattr(self.task, name)
        if value is None:
            raise InvalidInput(f"{self.task.path.name} gives no {name}; let get_options() return {{{name!r}: {use}}}.")
        return value

    def example_label(self, place: int) -> str | None:
        """The label of a training example as it is shown; None where its target is no single number or word."""
        data = self.task.problem.data
        label = plain_value(example_target(data.item(data.index_of(place))))
        while isinstance(label, list) and len(label) == 1:
            (label,) = label
        return None if label is None or isinstance(label, (list, dict)) else self.label_name(label)

    def label_name(self, label: Any) -> str:
        """A class by its name, where the data have names; else the number."""
        names, value = self.task.problem.data.class_names, plain_value(label)
        if isinstance(value, int) and names and 0 <= value < len(names):
            return names[value]
        return f"{value:.4g}" if isinstance(value, float) else str(value)


@final
@dataclass(frozen=True, eq=False)
class QueryLook:
    """What a model says about the queries.

    Attributes:
        ids: their positions.
        labels: one for each; None where targets are no labels.
        values: what is measured on each, [Q] in float64.
        answers: the class the model gives, [Q]; None where it gives none.
    """

    ids: list[int]
    labels: list[Any] | None
    values: Float[Tensor, " q"]
    answers: Tensor | None

    @staticmethod
    def of(task: Task, ids: list[int], model: nn.Module | None = None) -> "QueryLook":
        """Look at the task's queries, under its model or another.

        Raises:
            InvalidInput: the task measures several things.
        """
        problem: Problem = task.problem if model is None else task.problem.with_(model=model)
        if isinstance(task.measure, Mapping):
            raise InvalidInput(
                f"{task.path.name} has {len(task.measure)} measures, and this command shows one; let get_options() "
                "return one measure."
            )
        objective = resolve_measure(problem, problem.objective, task.measure, task.query_source)
        labels, values, answers = [], [], []
        for _, batch in sweep(problem, task.query_source, ids, "queries", World()):
            with torch.no_grad():
                outputs = objective.outputs(problem.model, batch)
                measured = objective.losses(outputs, batch).double().cpu()
                if task.measure is not None:
                    outputs = problem.objective.outputs(problem.model, batch)
            values.append(measured)
            labels.append(labels_of(batch, len(measured)))
            answers.append(as_predictions(problem.objective, outputs.double().cpu()))
        known: list[Any] = [part for part in labels if part is not None]
        classes: list[Any] = [part.argmax(1) for part in answers if part is not None and part.dim() == 2]
        return QueryLook(
            list(ids),
            torch.cat(known).tolist() if len(known) == len(labels) else None,
            torch.cat(values),
            torch.cat(classes) if len(classes) == len(answers) else None,
        )


def require_queries(queries: str | None, settings: RunSettings, use: str) -> None:
    """Refuse a command that would take long over all queries, where nobody asked for all.

    Args:
        queries: what the flag says.
        settings: of the command, which a file may give too.
        use: what is done for each query, as the end of the sentence.

    Raises:
        InvalidInput: neither the flag nor the file names queries.
    """
    if queries is None and settings.queries == "all":
        raise InvalidInput(f"Say which predictions: --queries 5, 0:20, or all{use}.")


def write_result(out: Path, name: str, result: Mapping[str, Any]) -> Path:
    """Write the object of `--json` into a folder, whole or not at all; gives its path.

    Raises:
        InvalidInput: the folder cannot be written to.
    """
    path = out / name
    write_bytes(path, (json.dumps(result, indent=2, allow_nan=False) + "\n").encode())
    return path
