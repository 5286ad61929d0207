"""A `Recorder` as a callback of the Hugging Face Trainer and of Lightning, which are imported when asked for."""

from __future__ import annotations

import importlib
from os import PathLike
from typing import Any

from ..core.errors import MissingExtra
from .recorder import Recorder


def trainer_callback(folder: str | PathLike[str], **options: Any) -> Any:
    """A callback for the Hugging Face `Trainer`: `Trainer(..., callbacks=[trainer_callback(folder)])` records its run.

    The length of the run, the batch size and, after `resume_from_checkpoint`, the step at which it goes on are the
    Trainer's. A training that starts anew is not put into a folder that holds another run, but with `overwrite=True`.

    Args:
        folder: where the recording lies.
        options: other arguments of `Recorder`, such as `dtype`, `most_bytes` or `overwrite`.

    Raises:
        MissingExtra: transformers is not installed.
    """
    base = _import("transformers", "trainer_callback").TrainerCallback

    class RecordedTrainerRun(base):  # type: ignore[misc, valid-type]
        """Records the run of a Trainer."""

        recorder: Recorder | None = None

        def on_train_begin(self, args: Any, state: Any, control: Any, **parts: Any) -> None:
            if not getattr(state, "is_world_process_zero", True):
                return
            workers = max(1, getattr(args, "world_size", 1))
            batch = args.per_device_train_batch_size * args.gradient_accumulation_steps * workers
            known: dict[str, Any] = {"steps": state.max_steps, "batch_size": batch, "start": state.global_step}
            self.recorder = Recorder(parts["model"], parts["optimizer"], folder, **(known | options))
            self.recorder.begin()

        def on_train_end(self, args: Any, state: Any, control: Any, **parts: Any) -> None:
            if self.recorder is not None:
                self.recorder.end(finished=state.global_step >= state.max_steps)

    return RecordedTrainerRun()


def lightning_callback(folder: str | PathLike[str], **options: Any) -> Any:
    """A callback for Lightning's `Trainer`: `Trainer(callbacks=[lightning_callback(folder)])` records its run.

    The weights are those of the LightningModule, under its names. The length of the run and, after `ckpt_path=`, the
    step at which it goes on are the Trainer's. A training that starts anew is not put into a folder that holds another
    run, but with `overwrite=True`.

    Args:
        folder: where the recording lies.
        options: other arguments of `Recorder`, such as `dtype`, `batch_size` or `overwrite`.

    Raises:
        MissingExtra: neither lightning nor pytorch_lightning is installed.
    """
    try:
        base = importlib.import_module("lightning.pytorch").Callback
    except ImportError:
        base = _import("pytorch_lightning", "lightning_callback").Callback

    class RecordedLightningRun(base):  # type: ignore[misc, valid-type]
        """Records the run of a Trainer."""

        recorder: Recorder | None = None

        def on_train_start(self, trainer: Any, module: Any) -> None:
            if not trainer.is_global_zero:
                return
            length = trainer.estimated_stepping_batches
            steps = int(length) if length not in (None, float("inf")) and length > 0 else None
            known: dict[str, Any] = {"steps": steps, "start": trainer.global_step}
            self.recorder = Recorder(module, trainer.optimizers[0], folder, **(known | options))
            self.recorder.begin()

        def on_train_end(self, trainer: Any, module: Any) -> None:
            if self.recorder is not None:
                self.recorder.end(finished=True)

        def on_exception(self, trainer: Any, module: Any, exception: BaseException) -> None:
            if self.recorder is not None:
                self.recorder.end(finished=False)

    return RecordedLightningRun()


def _import(module: str, function: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as cause:
        raise MissingExtra(f"{module} is not installed; {function}() needs it: pip install {module}.") from cause
