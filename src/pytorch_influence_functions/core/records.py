"""How a frozen record of options prints: what was chosen, and not what was left at its default."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import MISSING, Field, fields, is_dataclass
from types import MappingProxyType
from typing import Any, TypeAlias

from torch import Tensor

Setting: TypeAlias = tuple[str, Any, Any]
"""Name, value and default of a field; the default is `MISSING` where the value is always shown."""

ALWAYS_SHOWN: Mapping[str, bool] = MappingProxyType({"always shown": True})
"""Metadata of a field that is printed even at its default, because it is what the record is about."""

_SHOWN_NUMBERS = 6


class Record:
    """A record whose `repr` leaves out every field that has its default value.

    Derive from it and write `@dataclass(frozen=True, repr=False)`.

    >>> from dataclasses import dataclass
    >>> @dataclass(frozen=True, repr=False)
    ... class Walk(Record):
    ...     steps: int
    ...     speed: float = 1.0
    >>> Walk(3), Walk(3, speed=2.0)
    (Walk(steps=3), Walk(steps=3, speed=2.0))
    """

    def __repr__(self) -> str:
        return describe_record(self)


def describe_record(record: Any) -> str:
    """`Name(field=value, ...)` with the fields that differ from their defaults."""
    shown = []
    for name, value, default in settings_of(record):
        if isinstance(value, Tensor):
            shown.append(f"{name}={_describe_tensor(value)}")
        elif default is MISSING or value != default:
            called = getattr(value, "__name__", None) if callable(value) else None
            shown.append(f"{name}={called or repr(value)}")
    return f"{type(record).__name__}({', '.join(shown)})"


def settings_of(record: Any) -> list[Setting]:
    """Every field of a record that `repr` may show; an object that is no dataclass has its attributes."""
    if is_dataclass(record):
        return [(f.name, getattr(record, f.name), _default(f)) for f in fields(record) if f.repr]
    return [(name, value, MISSING) for name, value in vars(record).items()]


def _default(field: Field[Any]) -> Any:
    if ALWAYS_SHOWN.items() <= field.metadata.items():
        return MISSING
    return field.default if field.default_factory is MISSING else field.default_factory()


def _describe_tensor(value: Tensor) -> str:
    numbers = [f"{x:g}" for x in value.flatten()[:_SHOWN_NUMBERS].tolist()]
    return f"[{', '.join(numbers)}{', …' if value.numel() > _SHOWN_NUMBERS else ''}]"
