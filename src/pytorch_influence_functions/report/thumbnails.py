"""Examples made small enough for a page: pictures as data URIs, texts cut, rows of a table named."""

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
from ..core.text import printable
from ..core.token_text import TokenText, token_text_of
from ..plots.examples import Denormalize, ExampleView, Scale, example_target, format_value, table_row, view_example
from ..problem.data import Source

_LOSSLESS_SIDE = 40  # pictures up to this side are kept pixel by pixel
_SAMPLE = 200  # examples that decide the scale of all
_LEAST_ROWS, _MAX_ROWS = 100, 400  # rows of one table example that are kept
_BEGINNING = 300  # letters of a text that stand on a small card
_UNUSUAL = 4  # values of a table example that stand on a small card


@final
@dataclass(frozen=True)
class Detail:
    """How much of an example is kept: the longest side of a picture in pixels, and the letters of a text."""

    side: int
    letters: int


LEVELS = (Detail(96, 2000), Detail(64, 800), Detail(48, 400), Detail(40, 300))
"""From rich to lean; a page takes the first that fits."""
QUERY_SCALE, QUERY_LETTERS = 2, 20_000
"""A query is shown large: its picture has twice the side, and its text is kept up to so many letters."""


@final
@dataclass(frozen=True, eq=False)
class Spread:
    """Mean and standard deviation of the columns of a table, from a sample."""

    mean: NDArray[Any]
    std: NDArray[Any]

    @classmethod
    def of(cls, rows: Sequence[NDArray[Any]]) -> Spread | None:
        """The spread of these rows; None where they are too few, or not of one length."""
        if len(rows) < 2 or len({len(row) for row in rows}) > 1:
            return None
        table = np.stack(rows)
        return cls(table.mean(0), table.std(0)) if np.isfinite(table).all() else None

    def __len__(self) -> int:
        return len(self.mean)

    def most_unusual(self, values: NDArray[Any]) -> list[int]:
        """The positions of the values that lie furthest from their column's mean, in units of its spread."""
        mean, std = self.mean[: len(values)], self.std[: len(values)]
        distance = np.where(std > 0, np.abs(values - mean) / np.where(std > 0, std, 1.0), 0.0)
        order: list[int] = np.argsort(-distance, kind="stable")[:_UNUSUAL].tolist()
        return order


@final
@dataclass(eq=False)
class ExampleReader:
    """Reads one dataset and turns its examples into plain records for the page.

    An example that cannot be read or shown becomes a card that says why, and is counted in `failed`.

    Args:
        source: the data, or None if they are not available.
        what: what the data are called in messages.
        denormalize: as for `Scores.plot`.
        columns: names for the numbers of a table row.
        scale: the values shown as black and as white, the same for all pictures of the page.
        spread: of the columns of a table, by which unusual values are found.
    """

    source: Source | None
    what: str
    denormalize: Denormalize = None
    columns: Sequence[str] | None = None
    scale: Scale = field(default_factory=Scale)
    spread: Spread | None = None
    failed: dict[int, str] = field(default_factory=dict)

    def view(self, index: int) -> tuple[ExampleView | None, Any]:
        """The example and the label inside it; (None, None) and an entry in `failed` if that is impossible."""
        if self.source is None:
            return None, None
        if not 0 <= index < len(self.source):
            return self._fail(index, f"the data have no example {index}")
        try:
            item = self.source.item(index)
        except Exception as cause:  # a dataset may raise anything; other examples are still shown
            return self._fail(index, f"could not be read ({type(cause).__name__}: {cause})")
        inputs = item[0] if isinstance(item, (tuple, list)) and len(item) else item
        if inputs is None:
            return self._fail(index, "the data hold nothing here (None)")
        try:
            return view_example(item, index, self.denormalize), example_target(item)
        except NonFinite as cause:
            return self._fail(index, str(cause))

    def _fail(self, index: int, why: str) -> tuple[None, None]:
        self.failed[index] = " ".join(why.split())[:300]
        return None, None

    def token_text(self, index: int) -> TokenText | None:
        """The example as tokens, where its dataset knows them (`core.token_text`)."""
        return None if self.source is None else token_text_of(self.source.dataset, index)

    def record(self, index: int, detail: Detail) -> tuple[dict[str, Any], Any]:
        """The record that the page shows for one example, and the label inside it.

        Keys: `k` kind (image, text, table, none), `s` picture, `w` its width, `t` text or rows of (name, value),
        `m` letters or rows left out. Of a text whose tokens are known `t` is the beginning.
        """
        tokens = self.token_text(index)
        if tokens is not None:
            return {"k": "text", "t": printable(tokens.text[:_BEGINNING]), "m": 0}, None
        view, label = self.view(index)
        if view is None:
            return {"k": "none", "t": self.failed.get(index, "")}, label
        if view.pixels is not None:
            address, width = encode_picture(self.scale.apply(view.pixels), detail.side)
            return {"k": "image", "s": address, "w": width}, label
        if "\n" in view.card:
            return self._table(index, view.card, detail), label
        text = view.text or view.card
        return {"k": "text", "t": text[: detail.letters], "m": max(0, len(text) - detail.letters)}, label

    def _table(self, index: int, card: str, detail: Detail) -> dict[str, Any]:
        """A row of a table with the names of its columns, and `u`, the rows that are most unusual for these data."""
        lines = card.split("\n")
        values = None if self.source is None else table_row(self.source.item(index), self.denormalize)
        if values is not None and len(values) == len(lines):
            lines = [
                f"{line.partition(' = ')[0]} = {format_value(x)}"
                for line, x in zip(lines, values.tolist(), strict=True)
            ]
        # A table's row is kept with its names; of a long series only the beginning is.
        keep = min(_MAX_ROWS, max(_LEAST_ROWS, detail.letters // 12))
        rows = [self._named_value(line, row) for row, line in enumerate(lines[:keep])]
        record: dict[str, Any] = {"k": "table", "t": rows, "m": max(0, len(lines) - keep)}
        if self.spread is not None and values is not None and len(self.spread) == len(values):
            record["u"] = self.spread.most_unusual(values[:keep])
        return record

    def _named_value(self, line: str, row: int) -> list[str]:
        name, _, value = line.partition(" = ")
        if self.columns is not None and row < len(self.columns):
            name = str(self.columns[row])
        return [name[:80], value[:400]]


def make_reader(
    data: Any, size: int | None, what: str, denormalize: Denormalize, columns: Sequence[str] | None
) -> ExampleReader:
    """A reader of `data`, in any form that `attribute` takes; without data (None) it shows no example.

    Raises:
        InvalidInput: data of another length than the scores.
    """
    if data is None:
        return ExampleReader(None, what, denormalize, columns)
    source = Source.of(data).whole
    if size is not None and len(source) != size:
        raise InvalidInput(
            f"{what}= has {len(source)} examples and the scores are of {size}; pass the dataset that was scored."
        )
    return ExampleReader(source, what, denormalize, columns)


def set_common_scale(readers: Iterable[tuple[ExampleReader, Sequence[int]]]) -> Scale:
    """Give all readers one scale for their pictures and one spread of their columns, from an even sample of each.

    Failures here are not yet counted.
    """
    pictures: list[NDArray[Any]] = []
    rows: list[NDArray[Any]] = []
    readers = list(readers)
    for reader, ids in readers:
        for i in ids[:: max(1, len(ids) // _SAMPLE)]:
            if reader.token_text(i) is not None:
                break
            view, _ = reader.view(i)
            if view is not None and view.pixels is not None:
                pictures.append(view.pixels)
            elif view is not None and reader.source is not None:
                row = table_row(reader.source.item(i), reader.denormalize)
                rows += [] if row is None else [row]
        reader.failed.clear()
    scale, spread = Scale.of(pictures), Spread.of(rows)
    for reader, _ in readers:
        reader.scale, reader.spread = scale, spread
    return scale


def encode_picture(pixels: NDArray[Any], side: int) -> tuple[str, int]:
    """Encode a picture with values 0 to 1 as a data URI no larger than `side`; also returns its width.

    Small pictures stay exact (PNG), larger ones become WebP, whose headers are smaller than JPEG's.

    >>> encode_picture(np.zeros((4, 8)), 96)[1]
    8
    """
    images = require("PIL.Image", "report")
    image = images.fromarray((pixels * 255).round().astype(np.uint8))
    exact = max(image.size) <= _LOSSLESS_SIDE
    if max(image.size) > side:
        image.thumbnail((side, side), images.Resampling.LANCZOS)
    buffer = io.BytesIO()
    kind = "png" if exact else "webp"
    options = {"compress_level": 6} if exact else {"quality": 80, "method": 2}
    image.save(buffer, format=kind.upper(), **options)
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}", image.size[0]


def comparison_vector(
    reader: ExampleReader, index: int, side: int = 14, words: int = 512
) -> tuple[str, NDArray[np.float32]] | None:
    """An example as numbers by which inputs are compared: (kind, vector), or None if it cannot be read.

    A picture is shrunk to `side` x `side`, a row of numbers stays as it is, and a text becomes counts of hashed words
    and word pairs.
    """
    tokens = reader.token_text(index)
    if tokens is not None:
        return "text", _hashed_word_counts(tokens.text, words)
    view, _ = reader.view(index)
    if view is None or reader.source is None:
        return None
    if view.pixels is not None:
        images = require("PIL.Image", "report")
        image = images.fromarray((reader.scale.apply(view.pixels) * 255).astype(np.uint8))
        image = image.convert("L" if image.mode == "L" else "RGB").resize((side, side), images.Resampling.BOX)
        flat: NDArray[np.float32] = np.asarray(image, dtype=np.float32).reshape(-1)
        return f"image {image.mode}", flat
    row = table_row(reader.source.item(index), reader.denormalize)
    if row is not None and len(row) > 1:
        numbers: NDArray[np.float32] = np.asarray(row, dtype=np.float32)
        return (f"row of {len(row)}", numbers) if np.isfinite(numbers).all() else None
    return "text", _hashed_word_counts(view.card, words)


def _hashed_word_counts(text: str, size: int) -> NDArray[np.float32]:
    counts = np.zeros(size, dtype=np.float32)
    words = text.lower().split()
    for token in (*words, *map(" ".join, itertools.pairwise(words))):
        counts[zlib.crc32(token.encode("utf-8", "replace")) % size] += 1.0
    length = float(np.linalg.norm(counts))
    return counts / length if length else counts
