"""Weight decay: the L2 term of the training objective, read from numbers or from the optimiser."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from ..core.errors import InvalidInput
from ..core.validate import finite_number
from .wrappers import unwrap

# Optimisers whose weight_decay is added to the gradient, which makes it an L2 term of the loss.
_COUPLED = (
    "SGD",
    "Adam",
    "RMSprop",
    "Adagrad",
    "Adadelta",
    "Adamax",
    "ASGD",
    "NAdam",
    "RAdam",
    "SparseAdam",
    "LBFGS",
)


@dataclass(frozen=True)
class WeightDecay:
    """An L2 term ½·strength·|θ|² in the training objective, as the optimiser's `weight_decay` means it.

    Args:
        strength: one number, or one per name of a parameter or glob over names such as `"0.*"` (absent names: 0); a
            parameter's own name goes before globs.
        per_example: False: the term is fixed, removing an example leaves it whole, so it only adds to the
            curvature. True: every example carries it (a mean over examples of loss + term is trained), so
            its slope strength·θ is also part of each example's gradient.
    """

    strength: float | Mapping[str, float] = 0.0
    per_example: bool = False

    def __post_init__(self) -> None:
        strength: Any = self.strength
        strengths: dict[str, Any] = dict(strength) if isinstance(strength, Mapping) else {"": strength}
        for name, value in strengths.items():
            finite_number(f"The weight decay of {name!r}" if name else "weight_decay", value, least=0)

    def __hash__(self) -> int:
        strength = self.strength
        return hash((tuple(sorted(strength.items())) if isinstance(strength, Mapping) else strength, self.per_example))

    @property
    def is_zero(self) -> bool:
        """Whether there is no decay at all."""
        values = self.strength.values() if isinstance(self.strength, Mapping) else [self.strength]
        return not any(values)

    @classmethod
    def from_optimizer(cls, optimizer: torch.optim.Optimizer, model: nn.Module) -> WeightDecay:
        """Read the decay of each parameter from the optimiser's groups.

        Args:
            optimizer: the optimiser that trained the model.
            model: the model, whose parameters are looked up in the optimiser.

        Raises:
            InvalidInput: the decay is decoupled (AdamW) or of a kind that is not known to be an L2 term, or
                the optimiser trains no parameter of this model.
        """
        inside = getattr(optimizer, "optimizer", None)  # of what accelerate wraps around it
        optimizer = inside if isinstance(inside, torch.optim.Optimizer) else optimizer
        name_of = {id(p): name for name, p in unwrap(model)[0].named_parameters()}
        strengths: dict[str, float] = {}
        known = False
        for group in optimizer.param_groups:
            decay = float(group.get("weight_decay", 0.0))
            if decay != 0.0:
                _check_coupled(optimizer, group, decay)
            for parameter in group["params"]:
                if id(parameter) in name_of:
                    known = True
                    strengths[name_of[id(parameter)]] = decay
        if not known:
            raise InvalidInput(
                "The optimiser given as weight_decay holds no parameter of the model; "
                "pass the optimiser that trained it, or a number."
            )
        return cls({name: value for name, value in strengths.items() if value != 0.0} or 0.0)


def _check_coupled(optimizer: torch.optim.Optimizer, group: Mapping[str, Any], decay: float) -> None:
    kind = type(optimizer).__name__
    way_out = "pass weight_decay=0 and let damping=FromTraining(lr, steps) stand for it, or pass a number."
    names = {c.__name__ for c in type(optimizer).__mro__}
    if group.get("decoupled_weight_decay") or "AdamW" in names or "SGDW" in names:
        raise InvalidInput(
            f"{kind} has decoupled weight decay ({decay:g}): it shrinks the weights beside the gradient step "
            f"and is not an L2 term of the loss, so it adds no curvature; {way_out}"
        )
    if not names & set(_COUPLED):
        raise InvalidInput(
            f"The weight decay of {kind} ({decay:g}) is not known to be an L2 term of the loss; {way_out}"
        )


def _from_optimizers(optimizers: Sequence[torch.optim.Optimizer], model: nn.Module) -> WeightDecay:
    """The decay of each parameter, from the one of several optimisers that trains it.

    Raises:
        InvalidInput: two of them train the same parameter, or none trains any of the model.
    """
    strengths: dict[str, float] = {}
    trained: set[int] = set()
    known = {id(p): name for name, p in unwrap(model)[0].named_parameters()}
    for optimizer in optimizers:
        own = {id(p) for group in optimizer.param_groups for p in group["params"]} & known.keys()
        if own & trained:
            twice = next(name for key, name in known.items() if key in own & trained)
            raise InvalidInput(
                f"Two of the optimisers given as weight_decay train {twice!r}, and which decay is meant "
                "cannot be told; pass numbers by name of a parameter."
            )
        trained |= own
        if own:
            decay = WeightDecay.from_optimizer(optimizer, model).strength
            strengths |= decay if isinstance(decay, Mapping) else {}
    if not trained:
        return WeightDecay.from_optimizer(optimizers[0], model)  # says that it holds no parameter of the model
    return WeightDecay(strengths or 0.0)


def as_weight_decay(given: Any, model: nn.Module, prefix: str = "") -> WeightDecay:
    """A `WeightDecay` from a number, a mapping by parameter name, an optimiser or several, or a `WeightDecay`.

    Args:
        given: one of these.
        model: the model inside a wrapper.
        prefix: what the wrapper puts before the names of parameters; it may stand in a mapping.
    """
    if isinstance(given, WeightDecay) and prefix and isinstance(given.strength, Mapping):
        return replace(given, strength=_without_prefix(given.strength, prefix))
    if isinstance(given, WeightDecay):
        return given
    if isinstance(given, Mapping) and prefix:
        return WeightDecay(_without_prefix(given, prefix))
    if isinstance(given, torch.optim.Optimizer):
        return WeightDecay.from_optimizer(given, model)
    several = list(given) if isinstance(given, (list, tuple)) else []
    if several and all(isinstance(one, torch.optim.Optimizer) for one in several):
        return _from_optimizers(several, model)
    if given is None:
        return WeightDecay()
    if isinstance(given, (int, float, Mapping)):
        return WeightDecay(given)
    raise InvalidInput(
        f"weight_decay must be a number, an optimiser, a list of optimisers or WeightDecay(...), got "
        f"{type(given).__name__}."
    )


def _without_prefix(strengths: Mapping[str, float], prefix: str) -> dict[str, float]:
    return {name.removeprefix(prefix): value for name, value in strengths.items()}
