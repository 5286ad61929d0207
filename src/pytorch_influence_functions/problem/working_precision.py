"""In which precision a model is computed: weights in half precision are computed in float32, on a copy of the model.

Weights of several types are all computed in the widest of them.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, Final

import torch
from torch import Tensor, nn

from ..core.batches import map_tensors
from ..core.errors import InfluenceError, InvalidInput, first_line
from .model_and_loss import ModelAndLoss
from .problem import Problem, first_batch

HALF: Final = (torch.bfloat16, torch.float16)
_BFLOAT16: Final = "bf16"


def check_precision(precision: Any) -> None:
    """Refuse what is no precision.

    Raises:
        InvalidInput: it is neither None nor "bf16".
    """
    if precision not in (None, _BFLOAT16):
        raise InvalidInput(
            f"precision={precision!r} is not offered; write precision='bf16' for faster passes in bfloat16, or leave "
            "it out for float32 (float64 where the model is)."
        )


def in_working_precision(problem: Problem, precision: str | None = None) -> Problem:
    """The same problem with a model that computes in float32, or where `precision` is "bf16" under autocast.

    Half precision has 8 or 11 bits for a number: enough to train and too few for sums of squares of gradients. Its
    weights are float32 numbers too, so a copy in float32 is the same model. The model itself is not touched. Where
    forward rounds to half precision by name, the layers of the copy widen what they are given. Where a copy cannot be
    had, the model is used as it is.

    Args:
        problem: the model, its loss and its data.
        precision: `"bf16"` or None.

    Raises:
        InvalidInput: the model cannot be copied, and bfloat16 was asked for.
    """
    check_precision(precision)
    if problem.is_cut_up:
        if precision is None:
            return problem
        raise InvalidInput(
            f"precision={precision!r} works on a copy of the model, and this one is cut up by fully_shard; give "
            "fully_shard a MixedPrecisionPolicy instead."
        )
    types = {p.dtype for p in problem.space.values(problem.model).values()}
    if types.isdisjoint(HALF) and len(types) == 1 and precision is None:
        return problem
    wide_type = torch.float64 if torch.float64 in types else torch.float32
    try:
        model = _copied(problem, wide_type, every=precision is None)
    except Exception as cause:
        if precision is None:
            return problem
        raise InvalidInput(
            f"precision='bf16' works on a copy of the model, and {type(problem.model).__name__} cannot be copied "
            f"({first_line(cause)}); leave precision= out."
        ) from cause
    _replace_forward(model, problem.model, problem.device.type if precision == _BFLOAT16 else None, wide_type)
    wide = problem.with_(model=model, parameters=list(problem.space.names))
    return wide if precision is not None or _runs(wide) else problem


def copied_bytes(before: Problem, after: Problem) -> int:
    """What the copy holds beside the model itself.

    Args:
        before: the problem as it was given.
        after: what `in_working_precision` made of it.
    """
    own = {t.data_ptr() for t in _tensors(before.model)}
    return sum(t.numel() * t.element_size() for t in _tensors(after.model) if t.data_ptr() not in own)


def _tensors(model: nn.Module) -> Iterable[Tensor]:
    return (*model.parameters(), *model.buffers())


def _copied(problem: Problem, kind: torch.dtype, every: bool) -> nn.Module:
    """A copy that shares all weights but those in narrower types: of all layers, or of those with chosen weights."""
    narrower = _narrower(kind)
    chosen = {id(p) for p in problem.space.values(problem.model).values()}
    layers = [m for m in problem.model.modules() if every or any(id(p) in chosen for p in m.parameters(recurse=False))]
    tensors = [t for m in layers for t in (*m.parameters(recurse=False), *m.buffers(recurse=False))]
    own = {id(t) for t in tensors if t.dtype in narrower}
    shared: dict[int, Any] = {id(t): t for t in _tensors(problem.model) if id(t) not in own}
    model = deep_copy(problem.model, shared)
    for module in model.modules():
        for parameter in module._parameters.values():
            if parameter is not None and id(parameter) not in shared:
                # In place: what is tied stays tied.
                parameter.data = parameter.data.to(kind)
        for name, buffer in module._buffers.items():
            if buffer is not None and id(buffer) not in shared:
                module._buffers[name] = buffer.to(kind)
    return model


def deep_copy(model: nn.Module, shared: Mapping[int, Any] | None = None) -> nn.Module:
    """A copy of a model, also where a layer keeps a weight that it computed with its graph, as `weight_norm` does.

    Args:
        model: the model.
        shared: by `id`, what the copy shares with it.
    """
    computed = [t for m in model.modules() for t in vars(m).values() if isinstance(t, Tensor) and not t.is_leaf]
    copied: nn.Module = copy.deepcopy(model, {id(t): t.detach().clone() for t in computed} | dict(shared or {}))
    return copied


def own_model(model: nn.Module) -> nn.Module:
    """The user's own model: what a copy in another precision was made from, and without the loss that was joined to it.

    Args:
        model: the model of a problem.
    """
    original = getattr(model.forward, "copied_from", model)
    return original.inner if isinstance(original, ModelAndLoss) else original


def _narrower(kind: torch.dtype) -> tuple[torch.dtype, ...]:
    return HALF if kind == torch.float32 else (*HALF, torch.float32)


# Whether copies that compute in bfloat16 are asked for float32 for a while.
_full: ContextVar[bool] = ContextVar("full precision", default=False)


@contextmanager
def full_precision() -> Iterator[None]:
    """Let copies made for precision="bf16" compute in float32: solvers add up hundreds of products with a curvature."""
    token = _full.set(True)
    try:
        yield
    finally:
        _full.reset(token)


def offers_full_precision(model: nn.Module) -> bool:
    """Whether the model is a copy that `full_precision` speaks to."""
    return getattr(model.forward, "offers_full_precision", False)


def _replace_forward(model: nn.Module, original: nn.Module, autocast: str | None, kind: torch.dtype) -> None:
    """Let a copy take inputs of narrower types than `kind`; under autocast to bfloat16 on the device `autocast`."""
    forward = model.forward
    # What was left in half precision, outside the chosen layers, needs autocast.
    offers_full = autocast is not None and not any(t.dtype in HALF for t in _tensors(model))
    narrower = _narrower(kind)

    def widened(tensor: Tensor) -> Tensor:
        return tensor.to(kind) if tensor.dtype in narrower else tensor

    def widen(_: nn.Module, args: Any, kwargs: Any) -> tuple[Any, Any]:
        return map_tensors(args, widened), map_tensors(kwargs, widened)

    def compute(*args: Any, **kwargs: Any) -> Any:
        if autocast is not None and not (offers_full and _full.get()):
            with torch.autocast(autocast, dtype=torch.bfloat16, cache_enabled=False):
                return forward(*args, **kwargs)
        return forward(*map_tensors(args, widened), **map_tensors(kwargs, widened))

    compute.offers_full_precision = offers_full  # type: ignore[attr-defined]
    compute.copied_from = original  # type: ignore[attr-defined]
    model.forward = compute
    if autocast is None:
        for module in model.modules():
            if module is not model and module._parameters:
                module.register_forward_pre_hook(widen, with_kwargs=True)


def _runs(problem: Problem) -> bool:
    """Whether the copy computes anything: forward may ask for half precision by name."""
    try:
        with first_batch(problem, ids=torch.arange(1)) as (_, batch), torch.no_grad():
            problem.objective.outputs(problem.model, batch)
    except InfluenceError:
        return False
    return True
