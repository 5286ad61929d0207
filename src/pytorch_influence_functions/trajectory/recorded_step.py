"""One checkpoint of a training run, with what the optimiser did there."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, final

import torch
from torch import Tensor

from ..core.digest import digest
from ..core.errors import InvalidInput
from ..problem.checkpoints import Checkpoint, load_checkpoint


@final
@dataclass(frozen=True)
class GroupState:
    """What a parameter group of the optimiser was set to at one step. None: the optimiser has no such setting.

    Args:
        lr: the learning rate of the step.
        lr_sum: the sum of the learning rates of all steps up to it; None: not known.
        weight_decay: its strength.
        decoupled: whether the decay is AdamW's, apart from the loss.
        momentum: SGD's.
        beta2: how slowly Adam's second moments forget.
        eps: what Adam adds to their root.
    """

    lr: float
    lr_sum: float | None = None
    weight_decay: float = 0.0
    decoupled: bool = False
    momentum: float = 0.0
    beta2: float | None = None
    eps: float | None = None

    @staticmethod
    def of(group: Mapping[str, Any], lr_sum: float | None, decoupled: bool) -> GroupState:
        """The settings of one parameter group.

        Args:
            group: one of an optimiser's `param_groups`.
            lr_sum: the sum of its learning rates so far; None: not known.
            decoupled: whether its weight decay is AdamW's, where the group does not say so itself.
        """
        betas = group.get("betas")
        return GroupState(
            lr=float(group["lr"]),
            lr_sum=lr_sum,
            weight_decay=_number(group.get("weight_decay")) or 0.0,
            decoupled=bool(group.get("decoupled_weight_decay", decoupled)),
            momentum=_number(group.get("momentum")) or 0.0,
            beta2=_number(betas[-1]) if isinstance(betas, (tuple, list)) and len(betas) == 2 else None,
            eps=_number(group.get("eps")),
        )

    @staticmethod
    def from_dict(stored: Mapping[str, Any]) -> GroupState:
        """The settings that were `stored` by `to_dict`; keys of other versions are left out."""
        known = {f.name for f in fields(GroupState)}
        return GroupState(**{k: v for k, v in stored.items() if k in known})

    def to_dict(self) -> dict[str, Any]:
        """As plain values."""
        return asdict(self)


@final
@dataclass(frozen=True, eq=False, repr=False)
class RecordedStep:
    """The weights after one step of a training run.

    Args:
        step: how many optimiser steps had been taken.
        weights: a state dict or the path of one.
        groups: the optimiser's settings; empty where they are not known.
        identity: a digest of the weights; None where it was not computed.
        second_moments: the file of Adam's second moments; None where there is none.
        batch_size: examples per step; None where it is not known.
        others: parameters that have moved and are in no group of the optimiser, so that something else trains them.
    """

    step: int
    weights: Checkpoint
    groups: tuple[GroupState, ...] = ()
    identity: str | None = None
    second_moments: Path | None = None
    batch_size: int | None = None
    others: tuple[str, ...] = ()

    def __repr__(self) -> str:
        return f"RecordedStep({self.step})"

    @property
    def unmoved(self) -> bool:
        """Whether the rates of all steps so far were 0, so that these are the weights of the start."""
        return bool(self.groups) and not self.others and all(group.lr_sum == 0 for group in self.groups)

    def check_all_recorded(self) -> None:
        """Refuse to speak for parameters of whose optimiser nothing is known.

        Raises:
            InvalidInput: there are some.
        """
        if self.others:
            raise InvalidInput(
                f"{describe_others(self.others)}, and its learning rates up to step {self.step:,} are not recorded; "
                "train all parameters with one optimiser, in groups, or build the segments by hand. The checkpoints "
                "are whole: methods that need no learning rates, such as along(run), take them."
            )

    def __fingerprint__(self) -> tuple[Any, ...]:
        """What results depend on: the weights, wherever they lie."""
        return (self.step, self.identity or digest(load_checkpoint(self.weights)))


def describe_others(names: Sequence[str]) -> str:
    """In words: that these parameters move and are in no group of the optimiser."""
    some = ", ".join(map(repr, names[:3])) + (f" and {len(names) - 3:,} more" if len(names) > 3 else "")
    kind, what = ("Parameter", "moves and is") if len(names) == 1 else ("Parameters", "move and are")
    return f"{kind} {some} {what} in no group of the recorded optimiser: something else trains them"


def rates_of(optimizer: torch.optim.Optimizer) -> list[float]:
    """The learning rate of every parameter group; empty where the optimiser finds them itself, as Adafactor can."""
    groups = with_rates(optimizer.param_groups)
    return [float(group["lr"]) for group in groups] if len(groups) == len(optimizer.param_groups) else []


def with_rates(groups: Iterable[Any]) -> list[Mapping[str, Any]]:
    """The parameter groups that hold a learning rate."""
    return [g for g in groups if isinstance(g, Mapping) and _number(g.get("lr")) is not None]


def _number(setting: Any) -> float | None:
    """One real number, or a tensor of one; None for pairs and the like, such as Adafactor's eps."""
    if isinstance(setting, Tensor) and setting.numel() == 1:
        return float(setting)
    return float(setting) if isinstance(setting, (int, float)) else None


def named_state(tensors: Iterable[tuple[str, Tensor]], dtype: torch.dtype | None) -> dict[str, Tensor]:
    """Tensors by name as they are stored: each shared one once, floating-point numbers in `dtype` where they fit it."""
    places: set[tuple[int, tuple[int, ...], tuple[int, ...]]] = set()
    stored = {}
    for name, value in tensors:
        place = (value.data_ptr(), tuple(value.shape), tuple(value.stride()))
        if value.numel() and place in places:
            continue
        places.add(place)
        # Narrowed where it lies: less is copied from an accelerator.
        stored[name] = store_as(value.detach(), dtype).cpu()
    return stored


def store_as(value: Tensor, dtype: torch.dtype | None) -> Tensor:
    """The tensor in a narrower type; as it is where a number would overflow there, or where it is no such tensor."""
    if dtype is None or not value.is_floating_point() or value.element_size() <= dtype.itemsize:
        return value
    narrow = value.to(dtype)
    return narrow if bool(torch.isfinite(narrow).all()) or not bool(torch.isfinite(value).all()) else value
