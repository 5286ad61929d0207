"""Training data with some examples changed: other labels, other inputs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, final

import torch
from torch import Tensor
from torch.utils.data import Dataset

from ..core.errors import InvalidInput, first_line
from ..objectives.base import label_key


@final
@dataclass(frozen=True, eq=False)
class EditedExamples(Dataset[Any]):
    """Some examples of a dataset, changed.

    Args:
        dataset: whose examples they are.
        indices: which of them, in this order.
        labels: new labels by index in `dataset`.
        inputs: new inputs by index in `dataset`; an example that is a mapping takes a mapping of the keys that change.
    """

    dataset: Any
    indices: Sequence[int]
    labels: Mapping[int, Any] = field(default_factory=dict)
    inputs: Mapping[int, Any] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, position: int) -> Any:
        index = self.indices[position]
        item = self.dataset[index]
        if index in self.inputs:
            try:
                item = with_inputs(item, self.inputs[index])
            except InvalidInput as cause:
                raise InvalidInput(f"At index {index}: {cause}") from cause
        return with_label(item, self.labels[index]) if index in self.labels else item


def label_of(item: Any) -> Any:
    """The label of an example.

    Args:
        item: one example as the dataset gives it.

    Raises:
        InvalidInput: it has none.
    """
    if isinstance(item, Mapping):
        return item[_label_key(item)]
    if not isinstance(item, (tuple, list)) or len(item) < 2:
        raise InvalidInput(
            f"An example of type {type(item).__name__} has no target to relabel; expected (inputs, target)."
        )
    return item[-1]


def with_label(item: Any, label: Any) -> Any:
    """An example with another label, of the type of its old one.

    Args:
        item: one example as the dataset gives it.
        label: the new label.

    Raises:
        InvalidInput: the example has no label.
    """
    new = _like(label_of(item), label)
    return {**item, _label_key(item): new} if isinstance(item, Mapping) else type(item)([*item[:-1], new])


def _label_key(item: Mapping[str, Any]) -> str:
    name = label_key(item)
    if name is None:
        raise InvalidInput("An example without 'labels' or 'label' cannot be relabelled; rename its target.")
    return name


def with_inputs(item: Any, inputs: Any) -> Any:
    """An example with other inputs, of the shape of its old ones, and its own label.

    Args:
        item: one example as the dataset gives it.
        inputs: the new inputs; for a mapping the keys that change; for several inputs a tuple of them.

    Raises:
        InvalidInput: they do not fit.
    """
    if isinstance(item, Mapping):
        unknown = [] if not isinstance(inputs, Mapping) else [k for k in inputs if k not in item]
        if not isinstance(inputs, Mapping) or unknown:
            raise InvalidInput(
                f"This example is a mapping with the keys {', '.join(map(repr, item))}; give its new inputs as a "
                "mapping of those that change."
            )
        return {**item, **{k: _of_shape(item[k], value, k) for k, value in inputs.items()}}
    if not isinstance(item, (tuple, list)) or len(item) < 2:
        raise InvalidInput(
            f"An example of type {type(item).__name__} has no inputs to replace; expected (inputs, target)."
        )
    *old, target = item
    # A tuple of numbers is a row of a table; one of tensors is an input each.
    several = isinstance(inputs, tuple) and not all(isinstance(value, (int, float)) for value in inputs)
    new = list(inputs) if len(old) > 1 or several else [inputs]
    if len(new) == len(old) + 1:
        given = "one input" if len(old) == 1 else f"{len(old)} inputs"
        raise InvalidInput(
            f"This example has {given} and {len(new)} were given; the label is no input: replace= takes the new inputs "
            "alone, and relabel= a new label."
        )
    if len(new) != len(old):
        raise InvalidInput(
            f"This example has {len(old)} inputs and {len(new)} were given; give a tuple with one for each."
        )
    return type(item)([*(_of_shape(a, b, "input") for a, b in zip(old, new, strict=True)), target])


def _of_shape(old: Any, new: Any, name: str) -> Any:
    if not isinstance(old, Tensor):
        return new
    try:
        tensor = torch.as_tensor(new, dtype=old.dtype)
    except (TypeError, ValueError, RuntimeError) as cause:
        raise InvalidInput(
            f"The new {name} of type {type(new).__name__} is no tensor of {old.dtype} ({first_line(cause)}); give one "
            f"of shape {tuple(old.shape)}."
        ) from cause
    if tensor.shape != old.shape:
        raise InvalidInput(
            f"The new {name} has shape {tuple(tensor.shape)} and the old one {tuple(old.shape)}; give one example's, "
            "without a batch axis."
        )
    return tensor


def _like(old: Any, label: Any) -> Any:
    if not isinstance(old, Tensor):
        return label
    new = torch.as_tensor(label, dtype=old.dtype)
    return new.reshape(old.shape) if new.numel() == old.numel() else new
