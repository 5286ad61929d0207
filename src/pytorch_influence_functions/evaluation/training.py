"""Training by the built-in recipe: one model alone, or many models stacked into one, with the same weights."""

from __future__ import annotations

import enum
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, TypeAlias, final

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.func import vmap

from ..core.batches import Collated, map_tensors, tensors_of
from ..core.errors import InfluenceError, InvalidInput, NonFinite
from ..core.warn import silence_torch
from ..gradients.vjp import as_function, grads
from ..objectives.base import AbstractObjective, tensor_targets, with_targets
from ..objectives.batch_loss import combine_losses
from ..problem.data import Source
from ..problem.random_state import same_rng
from .recipe import Recipe, draw_orders

# A stack of models is trained well up to so many parameters in all: larger stacks fall out of the cache.
_STACK_PARAMETERS = 6_000_000
_MAX_STACK = 64
# A model of more parameters keeps a core busy by itself.
_LARGE_MODEL = 500_000
# Optimisers that update each number from its own history alone.
_ELEMENTWISE = (
    torch.optim.SGD,
    torch.optim.Adam,
    torch.optim.AdamW,
    torch.optim.NAdam,
    torch.optim.RAdam,
    torch.optim.Adamax,
    torch.optim.RMSprop,
    torch.optim.Adagrad,
    torch.optim.Adadelta,
)
_RANDOM = (nn.modules.dropout._DropoutNd, nn.modules.batchnorm._BatchNorm, nn.RReLU, nn.modules.rnn.RNNBase)
_CONVOLUTIONS = (nn.modules.conv._ConvNd,)
RecordingHook: TypeAlias = Callable[[nn.Module, torch.optim.Optimizer, int], AbstractContextManager[Any]]
"""What a training of so many steps runs within."""
StepHook: TypeAlias = Callable[[], None]
"""Called before every step; an exception from it ends the training."""


@final
@dataclass(frozen=True, eq=False)
class Examples:
    """A whole dataset as one batch in memory."""

    batch: Any
    n: int
    drops_last: bool = False
    """Whether the loader that they come from leaves out a last batch that is not full."""

    @staticmethod
    def of(source: Source, model: nn.Module | None = None) -> Examples:
        """Read everything, in the precision of a model where the data leave it open.

        Raises:
            InvalidInput: examples that do not fit into one batch of tensors.
        """
        ids = torch.arange(len(source))
        _, batch = next(iter(source.load([ids])))
        source.check_finite(ids, batch)
        batch = batch if model is None else source.in_precision_of(batch, model)
        tensors = [t for _, t in tensors_of(batch)]
        if isinstance(batch, Collated) or not tensors or any(t.dim() == 0 or len(t) != len(ids) for t in tensors):
            raise InvalidInput(
                "The built-in recipe needs examples that batch into tensors with one row each; give retrain() your own "
                "training function instead."
            )
        return Examples(batch, len(ids), source.drops_last)

    def rows(self, ids: Int[Tensor, "*m"], targets: Tensor | None = None) -> Any:
        """Some examples; `targets` [N, ...] or [M, N, ...] replace the dataset's."""
        batch = map_tensors(self.batch, lambda t: t[ids])
        if targets is None:
            return batch
        return with_targets(batch, targets[ids] if ids.dim() == 1 else targets[torch.arange(len(ids))[:, None], ids])

    def targets(self, change: Mapping[int, Any]) -> Tensor | None:
        """All targets [N, ...] with some replaced; `None` if none is replaced."""
        if not change:
            return None
        targets = tensor_targets(self.batch).clone()
        for index, label in change.items():
            try:
                targets[index] = torch.as_tensor(label, dtype=targets.dtype)
            except (RuntimeError, TypeError, ValueError) as cause:
                raise InvalidInput(
                    f"Label {label!r} for training example {index} does not fit targets of shape "
                    f"{tuple(targets.shape[1:])} and {targets.dtype}; give one like the dataset's."
                ) from cause
        return targets


@final
@dataclass(frozen=True, eq=False)
class Job:
    """One model to train: the examples it keeps, the labels that change, and its seed."""

    kept: Bool[Tensor, " n"]
    change: Mapping[int, Any]
    seed: int


class LastBatch(enum.Enum):
    """What becomes of an epoch's last batch."""

    KEPT = enum.auto()
    JOINED = enum.auto()
    DROPPED = enum.auto()

    @staticmethod
    def of(
        recipe: Recipe, objective: AbstractObjective, data: Examples, job: Job, model: nn.Module | None = None
    ) -> LastBatch:
        """Kept, unless it is one example and the model's batch normalisation cannot be trained on one.

        Then it joins the batch before. Where the user's loader drops a last batch it is left out: so the user trained.

        Args:
            recipe: how the model is trained.
            objective: the training loss.
            data: all examples.
            job: which are kept.
            model: of the recipe, before its first step.

        Raises:
            InvalidInput: no batch has two examples.
        """
        count = len(job.kept) if recipe.hold_batches else int(job.kept.sum())
        size = recipe.batch_size or len(job.kept)
        if (min(count, size) != 1 and count % size != 1) or not _needs_two(recipe, objective, data, job.seed, model):
            return LastBatch.KEPT
        if count == 1:
            raise InvalidInput(
                "One example is left to train on, and the recipe's model has batch normalisation, which needs two in a "
                "batch; keep two or more."
            )
        if size == 1:
            raise InvalidInput(
                "The recipe's batch_size=1 gives batches of one example, and its model has batch normalisation, which "
                "needs two; take a larger batch_size."
            )
        return LastBatch.DROPPED if data.drops_last else LastBatch.JOINED

    def split(self, ids: Int[Tensor, " n"], size: int) -> list[Int[Tensor, " b"]]:
        """An epoch's examples in batches."""
        batches = list(torch.split(ids, size))
        if self is LastBatch.KEPT:
            return batches
        *full, last = batches
        return full if self is LastBatch.DROPPED else [*full[:-1], torch.cat([full[-1], last])]


def has_batch_norm(model: nn.Module) -> bool:
    """Whether a model normalises by the statistics of its batch in training."""
    return any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in model.modules())


def _needs_two(
    recipe: Recipe, objective: AbstractObjective, data: Examples, seed: int, model: nn.Module | None
) -> bool:
    """Whether the model fails in training on one example and not on two: of images it normalises over the pixels."""
    if data.n < 2 or not (model is None or has_batch_norm(model)):
        return False
    model = recipe.fresh(seed)

    def works(count: int) -> bool:
        batch = data.rows(torch.arange(count))
        try:
            objective.losses(objective.outputs(model, batch), batch)
        except (InfluenceError, RuntimeError, ValueError):
            return False
        return True

    with same_rng(), torch.no_grad():
        return has_batch_norm(model) and not works(1) and works(2)


def draw_batches(
    recipe: Recipe, job: Job, last: LastBatch = LastBatch.KEPT
) -> Iterator[tuple[Int[Tensor, " b"], Float[Tensor, " b"] | None]]:
    """Yield the indices of every step's examples, with their weights if the recipe holds batches."""
    n = len(job.kept)
    size = recipe.batch_size or n
    for ids in draw_orders(n, recipe.epochs, job.seed):
        if recipe.hold_batches:
            for batch in last.split(ids, size):
                yield batch, job.kept[batch].float()
        else:
            for batch in last.split(ids[job.kept[ids]], size):
                yield batch, None


def train_alone(
    recipe: Recipe,
    objective: AbstractObjective,
    data: Examples,
    job: Job,
    before_step: StepHook = lambda: None,
    recording: RecordingHook | None = None,
) -> nn.Module:
    """Train one model step by step, within what `recording` makes; it is returned in eval mode."""
    model = recipe.fresh(job.seed)
    trainable = [p for p in model.parameters() if p.requires_grad]
    optimizer = recipe.optimizer(trainable)
    targets, reduction = data.targets(job.change), recipe.batch_loss(objective)
    steps = list(draw_batches(recipe, job, LastBatch.of(recipe, objective, data, job, model)))
    scheduled = _ScheduledOptimizer(recipe, optimizer, len(steps))
    with nullcontext() if recording is None else recording(model, optimizer, len(steps)):
        for ids, weights in steps:
            before_step()
            batch = data.rows(ids, targets)

            def closure(batch: Any = batch, weights: Tensor | None = weights) -> Any:
                optimizer.zero_grad()
                with torch.enable_grad():
                    losses = objective.losses(objective.outputs(model, batch), batch)
                    loss = combine_losses(reduction, losses, batch, weights)
                    loss.backward()  # type: ignore[no-untyped-call]
                return loss.detach()

            scheduled.step(closure)
    return model.eval()


@dataclass(eq=False)
class _ScheduledOptimizer:
    """An optimiser whose learning rate follows the recipe's schedule."""

    recipe: Recipe
    optimizer: torch.optim.Optimizer
    steps: int
    done: int = 0

    def __post_init__(self) -> None:
        self.rates = [float(group["lr"]) for group in self.optimizer.param_groups]

    def step(self, closure: Callable[[], Any]) -> None:
        factor = self.recipe.schedule(self.done, self.steps)
        for group, rate in zip(self.optimizer.param_groups, self.rates, strict=True):
            group["lr"] = rate * factor
        self.optimizer.step(closure)
        self.done += 1


# ------------------------------------------------------------------------------------------ many at once


@final
@dataclass(frozen=True, eq=False)
class Stack:
    """Many models of one architecture: the first axis of every tensor runs over the models."""

    skeleton: nn.Module
    tensors: Mapping[str, Tensor]

    @staticmethod
    def of(models: Sequence[nn.Module]) -> Stack:
        """Stack the models' parameters and buffers."""
        states = [{**dict(m.named_parameters()), **dict(m.named_buffers())} for m in models]
        return Stack(models[0], {k: torch.stack([s[k].detach() for s in states]) for k in states[0]})

    def __len__(self) -> int:
        return len(next(iter(self.tensors.values())))

    def losses(self, objective: AbstractObjective, batch: Any, shared: bool = False) -> Float[Tensor, "m b"]:
        """Every model's losses, each on a batch of its own; with `shared`, all on the same batch."""

        def model_losses(tensors: dict[str, Tensor], own_batch: Any) -> Tensor:
            examples = batch if shared else own_batch
            return objective.losses(objective.outputs(as_function(self.skeleton, tensors), examples), examples)

        batches = torch.zeros(len(self)) if shared else batch
        with silence_torch():
            losses: Tensor = vmap(model_losses)(dict(self.tensors), batches)
        return losses


def train_together(
    recipe: Recipe,
    objective: AbstractObjective,
    data: Examples,
    jobs: Sequence[Job],
    before_step: StepHook = lambda: None,
) -> Stack:
    """Train several jobs whose batches have the same sizes as one stacked model, as `train_alone` trains each."""
    stack = Stack.of([recipe.fresh(job.seed) for job in jobs])
    trainable = [k for k, p in stack.skeleton.named_parameters() if p.requires_grad]
    for name in trainable:
        stack.tensors[name].requires_grad_()
    optimizer = recipe.optimizer([stack.tensors[k] for k in trainable])
    changed = [data.targets(job.change) for job in jobs]
    targets, reduction = None, recipe.batch_loss(objective)
    if any(t is not None for t in changed):
        unchanged = tensor_targets(data.batch)
        targets = torch.stack([unchanged if t is None else t for t in changed])
    steps = list(zip(*(draw_batches(recipe, job) for job in jobs), strict=True))
    scheduled = _ScheduledOptimizer(recipe, optimizer, len(steps))
    for members in steps:
        before_step()
        batch = data.rows(torch.stack([ids for ids, _ in members]), targets)
        weights = None if members[0][1] is None else torch.stack([w for _, w in members if w is not None])

        def closure(batch: Any = batch, weights: Tensor | None = weights) -> Any:
            optimizer.zero_grad()
            with torch.enable_grad():
                losses = stack.losses(objective, batch)
                total = combine_losses(reduction, losses, batch, weights).sum()
                total.backward()  # type: ignore[no-untyped-call]
            return total.detach()

        scheduled.step(closure)
    stack.skeleton.eval()
    return Stack(stack.skeleton, {k: v.detach() for k, v in stack.tensors.items()})


@final
@dataclass(frozen=True)
class TrainingMode:
    """How many models are stacked and trained as one (1: one by one), the reason, and whether training draws at random.

    A rule decides, so that the same request is carried out alike in every run; a stack's losses and gradients are then
    compared with those of single models.
    """

    stack_size: int
    description: str
    draws: bool = False

    @staticmethod
    def of(recipe: Recipe, objective: AbstractObjective, data: Examples, seed: int) -> TrainingMode:
        """The mode for this model, optimiser and data."""
        model = recipe.fresh(seed)
        size = sum(p.numel() for p in model.parameters())
        modules = list(model.modules())
        random = next((type(m).__name__ for m in modules if isinstance(m, _RANDOM) and getattr(m, "p", 1.0) != 0), None)
        if random is not None:
            return TrainingMode(1, f"one by one: {random} depends on the random state or on the rest of a batch", True)
        if not isinstance(recipe.optimizer([p for p in model.parameters() if p.requires_grad]), _ELEMENTWISE):
            return TrainingMode(1, "one by one: its optimiser looks at several numbers at once")
        if size > _LARGE_MODEL or any(isinstance(m, _CONVOLUTIONS) for m in modules):
            return TrainingMode(1, "one by one: such a model keeps a core busy by itself")
        if not _stack_agrees(recipe, objective, data, seed):
            return TrainingMode(1, "one by one: trained together, this model came out differently")
        most = int(min(_MAX_STACK, max(2, _STACK_PARAMETERS // size)))
        return TrainingMode(most, f"up to {most} at a time, as one stacked model")


def _stack_agrees(recipe: Recipe, objective: AbstractObjective, data: Examples, seed: int) -> bool:
    """Whether two models have the same losses and gradients in a stack as apart."""
    models = [recipe.fresh(seed), recipe.fresh(seed + 1)]
    probe = torch.arange(min(8, data.n))
    stack = Stack.of(models)
    names = [k for k, p in models[0].named_parameters() if p.requires_grad]
    for name in names:
        stack.tensors[name].requires_grad_()
    batch = data.rows(probe)
    try:
        losses = stack.losses(objective, data.rows(torch.stack([probe, probe])))
        stacked_gradients = grads(losses.sum(), [stack.tensors[k] for k in names])
    except (RuntimeError, InvalidInput):
        return False  # a fault of the model itself shows again where it is trained alone
    for row, model in enumerate(models):
        each = objective.losses(objective.outputs(model, batch), batch)
        gradients = grads(each.sum(), [dict(model.named_parameters())[k] for k in names])
        pairs = [(each, losses[row])]
        paired_gradients = zip(gradients, stacked_gradients, strict=True)
        pairs += [(a, b[row]) for a, b in paired_gradients if a is not None and b is not None]
        tolerance = 1e-8 if each.dtype == torch.float64 else 1e-4
        gaps = [(float((a - b).detach().abs().max()), float(a.detach().abs().max())) for a, b in pairs]
        if not all(gap <= tolerance * size for gap, size in gaps):  # NaN is no agreement
            return False
    return True


@torch.no_grad()
def measure_queries(
    model: nn.Module | Stack, objective: AbstractObjective, queries: Source, seeds: Sequence[int]
) -> Float[Tensor, "m q"]:
    """The measure of every query under every model, [M, Q]; a single model has M = 1.

    Raises:
        NonFinite: a model's measurement is NaN or infinite; its seed is named.
    """
    blocks: list[Tensor] = []
    for ids, batch in queries.batches():
        queries.check_finite(ids, batch)
        batch = queries.in_precision_of(batch, model.skeleton if isinstance(model, Stack) else model)
        if isinstance(model, Stack):
            blocks.append(model.losses(objective, batch, shared=True))
        else:
            outputs = objective.outputs(model, batch)
            objective.check(outputs, batch, ids)
            blocks.append(objective.losses(outputs, batch)[None])
    values = torch.cat(blocks, 1)
    bad = (~torch.isfinite(values)).any(1).nonzero().flatten().tolist()
    if bad:
        raise NonFinite(
            f"A model retrained with seed {seeds[bad[0]]} measures NaN or infinity, so its training diverged; "
            "lower the learning rate of the recipe."
        )
    return values
