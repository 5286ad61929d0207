"""How methods, dampings and queries are spelled on a command line."""

from dataclasses import replace

from ..core.errors import InvalidInput
from ..damping.rules import Absolute, AbstractDamping, FromTraining, Relative
from ..influence.attribution import Influence
from ..influence.method import AbstractMethod
from ..methods.names import find_method


def method_of(word: str) -> Influence:
    """The method of this name.

    Raises:
        UnknownName: there is none; the nearest one is offered.
        InvalidInput: the method needs arguments.

    >>> method_of("grad-dot").curvature
    Identity()
    """
    try:
        return find_method(word)
    except InvalidInput as error:
        error.args = (f"{error} Any method can be made in get_options() of the task file.",)
        raise


def damped(method: AbstractMethod, word: str | None) -> AbstractMethod:
    """The method with a damping in words; `None` leaves its own.

    Raises:
        InvalidInput: the words are no damping, or the method has none.
    """
    if word is None:
        return method
    if not isinstance(method, Influence):
        raise InvalidInput(f"{type(method).__name__} takes no --damping; leave it out.")
    return replace(method, damping=damping_of(word))


def damping_of(word: str) -> AbstractDamping:
    """A damping in words: a number (absolute), `relative:SHARE`, or `training:RATE:STEPS[:MOMENTUM]`.

    >>> damping_of("relative:0.3")
    Relative(share=0.3, per_block=False)
    >>> damping_of("training:0.1:2000")
    FromTraining(lr=0.1, steps=2000, momentum=0.0)
    """
    kind, *rest = word.strip().split(":")
    try:
        if not rest:
            return Absolute(float(kind))
        numbers = [float(x) for x in rest]
        if kind == "relative" and len(rest) == 1:
            return Relative(numbers[0])
        if kind == "training" and len(rest) in (2, 3):
            return FromTraining(numbers[0], int(rest[1]), *numbers[2:])
    except InvalidInput:
        raise
    except ValueError:
        pass
    raise InvalidInput(
        f"{word!r} is no damping; write a number such as 0.01 (absolute), relative:0.1 (a share of the mean "
        "eigenvalue), or training:RATE:STEPS."
    )


def picked(words: str, n: int) -> list[int]:
    """Positions among `n` queries, in the order written: `all`, `0:20`, `5`, `1,4,10:20`, `0:100:10`.

    Raises:
        InvalidInput: no such query, none at all, one named twice, or words that are no range.

    >>> picked("7, 0:6:2", 10), len(picked("all", 10))
    ([7, 0, 2, 4], 10)
    """
    if words.strip().lower() == "all":
        return list(range(n))
    found: list[int] = []
    for part in words.split(","):
        found += _range(part.strip(), words, n)
    if len(set(found)) < len(found):
        raise InvalidInput(f"--queries {words} names a query twice; name each once.")
    return found


def _range(part: str, words: str, n: int) -> list[int]:
    pieces = part.split(":")
    if len(pieces) > 3 or not all(x.strip().isdigit() or (not x.strip() and len(pieces) > 1) for x in pieces):
        raise InvalidInput(
            f"--queries {words} is no range of positions; write 0:20 (the first twenty), 5, 1,4,10:20, or all."
        )
    numbers = [int(x) if x.strip() else None for x in pieces]
    if len(numbers) == 1:
        numbers = [numbers[0], (numbers[0] or 0) + 1]
    if len(numbers) == 3 and numbers[2] == 0:
        raise InvalidInput(f"--queries {words} has a step of 0; a step is at least 1.")
    start, stop = numbers[0] or 0, n if numbers[1] is None else numbers[1]
    if stop > n or start >= n:
        last = max(start, stop - 1)
        raise InvalidInput(f"--queries {words} asks for query {last}, and there are {n:,} (0 to {n - 1}).")
    found = list(range(n))[slice(*numbers)]
    if not found:
        raise InvalidInput(f"--queries {words} picks no query; the first number must be below the second.")
    return found
