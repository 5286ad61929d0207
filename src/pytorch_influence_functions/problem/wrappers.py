"""The model inside what `torch.compile`, `DataParallel` and `DistributedDataParallel` make."""

from __future__ import annotations

from typing import Any

from torch import nn

from ..core.cut_up import cut_modules, is_part
from ..core.distributed import current
from ..core.errors import InvalidInput


def unwrap(model: nn.Module) -> tuple[nn.Module, str]:
    """The model inside what `torch.compile`, `DataParallel` or `DistributedDataParallel` made, and its prefix.

    A wrapped model computes the same numbers; unwrapped it takes hooks without being compiled anew for each of them.

    Example:
        >>> inner, prefix = unwrap(nn.DataParallel(nn.Linear(2, 1)))
        >>> inner, prefix
        (Linear(in_features=2, out_features=1, bias=True), 'module.')
    """
    prefix = ""
    while True:
        parallel = isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel))
        name = "module" if parallel else "_orig_mod" if "_orig_mod" in model._modules else None
        if name is None:
            return model, prefix
        model, prefix = model.get_submodule(name), f"{prefix}{name}."


def refuse_sharded(model: nn.Module) -> None:
    """Refuse a model of which no pass ever has a layer whole; one that `fully_shard` has cut up gathers them itself.

    Raises:
        InvalidInput: FSDP1 or tensor parallelism has cut it up; the message says how to put it together.
    """
    kinds = {type(module).__name__ for module in model.modules()}
    gathered = {id(p) for module in cut_modules(model) for p in module.parameters() if _is_cut_once(p)}
    cut = next((name for name, p in model.named_parameters() if is_part(p) and id(p) not in gathered), None)
    if cut is None and "FullyShardedDataParallel" not in kinds:
        return
    how = "FullyShardedDataParallel" if cut is None else f"parallelize_module: {cut!r} is a DTensor"
    raise InvalidInput(
        f"The model is cut up over processes ({how}), and per-example gradients need every layer whole in its pass, as "
        "fully_shard gives it; put it together on every process: torch.distributed.checkpoint.state_dict."
        "get_model_state_dict(model, options=StateDictOptions(full_state_dict=True)) gives its weights; load them into "
        "a model that is not cut up, or that fully_shard alone cuts up."
    )


def _is_cut_once(parameter: Any) -> bool:
    """Whether each of its parts is a slice along one axis: tensor parallelism under FSDP cuts along two."""
    return is_part(parameter) and sum(placement.is_shard() for placement in parameter.placements) <= 1


def require_company(model: nn.Module) -> None:
    """Make sure that all processes which a model is cut up over are at the same pass.

    Raises:
        InvalidInput: this process computes alone, or does what the others do not.
    """
    parts = [p for module in cut_modules(model) for p in module.parameters() if is_part(p)]
    if not parts:
        return
    cut: Any = parts[0]
    over, world = cut.device_mesh.size(), current()
    if over > 1 and world.apart:
        raise InvalidInput(
            f"The model is cut up over {over} processes by fully_shard, each pass needs all of them, and here each "
            "would make a number of passes of its own, solving for its own examples; use a method that keeps its "
            "curvature, such as ptif.ekfac() or ptif.dual()."
        )
    if over != world.among:
        raise InvalidInput(
            f"The model is cut up over {over} processes by fully_shard, each pass needs all of them, and "
            f"{world.among} {'computes' if world.among == 1 else 'compute'} here; make the same call on every process "
            "with distributed=True, or within `with ptif.distributed():`."
        )
