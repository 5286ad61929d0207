"""A module called as a function of its weights."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

from torch import Tensor, nn
from torch.func import functional_call

from .errors import InvalidInput, UnknownName, nearest
from .held_weights import weights_held


def fit_arguments(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[Any, Any]:
    """The arguments as forward takes them: a mapping whole, where forward has one argument and none of the names.

    A forward that takes the batch itself, `model(batch)`, could not be called with its members by name.

    Args:
        module: the module.
        args: of forward.
        kwargs: of forward, by name.

    Example:
        >>> class Net(nn.Linear):
        ...     def forward(self, batch):
        ...         return super().forward(batch["x"])
        >>> fit_arguments(Net(1, 1), (), {"x": 1, "mask": 2})
        (({'x': 1, 'mask': 2},), {})
    """
    if args or not kwargs:
        return args, kwargs
    names = _arguments(module)
    whole = names is not None and names[1] == 1 and not names[0] & kwargs.keys()
    return ((dict(kwargs),), {}) if whole else (args, kwargs)


def _arguments(module: nn.Module) -> tuple[frozenset[str], int] | None:
    own = vars(module).get("forward")
    original = getattr(own, "copied_from", None)  # a copy in another precision takes what its original takes
    if original is not None:
        return _arguments(original)
    return _arguments_of_method(type(module).forward) if own is None else _arguments_of(own)


def _arguments_of(function: Any, bound: bool = True) -> tuple[frozenset[str], int] | None:
    """The names of a function's arguments, and how many have to be given; None where it takes any."""
    try:
        parameters = list(inspect.signature(function).parameters.values())[0 if bound else 1 :]
    except (TypeError, ValueError):
        return None
    if any(parameter.kind in (parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL) for parameter in parameters):
        return None
    required = [p for p in parameters if p.default is p.empty]
    positional = all(p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD) for p in required)
    return frozenset(p.name for p in parameters), len(required) if positional else -1


@lru_cache(maxsize=256)
def _arguments_of_method(function: Any) -> tuple[frozenset[str], int] | None:
    return _arguments_of(function, bound=False)


def call_with(
    module: nn.Module, tensors: Mapping[str, Tensor], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
) -> Any:
    """What a module returns with other parameters and buffers; weights that share one tensor share the new one.

    `torch.func.functional_call` puts its own tensor back in place of the weight where one module stands under two names
    (the embedding of T5 and the one of its encoder), and so unties it for good: here every module is named once.

    Args:
        module: the module, which is not changed.
        tensors: the new tensors by the names of the old; of a shared weight one name is enough.
        args: of forward.
        kwargs: of forward.

    Raises:
        UnknownName: a name is none of the module's.
        InvalidInput: two names of one weight get different tensors.

    Example:
        >>> import torch
        >>> layer = nn.Linear(1, 1, bias=False)
        >>> call_with(layer, {"weight": torch.tensor([[2.0]])}, (torch.tensor([3.0]),))
        tensor([6.])
    """
    named = dict(module.named_parameters(remove_duplicate=False)) | dict(module.named_buffers(remove_duplicate=False))
    by_identity: dict[int, Tensor] = {}
    for name, tensor in tensors.items():
        if name not in named:
            raise UnknownName(
                f"{type(module).__name__} has no parameter or buffer {name!r}; give names of named_parameters() and "
                f"named_buffers().{nearest(name, named)}"
            )
        if by_identity.setdefault(id(named[name]), tensor) is not tensor:
            raise InvalidInput(
                f"{name!r} is one weight with another that was given, and they got two tensors; give one of the two."
            )
    everywhere = {}
    for path, inner in module.named_modules():
        for key, own in (*inner._parameters.items(), *inner._buffers.items()):
            if own is not None and id(own) in by_identity:
                everywhere[f"{path}.{key}" if path else key] = by_identity[id(own)]
    args, kwargs = fit_arguments(module, args, kwargs or {})
    with weights_held():
        return functional_call(module, everywhere, args, kwargs, tie_weights=False)
