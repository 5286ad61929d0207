"""Adapters of PEFT by the names in their files, which leave out the adapter's own name and the frozen model."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor, nn

from ..core.errors import InvalidInput

FILES = ("adapter_model.safetensors", "adapter_model.bin")
"""What PEFT calls the file of adapters."""


def adapter_names(model: nn.Module) -> list[str]:
    """The names of a model's adapters; none where PEFT put none into it."""
    configured: Any = getattr(model, "peft_config", None)
    return [str(name) for name in configured] if isinstance(configured, Mapping) else []


def adapter_state(what: str, state: Any, model: nn.Module, own: Iterable[str]) -> dict[str, Tensor] | None:
    """Adapters' tensors by the names that they have in the model; None where the state dict is one of a whole model.

    Args:
        what: what the state dict is called in messages.
        state: a state dict.
        model: the model with its adapters.
        own: the names of the model's parameters and buffers.

    Raises:
        InvalidInput: adapters of the model are not among them.
    """
    adapters = adapter_names(model)
    if not adapters or not isinstance(state, Mapping):
        return None
    for adapter in adapters:
        names = {_in_file(name, adapter): name for name in own if f".{adapter}." in f"{name}."}
        held: dict[str, Tensor] = {names.get(str(key), str(key)): value for key, value in state.items()}
        if not names or not set(held) <= set(names.values()):
            continue
        missing = [name for name in names.values() if name not in held]
        if missing:
            raise InvalidInput(
                f"{what} lacks {missing[0]!r}, which the model's adapter {adapter!r} has; give a checkpoint of an "
                "adapter with the same settings."
            )
        return held
    return None


def _in_file(name: str, adapter: str) -> str:
    """A parameter's name as PEFT writes it to a file."""
    short = f"{name}.".replace(f".modules_to_save.{adapter}.", ".").replace(f".{adapter}.", ".").rstrip(".")
    # DoRA's magnitudes are a module in memory and a tensor in the file.
    return short.removesuffix(".weight") if short.endswith("lora_magnitude_vector.weight") else short
