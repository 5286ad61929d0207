"""The model inside what `torch.compile`, `DataParallel` and `DistributedDataParallel` make."""

from __future__ import annotations

from torch import nn


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
