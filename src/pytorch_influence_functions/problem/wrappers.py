"""The model inside what `torch.compile`, `DataParallel` and `DistributedDataParallel` make."""

from __future__ import annotations

from torch import nn

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
    """Refuse a model of whose parameters this process holds a part.

    Raises:
        InvalidInput: FSDP or tensor parallelism has cut it up; the message says how to put it together.
    """
    kinds = {type(module).__name__ for module in model.modules()}
    cut = next((name for name, p in model.named_parameters() if hasattr(p, "full_tensor")), None)
    if cut is None and "FullyShardedDataParallel" not in kinds:
        return
    how = "FullyShardedDataParallel" if cut is None else f"fully_shard or parallelize_module: {cut!r} is a DTensor"
    raise InvalidInput(
        f"The model is cut up over processes ({how}), and per-example gradients need every layer whole; put it "
        "together on every process: torch.distributed.checkpoint.state_dict.get_model_state_dict(model, options="
        "StateDictOptions(full_state_dict=True)) gives its weights; load them into a model that is not cut up."
    )
