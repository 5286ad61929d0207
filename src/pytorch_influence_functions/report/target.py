"""How labels and predicted numbers are shown: class names, or numbers with their name, unit and raw value."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeAlias, final

import numpy as np
import torch
from torch import Tensor

from ..core.errors import InvalidInput
from ..plots.examples import format_value
from ..scores import indexing
from ..scores.scores import Scores
from .ranking import Classes

UndoScaling: TypeAlias = Callable[[Any], Any] | tuple[float, float] | None
"""A function that gives back raw values, or the (mean, std) that were taken off; None: they are raw."""


@final
@dataclass(frozen=True)
class Target:
    """What the labels are.

    Attributes:
        numeric: whether they are numbers rather than classes.
        name: what the number is called, with its unit in square brackets: `"price [$]"`; may be empty.
        undo: how raw values are given back.
    """

    numeric: bool = False
    name: str = ""
    undo: UndoScaling = None

    @classmethod
    def of(cls, scores: Scores, classes: Classes | None, name: str = "", undo: UndoScaling = None) -> Target:
        """The target of these scores.

        Raises:
            InvalidInput: a name that is no text, or `undo` is neither a function nor (mean, std).
        """
        if not isinstance(name, str):
            raise InvalidInput(f'target={name!r} names the predicted number; give a text such as "price [$]".')
        pair = isinstance(undo, tuple) and len(undo) == 2
        if undo is not None and not callable(undo) and not pair:
            raise InvalidInput(f"denormalize_target={undo!r} must be a function or (mean, std).")
        labels = scores.train_labels if scores.train_labels is not None else scores.query_labels
        return cls(classes is None and _are_numbers(labels), name, undo)

    @property
    def unit(self) -> str:
        """The unit, from the square brackets of the name; empty without."""
        match = re.search(r"\[(.+)\]\s*$", self.name)
        return match[1] if match else ""

    def raw(self, value: float) -> float:
        """The value in its own unit.

        Raises:
            InvalidInput: `denormalize_target=` gives no finite number.
        """
        if isinstance(self.undo, tuple):
            mean, std = self.undo
            return value * float(std) + float(mean)
        if self.undo is None:
            return value
        number = float(np.asarray(self.undo(torch.tensor(value, dtype=torch.float64))).reshape(-1)[0])
        if not math.isfinite(number):
            raise InvalidInput(f"denormalize_target= makes {number} of {value:g}; it must give a finite number.")
        return number

    def number(self, label: Any) -> float | None:
        """A label as a raw number; None for classes, and where there is none."""
        label = indexing.plain_value(label)
        return self.raw(float(label)) if self.numeric and isinstance(label, (int, float)) else None

    def text(self, scores: Scores, label: Any) -> str:
        """A label as it is shown."""
        number = self.number(label)
        return scores.label_name(label) if number is None else self.number_text(number)

    def number_text(self, value: float) -> str:
        """A raw number with its unit."""
        return f"{format_value(value)} {self.unit}".rstrip()


def _are_numbers(labels: Any) -> bool:
    if labels is None:
        return False
    if isinstance(labels, Tensor) and labels.numel() != len(labels):
        return False
    return all(isinstance(x, (int, float)) for x in indexing.plain_values(labels))
