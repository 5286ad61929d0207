"""sum_n g_n g_n^T of gradient rows as a dense matrix, added up batch by batch in float64."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import islice

import torch
from jaxtyping import Float
from torch import Tensor

from ..linalg.blocks import Outer
from ..linalg.rows import Rows
from ..linalg.space import Space

# Columns of one batch that are looked at together, and numbers in float64 that are written out for them at once: enough
# for a product to be fast, and so many rows, so that the sum is not moved through memory for a few. A row has more
# numbers than there are parameters where a wide layer has few inputs: then this share of the sum's own numbers.
_COLUMNS = 64
_PIECE, _FEWEST = 1 << 20, 128
_SHARE = 4
# From so many pairs of inputs on each pair of outputs gets a product of its own: all together would move the whole sum
# through memory for every few rows (784 inputs, ten classes, 1,000 rows: 6.4 s instead of 2.5; 200 inputs: .6 and .3).
_WIDE = 1 << 15


def piece_bytes(size: int) -> int:
    """What is written out at once for a matrix over so many parameters, roughly: both sides of a product, twice."""
    return 4 * 8 * _most_numbers(size)


def _most_numbers(size: int) -> int:
    return max(_PIECE, size**2 // _SHARE)


class SecondMoment:
    """sum of g g^T over all rows that were added, [P, P].

    A batch comes as columns: several rows per example, such as one for every class. Where each row of each block is one
    outer product l a^T, and the columns of an example share a (a layer's input), the sum over the columns is
    (sum_c l_c l_c^T) x (a a^T). That takes as many operations as one column alone.
    """

    def __init__(self, space: Space, device: torch.device) -> None:
        self.space = space
        self._device = device
        self._flat: Tensor | None = None
        self._pairs: dict[tuple[str, str], Tensor] = {}
        self.directions = 0
        """How many of the rows that were added differ from zero: no more eigenvalues do."""

    def add(self, columns: Iterable[Rows]) -> None:
        """Add one batch, given column by column."""
        for several in column_groups(columns):
            self.directions += sum(int((rows.squared_norms() > 0).sum()) for rows in several)
            shared = _shared_inputs(several) if len(several) > 1 else None
            if shared is None:
                self._add_flat(several)
            else:
                self._add_pairs(several, shared)

    def matrix(self) -> Float[Tensor, "p p"]:
        """The sum, which is handed over: nothing more can be added."""
        total = self._whole()
        slices, shapes = self.space.slices, {k: b.shape for k, b in self.space.blocks.items()}
        for one, two in list(self._pairs):
            pair = self._pairs.pop((one, two))
            (o, i), (u, v) = shapes[one], shapes[two]
            part = (_symmetric(pair, o) if one == two else pair).view(o, u, i, v).transpose(1, 2).reshape(o * i, u * v)
            total[slices[one], slices[two]] += part
            if one != two:
                total[slices[two], slices[one]] += part.T
        return total

    def _whole(self) -> Tensor:
        if self._flat is None:
            self._flat = torch.zeros(self.space.size, self.space.size, dtype=torch.float64, device=self._device)
        return self._flat

    def _add_flat(self, columns: Sequence[Rows]) -> None:
        """Rows written out, in pieces of all columns together: one large product is faster than many small ones."""
        n = len(columns[0])
        step = -(-max(_FEWEST, _PIECE // self.space.size) // len(columns))
        total = self._whole()
        for start in range(0, n, step):
            flat = torch.cat([c.take(slice(start, start + step)).flat() for c in columns]).double()
            total.addmm_(flat.T, flat)

    def _add_pairs(self, columns: Sequence[Rows], inputs: dict[str, Tensor]) -> None:
        lefts = {
            name: torch.stack([c.blocks[name].left[:, 0] for c in columns]).double()  # type: ignore[attr-defined]
            for name in inputs
        }
        rights = {name: right.double() for name, right in inputs.items()}
        names = list(inputs)
        for position, one in enumerate(names):
            for two in names[position:]:
                self._add_pair(one, two, lefts, rights)

    def _add_pair(self, one: str, two: str, lefts: dict[str, Tensor], rights: dict[str, Tensor]) -> None:
        """Block (one, two): sum_n (sum_c l_nc m_nc^T) x (a_n b_n^T), the two sides as the rows of a product."""
        o, i, u, v = lefts[one].shape[2], rights[one].shape[1], lefts[two].shape[2], rights[two].shape[1]
        upper = torch.triu_indices(o, o, device=self._device) if one == two else None
        outputs = o * u if upper is None else upper.shape[1]
        total = self._pairs.get((one, two))
        if total is None:
            total = torch.zeros(outputs, i * v, dtype=torch.float64, device=self._device)
            self._pairs[one, two] = total
        if i * v >= _WIDE:
            for row in range(outputs):
                a, b = (row // u, row % u) if upper is None else (int(upper[0, row]), int(upper[1, row]))
                weights = (lefts[one][:, :, a] * lefts[two][:, :, b]).sum(0)
                total[row].view(i, v).addmm_((rights[one] * weights[:, None]).T, rights[two])
            return
        for piece in _pieces(rights[one].shape[0], max(o * u, i * v), _most_numbers(self.space.size)):
            output = torch.einsum("cno,cnu->nou", lefts[one][:, piece], lefts[two][:, piece])
            picked = output.flatten(1) if upper is None else output[:, upper[0], upper[1]]
            inputs = (rights[one][piece, :, None] * rights[two][piece, None]).flatten(1)
            total.addmm_(picked.T, inputs)
            del output, picked, inputs  # before the next are made


def column_groups(columns: Iterable[Rows]) -> Iterator[list[Rows]]:
    """The columns of a batch, as many as are looked at together."""
    left = iter(columns)
    while several := list(islice(left, _COLUMNS)):
        yield several


def _symmetric(upper: Tensor, o: int) -> Tensor:
    """[o o, i v] from the rows of its upper triangle, for one block with itself: entry (u, o) is (o, u) transposed."""
    pairs = torch.triu_indices(o, o, device=upper.device)
    size = round(upper.shape[1] ** 0.5)
    full = upper.new_zeros(o, o, size, size)
    matrices = upper.view(-1, size, size)
    full[pairs[0], pairs[1]] = matrices
    full[pairs[1], pairs[0]] = matrices.mT
    return full.view(o * o, size * size)


def _shared_inputs(columns: Sequence[Rows]) -> dict[str, Tensor] | None:
    """Every block's inputs [n, i], where all blocks are single outer products and all columns have the same inputs."""
    inputs: dict[str, Tensor] = {}
    for name in columns[0].blocks:
        blocks = [c.blocks[name] for c in columns]
        first = blocks[0]
        if not isinstance(first, Outer):
            return None
        for block in blocks:
            if not isinstance(block, Outer) or block.terms != 1 or not _equal(block.right, first.right):
                return None
        inputs[name] = first.right[:, 0]
    return inputs


def _equal(x: Tensor, y: Tensor) -> bool:
    return x.data_ptr() == y.data_ptr() or torch.equal(x, y)


def _pieces(count: int, numbers_each: int, most: int) -> Iterator[slice]:
    step = max(1, min(max(_FEWEST, _PIECE // numbers_each), most // numbers_each))
    for start in range(0, count, step):
        yield slice(start, start + step)
