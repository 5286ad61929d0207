"""The state of a model and of the random generators, restored exactly, also after an exception or Ctrl-C."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.utils.checkpoint
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from ..core.attributes import Attributes, put_back_tensor
from ..core.cut_up import cut_modules, free_gathered
from ..core.errors import UnknownName, nearest
from ..core.packed_weights import is_packed
from .random_state import rng_state, set_rng_state
from .session import session

# --------------------------------------------------------------------------- guards


_lock = threading.RLock()
_threads = threading.local()


@dataclass(eq=False)
class _Guard:
    """What is put back once: at the end of its block, or when the public call in which it began fails."""

    put_back: Callable[[], None]
    ended: bool = False

    def end(self) -> None:
        with _lock:
            if self.ended:
                return
            self.ended = True
            self.put_back()


def _open_guards() -> list[_Guard]:
    """Those of this thread."""
    guards: list[_Guard] | None = getattr(_threads, "guards", None)
    if guards is None:
        guards = _threads.guards = []
    return guards


@contextmanager
def _guarded(put_back: Callable[[], None]) -> Iterator[None]:
    guard, guards = _Guard(put_back), _open_guards()
    guards.append(guard)
    try:
        yield
    finally:
        guard.end()
        guards[:] = [g for g in guards if not g.ended]


@contextmanager
def _ended_on_failure() -> Iterator[None]:
    """End what began inside, should the block fail.

    An exception keeps the frames it passed through, and a generator that stands still in one of them keeps its guard:
    a notebook, which holds on to the last exception, would go on with the model in eval mode.
    """
    before = {id(guard) for guard in _open_guards()}
    try:
        yield
    except BaseException:
        for guard in reversed(list(_open_guards())):
            if id(guard) not in before:
                guard.end()
        raise


# --------------------------------------------------------------------------- switches


@dataclass(eq=False)
class _Switch:
    """A setting that is on while at least one context is open, whatever order they end in."""

    turn_on: Callable[[ExitStack], None]
    depth: int = 0
    stack: ExitStack = field(default_factory=ExitStack)

    @contextmanager
    def on(self) -> Iterator[None]:
        with _lock:
            if self.depth == 0:
                self.turn_on(self.stack)
            self.depth += 1
        with _guarded(self._leave):
            yield

    def _leave(self) -> None:
        self.depth -= 1
        if self.depth == 0:
            self.stack.close()


_AUTOCAST_DEVICES = ("cpu", "cuda", "mps", "xpu")


def _no_switch_left_on(stack: ExitStack) -> None:
    if torch.is_inference_mode_enabled():
        stack.enter_context(torch.inference_mode(False))
    stack.callback(torch.set_grad_enabled, torch.is_grad_enabled())
    torch.set_grad_enabled(True)
    for device in _AUTOCAST_DEVICES:
        if torch.is_autocast_enabled(device):
            stack.callback(torch.set_autocast_enabled, device, True)
            torch.set_autocast_enabled(device, False)
    # Where the model opens autocast itself: a weight that was cast once is not the weight of the next checkpoint.
    stack.callback(torch.set_autocast_cache_enabled, torch.is_autocast_cache_enabled())
    torch.set_autocast_cache_enabled(False)


class _Recorded:
    """Runs a checkpointed function with its graph recorded, in place of torch's `CheckpointFunction`."""

    @staticmethod
    def apply(function: Callable[..., Any], _: bool, *args: Any) -> Any:
        return function(*args)


def _no_reentrant_checkpoint(stack: ExitStack) -> None:
    # It refuses `torch.autograd.grad`; checkpoints with use_reentrant=False do not.
    module: Any = torch.utils.checkpoint
    stack.callback(setattr, module, "CheckpointFunction", module.CheckpointFunction)
    module.CheckpointFunction = _Recorded


_checkpoints = _Switch(_no_reentrant_checkpoint)


def _eager(stack: ExitStack) -> None:
    stack.enter_context(torch.compiler.set_stance("force_eager"))


_compiled = _Switch(_eager)


@contextmanager
def _switches_off() -> Iterator[None]:
    # Gradient mode, inference mode and autocast belong to a thread, so each thread counts its own contexts.
    switch = getattr(_threads, "switch", None)
    if switch is None:
        switch = _threads.switch = _Switch(_no_switch_left_on)
    with ExitStack() as stack:
        stack.enter_context(switch.on())
        # The fused path of `nn.TransformerEncoder` gives its layers nested tensors, or runs without calling them.
        stack.enter_context(_fastpath.on())
        stack.enter_context(_checkpoints.on())
        if "torch._dynamo" in sys.modules:  # else nothing is compiled, and loading it takes seconds
            stack.enter_context(_compiled.on())
        yield


@contextmanager
def plain_autograd() -> Iterator[None]:
    """Compute as if no switch had been touched: gradients are recorded, inference mode and autocast are off.

    Code that was compiled by `torch.compile` runs eagerly: it would be compiled anew for every set of hooks. The
    switches are as before afterwards; contexts may end in any order, as generators do. Every public entry that computes
    is decorated with it: if it fails, also by Ctrl-C, the model is as before at once, whoever keeps the exception.

    Example:
        >>> with torch.no_grad():
        ...     with plain_autograd():
        ...         inside = torch.is_grad_enabled()
        ...     inside, torch.is_grad_enabled()
        (True, False)
    """
    with _switches_off(), session(), _ended_on_failure():
        yield


# --------------------------------------------------------------------------- one model


@dataclass(eq=False)
class _StandIn:
    """The copy that stands in for a parameter or buffer made in inference mode, which autograd refuses.

    One on `meta`, which accelerate puts there anew after every pass, stands for itself and is put back.
    """

    module: nn.Module
    name: str
    tensor: Tensor
    copy: Tensor

    @staticmethod
    def all_of(modules: Iterable[nn.Module]) -> list[_StandIn]:
        copies: dict[int, Tensor] = {}
        stand_ins = []
        for module in modules:
            for name, tensor in [*module._parameters.items(), *module._buffers.items()]:
                if tensor is None or not (tensor.is_inference() or tensor.is_meta):
                    continue
                if id(tensor) not in copies:
                    copy = tensor if tensor.is_meta else tensor.detach().clone()
                    new = isinstance(tensor, nn.Parameter) and not tensor.is_meta
                    copies[id(tensor)] = nn.Parameter(copy, tensor.requires_grad) if new else copy
                stand_ins.append(_StandIn(module, name, tensor, copies[id(tensor)]))
        return stand_ins


@dataclass(eq=False)
class _Snapshot:
    """Everything of a model that a pass can change, with the values from before it."""

    modes: list[tuple[nn.Module, bool]]
    """Of all modules but frozen ones of TorchScript, which have none."""
    attributes: Attributes
    """What a forward may keep: a weight that pruning computes, the last features, a hidden state, counts."""
    normalised: list[tuple[Tensor, Tensor]]
    """Embeddings with `max_norm`, whose forward changes the weight itself."""
    stand_ins: list[_StandIn]
    parameters: list[tuple[nn.Parameter, bool, Tensor | None]]
    buffers: list[tuple[nn.Module, str, Tensor, Tensor]]
    """With a copy of each; of packed weights the buffer itself, see `is_packed`."""
    rng: dict[str, Any]
    frames: list[tuple[object, frozenset[int] | None]] = field(default_factory=list)
    cut: list[Any] = field(default_factory=list)
    """Modules that gather their weights for a pass; the outermost would keep them until the backward pass."""
    hooks: list[Any] = field(default_factory=list)

    @classmethod
    def of(cls, model: nn.Module) -> _Snapshot:
        cut = cut_modules(model)
        free_gathered(cut)
        modules = list(model.modules())
        stand_ins = _StandIn.all_of(modules)
        copies = {id(s.copy): s.copy for s in stand_ins if isinstance(s.copy, nn.Parameter)}
        own = [p for p in model.parameters() if not p.is_inference()]
        return cls(
            modes=[(m, m.training) for m in modules if hasattr(m, "training")],
            attributes=Attributes.of(modules),
            normalised=[(weight, weight.detach().clone()) for m in modules for weight in normalised_by(m)],
            stand_ins=stand_ins,
            parameters=[(p, p.requires_grad, p.grad) for p in [*own, *copies.values()]],
            buffers=[
                (m, name, buffer, buffer if is_packed(buffer) else buffer.detach().clone())
                for m in modules
                for name, buffer in m._buffers.items()
                if buffer is not None and not buffer.is_inference()
            ],
            rng=rng_state(),
            cut=cut,
        )

    def enter(self) -> None:
        # The flag is set directly: train() is often overridden, with effects that eval() would not undo.
        for module, training in self.modes:
            if training:
                module.training = False
            if isinstance(module, (nn.Embedding, nn.EmbeddingBag)):
                module.sparse = False  # put back with the attributes; its gradients would be of a layout of their own
        for stand_in in self.stand_ins:
            setattr(stand_in.module, stand_in.name, stand_in.copy)
        for parameter, _, _ in self.parameters:
            parameter.grad = None
        self.hooks += [module.register_forward_hook(lambda cut, *_: cut.reshard()) for module in self.cut]

    def apply_latest(self) -> None:
        """Make exactly the parameters of the innermost frame differentiable."""
        trainable = next((ids for _, ids in reversed(self.frames) if ids is not None), None)
        for parameter, before, _ in self.parameters:
            requires_grad = before if trainable is None else id(parameter) in trainable
            if parameter.requires_grad != requires_grad:
                parameter.requires_grad_(requires_grad)

    def restore(self) -> None:
        for hook in self.hooks:
            hook.remove()
        free_gathered(self.cut)
        for module, training in self.modes:
            if module.training != training:
                module.training = training
        for parameter, requires_grad, grad in self.parameters:
            parameter.requires_grad_(requires_grad)
            parameter.grad = grad
        with torch.no_grad():
            for module, name, buffer, value in self.buffers:
                module._buffers[name] = buffer
                if buffer is not value:
                    put_back_tensor(buffer, value)
            for weight, value in self.normalised:
                if not torch.equal(weight, value):
                    weight.copy_(value)
        for stand_in in self.stand_ins:
            setattr(stand_in.module, stand_in.name, stand_in.tensor)
        self.attributes.put_back()
        set_rng_state(self.rng)


def normalised_by(module: nn.Module) -> list[Tensor]:
    """The weight that forward of this module changes in place."""
    if isinstance(module, (nn.Embedding, nn.EmbeddingBag)) and module.max_norm is not None:
        return [module.weight]
    return []


_active: WeakKeyDictionary[nn.Module, _Snapshot] = WeakKeyDictionary()


@contextmanager
def preserved(model: nn.Module, trainable: Iterable[str] | None = None) -> Iterator[None]:
    """Put a model in eval mode for a while and restore everything afterwards.

    Inside, every module is in eval mode, `.grad` is empty, and exactly the parameters named by `trainable`
    have `requires_grad` (`None`: as they were); the switches are those of `plain_autograd`, and copies stand in for
    parameters and buffers made in inference mode. Afterwards, also after an exception, the mode of each module,
    `requires_grad`, `.grad` (the same tensors), buffers, all that a forward kept on its module (see `Attributes`) and
    all random generators are as before.

    Nested use on one model costs nothing and may end in any order (generators do): the state is taken when the first
    begins and restored when the last ends. Weights and hooks are not restored; whoever changes them restores them.

    Raises:
        UnknownName: `trainable` names a parameter the model does not have.

    Example:
        >>> model = nn.Sequential(nn.Linear(2, 1), nn.Dropout())
        >>> with preserved(model, trainable=["0.weight"]):
        ...     model.training, model[0].bias.requires_grad
        (False, False)
        >>> model.training, model[0].bias.requires_grad
        (True, True)
    """
    mark, names = object(), None if trainable is None else tuple(trainable)
    with _switches_off():
        with _lock:
            snapshot = _active.get(model)
            if snapshot is None:
                snapshot = _Snapshot.of(model)
        with _guarded(partial(_leave, model, snapshot, mark)):
            with _lock:
                if not snapshot.frames:
                    _active[model] = snapshot
                    snapshot.enter()
                snapshot.frames.append((mark, None if names is None else _parameter_ids(model, names)))
                snapshot.apply_latest()
            yield


def _leave(model: nn.Module, snapshot: _Snapshot, mark: object) -> None:
    snapshot.frames = [frame for frame in snapshot.frames if frame[0] is not mark]
    if snapshot.frames:
        snapshot.apply_latest()
    else:
        _active.pop(model, None)
        snapshot.restore()


def _parameter_ids(model: nn.Module, names: Iterable[str]) -> frozenset[int]:
    parameters = dict(model.named_parameters(remove_duplicate=False))
    ids = set()
    for name in names:
        if name not in parameters:
            raise UnknownName(f"The model has no parameter {name!r}.{nearest(name, parameters)}")
        ids.add(id(parameters[name]))
    return frozenset(ids)


# --------------------------------------------------------------------------- kernels


def _no_cudnn(stack: ExitStack) -> None:
    backend: Any = torch.backends.cudnn
    stack.callback(setattr, backend, "enabled", backend.enabled)
    backend.enabled = False


def _no_onednn(stack: ExitStack) -> None:
    backend: Any = torch.backends.mkldnn
    stack.callback(setattr, backend, "enabled", backend.enabled)
    backend.enabled = False


def _no_fastpath(stack: ExitStack) -> None:
    stack.callback(torch.backends.mha.set_fastpath_enabled, torch.backends.mha.get_fastpath_enabled())
    torch.backends.mha.set_fastpath_enabled(False)


def _math_attention(stack: ExitStack) -> None:
    stack.enter_context(sdpa_kernel(SDPBackend.MATH))


_cudnn, _onednn = _Switch(_no_cudnn), _Switch(_no_onednn)
_fastpath, _attention = _Switch(_no_fastpath), _Switch(_math_attention)


def _may_be_recurrent(model: nn.Module | None) -> bool:
    return model is None or any(isinstance(m, nn.RNNBase) for m in model.modules())


@contextmanager
def derivative_safe(model: nn.Module | None = None) -> Iterator[None]:
    """Kernels that allow a first derivative in eval mode.

    cuDNN's recurrent kernels have no backward in eval mode, and the fused encoder path of
    `nn.TransformerEncoder` runs without calling its submodules, so without their hooks. cuDNN is left on
    for models without a recurrent layer; `None` means any model.
    """
    with ExitStack() as stack:
        if _may_be_recurrent(model):
            stack.enter_context(_cudnn.on())
        stack.enter_context(_fastpath.on())
        yield


@contextmanager
def double_backward_safe(model: nn.Module | None = None) -> Iterator[None]:
    """Kernels that can be differentiated twice, and in forward mode; the previous ones come back afterwards.

    In addition to `derivative_safe`, scaled dot product attention uses its plain (math) form, and recurrent
    layers on the CPU leave oneDNN, whose LSTM has no forward mode.
    """
    with ExitStack() as stack:
        stack.enter_context(derivative_safe(model))
        stack.enter_context(_attention.on())
        if _may_be_recurrent(model):
            stack.enter_context(_onednn.on())
        yield
