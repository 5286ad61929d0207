"""How an example is shown: as a picture if it is one, else as a series or a card of text or numbers."""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from ..core.errors import InvalidInput, NonFinite
from ..core.text import printable
from .style import shorten

Denormalize: TypeAlias = Callable[[Any], Any] | tuple[Any, Any] | None

_CHANNELS = (1, 3, 4)
# The keys under which common datasets keep pictures and texts.
_PICTURE_KEYS = ("image", "img", "pixel_values", "picture", "x")
_TEXT_KEYS = ("text", "sentence", "content", "question", "prompt", "input")
# A two-dimensional array narrower than this is a table or a series, not a picture.
_MIN_PICTURE_SIDE = 5
# From this length on, numbers are drawn as a line.
_MIN_SERIES = 48


@dataclass(frozen=True, eq=False)
class ExampleView:
    """One example as it is shown: `pixels` [H, W] or [H, W, 3 or 4] as given, else `card`, the text of a card.

    `text`: if the example is a text, the text with its own lines.
    `lines` [channels, T]: a series, which is drawn instead of its card; `limits`: the lowest and highest value of all.
    """

    pixels: NDArray[Any] | None = None
    card: str = ""
    text: str = ""
    lines: NDArray[Any] | None = None
    limits: tuple[float, float] = (0.0, 1.0)


def view_example(item: Any, index: int, denormalize: Denormalize = None) -> ExampleView:
    """Make the view of an example as its dataset gives it; the target, if any, comes last.

    `denormalize` is a function of the input, or `(mean, std)` per channel, which is undone as `x * std + mean`.

    Raises:
        NonFinite: a picture holds NaN or infinity.
    """
    inputs = _inputs(item)
    if callable(denormalize):
        inputs = denormalize(inputs)
    pixels = _pixels(inputs)
    if pixels is None:
        lines = _lines(inputs)
        if lines is not None and not np.isfinite(lines).all():
            raise NonFinite(f"The series of example {index} holds NaN or infinity; repair it, or look at denormalize=.")
        return ExampleView(card=_card(inputs), text=_own_text(inputs), lines=lines)
    if not np.isfinite(pixels).all():
        raise NonFinite(f"The picture of example {index} holds NaN or infinity; repair it, or look at denormalize=.")
    if isinstance(denormalize, tuple):
        pixels = _undo_normalisation(pixels, denormalize)
    return ExampleView(pixels=pixels)


def share_scale(examples: Sequence[ExampleView]) -> tuple[list[ExampleView], str]:
    """Put all pictures on one scale from 0 to 1, and all series on one scale, so that they can be compared.

    Bytes are divided by 255. Floats in 0 to 1 are kept; 0 to 255 are divided; any other range is
    stretched from the smallest to the largest value over all pictures, which the returned note says.
    """
    pictures = [e.pixels for e in examples if e.pixels is not None]
    scale = Scale.of(pictures)
    series = [e.lines for e in examples if e.lines is not None]
    limits = (min(float(s.min()) for s in series), max(float(s.max()) for s in series)) if series else (0.0, 1.0)
    views = [
        ExampleView(pixels=scale.apply(e.pixels)) if e.pixels is not None else replace(e, limits=limits)
        for e in examples
    ]
    return views, scale.note


@dataclass(frozen=True)
class Scale:
    """The values shown as black (`offset`) and white (`offset + width`), with a note if values were stretched."""

    offset: float = 0.0
    width: float = 1.0
    note: str = ""

    @classmethod
    def of(cls, pictures: Sequence[NDArray[Any]]) -> Scale:
        """The scale that suits all of these pictures; 0 to 1 without pictures."""
        if not pictures:
            return cls()
        low, high = min(float(p.min()) for p in pictures), max(float(p.max()) for p in pictures)
        if low >= -1e-6 and high <= 1 + 1e-6:
            return cls()
        if all(p.dtype == np.uint8 for p in pictures) or (low >= 0 and 127 < high <= 255):
            return cls(width=255.0)
        note = f"pixel values {low:.3g} to {high:.3g} stretched to black to white"
        return cls(low, (high - low) or 1.0, note)

    def apply(self, pixels: NDArray[Any]) -> NDArray[Any]:
        """The picture as float64 from 0 (black) to 1 (white); values outside the scale are clipped."""
        scaled: NDArray[Any] = np.clip((pixels.astype(np.float64) - self.offset) / self.width, 0, 1)
        return scaled


def example_target(item: Any) -> Any:
    """The label inside an example, if it has the form (inputs, target) or names it; else None."""
    if isinstance(item, (tuple, list)) and len(item) > 1:
        return item[-1]
    if isinstance(item, Mapping):
        return next((item[key] for key in ("label", "labels", "target") if key in item), None)
    return None


def example_input(item: Any) -> Any:
    """The input of an example: its first part, or a mapping's text or token ids."""
    first = _first(item)
    if not isinstance(first, Mapping):
        return first
    texts = [first[key] for key in _TEXT_KEYS if isinstance(first.get(key), str)]
    return (texts + [first[key] for key in ("input_ids",) if key in first] + [first])[0]


def table_row(item: Any, denormalize: Denormalize = None) -> NDArray[Any] | None:
    """The numbers of an example that is one row of a table or a series, `[columns]` in float64; else None."""
    inputs = _inputs(item)
    numbers = _array(denormalize(inputs) if callable(denormalize) else inputs)
    if numbers is None or numbers.ndim != 1:
        return None
    row: NDArray[Any] = numbers.astype(np.float64)
    if isinstance(denormalize, tuple):
        mean, std = (np.asarray(s, dtype=np.float64).reshape(-1) for s in denormalize)
        if {mean.size, std.size} <= {1, row.size}:
            return row * std + mean
    return row


def _first(item: Any) -> Any:
    return item[0] if isinstance(item, (tuple, list)) and len(item) else item


def _inputs(item: Any) -> Any:
    """The part of an example that is shown: of a mapping its picture, its text, or all but its label."""
    first = _first(item)
    if not isinstance(first, Mapping):
        return first
    pictures = [first[key] for key in _PICTURE_KEYS if key in first and _pixels(first[key]) is not None]
    texts = [first[key] for key in _TEXT_KEYS if isinstance(first.get(key), str)]
    rest = {k: v for k, v in first.items() if k not in ("label", "labels", "target")}
    return (pictures + texts + [rest])[0]


# --------------------------------------------------------------------------- pictures


def _array(values: Any) -> NDArray[Any] | None:
    if isinstance(values, Tensor):
        values = values.detach().cpu()
        values = values.float() if values.is_floating_point() else values
    elif not isinstance(values, np.ndarray) and not hasattr(values, "__array_interface__"):  # PIL images have that
        return None
    array = np.asarray(values)
    return array if array.dtype.kind in "biuf" else None


def _pixels(inputs: Any) -> NDArray[Any] | None:
    """[H, W] or [H, W, 3 or 4] from any usual layout, or None if it is no picture."""
    array = _array(inputs)
    if array is None:
        return None
    array = array.astype(np.uint8) if array.dtype == bool else array
    while array.ndim > 3 and array.shape[0] == 1:
        array = array[0]
    if array.ndim == 2:
        return array if min(array.shape) >= _MIN_PICTURE_SIDE else None
    if array.ndim != 3:
        return None
    first, last = array.shape[0] in _CHANNELS, array.shape[2] in _CHANNELS
    # Both can be channels only in tiny pictures; then tensors have channels first, arrays last.
    channels_first = first and (not last or isinstance(inputs, Tensor))
    if not first and not last:
        channels_first = array.shape[0] < array.shape[2]
    array = np.moveaxis(array, 0, -1) if channels_first else array
    if min(array.shape[:2]) < _MIN_PICTURE_SIDE:
        return None
    if array.shape[2] == 1:
        return array[..., 0]
    return array if array.shape[2] in _CHANNELS else array.mean(-1)


def _lines(inputs: Any) -> NDArray[Any] | None:
    """[channels, T] in float64 from one long row of numbers, or a few beside each other; else None."""
    series = _array(inputs)
    if series is None or series.dtype.kind != "f" or series.ndim not in (1, 2) or max(series.shape) < _MIN_SERIES:
        return None
    series = np.atleast_2d(series).astype(np.float64)
    return series if series.shape[0] <= series.shape[1] else series.T


def _undo_normalisation(pixels: NDArray[Any], statistics: tuple[Any, Any]) -> NDArray[Any]:
    mean, std = (np.asarray(s, dtype=np.float64) for s in statistics)
    colours = 1 if pixels.ndim == 2 else pixels.shape[2]
    for name, values in (("mean", mean), ("std", std)):
        if values.size not in (1, colours):
            raise InvalidInput(
                f"denormalize=(mean, std) has a {name} of {values.size} numbers and the pictures "
                f"have {colours} channels; give one number per channel."
            )
    if pixels.ndim == 2:
        mean, std = mean.reshape(()), std.reshape(())
    undone: NDArray[Any] = pixels * std + mean
    # Rounding leaves the range 0 to 1 slightly, which must not stretch the picture.
    return undone.clip(0, 1) if undone.min() > -1e-3 and undone.max() < 1 + 1e-3 else undone


# --------------------------------------------------------------------------- cards


def _own_text(inputs: Any) -> str:
    return inputs.replace("\r\n", "\n").strip() if isinstance(inputs, str) else ""


def format_value(value: float) -> str:
    """A number with five digits, and whole numbers whole: as it stands in the data, as far as a reader needs it.

    >>> format_value(22.350000381), format_value(208500.0), format_value(-0.0191), format_value(3e-9)
    ('22.35', '208500', '-0.0191', '3e-09')
    """
    return f"{value:.0f}" if 99_999.5 <= abs(value) < 1e12 else f"{value:.5g}"


def _format_number(value: float) -> str:
    """Format with three digits; whole numbers of a usual size stay whole: 1001, not 1e+03."""
    return f"{value:.0f}" if 999.5 <= abs(value) < 1e7 else f"{value:.3g}"


def _card(inputs: Any) -> str:
    if isinstance(inputs, str):
        return " ".join(inputs.split())
    if isinstance(inputs, Mapping):
        return "\n".join(f"{key} = {_brief(value)}" for key, value in inputs.items())
    numbers = _array(inputs)
    if numbers is not None and numbers.ndim == 1 and numbers.dtype.kind == "f":
        return "\n".join(f"x{i} = {_format_number(value)}" for i, value in enumerate(numbers.tolist()))
    return _brief(inputs)


def _brief(value: Any) -> str:
    numbers = _array(value)
    if numbers is None:
        return f"{value:.4g}" if isinstance(value, float) else " ".join(str(value).split())
    if numbers.size == 1:
        return f"{numbers.item():.4g}"
    if numbers.ndim == 1:
        shown = " ".join(_format_number(v) for v in numbers[:32].tolist())
        return shown + (" …" if numbers.size > 32 else "")
    return f"{' × '.join(map(str, numbers.shape))} numbers, mean {numbers.mean():.3g}"


def wrap_text(text: str, columns: int, rows: int) -> str:
    """Wrap text for a card of so many characters; an ellipsis on the last line stands for the rest.

    >>> print(wrap_text("the quick brown fox jumps", 10, 2))
    the quick
    brown fox…
    """
    lines = [
        part
        for line in printable(text).splitlines()
        # A row of a table stays on one line: its end matters less than the rows below.
        for part in ([shorten(line, columns)] if "\n" in text else textwrap.wrap(line, columns))
    ]
    if len(lines) > rows:
        if "\n" in text:
            return "\n".join([*lines[: rows - 1], f"… {len(lines) - rows + 1} more"])
        last = lines[rows - 1]
        lines = [*lines[: rows - 1], (last if len(last) < columns else last[: columns - 1].rstrip()) + "…"]
    return "\n".join(lines)
