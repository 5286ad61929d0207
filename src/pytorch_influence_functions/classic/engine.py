"""The translation of the original package's settings to `Influence`, which does the computing.

The original recursion `h <- v + (1 - damp) h - H_B h / scale` with `s_test = h / scale` is
`Influence(Hessian(), Neumann(step=1 / scale, steps=recursion_depth, repeats=r), Absolute(damp * scale))`,
whose fixed point is `(H + damp * scale)^-1 v`.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from ..core.distributed import World
from ..core.errors import InvalidInput, SolveFailed
from ..core.progress import progress as progress_setting
from ..curvature.base import Budget, Form
from ..curvature.exact import Hessian
from ..damping.rules import Absolute
from ..gradients.per_example import Derivatives
from ..gradients.products import Products
from ..influence.attribution import Attribution, Influence
from ..linalg.rows import Rows
from ..linalg.shift import Shift
from ..linalg.space import Space
from ..objectives.base import inputs_and_targets
from ..objectives.likelihoods import CrossEntropy
from ..problem.data import Source
from ..problem.model_state import double_backward_safe, plain_autograd, preserved
from ..problem.problem import Problem, model_device, sweep
from ..scores.scores import Scores
from ..solvers.base import Result, Solution
from ..solvers.neumann import Neumann, Tuning
from .console import log
from .selection import index_tensor, split_labels

# Test items whose recursions run side by side on the same mini-batches: at most so many, and so many numbers in all.
# A step on one small item is nearly all overhead.
_MOST_ITEMS, _MOST_NUMBERS = 32, 1 << 21
# A loader's batch size is meant for LiSSA's mini-batches; passes over all data take at least so many at a time.
_MIN_BATCH = 64


@dataclass(frozen=True)
class ClassicSettings:
    """The settings of one calculation, under the README's names."""

    damp: float = 0.01
    scale: float = 25.0
    recursion_depth: int = 5000
    r: int = 1
    seed: int = 42
    gpu: int = -1
    solver: str = "lissa"
    batch_size: int | None = None
    tolerance: float = 1e-4
    weight_decay: Any = 0.0
    deterministic: Any = "warn"
    loss_fn: Any = None
    params: Any = None
    progress: Any = None

    @staticmethod
    def of(
        config: Mapping[str, Any],
        loss_fn: Any = None,
        params: Any = None,
        generator: torch.Generator | None = None,
        progress: Any = None,
    ) -> ClassicSettings:
        """Make settings from a complete config and the keyword-only extras."""
        names = (
            "damp", "scale", "recursion_depth", "r", "gpu", "solver", "batch_size", "tolerance", "weight_decay",
            "deterministic",
        )  # fmt: skip
        return ClassicSettings(
            **{name: config[name] for name in names},
            seed=seed_from(generator, config["seed"]),
            loss_fn=loss_fn,
            params=params,
            progress=config["progress"] if progress is None else progress,
        )


def seed_from(generator: torch.Generator | None, default: int = 42) -> int:
    """Draw a seed from a generator, if there is one: its state, not its identity, decides the result."""
    if generator is None:
        return default
    return int(torch.randint(2**31, (), generator=generator, device=generator.device))


# --------------------------------------------------------------------------- around a calculation


@contextmanager
def on_device(model: nn.Module, gpu: int) -> Iterator[None]:
    """Inside, the model is on GPU number `gpu`; -1 leaves it where it is.

    Raises:
        InvalidInput: there is no such GPU.
    """
    if gpu < 0:
        yield
        return
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if gpu >= count:
        raise InvalidInput(f"gpu={gpu} was asked for and there are {count} CUDA devices; use gpu=-1 for the CPU.")
    before, device = model_device(model), torch.device("cuda", gpu)
    if before == device:
        yield
        return
    try:
        model.to(device)
        yield
    finally:
        model.to(before)


@contextmanager
def show_progress(setting: Any) -> Iterator[None]:
    """Inside, progress is shown as asked: `None` or True as set for the whole library, False silent, or a callback."""
    with nullcontext() if setting is None or setting is True else progress_setting(setting):
        yield


@contextmanager
def calculation(model: Any, settings: ClassicSettings) -> Iterator[None]:
    """Set device, seeds and progress for a calculation; afterwards the model and all random states are as before.

    Because the model is preserved here, no step of the recursion has to do so.
    """
    if not isinstance(model, nn.Module):
        raise InvalidInput(f"The model must be a torch.nn.Module, got {type(model).__name__}.")
    with ExitStack() as stack:
        stack.enter_context(show_progress(settings.progress))
        stack.enter_context(plain_autograd())
        stack.enter_context(on_device(model, settings.gpu))
        stack.enter_context(preserved(model))
        stack.enter_context(double_backward_safe(model))
        random.seed(settings.seed)
        np.random.seed(settings.seed % 2**32)
        torch.manual_seed(settings.seed)
        yield


@dataclass(eq=False)
class CachedItems(Dataset[Any]):
    """A dataset whose items stay as they were first read, random augmentations included."""

    dataset: Any
    _items: dict[int, Any] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> Any:
        if index not in self._items:
            self._items[index] = self.dataset[index]
        return self._items[index]


def make_source(data: Any, deterministic: Any) -> Source:
    """The data by index, all of the dataset; with `deterministic=True` items are kept as first read."""
    source = Source.of(data).whole
    if deterministic is True:
        # Items are kept in this process, because a worker's memory is lost with the worker.
        source = replace(source, dataset=CachedItems(source.dataset), num_workers=0, worker_options={}, _determinism={})
    return source


# --------------------------------------------------------------------------- the calculation itself


@dataclass(frozen=True)
class QueryGradients:
    """The gradients of some queries, one row each, and their labels."""

    rows: Rows
    labels: list[Any]


@dataclass(frozen=True, eq=False)
class Engine:
    """One model, one training set and one solver; made inside `calculation`."""

    problem: Problem
    settings: ClassicSettings
    loader_batch: int

    @staticmethod
    def of(model: nn.Module, train: Any, settings: ClassicSettings) -> Engine:
        """Translate the settings; nothing is computed yet."""
        source = make_source(train, settings.deterministic)
        policy = settings.deterministic if isinstance(settings.deterministic, str) else "ignore"
        loss = CrossEntropy() if settings.loss_fn is None else settings.loss_fn
        problem = Problem(
            model,
            loss,
            replace(source, batch_size=max(source.batch_size, _MIN_BATCH)),
            parameters=settings.params,
            weight_decay=settings.weight_decay,
            deterministic=policy,
        )
        return Engine(problem, settings, source.batch_size)

    @property
    def method(self) -> Influence:
        """The `Influence` that the settings stand for."""
        s = self.settings
        if s.solver == "auto":
            return Influence()
        solver = Neumann(
            step=1.0 / s.scale,
            steps=s.recursion_depth,
            batch_size=s.batch_size or self.loader_batch,
            repeats=s.r,
            seed=s.seed,
            tolerance=s.tolerance,
        )
        return Influence(Hessian(), solver, Absolute(s.damp * s.scale))

    @cached_property
    def attribution(self) -> Attribution:
        """The fitted method."""
        if self.settings.solver == "lissa":
            log.info(
                "LiSSA: scale %g, damp %g, so the effective damping of the Hessian is %g; depth %d, r %d, batch %d.",
                self.settings.scale, self.settings.damp, self.settings.damp * self.settings.scale,
                self.settings.recursion_depth, self.settings.r, self.settings.batch_size or self.loader_batch,
            )  # fmt: skip
        return self.method.fit(self.problem)

    @cached_property
    def derivatives(self) -> Derivatives:
        fitted = "attribution" in vars(self)
        return self.attribution.members[0].derivatives if fitted else Derivatives.of(self.problem)

    @cached_property
    def names(self) -> list[str]:
        """The selected parameters in the model's own order: the order of every list of tensors."""
        selected = set(self.derivatives.space.names)
        return [name for name, _ in self.problem.model.named_parameters() if name in selected]

    def __len__(self) -> int:
        return len(self.problem)

    def blocks(self, ids: Sequence[int], workers: int = 1) -> list[list[int]]:
        """Test items in blocks that are solved together; an item's result does not depend on its block.

        Args:
            ids: the test items.
            workers: the least number of blocks, where there are enough items.
        """
        size = max(1, min(_MOST_ITEMS, _MOST_NUMBERS // self.derivatives.space.size, math.ceil(len(ids) / workers)))
        return [list(ids[start : start + size]) for start in range(0, len(ids), size)]

    def gradients(self, source: Source, ids: Sequence[int]) -> QueryGradients:
        """The gradients of some items of `source`, one row each."""
        indices = index_tensor(ids)
        slabs = list(self.derivatives.stream(source, ids=indices, label="query gradients", world=World()))
        labels = [x for s in slabs for x in split_labels(inputs_and_targets(s.batch)[2], len(s.ids))]
        return QueryGradients(Rows.cat([s.rows for s in slabs]), labels)

    def gradient_of(self, batch: Any, n: int) -> Rows:
        """One row: the gradient of the mean loss over a batch."""
        rows = self.derivatives.loss_rows(torch.arange(n), batch).rows
        return rows.combine(torch.full((1, n), 1.0 / n, dtype=rows.dtype, device=rows.device))

    def s_test(self, rows: Rows) -> Rows:
        """(H + damp * scale)^-1 v for every row v, by the recursion.

        Raises:
            SolveFailed: it diverges; the message names a scale that works.
        """
        solution = self.attribution.members[0].solve(rows)
        if solution.result is not Result.successful:
            self._refuse(solution)
        solved = solution.unwrap()
        assert isinstance(solved, Rows), "the series works on rows"
        return solved

    def _refuse(self, solution: Solution) -> None:
        """Raise the solver's error in terms of the config's keys."""
        s, step = self.settings, solution.notes.get("step_that_works")
        if step is not None:
            raise SolveFailed(
                f"The s_test recursion diverged with scale={s.scale:g}: scale must be above the largest eigenvalue "
                "plus damping plus the noise of mini-batches. Set "
                f"scale to at least {1.0 / step:.4g} (and damp to "
                f"{s.damp * s.scale * step:.3g} for the same damping), or call config.auto_tune(model, train_loader)."
            )
        if solution.result is Result.negative_curvature:
            raise SolveFailed(
                f"{solution.detail} The effective damping is damp * scale = {s.damp * s.scale:g}: raise "
                "damp, train the model to a minimum, or use config['solver'] = 'auto'."
            )
        solution.unwrap()

    def influence(self, solved: Rows) -> Tensor:
        """(1/N) <s_test, gradient i> for every row and every training item: [n, N], positive = helpful."""
        d, n = self.derivatives, len(self.problem)
        values = torch.empty(len(solved), n, dtype=torch.promote_types(solved.dtype, torch.float32))
        products: Products | None = None
        for ids, batch in sweep(self.problem, label="scoring", world=World()):
            if d.vmapped or d.looped:  # some parameter has no layer rule: one forward-mode pass is faster than rows
                products = products or Products.of(d, batch, len(ids))
                inner = products.losses_along(ids, batch, solved)
            else:
                inner = d.loss_rows(ids, batch).rows.inner(solved)
            values[:, ids] = inner.T.cpu() / n
        return values

    def score_automatically(self, source: Source, ids: Sequence[int]) -> Scores:
        """Score all queries at once by the method that `solver='auto'` chooses."""
        return self.method.fit(self.problem, len(ids)).score(source.subset(index_tensor(ids)))

    def to_lists(self, rows: Rows) -> list[list[Tensor]]:
        """One list of tensors per row, in parameter order, on the CPU."""
        return lists_of(rows, self.derivatives.space, self.names)

    def from_list(self, vectors: Sequence[Tensor]) -> Rows:
        """A row from a list of tensors in parameter order.

        Raises:
            InvalidInput: not one tensor per selected parameter, in its shape.
        """
        parameters = self.derivatives.space.values(self.problem.model)
        expected = [tuple(parameters[name].shape) for name in self.names]
        shapes = [tuple(v.shape) for v in vectors]
        if expected != shapes:
            raise InvalidInput(
                f"The vector holds tensors of shapes {shapes}; expected one per selected parameter, {expected}, in "
                "order."
            )
        like = parameters[self.names[0]]
        tree = {k: v.detach().to(like)[None] for k, v in zip(self.names, vectors, strict=True)}
        return self.derivatives.space.from_parameters(tree)


def lists_of(rows: Rows, space: Space, names: Sequence[str]) -> list[list[Tensor]]:
    """One list of tensors per row, in the order of `names`, on the CPU and each with memory of its own."""
    tree = space.to_parameters(rows.dense())
    return [[tree[name][k].detach().cpu().clone() for name in names] for k in range(len(rows))]


def measure_curvature(model: nn.Module, train: Any, settings: ClassicSettings, damping: float) -> Tuning:
    """Measure the largest eigenvalue and the trace, and the step and batch size that follow from them.

    Raises:
        InvalidInput: the damping is not positive, or the curvature is negative beyond it.
    """
    if not damping > 0:
        raise InvalidInput(f"auto_tune needs a positive damping (damp * scale), got {damping:g}.")
    with calculation(model, settings):
        engine = Engine.of(model, train, settings)
        derivatives = engine.derivatives
        operator = Hessian().of(derivatives, Form.IMPLICIT, Budget())
        solver = Neumann(seed=settings.seed)
        state = solver.init(operator, Shift(damping, derivatives.space.decay))
        like = derivatives.space.like(engine.problem.model)
        tuning = solver.tuning(state, like.dtype, like.device)
    if tuning.smallest + damping <= 0:
        raise InvalidInput(
            f"The Hessian's smallest eigenvalue is about {tuning.smallest:.3g} and the damping {damping:.3g}, so no "
            f"scale makes the recursion converge; pass damping={-1.1 * tuning.smallest:.3g}, or train further."
        )
    return tuning


def relative_deviation(model: nn.Module, train: Any, settings: ClassicSettings, runs: int = 3) -> float:
    """Standard deviation of single runs of the recursion over the norm of their mean, on one item."""
    with calculation(model, settings):
        solutions = []
        for k in range(runs):
            engine = Engine.of(model, train, replace(settings, r=1, seed=settings.seed + k))
            solutions.append(engine.s_test(engine.gradients(engine.problem.data, [0]).rows).flat()[0].double())
    solved = torch.stack(solutions)
    mean = solved.mean(0)
    deviation = ((solved - mean).square().sum() / (runs - 1)).sqrt()
    return float(deviation / mean.norm()) if float(mean.norm()) > 0 else 0.0
