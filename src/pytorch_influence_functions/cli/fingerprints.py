"""What a run was made from: its fingerprint, and its settings in words for whoever reads `run.json`."""

from collections.abc import Mapping
from typing import Any

from .._version import __version__
from ..core.fingerprint import Fingerprint
from ..influence.method import AbstractMethod
from ..objectives.convert import as_objective
from ..problem.data import Source
from ..problem.ingredients import describe_model, digest_data
from ..problem.problem import Problem
from .task import Task

TRAINING_DATA, QUERIES = "training data", "queries"


def fingerprint_run(
    task: Task, method: AbstractMethod, settings: Mapping[str, Any], queries: Source | None
) -> Fingerprint:
    """Everything the scores depend on, by what it computes rather than by the text of the task file.

    Cost: the training data and the queries are read once; see `describe_model` for the probe.
    """
    problem = task.problem
    model, probes = describe_model(problem)
    ingredients = model | {
        "loss": problem.objective,
        "measure": task.measure,
        "method": method,
        "settings": dict(settings) | _layout(problem),
    }
    return Fingerprint.of(ingredients | _data(problem.data, queries), probes)


def fingerprint_data(train: Source, queries: Source) -> Fingerprint:
    """The part of a run's fingerprint that the data give."""
    return Fingerprint.of(_data(train, queries))


def _data(train: Source, queries: Source | None) -> dict[str, str]:
    digests = {TRAINING_DATA: digest_data(train, label="reading training data")}
    return digests if queries is None else digests | {QUERIES: digest_data(queries, label="reading queries")}


def _layout(problem: Problem) -> dict[str, Any]:
    return {
        "parameters": [[b.name, list(b.parameters)] for b in problem.space.blocks.values()],
        "weight_decay": problem.weight_decay,
        "batch_size": problem.batch_size,
    }


def describe_settings(task: Task, method: AbstractMethod, settings: Mapping[str, Any]) -> dict[str, Any]:
    """What was asked for, in words and numbers that JSON holds."""
    problem = task.problem
    described = _layout(problem) | {
        "version": __version__,
        "method": repr(method),
        "loss": repr(problem.objective),
        "measure": repr(None if task.measure is None else as_objective(task.measure)),
        "weight_decay": repr(problem.weight_decay),
    }
    return described | dict(settings)
