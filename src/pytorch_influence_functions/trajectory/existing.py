"""Training runs that other programs have kept: folders of the Hugging Face Trainer, and Lightning's checkpoints."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from ..core.errors import InvalidInput, first_line
from ..problem.adapters import FILES as ADAPTER_FILES
from .recorded_step import GroupState, RecordedStep, with_rates

_TRAINER_FOLDER = re.compile(r"checkpoint-(\d+)")
_WEIGHTS_FILES = ("model.safetensors", "pytorch_model.bin", *ADAPTER_FILES)
_SHARDED = ("model.safetensors.index.json", "pytorch_model.bin.index.json")


# --------------------------------------------------------------------------- Hugging Face Trainer


def trainer_folders(folder: Path) -> list[tuple[int, Path]]:
    """(step, folder) of every checkpoint that a Trainer has written, in the order of training."""
    named = ((_TRAINER_FOLDER.fullmatch(path.name), path) for path in folder.iterdir() if path.is_dir())
    return sorted((int(name[1]), path) for name, path in named if name)


def read_trainer(folder: Path) -> Iterator[RecordedStep]:
    """The checkpoints of a Trainer's output folder, with the learning rates of its log.

    Raises:
        InvalidInput: a checkpoint holds weights neither of the whole model nor of adapters.
    """
    for step, path in trainer_folders(folder):
        file = next((path / name for name in _WEIGHTS_FILES if (path / name).exists()), None)
        if file is None and not any((path / name).exists() for name in _SHARDED):
            raise InvalidInput(
                f"{os.fspath(path)!r} holds no weights ({' or '.join(_WEIGHTS_FILES)}); give the "
                "folder of a training that saves them, or a list of state dicts."
            )
        state = _read_trainer_state(path)
        batch = state.get("train_batch_size")
        yield RecordedStep(
            step, path if file is None else file, _trainer_groups(path, state, step),
            batch_size=batch if isinstance(batch, int) else None,
        )  # fmt: skip


def _read_trainer_state(path: Path) -> Mapping[str, Any]:
    try:
        state = json.loads((path / "trainer_state.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return state if isinstance(state, dict) else {}


def _trainer_groups(path: Path, state: Mapping[str, Any], step: int) -> tuple[GroupState, ...]:
    """The optimiser's settings; else the learning rate that was logged; else nothing."""
    lr_sum = _sum_logged_rates(state, step)
    groups = _read_groups(path / "optimizer.pt")
    if groups:
        return tuple(GroupState.of(g, lr_sum, decoupled=True) for g in groups)
    logged = [e["learning_rate"] for e in _logged(state) if e["step"] <= step]
    return (GroupState(float(logged[-1]), lr_sum),) if logged else ()


def _logged(state: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The entries of the Trainer's log that hold a step and its learning rate."""
    entries = state.get("log_history")
    if not isinstance(entries, list):
        return []
    return [e for e in entries if isinstance(e, dict) and {"step", "learning_rate"} <= set(e)]


def _sum_logged_rates(state: Mapping[str, Any], step: int) -> float | None:
    """The sum of the learning rates up to a step, each logged one standing for the steps since the one before."""
    total, before, rate = 0.0, 0, None
    for entry in _logged(state):
        if entry["step"] > step:
            break
        rate = float(entry["learning_rate"])
        total, before = total + rate * (entry["step"] - before), entry["step"]
    return None if rate is None else total + rate * (step - before)


def _read_groups(path: Path) -> list[Mapping[str, Any]]:
    """The `param_groups` of an optimiser's file, which is never unpickled; none where that cannot be read."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception:
        return []
    groups = state.get("param_groups") if isinstance(state, dict) else None
    return with_rates(groups) if isinstance(groups, list) else []


# --------------------------------------------------------------------------- Lightning


def read_lightning(paths: list[Path]) -> list[RecordedStep]:
    """Lightning's `.ckpt` files in the order of training, weights and learning rates only; never unpickled.

    Raises:
        InvalidInput: a file cannot be read without running code, or is none of Lightning's.
    """
    steps: dict[int, RecordedStep] = {}
    for path in sorted(paths):
        try:
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except Exception as cause:
            raise InvalidInput(
                f"{os.fspath(path)!r} cannot be read without running code ({first_line(cause)}); save checkpoints with "
                "ModelCheckpoint(save_weights_only=True) and without hyperparameters that are Python objects."
            ) from cause
        if not isinstance(content, dict) or "state_dict" not in content or "global_step" not in content:
            raise InvalidInput(
                f"{os.fspath(path)!r} holds no state_dict with its global_step; give checkpoints that Lightning wrote, "
                "or a list of state dicts."
            )
        optimizers = content.get("optimizer_states") or [{}]
        groups = with_rates(optimizers[0].get("param_groups", []))
        step = int(content["global_step"])
        # last.ckpt is a copy of another one.
        steps.setdefault(step, RecordedStep(step, path, tuple(GroupState.of(g, None, decoupled=False) for g in groups)))
    return [steps[step] for step in sorted(steps)]
