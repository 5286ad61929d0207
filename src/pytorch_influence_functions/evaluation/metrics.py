"""How well scores predict what retraining measured: each number carries its protocol, interval and ceiling."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from ..core.errors import InvalidInput, NonFinite, name_ids
from ..core.validate import whole_number
from ..scores.scores import Scores
from .correlate import (
    RESAMPLES,
    Estimate,
    Statistic,
    pearson,
    per_query,
    resampled,
    resampled_counts,
    slope,
    spearman,
    weighted_ranks,
)
from .subsets import Protocol
from .truth import Truth

_SUBSETS = (Protocol.HALVES, Protocol.DROPS, Protocol.OWN)
_REMOVALS = (Protocol.LEAVE_ONE_OUT, Protocol.GROUPS)
# The noise ceiling looks at no more than so many ways to halve the seeds.
_MAX_SPLITS = 50


def score_values(scores: Scores | Tensor, truth: Truth) -> Float[Tensor, "q n"]:
    """Scores as a matrix, checked against the truth.

    Raises:
        InvalidInput: only some examples are held, or the scores are of a measure of the other sense.
        NonFinite: a score is NaN or infinite.
    """
    if isinstance(scores, Tensor):
        bad = sorted(set((~torch.isfinite(scores)).nonzero()[:, 0].tolist())) if scores.ndim == 2 else []
        if bad:
            raise NonFinite(
                f"The scores hold NaN or infinity for query {name_ids(bad)}; nothing is ranked around them."
            )
        return scores.detach().cpu().double()
    if scores.indices is not None:
        raise InvalidInput(
            "Only some training examples are held (top=, or a loader's sampler); evaluation sums over all, so "
            "score without top=, and give a part of a dataset as torch.utils.data.Subset(dataset, indices)."
        )
    if scores.lower_is_better != truth.lower_is_better:
        raise InvalidInput(
            f"The scores are of a measure where {'lower' if scores.lower_is_better else 'higher'} is better and the "
            f"truth measured {truth.measure or 'one of the other sense'}; pass the same measure= to both."
        )
    return scores.values.double()


def _require_protocol(truth: Truth, known: tuple[Protocol, ...], metric: str, other: str) -> None:
    if truth.protocol not in known:
        raise InvalidInput(f"{metric} is not defined for {truth.protocol.value}; use {other}.")
    if len(truth.subsets) < 3:
        raise InvalidInput(f"{metric} needs at least 3 subsets, got {len(truth.subsets)}.")


def _over_subsets(scores: Scores | Tensor, truth: Truth, statistic: Statistic, resamples: int) -> Estimate:
    predicted = truth.predicted(score_values(scores, truth))
    actual = truth.changes().mean(1).T
    value = float(per_query(statistic, predicted, actual).mean())
    draws = resampled(statistic, predicted, actual, resamples)
    # Resampling leaves fewer distinct points, whose rank correlation is lower: the draws are centred on the value.
    draws = draws - draws.mean() + value
    return Estimate.of(value, draws if statistic is slope else draws.clamp(-1.0, 1.0), truth.name)


def lds(scores: Scores | Tensor, truth: Truth, resamples: int = RESAMPLES) -> Estimate:
    """Linear datamodelling score: rank correlation over subsets of predicted with measured change, mean over queries.

    The prediction of a subset is the sum of the scores of what it leaves out; the measurement is the mean over seeds.
    The interval resamples subsets. Half subsets and small drops are different protocols; each number names its own.

    Args:
        scores: scores of every example, `Scores` or [Q, N], positive where removal raises the measure.
        truth: what retraining measured.
        resamples: of the subsets, for the interval.

    Raises:
        InvalidInput: a truth of single removals (use `removal_correlation`), or shapes that do not fit.

    Reference: Park et al. (2023), "TRAK".
    """
    _require_protocol(truth, _SUBSETS, "The linear datamodelling score", "removal_correlation")
    return _over_subsets(scores, truth, spearman, resamples)


def removal_correlation(scores: Scores | Tensor, truth: Truth, resamples: int = RESAMPLES) -> Estimate:
    """Linear correlation over removals of predicted with measured change, mean over queries.

    For leave-one-out, group removal and PBRF truths. With `Recipe(hold_batches=True)` it is the trajectory-specific
    leave-one-out correlation.

    Args:
        scores: scores of every example, `Scores` or [Q, N], positive where removal raises the measure.
        truth: what retraining measured.
        resamples: of the subsets, for the interval.

    Raises:
        InvalidInput: a truth of random subsets (use `lds`), or shapes that do not fit.
    """
    _require_protocol(truth, _REMOVALS, "The correlation over removals", "lds")
    return _over_subsets(scores, truth, pearson, resamples)


def removal_slope(scores: Scores | Tensor, truth: Truth, resamples: int = RESAMPLES) -> Estimate:
    """Slope of measured on predicted change over removals, mean over queries: 1 where sizes are right.

    Args:
        scores: scores of every example, `Scores` or [Q, N], positive where removal raises the measure.
        truth: what retraining measured.
        resamples: of the subsets, for the interval.
    """
    _require_protocol(truth, _REMOVALS, "The slope over removals", "lds")
    return _over_subsets(scores, truth, slope, resamples)


def main_metric(truth: Truth) -> tuple[str, Statistic]:
    """The metric of the truth's protocol: its name, and the correlation it takes."""
    return ("LDS", spearman) if truth.protocol in _SUBSETS else ("correlation", pearson)


def evaluate_one(scores: Scores | Tensor, truth: Truth, resamples: int = RESAMPLES) -> Estimate:
    """Evaluate scores by the truth's own metric: `lds` over random subsets, `removal_correlation` over removals.

    Args:
        scores: scores of every example, `Scores` or [Q, N], positive where removal raises the measure.
        truth: what retraining measured.
        resamples: of the subsets, for the interval.
    """
    return (lds if truth.protocol in _SUBSETS else removal_correlation)(scores, truth, resamples)


def noise_ceiling(truth: Truth, statistic: Statistic | None = None) -> float | None:
    r"""The correlation that perfect predictions of the expected change would reach; None with one seed.

    The seeds are split into halves (every way, at most 50); the correlation rho between the halves' means, stepped up
    to all R seeds by Spearman-Brown, k rho / (1 + (k - 1) rho) with k = R / half, is the reliability of the mean, and
    its square root bounds the correlation of anything with it.

    Args:
        truth: what retraining measured.
        statistic: the correlation that the ceiling is for; `None`: that of the truth's own metric.
    """
    statistic = main_metric(truth)[1] if statistic is None else statistic
    seeds = len(truth.seeds)
    if seeds < 2:
        return None
    half = seeds // 2
    changes = truth.changes()
    correlations = []
    for first in _halves(seeds, half):
        rest = [r for r in range(seeds) if r not in first][:half]
        means = (changes[:, list(part)].mean(1).T for part in (first, rest))
        correlations.append(float(per_query(statistic, *means).mean()))
    rho = max(sum(correlations) / len(correlations), 0.0)
    k = seeds / half
    return float((k * rho / (1 + (k - 1) * rho)) ** 0.5)


def _halves(seeds: int, half: int) -> list[tuple[int, ...]]:
    splits = list(combinations(range(seeds), half))
    if len(splits) <= _MAX_SPLITS:
        return splits
    generator = torch.Generator().manual_seed(0)
    return [tuple(torch.randperm(seeds, generator=generator)[:half].tolist()) for _ in range(_MAX_SPLITS)]


# ------------------------------------------------------------------------------------------ without retraining


def mislabel_auc(suspicion: Tensor, planted: Tensor, resamples: int = RESAMPLES) -> Estimate:
    """Area under the ROC curve: the chance that a wrong label is suspected more than a right one (ties count half).

    Args:
        suspicion: [N], higher is more suspect; self-influence, say.
        planted: bool [N], which labels are wrong.
        resamples: of the examples, for the interval.

    The interval resamples examples.
    """
    suspicion, wrong = _check_suspicion(suspicion, planted)

    def area(weights: Tensor) -> Tensor:
        ranks = weighted_ranks(suspicion[None], weights)[:, 0]
        bad = (weights * wrong).sum(-1)
        good = (weights * ~wrong).sum(-1)
        # Ranks count from 0. Summed over the wrong labels they count the right labels below each.
        right_below = (ranks * weights * wrong).sum(-1) - bad * bad / 2
        return right_below / (bad * good).clamp_min(1)

    return _over_examples(area, len(suspicion), resamples, f"mislabel AUC, {int(wrong.sum())} of {len(wrong)} wrong")


def precision_at(suspicion: Tensor, planted: Tensor, k: int, resamples: int = RESAMPLES) -> Estimate:
    """Share of wrong labels among the `k` most suspected; the interval resamples those k.

    Args:
        suspicion: [N], higher is more suspect; self-influence, say.
        planted: bool [N], which labels are wrong.
        k: how many are checked.
        resamples: of those k, for the interval.
    """
    suspicion, wrong = _check_suspicion(suspicion, planted)
    whole_number("k", k, 1, len(wrong), hint="no more than there are examples")
    hits = wrong[suspicion.argsort(descending=True, stable=True)[:k]].double()
    name = f"precision at {k}, {int(wrong.sum())} of {len(wrong)} wrong"
    return _over_examples(lambda w: (w * hits).sum(-1) / w.sum(-1), k, resamples, name)


def found_when_checking(suspicion: Tensor, planted: Tensor, shares: Sequence[float]) -> list[float]:
    """Share of the wrong labels found after checking the most suspected `shares` of all examples.

    Args:
        suspicion: [N], higher is more suspect; self-influence, say.
        planted: bool [N], which labels are wrong.
        shares: of all examples, each between 0 and 1.
    """
    suspicion, wrong = _check_suspicion(suspicion, planted)
    ordered = wrong[suspicion.argsort(descending=True, stable=True)].double().cumsum(0)
    counts = [min(max(round(s * len(wrong)), 0), len(wrong)) for s in shares]
    return [float(ordered[c - 1] / ordered[-1]) if c else 0.0 for c in counts]


def _check_suspicion(suspicion: Tensor, planted: Tensor) -> tuple[Tensor, Tensor]:
    wrong = torch.as_tensor(planted)
    values = torch.as_tensor(suspicion).detach().cpu().double()
    if values.ndim != 1 or wrong.shape != values.shape or wrong.dtype != torch.bool:
        raise InvalidInput(
            f"Expected one number and one bool per example, got {tuple(values.shape)} numbers and {wrong.dtype} of "
            f"shape {tuple(wrong.shape)}."
        )
    bad = (~torch.isfinite(values)).nonzero().flatten().tolist()
    if bad:
        raise NonFinite(f"The suspicion of example {name_ids(bad)} is NaN or infinite; nothing is ranked around it.")
    if not 0 < int(wrong.sum()) < len(wrong):
        raise InvalidInput(f"{int(wrong.sum())} of {len(wrong)} labels are planted wrong; both kinds are needed.")
    return values, wrong


def _over_examples(value: Any, n: int, resamples: int, name: str) -> Estimate:
    everything = torch.ones(1, n, dtype=torch.float64)
    return Estimate.of(float(value(everything)), value(resampled_counts(n, resamples)), name)


def top_overlap(runs: Sequence[Scores], k: int = 10, resamples: int = RESAMPLES) -> Estimate:
    """The share of the `k` most helpful examples that two runs have in common: mean over pairs of runs and queries.

    Runs differ by seed, for instance. An example that only one run names depends on that run. Random runs share k / N.
    The interval resamples queries.

    Args:
        runs: scores of the same queries, one per run.
        k: how many of the most helpful examples are compared.
        resamples: of the queries, for the interval.
    """
    if len(runs) < 2:
        raise InvalidInput(f"Overlap is between runs: give at least 2 scores, got {len(runs)}.")
    whole_number("k", k, 1, runs[0].n_train, hint="no more than there are training examples")
    shapes = {(len(run), run.n_train) for run in runs}
    if len(shapes) > 1:
        raise InvalidInput(f"The runs score different data: (queries, training examples) are {sorted(shapes)}.")
    tops = [[{i for i, _ in run.helpful(q, k)} for q in range(len(run))] for run in runs]
    each = torch.tensor([[len(a & b) / k for a, b in zip(x, y, strict=True)] for x, y in combinations(tops, 2)])
    shared = each.double().mean(0)
    name = f"overlap of the top {k} between {len(runs)} runs"
    return _over_examples(lambda w: (w * shared).sum(-1) / w.sum(-1), len(shared), resamples, name)
