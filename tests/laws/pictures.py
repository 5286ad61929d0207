"""Everything of the user's that a call may not change: the model, the data, and the settings of the process."""

from __future__ import annotations

import os
import random
import signal
import sys
import warnings
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

# beartype, which checks shapes in tests only, draws from python's generator: up to so many 32-bit words a call.
_DRAWS = 100_000
# Where torch keeps whether compiled code runs as compiled.
_STANCE = "torch._dynamo.eval_frame"


class Reading:
    """A state of python's generator, up to the numbers that beartype's checks draw from it in tests."""

    def __init__(self, state: Any) -> None:
        self.state = state

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Reading):
            return False
        return other.state in self.following() or self.state in other.following()

    def __repr__(self) -> str:
        return f"Reading({hash(self.state)})"

    def following(self) -> Iterator[Any]:
        generator = random.Random()
        generator.setstate(self.state)
        yield self.state
        for _ in range(_DRAWS):
            generator.getrandbits(32)
            yield generator.getstate()


def _bytes(tensor: Tensor) -> Any:
    """The value to the bit, so that NaN equals itself and -0.0 does not equal 0.0."""
    return tensor.dtype, tuple(tensor.shape), tensor.detach().clone().contiguous().flatten().view(torch.uint8).tolist()


def _hooks(owner: Any) -> dict[str, list[int]]:
    return {k: [id(h) for h in v.values()] for k, v in vars(owner).items() if "hooks" in k and hasattr(v, "values")}


def picture_of_model(model: nn.Module) -> dict[str, Any]:
    """Of tensors identity, value, requires_grad, `.grad` and hooks; of modules mode, hooks and attributes."""
    parts: dict[str, Any] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        parts[f"module {name}"] = (id(module), type(module), module.training, _hooks(module), sorted(vars(module)))
        for kind in (module._parameters, module._buffers):
            for key, tensor in kind.items():
                if tensor is None:
                    continue
                grad = None if tensor.grad is None else (id(tensor.grad), _bytes(tensor.grad))
                hooks = [
                    None if hooks is None else [id(h) for h in hooks.values()]
                    for hooks in (tensor._backward_hooks, getattr(tensor, "_post_accumulate_grad_hooks", None))
                ]
                parts[f"tensor {name}.{key}"] = (id(tensor), _bytes(tensor), tensor.requires_grad, grad, hooks)
    return parts


def picture_of_process() -> dict[str, Any]:
    """Random generators, and every switch of torch and python that a call could leave turned."""
    backends = torch.backends
    return {
        "torch generator": torch.get_rng_state().tolist(),
        "numpy generator": str(np.random.get_state()),
        "python generator": Reading(random.getstate()),
        "grad": torch.is_grad_enabled(),
        "inference": torch.is_inference_mode_enabled(),
        "autocast": torch.is_autocast_enabled("cpu"),
        "autocast dtype": torch.get_autocast_dtype("cpu"),
        "autocast cache": torch.is_autocast_cache_enabled(),
        "anomaly": torch.is_anomaly_enabled(),
        "dtype": torch.get_default_dtype(),
        "device": torch.get_default_device(),
        "threads": torch.get_num_threads(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "precision": torch.get_float32_matmul_precision(),
        "kernels": (
            backends.cudnn.enabled,
            backends.mkldnn.enabled,
            backends.mha.get_fastpath_enabled(),
            backends.cuda.flash_sdp_enabled(),
            backends.cuda.mem_efficient_sdp_enabled(),
            backends.cuda.math_sdp_enabled(),
        ),
        "stance": sys.modules[_STANCE]._stance.stance if _STANCE in sys.modules else "default",
        "hooks of all modules": _hooks(torch.nn.modules.module),
        "warnings": list(warnings.filters),
        "interrupt": signal.getsignal(signal.SIGINT),
        "folder": os.getcwd(),
    }  # fmt: skip


def picture(model: nn.Module, *data: Any) -> dict[str, Any]:
    """All of it as one dictionary: two of them are equal where nothing was changed."""
    tensors = {f"data {k}.{j}": _bytes(t) for k, pair in enumerate(data) for j, t in enumerate(pair)}
    return picture_of_model(model) | tensors | picture_of_process()


def differences(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    """What differs between two pictures, by name."""
    return sorted(k for k in before.keys() | after.keys() if k not in before or k not in after or before[k] != after[k])
