"""A module called as a function of its weights."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn
from torch.func import functional_call

from .errors import InvalidInput, UnknownName, nearest


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
    return functional_call(module, everywhere, args, kwargs, tie_weights=False)
