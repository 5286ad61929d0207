"""Recording a training run: a context manager around any training loop."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, final

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ..core.digest import digest
from ..core.distributed import process_rank
from ..core.errors import InvalidInput, TrainingDataWarning, first_line
from ..core.files import locked, make_folder, remove_leftovers, write_tensors
from ..core.validate import whole_number
from ..curvature.base import Budget
from ..problem.checkpoints import WEIGHTS_FILE
from ..problem.model_and_loss import ModelAndLoss
from ..problem.problem import check_model
from ..problem.wrappers import unwrap
from .manifest import MANIFEST, Manifest
from .recorded_step import GroupState, RecordedStep, describe_others, named_state, rates_of
from .recording import MOMENTS_FILE, Recording
from .schedule import Schedule, make_schedule

_DECOUPLED = ("AdamW", "NAdamW")
_HALVES = (torch.float16, torch.bfloat16)


@final
@dataclass(eq=False)
class Recorder:
    """Keeps the weights of a training run at well-chosen steps: a context manager around any training loop.

        with ptif.Recorder(model, optimizer, "runs/a", steps=len(loader) * epochs):
            ...  # the training loop as it was
        scores = ptif.attribute(model, train, queries, run="runs/a")

    It counts `optimizer.step()`, so gradient accumulation, schedulers and several parameter groups need nothing. A
    step that a `GradScaler` leaves out is not counted. Each checkpoint is written aside and renamed, then listed in
    `recording.json` with the learning rate, weight decay and momentum of every parameter group, and with Adam's second
    moments in a file beside it: whenever the training is killed, what is listed is whole.

    Where the length of the run is given, checkpoints stand at shares of it. Otherwise they stand at doubling distances:
    the powers of two, and the latest one within a fifth of the last step.

    A training that goes on from one of its checkpoints goes on in the same folder: the step is found by the weights, or
    by Adam's own count, or given as `start`. In a group of processes the first one records.

    Args:
        model: the model that is trained.
        optimizer: the optimiser that trains it.
        folder: where the recording lies; a folder of its own.
        at: shares of the run at which it is recorded, with `steps`; `None`: 2, 5, 10, 20, 40, 70 and 100 %.
        steps: optimiser steps of the whole run; `None`: not known.
        most: the most checkpoints that stay where the length is not known.
        most_bytes: the most that all checkpoints may take on the disk, bytes or words such as `"20GB"`, beside the one
            that is being written; `None`: no bound.
        dtype: `"float16"` or `"bfloat16"` store the weights in it; `None`: as they are. Adam's moments are then stored
            in bfloat16, whose range they need.
        second_moments: whether Adam's second moments are kept; `SOURCE` needs them after Adam.
        batch_size: examples per step, noted with each checkpoint.
        loss: the loss, where it has weights of its own that are trained too: they are kept with the model's.
        start: how many steps had been taken before; `None`: found as said above.
        overwrite: remove another run that is recorded in the folder.

    Raises (when it starts) `InvalidInput`: a setting cannot be used, the folder holds another run or another process
    records there, or the checkpoints would take more than `most_bytes`.

    >>> model = nn.Linear(3, 2)
    >>> Recorder(model, torch.optim.SGD(model.parameters(), lr=0.1), "runs/a", steps=100)
    Recorder(Linear, SGD, 'runs/a', steps=100)
    """

    model: nn.Module
    optimizer: torch.optim.Optimizer
    folder: str | os.PathLike[str]
    at: Sequence[float] | None = None
    steps: int | None = None
    most: int = 8
    most_bytes: int | str | None = None
    dtype: str | torch.dtype | None = None
    second_moments: bool = True
    batch_size: int | None = None
    loss: nn.Module | None = None
    start: int | None = None
    overwrite: bool = False
    step: int = field(default=0, init=False)
    """How many steps have been counted."""
    _manifest: Manifest | None = field(default=None, init=False)
    _schedule: Schedule | None = field(default=None, init=False)
    _rates: list[float] = field(default_factory=list, init=False)
    _rate_sums: list[float] = field(default_factory=list, init=False)
    _inside_step: bool = field(default=False, init=False)
    _others: dict[str, str] = field(default_factory=dict, init=False)
    """Digests, at the start, of trainable parameters in no group of the optimiser; those that move are named."""
    _told: bool = field(default=False, init=False)
    _open: ExitStack = field(default_factory=ExitStack, init=False)

    def __repr__(self) -> str:
        length = "" if self.steps is None else f", steps={self.steps}"
        kinds = f"{type(self.model).__name__}, {type(self.optimizer).__name__}"
        return f"Recorder({kinds}, {os.fspath(self.folder)!r}{length})"

    # ---------------------------------------------------------------- from outside

    def __enter__(self) -> Recorder:
        self.begin()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self.end(finished=kind is None)

    @property
    def recording(self) -> Recording:
        """What has been recorded so far.

        Raises:
            InvalidInput: nothing has.
        """
        return Recording.open(self.folder)

    def begin(self) -> None:
        """Start to record; `with` does it."""
        if self._manifest is not None:
            raise InvalidInput("This Recorder records already; make one for each training.")
        self._check()
        self._schedule = make_schedule(self.at, self.steps, self._count_within_budget())
        if process_rank() != 0:
            return
        folder = make_folder(self.folder)
        with ExitStack() as stack:
            stack.enter_context(locked(folder))
            remove_leftovers(folder)
            manifest = self._resume(folder)
            manifest.write()
            self._drop_unlisted(manifest)
            self._manifest = manifest
            self._others = {name: digest(parameter.detach()) for name, parameter in self._outside()}
            for handle in self._hooks():
                stack.callback(handle.remove)
            self._open = stack.pop_all()
        if self.step == 0 and self._schedule.wants(0) and not manifest.recorded:
            self._save()

    def end(self, finished: bool = True) -> None:
        """Keep the last step and stop; `with` does it.

        Args:
            finished: whether the training has come to its end.
        """
        if self._manifest is None:
            return
        # An exception in the middle of a step leaves weights of which only some have moved.
        if self.step > 0 and not self._inside_step:
            self._save()
        manifest: Manifest | None = self._manifest  # None where writing the last step failed
        if manifest is not None and finished:
            with suppress(InvalidInput):
                replace(manifest, finished=True).write()
        self._stop()

    # ---------------------------------------------------------------- while the training runs

    def _hooks(self) -> Iterator[RemovableHandle]:
        yield self.optimizer.register_step_pre_hook(self._before_step)
        yield self.optimizer.register_step_post_hook(self._after_step)

    def _before_step(self, *_: Any) -> None:
        self._inside_step = True

    def _after_step(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        self._inside_step = False
        # Fused optimisers are called even where the GradScaler has found infinite gradients, and leave the step out.
        found_inf = getattr(optimizer, "found_inf", None)
        if found_inf is not None and float(found_inf) > 0:
            return
        self.step += 1
        # Kept: a scheduler sets the next step's rate before the end of the training is recorded.
        self._rates = rates_of(optimizer)
        self._rate_sums += [0.0] * (len(self._rates) - len(self._rate_sums))
        for k, rate in enumerate(self._rates):
            self._rate_sums[k] += rate
        if self._schedule is not None and self._schedule.wants(self.step):
            self._save()

    def _save(self) -> None:
        """Write the checkpoint of the present step, list it, and remove those that need not stay."""
        manifest, schedule = self._manifest, self._schedule
        if manifest is None or schedule is None or any(r.step == self.step for r in manifest.recorded):
            return
        try:
            recorded = {r.step: r for r in (*manifest.recorded, self._write(Path(manifest.folder)))}
            kept = schedule.keep(sorted(recorded))
            listed = replace(manifest.with_recorded([recorded[s] for s in kept]), finished=False)
            listed.write()
        except Exception as cause:
            # Neither a full disk nor an optimiser of an unknown kind must end a training of days.
            self._stop()
            reason = str(cause) if isinstance(cause, InvalidInput) else f"{type(cause).__name__}: {first_line(cause)}"
            warnings.warn(f"Recording stopped at step {self.step:,}: {reason}", TrainingDataWarning, stacklevel=2)
            return
        self._manifest = listed
        self._drop_unlisted(listed)

    def _write(self, folder: Path) -> RecordedStep:
        """The files of the present step."""
        weights, name = self._weights(), f"step-{self.step:012d}"
        identity = digest(weights)
        path, moments_path = folder / f"{name}.safetensors", None
        write_tensors(path, WEIGHTS_FILE, weights, {"step": self.step})
        moments = self._moments()
        if moments:
            moments_path = folder / f"{name}.second_moments.safetensors"
            write_tensors(moments_path, MOMENTS_FILE, moments, {"step": self.step})
        others = self._moved_by_others(folder)
        return RecordedStep(self.step, path, self._groups(), identity, moments_path, self.batch_size, others)

    def _outside(self) -> list[tuple[str, nn.Parameter]]:
        """Trainable parameters that are in no group of the optimiser."""
        inside = {id(p) for group in self.optimizer.param_groups for p in group["params"]}
        return [(n, p) for n, p in self._trained.named_parameters() if p.requires_grad and id(p) not in inside]

    def _moved_by_others(self, folder: Path) -> tuple[str, ...]:
        """Which of them have moved since the start, which is said once."""
        earlier = self._manifest.recorded[-1].others if self._manifest and self._manifest.recorded else ()
        moved = tuple(n for n, p in self._outside() if n in earlier or self._others.get(n, "") != digest(p.detach()))
        if moved and not self._told:
            self._told = True
            warnings.warn(
                f"{describe_others(moved)}. Their weights are kept, and the learning rates of {os.fspath(folder)!r} "
                "will not stand for them: train all parameters with one optimiser, in groups, for methods that need "
                "rates, such as tracin() and source().",
                TrainingDataWarning,
                stacklevel=2,
            )
        return moved

    def _weights(self) -> dict[str, Tensor]:
        return named_state(self._trained.state_dict().items(), self._dtype)

    def _moments(self) -> dict[str, Tensor]:
        """Adam's second moments by parameter name, corrected for their start at 0."""
        moments: dict[str, Tensor] = {}
        if not self.second_moments:
            return moments
        names = self._names
        for group in self.optimizer.param_groups:
            for parameter in group["params"]:
                entry = self.optimizer.state.get(parameter, {})
                second = entry.get("max_exp_avg_sq", entry.get("exp_avg_sq"))
                known = isinstance(second, Tensor) and second.shape == parameter.shape and "step" in entry
                if not known or id(parameter) not in names or len(group.get("betas", ())) != 2:
                    continue
                corrected = second.detach() / (1.0 - group["betas"][1] ** float(entry["step"]))
                moments[names[id(parameter)]] = corrected
        return named_state(moments.items(), None if self._dtype is None else torch.bfloat16)

    def _groups(self) -> tuple[GroupState, ...]:
        decoupled = type(self.optimizer).__name__ in _DECOUPLED
        groups = zip(self.optimizer.param_groups, self._rates, self._rate_sums, strict=False)
        return tuple(GroupState.of({**group, "lr": rate}, total, decoupled) for group, rate, total in groups)

    def _drop_unlisted(self, manifest: Manifest) -> None:
        """Remove the files of steps that are not listed: thinned out, left by a killed process, or taken back."""
        listed = {Path(str(r.weights)).name for r in manifest.recorded}
        listed |= {r.second_moments.name for r in manifest.recorded if r.second_moments is not None}
        for path in Path(manifest.folder).glob("step-*.safetensors"):
            if path.name not in listed:
                with suppress(OSError):
                    path.unlink()

    def _stop(self) -> None:
        self._manifest = None
        self._open.close()

    # ---------------------------------------------------------------- before it starts

    @property
    def _module(self) -> nn.Module:
        return unwrap(self.model)[0]

    @property
    def _trained(self) -> nn.Module:
        """The model, or the model and the loss by the names that a `Problem` gives them."""
        return self._module if self.loss is None else ModelAndLoss(self._module, self.loss)

    @property
    def _dtype(self) -> torch.dtype | None:
        return getattr(torch, self.dtype, None) if isinstance(self.dtype, str) else self.dtype

    @property
    def _names(self) -> Mapping[int, str]:
        return {id(p): name for name, p in self._trained.named_parameters()}

    def _check(self) -> None:
        check_model(self.model)
        if self.loss is not None and not isinstance(self.loss, nn.Module):
            raise InvalidInput(
                f"Recorder(loss=...) takes a torch.nn.Module with weights of its own, got {type(self.loss).__name__}; "
                "leave it out for any other loss."
            )
        inner: Any = self.optimizer
        # Accelerate and Lightning wrap it: only the inner one has hooks.
        while not hasattr(inner, "_optimizer_step_post_hooks"):
            if not hasattr(inner, "optimizer"):
                raise InvalidInput(
                    "Recorder takes the torch.optim.Optimizer that trains the model, got "
                    f"{type(self.optimizer).__name__}."
                )
            inner = inner.optimizer
        self.optimizer = inner
        given: Any = self.dtype
        if given is not None and (not isinstance(given, (str, torch.dtype)) or self._dtype not in _HALVES):
            raise InvalidInput(f"Recorder(dtype={self.dtype!r}) must be 'float16', 'bfloat16' or None.")
        if self.start is not None:
            whole_number("start", self.start, 0, owner="Recorder")
        known = {id(p) for p in self._module.parameters()}
        if not any(id(p) in known for group in inner.param_groups for p in group["params"]):
            raise InvalidInput("The optimiser holds no parameter of the model; pass the optimiser that trains it.")
        sharded = next((n for n, p in self._module.named_parameters() if type(p.data).__name__ == "DTensor"), None)
        if sharded is not None:
            raise InvalidInput(
                f"Parameter {sharded!r} is spread over several processes, which Recorder cannot gather; keep full "
                "state dicts in the training loop and give them as a list."
            )

    def _count_within_budget(self) -> int:
        """How many checkpoints stay where the length of the run is not known; refuses what the bound cannot hold."""
        if self.most_bytes is None:
            return self.most
        each, bound = self._bytes_each(), Budget.of(self.most_bytes).bytes
        room = int(bound // each)
        needed = 2 if self.steps is None else make_schedule(self.at, self.steps, self.most).most
        if room < needed:
            raise InvalidInput(
                f"One checkpoint takes {each / 2**20:,.1f} MiB and most_bytes={self.most_bytes!r} has room for {room}, "
                f"not for {needed}; give more room, fewer shares at=, dtype='bfloat16', or second_moments=False."
            )
        return min(self.most, room)

    def _bytes_each(self) -> int:
        total = sum(v.numel() * v.element_size() for v in self._weights().values())
        adaptive = any(len(group.get("betas", ())) == 2 for group in self.optimizer.param_groups)
        if self.second_moments and adaptive:
            numbers = sum(p.numel() for group in self.optimizer.param_groups for p in group["params"])
            total += numbers * (4 if self._dtype is None else 2)
        return max(1, total)

    def _resume(self, folder: Path) -> Manifest:
        """The manifest to go on with: a new one, or that of the folder up to the step at which the training stands."""
        names = self._names
        parameters = tuple(
            tuple(names.get(id(p), "") for p in group["params"]) for group in self.optimizer.param_groups
        )
        fresh = Manifest(folder, type(self.optimizer).__name__, parameters, self.steps, finished=False)
        known = Manifest.read(folder) if (folder / MANIFEST).exists() and not self.overwrite else fresh
        if known.recorded:
            self.step = self._find_step(known)
        else:
            self.step = self._counted() if self.start is None else self.start
        earlier = [r for r in known.recorded if r.step <= self.step]
        self._rate_sums = self._continue_sums(earlier[-1] if earlier else None)
        return fresh.with_recorded(earlier)

    def _find_step(self, known: Manifest) -> int:
        """The step of a recorded run at which the training goes on."""
        step, last = self._recognise(known) if self.start is None else self.start, known.recorded[-1].step
        if step is None or (step == 0 and last > 0):
            stands = "this training starts anew" if step == 0 else "the model's weights are none of its checkpoints"
            raise InvalidInput(
                f"{os.fspath(self.folder)!r} holds a recorded run up to step {last:,}, and {stands}; give start= the "
                "number of steps already taken to go on with it, another folder, or overwrite=True to replace it."
            )
        return step

    def _recognise(self, known: Manifest) -> int | None:
        """The step at which the model or the optimiser says that it stands; None: neither does."""
        identity, counted = digest(self._weights()), self._counted()
        same = next((r for r in known.recorded if r.identity == identity), None)
        if same is None:
            return counted or None
        # While a warmup's rate is 0 the weights stay those of the start.
        return 0 if not counted and same.unmoved else same.step

    def _counted(self) -> int:
        """The steps that the optimiser itself has counted; 0 for one that does not count."""
        counts = [float(entry["step"]) for entry in self.optimizer.state.values() if "step" in entry]
        return int(max(counts, default=0))

    def _continue_sums(self, last: RecordedStep | None) -> list[float]:
        """The sums of learning rates so far; between the last checkpoint and the present step the rate is as now."""
        rates = self._rates = rates_of(self.optimizer)
        known = [] if last is None else [g.lr_sum or 0.0 for g in last.groups]
        before = [*known, *[0.0] * len(rates)][: len(rates)]
        steps = self.step - (0 if last is None else last.step)
        return [total + rate * steps for total, rate in zip(before, rates, strict=True)]
