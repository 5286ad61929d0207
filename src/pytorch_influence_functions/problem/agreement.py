"""What processes that share work compare first, and how a public call begins on all of them."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any, Final, ParamSpec, TypeVar

from torch import Tensor

from ..core.batches import tensors_of
from ..core.cut_up import is_part
from ..core.digest import digest
from ..core.distributed import current, process_count, together
from ..core.indexing import spread_sample
from .checkpoints import named_tensors
from .data import Source
from .fitted_weights import sum_of_bits
from .ingredients import seeded
from .model_state import plain_autograd
from .problem import Problem

P = ParamSpec("P")
R = TypeVar("R")

# What differs from process to process though the same is asked: places in memory, and folders on disks of their own.
_OWN: Final = re.compile(r" at 0x[0-9a-f]+|(, )?folder=(\w+\()?'[^']*'\)?")
_ITEMS: Final = 3


def entry(function: Callable[P, R]) -> Callable[P, R]:
    """A public call that computes: see `plain_autograd`, and `together` under `distributed()`."""
    return plain_autograd()(together(function))


def agree_on_problem(problem: Problem, method: Any) -> None:
    """Make sure that every process fits the same method to the same model and training data.

    Raises:
        InvalidInput: they differ; the message names in what.
    """

    def facts() -> Mapping[str, str]:
        weights = {f"the tensor {k!r} of the model": _bits(t) for k, t in named_tensors(problem.model).items()}
        return {
            "the method": in_common(method),
            "the model": type(problem.model).__name__,
            "the training loss": in_common(problem.describe_objective()),
            "the number of checkpoints": str(len(problem.checkpoints)),
            "the set of parameters": f"{len(problem.space.names)} tensors of {problem.space.size:,} numbers",
            **_looks(problem.data, "training example"),
            **weights,
        }

    current().agree(facts)


def agree_on_question(source: Source, against: Source | None, given: Mapping[str, Any]) -> None:
    """Make sure that every process asks the same: queries, what they are held against, and other arguments by name.

    Raises:
        InvalidInput: they do not.
    """

    def facts() -> Mapping[str, str]:
        contrast = {} if against is None else _looks(against, "example of contrast=")
        return {
            **{name: _short(in_common(value)) for name, value in given.items()},
            **_looks(source, "query"),
            **contrast,
        }

    current().agree(facts)


def agree_on_given(given: Mapping[str, Any], source: Source | None = None) -> None:
    """Make sure that every process gives the same arguments, by name, and the same examples to be stored.

    Raises:
        InvalidInput: they do not.
    """

    def facts() -> Mapping[str, str]:
        stored = {} if source is None else _looks(source, "stored example")
        return {**{name: _short(in_common(value)) for name, value in given.items()}, **stored}

    current().agree(facts)


def in_common(value: Any) -> str:
    """How a value is written, without what is a process's own."""
    return _OWN.sub("", str(value))


def note_on_processes() -> tuple[str, ...]:
    """What is told of the processes with a result; nothing where there is one."""
    world, count = current(), process_count()
    if world.size > 1:
        return (f"computed by {world.size} processes, each on its share of the training examples",)
    if count == 1:
        return ()
    return (
        f"{count} processes are running and this one computed all by itself; distributed=True shares the work out, "
        "where every process makes the same call",
    )


def _looks(source: Source, what: str) -> dict[str, str]:
    """How many examples there are, and digests of some; not of what comes out of its transform anew each time."""
    facts = {f"the number of {'queries' if what == 'query' else what.replace('example', 'examples')}": str(len(source))}
    for index in spread_sample(len(source), _ITEMS).tolist():
        with seeded():
            item = source.item(index)
        facts[f"{what} {index}"] = digest([(where, tensor) for where, tensor in tensors_of(item)])[:12]
    return facts


def _short(text: str) -> str:
    return text if len(text) < 100 else f"{text[:60]}... ({digest(text)[:12]})"


def _bits(tensor: Tensor) -> str:
    """A tensor's shape and its bits, in words."""
    if is_part(tensor):
        return f"of shape {tuple(tensor.shape)}, of which each process has a part"
    return f"of shape {tuple(tensor.shape)} with bits that add up to {sum_of_bits(tensor)}"
