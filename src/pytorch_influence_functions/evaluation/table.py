"""Many methods against one truth: a table, its figure, and paired comparisons."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, final

import torch
from torch import Tensor

from ..core.errors import InvalidInput, UnknownName, nearest, require
from ..core.token_text import token_text_of
from ..curvature.base import AbstractCurvature
from ..curvature.exact import Identity
from ..damping.rules import Absolute
from ..influence.attribution import Influence
from ..influence.method import AbstractMethod
from ..methods.baselines import EmbeddingSimilarity, Random, TrainingLoss
from ..methods.bm25 import BM25
from ..methods.names import as_method
from ..problem.model_state import plain_autograd
from ..problem.problem import Problem
from ..scores.scores import Scores
from ..solvers.direct import Spectral
from .correlate import RESAMPLES, Estimate
from .metrics import evaluate_one, main_metric, noise_ceiling
from .truth import Truth

if TYPE_CHECKING:
    from matplotlib.figure import Figure

BASELINES: Mapping[str, AbstractMethod] = {
    "random": Random(),
    "loss": TrainingLoss(),
    "embedding similarity": EmbeddingSimilarity(),
    "gradient dot product": Influence(Identity(), Spectral(), Absolute(0.0)),
}
"""Compared in every table that is given a problem and queries; `BM25` too, where the data are texts."""


@final
@dataclass(frozen=True)
class Row:
    """One method's line."""

    name: str
    estimate: Estimate
    seconds: float | None
    models: int


@final
@dataclass(frozen=True, repr=False)
class Evaluation:
    """How well methods predict one truth; printed, it is a table with the protocol above it.

    Args:
        metric: "LDS" or "correlation".
        protocol: the protocol with its numbers.
        ceiling: what perfect predictions would reach with these seeds; None with one seed.
        rows: a line per method, best first.
        left_out: baselines that could not be computed, with the reason.
    """

    metric: str
    protocol: str
    ceiling: float | None
    rows: tuple[Row, ...]
    left_out: Mapping[str, str]

    def __getitem__(self, name: str) -> Estimate:
        """One method's number.

        Raises:
            UnknownName: no such method.
        """
        for row in self.rows:
            if row.name == name:
                return row.estimate
        raise UnknownName(f"No method {name!r} in this table.{nearest(name, [r.name for r in self.rows])}")

    def compare(self, a: str, b: str) -> Estimate:
        """By how much `a` is above `b`, with the interval of the paired difference.

        Args:
            a: a name in the table.
            b: another one.
        """
        return self[a].minus(self[b])

    def to_frame(self) -> Any:
        """A pandas DataFrame, a row per method, best first.

        Raises:
            MissingExtra: pandas is not installed.
        """
        frame = [
            {
                "method": row.name,
                self.metric: row.estimate.value,
                "low": row.estimate.low,
                "high": row.estimate.high,
                "of ceiling": None if not self.ceiling else row.estimate.value / self.ceiling,
                "seconds": row.seconds,
                "models": row.models,
            }
            for row in self.rows
        ]
        return require("pandas", "frame").DataFrame(frame).set_index("method")

    def plot(self) -> Figure:
        """A bar per method with its interval, and the ceiling as a line.

        Raises:
            MissingExtra: matplotlib is not installed.
        """
        from ..plots.bars import plot_bars

        values = {row.name: (row.estimate.value, row.estimate.low, row.estimate.high) for row in self.rows}
        return plot_bars(values, self.metric, self.ceiling, self.protocol)

    def __str__(self) -> str:
        wide = max(len(row.name) for row in self.rows)
        ceiling = "one seed, so no noise ceiling" if self.ceiling is None else f"noise ceiling {self.ceiling:.3f}"
        lines = [f"{self.metric} by {self.protocol}; {ceiling}; 95 % intervals over resampled subsets"]
        for row in self.rows:
            share = f"  {row.estimate.value / self.ceiling:6.0%} of ceiling" if self.ceiling else ""
            took = "" if row.seconds is None else f"  {row.seconds:7.1f} s"
            models = f"  {row.models} models" if row.models > 1 else ""
            lines.append(f"  {row.name:<{wide}}  {row.estimate}{share}{took}{models}")
        lines += [f"  {name:<{wide}}  not available: {why}" for name, why in self.left_out.items()]
        return "\n".join(lines)

    __repr__ = __str__


@plain_autograd()
def evaluate(
    methods: Any,
    truth: Truth,
    *,
    problem: Problem | None = None,
    queries: Any = None,
    measure: Any = None,
    resamples: int = RESAMPLES,
) -> Evaluation:
    """Compare scores, or methods that are run for it, with what retraining measured.

    With `problem` and `queries` the table includes the plain baselines: random numbers, training loss, embedding
    similarity, gradient dot product. Without them it includes random numbers only.

    Args:
        methods: scores (`Scores` or [Q, N]), or what `method=` takes, such as `ptif.ekfac()`, `"ekfac"` or
            `ptif.curvature.GGN()`: one, a list, or a mapping from names.
        truth: from `retrain` or `Truth.load`.
        problem: the trained model with its data; with checkpoints, every method is an ensemble.
        queries: those of the truth, in its order.
        measure: what the truth measured, `None` for the training loss.
        resamples: of the subsets, for intervals.

    Raises:
        InvalidInput: methods without a problem, two that are called the same, or scores that do not fit the truth.

    >>> from pytorch_influence_functions.evaluation import Subsets
    >>> values = torch.randn(4, 10)
    >>> subsets = Subsets.halves(10, count=20)
    >>> measured = ((~subsets.kept).double() @ values.double().T)[:, None]
    >>> truth = Truth(subsets, measured, torch.zeros(1, 4).double(), seeds=(0,))
    >>> round(evaluate(values, truth)["scores"].value, 6)
    1.0
    """
    if not isinstance(truth, Truth):
        raise InvalidInput(
            f"evaluate() compares with a truth from retraining, got {type(truth).__name__}; make one with "
            "ptif.evaluation.retrain(recipe, subsets, train=..., queries=...)."
        )
    shape = (truth.measured.shape[2], truth.subsets.n)
    scored, left_out = contenders(methods, shape, problem, queries, measure)
    rows = [Row(c.name, evaluate_one(c.scores, truth, resamples), c.seconds, c.models) for c in scored]
    rows.sort(key=lambda row: -row.estimate.value)
    return Evaluation(main_metric(truth)[0], truth.name, noise_ceiling(truth), tuple(rows), left_out)


@final
@dataclass(frozen=True, eq=False)
class Contender:
    """A method's scores, the seconds they took, and the number of models they come from."""

    name: str
    scores: Scores | Tensor
    seconds: float | None = None
    models: int = 1


def contenders(
    methods: Any, shape: tuple[int, int], problem: Problem | None, queries: Any, measure: Any
) -> tuple[list[Contender], dict[str, str]]:
    """Everything that is compared, run if needed, baselines included; and the baselines left out, with the reason."""
    named = _named(methods)
    if not named:
        raise InvalidInput("No methods were given; give scores, or methods with problem= and queries=.")
    scored, left_out = [], {}
    for name, method in {**_baselines(problem, queries, named, shape), **named}.items():
        try:
            scored.append(_score(name, method, problem, queries, measure))
        except InvalidInput as cause:
            if name in named:
                raise
            left_out[name] = str(cause)
    return scored, left_out


def _named(methods: Any) -> dict[str, Any]:
    """What was given, by the name it has in the table."""
    if isinstance(methods, Mapping):
        return {name: _as_contender(method) for name, method in methods.items()}
    given = list(methods) if isinstance(methods, (list, tuple)) else [methods]
    named = [(method if isinstance(method, str) else "", _as_contender(method)) for method in given]
    names = [name or _default_name(method) for name, method in named]
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise InvalidInput(f"Two of the methods are called {twice!r}; give them by name, {{'name': method}}.")
    return dict(zip(names, (method for _, method in named), strict=True))


def _as_contender(given: Any) -> Any:
    """A method from what `method=` takes, such as a name or a curvature; anything else as it is."""
    is_method = isinstance(given, (str, AbstractCurvature)) or (callable(given) and not isinstance(given, Tensor))
    return as_method(given) if is_method else given


def _default_name(method: Any) -> str:
    if isinstance(method, AbstractMethod):
        return repr(method)
    return (method.provenance if isinstance(method, Scores) else "") or "scores"


def _baselines(
    problem: Problem | None, queries: Any, named: Mapping[str, Any], shape: tuple[int, int]
) -> dict[str, Any]:
    if problem is not None and queries is not None:
        texts = token_text_of(problem.data.dataset, 0) is not None
        known = {**BASELINES, **({"BM25": BM25()} if texts else {})}
        return {name: method for name, method in known.items() if name not in named}
    return {"random": torch.randn(shape, generator=torch.Generator().manual_seed(0))}


def _score(name: str, method: Any, problem: Problem | None, queries: Any, measure: Any) -> Contender:
    if isinstance(method, (Scores, Tensor)):
        return Contender(name, method, None, method.diagnostics.members if isinstance(method, Scores) else 1)
    if not isinstance(method, AbstractMethod):
        raise InvalidInput(f"{name} is a {type(method).__name__}; expected scores, or a method such as ptif.ekfac().")
    if problem is None or queries is None:
        raise InvalidInput(f"The method {name} has nothing to score; pass problem= and queries=, or its scores.")
    began = time.perf_counter()
    source = problem.data.read_alike(queries, problem.batch_size)
    scores = method.fit(problem, n_queries=len(source)).score(source, measure)
    return Contender(name, scores, time.perf_counter() - began, max(1, len(problem.checkpoints)))
