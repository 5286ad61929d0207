"""Weights that stay what they are while a module is called with others in their place."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from typing import Any, Final

from torch import Tensor, nn

_lock: Final = threading.Lock()
_thread: Final = threading.local()


@dataclass(eq=False)
class _Replaced:
    """The method of `nn.Module` that moves and converts, while one in its place looks who calls it."""

    original: Callable[..., Any] | None = None
    calls: int = 0


_replaced: Final = _Replaced()


@contextmanager
def weights_held() -> Iterator[None]:
    """Let forward move or convert no weights in this thread, as `self.router = self.router.to(dtype)` does.

    `.to` writes `.data` of a weight also where it has that type already. Under the transforms of `torch.func` this
    leaves the user's own weight pointing at what is gone after them, and the interpreter crashes.

    Raises:
        RuntimeError: forward would change the type or place of a weight.
    """
    with _lock:
        if _replaced.calls == 0:
            _replaced.original, nn.Module._apply = nn.Module._apply, _apply  # type: ignore[method-assign]
        _replaced.calls += 1
    _thread.calls = getattr(_thread, "calls", 0) + 1
    try:
        yield
    finally:
        _thread.calls -= 1
        with _lock:
            _replaced.calls -= 1
            if _replaced.calls == 0 and _replaced.original is not None:
                nn.Module._apply = _replaced.original  # type: ignore[method-assign]


def _apply(module: nn.Module, change: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
    if not getattr(_thread, "calls", 0):  # of another thread
        assert _replaced.original is not None
        moved: nn.Module = _replaced.original(module, change, recurse)
        return moved
    for tensor in chain(module.parameters(recurse), module.buffers(recurse)):
        after = change(tensor)
        if (after.dtype, after.device) != (tensor.dtype, tensor.device):
            raise RuntimeError(
                f"{type(module).__name__} converts its own weights while the model runs, from {tensor.dtype} on "
                f"{tensor.device} to {after.dtype} on {after.device}; convert them once, in __init__."
            )
    return module
