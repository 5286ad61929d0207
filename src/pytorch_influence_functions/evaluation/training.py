"""Training by the built-in recipe: one model, or many models as one, to the same weights."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias, final

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.func import vmap

from ..core.batches import map_tensors, tensors_of
from ..core.errors import InvalidInput, NonFinite
from ..gradients.vjp import at, grads, quiet
from ..objectives.base import AbstractObjective, tensor_targets, with_targets
from ..problem.data import Source
from .recipe import Recipe

# Numbers of all parameters together that one step still handles well: above, they fall out of the cache.
_TOGETHER = 6_000_000
_MOST = 64
# A model this large keeps a core busy by itself.
_LARGE = 500_000
# Optimisers whose update of a number looks at that number's own history only.
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
Stop: TypeAlias = Callable[[], None]
"""Called before every step; raises when training is to be given up."""


@final
@dataclass(frozen=True, eq=False)
class Examples:
    """A whole dataset as one batch in memory."""

    batch: Any
    n: int

    @staticmethod
    def of(source: Source) -> Examples:
        """Read everything.

        Raises:
            InvalidInput: examples that do not fit into one batch of tensors.
        """
        ids = torch.arange(len(source))
        _, batch = next(iter(source.load([ids])))
        source.check_finite(ids, batch)
        moving = [t for _, t in tensors_of(batch)]
        if not moving or any(t.dim() == 0 or len(t) != len(ids) for t in moving):
            raise InvalidInput(
                "The built-in recipe needs examples that batch into tensors with one row each; give retrain() your own "
                "training function instead."
            )
        return Examples(batch, len(ids))

    def rows(self, ids: Int[Tensor, "*m"], targets: Tensor | None = None) -> Any:
        """Some examples; `targets` [N, ...] or [M, N, ...] replace the dataset's."""
        found = map_tensors(self.batch, lambda t: t[ids])
        if targets is None:
            return found
        return with_targets(found, targets[ids] if ids.dim() == 1 else targets[torch.arange(len(ids))[:, None], ids])

    def targets(self, change: Mapping[int, Any]) -> Tensor | None:
        """All targets [N, ...] with some replaced, `None` where none is."""
        if not change:
            return None
        found = tensor_targets(self.batch).clone()
        for index, label in change.items():
            try:
                found[index] = torch.as_tensor(label, dtype=found.dtype)
            except (RuntimeError, TypeError, ValueError) as cause:
                raise InvalidInput(
                    f"Label {label!r} for training example {index} does not fit targets of shape "
                    f"{tuple(found.shape[1:])} and {found.dtype}; give one like the dataset's."
                ) from cause
        return found


@final
@dataclass(frozen=True, eq=False)
class Job:
    """One model to train: what it keeps, which labels change, and its seed."""

    kept: Bool[Tensor, " n"]
    change: Mapping[int, Any]
    seed: int


def plan(recipe: Recipe, job: Job) -> Iterator[tuple[Int[Tensor, " b"], Float[Tensor, " b"] | None]]:
    """The examples of every step, with their weights where batches are held."""
    order = torch.Generator().manual_seed(job.seed)
    n = len(job.kept)
    size = recipe.batch_size or n
    for _ in range(recipe.epochs):
        ids = torch.randperm(n, generator=order)
        if recipe.hold_batches:
            for batch in torch.split(ids, size):
                yield batch, job.kept[batch].float()
        else:
            for batch in torch.split(ids[job.kept[ids]], size):
                yield batch, None


def train(
    recipe: Recipe, objective: AbstractObjective, data: Examples, job: Job, stop: Stop = lambda: None
) -> nn.Module:
    """One model, trained step by step; it comes back in eval mode."""
    model = recipe.fresh(job.seed)
    moving = [p for p in model.parameters() if p.requires_grad]
    optimizer = recipe.optimizer(moving)
    targets = data.targets(job.change)
    steps = list(plan(recipe, job))
    pace = _Pace(recipe, optimizer, len(steps))
    for ids, weights in steps:
        stop()
        batch = data.rows(ids, targets)

        def closure(batch: Any = batch, weights: Tensor | None = weights) -> Any:
            optimizer.zero_grad()
            with torch.enable_grad():
                losses = objective.losses(objective.outputs(model, batch), batch)
                loss = _mean(losses, weights)
                loss.backward()  # type: ignore[no-untyped-call]
            return loss.detach()

        pace.step(closure)
    return model.eval()


def _mean(losses: Tensor, weights: Tensor | None) -> Tensor:
    return losses.mean() if weights is None else (losses * weights.to(losses.dtype)).mean()


@dataclass(eq=False)
class _Pace:
    """An optimiser and the learning rate of its next step."""

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
    """Many models of one architecture: every tensor with the models along its first axis."""

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
        """Every model's losses, on a batch of its own each, or on one for all."""

        def one(tensors: dict[str, Tensor], own: Any) -> Tensor:
            given = batch if shared else own
            return objective.losses(objective.outputs(at(self.skeleton, tensors), given), given)

        moving = torch.zeros(len(self)) if shared else batch
        with quiet():
            found: Tensor = vmap(one)(dict(self.tensors), moving)
        return found


def train_together(
    recipe: Recipe, objective: AbstractObjective, data: Examples, jobs: Sequence[Job], stop: Stop = lambda: None
) -> Stack:
    """`train` for several jobs whose batches have the same sizes, as one stacked model. In eval mode."""
    stack = Stack.of([recipe.fresh(job.seed) for job in jobs])
    trainable = [k for k, p in stack.skeleton.named_parameters() if p.requires_grad]
    for name in trainable:
        stack.tensors[name].requires_grad_()
    optimizer = recipe.optimizer([stack.tensors[k] for k in trainable])
    changed = [data.targets(job.change) for job in jobs]
    targets = None
    if any(t is not None for t in changed):
        usual = tensor_targets(data.batch)
        targets = torch.stack([usual if t is None else t for t in changed])
    steps = list(zip(*(plan(recipe, job) for job in jobs), strict=True))
    pace = _Pace(recipe, optimizer, len(steps))
    for members in steps:
        stop()
        batch = data.rows(torch.stack([ids for ids, _ in members]), targets)
        weights = None if members[0][1] is None else torch.stack([w for _, w in members if w is not None])

        def closure(batch: Any = batch, weights: Tensor | None = weights) -> Any:
            optimizer.zero_grad()
            with torch.enable_grad():
                losses = stack.losses(objective, batch)
                total = (losses if weights is None else losses * weights.to(losses.dtype)).mean(1).sum()
                total.backward()  # type: ignore[no-untyped-call]
            return total.detach()

        pace.step(closure)
    stack.skeleton.eval()
    return Stack(stack.skeleton, {k: v.detach() for k, v in stack.tensors.items()})


@final
@dataclass(frozen=True)
class Way:
    """How many models are worth training as one (1: one by one), why, and whether training draws at random.

    Decided by rule, so that the same request takes the same way in every run, and then checked in numbers.
    """

    together: int
    words: str
    draws: bool = False

    @staticmethod
    def of(recipe: Recipe, objective: AbstractObjective, data: Examples, seed: int) -> Way:
        """The way for this model, optimiser and data."""
        model = recipe.fresh(seed)
        size = sum(p.numel() for p in model.parameters())
        parts = list(model.modules())
        random = next((type(m).__name__ for m in parts if isinstance(m, _RANDOM) and getattr(m, "p", 1.0) != 0), None)
        if random is not None:
            return Way(1, f"one by one: {random} depends on the random state or on the rest of a batch", True)
        if not isinstance(recipe.optimizer([p for p in model.parameters() if p.requires_grad]), _ELEMENTWISE):
            return Way(1, "one by one: its optimiser looks at several numbers at once")
        if size > _LARGE or any(isinstance(m, _CONVOLUTIONS) for m in parts):
            return Way(1, "one by one: such a model keeps a core busy by itself")
        if not _agree(recipe, objective, data, seed):
            return Way(1, "one by one: trained together, this model came out differently")
        most = int(min(_MOST, max(2, _TOGETHER // size)))
        return Way(most, f"up to {most} at a time, as one stacked model")


def _agree(recipe: Recipe, objective: AbstractObjective, data: Examples, seed: int) -> bool:
    """Two models' losses and gradients, stacked and apart."""
    models = [recipe.fresh(seed), recipe.fresh(seed + 1)]
    some = torch.arange(min(8, data.n))
    stack = Stack.of(models)
    names = [k for k, p in models[0].named_parameters() if p.requires_grad]
    for name in names:
        stack.tensors[name].requires_grad_()
    batch = data.rows(some)
    try:
        losses = stack.losses(objective, data.rows(torch.stack([some, some])))
        slopes = grads(losses.sum(), [stack.tensors[k] for k in names])
    except RuntimeError:
        return False
    for at_model, model in enumerate(models):
        each = objective.losses(objective.outputs(model, batch), batch)
        own = grads(each.sum(), [dict(model.named_parameters())[k] for k in names])
        pairs = [(each, losses[at_model])]
        pairs += [(a, b[at_model]) for a, b in zip(own, slopes, strict=True) if a is not None and b is not None]
        tolerance = 1e-8 if each.dtype == torch.float64 else 1e-4
        if any(float((a - b).detach().abs().max()) > tolerance * float(a.detach().abs().max()) for a, b in pairs):
            return False
    return True


@torch.no_grad()
def measure(model: nn.Module | Stack, objective: AbstractObjective, queries: Source, seeds: Sequence[int]) -> Tensor:
    """What is measured on every query, [M, Q]; a single model has M = 1.

    Raises:
        NonFinite: a model's measurement is NaN or infinite; its seed is named.
    """
    found: list[Tensor] = []
    for ids, batch in queries.batches():
        queries.check_finite(ids, batch)
        if isinstance(model, Stack):
            found.append(model.losses(objective, batch, shared=True))
        else:
            outputs = objective.outputs(model, batch)
            objective.check(outputs, batch, ids)
            found.append(objective.losses(outputs, batch)[None])
    values = torch.cat(found, 1)
    bad = (~torch.isfinite(values)).any(1).nonzero().flatten().tolist()
    if bad:
        raise NonFinite(
            f"A model retrained with seed {seeds[bad[0]]} measures NaN or infinity, so its training diverged; "
            "lower the learning rate of the recipe."
        )
    return values
