"""What modules hold beside their weights, remembered before passes over the data and put back after them.

A forward may keep what it likes on its module: the last features, a hidden state, a history, counts. `Attributes`
remembers every attribute and every buffer by identity, and of what can be changed in place (lists, dictionaries, sets,
deques, objects, tensors, arrays, generators) the content too.
"""

from __future__ import annotations

import random
import sys
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from enum import Enum
from functools import cache, partial
from itertools import chain
from operator import is_
from types import BuiltinFunctionType, FunctionType, MethodType, ModuleType
from typing import Any, Final, final

import numpy as np
import torch
from torch import Tensor, nn

from .packed_weights import is_packed

# What torch itself gives every module; buffers, parameters and modules inside have a place of their own below.
_TORCH: Final = frozenset(vars(nn.Module()))
# Nothing in these can change.
_FIXED: Final = frozenset(
    {type(None), bool, int, float, complex, str, bytes, range, slice, frozenset, type, torch.dtype, torch.device}
    | {torch.Size, FunctionType, BuiltinFunctionType, MethodType, ModuleType, nn.Parameter}
)
# How far it is looked: an attribute, its members, theirs. What lies deeper is no state of the module.
_DEPTH: Final = 3
# What has more members is data: they are remembered, and not looked into.
_MANY: Final = 1000
# A tensor or array of more numbers is data too, unless it is an attribute itself.
_LARGE: Final = 1 << 20
# Most objects of these packages serve others too: optimisers, loggers, queues.
_NOT_STATE: Final = (sys.stdlib_module_names | {"torch", "numpy", __name__.partition(".")[0]}) - {
    "types", "argparse", "collections",
}  # fmt: skip
# So does an object that holds one of these: another thread is at work with it.
_OF_THREADS: Final = frozenset({"_thread", "threading", "queue", "_queue", "multiprocessing", "asyncio", "concurrent"})


@final
@dataclass(eq=False)
class Attributes:
    """All attributes of some modules. Made with `Attributes.of`.

    Example:
        >>> layer = nn.Linear(1, 1)
        >>> layer.last, layer.history = None, [1]
        >>> before = Attributes.of([layer])
        >>> layer.last, layer.count = torch.ones(1), 3
        >>> layer.history.append(2)
        >>> before.put_back()
        >>> layer.last, layer.history, hasattr(layer, "count")
        (None, [1], False)
    """

    dictionaries: list[tuple[dict[str, Any], dict[str, Any], frozenset[str]]] = field(default_factory=list)
    """Of modules and objects: the dictionary itself, what was in it, and what in it is looked after elsewhere."""
    contents: list[Callable[[], None]] = field(default_factory=list)
    """Each puts back the content of one other thing that can be changed in place."""
    _seen: set[int] = field(default_factory=set)
    _next: list[Any] = field(default_factory=list)
    """What is to be looked into after what lies as near to the modules."""

    @staticmethod
    def of(modules: Iterable[nn.Module], buffers: bool = False) -> Attributes:
        """Those of these modules, which are given with all modules inside.

        Args:
            modules: in any order, each once.
            buffers: whether buffers that are changed in place are put back too.
        """
        attributes, modules = Attributes(), list(modules)
        attributes._seen.update(map(id, modules))
        for module in modules:
            attributes._of_module(module)
            attributes._next += module._buffers.values() if buffers else ()
        for depth in range(1, _DEPTH + 1):
            level, attributes._next = attributes._next, []
            for value in level:
                attributes._look_into(value, depth)
        attributes._seen, attributes._next = set(), []
        return attributes

    def put_back(self) -> None:
        """Make everything as it was; what did not change is not touched."""
        for members, before, elsewhere in self.dictionaries:
            _put_back_dictionary(members, before, elsewhere)
        with torch.no_grad():
            for put_back in self.contents:
                put_back()

    # ----------------------------------------------------------------------- looking

    def _of_module(self, module: nn.Module) -> None:
        members = vars(module)
        self.dictionaries.append((members, members.copy(), _TORCH))
        if isinstance(module, torch.jit.ScriptModule):
            return
        for registered in (module._buffers, module._parameters, module._modules):
            self.dictionaries.append((registered, registered.copy(), _NONE))
        self._next += [members[name] for name in members.keys() - _TORCH]
        if module._non_persistent_buffers_set:
            self._next.append(module._non_persistent_buffers_set)

    def _look_into(self, value: Any, depth: int) -> None:
        kind = type(value)
        if kind in _FIXED or id(value) in self._seen:
            return
        self._seen.add(id(value))
        if isinstance(value, Tensor):
            self._of_tensor(value, depth)
        elif isinstance(value, np.ndarray):
            if value.dtype.kind in "biufc" and value.flags.writeable and (depth == 1 or value.size <= _LARGE):
                self.contents.append(partial(_put_back_array, value, value.copy()))
        elif isinstance(value, nn.Module):
            # One that forward runs and torch does not know of, as a list of modules hides them.
            for module in value.modules():
                if module is value or id(module) not in self._seen:
                    self._seen.add(id(module))
                    self._of_module(module)
                    self._next += module._buffers.values()
        elif isinstance(value, (list, tuple, dict, set, deque)):
            self._of_container(value)
        else:
            self._of_object(value, kind)

    def _of_tensor(self, tensor: Tensor, depth: int) -> None:
        # One with a graph was computed, and whoever computes it anew makes another.
        if type(tensor) is not Tensor or tensor.grad_fn is not None or tensor.is_inference() or tensor.is_meta:
            return
        small = not is_packed(tensor) if depth == 1 else tensor.numel() <= _LARGE
        if small and tensor.layout is torch.strided and not tensor.is_quantized:
            self.contents.append(partial(put_back_tensor, tensor, tensor.detach().clone()))

    def _of_container(self, value: Any) -> None:
        if isinstance(value, list):
            self.contents.append(partial(_put_back_list, value, list(value)))
        elif isinstance(value, dict):
            base = OrderedDict if isinstance(value, OrderedDict) else dict
            self.contents.append(partial(_put_back_mapping, base, value, dict(base.items(value))))
        elif isinstance(value, set):
            self.contents.append(partial(_put_back_set, value, set(value)))
        elif isinstance(value, deque):
            self.contents.append(partial(_put_back_deque, value, list(value)))
        if len(value) <= _MANY:
            self._next += dict.values(value) if isinstance(value, dict) else value
        if type(value).__module__ not in ("builtins", "collections"):
            self._of_object(value, type(value))

    def _of_object(self, value: Any, kind: type) -> None:
        state = _STATES.get(next((base for base in kind.__mro__ if base in _STATES), object))
        if state is not None:
            read, write = state
            self.contents.append(partial(write, value, read(value)))
            return
        if not _may_be_state(kind):
            return
        members = getattr(value, "__dict__", None)
        members = members if type(members) is dict else {}
        slots = {name: member for name, member in _slots_of(value, kind)}
        if any(type(m).__module__.partition(".")[0] in _OF_THREADS for m in chain(members.values(), slots.values())):
            return
        if hasattr(value, "__dict__"):
            self.dictionaries.append((members, members.copy(), _NONE))
        if _slots(kind):
            self.contents.append(partial(_put_back_slots, value, kind, slots))
        self._next += [*members.values(), *slots.values()]


_NONE: Final[frozenset[str]] = frozenset()


@cache
def _may_be_state(kind: type) -> bool:
    return not issubclass(kind, Enum) and str(kind.__module__).partition(".")[0] not in _NOT_STATE


@cache
def _slots(kind: type) -> tuple[str, ...]:
    named = [vars(base).get("__slots__", ()) for base in kind.__mro__]
    names = chain.from_iterable((name,) if isinstance(name, str) else tuple(name) for name in named)
    return tuple(n for n in names if n not in ("__dict__", "__weakref__") and not n.startswith("__"))


def _slots_of(value: Any, kind: type) -> Iterator[tuple[str, Any]]:
    for name in _slots(kind):
        with suppress(AttributeError):  # not filled
            yield name, object.__getattribute__(value, name)


# --------------------------------------------------------------------------- putting back


def _same_members(now: dict[Any, Any], before: dict[Any, Any]) -> bool:
    if len(now) != len(before) or not all(map(is_, now.values(), before.values())):
        return False
    return all(map(is_, now, before))


def _put_back_dictionary(members: dict[str, Any], before: dict[str, Any], elsewhere: frozenset[str]) -> None:
    if _same_members(members, before):
        return
    for name in members.keys() - before.keys() - elsewhere:
        del members[name]
    for name in before.keys() - elsewhere:
        if name not in members or members[name] is not before[name]:
            members[name] = before[name]
    if list(members) != list(before) and members.keys() == before.keys():
        # In the order of before, which is that of a state dict.
        for name in before:
            members[name] = members.pop(name)


def _put_back_mapping(base: Any, value: Any, before: dict[Any, Any]) -> None:
    if not _same_members(dict(base.items(value)), before):
        base.clear(value)
        for key, member in before.items():
            base.__setitem__(value, key, member)


def _put_back_list(value: list[Any], before: list[Any]) -> None:
    if list.__len__(value) != len(before) or not all(map(is_, list.__iter__(value), before)):
        list.__setitem__(value, slice(None), before)


def _put_back_deque(value: deque[Any], before: list[Any]) -> None:
    if len(value) != len(before) or not all(map(is_, value, before)):
        deque.clear(value)
        deque.extend(value, before)


def _put_back_set(value: set[Any], before: set[Any]) -> None:
    if len(value) != len(before) or set(map(id, value)) != set(map(id, before)):
        set.clear(value)
        set.update(value, before)


def _put_back_slots(value: Any, kind: type, before: dict[str, Any]) -> None:
    now = dict(_slots_of(value, kind))
    for name in now.keys() - before.keys():
        object.__delattr__(value, name)
    for name, member in before.items():
        if name not in now or now[name] is not member:
            object.__setattr__(value, name, member)


def _put_back_array(value: np.ndarray[Any, Any], before: np.ndarray[Any, Any]) -> None:
    if not np.array_equal(value, before):
        value[...] = before


def put_back_tensor(tensor: Tensor, before: Tensor) -> None:
    """Give a tensor that was changed in place its value again; gradients are not to be recorded meanwhile.

    Args:
        tensor: the tensor.
        before: a copy of its value from before.
    """
    if tensor.shape != before.shape or tensor.dtype != before.dtype or tensor.device != before.device:
        tensor.data = before
    elif not torch.equal(tensor, before):
        tensor.copy_(before)


def _write_numpy_generator(generator: np.random.Generator, state: Any) -> None:
    generator.bit_generator.state = state


# Generators of random numbers: how their state is read, and written.
_STATES: Final[dict[type, tuple[Callable[[Any], Any], Callable[[Any, Any], Any]]]] = {
    torch.Generator: (torch.Generator.get_state, torch.Generator.set_state),
    random.Random: (random.Random.getstate, random.Random.setstate),
    np.random.RandomState: (np.random.RandomState.get_state, np.random.RandomState.set_state),
    np.random.Generator: (lambda generator: generator.bit_generator.state, _write_numpy_generator),
}
