"""Which test examples a run is about: their labels, read without loading inputs where possible, and picks per class."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import ConcatDataset, Subset, TensorDataset

from ..core.errors import InvalidInput
from ..core.progress import track
from ..objectives.base import inputs_and_targets
from ..problem.cutting import same
from ..problem.data import Source
from ..problem.random_state import same_rng
from .console import log

_LABEL_ATTRIBUTES = ("targets", "labels")
_LABEL_COLUMNS = ("label", "labels")


def json_label(label: Any) -> Any:
    """Turn a label into what JSON can hold: a single number, or a list of several.

    >>> json_label(torch.tensor([3])), json_label(torch.tensor([0.5, 1.0]))
    (3, [0.5, 1.0])
    """
    if isinstance(label, (Tensor, np.ndarray, np.generic)):
        size = label.numel() if isinstance(label, Tensor) else label.size
        return label.item() if size == 1 else label.tolist()
    if isinstance(label, (tuple, list)):
        return [json_label(x) for x in label]
    return label


def dataset_labels(data: Any) -> list[Any]:
    """The label of every item, in dataset order.

    The labels are taken from `.targets`, `.labels`, the last tensor of a `TensorDataset` or a "label" column, through
    `Subset` and `ConcatDataset` and with the dataset's `target_transform`, if they agree with the first item. Otherwise
    every item is read once.
    """
    source = Source.of(data).whole
    stored = _stored_labels(source.dataset)
    if stored is not None and len(stored) == len(source):
        with same_rng():
            first = _item_target(source.item(0))
        if same(json_label(first), json_label(stored[0])):
            return [json_label(x) for x in stored]
    log.info("Reading all %d items of the test data for their labels.", len(source))
    labels: list[Any] = []
    with same_rng():
        batches = track(source.batches(), len(source), "labels", lambda pair: len(pair[0]), "ex")
        for ids, batch in batches:
            labels += split_labels(inputs_and_targets(batch)[2], len(ids))
    return labels


def split_labels(targets: Any, n: int) -> list[Any]:
    """Split the targets of a batch into one JSON label per example."""
    if isinstance(targets, (Tensor, np.ndarray)) and targets.ndim and len(targets) == n:
        return [json_label(t) for t in targets]
    if isinstance(targets, (tuple, list)) and len(targets) == n:
        return [json_label(t) for t in targets]
    return [json_label(targets)] * n if n == 1 else [None] * n


def _item_target(item: Any) -> Any:
    return inputs_and_targets(item)[2]


def _stored_labels(dataset: Any) -> Sequence[Any] | None:
    """The labels that a dataset stores apart from its items, `None` if it stores none."""
    if isinstance(dataset, Subset):
        whole = _stored_labels(dataset.dataset)
        return None if whole is None else [whole[int(i)] for i in dataset.indices]
    if isinstance(dataset, ConcatDataset):
        parts = [_stored_labels(d) for d in dataset.datasets]
        if any(p is None for p in parts):
            return None
        return [x for p in parts if p is not None for x in p]
    if isinstance(dataset, TensorDataset):
        return list(dataset.tensors[-1])
    labels = _label_attribute(dataset)
    if labels is None:
        return None
    transform = getattr(dataset, "target_transform", None)
    return [transform(x) for x in labels] if callable(transform) else labels


def _label_attribute(dataset: Any) -> Sequence[Any] | None:
    for name in _LABEL_ATTRIBUTES:
        labels = getattr(dataset, name, None)
        if isinstance(labels, (Tensor, np.ndarray, list, tuple)) and len(labels) == len(dataset):
            return list(labels)
    columns = getattr(dataset, "column_names", None)
    if isinstance(columns, list):
        for name in _LABEL_COLUMNS:
            if name in columns:
                return list(dataset[name])
    return None


# --------------------------------------------------------------------------- picks


def _class_numbers(labels: Sequence[Any]) -> list[int]:
    other = next((x for x in labels if isinstance(x, bool) or not isinstance(x, int)), None)
    if other is not None:
        raise InvalidInput(
            f"Samples per class were asked for, but labels such as {other!r} are not class numbers; "
            "set test_sample_num=False for all test items."
        )
    return sorted(set(labels))


def _pick_of_class(labels: Sequence[Any], class_id: int, num_samples: int, start: int) -> list[int]:
    members = [i for i, label in enumerate(labels) if label == class_id]
    picked = members[start : start + num_samples]
    if len(picked) < num_samples:
        log.warning(
            "Class %s has %d test items, so of the %d asked for from position %d only %d are taken.",
            class_id, len(members), num_samples, start, len(picked),
        )  # fmt: skip
    return picked


def get_dataset_sample_ids_per_class(
    class_id: int, num_samples: int, test_loader: Any, start_index: int = 0
) -> list[int]:
    """Dataset indices of items `start_index` to `start_index + num_samples` of one class; fewer if there are fewer.

    Args:
        class_id: the class.
        num_samples: how many items.
        test_loader: the test data; indices are positions in its dataset.
        start_index: how many items of the class come before.
    """
    return _pick_of_class(dataset_labels(test_loader), class_id, num_samples, int(start_index or 0))


def get_dataset_sample_ids(
    num_samples: int, test_loader: Any, num_classes: int | None = None, start_index: int = 0
) -> tuple[dict[str, list[int]], list[int]]:
    """Dataset indices of `num_samples` items per class from position `start_index` of each.

    Args:
        num_samples: per class.
        test_loader: a loader or dataset.
        num_classes: classes 0 to `num_classes - 1`; `None`: those that occur, sorted.
        start_index: position within each class.

    Returns:
        `(by_class, all)`: indices under the class number as a string, and all of them in that order.

    Raises:
        InvalidInput: labels are not class numbers.
    """
    labels = dataset_labels(test_loader)
    occurring = _class_numbers(labels)
    classes = occurring if num_classes is None else list(range(num_classes))
    by_class = {str(c): _pick_of_class(labels, c, num_samples, int(start_index or 0)) for c in classes}
    return by_class, [i for ids in by_class.values() for i in ids]


def choose_test_ids(
    test: Any, num: Any, start: Any, num_classes: int | None, start_name: str = "test_sample_start_per_class"
) -> list[int]:
    """Choose the test items of a run: all from `start` on, or `num` per class from `start` of each.

    Args:
        test: the test data.
        num: how many per class; False or None for all.
        start: the first.
        num_classes: classes 0 to `num_classes - 1`; `None`: those that occur.
        start_name: what the caller calls `start`, for the message.

    Raises:
        InvalidInput: none is left.
    """
    first, size = int(start or 0), len(Source.of(test).whole)
    ids = get_dataset_sample_ids(num, test, num_classes, first)[1] if num else list(range(first, size))
    if not ids:
        where = "any class" if num else f"the test data, which have {size} items"
        raise InvalidInput(f"{start_name}={first} lies behind the end of {where}; start lower.")
    return ids


def index_tensor(ids: Sequence[int]) -> Tensor:
    """Indices as a tensor of integers."""
    return torch.tensor(list(ids), dtype=torch.long)
