"""Checkpoints: loaded without running code, checked against the model, and loaded into it for a while."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from os import PathLike, fspath
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, Final, TypeAlias

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from ..core.cut_up import cut_modules, part_like
from ..core.errors import InvalidInput, first_line, nearest
from ..core.files import kind_of, read_tensors
from .adapters import FILES as ADAPTER_FILES
from .adapters import adapter_state
from .model_and_loss import ModelAndLoss

Checkpoint: TypeAlias = Mapping[str, Tensor] | str | PathLike[str]

WEIGHTS_FILE: Final = "checkpoint weights"
"""The kind of file that a `Recorder` writes: one with a checksum, which is verified."""

# Keys under which training scripts keep the state dict in a larger dictionary.
_STATE_KEYS = ("state_dict", "model_state_dict", "model")
_LOSS_KEYS = ("loss", "criterion", "loss_state_dict", "criterion_state_dict")
# Models in several files.
_SHARDED = ("model.safetensors", "pytorch_model.bin")
# What wrappers put before every name: DataParallel, torch.compile, and training classes that keep the model.
_PREFIXES = ("module.", "_orig_mod.", "net.", "model.")


def as_checkpoints(given: Sequence[Checkpoint] | Checkpoint, name: str = "checkpoints") -> tuple[Checkpoint, ...]:
    """One checkpoint or several, as a tuple; `name` stands for them in messages.

    Raises:
        InvalidInput: one of them is neither a state dict nor a path.
    """
    if isinstance(given, (str, PathLike, Mapping)):
        return (given,)
    items: Any = given
    single = isinstance(items, nn.Module) or not isinstance(items, Iterable)
    checkpoints: list[Any] = [items] if single else list(items)
    odd = next((item for item in checkpoints if not isinstance(item, (str, PathLike, Mapping))), None)
    if odd is not None:
        hint = "pass model.state_dict()" if isinstance(odd, nn.Module) else "pass a list of them, or () for none"
        raise InvalidInput(f"{name} must be state dicts (tensors by name) or paths, not {type(odd).__name__}; {hint}.")
    return tuple(checkpoints)


def load_checkpoint(checkpoint: Checkpoint, model: nn.Module | None = None) -> dict[str, Tensor]:
    """The tensors of a checkpoint by name, on the CPU if read from a file (never by unpickling code).

    Args:
        checkpoint: a state dict, or the path of a `.safetensors` or torch file, or of a folder that holds a model in
            one or several of them, or adapters of PEFT alone; a dictionary that keeps the state dict under
            "state_dict", "model_state_dict" or "model" is opened.
        model: if given, the names and shapes must be the model's.

    Raises:
        InvalidInput: the file cannot be read, holds no state dict, or does not fit the model.
    """
    state: Any = checkpoint
    what = "The checkpoint"
    if isinstance(checkpoint, (str, PathLike)):
        path = fspath(checkpoint)
        what = f"The checkpoint {path!r}"
        try:
            state = _read_folder(Path(path)) if Path(path).is_dir() else _read_file(path)
        except InvalidInput:
            raise
        except UnpicklingError as cause:
            # torch's message holds terminal codes, and advises to unpickle whatever the file holds.
            raise InvalidInput(
                f"{what} cannot be read: it holds Python objects besides tensors, or is damaged, and is not unpickled "
                "because that runs code; save the state dict alone with torch.save(model.state_dict(), path)."
            ) from cause
        except Exception as cause:
            raise InvalidInput(
                f"{what} cannot be read ({first_line(cause)}); expected a .safetensors file or a state dict "
                "saved with torch.save(model.state_dict(), path)."
            ) from cause
    state = _open(state, model)
    if not isinstance(state, Mapping) or not all(isinstance(v, Tensor) for v in state.values()):
        raise InvalidInput(f"{what} is no state dict (tensors by name) but {type(state).__name__}.")
    if model is not None:
        adapters = adapter_state(what, state, model, named_tensors(model, persistent_only=True))
        if adapters is not None:
            return adapters
        state = _without_wrappers(state, named_tensors(model))
        _check_fits(what, state, model)
    return dict(state)


def _open(state: Any, model: nn.Module | None) -> Any:
    """The state dict in a larger dictionary; with that of the loss, where the loss has weights and one was kept."""
    if not isinstance(state, Mapping):
        return state
    loss: Mapping[str, Tensor] = next((state[key] for key in _LOSS_KEYS if isinstance(state.get(key), Mapping)), {})
    for key in _STATE_KEYS:
        if isinstance(state.get(key), Mapping):
            state = state[key]
    if not isinstance(model, ModelAndLoss) or not loss:
        return state
    return {
        **_without_wrappers(state, named_tensors(model)),
        **{f"{model.prefix}{name}": t for name, t in loss.items()},
    }


def _read_file(path: str) -> Any:
    if not path.endswith(".safetensors"):
        return torch.load(path, map_location="cpu", weights_only=True)
    if kind_of(path) is None:
        return load_file(path)
    return read_tensors(path, WEIGHTS_FILE, cure="record the run anew")[0]


def _read_folder(path: Path) -> dict[str, Tensor]:
    """The tensors of a model that lies in several files, by its index."""
    file = next((path / name for name in (*_SHARDED, *ADAPTER_FILES) if (path / name).exists()), None)
    if file is not None:
        state: dict[str, Tensor] = _read_file(fspath(file))
        return state
    index = next((path / f"{name}.index.json" for name in _SHARDED if (path / f"{name}.index.json").exists()), None)
    if index is None:
        raise InvalidInput(
            f"The checkpoint {fspath(path)!r} is a folder without weights ({', '.join(_SHARDED)}, the index of "
            f"several such files, or {ADAPTER_FILES[0]}); give the path of a file."
        )
    files = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    # Names, not paths: an index from elsewhere must not point out of its folder.
    shards = [_read_file(fspath(path / Path(file).name)) for file in files]
    return {name: value for shard in shards for name, value in shard.items()}


def _without_wrappers(state: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """The state dict without prefixes of wrappers around the model, where all its names are the model's then."""
    names = {name: name for name in state}
    while names and not all(name in own for name in names.values()):
        prefix = next((p for p in _PREFIXES if all(name.startswith(p) for name in names.values())), None)
        if prefix is None:
            return state
        names = {name: short.removeprefix(prefix) for name, short in names.items()}
    return {short: state[name] for name, short in names.items()}


def _check_fits(what: str, state: Mapping[str, Tensor], model: nn.Module) -> None:
    own = named_tensors(model, persistent_only=True)
    unexpected = [name for name in state if name not in own]
    if unexpected:
        hint = nearest(unexpected[0], own)
        raise InvalidInput(f"{what} holds {unexpected[0]!r}, which the model does not have.{hint}")
    # A file may keep a shared tensor under one of its names only.
    covered = {id(own[name]) for name in state}
    missing = [name for name, tensor in own.items() if id(tensor) not in covered]
    if missing and isinstance(model, ModelAndLoss) and all(name.startswith(model.prefix) for name in missing):
        raise InvalidInput(
            f"{what} lacks {missing[0]!r}: the loss {model.trained.__name__} has weights of its own, which belong to a "
            'checkpoint as the model\'s do; give {"model": model.state_dict(), "loss": loss.state_dict()}.'
        )
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise InvalidInput(f"{what} lacks {missing[0]!r}{more}, which the model has.{nearest(missing[0], state)}")
    for name, tensor in state.items():
        if tensor.shape != own[name].shape:
            raise InvalidInput(
                f"{what} has shape {list(tensor.shape)} for {name!r}, the model {list(own[name].shape)}; "
                "give a checkpoint of this very model."
            )


def named_tensors(model: nn.Module, persistent_only: bool = False) -> dict[str, Tensor]:
    """Parameters and buffers by every name they have."""
    tensors: dict[str, Tensor] = dict(model.named_parameters(remove_duplicate=False))
    for prefix, module in model.named_modules(remove_duplicate=False):
        for name, buffer in module._buffers.items():
            if buffer is None or (persistent_only and name in module._non_persistent_buffers_set):
                continue
            tensors[f"{prefix}.{name}" if prefix else name] = buffer
    return tensors


@contextmanager
def at_checkpoint(model: nn.Module, checkpoint: Checkpoint | None) -> Iterator[None]:
    """Give the model a checkpoint's weights and buffers for a while, then its own back, to the bit.

    `None` stands for the model's own weights: nothing is changed.

    Raises:
        InvalidInput: as `load_checkpoint`, before anything is changed.
    """
    if checkpoint is None:
        yield
        return
    state = load_checkpoint(checkpoint, model)
    own = named_tensors(model)
    # Of what is written alone: a checkpoint of adapters leaves the model under them where it is.
    before = {id(own[name]): (own[name], own[name].detach().clone()) for name in state}
    try:
        # Weights made in inference mode may be written in it only; others may too.
        with _writing(model):
            for name, value in state.items():
                own[name].copy_(part_like(value, own[name]))
        yield
    finally:
        with _writing(model):
            for tensor, value in before.values():
                tensor.copy_(value)


def _writing(model: nn.Module) -> AbstractContextManager[Any]:
    """Where weights may be written: parts of a cut-up model are views, which inference mode takes out of autograd."""
    return torch.no_grad() if cut_modules(model) else torch.inference_mode()
