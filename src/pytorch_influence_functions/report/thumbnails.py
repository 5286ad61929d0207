"""Examples made small enough to travel inside a page: pictures as data URIs, texts cut, rows of a table named."""

from __future__ import annotations

import base64
import io
import itertools
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, final

import numpy as np
from numpy.typing import NDArray

from ..core.errors import InvalidInput, NonFinite, require
from ..plots.examples import Denormalize, Scale, Shown, row_of, see, target_of
from ..problem.data import Source

_LOSSLESS = 40  # pictures up to this side are kept pixel by pixel
_SAMPLE = 200  # examples looked at to find the scale of all
_ROWS = 400  # rows of one table example that are kept


@final
@dataclass(frozen=True)
class Detail:
    """How much of an example is kept: the longest side of a picture in pixels, and the letters of a text."""

    side: int
    letters: int


LEVELS = (Detail(96, 2000), Detail(64, 800), Detail(48, 400), Detail(40, 300))
"""From rich to lean; a page takes the first that fits."""
QUERY_SCALE, QUERY_LETTERS = 2, 20_000
"""A query is seen large: its picture has twice the side, its text is kept whole up to this."""


@final
@dataclass(eq=False)
class Lens:
    """Reads one dataset and turns its examples into plain records for the page.

    An example that cannot be read or shown becomes a card that says why, and is counted in `failed`.

    Args:
        source: the data, or None where they are not at hand.
        what: the word for one of them in messages.
        denormalize: as for `Scores.plot`.
        columns: names for the numbers of a table row.
        scale: what is black and what is white, the same for all pictures of the page.
    """

    source: Source | None
    what: str
    denormalize: Denormalize = None
    columns: Sequence[str] | None = None
    scale: Scale = field(default_factory=Scale)
    failed: dict[int, str] = field(default_factory=dict)

    def shown(self, index: int) -> tuple[Shown | None, Any]:
        """The example and the label inside it; (None, None) and an entry in `failed` where that is impossible."""
        if self.source is None:
            return None, None
        if not 0 <= index < len(self.source):
            return self._fail(index, f"the data have no example {index}")
        try:
            item = self.source.item(index)
        except Exception as cause:  # a dataset may raise anything: a missing file must not cost the other pictures
            return self._fail(index, f"could not be read ({type(cause).__name__}: {cause})")
        held = item[0] if isinstance(item, (tuple, list)) and len(item) else item
        if held is None:
            return self._fail(index, "the data hold nothing here (None)")
        try:
            return see(item, index, self.denormalize), target_of(item)
        except NonFinite as cause:
            return self._fail(index, str(cause))

    def _fail(self, index: int, why: str) -> tuple[None, None]:
        self.failed[index] = " ".join(why.split())[:300]
        return None, None

    def record(self, index: int, detail: Detail) -> tuple[dict[str, Any], Any]:
        """What the page needs to show one example, and the label inside it.

        Keys: `k` kind (image, text, table, none), `s` picture, `w` its width, `t` words or rows of
        (name, value), `m` letters or rows left out.
        """
        shown, label = self.shown(index)
        if shown is None:
            return {"k": "none", "t": self.failed.get(index, "")}, label
        if shown.pixels is not None:
            address, width = encoded(self.scale.applied(shown.pixels), detail.side)
            return {"k": "image", "s": address, "w": width}, label
        if "\n" in shown.words:
            rows = [self._named(line, at) for at, line in enumerate(shown.words.split("\n"))]
            # A row of a table is worth its names; a long series is not.
            keep = min(_ROWS, max(12, detail.letters // 12))
            return {"k": "table", "t": rows[:keep], "m": max(0, len(rows) - keep)}, label
        text = shown.text or shown.words
        return {"k": "text", "t": text[: detail.letters], "m": max(0, len(text) - detail.letters)}, label

    def _named(self, line: str, at: int) -> list[str]:
        name, _, value = line.partition(" = ")
        if self.columns is not None and at < len(self.columns):
            name = str(self.columns[at])
        return [name[:80], value[:400]]


def lens(data: Any, size: int | None, what: str, denormalize: Denormalize, columns: Sequence[str] | None) -> Lens:
    """A lens on `data`, any form `attribute` takes, or on nothing (None).

    Raises:
        InvalidInput: data of another length than the scores.
    """
    if data is None:
        return Lens(None, what, denormalize, columns)
    source = Source.of(data)
    if size is not None and len(source) != size:
        raise InvalidInput(
            f"{what}= has {len(source)} examples and the scores are of {size}; pass the dataset that was scored."
        )
    return Lens(source, what, denormalize, columns)


def common_scale(lenses: Iterable[tuple[Lens, Sequence[int]]]) -> Scale:
    """One scale for all pictures, found on an even sample of each dataset; failures here are not yet counted."""
    pictures: list[NDArray[Any]] = []
    for one, ids in lenses:
        step = max(1, len(ids) // _SAMPLE)
        looked = [one.shown(i)[0] for i in ids[::step]]
        one.failed.clear()
        pictures += [shown.pixels for shown in looked if shown is not None and shown.pixels is not None]
    return Scale.of(pictures)


def encoded(pixels: NDArray[Any], side: int) -> tuple[str, int]:
    """A picture with values 0 to 1 as a data URI no larger than `side`, and its width.

    Small pictures stay exact (PNG), larger ones become WebP, whose heads are smaller than JPEG's.

    >>> encoded(np.zeros((4, 8)), 96)[1]
    8
    """
    images = require("PIL.Image", "report")
    image = images.fromarray((pixels * 255).round().astype(np.uint8))
    exact = max(image.size) <= _LOSSLESS
    if max(image.size) > side:
        image.thumbnail((side, side), images.Resampling.LANCZOS)
    buffer = io.BytesIO()
    kind = "png" if exact else "webp"
    options = {"compress_level": 6} if exact else {"quality": 80, "method": 2}
    image.save(buffer, format=kind.upper(), **options)
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}", image.size[0]


def vector(one: Lens, index: int, side: int = 14, words: int = 512) -> tuple[str, NDArray[np.float32]] | None:
    """An example as numbers to compare inputs by: (kind, vector), or None where it cannot be read.

    A picture shrunk to `side` x `side`, a row of numbers as it is, a text as counts of hashed words and word pairs.
    """
    shown, _ = one.shown(index)
    if shown is None or one.source is None:
        return None
    if shown.pixels is not None:
        images = require("PIL.Image", "report")
        image = images.fromarray((one.scale.applied(shown.pixels) * 255).astype(np.uint8))
        image = image.convert("L" if image.mode == "L" else "RGB").resize((side, side), images.Resampling.BOX)
        flat: NDArray[np.float32] = np.asarray(image, dtype=np.float32).reshape(-1)
        return f"image {image.mode}", flat
    row = row_of(one.source.item(index), one.denormalize)
    if row is not None and len(row) > 1:
        kept: NDArray[np.float32] = np.asarray(row, dtype=np.float32)
        return (f"row of {len(row)}", kept) if np.isfinite(kept).all() else None
    return "text", _hashed(shown.words, words)


def _hashed(text: str, size: int) -> NDArray[np.float32]:
    found = np.zeros(size, dtype=np.float32)
    parts = text.lower().split()
    for token in (*parts, *map(" ".join, itertools.pairwise(parts))):
        found[zlib.crc32(token.encode("utf-8", "replace")) % size] += 1.0
    length = float(np.linalg.norm(found))
    return found / length if length else found
