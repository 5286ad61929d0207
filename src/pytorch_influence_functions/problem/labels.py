"""The plain label of every example, kept while batches pass by, so that no pass is made for labels alone."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from ..core.batches import whole_batch
from ..core.distributed import World, current
from ..core.errors import InvalidInput
from ..objectives.base import inputs_and_targets, label_key


class Labels:
    """The labels of `size` examples: one number each, where targets are numbers.

    >>> labels = Labels(3)
    >>> labels.add(torch.tensor([0, 2]), (torch.zeros(2, 4), torch.tensor([7, 9])))
    >>> labels.as_list(), labels.complete
    ([7, None, 9], False)
    """

    def __init__(self, size: int) -> None:
        self._values: Tensor | None = None
        self._visited = torch.zeros(size, dtype=torch.bool)
        self._known = torch.zeros(size, dtype=torch.bool)
        self.complete = size == 0
        """Whether every example has passed by, with a label or without."""

    def add(self, ids: Int[Tensor, " n"], batch: Any) -> None:
        """Keep the labels of one batch of examples `ids`."""
        if self.complete:
            return
        labels = labels_of(batch, len(ids))
        if labels is not None:
            if self._values is None:
                self._values = torch.zeros(len(self._known), dtype=labels.dtype)
            self._values[ids] = labels.to(self._values.dtype)
            self._known[ids] = True
        self._visited[ids] = True
        self.complete = bool(self._visited.all())

    def as_list(self, world: World | None = None) -> list[Any] | None:
        """Labels as plain Python, None for those that are not known; None where no label is.

        Workers that each saw a share of the examples put together what they saw.
        """
        values, known = self._values, self._known
        world = current() if world is None else world
        if world.size > 1:
            values, known = self._together(world)
        if values is None or not bool(known.any()):
            return None
        labels: list[Any] = values.tolist()
        return labels if bool(known.all()) else [x if k else None for x, k in zip(labels, known.tolist(), strict=True)]

    def _together(self, world: World) -> tuple[Tensor, Tensor]:
        own = torch.zeros(len(self._known), dtype=torch.float64) if self._values is None else self._values.double()
        times = world.all_sum(self._known.double())
        values = world.all_sum(own * self._known) / times.clamp_min(1)
        # A worker that saw no label does not know their kind: it learns it from the others.
        floating = self._values is not None and self._values.is_floating_point()
        floats = world.all_sum(torch.tensor([float(floating)], dtype=torch.float64))
        return values if bool(floats > 0) else values.round().long(), times > 0


def labels_of(batch: Any, n: int) -> Tensor | None:
    """One label per example, [n] on the CPU, where the batch's targets are one number each; else None."""
    batch = whole_batch(batch)
    if isinstance(batch, Mapping) and label_key(batch) is None:
        return None  # a text that is its own target
    try:
        targets = inputs_and_targets(batch)[2]
    except InvalidInput:
        return None
    if isinstance(targets, Tensor) and targets.shape[:1] == (n,) and targets.numel() == n:
        return targets.detach().reshape(-1).cpu()
    return None
