"""What an example looks like: a picture where it is one, a card of words or numbers otherwise."""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from ..core.errors import InvalidInput, NonFinite
from .style import shorten

Denormalize: TypeAlias = Callable[[Any], Any] | tuple[Any, Any] | None

_CHANNELS = (1, 3, 4)
# Where a dictionary keeps what is worth seeing, by the habits of common datasets.
_PICTURES = ("image", "img", "pixel_values", "picture", "x")
_WORDS = ("text", "sentence", "content", "question", "prompt", "input")
# A two-dimensional array thinner than this is a table or a series.
_THINNEST = 5
# From this length on, numbers in a row are seen better as a line than read.
_LONG = 48


@dataclass(frozen=True, eq=False)
class Shown:
    """One example made visible: `pixels` [H, W] or [H, W, 3 or 4] as given, else `words` for a card.

    `text`: where the words are a text, the text with its own lines.
    `lines` [channels, T]: a series, which its words tell less well; `limits`: the lowest and highest value of all.
    """

    pixels: NDArray[Any] | None = None
    words: str = ""
    text: str = ""
    lines: NDArray[Any] | None = None
    limits: tuple[float, float] = (0.0, 1.0)


def see(item: Any, index: int, denormalize: Denormalize = None) -> Shown:
    """Find what can be shown in an example as its dataset gives it; the target, if any, comes last.

    `denormalize` is a function of the input, or `(mean, std)` per channel undone as `x * std + mean`.

    Raises:
        NonFinite: a picture holds NaN or infinity.
    """
    held = item[0] if isinstance(item, (tuple, list)) and len(item) else item
    if isinstance(held, Mapping):
        held = _from_mapping(held)
    if callable(denormalize):
        held = denormalize(held)
    pixels = _pixels(held)
    if pixels is None:
        lines = _lines(held)
        if lines is not None and not np.isfinite(lines).all():
            raise NonFinite(f"The series of example {index} holds NaN or infinity; repair it, or look at denormalize=.")
        return Shown(words=_words(held), text=_text(held), lines=lines)
    if not np.isfinite(pixels).all():
        raise NonFinite(f"The picture of example {index} holds NaN or infinity; repair it, or look at denormalize=.")
    if isinstance(denormalize, tuple):
        pixels = _undo(pixels, denormalize)
    return Shown(pixels=pixels)


def exposed(examples: Sequence[Shown]) -> tuple[list[Shown], str]:
    """All pictures on one scale from 0 to 1, so that they compare, and a note when that took a stretch; so all series.

    Bytes are divided by 255. Floats in 0 to 1 are kept; 0 to 255 are divided; any other range is
    stretched from the smallest to the largest value over all pictures.
    """
    pictures = [e.pixels for e in examples if e.pixels is not None]
    scale = Scale.of(pictures)
    series = [e.lines for e in examples if e.lines is not None]
    limits = (min(float(s.min()) for s in series), max(float(s.max()) for s in series)) if series else (0.0, 1.0)
    found = [
        Shown(pixels=scale.applied(e.pixels)) if e.pixels is not None else replace(e, limits=limits) for e in examples
    ]
    return found, scale.note


@dataclass(frozen=True)
class Scale:
    """What is shown black (`offset`) and what white (`offset + width`), with a note when that took a stretch."""

    offset: float = 0.0
    width: float = 1.0
    note: str = ""

    @classmethod
    def of(cls, pictures: Sequence[NDArray[Any]]) -> Scale:
        """The scale that suits all of these; 0 to 1 where there are none."""
        if not pictures:
            return cls()
        low, high = min(float(p.min()) for p in pictures), max(float(p.max()) for p in pictures)
        if low >= -1e-6 and high <= 1 + 1e-6:
            return cls()
        if all(p.dtype == np.uint8 for p in pictures) or (low >= 0 and 127 < high <= 255):
            return cls(width=255.0)
        note = f"pixel values {low:.3g} to {high:.3g} stretched to black to white"
        return cls(low, (high - low) or 1.0, note)

    def applied(self, pixels: NDArray[Any]) -> NDArray[Any]:
        """The picture as float64 from 0 (black) to 1 (white); what lies outside the scale is cut off."""
        found: NDArray[Any] = np.clip((pixels.astype(np.float64) - self.offset) / self.width, 0, 1)
        return found


def target_of(item: Any) -> Any:
    """The label inside an example, if it has the form (inputs, target) or names it; else None."""
    if isinstance(item, (tuple, list)) and len(item) > 1:
        return item[-1]
    if isinstance(item, Mapping):
        return next((item[key] for key in ("label", "labels", "target") if key in item), None)
    return None


def input_of(item: Any) -> Any:
    """What the model reads of an example: what comes first, or a mapping's text or token ids."""
    held = item[0] if isinstance(item, (tuple, list)) and len(item) else item
    if not isinstance(held, Mapping):
        return held
    words = [held[key] for key in _WORDS if isinstance(held.get(key), str)]
    return (words + [held[key] for key in ("input_ids",) if key in held] + [held])[0]


def row_of(item: Any, denormalize: Denormalize = None) -> NDArray[Any] | None:
    """The numbers of an example that is one row of a table or a series, `[columns]` in float64; else None."""
    held = item[0] if isinstance(item, (tuple, list)) and len(item) else item
    held = _from_mapping(held) if isinstance(held, Mapping) else held
    found = _array(denormalize(held) if callable(denormalize) else held)
    return found.astype(np.float64) if found is not None and found.ndim == 1 else None


# --------------------------------------------------------------------------- pictures


def _from_mapping(held: Mapping[Any, Any]) -> Any:
    pictures = [held[key] for key in _PICTURES if key in held and _pixels(held[key]) is not None]
    words = [held[key] for key in _WORDS if isinstance(held.get(key), str)]
    rest = {k: v for k, v in held.items() if k not in ("label", "labels", "target")}
    return (pictures + words + [rest])[0]


def _array(held: Any) -> NDArray[Any] | None:
    if isinstance(held, Tensor):
        held = held.detach().cpu()
        held = held.float() if held.is_floating_point() else held
    elif not isinstance(held, np.ndarray) and not hasattr(held, "__array_interface__"):  # PIL images have that
        return None
    found = np.asarray(held)
    return found if found.dtype.kind in "biuf" else None


def _pixels(held: Any) -> NDArray[Any] | None:
    """[H, W] or [H, W, 3 or 4] from any usual layout, or None where the thing is no picture."""
    found = _array(held)
    if found is None:
        return None
    found = found.astype(np.uint8) if found.dtype == bool else found
    while found.ndim > 3 and found.shape[0] == 1:
        found = found[0]
    if found.ndim == 2:
        return found if min(found.shape) >= _THINNEST else None
    if found.ndim != 3:
        return None
    first, last = found.shape[0] in _CHANNELS, found.shape[2] in _CHANNELS
    # Both can be channels only in tiny pictures: tensors are channels first by habit, arrays last.
    channels_first = first and (not last or isinstance(held, Tensor))
    if not first and not last:
        channels_first = found.shape[0] < found.shape[2]
    found = np.moveaxis(found, 0, -1) if channels_first else found
    if min(found.shape[:2]) < _THINNEST:
        return None
    if found.shape[2] == 1:
        return found[..., 0]
    return found if found.shape[2] in _CHANNELS else found.mean(-1)


def _lines(held: Any) -> NDArray[Any] | None:
    """[channels, T] in float64 from one long row of numbers, or a few beside each other; else None."""
    found = _array(held)
    if found is None or found.dtype.kind != "f" or found.ndim not in (1, 2) or max(found.shape) < _LONG:
        return None
    found = np.atleast_2d(found).astype(np.float64)
    return found if found.shape[0] <= found.shape[1] else found.T


def _undo(pixels: NDArray[Any], statistics: tuple[Any, Any]) -> NDArray[Any]:
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
    # Rounding leaves the range by a hair, which must not call for a stretch.
    return undone.clip(0, 1) if undone.min() > -1e-3 and undone.max() < 1 + 1e-3 else undone


# --------------------------------------------------------------------------- words


def _text(held: Any) -> str:
    return held.replace("\r\n", "\n").strip() if isinstance(held, str) else ""


def _number(value: float) -> str:
    """Three digits, yet whole numbers of a usual size stay whole: 1001, not 1e+03."""
    return f"{value:.0f}" if 999.5 <= abs(value) < 1e7 else f"{value:.3g}"


def _words(held: Any) -> str:
    if isinstance(held, str):
        return " ".join(held.split())
    if isinstance(held, Mapping):
        return "\n".join(f"{key} = {_brief(value)}" for key, value in held.items())
    found = _array(held)
    if found is not None and found.ndim == 1 and found.dtype.kind == "f":
        return "\n".join(f"x{i} = {_number(value)}" for i, value in enumerate(found.tolist()))
    return _brief(held)


def _brief(value: Any) -> str:
    found = _array(value)
    if found is None:
        return f"{value:.4g}" if isinstance(value, float) else " ".join(str(value).split())
    if found.size == 1:
        return f"{found.item():.4g}"
    if found.ndim == 1:
        shown = " ".join(_number(v) for v in found[:32].tolist())
        return shown + (" …" if found.size > 32 else "")
    return f"{' × '.join(map(str, found.shape))} numbers, mean {found.mean():.3g}"


def wrapped(words: str, columns: int, rows: int) -> str:
    """Text for a card of that many characters; what does not fit is an ellipsis on the last line.

    >>> print(wrapped("the quick brown fox jumps", 10, 2))
    the quick
    brown fox…
    """
    lines = [
        part
        for line in words.splitlines()
        # A row of a table stays a row: its end matters less than the rows below.
        for part in ([shorten(line, columns)] if "\n" in words else textwrap.wrap(line, columns))
    ]
    if len(lines) > rows:
        if "\n" in words:
            return "\n".join([*lines[: rows - 1], f"… {len(lines) - rows + 1} more"])
        last = lines[rows - 1]
        lines = [*lines[: rows - 1], (last if len(last) < columns else last[: columns - 1].rstrip()) + "…"]
    return "\n".join(lines)
