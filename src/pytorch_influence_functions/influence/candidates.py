"""Which training examples are scored, where not all of them are."""

from __future__ import annotations

from collections.abc import Sequence, Set
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ..core.errors import InfluenceError, InvalidInput
from ..problem.data import Source
from ..scores.indexing import parse_positions


@dataclass(frozen=True, eq=False)
class Candidates:
    """The training examples of every row of scores, by index in the problem's data.

    Args:
        wanted: one row for all, or one for each row of scores.
        positions: the same as places in the whole dataset, by which scores name them.
    """

    wanted: Int[Tensor, "r m"]
    positions: Int[Tensor, "r m"]

    @staticmethod
    def of(ids: Any, data: Source, n_rows: int) -> Candidates:
        """Read `ids=`: positions in the training dataset, or a list of them for every row.

        Raises:
            InvalidInput: nothing is picked, a position is outside the data, named twice or left out by a loader's
                sampler, or rows have candidates of different numbers.
        """
        positions = parse_candidates(ids, len(data.whole), n_rows)
        return Candidates(_indices_of(positions, data), positions)

    @property
    def union(self) -> Int[Tensor, " u"]:
        """Every candidate once, in ascending order."""
        union: Tensor = torch.unique(self.wanted)
        return union

    @property
    def width(self) -> int:
        """How many scores a row has."""
        return self.wanted.shape[1]

    def of_rows(self, rows: Int[Tensor, " q"]) -> Int[Tensor, "q m"]:
        """The candidates of some rows."""
        return self.wanted.expand(len(rows), -1) if len(self.wanted) == 1 else self.wanted[rows]

    def pick(
        self, rows: Int[Tensor, " q"], ids: Int[Tensor, " n"], values: Float[Tensor, "q n"]
    ) -> Float[Tensor, "q m"]:
        """What a block of scores on the examples `ids` (ascending) holds for the candidates, 0 for those outside."""
        wanted = self.of_rows(rows)
        place = torch.searchsorted(ids, wanted.contiguous()).clamp(max=len(ids) - 1)
        return torch.where(ids[place] == wanted, values.double().cpu().gather(1, place), 0.0)


def parse_candidates(ids: Any, size: int, n_rows: int) -> Int[Tensor, "r m"]:
    """Positions among `size` examples: one row for all rows of scores, or one for each.

    Raises:
        InvalidInput: as for `Candidates.of`.
    """
    lists = lists_of(ids)
    if lists is None:
        lists = [sorted(ids) if isinstance(ids, Set) else ids]
    elif len(lists) != n_rows:
        raise InvalidInput(
            f"ids= holds {len(lists)} lists for {n_rows} row{'' if n_rows == 1 else 's'} of scores; give one list "
            "for all, or one for each."
        )
    try:
        rows = [parse_positions(row, size, "training example") for row in lists]
    except InfluenceError as error:
        error.args = (f"In ids=, {str(error)[0].lower()}{str(error)[1:]}",)
        raise
    except (TypeError, ValueError, RuntimeError) as cause:
        raise InvalidInput(
            f"ids= must be positions in the training dataset, such as [3, 17], got {ids!r:.80}."
        ) from cause
    lengths = sorted({len(row) for row in rows})
    if len(lengths) > 1:
        raise InvalidInput(
            f"ids= names between {lengths[0]} and {lengths[-1]} training examples per query; name the same number "
            "for each, so that scores are one matrix."
        )
    return torch.stack(rows)


def lists_of(ids: Any) -> list[Any] | None:
    """One list per row of scores, or None where `ids` are positions for all."""
    if isinstance(ids, Tensor) or hasattr(ids, "ndim"):
        return list(ids) if ids.ndim == 2 else None
    nested = isinstance(ids, Sequence) and not isinstance(ids, (str, bytes)) and len(ids) > 0
    return list(ids) if nested and all(hasattr(row, "__len__") and not isinstance(row, str) for row in ids) else None


def _indices_of(positions: Tensor, data: Source) -> Tensor:
    """Indices in the data of places in the whole dataset, where a loader's sampler chose a part of it."""
    if data.positions is None:
        return positions
    place = torch.full((len(data.whole),), -1)
    place[data.positions] = torch.arange(len(data))
    indices = place[positions]
    if bool((indices < 0).any()):
        data.index_of(int(positions[indices < 0][0]))  # says so in words
    return indices
