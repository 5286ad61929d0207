"""Problem: the trained thing, a frozen record; and `sweep`, the only loop over data."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, fields
from functools import cached_property
from os import PathLike, fspath
from typing import Any, TypeAlias

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from .data import IdsLike, Source, check_policy, to_device
from .errors import InvalidInput, NonFinite, nearest
from .guard import derivative_safe, undisturbed
from .objectives import AbstractObjective, as_objective
from .progress import track
from .space import Selection, Space
from .world import World, current

Checkpoint: TypeAlias = Mapping[str, Tensor] | str | PathLike[str]

# --------------------------------------------------------------------------- weight decay

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
        strength: one number, or one per parameter name (absent names: 0).
        per_example: False: the term is fixed, removing an example leaves it whole, so it only adds to the
            curvature. True: every example carries it (a mean over examples of loss + term is trained), so
            its slope strength·θ is also part of each example's gradient.
    """

    strength: float | Mapping[str, float] = 0.0
    per_example: bool = False

    def __post_init__(self) -> None:
        found: Any = self.strength
        named: dict[str, Any] = dict(found) if isinstance(found, Mapping) else {"": found}
        for name, value in named.items():
            if not isinstance(value, (int, float)) or not math.isfinite(value) or value < 0:
                where = f" for {name!r}" if name else ""
                raise InvalidInput(f"Weight decay must be a finite number of at least 0, got {value!r}{where}.")

    def __hash__(self) -> int:
        found = self.strength
        return hash((tuple(sorted(found.items())) if isinstance(found, Mapping) else found, self.per_example))

    @property
    def is_zero(self) -> bool:
        """Whether there is no decay at all."""
        values = self.strength.values() if isinstance(self.strength, Mapping) else [self.strength]
        return not any(values)

    @classmethod
    def from_optimizer(cls, optimizer: torch.optim.Optimizer, model: nn.Module) -> WeightDecay:
        """Read the decay of each parameter from the optimiser's groups.

        Raises:
            InvalidInput: the decay is decoupled (AdamW) or of a kind that is not known to be an L2 term, or
                the optimiser trains no parameter of this model.
        """
        name_of = {id(p): name for name, p in model.named_parameters()}
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


def as_weight_decay(given: Any, model: nn.Module) -> WeightDecay:
    """A `WeightDecay` from a number, a mapping by parameter name, an optimiser, or a `WeightDecay`."""
    if isinstance(given, WeightDecay):
        return given
    if isinstance(given, torch.optim.Optimizer):
        return WeightDecay.from_optimizer(given, model)
    if given is None:
        return WeightDecay()
    if isinstance(given, (int, float, Mapping)):
        return WeightDecay(given)
    raise InvalidInput(f"weight_decay must be a number, an optimiser or WeightDecay(...), got {type(given).__name__}.")


# --------------------------------------------------------------------------- problem


@dataclass(frozen=True, eq=False, init=False)
class Problem:
    """A model, the loss it was trained with, and what it was trained on. Making one computes nothing.

    Args:
        model: the trained model; it is never changed.
        objective: an objective, a `torch.nn` loss, or `callable(outputs, targets)`.
        data: what `Source.of` takes: dataset, loader, tensors or arrays.
        parameters: which parameters take part, see `Space.of`; `None`: all that are trainable.
        weight_decay: a number, the optimiser that trained the model, or `WeightDecay(...)`.
        checkpoints: state dicts, or paths of `.safetensors` or torch files, loaded when they are used.
        batch_size: examples per batch; `None`: the loader's, else 64.
        deterministic: what to do when reading an example twice gives different values:
            `"warn"`, `"error"` or `"ignore"`.
        device: where to compute; `None`: where the model is.

    Raises:
        InvalidInput: a setting cannot be used as it is; the message says what to do.

    Example:
        >>> data = (torch.zeros(5, 3), torch.zeros(5, dtype=torch.long))
        >>> problem = Problem(nn.Linear(3, 2), nn.CrossEntropyLoss(), data, weight_decay=1e-3)
        >>> len(problem), problem.space.size
        (5, 8)
    """

    model: nn.Module
    objective: AbstractObjective
    data: Source
    parameters: Selection
    weight_decay: WeightDecay
    checkpoints: tuple[Checkpoint, ...]
    batch_size: int
    deterministic: str
    device: torch.device

    def __init__(
        self,
        model: nn.Module,
        objective: Any,
        data: Any,
        parameters: Selection = None,
        weight_decay: float | Mapping[str, float] | torch.optim.Optimizer | WeightDecay = 0.0,
        checkpoints: Sequence[Checkpoint] | Checkpoint = (),
        batch_size: int | None = None,
        deterministic: str = "warn",
        device: torch.device | str | None = None,
    ) -> None:
        check_model(model)
        check_policy(deterministic)
        source = Source.of(data, batch_size)
        # An iterator of parameters would be used up by the first look at it.
        chosen = tuple(parameters) if isinstance(parameters, Iterator) else parameters
        values = {
            "model": model,
            "objective": as_objective(objective),
            "data": source,
            "parameters": chosen,
            "weight_decay": as_weight_decay(weight_decay, model),
            "checkpoints": _checkpoints(checkpoints),
            "batch_size": source.batch_size,
            "deterministic": deterministic,
            "device": model_device(model, device),
        }
        for name, value in values.items():
            object.__setattr__(self, name, value)

    def __len__(self) -> int:
        return len(self.data)

    def __repr__(self) -> str:
        decay = "" if self.weight_decay.is_zero else f", weight_decay={self.weight_decay.strength}"
        return f"Problem({type(self.model).__name__}, {self.objective!r}, {len(self)} examples{decay})"

    @cached_property
    def space(self) -> Space:
        """The layout of the chosen parameters; worked out at first use."""
        return Space.of(self.model, self.parameters, self.weight_decay.strength)

    def with_(self, **changes: Any) -> Problem:
        """A copy with some arguments replaced.

        Raises:
            InvalidInput: an argument that `Problem` does not have.
        """
        known = [f.name for f in fields(self)]
        for name in changes:
            if name not in known:
                raise InvalidInput(f"Problem has no argument {name!r}.{nearest(name, known)}")
        kept = {name: getattr(self, name) for name in known}
        if "model" in changes:
            kept["device"] = None
        return Problem(**(kept | changes))


def check_model(model: Any) -> None:
    """Refuse what is no module.

    Raises:
        InvalidInput: something else was given.
    """
    if not isinstance(model, nn.Module):
        what = f"the class {model.__name__}" if isinstance(model, type) else type(model).__name__
        raise InvalidInput(
            f"The model must be a torch.nn.Module, got {what}; pass the trained module itself, the model before "
            "the data."
        )


def _device(asked: Any) -> torch.device:
    try:
        return torch.device(asked)
    except (RuntimeError, TypeError) as cause:
        raise InvalidInput(
            f"device={asked!r} is no device; write 'cpu', 'cuda' or 'cuda:0', or leave it out to compute where "
            "the model is."
        ) from cause


def model_device(model: nn.Module, asked: torch.device | str | None = None) -> torch.device:
    """The one device of a model.

    Raises:
        InvalidInput: parameters lie on several devices or on `meta`, or not where was asked for.
    """
    found: dict[torch.device, str] = {}
    for name, parameter in model.named_parameters():
        found.setdefault(parameter.device, name)
    if len(found) > 1:
        where = ", ".join(f"{name!r} on {device}" for device, name in found.items())
        raise InvalidInput(f"The model's parameters lie on several devices ({where}); move it to one with .to().")
    wanted = None if asked is None else _device(asked)
    if not found:
        return wanted or torch.device("cpu")
    device = next(iter(found))
    if device.type == "meta":
        raise InvalidInput("The model lies on the meta device and has no values; load its weights first.")
    if wanted is not None and (wanted.type != device.type or wanted.index not in (None, device.index)):
        raise InvalidInput(f"The model lies on {device}, not on {wanted}; call model.to({str(wanted)!r}) first.")
    return device


# --------------------------------------------------------------------------- checkpoints

_WRAPPED = ("state_dict", "model_state_dict", "model")


def _checkpoints(given: Sequence[Checkpoint] | Checkpoint) -> tuple[Checkpoint, ...]:
    if isinstance(given, (str, PathLike, Mapping)):
        return (given,)
    found: Any = given
    several: list[Any] = [found] if isinstance(found, nn.Module) or not isinstance(found, Iterable) else list(found)
    odd = next((one for one in several if not isinstance(one, (str, PathLike, Mapping))), None)
    if odd is not None:
        hint = "pass model.state_dict()" if isinstance(odd, nn.Module) else "pass a list of them, or () for none"
        raise InvalidInput(
            f"checkpoints= takes state dicts (tensors by name) or paths, not {type(odd).__name__}; {hint}."
        )
    return tuple(several)


def load_checkpoint(checkpoint: Checkpoint, model: nn.Module | None = None) -> dict[str, Tensor]:
    """The tensors of a checkpoint by name, on the CPU if read from a file (never by unpickling code).

    Args:
        checkpoint: a state dict, or the path of a `.safetensors` or torch file; a dictionary that keeps the
            state dict under "state_dict", "model_state_dict" or "model" is opened.
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
            if path.endswith(".safetensors"):
                state = load_file(path)
            else:
                state = torch.load(path, map_location="cpu", weights_only=True)
        except Exception as cause:
            reason = str(cause).strip().splitlines()[:1] or [type(cause).__name__]
            raise InvalidInput(
                f"{what} cannot be read ({reason[0]}); expected a .safetensors file or a state dict "
                "saved with torch.save(model.state_dict(), path)."
            ) from cause
    for key in _WRAPPED:
        if isinstance(state, Mapping) and isinstance(state.get(key), Mapping):
            state = state[key]
    if not isinstance(state, Mapping) or not all(isinstance(v, Tensor) for v in state.values()):
        raise InvalidInput(f"{what} is no state dict (tensors by name) but {type(state).__name__}.")
    if model is not None:
        _check_fits(what, state, model)
    return dict(state)


def _check_fits(what: str, state: Mapping[str, Tensor], model: nn.Module) -> None:
    own = _tensors(model, persistent_only=True)
    unexpected = [name for name in state if name not in own]
    if unexpected:
        hint = nearest(unexpected[0], own)
        raise InvalidInput(f"{what} holds {unexpected[0]!r}, which the model does not have.{hint}")
    # A file may keep a shared tensor under one of its names only.
    given = {id(own[name]) for name in state}
    missing = [name for name, tensor in own.items() if id(tensor) not in given]
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise InvalidInput(f"{what} lacks {missing[0]!r}{more}, which the model has.{nearest(missing[0], state)}")
    for name, tensor in state.items():
        if tensor.shape != own[name].shape:
            raise InvalidInput(
                f"{what} has shape {list(tensor.shape)} for {name!r}, the model {list(own[name].shape)}; "
                "give a checkpoint of this very model."
            )


def _tensors(model: nn.Module, persistent_only: bool = False) -> dict[str, Tensor]:
    """Parameters and buffers by every name they have."""
    found: dict[str, Tensor] = dict(model.named_parameters(remove_duplicate=False))
    for prefix, module in model.named_modules(remove_duplicate=False):
        for name, buffer in module._buffers.items():
            if buffer is None or (persistent_only and name in module._non_persistent_buffers_set):
                continue
            found[f"{prefix}.{name}" if prefix else name] = buffer
    return found


@contextmanager
def at_checkpoint(model: nn.Module, checkpoint: Checkpoint) -> Iterator[None]:
    """Give the model a checkpoint's weights and buffers for a while, then its own back, to the bit.

    Raises:
        InvalidInput: as `load_checkpoint`, before anything is changed.
    """
    state = load_checkpoint(checkpoint, model)
    own = _tensors(model)
    before = {id(tensor): (tensor, tensor.detach().clone()) for tensor in own.values()}
    try:
        with torch.no_grad():
            for name, value in state.items():
                own[name].copy_(value)
        yield
    finally:
        with torch.no_grad():
            for tensor, value in before.values():
                tensor.copy_(value)


# --------------------------------------------------------------------------- the only loop over data


def check_weights(model: nn.Module) -> None:
    """Refuse weights that are not finite.

    Raises:
        NonFinite: names the parameters or buffers that hold NaN or infinity.
        InvalidInput: a parameter has no values yet.
    """
    for name, weight in model.named_parameters():
        if is_lazy(weight):
            raise InvalidInput(
                f"Parameter {name!r} is not initialised yet (a lazy module); run the model once on a batch first."
            )
    bad = []
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        # The sum is one cheap pass; only if it is not finite (which overflow can also cause) look closer.
        if tensor.is_floating_point() and not torch.isfinite(tensor.detach().sum()):
            parameter = isinstance(tensor, nn.Parameter)
            # A mask of -inf is a fair buffer; NaN never is.
            wrong = ~torch.isfinite(tensor) if parameter else torch.isnan(tensor)
            if wrong.any():
                bad.append(name)
    if bad:
        more = f" and {len(bad) - 4} more" if len(bad) > 4 else ""
        raise NonFinite(
            f"The model's weights hold NaN or infinity in {', '.join(map(repr, bad[:4]))}{more}; "
            "the training diverged, load finite weights."
        )


def sweep(
    problem: Problem,
    source: Source | None = None,
    ids: IdsLike = None,
    label: str = "",
    world: World | None = None,
) -> Iterator[tuple[Tensor, Any]]:
    """Visit examples batch by batch in dataset order, the model in eval mode; the only loop over data.

    Args:
        problem: whose model is used, and whose data unless `source` is given.
        source: other data, e.g. queries.
        ids: dataset indices to visit, in this order; `None`: all of them.
        label: what the progress bar says.
        world: whose share to visit; `None`: the running process group's, else everything.

    Yields:
        `(ids, batch)`: a LongTensor of dataset indices on the CPU, and the collated batch on the device.

    Raises:
        NonFinite: weights, or floating point values of an example, are NaN or infinite (names, indices).
        InvalidInput: an example cannot be read, or reads differently twice under `deterministic="error"`.
    """
    source = problem.data if source is None else source
    world = current() if world is None else world
    plan = world.shard(source.plan(ids))
    check_weights(problem.model)
    with ExitStack() as stack:
        stack.enter_context(undisturbed(problem.model, problem.space.names))
        stack.enter_context(derivative_safe(problem.model))
        source.check_deterministic(problem.deterministic)
        batches = track(source.load(plan), sum(map(len, plan)), label, lambda pair: len(pair[0]), "ex")
        for batch_ids, batch in batches:
            source.check_finite(batch_ids, batch)
            yield batch_ids, to_device(batch, problem.device)
