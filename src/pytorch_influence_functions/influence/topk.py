"""The extremes of a stream of score blocks, without ever holding all of them."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from jaxtyping import Float, Int
from torch import Tensor


@dataclass(eq=False)
class TopK:
    """Per query the `k` largest and the `k` smallest scores seen, with their training indices.

    Ties go to the smaller index, so the result does not depend on how the stream was cut.
    """

    n_queries: int
    k: int
    _held: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)

    def add(self, at: Int[Tensor, " q"], ids: Int[Tensor, " n"], values: Float[Tensor, "q n"]) -> None:
        """Merge one block: scores of queries `at` on training examples `ids`."""
        values = values.double().cpu()
        for row, q in enumerate(at.tolist()):
            found, index = values[row], ids
            if q in self._held:
                found = torch.cat([self._held[q][0], found])
                index = torch.cat([self._held[q][1], index])
            keep = _extremes(found, index, self.k)
            self._held[q] = (found[keep], index[keep])

    def result(self) -> tuple[Float[Tensor, "q m"], Int[Tensor, "q m"]]:
        """Scores and training indices, each row in descending order of score."""
        rows = []
        for q in range(self.n_queries):
            values, index = self._held[q]
            order = _order(values, index)
            rows.append((values[order], index[order]))
        return torch.stack([r[0] for r in rows]), torch.stack([r[1] for r in rows])


def _order(values: Tensor, index: Tensor) -> Tensor:
    """Descending by value, ascending by index among equals."""
    by_index = torch.argsort(index)
    return by_index[torch.argsort(values[by_index], descending=True, stable=True)]


def _extremes(values: Tensor, index: Tensor, k: int) -> Tensor:
    if len(values) <= 2 * k:
        return torch.arange(len(values))
    descending = _order(values, index)
    # The other end in the same order of indices among equals; what both ends claim is taken once, the gap filled.
    ascending = _order(-values, index)
    kept = list(dict.fromkeys(descending[:k].tolist() + ascending.tolist()))
    return torch.tensor(kept[: 2 * k])
