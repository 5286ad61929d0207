"""What is left out of training, or relabelled, and under which protocol: the question retraining answers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any, final

import torch
from jaxtyping import Bool
from torch import Tensor

from ..core.errors import InvalidInput, name_ids


class Protocol(Enum):
    """How subsets were chosen. Numbers of different protocols are never put side by side."""

    HALVES = "half-subset LDS"
    DROPS = "small-drop LDS"
    LEAVE_ONE_OUT = "leave-one-out"
    GROUPS = "group removal"
    RELABELLED = "relabelling"
    OWN = "own subsets"


@final
@dataclass(frozen=True, eq=False)
class Subsets:
    """Training sets to train on, each a part of the same `n` examples, perhaps with other labels.

    Made with `halves`, `drops`, `leave_one_out`, `groups`, `relabelled` or `of`.

    Args:
        kept: bool [S, N], which examples each subset keeps.
        protocol: how they were chosen.
        detail: the protocol's numbers, in words.
        labels: empty, or for each subset the labels that differ from the dataset's, `{index: label}`.

    >>> Subsets.halves(10, count=3)
    Subsets(half-subset LDS: 3 subsets of 50 % of 10 examples)
    """

    kept: Bool[Tensor, "s n"]
    protocol: Protocol
    detail: str
    labels: tuple[Mapping[int, Any], ...] = ()

    @staticmethod
    def halves(n: int, count: int = 100, fraction: float = 0.5, seed: int = 0) -> Subsets:
        """Random subsets that keep `fraction` of the examples: the protocol of datamodels and TRAK."""
        keep = _share(n, fraction, "fraction")
        detail = f"{_number(count)} subsets of {100 * keep / n:.3g} % of {n} examples"
        return Subsets(_random(n, count, keep, seed), Protocol.HALVES, detail)

    @staticmethod
    def drops(n: int, count: int = 100, share: float = 0.01, seed: int = 0) -> Subsets:
        """Random subsets that leave out only a small `share` of the examples."""
        out = _share(n, share, "share")
        detail = f"{_number(count)} times {100 * out / n:.3g} % of {n} examples left out"
        return Subsets(_random(n, count, n - out, seed), Protocol.DROPS, detail)

    @staticmethod
    def leave_one_out(n: int, ids: Sequence[int] | Tensor | None = None) -> Subsets:
        """Every example of `ids` (default: of all) left out, one at a time."""
        chosen = range(n) if ids is None else [int(i) for i in ids]
        made = Subsets.groups(n, [[i] for i in chosen])
        return Subsets(made.kept, Protocol.LEAVE_ONE_OUT, f"{len(made)} of {n} examples, one at a time")

    @staticmethod
    def groups(n: int, groups: Sequence[Sequence[int] | Tensor]) -> Subsets:
        """Each group of examples left out together."""
        if not len(groups):
            raise InvalidInput("No groups were given to leave out; give at least one list of indices.")
        kept = torch.ones(len(groups), n, dtype=torch.bool)
        for row, group in zip(kept, groups, strict=True):
            row[_ids(n, group)] = False
        if not bool(kept.any(1).all()):
            raise InvalidInput(
                f"A group leaves out all {n} examples, so nothing is left to train on; give a smaller one."
            )
        sizes = sorted({int(size) for size in (~kept).sum(1)})
        words = f"{sizes[0]}" if len(sizes) == 1 else f"{sizes[0]} to {sizes[-1]}"
        return Subsets(kept, Protocol.GROUPS, f"{len(kept)} groups of {words} of {n} examples")

    @staticmethod
    def relabelled(n: int, changes: Sequence[Mapping[int, Any]]) -> Subsets:
        """All examples are kept, and some get other labels: `changes[s]` maps indices to labels."""
        if not len(changes):
            raise InvalidInput("No changes of labels were given; give at least one {index: label}.")
        for change in changes:
            _ids(n, list(change))
        kept = torch.ones(len(changes), n, dtype=torch.bool)
        plain = tuple({int(i): _plain(label) for i, label in change.items()} for change in changes)
        return Subsets(kept, Protocol.RELABELLED, f"{len(changes)} changes of labels among {n} examples", plain)

    @staticmethod
    def of(kept: Any) -> Subsets:
        """Subsets as they are, or from a bool matrix [S, N] of what each keeps."""
        if isinstance(kept, Subsets):
            return kept
        found = torch.as_tensor(kept)
        if found.dtype != torch.bool or found.ndim != 2 or 0 in found.shape:
            raise InvalidInput(
                f"Subsets are a bool matrix (subsets, training examples), True where kept; got {found.dtype} of shape "
                f"{tuple(found.shape)}."
            )
        empty = (~found.any(1)).nonzero().flatten().tolist()
        if empty:
            raise InvalidInput(f"Subset {name_ids(empty)} keeps no example; each needs at least one.")
        return Subsets(found, Protocol.OWN, f"{len(found)} subsets of {found.shape[1]} examples")

    @property
    def n(self) -> int:
        """N, the number of training examples they are parts of."""
        return self.kept.shape[1]

    def __len__(self) -> int:
        return len(self.kept)

    def change(self, at: int) -> Mapping[int, Any]:
        """The labels of subset `at` that differ from the dataset's."""
        return self.labels[at] if self.labels else {}

    @property
    def name(self) -> str:
        """The protocol with its numbers: printed beside every number that follows from it."""
        return f"{self.protocol.value}: {self.detail}"

    def __repr__(self) -> str:
        return f"Subsets({self.name})"


def _random(n: int, count: int, keep: int, seed: int) -> Bool[Tensor, "s n"]:
    generator = torch.Generator().manual_seed(seed)
    kept = torch.zeros(_number(count), n, dtype=torch.bool)
    for row in kept:
        row[torch.randperm(n, generator=generator)[:keep]] = True
    return kept


def _number(count: int) -> int:
    if count < 1:
        raise InvalidInput(f"The number of subsets must be at least 1, got {count}.")
    return count


def _share(n: int, share: float, name: str) -> int:
    """So many of `n` examples; at least one stays and one goes."""
    if n < 2 or not 0.0 < share < 1.0:
        raise InvalidInput(f"`{name}` must lie between 0 and 1 with at least 2 examples, got {share} of {n}.")
    return min(max(round(n * share), 1), n - 1)


def _ids(n: int, ids: Sequence[int] | Tensor) -> Tensor:
    found = torch.as_tensor(ids, dtype=torch.long).reshape(-1)
    outside = found[(found < 0) | (found >= n)].tolist()
    if outside:
        raise InvalidInput(f"Index {name_ids(outside)} is outside the training data, whose items are 0 to {n - 1}.")
    if not len(found):
        raise InvalidInput("A group is empty; give at least one index to each.")
    return found


def _plain(label: Any) -> Any:
    return label.tolist() if isinstance(label, Tensor) else label
