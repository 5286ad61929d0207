"""Uses of a result: pictures, and a loader of the most influential examples."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from torch.utils.data import DataLoader, Subset

from ..core.errors import InvalidInput
from ..core.validate import choice, finite_number
from ..plots import query
from ..problem.data import Source
from ..scores.scores import Scores
from .results import InfluenceResult

_WHICH = ("helpful", "harmful")


def plot_influences(
    result: InfluenceResult,
    train_ds: Any,
    test_ds: Any,
    test_index: int,
    k: int = 5,
    path: str | os.PathLike[str] | None = None,
    **options: Any,
) -> Any:
    """The README's picture: the test image, its helpful and its harmful training images, values above, labels below.

    Args:
        result: from `calc_img_wise`, `calc_all_grad_then_test` or `InfluenceResult.load`.
        train_ds, test_ds: the datasets or loaders of the run.
        test_index: position in the test data.
        k: examples per row.
        path: also write the picture there.
        options: `denormalize`, `class_names`: see `pytorch_influence_functions.plots.plot_influences`.

    Raises:
        InvalidInput: the test example was not part of the run.
        MissingExtra: matplotlib is not installed.
    """
    train, test = Source.of(train_ds).whole, Source.of(test_ds).whole
    scores = replace(result.scores, train_source=train, query_source=test)
    names = {"class_names": scores.class_names or train.class_names or test.class_names} | options
    return query.plot_influences(scores, result.position(test_index), k, train=train, queries=test, path=path, **names)


def plot_loo_scatter(
    predicted: Sequence[float],
    actual: Sequence[float],
    path: str | os.PathLike[str] | None = None,
    **options: Any,
) -> Any:
    """Predicted against actual change of the test loss after leaving examples out and retraining.

    Args:
        predicted: values of the result, in the order of `actual`.
        actual: loss after retraining without the example, minus the loss before.
        path: also write the picture there.
        options: those of `ptif.plots.plot_agreement`.

    Raises:
        MissingExtra: matplotlib is not installed.
    """
    return query.plot_agreement(predicted, actual, path=path, **options)


def influential_loader(
    result: InfluenceResult | Scores,
    train_ds: Any,
    k: int | None = None,
    *,
    fraction: float | None = None,
    which: str = "helpful",
    drop: bool = False,
    **options: Any,
) -> DataLoader[Any]:
    """A loader of the `k` most helpful (or most harmful) training examples, or of all others with `drop=True`.

    Args:
        result: the run, or `Scores`.
        train_ds: the training dataset, or a loader, whose batch size and collate function are taken over.
        k: how many examples; or
        fraction: which share of the training data.
        which: "helpful" or "harmful", by the mean over the run's test examples or the scores' queries.
        drop: leave these examples out instead.
        options: for the `DataLoader`; `shuffle=True` unless said otherwise.

    Raises:
        InvalidInput: not exactly one of `k` and `fraction`, or one out of range, or data of another length.
    """
    choice("which", which, _WHICH)
    ranked = _ranked(result, which)
    source, n = Source.of(train_ds).whole, len(ranked)
    if len(source) != n:
        raise InvalidInput(f"The training data have {len(source)} examples and the result is of {n}; pass its data.")
    if (k is None) == (fraction is None):
        raise InvalidInput("Give either k or fraction: how many examples, or which share of them.")
    if fraction is not None:
        finite_number("fraction", fraction, above=0, most=1)
    count = round(fraction * n) if fraction is not None else int(k or 0)
    if not 1 <= count <= n or (drop and count == n):
        raise InvalidInput(f"{count} of {n} training examples cannot be picked{' and dropped' if drop else ''}.")
    picked = ranked[:count]
    if drop:
        dropped = set(picked)
        picked = [i for i in range(n) if i not in dropped]
    settings: dict[str, Any] = {
        "batch_size": source.batch_size,
        "collate_fn": source.collate,
        "shuffle": True,
    } | options
    return DataLoader(Subset(source.dataset, picked), **settings)


def _ranked(result: InfluenceResult | Scores, which: str) -> list[int]:
    """All training examples, from one end of the mean ranking to the other."""
    order = getattr(result, f"{which}_order", None)
    ranked = getattr(result, which) if order is None else order()
    return [int(i) for i in ranked]
