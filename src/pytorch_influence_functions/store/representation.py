"""What an index keeps of a gradient, and which of these fits."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final, TypeAlias, final

import torch

from ..core.errors import InvalidInput, TooLarge
from ..core.records import Record
from ..curvature.base import Budget
from ..gradients.per_example import Derivatives
from ..gradients.sketches import EIGENVECTORS, RANDOM_SIGNS, Sketch, TwoSided
from ..linalg.rows import Rows
from .codecs import AbstractCodec, Float64, find_codec
from .layouts import lossless

AUTO: Final = "auto"
# Sides that are tried, the largest first; below the last a sketch keeps more for as many bytes.
_SIDES: Final = (64, 48, 32, 24, 16, 12, 8)
_LARGEST_SKETCH: Final = 8192
# Beside its row: digest and label.
_BESIDE: Final = 16


@final
@dataclass(frozen=True, repr=False)
class Factors(Record):
    """Every gradient in the exact form in which it is taken: a layer's inputs and the gradients at its outputs.

    Nothing is lost: scores are those of the method itself. For perceptrons, heads and tables, where a layer is used
    once per example, it is also small.

    >>> Factors()
    Factors()
    """


Representation: TypeAlias = Factors | TwoSided | Sketch


def parse_representation(text: str) -> Representation | str:
    """A representation from words: `auto`, `factors`, `two-sided:K`, `two-sided:K:eigenvectors` or `sketch:K`.

    Raises:
        InvalidInput: it is none.

    >>> parse_representation("two-sided:16"), parse_representation("sketch:1024")
    (TwoSided(k_in=16), Sketch(k=1024))
    """
    kind, *rest = text.strip().lower().replace("_", "-").split(":")
    if kind == AUTO and not rest:
        return AUTO
    if kind == "factors" and not rest:
        return Factors()
    if kind == "two-sided" and rest and rest[0].isdigit() and rest[1:] in ([], [EIGENVECTORS]):
        return TwoSided(int(rest[0]), basis=EIGENVECTORS if rest[1:] else RANDOM_SIGNS)
    if kind == "sketch" and len(rest) == 1 and rest[0].isdigit():
        return Sketch(int(rest[0]))
    raise InvalidInput(
        f"--keep {text} is nothing that an index keeps; write auto, factors, two-sided:16, two-sided:16:eigenvectors "
        "or sketch:1024."
    )


@final
@dataclass(frozen=True, eq=False)
class Choice:
    """What is kept, in which type, what that takes, and why.

    Args:
        representation: what is kept of a gradient.
        codec: how its numbers are stored.
        bytes_each: of one example.
        why: in words.
    """

    representation: Representation
    codec: AbstractCodec
    bytes_each: float
    why: str


def choose(
    representation: Any, dtype: Any, derivatives: Derivatives, rows: Rows, count: int | None, budget: Budget
) -> Choice:
    """The representation that was asked for, or the most exact one that fits.

    Args:
        representation: `"auto"`, `Factors()`, `TwoSided(k_in)` or `Sketch(k)`.
        dtype: the type of stored numbers; None: exact for factors, float16 for what is projected.
        derivatives: how gradients are taken, not projected.
        rows: gradients of a few examples, in factors.
        count: how many examples there will be; None: not known.
        budget: what they may take on the disk.

    Raises:
        InvalidInput: something else was given.
        TooLarge: what was asked for does not fit.
    """
    if isinstance(representation, type) and issubclass(representation, (Factors, TwoSided, Sketch)):
        written = "Factors()" if representation is Factors else f"{representation.__name__}(...)"
        raise InvalidInput(f"representation= is the class {representation.__name__}; write {written}, an instance.")
    if isinstance(representation, (Factors, TwoSided, Sketch)):
        choice = _sized(representation, dtype, derivatives, rows, "asked for")
        if count is not None and count * choice.bytes_each > budget.bytes:
            raise TooLarge(
                f"{count:,} examples of {choice.bytes_each:,.0f} bytes each in {representation!r} would take "
                f"{count * choice.bytes_each / 1e9:.3g} GB and the bound is {budget.bytes / 1e9:.3g} GB; take a "
                "smaller dtype= or k, or raise budget=."
            )
        return choice
    if representation != AUTO:
        raise InvalidInput(
            f"representation={representation!r} is none; write 'auto', Factors(), TwoSided(16) or Sketch(1024) of "
            "ptif.store."
        )
    return _choose_by_size(dtype, derivatives, rows, count, budget)


def _choose_by_size(dtype: Any, derivatives: Derivatives, rows: Rows, count: int | None, budget: Budget) -> Choice:
    room = budget.bytes / max(1, count or 1_000_000)
    held = f"{budget.bytes / 1e9:.3g} GB / {count or 1_000_000:,} examples = {room:,.0f} bytes each"
    if str(dtype) != "1bit":
        exact = _sized(Factors(), dtype, derivatives, rows, "")
        if exact.bytes_each <= room:
            return _because(exact, f"exact factors take {exact.bytes_each:,.0f} bytes, which fit ({held})")
    two_sided = None
    for side in _SIDES:
        two_sided = _sized(TwoSided(side), dtype, derivatives, rows, "")
        if two_sided.bytes_each <= room:
            return _because(two_sided, f"the widest projection of both sides that fits ({held})")
    numbers = derivatives.whole.size - 1
    k = min(_LARGEST_SKETCH, numbers)
    # A sketch mixes all parameters, which is refused where their weight decay differs.
    while k >= 64 and len(set(derivatives.whole.decay.values())) == 1:
        sketch = _sized(Sketch(k), dtype, derivatives, rows, "")
        if sketch.bytes_each <= room:
            return _because(sketch, f"the longest sketch that fits ({held})")
        k //= 2
    raise TooLarge(
        f"Nothing useful fits into {room:,.0f} bytes per example ({held}); raise budget=, or take dtype='int8' or "
        "'1bit'."
    )


def _because(choice: Choice, why: str) -> Choice:
    return Choice(choice.representation, choice.codec, choice.bytes_each, why)


def _sized(representation: Representation, dtype: Any, derivatives: Derivatives, rows: Rows, why: str) -> Choice:
    if isinstance(representation, Factors):
        codec = lossless(rows.dtype) if dtype is None else find_codec(dtype)
        # The smaller of factors and written-out gradient, block by block.
        each = sum(codec.bytes_of(b.numbers // len(b)) for b in rows.compact().blocks.values())
        return Choice(representation, codec, each + _BESIDE, why)
    codec = find_codec("float16" if dtype is None else dtype)
    width = representation.reduced(derivatives.whole).size
    if isinstance(codec, Float64) and rows.dtype != torch.float64:
        raise InvalidInput("dtype='float64' keeps nothing more of a model in float32; leave it out or use 'float32'.")
    return Choice(representation, codec, codec.bytes_of(width) + _BESIDE, why)
