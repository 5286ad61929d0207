"""Texts put end to end and cut into blocks of one length, as language models are often trained; and back again."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from ..core.validate import whole_number
from .encoding import Encoded
from .texts import Texts


@dataclass(frozen=True, eq=False)
class Blocks(Texts):
    """Blocks of token numbers; `owners[b][t]` is the text that token t of block b belongs to."""

    owners: tuple[tuple[int, ...], ...] = ()
    texts: Texts | None = None

    def sums(self, block: int, values: Tensor) -> Tensor:
        """Numbers [q, t] of a block's tokens, added up over each text: [q, texts]."""
        owners: Int[Tensor, " t"] = torch.tensor(self.owners[block])
        total = values.new_zeros(len(values), len(self.texts) if self.texts is not None else 0)
        return total.index_add_(1, owners, values[:, : len(owners)])


def pack(texts: Texts, length: Any) -> Blocks:
    """The texts end to end, cut into blocks; the last one may be shorter, and goes if it is a single token.

    Args:
        texts: encoded texts, in dataset order.
        length: how many tokens a block has.
    """
    length = whole_number("packing", length, 2)
    ids = [token for row in texts.encoded for token in row.ids]
    taught = [teach for row in texts.encoded for teach in row.taught]
    labels = [label for row in texts.encoded for label in row.labels]
    owners = [i for i, row in enumerate(texts.encoded) for _ in row.ids]
    starts = [start for start in range(0, len(ids), length) if any(taught[start + 1 : start + length])]
    parts = [slice(start, start + length) for start in starts]
    encoded = tuple(Encoded(tuple(ids[p]), tuple(taught[p]), own_labels=tuple(labels[p])) for p in parts)
    return Blocks(
        encoded,
        texts.tokenizer,
        limit=length,
        columns=texts.columns,
        owners=tuple(tuple(owners[part]) for part in parts),
        texts=texts,
    )
