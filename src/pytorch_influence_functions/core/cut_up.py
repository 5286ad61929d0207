"""Models that `fully_shard` (FSDP2) has cut up: a process keeps a part of every weight, and gathers a layer to use it.

A forward and a backward pass are then exchanges of all processes, layer by layer; so every process has to make the same
number of passes. Nothing here imports torch's distributed tensors, which takes a second.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn


def cut_modules(model: nn.Module) -> list[Any]:
    """The modules that `fully_shard` was called on, from the outside in; none where the model is whole."""
    return [m for m in model.modules() if any(kind.__name__ == "FSDPModule" for kind in type(m).__mro__)]


def is_part(tensor: Tensor) -> bool:
    """Whether this process holds a part of the tensor only (a DTensor)."""
    return hasattr(tensor, "full_tensor")


def whole(tensor: Tensor) -> Tensor:
    """The tensor with all of its numbers; of a part all processes have to ask together."""
    if not is_part(tensor):
        return tensor
    part: Any = tensor.detach()
    gathered: Tensor = part.full_tensor()
    return gathered


def own_part(tensor: Tensor) -> Tensor:
    """What this process holds of the tensor."""
    if not is_part(tensor):
        return tensor
    cut: Any = tensor.detach()
    part: Tensor = cut.to_local()
    return part


def part_like(value: Tensor, tensor: Tensor) -> Tensor:
    """The part of a whole `value` that corresponds to the part `tensor`; nothing is exchanged."""
    if not is_part(tensor) or is_part(value):
        return value
    from torch.distributed.tensor import distribute_tensor

    cut: Any = tensor
    return distribute_tensor(value.to(cut.device), cut.device_mesh, cut.placements, src_data_rank=None)


def free_gathered(modules: Iterable[Any]) -> None:
    """Let go of what the last pass gathered: the parameters of these `cut_modules` are parts again."""
    for module in modules:
        module.reshard()
