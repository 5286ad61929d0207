"""The user's task file: a Python program that says which model was trained on which data."""

import sys
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, Final, final

import torch

from ..core.errors import InvalidInput, UnknownName, nearest
from ..core.token_text import text_name_of
from ..influence.method import AbstractMethod
from ..methods.names import as_method
from ..problem.data import Source
from ..problem.inferred import inferred_problem
from ..problem.problem import Problem, check_model

MODULE: Final = "ptif_task"
# The original README's names work as well.
_MODEL_FUNCTIONS = ("get_model", "get_my_model")
_LOADER_FUNCTIONS = ("get_dataloaders", "get_my_dataloaders")
_KNOWN = (*_MODEL_FUNCTIONS, *_LOADER_FUNCTIONS, "get_options")
_QUERY_OPTIONS = ("measure", "method")
_PROBLEM_OPTIONS = ("loss", "weight_decay", "parameters", "checkpoints")
_ACTION_OPTIONS = ("recipe", "validation", "statistic")
_INDEX_OPTIONS = ("columns",)
OPTIONS: Final = (*_PROBLEM_OPTIONS, *_QUERY_OPTIONS, *_ACTION_OPTIONS, *_INDEX_OPTIONS)
"""The keys that `get_options()` may return."""


@final
@dataclass(frozen=True, eq=False)
class Task:
    """The contents of a task file: the problem, the queries, and what `get_options()` may add."""

    path: Path
    problem: Problem
    queries: Source | None
    measure: Any = None
    method: AbstractMethod | None = None
    inferred: bool = False
    """Whether the loss was told from outputs and targets."""
    recipe: Any = None
    """How the model is trained: a `Recipe`, or a function `(dataset, seed) -> trained model`."""
    validation: Any = None
    """Labelled data that neither trained the model nor are its queries."""
    statistic: Any = None
    """What `ptif smallest-removal` is about: a function of the model."""
    columns: Any = None
    """What else is known of every training example, for `ptif index query --where`."""

    @property
    def query_source(self) -> Source:
        """The queries.

        Raises:
            InvalidInput: the task has none.
        """
        if self.queries is None:
            raise InvalidInput(
                f"{self.path.name} gives no queries; let get_dataloaders() return (train, test), or define queries."
            )
        return self.queries

    @property
    def names(self) -> Callable[[int], str] | None:
        """What to call a training example, where its data know it."""
        source = self.problem.data.whole
        return None if text_name_of(source, 0) is None else lambda index: text_name_of(source, index) or ""


@final
@dataclass(frozen=True)
class Overrides:
    """Settings of the problem that flags change; `None` leaves the task file's own."""

    weight_decay: float | None = None
    batch_size: int | None = None
    device: str | None = None


def load_task(path: Path, overrides: Overrides | None = None) -> Task:
    """Run a task file and read what it defines.

    Raises:
        InvalidInput: no such file, an error inside it (with its line), or it lacks what is needed.
    """
    flags = overrides or Overrides()
    if not path.is_file():
        fault = "is a folder" if path.is_dir() else "does not exist"
        raise InvalidInput(f"The task file {str(path)!r} {fault}; give a Python file with get_model().")
    module = _execute(path)
    names = vars(module)
    model_function = _first_defined(names, _MODEL_FUNCTIONS)
    if "problem" in names and model_function:
        raise InvalidInput(f"{path.name} defines both problem and {model_function}; keep one of them.")
    options = _read_options(path, names)
    if "problem" in names:
        problem, queries = _own_problem(path, names, options)
    else:
        problem, queries = _build_problem(path, names, options, flags)
    changes = {k: v for k, v in vars(flags).items() if v is not None}
    if flags.device is not None:
        move_model(problem.model, flags.device)
    problem = problem.with_(**changes) if changes else problem
    source = None if queries is None else problem.data.read_alike(queries, flags.batch_size)
    method, inferred = _read_method(path, options.get("method")), "problem" not in names and options.get("loss") is None
    added = [options.get(name) for name in (*_ACTION_OPTIONS, *_INDEX_OPTIONS)]
    return Task(path, problem, source, options.get("measure"), method, inferred, *added)


def _execute(path: Path) -> ModuleType:
    """Run the file once, as a module in which worker processes find its functions."""
    module = ModuleType(MODULE)
    module.__file__ = str(path)
    # The task file can import its neighbours, and worker processes can import what it defines.
    folder = str(path.parent.resolve())
    if folder not in sys.path:
        sys.path.insert(0, folder)
    sys.modules[MODULE] = module
    try:
        exec(compile(path.read_bytes(), str(path), "exec"), vars(module))
    except SyntaxError as cause:
        raise InvalidInput(f"{path.name} is not Python: {cause.msg} in line {cause.lineno}; correct it.") from cause
    except (Exception, SystemExit) as cause:
        raise _task_error(path, "Running it", cause) from cause
    return module


def _task_error(path: Path, step: str, cause: BaseException) -> InvalidInput:
    """An error raised in the user's own file, with its line."""
    lines = [f.lineno for f in traceback.extract_tb(cause.__traceback__) if f.filename == str(path)]
    line = f", line {lines[-1]}" if lines else ""
    message = (str(cause).strip().splitlines() or ["no message"])[0].rstrip(".")
    return InvalidInput(
        f"{path.name}{line}: {step} failed with {type(cause).__name__}: {message}; correct the task file."
    )


def _first_defined(names: Mapping[str, Any], known: tuple[str, ...]) -> str | None:
    return next((name for name in known if name in names), None)


def _call_function(path: Path, names: Mapping[str, Any], known: tuple[str, ...]) -> Any:
    name = _first_defined(names, known)
    if name is None:
        defined = [k for k, v in names.items() if callable(v) and not k.startswith("_") and k not in _KNOWN]
        raise InvalidInput(
            f"{path.name} does not define {known[0]}().{nearest(known[0], defined)} Define get_model() and "
            "get_dataloaders(), or problem and queries."
        )
    if not callable(names[name]):
        raise InvalidInput(f"{name} in {path.name} is {type(names[name]).__name__}; make it a function.")
    try:
        return names[name]()
    except (Exception, SystemExit) as cause:
        raise _task_error(path, f"{name}()", cause) from cause


def _read_options(path: Path, names: Mapping[str, Any]) -> dict[str, Any]:
    if "get_options" not in names:
        return {}
    options = _call_function(path, names, ("get_options",))
    if not isinstance(options, Mapping):
        raise InvalidInput(f"get_options() of {path.name} returns {type(options).__name__}; return a dictionary.")
    for name in options:
        if name not in OPTIONS:
            raise UnknownName(
                f"get_options() of {path.name} holds {name!r}.{nearest(str(name), OPTIONS)} It may hold "
                f"{', '.join(OPTIONS)}."
            )
    return dict(options)


def _read_method(path: Path, method: Any) -> AbstractMethod | None:
    """The `method` of `get_options()`, in the forms that `ptif.attribute` takes."""
    try:
        return None if method is None else as_method(method)
    except InvalidInput as error:
        error.args = (f"In get_options() of {path.name}: {error}",)
        raise


def _own_problem(path: Path, names: Mapping[str, Any], options: Mapping[str, Any]) -> tuple[Problem, Any]:
    problem = names["problem"]
    if not isinstance(problem, Problem):
        raise InvalidInput(f"problem in {path.name} is {type(problem).__name__}; make it a ptif.Problem(...).")
    extra = next((name for name in options if name in _PROBLEM_OPTIONS), None)
    if extra is not None:
        raise InvalidInput(f"{path.name} gives {extra} in get_options() and a problem; give it to Problem(...).")
    return problem, names.get("queries")


def _build_problem(
    path: Path, names: Mapping[str, Any], options: Mapping[str, Any], flags: Overrides
) -> tuple[Problem, Any]:
    model = _call_function(path, names, _MODEL_FUNCTIONS)
    loaders = _call_function(path, names, _LOADER_FUNCTIONS)
    check_model(model)
    if not isinstance(loaders, (tuple, list)) or len(loaders) != 2:
        returned = f"{len(loaders)} things" if isinstance(loaders, (tuple, list)) else type(loaders).__name__
        raise InvalidInput(f"get_dataloaders() of {path.name} returns {returned}; return two, (train, test).")
    train, queries = loaders
    settings = {name: options[name] for name in _PROBLEM_OPTIONS if name in options}
    objective = settings.pop("loss", None)
    if flags.device is not None:
        move_model(model, flags.device)
    source = Source.of(train, flags.batch_size)
    if objective is None:
        return inferred_problem(model, source, **settings), queries
    return Problem(model, objective, source, **settings), queries


def move_model(model: torch.nn.Module, device: str) -> None:
    """Move a model, or say which flag cannot be followed.

    Raises:
        InvalidInput: there is no such device.
    """
    try:
        model.to(torch.device(device))
    except (RuntimeError, AssertionError, NotImplementedError) as cause:
        message = str(cause).strip().splitlines()[0].rstrip(".")
        raise InvalidInput(f"The model cannot be moved to --device {device} ({message}); see ptif doctor.") from cause
