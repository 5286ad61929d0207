"""A few removals carried out by retraining, to check that scores predict what happens."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, final

import torch
from jaxtyping import Float
from torch import Tensor

from ..core.errors import InvalidInput
from ..core.validate import whole_number
from ..problem.data import Source
from ..problem.model_state import plain_autograd
from ..scores.scores import MEAN, Scores
from .correlate import RESAMPLES, Estimate, resampled_ids
from .retraining import retrain
from .subsets import Subsets

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@final
@dataclass(frozen=True)
class Removal:
    """One group that was removed, and the change that it made to one query."""

    why: str
    query: int
    ids: tuple[int, ...]
    predicted: float
    actual: float
    error: float
    """Standard error of `actual` over seeds; NaN with one seed."""


@final
@dataclass(frozen=True, repr=False)
class Verification:
    """Predicted against measured change for a few removals; printed, it is a verdict in one sentence and a table.

    Args:
        removals: the groups that were removed.
        r: correlation of predicted with measured over all removals, with Fisher's interval.
        slope: least-squares slope of measured on predicted, with an interval from resampled removals.
        moved: mean change of the strongest predictions in the predicted direction, in units of the root mean square
            change by random groups; its interval resamples them.
        protocol: a description.
    """

    removals: tuple[Removal, ...]
    r: Estimate
    slope: Estimate
    moved: Estimate
    protocol: str

    @property
    def distinguishable(self) -> bool:
        """Whether the effect of the top of the ranking can be distinguished from noise."""
        return self.moved.low > 0

    @property
    def sentence(self) -> str:
        """The verdict."""
        top = sum(r.why != "random" for r in self.removals)
        conclusion = (
            "the top of the ranking is distinguishable from noise"
            if self.distinguishable
            else "the top of the ranking is NOT distinguishable from noise"
        )
        return (
            f"Over {len(self.removals)} removals, predicted and measured change correlate with r = {_interval(self.r)} "
            f"and slope {_interval(self.slope)}; the {top} strongest moved their query {self.moved.value:.1f} times as "
            f"far as random groups do, in the predicted direction ({self.moved.low:.1f} to {self.moved.high:.1f}): "
            f"{conclusion}."
        )

    def plot(self) -> Figure:
        """Predicted against measured change, with the diagonal.

        Raises:
            MissingExtra: matplotlib is not installed.
        """
        from ..plots.query import plot_agreement

        return plot_agreement([r.predicted for r in self.removals], [r.actual for r in self.removals])

    def __str__(self) -> str:
        lines = [self.sentence, f"  {self.protocol}"]
        lines.append(f"  {'removed':<22}{'query':>7}{'predicted':>12}{'measured':>12}")
        for r in self.removals:
            around = "" if math.isnan(r.error) else f" +- {r.error:.2g}"
            lines.append(f"  {r.why:<22}{r.query:>7}{r.predicted:>+12.3g}{r.actual:>+12.3g}{around}")
        return "\n".join(lines)

    __repr__ = __str__


def _interval(e: Estimate) -> str:
    return f"{e.value:.2f} ({e.low:.2f} to {e.high:.2f})"


@plain_autograd()
def verify(
    scores: Scores,
    recipe: Any,
    n: int = 12,
    size: int | None = None,
    seeds: int | Sequence[int] = 3,
    *,
    train: Any = None,
    queries: Any = None,
    measure: Any = None,
    folder: str | os.PathLike[str] | None = None,
    workers: int | None = None,
) -> Verification:
    """Remove `n` groups of examples, retrain, and compare with what the scores predicted.

    The groups are chosen for statistical power. A third of them are the most helpful examples of the queries with the
    largest predicted effects, a third the most harmful examples of such queries, and a third random groups for
    contrast. Groups are removed because one example changes less than the noise of training. `(n + 1) * seeds`
    trainings.

    Args:
        scores: of every training example (no `top=`).
        recipe: how the model was trained: a `Recipe`, or `(dataset, seed) -> trained model`.
        n: removals, at least 6.
        size: examples in a group; `None`: 2 % of them.
        seeds: how many, or which; changes are means over seeds.
        train, queries: the data, where the scores do not carry them (loaded from a file).
        measure: what the scores are of; `None`: what they carry, or the training loss where they were loaded.
        folder, workers: as in `retrain`.

    Raises:
        InvalidInput: settings or scores that cannot be verified.
    """
    measure = scores.measure if measure is None else measure
    source = scores.train_source if train is None else train
    query_source = scores.query_source if queries is None else queries
    if source is None or query_source is None:
        raise InvalidInput(
            "These scores do not carry their data (they were loaded from a file); pass train= and queries=."
        )
    if scores.indices is not None:
        raise InvalidInput(
            "Only some training examples are held (top=, or a loader's sampler), so groups cannot be predicted; "
            "score without top=, and give a part of a dataset as torch.utils.data.Subset(dataset, indices)."
        )
    if scores.diagnostics.rows or bool((scores.query_ids == MEAN).any()):
        raise InvalidInput(
            "Rows of these scores are not single queries (a mean, groups, a contrast or a difference), and retraining "
            "measures queries one by one; verify the scores of the queries themselves."
        )
    whole_number("n", n, 6, hint="fewer removals say nothing of a correlation")
    count = max(1, scores.n_train // 50) if size is None else size
    whole_number("size", count, 1, scores.n_train // 2, hint="no more than half the training data")
    groups = _choose_groups(scores, n, count)
    query_source = _queries_of(scores, Source.of(source).read_alike(query_source))
    truth = retrain(
        recipe, Subsets.groups(scores.n_train, [ids for _, _, ids in groups]), seeds, train=source,
        queries=query_source, measure=measure, folder=folder, workers=workers,
    )  # fmt: skip
    if truth.lower_is_better != scores.lower_is_better:
        raise InvalidInput(f"The scores are of another measure than {truth.measure}; pass the same measure=.")
    removals = []
    for s, (why, q, ids) in enumerate(groups):
        change = truth.changes()[s, :, q]
        error = float(change.std() / len(change) ** 0.5) if len(change) > 1 else math.nan
        predicted = float(scores.values[q, ids].double().sum())
        removals.append(
            Removal(why, int(scores.query_ids[q]), tuple(ids.tolist()), predicted, float(change.mean()), error)
        )
    return judge(removals, f"{truth.name}; {truth.recipe}")


def _queries_of(scores: Scores, source: Source) -> Source:
    """The queries that the rows are of, where rows were picked or a sampler chose among the queries."""
    ids = scores.query_ids
    in_order = len(ids) == len(source) and bool((ids == torch.arange(len(ids))).all())
    fits = int(ids.min()) >= 0 and int(ids.max()) < len(source)
    return source.subset(ids) if fits and not in_order else source


def _choose_groups(scores: Scores, n: int, size: int) -> list[tuple[str, int, Tensor]]:
    """(why, row, members) of every removal: both ends for the queries with the largest sums, then random groups."""
    ends = {}
    for why, sign in (("most helpful", 1.0), ("most harmful", -1.0)):
        signed = sign * (scores.values if scores.lower_is_better else -scores.values)
        top = signed.topk(size, dim=1)
        ends[why] = (top.values.sum(1).argsort(descending=True, stable=True), top.indices)
    each = n // 3
    groups: list[tuple[str, int, Tensor]] = []
    for why, (order, members) in ends.items():
        groups += [(why, int(q), members[int(q)]) for q in order.repeat(-(-each // len(order)))[:each]]
    if len(scores) < each:
        # There are fewer queries than removals, so the next groups of the same queries are taken.
        groups = _next_groups(scores, ends, each, size)
    generator = torch.Generator().manual_seed(0)
    for j in range(n - len(groups)):
        _, q, _ = groups[j % len(groups)]
        groups.append(("random", q, torch.randperm(scores.n_train, generator=generator)[:size]))
    return groups


def _next_groups(
    scores: Scores, ends: dict[str, tuple[Tensor, Tensor]], each: int, size: int
) -> list[tuple[str, int, Tensor]]:
    groups: list[tuple[str, int, Tensor]] = []
    for why, (queries, _) in ends.items():
        rounds = min(-(-each // len(queries)), max(1, scores.n_train // (2 * size)))
        candidates = []
        for place in range(rounds):
            for q in queries.tolist():
                order = scores.helpful_order(q) if why == "most helpful" else scores.harmful_order(q)
                reason = why if place == 0 else f"{why}, {place + 1}"
                candidates.append((reason, q, order[place * size : (place + 1) * size]))
        groups += candidates[:each]
    return groups


def judge(removals: Sequence[Removal], protocol: str) -> Verification:
    """Work out the verdict on some removals."""
    x = torch.tensor([r.predicted for r in removals], dtype=torch.float64)
    y = torch.tensor([r.actual for r in removals], dtype=torch.float64)
    extreme = torch.tensor([r.why != "random" for r in removals])
    r = _correlation(x, y)
    # Fisher's z has a standard deviation of 1 / sqrt(n - 3).
    z, around = math.atanh(max(-1 + 1e-12, min(1 - 1e-12, r))), 1.96 / math.sqrt(len(removals) - 3)
    correlation = Estimate(r, math.tanh(z - around), math.tanh(z + around), protocol)
    slopes = torch.stack([_slope(x[p], y[p]) for p in resampled_ids(len(x), RESAMPLES)])
    slope = Estimate.of(float(_slope(x, y)), slopes, protocol)
    noise = float(y[~extreme].square().mean().sqrt()) if bool((~extreme).any()) else 1.0
    signed = (y * x.sign())[extreme] / (noise or 1.0)
    moved = Estimate.mean_of(signed, protocol, seed=1)
    return Verification(tuple(removals), correlation, slope, moved, protocol)


def _correlation(x: Float[Tensor, " n"], y: Float[Tensor, " n"]) -> float:
    a, b = x - x.mean(), y - y.mean()
    size = float(a.norm() * b.norm())
    return float(a @ b) / size if size > 0 else 0.0


def _slope(x: Float[Tensor, " n"], y: Float[Tensor, " n"]) -> Tensor:
    a = x - x.mean()
    slope: Tensor = (a @ (y - y.mean())) / (a @ a).clamp_min(1e-300)
    return slope
