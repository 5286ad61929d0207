"""Checks of settings: one sentence with what was given, what is expected and, where it helps, what to do."""

from __future__ import annotations

import math
from collections.abc import Iterable
from numbers import Integral, Real
from typing import Any, TypeAlias, TypeGuard

from .errors import InvalidInput

Bound: TypeAlias = int | float


def is_whole(value: object) -> TypeGuard[int]:
    """Whether it is a whole number; True and False are none.

    >>> is_whole(3), is_whole(3.0), is_whole(True)
    (True, False, False)
    """
    return not isinstance(value, bool) and isinstance(value, Integral)


def is_finite(value: Any) -> TypeGuard[float]:
    """Whether it is a finite number; True and False are none.

    >>> is_finite(0.5), is_finite(float("nan")), is_finite(True)
    (True, False, False)
    """
    return not isinstance(value, bool) and isinstance(value, Real) and math.isfinite(value)


def whole_number(
    name: str, value: object, least: int | None = 1, most: int | None = None, *, owner: object = None, hint: str = ""
) -> int:
    """The value as an int, refused unless it is a whole number within the bounds; True and False are none.

    Args:
        name: what the setting is called, an argument or a phrase such as `"The rank"`.
        value: what was given.
        least: the smallest allowed; None: any.
        most: the largest allowed; None: any.
        owner: the record (or its name) that has the setting as a field.
        hint: what to do, without a full stop.

    Raises:
        InvalidInput: it is not.

    >>> whole_number("rank", 3)
    3
    >>> whole_number("rank", 2.5, owner="Arnoldi", hint="20 is usual")
    Traceback (most recent call last):
    ...
    pytorch_influence_functions.core.errors.InvalidInput: Arnoldi(rank=2.5) must be a whole number of at least 1; \
20 is usual.
    """
    number = int(value) if is_whole(value) else None
    if number is None or (least is not None and number < least) or (most is not None and number > most):
        expected = f"{least}" if least is not None and least == most else f"a whole number{_range(least, most=most)}"
        raise InvalidInput(_sentence(name, value, expected, owner, hint))
    return number


def finite_number(
    name: str,
    value: object,
    *,
    least: Bound | None = None,
    above: Bound | None = None,
    most: Bound | None = None,
    below: Bound | None = None,
    owner: object = None,
    hint: str = "",
) -> float:
    """The value as a float, refused unless it is a finite number within the bounds; True and False are none.

    Args:
        name: what the setting is called, an argument or a phrase such as `"The damping"`.
        value: what was given.
        least: the smallest allowed.
        above: a bound that is itself not allowed.
        most: the largest allowed.
        below: a bound that is itself not allowed.
        owner: the record (or its name) that has the setting as a field.
        hint: what to do, without a full stop.

    Raises:
        InvalidInput: it is not.

    >>> finite_number("The damping", -1, least=0)
    Traceback (most recent call last):
    ...
    pytorch_influence_functions.core.errors.InvalidInput: The damping is -1; it must be a finite number of at least 0.
    """
    number = float(value) if is_finite(value) else math.nan
    within = (
        math.isfinite(number)
        and (least is None or number >= least)
        and (above is None or number > above)
        and (most is None or number <= most)
        and (below is None or number < below)
    )
    if not within:
        bounded = (least is not None or above is not None) and (most is not None or below is not None)
        kind = "a number" if bounded else "a finite number"
        raise InvalidInput(_sentence(name, value, kind + _range(least, above, most, below), owner, hint))
    return number


def choice(name: str, value: object, options: Iterable[object], *, owner: object = None, hint: str = "") -> None:
    """Refuse a value that is none of the options.

    Raises:
        InvalidInput: it is none of them.

    >>> choice("policy", "eror", ("warn", "error"))
    Traceback (most recent call last):
    ...
    pytorch_influence_functions.core.errors.InvalidInput: policy='eror' must be 'warn' or 'error'.
    """
    options = list(options)
    if not any(type(value) is type(option) and value == option for option in options):
        *first, last = map(repr, options)
        expected = f"{', '.join(first)} or {last}" if first else last
        raise InvalidInput(_sentence(name, value, expected, owner, hint))


def flag(name: str, value: object, *, owner: object = None, hint: str = "") -> None:
    """Refuse a value that is neither True nor False.

    Raises:
        InvalidInput: it is something else.

    >>> flag("per_block", "layer", owner="DataInf")
    Traceback (most recent call last):
    ...
    pytorch_influence_functions.core.errors.InvalidInput: DataInf(per_block='layer') must be True or False.
    """
    choice(name, value, (True, False), owner=owner, hint=hint)


def _range(
    least: Bound | None = None, above: Bound | None = None, most: Bound | None = None, below: Bound | None = None
) -> str:
    if least is not None and most is not None:
        return f" from {least} to {most}"
    bounds = {"of at least": least, "above": above, "of at most": most, "below": below}
    phrases = [f"{word} {bound}" for word, bound in bounds.items() if bound is not None]
    return " " + " and ".join(phrases) if phrases else ""


def _sentence(name: str, value: object, expected: str, owner: object, hint: str) -> str:
    if owner is not None:
        subject = f"{owner if isinstance(owner, str) else type(owner).__name__}({name}={value!r})"
    else:
        subject = f"{name}={value!r}" if name.isidentifier() else f"{name} is {value!r}; it"
    return f"{subject} must be {expected}{f'; {hint}' if hint else ''}."
