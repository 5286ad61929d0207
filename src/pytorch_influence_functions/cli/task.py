"""The user's task file: a Python program that says which model was trained on which data."""

import sys
import traceback
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, Final, final

import torch

from ..core.errors import InvalidInput, UnknownName, nearest
from ..influence.method import AbstractMethod
from ..methods.names import as_method
from ..problem.data import Source
from ..problem.infer_loss import infer_objective
from ..problem.problem import Problem, check_model

MODULE: Final = "ptif_task"
# The old README's names work as well.
_MODEL = ("get_model", "get_my_model")
_LOADERS = ("get_dataloaders", "get_my_dataloaders")
_ASKED = ("measure", "method")
_TRAINED = ("loss", "weight_decay", "parameters", "checkpoints")
OPTIONS: Final = (*_TRAINED, *_ASKED)
"""What `get_options()` may return."""


@final
@dataclass(frozen=True, eq=False)
class Task:
    """What a task file says: the trained thing, the queries, and where it wishes them, a measure and a method."""

    path: Path
    problem: Problem
    queries: Source | None
    measure: Any = None
    method: AbstractMethod | None = None

    @property
    def asked(self) -> Source:
        """The queries.

        Raises:
            InvalidInput: the task has none.
        """
        if self.queries is None:
            raise InvalidInput(
                f"{self.path.name} gives no queries; let get_dataloaders() return (train, test), or define queries."
            )
        return self.queries


@final
@dataclass(frozen=True)
class Overrides:
    """What flags say about the problem, against the task file; `None` leaves it as it is there."""

    weight_decay: float | None = None
    batch_size: int | None = None
    device: str | None = None


def load(path: Path, overrides: Overrides | None = None) -> Task:
    """Run a task file and read what it defines.

    Raises:
        InvalidInput: no such file, an error inside it (with its line), or it lacks what is needed.
    """
    flags = overrides or Overrides()
    if not path.is_file():
        what = "is a folder" if path.is_dir() else "does not exist"
        raise InvalidInput(f"The task file {str(path)!r} {what}; give a Python file with get_model().")
    module = _executed(path)
    names = vars(module)
    if "problem" in names and _either(names, _MODEL):
        raise InvalidInput(f"{path.name} defines both problem and {_either(names, _MODEL)}; keep one of them.")
    options = _options(path, names)
    if "problem" in names:
        problem, queries = _given(path, names, options)
    else:
        problem, queries = _made(path, names, options, flags)
    changes = {k: v for k, v in vars(flags).items() if v is not None}
    if flags.device is not None:
        _to(problem.model, flags.device)
    problem = problem.with_(**changes) if changes else problem
    source = None if queries is None else Source.of(queries, flags.batch_size)
    return Task(path, problem, source, options.get("measure"), _method(path, options.get("method")))


def _executed(path: Path) -> ModuleType:
    """The file run once, as a module that its own functions can be found in."""
    module = ModuleType(MODULE)
    module.__file__ = str(path)
    # So that it can import what lies beside it, and worker processes what it defines.
    folder = str(path.parent.resolve())
    if folder not in sys.path:
        sys.path.insert(0, folder)
    sys.modules[MODULE] = module
    try:
        exec(compile(path.read_bytes(), str(path), "exec"), vars(module))
    except SyntaxError as cause:
        raise InvalidInput(f"{path.name} is not Python: {cause.msg} in line {cause.lineno}; correct it.") from cause
    except (Exception, SystemExit) as cause:
        raise _inside(path, "Running it", cause) from cause
    return module


def _inside(path: Path, what: str, cause: BaseException) -> InvalidInput:
    """An error of the user's own file, with the line it came through."""
    lines = [f.lineno for f in traceback.extract_tb(cause.__traceback__) if f.filename == str(path)]
    at = f", line {lines[-1]}" if lines else ""
    words = (str(cause).strip().splitlines() or ["no message"])[0].rstrip(".")
    return InvalidInput(f"{path.name}{at}: {what} failed with {type(cause).__name__}: {words}; correct the task file.")


def _either(names: Mapping[str, Any], known: tuple[str, ...]) -> str | None:
    return next((name for name in known if name in names), None)


def _call(path: Path, names: Mapping[str, Any], known: tuple[str, ...]) -> Any:
    name = _either(names, known)
    if name is None:
        mine = [k for k, v in names.items() if callable(v) and not k.startswith("_")]
        raise InvalidInput(
            f"{path.name} does not define {known[0]}().{nearest(known[0], mine)} Define get_model() and "
            "get_dataloaders(), or problem and queries."
        )
    if not callable(names[name]):
        raise InvalidInput(f"{name} in {path.name} is {type(names[name]).__name__}; make it a function.")
    try:
        return names[name]()
    except (Exception, SystemExit) as cause:
        raise _inside(path, f"{name}()", cause) from cause


def _options(path: Path, names: Mapping[str, Any]) -> dict[str, Any]:
    if "get_options" not in names:
        return {}
    found = _call(path, names, ("get_options",))
    if not isinstance(found, Mapping):
        raise InvalidInput(f"get_options() of {path.name} returns {type(found).__name__}; return a dictionary.")
    for name in found:
        if name not in OPTIONS:
            raise UnknownName(
                f"get_options() of {path.name} holds {name!r}.{nearest(str(name), OPTIONS)} It may hold "
                f"{', '.join(OPTIONS)}."
            )
    return dict(found)


def _method(path: Path, given: Any) -> AbstractMethod | None:
    """What `method` in `get_options()` means; as in `ptif.attribute`."""
    try:
        return None if given is None else as_method(given)
    except InvalidInput as error:
        error.args = (f"In get_options() of {path.name}: {error}",)
        raise


def _given(path: Path, names: Mapping[str, Any], options: Mapping[str, Any]) -> tuple[Problem, Any]:
    problem = names["problem"]
    if not isinstance(problem, Problem):
        raise InvalidInput(f"problem in {path.name} is {type(problem).__name__}; make it a ptif.Problem(...).")
    extra = next((name for name in options if name in _TRAINED), None)
    if extra is not None:
        raise InvalidInput(f"{path.name} gives {extra} in get_options() and a problem; give it to Problem(...).")
    return problem, names.get("queries")


def _made(path: Path, names: Mapping[str, Any], options: Mapping[str, Any], flags: Overrides) -> tuple[Problem, Any]:
    model = _call(path, names, _MODEL)
    loaders = _call(path, names, _LOADERS)
    check_model(model)
    if not isinstance(loaders, (tuple, list)) or len(loaders) != 2:
        what = f"{len(loaders)} things" if isinstance(loaders, (tuple, list)) else type(loaders).__name__
        raise InvalidInput(f"get_dataloaders() of {path.name} returns {what}; return two, (train, test).")
    train, queries = loaders
    trained = {name: options[name] for name in _TRAINED if name in options}
    objective = trained.pop("loss", None)
    if flags.device is not None:
        _to(model, flags.device)
    source = Source.of(train, flags.batch_size)
    objective = infer_objective(model, source) if objective is None else objective
    return Problem(model, objective, source, **trained), queries


def _to(model: torch.nn.Module, device: str) -> None:
    try:
        model.to(torch.device(device))
    except (RuntimeError, AssertionError, NotImplementedError) as cause:
        words = str(cause).strip().splitlines()[0].rstrip(".")
        raise InvalidInput(f"The model cannot be moved to --device {device} ({words}); see ptif doctor.") from cause
