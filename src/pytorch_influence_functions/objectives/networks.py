"""Networks that a loss is or uses, such as a teacher: asked in eval mode, and left as they were."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from types import CodeType
from typing import Any, Final

from torch import nn

from ..core.attributes import Attributes

# A helper that calls a helper; what lies deeper is not looked for.
_DEPTH: Final = 4
# A global may be a large collection.
_MOST: Final = 10_000


def networks_of(function: Any) -> tuple[nn.Module, ...]:
    """The modules that a loss is, holds, or reaches by name: its closure, defaults, attributes and globals.

    Args:
        function: the loss.

    Example:
        >>> teacher = nn.Linear(2, 2)
        >>> networks_of(lambda outputs, targets: (outputs - teacher(targets)).square().mean())
        (Linear(in_features=2, out_features=2, bias=True),)
    """
    networks: dict[int, nn.Module] = {}
    seen: set[int] = set()

    def look(value: Any, depth: int) -> None:
        if id(value) in seen or depth > _DEPTH or len(seen) > _MOST:
            return
        seen.add(id(value))
        if isinstance(value, nn.Module):
            networks[id(value)] = value
            return
        for member in _reached_from(value):
            look(member, depth + 1)

    look(function, 0)
    return tuple(networks.values())


def _reached_from(value: Any) -> Iterator[Any]:
    if isinstance(value, (tuple, list)):
        yield from value[:100]
    elif isinstance(value, Mapping):
        yield from list(value.values())[:100]
    elif isinstance(value, functools.partial):
        yield from (value.func, value.args, value.keywords)
    elif isinstance(code := getattr(value, "__code__", None), CodeType):
        for cell in getattr(value, "__closure__", None) or ():
            try:
                yield cell.cell_contents
            except ValueError:  # not assigned yet
                continue
        owner = getattr(value, "__self__", None)
        yield owner if isinstance(owner, nn.Module) else getattr(owner, "__dict__", None)
        yield from (getattr(value, "__defaults__", None), getattr(value, "__kwdefaults__", None))
        present = getattr(value, "__globals__", {})
        yield from (present[name] for name in code.co_names if _may_hold(present.get(name)))
    elif callable(value) and not isinstance(value, type):
        yield from (getattr(value, "__dict__", None), type(value).__call__)


def _may_hold(value: Any) -> bool:
    """Whether a global is looked into: a network, a collection of them, or a function of the user's own."""
    if isinstance(value, (nn.Module, tuple, list, dict)):
        return True
    own = not str(getattr(value, "__module__", None) or "torch").startswith("torch")
    return own and callable(value) and not isinstance(value, type)


@contextmanager
def in_eval_mode(networks: tuple[nn.Module, ...]) -> Iterator[None]:
    """Eval mode for a while: in training mode a loss would differ with its batch and move running statistics.

    What they keep of the call, such as its result, is put back too: from inside a transform it cannot be used outside.

    Args:
        networks: the modules.
    """
    modules = list({id(module): module for network in networks for module in network.modules()}.values())
    before = Attributes.of(modules, buffers=True)
    training = [module for module in modules if getattr(module, "training", False)]
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True
        before.put_back()
