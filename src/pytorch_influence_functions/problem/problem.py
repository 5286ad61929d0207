"""Problem: the trained thing, a frozen record; and `sweep`, the only loop over data."""

from __future__ import annotations

from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, fields
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from ..core.batches import map_tensors, tensors_of, to_device
from ..core.cut_up import cut_modules, free_gathered, own_part
from ..core.distributed import World, current
from ..core.errors import InvalidInput, NonFinite, TrainingDataWarning, nearest
from ..core.notebook import html_table
from ..core.progress import track
from ..core.warn import warn_caller
from ..linalg.space import Selection, Space
from ..objectives.base import AbstractObjective
from ..objectives.convert import as_objective, divides_by_class_weights
from .checkpoints import Checkpoint, as_checkpoints
from .data import IdsLike, Source, check_policy
from .labels import Labels
from .model_and_loss import ModelAndLoss, join_loss
from .model_state import derivative_safe, preserved
from .offloaded import brought_in, refuse_offloaded
from .weight_decay import WeightDecay, as_weight_decay
from .wrappers import refuse_sharded, require_company, unwrap

# --------------------------------------------------------------------------- problem


@dataclass(frozen=True, eq=False, init=False)
class Problem:
    """A model, the loss it was trained with, and what it was trained on. Making one computes nothing.

    Args:
        model: the trained model; it is never changed.
        objective: an objective, a `torch.nn` loss, or `callable(outputs, targets)`. The trainable weights of a loss
            module take part as parameters under `loss.`.
        data: what `Source.of` takes: dataset, loader, tensors or arrays.
        parameters: which parameters take part, see `Space.of`; `None`: all that are trainable.
        weight_decay: a number, numbers by name or glob, the optimiser (or optimisers) that trained the model, or
            `WeightDecay(...)`.
        checkpoints: state dicts, or paths of `.safetensors` or torch files, loaded when they are used.
        batch_size: the most examples per batch; `None`: what suits an example's size, see `Source.suited_to`.
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
        weight_decay: float
        | Mapping[str, float]
        | torch.optim.Optimizer
        | Sequence[torch.optim.Optimizer]
        | WeightDecay = 0.0,
        checkpoints: Sequence[Checkpoint] | Checkpoint = (),
        batch_size: int | None = None,
        deterministic: str = "warn",
        device: torch.device | str | None = None,
    ) -> None:
        check_model(model)
        model, prefix = unwrap(model)
        check_policy(deterministic)
        source = Source.of(data, batch_size)
        loss = objective
        model, objective = join_loss(model, as_objective(objective))
        decay = as_weight_decay(weight_decay, model, prefix)
        if not decay.is_zero and divides_by_class_weights(loss):
            warn_caller(
                "A loss with class weights divides by the total class weight of a batch, and here losses "
                "are averaged over the examples, beside which weight_decay= is too small or too large: give it times "
                "weight[labels].mean() of the training labels, with loss=ptif.CrossEntropy(weight=...).",
                TrainingDataWarning,
            )
        # An iterator of parameters would be used up by the first look at it.
        chosen = _without_prefix(tuple(parameters) if isinstance(parameters, Iterator) else parameters, prefix)
        values = {
            "model": model,
            "objective": objective,
            "data": source,
            "parameters": chosen,
            "weight_decay": decay,
            "checkpoints": as_checkpoints(checkpoints),
            "batch_size": source.batch_size,
            "deterministic": deterministic,
            "device": model_device(model, device),
        }
        for name, value in values.items():
            object.__setattr__(self, name, value)
        if brought_in(model):
            refuse_offloaded(model, self.space.names)

    def __len__(self) -> int:
        return len(self.data)

    def __repr__(self) -> str:
        decay = "" if self.weight_decay.is_zero else f", weight_decay={self.weight_decay.strength}"
        return f"Problem({type(self.model).__name__}, {self.objective!r}, {len(self)} examples{decay})"

    def _repr_html_(self) -> str:
        rows = [("model", type(self.model).__name__), ("loss", repr(self.objective))]
        rows += [("training examples", f"{len(self):,}"), ("batch size", str(self.batch_size))]
        rows += [] if self.parameters is None else [("parameters", "a selection")]
        rows += [] if self.weight_decay.is_zero else [("weight decay", repr(self.weight_decay.strength))]
        rows += [("checkpoints", str(len(self.checkpoints)))] if self.checkpoints else []
        return html_table([*rows, ("device", str(self.device))], title="Problem")

    @cached_property
    def space(self) -> Space:
        """The layout of the chosen parameters; worked out at first use."""
        return Space.of(self.model, self.parameters, self.weight_decay.strength)

    @cached_property
    def is_cut_up(self) -> bool:
        """Whether `fully_shard` has cut the model up, so that every pass is one of all processes."""
        return bool(cut_modules(self.model))

    @cached_property
    def labels(self) -> Labels:
        """The labels of the training examples that passes over them have seen so far."""
        return Labels(len(self))

    def describe_objective(self) -> str:
        """The training loss, and whether weights of its own take part."""
        if not isinstance(self.model, ModelAndLoss):
            return repr(self.objective)
        parts = []
        for taken, verb in ((True, "take part"), (False, "are left out")):
            names = [n for n in self.model.weights if (f"{self.model.prefix}{n}" in self.space.names) == taken]
            if names:
                shown = [f"'{self.model.prefix}{name}'" for name in names[:3]] + ["..."] * (len(names) > 3)
                parts.append(f"its weights {', '.join(shown)} {verb}")
        return f"{self.objective!r}, {' and '.join(parts)}"

    def with_(self, **changes: Any) -> Problem:
        """A copy with some arguments replaced.

        Args:
            changes: arguments of `Problem` by name, with their new values.

        Raises:
            InvalidInput: an argument that `Problem` does not have.
        """
        known = [f.name for f in fields(self)]
        for name in changes:
            if name not in known:
                raise InvalidInput(f"Problem has no argument {name!r}.{nearest(name, known)}")
        arguments = {name: getattr(self, name) for name in known}
        if not self.data.fixed:
            arguments["batch_size"] = None  # nobody asked for one: it follows the data
        if "model" in changes:
            arguments["device"] = None
        return Problem(**(arguments | changes))


def check_model(model: Any) -> None:
    """Refuse anything but a module.

    Raises:
        InvalidInput: something else was given.
    """
    if not isinstance(model, nn.Module):
        what = f"the class {model.__name__}" if isinstance(model, type) else type(model).__name__
        # skorch and other wrappers in the manner of scikit-learn hold the module they trained under this name.
        inside = isinstance(getattr(model, "module_", None), nn.Module)
        itself = "pass the trained module itself, the model before the data"
        advice = "the module that it trained is its .module_" if inside else itself
        raise InvalidInput(f"The model must be a torch.nn.Module, got {what}; {advice}.")
    free_gathered(cut_modules(model))
    refuse_sharded(model)
    if isinstance(model, torch.jit.ScriptModule):
        raise InvalidInput(
            "The model is a TorchScript module, whose layers cannot be looked into; pass the Python module it was "
            "made from, with the weights of scripted.state_dict()."
        )


def _without_prefix(selection: Selection, prefix: str) -> Selection:
    """The selection by the names of the model inside, where it was given by those of the wrapper."""
    if not prefix or callable(selection):
        return selection
    if isinstance(selection, str):
        return selection.removeprefix(prefix)
    if selection is None or isinstance(selection, nn.Module):
        return selection
    return tuple(s.removeprefix(prefix) if isinstance(s, str) else s for s in selection)


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
    devices: dict[torch.device, str] = {}
    offloaded = brought_in(model)
    for name, parameter in model.named_parameters():
        if name not in offloaded:
            devices.setdefault(parameter.device, name)
    if not devices:
        refuse_offloaded(model, offloaded)
    if len(devices) > 1:
        where = ", ".join(f"{name!r} on {device}" for device, name in devices.items())
        raise InvalidInput(f"The model's parameters lie on several devices ({where}); move it to one with .to().")
    requested = None if asked is None else _device(asked)
    if not devices:
        return requested or torch.device("cpu")
    device = next(iter(devices))
    if device.type == "meta":
        raise InvalidInput("The model lies on the meta device and has no values; load its weights first.")
    if requested is not None and (requested.type != device.type or requested.index not in (None, device.index)):
        raise InvalidInput(f"The model lies on {device}, not on {requested}; call model.to({str(requested)!r}) first.")
    return device


# --------------------------------------------------------------------------- the only loop over data


def check_weights(model: nn.Module) -> None:
    """Refuse weights that are not finite.

    Raises:
        NonFinite: names the parameters or buffers that hold NaN or infinity.
        InvalidInput: a parameter has no values yet, and no hook brings them in; or the processes that a model is cut up
            over are not all here.
    """
    require_company(model)
    offloaded = brought_in(model)
    for name, weight in model.named_parameters():
        if is_lazy(weight):
            raise InvalidInput(
                f"Parameter {name!r} is not initialised yet (a lazy module); run the model once on a batch first."
            )
        if weight.is_meta and name not in offloaded:
            raise InvalidInput(
                f"Parameter {name!r} lies on the meta device, which holds no values; load the model's weights first."
            )
    bad, parameters = [], {name for name, _ in model.named_parameters()}
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if tensor.is_meta:
            continue
        tensor = own_part(tensor)
        # The sum is one cheap pass; a sum that is not finite may also be an overflow, hence the second check.
        if tensor.is_floating_point() and not torch.isfinite(tensor.detach().sum()):
            parameter = name in parameters
            # A buffer may hold -inf, as masks do, but never NaN.
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
) -> Generator[tuple[Tensor, Any], None, None]:
    """Visit examples batch by batch in dataset order, the model in eval mode; the only loop over data.

    Args:
        problem: whose model is used, and whose data unless `source` is given.
        source: other data, e.g. queries.
        ids: dataset indices to visit, in this order; `None`: all of them.
        label: what the progress bar says.
        world: whose share to visit; `None`: this process's under `distributed()`, else everything.

    Yields:
        `(ids, batch)`: a LongTensor of dataset indices on the CPU, and the collated batch on the device.

    Raises:
        NonFinite: weights, or floating point values of an example, are NaN or infinite (names, indices).
        InvalidInput: an example cannot be read, or reads differently twice under `deterministic="error"`.
    """
    source = problem.data if source is None else source
    # The same data in batches of another size are the training data still.
    source_is_training = source.dataset is problem.data.dataset
    world = current() if world is None else world
    # By index and not by batch: batches may be as wide as the data, and every process has its part of them.
    chosen = source.indices(ids)
    plan = source.plan(chosen[world.share(len(chosen))])
    plan = in_step(plan, world) if problem.is_cut_up else plan
    check_weights(problem.model)
    if problem.is_cut_up:
        current().meet(f"a sweep of {len(plan)} batches")
    with ExitStack() as stack:
        stack.enter_context(preserved(problem.model, problem.space.names))
        stack.enter_context(derivative_safe(problem.model))
        source.check_deterministic(problem.deterministic)
        batches = track(source.load(plan), sum(map(len, plan)), label, lambda pair: len(pair[0]), "ex")
        for batch_ids, batch in batches:
            source.check_finite(batch_ids, batch)
            if source_is_training:
                problem.labels.add(batch_ids, batch)
            batch = source.in_precision_of(to_device(batch, problem.device), problem.model)
            if problem.is_cut_up:
                current().meet("a pass over a batch")
            yield batch_ids, _differentiable(batch)


def in_step(plan: list[Tensor], world: World) -> list[Tensor]:
    """The same examples in as many batches as every other process has: each pass is one of all of them.

    Args:
        plan: the indices of each batch of this process.
        world: the processes.

    Raises:
        InvalidInput: a process has fewer examples than that.

    Example:
        >>> [part.tolist() for part in in_step([torch.arange(5)], World())]
        [[0, 1, 2, 3, 4]]
    """
    if world.size == 1:
        return plan
    examples = torch.cat([*plan, torch.arange(0)])
    most = int(world.all_max(torch.tensor([len(plan)])))
    fewest = -int(world.all_max(torch.tensor([-len(examples)])))
    if fewest < most:
        raise InvalidInput(
            f"A process has {fewest} of the examples and another {most} batches, and the passes of a model that "
            "fully_shard has cut up are made together; give batches of at least 2 examples (batch_size=), and at least "
            f"one example for each of the {world.size} processes."
        )
    return plan if len(plan) == most else list(torch.tensor_split(examples, most))


def _differentiable(batch: Any) -> Any:
    """The batch, with copies of tensors that were made in inference mode: autograd cannot keep those."""
    if not any(tensor.is_inference() for _, tensor in tensors_of(batch)):
        return batch
    return map_tensors(batch, lambda tensor: tensor.clone() if tensor.is_inference() else tensor)


@contextmanager
def first_batch(
    problem: Problem, source: Source | None = None, ids: IdsLike = None, label: str = ""
) -> Iterator[tuple[Tensor, Any]]:
    """Give the first batch of a sweep, and keep the model in eval mode until the block ends.

    `next(iter(sweep(...)))` ends the sweep at once, so a forward pass after it would run in the caller's mode: in
    training mode it would move the running statistics of batch normalisation.

    Raises: as `sweep`.

    Example:
        >>> problem = Problem(nn.Linear(3, 2), nn.CrossEntropyLoss(), (torch.zeros(5, 3), torch.arange(5) % 2))
        >>> with first_batch(problem, ids=[3, 4]) as (ids, _):
        ...     ids.tolist(), problem.model.training
        ([3, 4], False)
    """
    with closing(sweep(problem, source, ids, label, World())) as batches:
        yield next(batches)
