"""Settings are taken or refused in one sentence: what was given, what is expected, what to do."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch

from pytorch_influence_functions.core.errors import InvalidInput
from pytorch_influence_functions.core.validate import choice, finite_number, flag, whole_number


@dataclass
class Record:
    field: Any = None


@pytest.mark.parametrize("value", [1, 7, np.int64(3), np.uint8(2), 10**20])
def test_whole_numbers_are_taken(value: Any) -> None:
    number = whole_number("k", value)
    assert type(number) is int and number == value


@pytest.mark.parametrize("value", [0, -1, 2.0, 2.5, True, np.bool_(True), "3", None, math.nan, torch.tensor(2)])
def test_what_is_no_whole_number_is_refused(value: Any) -> None:
    with pytest.raises(InvalidInput) as refused:
        whole_number("k", value)
    assert str(refused.value) == f"k={value!r} must be a whole number of at least 1."


def test_bounds_of_whole_numbers() -> None:
    assert whole_number("k", 0, 0) == 0 and whole_number("k", -5, None) == -5 and whole_number("k", 3, 1, 3) == 3
    with pytest.raises(InvalidInput, match=r"^k=4 must be a whole number from 1 to 3\.$"):
        whole_number("k", 4, 1, 3)
    with pytest.raises(InvalidInput, match=r"^k=4 must be a whole number of at most 3\.$"):
        whole_number("k", 4, None, 3)
    with pytest.raises(InvalidInput, match=r"^k='x' must be a whole number\.$"):
        whole_number("k", "x", None)


@pytest.mark.parametrize("value", [0, 1, -2.5, np.float32(0.5), np.int64(2), 1e300])
def test_finite_numbers_are_taken(value: Any) -> None:
    number = finite_number("x", value)
    assert type(number) is float and number == value


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, True, "0.1", None, 1j, [1.0], torch.tensor(1.0)])
def test_what_is_no_finite_number_is_refused(value: Any) -> None:
    with pytest.raises(InvalidInput) as refused:
        finite_number("x", value)
    assert str(refused.value) == f"x={value!r} must be a finite number."


BOUNDS: list[tuple[dict[str, Any], list[float], list[float], str]] = [
    ({"least": 0}, [0, 1], [-1e-9, -1, math.inf], "a finite number of at least 0"),
    ({"above": 0}, [1e-9, 1], [0, -1, math.nan], "a finite number above 0"),
    ({"below": 1}, [-5, 0.9], [1, 2], "a finite number below 1"),
    ({"most": 1}, [-5, 1], [1.1], "a finite number of at most 1"),
    ({"least": 0, "below": 1}, [0, 0.9], [1, -0.1], "a number of at least 0 and below 1"),
    ({"above": 0, "below": 1}, [0.5], [0, 1, math.nan], "a number above 0 and below 1"),
    ({"least": 0, "most": 1}, [0, 0.5, 1], [-0.1, 1.1, math.inf], "a number from 0 to 1"),
    ({"above": 0, "most": 1}, [0.5, 1], [0, 1.1], "a number above 0 and of at most 1"),
]


@pytest.mark.parametrize(("bounds", "taken", "refused", "expected"), BOUNDS, ids=[row[3] for row in BOUNDS])
def test_bounds_of_numbers(bounds: dict[str, Any], taken: list[float], refused: list[float], expected: str) -> None:
    for value in taken:
        assert finite_number("x", value, **bounds) == value
    for value in refused:
        with pytest.raises(InvalidInput) as error:
            finite_number("x", value, **bounds)
        assert str(error.value) == f"x={value!r} must be {expected}."


def test_choices_and_flags() -> None:
    choice("way", "b", ("a", "b"))
    flag("fast", False)
    for refused, sentence in (
        (lambda: choice("way", "c", ("a", "b", "d")), "way='c' must be 'a', 'b' or 'd'."),
        (lambda: choice("way", None, ("a",)), "way=None must be 'a'."),
        (lambda: flag("fast", 1), "fast=1 must be True or False."),
        (lambda: flag("fast", "no", hint="leave it out"), "fast='no' must be True or False; leave it out."),
    ):
        with pytest.raises(InvalidInput) as error:
            refused()
        assert str(error.value) == sentence


def test_the_sentence_names_records_arguments_and_phrases() -> None:
    for given, sentence in (
        ({"owner": Record()}, "Record(field=0) must be a whole number of at least 1."),
        ({"owner": "Made"}, "Made(field=0) must be a whole number of at least 1."),
        ({"hint": "2 is usual"}, "field=0 must be a whole number of at least 1; 2 is usual."),
    ):
        with pytest.raises(InvalidInput) as error:
            whole_number("field", 0, **given)  # type: ignore[arg-type]
        assert str(error.value) == sentence
    with pytest.raises(InvalidInput, match=r"^The damping of 'fc' is -1; it must be a finite number of at least 0\.$"):
        finite_number("The damping of 'fc'", -1, least=0)
