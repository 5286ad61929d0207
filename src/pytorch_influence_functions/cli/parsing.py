"""Methods, dampings, ranges of queries and of examples, parsed from a command line."""

from collections.abc import Container, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from ..core.errors import InvalidInput, UnknownName
from ..damping.rules import Absolute, AbstractDamping, FromTraining, PerDirection, Relative
from ..influence.method import AbstractMethod
from ..methods.names import along_the_run, find_method


def parse_method(text: str, run: Path | None = None) -> AbstractMethod:
    """The method of this name, along the run where there is one.

    Raises:
        UnknownName: there is none; the nearest one is offered.
        InvalidInput: the method needs arguments.

    >>> parse_method("grad-dot") == find_method("grad_dot")
    True
    """
    try:
        return find_method(text) if run is None else along_the_run(run, text)
    except InvalidInput as error:
        if run is not None and not isinstance(error, UnknownName):
            raise
        error.args = (f"{error} Any method can be made in get_options() of the task file.",)
        raise


def override_damping(method: AbstractMethod, text: str | None) -> AbstractMethod:
    """The method with the damping of a flag; `None` leaves its own.

    Raises:
        InvalidInput: the text is no damping, or the method takes none.
    """
    return method if text is None else method.with_options(damping=parse_damping(text))


def parse_damping(text: str) -> AbstractDamping:
    """A damping from text: a number, or a rule's name with its numbers.

    Rules are `relative:SHARE`, `per-block:SHARE`, `per-direction:SHARE`, `training:RATE:STEPS[:MOMENTUM]` and
    `adam:RATE:STEPS:BATCH`.

    Raises:
        InvalidInput: the text is none of them, or a number is out of range.

    >>> parse_damping("relative:0.3")
    Relative(share=0.3)
    >>> parse_damping("per-block:0.1"), parse_damping("per-direction:0.3")
    (Relative(share=0.1, per_block=True), PerDirection(share=0.3))
    >>> parse_damping("training:0.1:2000")
    FromTraining(lr=0.1, steps=2000)
    >>> parse_damping("adam:1e-3:500:8")
    FromTraining(lr=0.001, steps=500, adam_batch=8)
    """
    kind, *rest = text.strip().split(":")
    try:
        if not rest:
            return Absolute(float(kind))
        numbers = [float(x) for x in rest]
        if kind == "relative" and len(rest) == 1:
            return Relative(numbers[0])
        if kind == "per-block" and len(rest) == 1:
            return Relative(numbers[0], per_block=True)
        if kind == "per-direction" and len(rest) == 1:
            return PerDirection(numbers[0])
        if kind == "training" and len(rest) in (2, 3):
            return FromTraining(numbers[0], int(rest[1]), momentum=numbers[2] if len(numbers) == 3 else 0.0)
        if kind == "adam" and len(rest) == 3:
            return FromTraining(numbers[0], int(rest[1]), adam_batch=int(rest[2]))
    except InvalidInput:
        raise
    except ValueError:
        pass
    raise InvalidInput(
        f"{text!r} is no damping; write a number such as 0.01 (absolute), relative:0.1 (a share of the mean "
        "eigenvalue), per-block:0.1 (of each layer's own), per-direction:0.2 (of the mean over what the data "
        "determine), training:RATE:STEPS, or adam:RATE:STEPS:BATCH."
    )


def parse_query_positions(text: str, n: int) -> list[int]:
    """Positions among `n` queries, in the order written: `all`, `0:20`, `5`, `1,4,10:20`, `0:100:10`.

    Raises:
        InvalidInput: no such query, none at all, one named twice, or text that is no range.

    >>> parse_query_positions("7, 0:6:2", 10), len(parse_query_positions("all", 10))
    ([7, 0, 2, 4], 10)
    """
    return list(range(n)) if text.strip().lower() == "all" else _parse_positions(text, n, "--queries", "query")


def parse_example_positions(text: str, n: int, flag: str) -> list[int]:
    """Places among `n` training examples, in the order written: `0:20`, `5`, `1,4,10:20`, `0:100:10`.

    Raises:
        InvalidInput: no such example, none at all, one named twice, or text that is no range; `flag` is named.

    >>> parse_example_positions("3,7", 10, "--remove")
    [3, 7]
    """
    return _parse_positions(text, n, flag, "example")


def parse_assignments(texts: Sequence[str], n: int, flag: str) -> dict[int, str]:
    """What is given to training examples: `["20=cat", "3,7=dog"]`, by place.

    Raises:
        InvalidInput: a text without `=`, or a place that is none, or given twice; `flag` is named.

    >>> parse_assignments(["20=cat", "3,7=dog"], 40, "--relabel")
    {20: 'cat', 3: 'dog', 7: 'dog'}
    """
    given: dict[int, str] = {}
    for text in texts:
        places, mark, value = text.partition("=")
        if not mark or not value.strip():
            raise InvalidInput(f"{flag} {text} gives nothing to an example; write {flag} 20=VALUE, or 3,7=VALUE.")
        for place in parse_example_positions(places, n, flag):
            if place in given:
                raise InvalidInput(f"{flag} names example {place} twice; name each once.")
            given[place] = value.strip()
    return given


def parse_amount(text: str, flag: str) -> int | float:
    """A number of examples, `20`, or a share of them, `0.1`.

    Raises:
        InvalidInput: it is neither; `flag` is named.

    >>> parse_amount("20", "--most"), parse_amount("0.1", "--most")
    (20, 0.1)
    """
    with suppress(ValueError):
        return int(text)
    with suppress(ValueError):
        return float(text)
    raise InvalidInput(f"{flag} {text} is no amount; write a number of examples such as 20, or a share such as 0.1.")


def parse_fraction(text: str, flag: str) -> float:
    """A number, also as a fraction: `0.3`, `2/255`.

    Raises:
        InvalidInput: it is neither; `flag` is named.

    >>> parse_fraction("0.3", "--size"), parse_fraction("1/4", "--size")
    (0.3, 0.25)
    """
    over, mark, under = text.partition("/")
    with suppress(ValueError, ZeroDivisionError):
        return float(over) / float(under) if mark else float(over)
    raise InvalidInput(f"{flag} {text} is no number; write one such as 0.3, or 2/255.")


def parse_bounds(text: str | None, flag: str) -> tuple[float, float] | None:
    """The smallest and the largest value, `0:1`; `None` stays so.

    Raises:
        InvalidInput: it is no such pair; `flag` is named.

    >>> parse_bounds("-1:1", "--bounds")
    (-1.0, 1.0)
    """
    if text is None:
        return None
    with suppress(ValueError):
        low, high = map(float, text.split(":"))
        if low < high:
            return low, high
    raise InvalidInput(f"{flag} {text} is no pair of bounds; write the smallest and the largest value, such as 0:1.")


def parse_by(texts: Sequence[str]) -> str | list[str] | dict[str, list[str]] | None:
    """What `by=` is given from the texts of `--by`: `layer`, `head`, patterns of names, or `NAME=PATTERN,PATTERN`.

    Raises:
        InvalidInput: a part without a name or a pattern, or one that is named twice.

    >>> parse_by(["layer"]), parse_by(["0", "2.*"]), parse_by(["body=0,2", "top=4"])
    ('layer', ['0', '2.*'], {'body': ['0', '2'], 'top': ['4']})
    """
    if not texts:
        return None
    if list(texts) in (["layer"], ["head"]):
        return texts[0]
    parts: dict[str, list[str]] = {}
    for text in texts:
        name, mark, patterns = text.partition("=")
        listed = [pattern.strip() for pattern in (patterns if mark else text).split(",")]
        if not name.strip() or not all(listed):
            raise InvalidInput(f"--by {text} names no part; write --by layer, --by head, --by '0.*', or --by top=4,5.")
        if name.strip() in parts:
            raise InvalidInput(f"--by names the part {name.strip()} twice; write its patterns with commas between.")
        parts[name.strip()] = listed
    return (
        parts if any("=" in text for text in texts) else [pattern for several in parts.values() for pattern in several]
    )


def parse_where(texts: Sequence[str], texts_of: Container[str] = ()) -> dict[str, list[Any]] | None:
    """What `where=` is given from the texts of `--where COLUMN=VALUE`: the values of each column.

    Args:
        texts: as they were written; several of one column mean any of them.
        texts_of: the columns that hold texts; in others a value is a number, true or false, where it reads as one.

    Raises:
        InvalidInput: a text without a column or a value.

    >>> parse_where(["source=web", "source=book", "year=1999"], {"source"})
    {'source': ['web', 'book'], 'year': [1999]}
    """
    where: dict[str, list[Any]] = {}
    for text in texts:
        column, mark, value = text.partition("=")
        if not mark or not column.strip() or not value.strip():
            raise InvalidInput(f"--where {text} names no value of a column; write --where COLUMN=VALUE.")
        name = column.strip()
        where.setdefault(name, []).append(value.strip() if name in texts_of else _plain_value(value.strip()))
    return where or None


def _plain_value(text: str) -> Any:
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    for kind in (int, float):
        with suppress(ValueError):
            return kind(text)
    return text


def _parse_positions(text: str, n: int, flag: str, noun: str) -> list[int]:
    positions: list[int] = []
    for part in text.split(","):
        positions += _parse_range(part.strip(), text, n, flag, noun)
    if len(set(positions)) < len(positions):
        raise InvalidInput(f"{flag} {text} names {_a(noun)} twice; name each once.")
    return positions


def _parse_range(part: str, text: str, n: int, flag: str, noun: str) -> list[int]:
    pieces = part.split(":")
    if len(pieces) > 3 or not all(x.strip().isdigit() or (not x.strip() and len(pieces) > 1) for x in pieces):
        every = ", or all" if noun == "query" else ""
        raise InvalidInput(
            f"{flag} {text} is no range of positions; write 0:20 (the first twenty), 5, 1,4,10:20{every}."
        )
    numbers = [int(x) if x.strip() else None for x in pieces]
    if len(numbers) == 1:
        numbers = [numbers[0], (numbers[0] or 0) + 1]
    if len(numbers) == 3 and numbers[2] == 0:
        raise InvalidInput(f"{flag} {text} has a step of 0; a step is at least 1.")
    start, stop = numbers[0] or 0, n if numbers[1] is None else numbers[1]
    if stop > n or start >= n:
        last = max(start, stop - 1)
        raise InvalidInput(f"{flag} {text} asks for {noun} {last}, and there are {n:,} (0 to {n - 1}).")
    positions = list(range(n))[slice(*numbers)]
    if not positions:
        raise InvalidInput(f"{flag} {text} picks no {noun}; the first number must be below the second.")
    return positions


def _a(noun: str) -> str:
    return f"an {noun}" if noun[0] in "aeiou" else f"a {noun}"
