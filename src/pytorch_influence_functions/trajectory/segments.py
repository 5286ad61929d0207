"""How a model was trained, as far as unrolling needs to know: checkpoints, learning rates, steps, Adam's state."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast, final

import torch
from torch import Tensor, nn

from ..core.errors import InvalidInput, nearest
from ..core.validate import finite_number, whole_number
from ..linalg.rows import Rows
from ..linalg.space import Space
from ..problem.checkpoints import Checkpoint, as_checkpoints, load_checkpoint
from ..problem.wrappers import unwrap

# --------------------------------------------------------------------------- Adam


@final
@dataclass(frozen=True, eq=False, repr=False)
class AdamState:
    """Adam's diagonal preconditioner `P = 1 / (sqrt(v) + eps)` during one segment.

    Steps are `theta -= lr * P * gradient`, the first moment's average having no lasting effect. Adam's own correction
    of the *first* moment, `1 / (1 - beta1^t)`, is over after a few dozen steps and is left out.

    Args:
        second_moments: v by parameter name, bias-corrected: `exp_avg_sq / (1 - beta2^step)`.
        eps: what is added to the root.
        decay: decoupled weight decay (AdamW), one number or one per parameter name; `theta -= lr * decay * theta`.
            Ordinary L2 weight decay belongs to the `Problem` instead.

    Raises:
        InvalidInput: a moment is negative, not finite, or no tensor; eps or decay is negative or not finite.

    >>> AdamState({"weight": torch.ones(2, 3)})
    AdamState(1 tensor, eps=1e-08)
    """

    second_moments: Mapping[str, Tensor]
    eps: float | int = 1e-8
    decay: float | int | Mapping[str, float] = 0.0

    def __post_init__(self) -> None:
        moments: Any = self.second_moments
        if not isinstance(moments, Mapping) or not moments:
            raise InvalidInput(
                f"AdamState takes second moments as tensors by parameter name, got {type(moments).__name__}; "
                "AdamState.of(optimizer, model) reads them."
            )
        for name, value in moments.items():
            if not isinstance(value, Tensor) or not bool(torch.isfinite(value).all()) or bool((value < 0).any()):
                raise InvalidInput(
                    f"The second moment of {name!r} must be a tensor of finite numbers of at least 0; take exp_avg_sq "
                    "from the optimiser's state."
                )
        finite_number("eps", self.eps, least=0, owner=self)
        decays = self.decay.items() if isinstance(self.decay, Mapping) else [("all", self.decay)]
        for name, strength in decays:
            finite_number(f"AdamState's decay of {name!r}", strength, least=0)

    def __repr__(self) -> str:
        n = len(self.second_moments)
        decay = f", decay={self.decay}" if self.decay else ""
        return f"AdamState({n} tensor{'' if n == 1 else 's'}, eps={self.eps}{decay})"

    @staticmethod
    def of(optimizer: torch.optim.Optimizer | Mapping[str, Any], model: nn.Module) -> AdamState:
        """Read from Adam or AdamW, or from its `state_dict()`; second moments are bias-corrected by its step count.

        A state dict knows parameters by number only, unless it was made from named ones: they are taken in the order
        of `model.parameters()`.

        Args:
            optimizer: the optimiser, or its `state_dict()`.
            model: the model that it trained.

        Raises:
            InvalidInput: no Adam state is there (not an Adam, or no step was taken), it does not fit the model, or
                its groups differ in eps.
        """
        entries = _adam_entries(optimizer, model)
        moments, decays, epsilons = {}, {}, set()
        for name, (entry, group) in entries.items():
            second = entry.get("max_exp_avg_sq", entry.get("exp_avg_sq"))
            if second is None or "step" not in entry or len(group.get("betas", ())) != 2:
                raise InvalidInput(
                    f"The optimiser holds no exp_avg_sq and step for {name!r}: it is not Adam or AdamW, or has taken "
                    "no step yet; pass the state of the optimiser that trained the model."
                )
            moments[name] = second.detach() / (1.0 - group["betas"][1] ** float(entry["step"]))
            epsilons.add(float(group["eps"]))
            decays[name] = _decoupled_decay(optimizer, group)
        if len(epsilons) != 1:
            raise InvalidInput(
                f"The optimiser's groups have state for {len(entries)} parameters with eps {sorted(epsilons)}; "
                "expected one value, so write AdamState(second_moments, eps) for each kind by hand."
            )
        strengths = set(decays.values())
        return AdamState(moments, epsilons.pop(), strengths.pop() if len(strengths) == 1 else decays)

    def root(self, space: Space) -> Tensor:
        """`P^(1/2)` over the flattened space, [P] in float64.

        Args:
            space: the parameters that take part.

        Raises:
            InvalidInput: a parameter of the space has no moment, one of another shape, or a denominator of zero.
        """
        return self.denominators(space).flat()[0].rsqrt()

    def denominators(self, space: Space) -> Rows:
        """What Adam divides by, `sqrt(v) + eps`, over a space: one row in float64.

        Args:
            space: the parameters that take part.

        Raises:
            InvalidInput: a parameter of the space has no moment, one of another shape, or a denominator of zero.
        """
        values = {}
        for name in space.names:
            if name not in self.second_moments:
                raise InvalidInput(
                    f"AdamState has no second moment for {name!r}.{nearest(name, self.second_moments)}"
                    " Give one for every parameter that takes part."
                )
            v = self.second_moments[name]
            if tuple(v.shape) != tuple(space.shapes[name]):
                raise InvalidInput(
                    f"The second moment of {name!r} has shape {list(v.shape)}, the parameter "
                    f"{list(space.shapes[name])}; take the state of the optimiser of this very model."
                )
            denominator = v.detach().double().sqrt() + self.eps
            if not bool((denominator > 0).all()):
                raise InvalidInput(f"sqrt(v) + eps is 0 for an entry of {name!r}; use Adam's own eps, e.g. 1e-8.")
            values[name] = denominator[None]
        return space.from_parameters(values)

    def decays(self, space: Space) -> Tensor:
        """Decoupled decay over the flattened space, [P] in float64.

        Args:
            space: the parameters that take part.
        """
        strengths = self.decay if isinstance(self.decay, Mapping) else dict.fromkeys(space.names, float(self.decay))
        values = {
            name: torch.full((1, *space.shapes[name]), float(strengths.get(name, 0.0)), dtype=torch.float64)
            for name in space.names
        }
        return space.from_parameters(values).flat()[0]


_Entries = dict[str, tuple[Mapping[str, Any], Mapping[str, Any]]]


def _adam_entries(optimizer: Any, model: nn.Module) -> _Entries:
    """(state, group) by parameter name, without the prefix of a wrapper."""
    model, prefix = unwrap(model)
    if isinstance(optimizer, torch.optim.Optimizer):
        name_of = {id(p): name for name, p in model.named_parameters()}
        entries: _Entries = {
            name_of[id(p)]: (optimizer.state.get(p, {}), group)
            for group in optimizer.param_groups
            for p in group["params"]
            if id(p) in name_of
        }
    elif isinstance(optimizer, Mapping) and {"state", "param_groups"} <= set(optimizer):
        entries = _from_state_dict(optimizer, model, prefix)
    else:
        raise InvalidInput(
            f"AdamState.of takes an optimiser or its state_dict(), got {type(optimizer).__name__}; "
            "pass the Adam or AdamW that trained the model."
        )
    if not entries:
        raise InvalidInput("The optimiser holds no parameter of the model; pass the optimiser that trained it.")
    return entries


def _from_state_dict(state: Mapping[str, Any], model: nn.Module, prefix: str) -> _Entries:
    groups = state["param_groups"]
    count = sum(len(g["params"]) for g in groups)
    orders = [[k for k, _ in model.named_parameters()], [k for k, p in model.named_parameters() if p.requires_grad]]
    by_name = all(g.get("param_names") is not None for g in groups)
    order = None if by_name else next((names for names in orders if len(names) == count), None)
    entries: _Entries = {}
    for group in groups:
        named = group.get("param_names")
        if named is None and order is None:
            raise InvalidInput(
                f"The optimiser's state dict holds {count} parameters and the model {len(orders[0])}, so they cannot "
                "be matched by order; pass the optimiser itself, or AdamState(second_moments) by name."
            )
        for position, number in enumerate(group["params"]):
            name = named[position] if order is None else order[number]
            entries[name.removeprefix(prefix)] = (state["state"].get(number, {}), group)
    return entries


def _decoupled_decay(optimizer: Any, group: Mapping[str, Any]) -> float:
    strength = float(group.get("weight_decay", 0.0))
    if strength == 0.0:
        return 0.0
    decoupled = group.get("decoupled_weight_decay")
    if decoupled is None and isinstance(optimizer, torch.optim.Optimizer):
        decoupled = "AdamW" in {c.__name__ for c in type(optimizer).__mro__}
    if decoupled is None:
        raise InvalidInput(
            f"The optimiser's state dict has weight_decay={strength:g} without saying whether it is decoupled (AdamW); "
            "pass the optimiser itself, or AdamState(second_moments, decay=...)."
        )
    return strength if decoupled else 0.0


# --------------------------------------------------------------------------- segments


@final
@dataclass(frozen=True, eq=False, repr=False)
class Segment:
    """A stretch of training over which curvature and gradients are taken as constant: their mean over `checkpoints`.

    Args:
        checkpoints: state dicts or paths, from within this stretch; one may stand alone (the average of the weights,
            for instance).
        lr: the mean learning rate of the stretch.
        steps: how many optimiser steps it lasted.
        momentum: SGD's (heavy ball or Nesterov); it multiplies the learning rate by `1 / (1 - momentum)`.
        adam: `AdamState.of(optimizer, model)` where the steps were Adam's or AdamW's.

    Raises:
        InvalidInput: no checkpoint; lr or steps not positive; momentum outside [0, 1) or given beside `adam`.

    >>> segment = Segment([nn.Linear(2, 1).state_dict()], lr=0.1, steps=100, momentum=0.9)
    >>> segment, round(segment.span, 6)
    (Segment(1 checkpoint, lr=0.1, steps=100, momentum=0.9), 100.0)
    """

    checkpoints: Sequence[Checkpoint] | Checkpoint
    lr: float | int
    steps: float | int
    momentum: float | int = 0.0
    adam: AdamState | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "checkpoints", as_checkpoints(self.checkpoints, "Segment's checkpoints"))
        if not self.checkpoint_tuple:
            raise InvalidInput("A Segment needs at least one checkpoint, a state dict or a path from within it.")
        finite_number("lr", self.lr, above=0, owner=self)
        finite_number("steps", self.steps, above=0, owner=self)
        finite_number("momentum", self.momentum, least=0, below=1, owner=self)
        if self.adam is not None and not isinstance(self.adam, AdamState):
            raise InvalidInput(
                f"Segment's adam must be an AdamState, got {type(self.adam).__name__}; write "
                "AdamState.of(optimizer, model)."
            )
        if self.adam is not None and self.momentum:
            raise InvalidInput(
                f"Segment has momentum={self.momentum} and adam; Adam's own first moment does not change the step's "
                "size, so leave momentum at 0."
            )

    @property
    def checkpoint_tuple(self) -> tuple[Checkpoint, ...]:
        """The checkpoints, however they were given."""
        return cast("tuple[Checkpoint, ...]", self.checkpoints)

    def __fingerprint__(self) -> tuple[Any, ...]:
        """What results depend on: the weights rather than the paths they are read from."""
        states = [load_checkpoint(checkpoint) for checkpoint in self.checkpoint_tuple]
        return states, self.lr, self.steps, self.momentum, self.adam

    @property
    def rate(self) -> float:
        """The effective learning rate, `lr / (1 - momentum)`."""
        return float(self.lr) / (1.0 - float(self.momentum))

    @property
    def span(self) -> float:
        """Training time: effective learning rate times steps, in units of 1 / curvature."""
        return self.rate * float(self.steps)

    def __repr__(self) -> str:
        n = len(self.checkpoint_tuple)
        parts = [f"{n} checkpoint{'' if n == 1 else 's'}", f"lr={self.lr:g}", f"steps={self.steps:g}"]
        parts += [f"momentum={self.momentum:g}"] if self.momentum else []
        parts += [f"adam={self.adam!r}"] if self.adam is not None else []
        return f"Segment({', '.join(parts)})"


def split_evenly(
    checkpoints: Sequence[Checkpoint],
    lr: float | int | Sequence[float | int],
    steps: float | int | Sequence[float | int],
    segments: int = 3,
    momentum: float | int = 0.0,
) -> tuple[Segment, ...]:
    """Checkpoints in the order of training, split evenly into segments.

    `lr`: one number, or the mean learning rate of the stretch each checkpoint stands for. `steps`: the whole run's
    number, or one per checkpoint. A segment's own lr is their mean weighted by steps, so that lr x steps adds up.
    """
    ordered = as_checkpoints(checkpoints)
    whole_number("segments", segments, 1, len(ordered), hint="there cannot be more segments than checkpoints")
    rates = _one_per_checkpoint("lr", lr, len(ordered), share=False)
    counts = _one_per_checkpoint("steps", steps, len(ordered), share=True)
    run, start = [], 0
    for s in range(segments):
        size = len(ordered) // segments + (s < len(ordered) % segments)
        part = slice(start, start + size)
        total = sum(counts[part])
        mean = sum(r * c for r, c in zip(rates[part], counts[part], strict=True)) / total
        run.append(Segment(ordered[part], mean, total, momentum))
        start += size
    return tuple(run)


def _addresses(checkpoint: Checkpoint) -> frozenset[int]:
    """The memory addresses of a state dict's tensors; empty for paths."""
    if not isinstance(checkpoint, Mapping):
        return frozenset()
    values: list[Any] = list(checkpoint.values())
    tensors = next((list(v.values()) for v in values if isinstance(v, Mapping)), values)
    return frozenset(v.data_ptr() for v in tensors if isinstance(v, Tensor) and v.numel() > 0)


def refuse_shared(checkpoints: Sequence[Checkpoint]) -> None:
    """Refuse state dicts that share memory: `state_dict()` gives the live tensors, so uncopied ones are all the last.

    Raises:
        InvalidInput: two state dicts lie in the same memory.
    """
    first_at: dict[frozenset[int], int] = {}
    for k, checkpoint in enumerate(checkpoints):
        addresses = _addresses(checkpoint)
        first = first_at.setdefault(addresses, k) if addresses else k
        if first != k and checkpoints[first] is not checkpoint:
            raise InvalidInput(
                f"Checkpoints {first + 1} and {k + 1} are the same tensors in memory, because state_dict() hands out "
                "the live weights; keep copy.deepcopy(model.state_dict()) or save to a file at each checkpoint."
            )


def copy_if_live(checkpoint: Checkpoint, model: nn.Module) -> Checkpoint:
    """The checkpoint, copied where it is the model's live `state_dict()`."""
    live = {t.data_ptr() for t in [*model.parameters(), *model.buffers()] if t.numel() > 0}
    if not isinstance(checkpoint, Mapping) or not live & _addresses(checkpoint):
        return checkpoint
    return {name: value.clone() for name, value in load_checkpoint(checkpoint, model).items()}


def _one_per_checkpoint(name: str, given: Any, n: int, share: bool) -> list[float]:
    """One positive number per checkpoint; a single number is divided among them (`share`) or repeated."""
    if isinstance(given, Iterable) and not isinstance(given, (str, Mapping)):
        values = list(given)
        if len(values) != n:
            raise InvalidInput(f"{name} has {len(values)} numbers for {n} checkpoints; give one each, or one number.")
        return [finite_number(f"{name}[{i}]", v, above=0) for i, v in enumerate(values)]
    number = finite_number(name, given, above=0)
    return [number / n if share else number] * n
