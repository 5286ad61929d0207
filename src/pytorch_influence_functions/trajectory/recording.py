"""A recorded training run: checkpoints in the order of training, with what is known of the steps between them."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from os import PathLike
from pathlib import Path
from typing import Any, Final, Protocol, TypeAlias, final, runtime_checkable

import torch
from torch import Tensor, nn

from ..core.errors import InvalidInput
from ..core.files import read_tensors
from ..core.validate import finite_number, whole_number
from ..problem.checkpoints import Checkpoint, as_checkpoints, load_checkpoint, named_tensors
from .existing import read_lightning, read_trainer, trainer_folders
from .manifest import MANIFEST, Manifest
from .recorded_step import GroupState, RecordedStep
from .segments import AdamState, Segment, refuse_shared, split_evenly

MOMENTS_FILE: Final = "second moments"


@runtime_checkable
class HasRecording(Protocol):
    """What has recorded a run: a `Recorder`."""

    @property
    def recording(self) -> Recording:
        """What was recorded."""


RunLike: TypeAlias = "Recording | HasRecording | str | PathLike[str] | Sequence[Any]"
"""A recording, its recorder or folder, a list of checkpoints in the order of training, or a list of several runs."""


@final
@dataclass(frozen=True, eq=False, repr=False)
class Recording:
    """A recorded training run, read with `Recording.open`.

    Args:
        recorded: the checkpoints, in the order of training.
        finished: whether the training had come to its end.
        origin: where it comes from, in words.

    >>> states = [nn.Linear(2, 1).state_dict() for _ in range(3)]
    >>> Recording.of(states, steps=[10, 40, 100])
    Recording(3 checkpoints at steps 10, 40, 100)
    """

    recorded: tuple[RecordedStep, ...]
    finished: bool = True
    origin: str = ""

    @staticmethod
    def open(run: Recording | HasRecording | str | PathLike[str] | Sequence[Checkpoint]) -> Recording:
        """Read a run; weights are loaded when they are used, and never by unpickling code.

        Args:
            run: the folder that a `Recorder` wrote; the output folder of a Hugging Face `Trainer` (its `checkpoint-*`
                folders); a Lightning `.ckpt` file or a folder of them; a list of state dicts or of paths in the order
                of training; a `Recorder`; or a `Recording`.

        Raises:
            InvalidInput: it is none of these, holds no checkpoint, or is damaged.
        """
        if isinstance(run, Recording):
            return run
        if isinstance(run, HasRecording):
            return run.recording
        if not isinstance(run, (str, PathLike)):
            return Recording.of(run)
        path = Path(run)
        if path.is_file():
            return _named(read_lightning([path]), path, "Lightning checkpoint")
        if not path.is_dir():
            raise InvalidInput(
                f"There is no run at {os.fspath(run)!r}; give the folder that a Recorder, a Trainer or Lightning wrote."
            )
        if (path / MANIFEST).exists():
            manifest = Manifest.read(path)
            if manifest.recorded:
                return Recording(manifest.recorded, manifest.finished, f"recorded in {os.fspath(run)!r}")
        elif trainer_folders(path):
            return _named(list(read_trainer(path)), path, "Trainer's folder")
        elif files := sorted(path.glob("*.ckpt")):
            return _named(read_lightning(files), path, "Lightning's folder")
        raise InvalidInput(
            f"{os.fspath(run)!r} holds no recorded run; expected the {MANIFEST} of a Recorder with at least one "
            "checkpoint, checkpoint-* folders of a Trainer, or .ckpt files; other files are given as a list, in the "
            "order of training."
        )

    @staticmethod
    def of(
        checkpoints: Sequence[Checkpoint],
        steps: Sequence[int] | None = None,
        lr: float | Sequence[float] | None = None,
    ) -> Recording:
        """A run from checkpoints at hand.

        Args:
            checkpoints: state dicts or paths, in the order of training.
            steps: how many optimiser steps had been taken at each; `None`: they are numbered.
            lr: the mean learning rate of the stretch that each one ends, or one number for all; `None`: not known.

        Raises:
            InvalidInput: there is none, they share memory, the lengths disagree, or steps do not ascend.
        """
        states = as_checkpoints(checkpoints, "run")
        if not states:
            raise InvalidInput("run= holds no checkpoint; give at least one state dict or path.")
        refuse_shared(states)
        counts = list(range(1, len(states) + 1)) if steps is None else [whole_number("steps", s, 0) for s in steps]
        rates: list[Any] = list(lr) if isinstance(lr, Iterable) else [lr] * len(states)
        if len(counts) != len(states) or len(rates) != len(states):
            raise InvalidInput(
                f"There are {len(states)} checkpoints, {len(counts)} steps and {len(rates)} learning rates; give one "
                "each per checkpoint."
            )
        if any(b <= a for a, b in pairwise(counts)):
            raise InvalidInput(f"steps={counts} must ascend; give checkpoints in the order of training.")
        recorded, lr_sum, before = [], 0.0, 0
        for state, count, rate in zip(states, counts, rates, strict=True):
            groups: tuple[GroupState, ...] = ()
            if rate is not None:
                value = finite_number("lr", rate, least=0)
                lr_sum += value * (count - before)
                groups = (GroupState(value, lr_sum),)
            recorded.append(RecordedStep(count, state, groups))
            before = count
        return Recording(tuple(recorded), origin="checkpoints that were given")

    def __len__(self) -> int:
        return len(self.recorded)

    def __repr__(self) -> str:
        steps = ", ".join(f"{step:,}" for step in self.steps)
        several, end = "" if len(self) == 1 else "s", "" if self.finished else ", unfinished"
        return f"Recording({len(self)} checkpoint{several} at step{several} {steps}{end})"

    @property
    def steps(self) -> tuple[int, ...]:
        """How many optimiser steps had been taken at each checkpoint."""
        return tuple(r.step for r in self.recorded)

    @property
    def shares(self) -> tuple[float, ...]:
        """The steps as shares of the last one."""
        steps = self.steps
        return tuple(step / max(1, steps[-1]) for step in steps)

    @property
    def checkpoints(self) -> tuple[Checkpoint, ...]:
        """The weights, as `Problem(checkpoints=...)` takes them."""
        return tuple(r.weights for r in self.recorded)

    @property
    def stretches(self) -> tuple[int, ...]:
        """How many steps each checkpoint stands for: those since the one before."""
        return tuple(b - a for a, b in pairwise((0, *self.steps)))

    @property
    def learning_rates(self) -> tuple[float, ...]:
        """The mean learning rate over each stretch; with `stretches` what `ptif.tracin` takes.

        Raises:
            InvalidInput: the rates are not known, or differ between parameter groups, or another optimiser trained
                some of the parameters.
        """
        return tuple(self._rate(k) for k in range(len(self)))

    def at(self, shares: Sequence[float]) -> Recording:
        """The checkpoints nearest to some shares of the run, each once.

        Args:
            shares: between 0 and 1, such as `(0.1, 0.5, 1.0)`.
        """
        values = [finite_number("A share", s, least=0, most=1) for s in shares]
        nearest = {min(range(len(self)), key=lambda k: abs(self.shares[k] - value)) for value in values}
        if not nearest:
            raise InvalidInput("at() got no share of the run; give at least one, such as 1.0.")
        return replace(self, recorded=tuple(self.recorded[k] for k in sorted(nearest)))

    def segments(self, count: int = 3) -> tuple[Segment, ...]:
        """The run as `trajectory.SOURCE` takes it: its checkpoints split evenly into segments.

        Args:
            count: how many segments.

        Raises:
            InvalidInput: learning rates are not known or 0 throughout a stretch, there are fewer checkpoints than
                segments, or the run was Adam's and its second moments were not recorded.
        """
        used = [r for r, steps in zip(self.recorded, self.stretches, strict=True) if steps > 0]
        run = replace(self, recorded=tuple(used)) if used else self
        groups = run.recorded[-1].groups
        momentum = groups[0].momentum if groups else 0.0
        parts = split_evenly(run.checkpoints, run.learning_rates, run.stretches, count, momentum)
        if not groups or groups[0].beta2 is None:
            return parts
        with_adam, start = [], 0
        for part in parts:
            end = start + len(part.checkpoint_tuple)
            with_adam.append(replace(part, momentum=0.0, adam=_adam_state(run.recorded[start:end])))
            start = end
        return tuple(with_adam)

    def adam_state(self, position: int = -1) -> AdamState:
        """Adam's second moments, eps and decoupled decay at one of the checkpoints.

        Args:
            position: which one; the last by default.

        Raises:
            InvalidInput: the run was not Adam's, or its second moments were not recorded.
        """
        recorded = self.recorded[position]
        if not recorded.groups or recorded.groups[0].beta2 is None:
            raise InvalidInput(
                f"The run was not trained by Adam as far as is known ({self.origin or 'no origin'}), and its second "
                "moments are needed; record an Adam or AdamW training with ptif.Recorder."
            )
        recorded.check_all_recorded()
        return _adam_state([recorded])

    def describe(self) -> str:
        """The run in words, for the notes of a result."""
        shares = ", ".join(f"{share:.0%}" for share in self.shares)
        several = "" if len(self) == 1 else "s"
        end = "" if self.finished else ", of a training that had not come to its end"
        return f"{len(self)} checkpoint{several} at {shares} of {self.steps[-1]:,} steps{end}"

    def ends_at(self, model: nn.Module) -> bool:
        """Whether the last checkpoint holds the present weights of `model`, in the type in which it was stored."""
        own, last = named_tensors(model), load_checkpoint(self.recorded[-1].weights, model)
        return all(bool((own[k].detach().cpu().to(v.dtype) == v.detach().cpu()).all()) for k, v in last.items())

    def _rate(self, k: int) -> float:
        """The mean learning rate of the steps that checkpoint k stands for."""
        groups, steps = self.recorded[k].groups, self.stretches[k]
        if not groups:
            raise InvalidInput(
                f"The learning rate at step {self.steps[k]:,} is not known ({self.origin}); record the run with "
                "ptif.Recorder, or give it: Recording.of(checkpoints, steps, lr)."
            )
        self.recorded[k].check_all_recorded()
        before = self.recorded[k - 1].groups if k else (GroupState(0.0, 0.0),) * len(groups)
        rates = []
        for now, then in zip(groups, before, strict=False):
            known = now.lr_sum is not None and then.lr_sum is not None and steps > 0
            rates.append((now.lr_sum - then.lr_sum) / steps if known else now.lr)  # type: ignore[operator]
        if max(rates) - min(rates) > 1e-6 * max(rates):
            different = ", ".join(f"{r:.3g}" for r in rates)
            raise InvalidInput(
                f"The parameter groups were trained with different learning rates ({different} up to step "
                f"{self.steps[k]:,}), and one is needed; build the segments by hand."
            )
        return rates[0]


def open_runs(run: Any) -> tuple[Recording, ...]:
    """One run or several: a list whose items are recordings, their recorders or folders, or lists, holds several.

    Raises:
        InvalidInput: as `Recording.open`.
    """
    if isinstance(run, (Recording, HasRecording, str, PathLike)):
        return (Recording.open(run),)
    if isinstance(run, Mapping) or not isinstance(run, Iterable):
        kind = "one state dict" if isinstance(run, Mapping) else type(run).__name__
        raise InvalidInput(
            "run= must be a recorded run, the folder of one, or a list of checkpoints in the order of training, got "
            f"{kind}."
        )
    items = list(run)
    whole = [_is_run(item) for item in items]
    if items and all(whole):
        return tuple(Recording.open(item) for item in items)
    if any(whole):
        raise InvalidInput("run= holds runs beside single checkpoints; give one kind, or Recording.of(checkpoints).")
    return (Recording.of(items),)


def _is_run(given: Any) -> bool:
    """Whether it is a run of its own, and not one checkpoint."""
    if isinstance(given, (Recording, HasRecording, list, tuple)):
        return True
    path = Path(given) if isinstance(given, (str, PathLike)) else None
    if path is None or not path.is_dir():
        return False
    return (path / MANIFEST).exists() or bool(trainer_folders(path)) or bool(sorted(path.glob("*.ckpt")))


def _named(recorded: list[RecordedStep], path: Path, kind: str) -> Recording:
    return Recording(tuple(recorded), origin=f"{kind} {os.fspath(path)!r}")


def _adam_state(stretch: Sequence[RecordedStep]) -> AdamState:
    """Adam's state over a stretch of training: the mean of the second moments at its checkpoints."""
    total: dict[str, Tensor] = {}
    for recorded in stretch:
        if recorded.second_moments is None:
            raise InvalidInput(
                f"Adam's second moments at step {recorded.step:,} were not recorded, and they are needed; record the "
                "run with ptif.Recorder(second_moments=True)."
            )
        moments, _ = read_tensors(recorded.second_moments, MOMENTS_FILE, cure="record the run anew")
        for name, moment in moments.items():
            share = moment.to(torch.promote_types(moment.dtype, torch.float32)) / len(stretch)
            total[name] = share if name not in total else total[name] + share
    groups = [g for recorded in stretch for g in recorded.groups]
    decays = {g.weight_decay for g in groups if g.decoupled}
    epsilons = {g.eps for g in groups}
    if len(decays) > 1 or len(epsilons) > 1:
        raise InvalidInput(
            f"The parameter groups differ in weight decay or eps up to step {stretch[-1].step:,}, and one AdamState "
            "has one; build the segments by hand."
        )
    return AdamState(total, epsilons.pop() or 0.0, decays.pop() if decays else 0.0)
