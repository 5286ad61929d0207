"""Which examples are left out of training, or relabelled, and the protocol that chose them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any, final

import torch
from jaxtyping import Bool
from torch import Tensor

from ..core.errors import InvalidInput, name_ids
from ..core.validate import whole_number


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
    """Training sets, each a part of the same `n` examples, possibly with other labels.

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
        """Random subsets that keep `fraction` of the examples: the protocol of datamodels and TRAK.

        Args:
            n: how many examples there are.
            count: how many subsets.
            fraction: the share of the examples that each keeps.
            seed: of the choice.
        """
        keep = _share_of(n, fraction, "fraction")
        detail = f"{count} subsets of {100 * keep / n:.3g} % of {n} examples"
        return Subsets(_draw(n, count, keep, seed), Protocol.HALVES, detail)

    @staticmethod
    def drops(n: int, count: int = 100, share: float = 0.01, seed: int = 0) -> Subsets:
        """Random subsets that leave out only a small `share` of the examples.

        Args:
            n: how many examples there are.
            count: how many subsets.
            share: the share of the examples that each leaves out.
            seed: of the choice.
        """
        out = _share_of(n, share, "share")
        detail = f"{count} times {100 * out / n:.3g} % of {n} examples left out"
        return Subsets(_draw(n, count, n - out, seed), Protocol.DROPS, detail)

    @staticmethod
    def leave_one_out(n: int, ids: Sequence[int] | Tensor | None = None) -> Subsets:
        """Every example of `ids` (default: of all) left out, one at a time.

        Args:
            n: how many examples there are.
            ids: which examples; `None`: all.
        """
        left_out = range(n) if ids is None else [int(i) for i in ids]
        singles = Subsets.groups(n, [[i] for i in left_out])
        return Subsets(singles.kept, Protocol.LEAVE_ONE_OUT, f"{len(singles)} of {n} examples, one at a time")

    @staticmethod
    def groups(n: int, groups: Sequence[Sequence[int] | Tensor]) -> Subsets:
        """Each group of examples left out together.

        Args:
            n: how many examples there are.
            groups: the indices of each group.
        """
        if not len(groups):
            raise InvalidInput("No groups were given to leave out; give at least one list of indices.")
        kept = torch.ones(len(groups), n, dtype=torch.bool)
        for row, group in zip(kept, groups, strict=True):
            row[_check_ids(n, group)] = False
        if not bool(kept.any(1).all()):
            raise InvalidInput(
                f"A group leaves out all {n} examples, so nothing is left to train on; give a smaller one."
            )
        sizes = sorted({int(size) for size in (~kept).sum(1)})
        size = f"{sizes[0]}" if len(sizes) == 1 else f"{sizes[0]} to {sizes[-1]}"
        return Subsets(kept, Protocol.GROUPS, f"{len(kept)} groups of {size} of {n} examples")

    @staticmethod
    def relabelled(n: int, changes: Sequence[Mapping[int, Any]]) -> Subsets:
        """All examples are kept, and some get other labels: `changes[s]` maps indices to labels.

        Args:
            n: how many examples there are.
            changes: for each subset the new labels by index.
        """
        if not len(changes):
            raise InvalidInput("No changes of labels were given; give at least one {index: label}.")
        for change in changes:
            _check_ids(n, list(change))
        kept = torch.ones(len(changes), n, dtype=torch.bool)
        labels = tuple({int(i): _as_python(label) for i, label in change.items()} for change in changes)
        return Subsets(kept, Protocol.RELABELLED, f"{len(changes)} changes of labels among {n} examples", labels)

    @staticmethod
    def of(kept: Any) -> Subsets:
        """Return subsets as they are, or make them from a bool matrix [S, N] of what each keeps.

        Args:
            kept: `Subsets`, or the matrix: True where an example is kept.
        """
        if isinstance(kept, Subsets):
            return kept
        matrix = torch.as_tensor(kept)
        if matrix.dtype != torch.bool or matrix.ndim != 2 or 0 in matrix.shape:
            raise InvalidInput(
                f"Subsets are a bool matrix (subsets, training examples), True where kept; got {matrix.dtype} of shape "
                f"{tuple(matrix.shape)}."
            )
        empty = (~matrix.any(1)).nonzero().flatten().tolist()
        if empty:
            raise InvalidInput(f"Subset {name_ids(empty)} keeps no example; each needs at least one.")
        return Subsets(matrix, Protocol.OWN, f"{len(matrix)} subsets of {matrix.shape[1]} examples")

    @property
    def n(self) -> int:
        """N, the number of training examples they are parts of."""
        return self.kept.shape[1]

    def __len__(self) -> int:
        return len(self.kept)

    def change(self, subset: int) -> Mapping[int, Any]:
        """The labels of one subset that differ from the dataset's.

        Args:
            subset: which one, counted from 0.
        """
        return self.labels[subset] if self.labels else {}

    @property
    def name(self) -> str:
        """The protocol with its numbers: printed beside every number that follows from it."""
        return f"{self.protocol.value}: {self.detail}"

    def __repr__(self) -> str:
        return f"Subsets({self.name})"


def _draw(n: int, count: int, keep: int, seed: int) -> Bool[Tensor, "s n"]:
    generator = torch.Generator().manual_seed(seed)
    kept = torch.zeros(whole_number("The number of subsets", count), n, dtype=torch.bool)
    for row in kept:
        row[torch.randperm(n, generator=generator)[:keep]] = True
    return kept


def _share_of(n: int, share: float, name: str) -> int:
    """A share of `n` examples as a number of them; at least one is inside and one outside."""
    if n < 2 or not 0.0 < share < 1.0:
        raise InvalidInput(f"`{name}` must lie between 0 and 1 with at least 2 examples, got {share} of {n}.")
    return min(max(round(n * share), 1), n - 1)


def _check_ids(n: int, ids: Sequence[int] | Tensor) -> Tensor:
    indices = torch.as_tensor(ids, dtype=torch.long).reshape(-1)
    outside = indices[(indices < 0) | (indices >= n)].tolist()
    if outside:
        raise InvalidInput(f"Index {name_ids(outside)} is outside the training data, whose items are 0 to {n - 1}.")
    if not len(indices):
        raise InvalidInput("A group is empty; give at least one index to each.")
    return indices


def _as_python(label: Any) -> Any:
    return label.tolist() if isinstance(label, Tensor) else label
