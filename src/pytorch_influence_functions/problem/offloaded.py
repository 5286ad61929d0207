"""Weights that accelerate brings in when a layer runs, and takes away after it."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn

from ..core.errors import InvalidInput

_HOOK = "_hf_hook"


def brought_in(model: nn.Module) -> frozenset[str]:
    """The names of parameters on `meta` that a hook of accelerate fills for every pass of their layer."""
    hooks = {name: getattr(module, _HOOK) for name, module in model.named_modules() if hasattr(module, _HOOK)}
    if not hooks:
        return frozenset()
    under = [name for name, hook in hooks.items() if getattr(hook, "place_submodules", False)]
    whole = tuple(f"{name}." if name else "" for name in under)
    return frozenset(
        name
        for name, parameter in model.named_parameters()
        if parameter.is_meta and (name.rpartition(".")[0] in hooks or name.startswith(whole))
    )


def refuse_offloaded(model: nn.Module, names: Iterable[str]) -> None:
    """Refuse parameters that take part and that accelerate takes away after a pass: they have no gradient.

    Args:
        model: the model.
        names: of the parameters that take part.

    Raises:
        InvalidInput: it names one of them.
    """
    offloaded = brought_in(model)
    name = next((name for name in names if name in offloaded), None)
    if name is not None:
        raise InvalidInput(
            f"The model is offloaded by accelerate ({name!r} is brought in for each forward pass and taken away "
            "after it), and weights that take part have to stay; name those that stay with parameters=, offload only "
            "the frozen layers under adapters, or load it whole, with device_map=None, in bfloat16 or four bits where "
            "it is too large."
        )
