"""Methods by name, and everything else that `method=` takes: one table for Python and for the command line."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Mapping
from typing import Any, Final, TypeAlias

from ..core.errors import InvalidInput, UnknownName, nearest
from ..curvature.base import AbstractCurvature
from ..damping.rules import AbstractDamping
from ..influence.attribution import Influence
from ..influence.method import AbstractMethod, Fitted
from ..scaling.base import AbstractScaling
from ..solvers.auto import Auto
from ..solvers.base import AbstractSolver
from ..trajectory.along import Along
from ..trajectory.recording import RunLike
from ..trajectory.source import source
from ..trajectory.unrolled import unrolled
from . import papers, selection
from .baselines import EmbeddingSimilarity, Random, RepresenterPoints, TrainingLoss
from .bm25 import BM25

AUTO: Final = "auto"
METHODS: Final[Mapping[str, Callable[[], Influence]]] = {
    AUTO: Influence,
    "arnoldi": papers.arnoldi,
    "astra": papers.astra,
    "blockwise": papers.blockwise,
    "datainf": papers.datainf,
    "diagonal": papers.diagonal,
    "dual": papers.dual,
    "ekfac": papers.ekfac,
    "exact": papers.exact,
    "gauss_newton": papers.gauss_newton,
    "grad_cos": papers.grad_cos,
    "grad_dot": papers.grad_dot,
    "kfac": papers.kfac,
    "koh_liang": papers.koh_liang,
    "lissa": papers.lissa,
    "nystrom": papers.nystrom,
    "relatif": papers.relatif,
    "shampoo": papers.shampoo,
    "trak": papers.trak,
}
"""Every method that needs no argument."""

_WITH_ARGUMENTS: Final[Mapping[str, Callable[..., AbstractMethod]]] = {
    "along": papers.along,
    "less": selection.less,
    "one_step_newton": papers.one_step_newton,
    "source": source,
    "tracin": papers.tracin,
    "trackstar": selection.trackstar,
    "unrolled": unrolled,
}

_BASELINES: Final[Mapping[str, Callable[..., AbstractMethod]]] = {
    kind.__name__: kind for kind in (BM25, EmbeddingSimilarity, Random, RepresenterPoints, TrainingLoss)
}

# Of those with arguments, which take a whole training run and nothing else.
_OF_A_RUN: Final = ("along", "less", "trackstar", "unrolled")

MethodLike: TypeAlias = AbstractMethod | AbstractCurvature | str | Callable[..., AbstractMethod | AbstractCurvature]

# Parts of a method that are easily taken for one, and how each is passed on.
_PARTS: Final[tuple[tuple[str, type | tuple[type, ...], str], ...]] = (
    ("solver", (AbstractSolver, Auto), "method=ptif.Influence(ptif.curvature.GGN(), solver={}(...))"),
    ("damping", AbstractDamping, "damping={}(...)"),
    ("scaling", AbstractScaling, "method=ptif.Influence(scaling={}(...))"),
)


def find_method(name: str) -> Influence:
    """The method of this name; case, spaces, dashes and underscores do not matter.

    Args:
        name: one of `METHODS`, such as `"ekfac"`.

    Raises:
        UnknownName: there is none; the nearest one is offered.
        InvalidInput: the method needs arguments, so its name alone is not enough.

    >>> find_method("Grad-Dot") == papers.grad_dot()
    True
    """
    by_key = {_key(known): known for known in (*METHODS, *_WITH_ARGUMENTS)}
    known = by_key.get(_key(name))
    if known is None:
        baseline = next((kind for kind in _BASELINES if _key(kind) == _key(name)), None)
        if baseline is not None:
            raise UnknownName(
                f"There is no method {name!r} among those with a name; it is a baseline, which Python takes as "
                f"method=ptif.methods.{baseline}({', '.join(f'{n}=...' for n in _required(_BASELINES[baseline]))})."
            )
        close = nearest(name.strip().lower(), by_key.values())
        raise UnknownName(f"There is no method {name!r}.{close} The names are {', '.join(METHODS)}.")
    if known in _WITH_ARGUMENTS:
        needed = _required(_WITH_ARGUMENTS[known])
        written = ", ".join(f"{argument}=..." for argument in needed)
        raise InvalidInput(
            f"The method {known!r} needs {', '.join(needed)}, which a name does not give; write "
            f"ptif.methods.{known}({written})."
        )
    return METHODS[known]()


def as_method(given: Any) -> AbstractMethod:
    """What `method=` means: a method, a name, a curvature, or a function or class that makes one of them.

    Args:
        given: a method such as `ptif.ekfac()`; its name, `"ekfac"`; its function, `ptif.ekfac`; a curvature, which
            stands for the `Influence` with it; `None` for `Influence()`, which chooses by size.

    Raises:
        InvalidInput: it is something else; the message says how that is passed on.

    >>> as_method("ekfac") == as_method(papers.ekfac) == papers.ekfac()
    True
    """
    if given is None:
        return Influence()
    if isinstance(given, str):
        return find_method(given)
    method = _call(given) if _makes_one(given) else given
    if isinstance(method, AbstractCurvature):
        return Influence(method)
    if isinstance(method, AbstractMethod):
        return method
    raise InvalidInput(_refusal(given))


def along_the_run(run: RunLike, given: Any = None) -> AbstractMethod:
    """What `run=` means: the method at every checkpoint, or the method of the run where it is asked of one.

    Args:
        run: as for `papers.along`.
        given: as for `as_method`; `None`: `ekfac()`; `"less"`, `"trackstar"` and `"unrolled"` are made of the run.

    Raises:
        InvalidInput: as `Along` and `as_method`.
    """
    for name in _OF_A_RUN:
        of_run = _WITH_ARGUMENTS[name]
        if given is of_run or (isinstance(given, str) and _key(given) == _key(name)):
            return of_run(run)
    return Along(run, papers.ekfac() if given is None else as_method(given))


def _key(name: str) -> str:
    """The name without what people spell differently."""
    return re.sub(r"[^a-z0-9]", "", name.lower())


def _required(function: Callable[..., Any]) -> list[str]:
    """The parameters that have no default."""
    return [p.name for p in inspect.signature(function).parameters.values() if p.default is p.empty]


def _makes_one(given: Any) -> bool:
    """Whether this is a method or curvature that was not called: a class, or a function of `ptif.methods`."""
    if isinstance(given, type):
        return issubclass(given, (AbstractMethod, AbstractCurvature)) and not inspect.isabstract(given)
    return inspect.isfunction(given) and given in (*METHODS.values(), *_WITH_ARGUMENTS.values())


def _call(given: Callable[..., Any]) -> Any:
    needed = _required(given)
    if needed:
        written = ", ".join(f"{name}=..." for name in needed)
        raise InvalidInput(
            f"method={given.__name__} is not called and needs {', '.join(needed)}; write "
            f"method={given.__name__}({written})."
        )
    return given()


def _refusal(given: Any) -> str:
    kind = given if isinstance(given, type) else type(given)
    for part, kinds, advice in _PARTS:
        if issubclass(kind, kinds):
            return f"{kind.__name__} is a {part}, one part of a method; write {advice.format(kind.__name__)}."
    if isinstance(given, Fitted):
        return f"method= is fitted already, as {kind.__name__}; call its score(queries)."
    description = f"the class {kind.__name__}" if isinstance(given, type) else kind.__name__
    return (
        "method= must be a method such as ptif.ekfac(), a name such as 'ekfac', or a curvature such as "
        f"ptif.curvature.GGN(), got {description}; leave it out to have one chosen by size."
    )
