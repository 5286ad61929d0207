"""Which test examples a run is about: labels, found without loading inputs where possible, and picks per class."""

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
from ..problem.data import Source, same
from ..problem.model_state import same_rng
from .console import log

_ATTRIBUTES = ("targets", "labels")
_COLUMNS = ("label", "labels")


def plain(label: Any) -> Any:
    """A label as JSON knows it: `.item()` of a single number, lists of several.

    >>> plain(torch.tensor([3])), plain(torch.tensor([0.5, 1.0]))
    (3, [0.5, 1.0])
    """
    if isinstance(label, (Tensor, np.ndarray, np.generic)):
        size = label.numel() if isinstance(label, Tensor) else label.size
        return label.item() if size == 1 else label.tolist()
    if isinstance(label, (tuple, list)):
        return [plain(x) for x in label]
    return label


def labels_of(data: Any) -> list[Any]:
    """The label of every item, in dataset order.

    `.targets`, `.labels`, the last tensor of a `TensorDataset` or a "label" column are used where they are found
    (through `Subset` and `ConcatDataset`, with the dataset's `target_transform`) and agree with the first item;
    otherwise every item is read once.
    """
    source = Source.of(data)
    quick = _quick(source.dataset)
    if quick is not None and len(quick) == len(source):
        with same_rng():
            first = _target(source.item(0))
        if same(plain(first), plain(quick[0])):
            return [plain(x) for x in quick]
    log.info("Reading all %d items of the test data for their labels.", len(source))
    found: list[Any] = []
    with same_rng():
        batches = track(source.batches(), len(source), "labels", lambda pair: len(pair[0]), "ex")
        for ids, batch in batches:
            found += split(inputs_and_targets(batch)[2], len(ids))
    return found


def split(targets: Any, n: int) -> list[Any]:
    """One plain label per example of a batch."""
    if isinstance(targets, (Tensor, np.ndarray)) and targets.ndim and len(targets) == n:
        return [plain(t) for t in targets]
    if isinstance(targets, (tuple, list)) and len(targets) == n:
        return [plain(t) for t in targets]
    return [plain(targets)] * n if n == 1 else [None] * n


def _target(item: Any) -> Any:
    return inputs_and_targets(item)[2]


def _quick(dataset: Any) -> Sequence[Any] | None:
    if isinstance(dataset, Subset):
        below = _quick(dataset.dataset)
        return None if below is None else [below[int(i)] for i in dataset.indices]
    if isinstance(dataset, ConcatDataset):
        parts = [_quick(d) for d in dataset.datasets]
        if any(p is None for p in parts):
            return None
        return [x for p in parts if p is not None for x in p]
    if isinstance(dataset, TensorDataset):
        return list(dataset.tensors[-1])
    found = _attribute(dataset)
    if found is None:
        return None
    changed = getattr(dataset, "target_transform", None)
    return [changed(x) for x in found] if callable(changed) else found


def _attribute(dataset: Any) -> Sequence[Any] | None:
    for name in _ATTRIBUTES:
        found = getattr(dataset, name, None)
        if isinstance(found, (Tensor, np.ndarray, list, tuple)) and len(found) == len(dataset):
            return list(found)
    columns = getattr(dataset, "column_names", None)
    if isinstance(columns, list):
        for name in _COLUMNS:
            if name in columns:
                return list(dataset[name])
    return None


# --------------------------------------------------------------------------- picks


def _classes(labels: Sequence[Any]) -> list[int]:
    odd = next((x for x in labels if isinstance(x, bool) or not isinstance(x, int)), None)
    if odd is not None:
        raise InvalidInput(
            f"Samples per class were asked for, but labels such as {odd!r} are not class numbers; "
            "set test_sample_num=False for all test items."
        )
    return sorted(set(labels))


def _per_class(labels: Sequence[Any], class_id: int, num_samples: int, start: int) -> list[int]:
    mine = [i for i, label in enumerate(labels) if label == class_id]
    picked = mine[start : start + num_samples]
    if len(picked) < num_samples:
        log.warning(
            "Class %s has %d test items, so of the %d asked for from position %d only %d are taken.",
            class_id, len(mine), num_samples, start, len(picked),
        )  # fmt: skip
    return picked


def get_dataset_sample_ids_per_class(
    class_id: int, num_samples: int, test_loader: Any, start_index: int = 0
) -> list[int]:
    """Dataset indices of items `start_index` to `start_index + num_samples` of one class; fewer if there are fewer."""
    return _per_class(labels_of(test_loader), class_id, num_samples, int(start_index or 0))


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
    labels = labels_of(test_loader)
    found = _classes(labels)
    classes = found if num_classes is None else list(range(num_classes))
    by_class = {str(c): _per_class(labels, c, num_samples, int(start_index or 0)) for c in classes}
    return by_class, [i for ids in by_class.values() for i in ids]


def chosen(test: Any, num: Any, start: Any, num_classes: int | None) -> list[int]:
    """The test items of a run: all from `start` on, or `num` per class from `start` of each.

    Raises:
        InvalidInput: none is left.
    """
    at, size = int(start or 0), len(Source.of(test))
    ids = get_dataset_sample_ids(num, test, num_classes, at)[1] if num else list(range(at, size))
    if not ids:
        where = "any class" if num else f"the test data, which have {size} items"
        raise InvalidInput(f"test_sample_start_per_class={at} lies behind the end of {where}; start lower.")
    return ids


def picked_tensor(ids: Sequence[int]) -> Tensor:
    """Indices as the engine takes them."""
    return torch.tensor(list(ids), dtype=torch.long)
