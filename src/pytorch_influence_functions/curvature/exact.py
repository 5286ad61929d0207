"""Identity, Hessian, Gauss-Newton and Fisher matrices, as products on many rows, as rows, or dense.

| matrix | definition | positive semidefinite |
|---|---|---|
| Hessian | mean of d^2 loss | no: needs damping above -lambda_min |
| GGN | mean of J^T (d^2 loss / d outputs^2) J (Schraudolph 2002) | yes |
| Fisher | E over the model's own labels of grad grad^T; equals the GGN for these likelihoods (Martens 2020) | yes |
| EmpiricalFisher | mean of grad grad^T with the given labels (an approximation, see Kunstner et al. 2019) | yes |
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, ClassVar, final

import torch
from torch import Tensor

from ..core.batches import batch_slice, tensors_of
from ..core.distributed import World, current
from ..core.errors import InvalidInput, NonFinite, name_ids
from ..core.indexing import evenly_spaced
from ..core.validate import whole_number
from ..gradients.per_example import Derivatives
from ..gradients.products import DIRECTIONS, Products
from ..linalg.dense import Matrix
from ..linalg.gram import Gram
from ..linalg.implicit import Implicit
from ..linalg.operator import AbstractSymmetric
from ..linalg.rows import Rows
from ..linalg.scaled_identity import ScaledIdentity
from ..linalg.trace import hutchinson_block_traces
from ..objectives.base import AbstractLikelihood, AbstractObjective
from ..objectives.draws import Keyed
from ..problem.data import Source
from ..problem.problem import first_batch, sweep
from .base import AbstractCurvature, Budget, Form, not_a_likelihood

# A dataset smaller than this, in bytes, is kept collated for mini-batch products.
_RESIDENT_BYTES = 256 << 20
# Examples on which a trace is estimated when exact enumeration would cost more than a few passes.
_TRACE_EXAMPLES = 2000
# Up to this many outputs their classes are enumerated rather than sampled.
ENUMERATED_OUTPUTS = 16
# Columns of the identity pushed through the Hessian together.
_COLUMNS = 64

# Numbers that one batch's activations, pushed in all directions at once, may take.
_ACTIVATIONS = 1 << 25
_NARROWEST, _WIDEST = 8, 1024


@final
@dataclass(frozen=True)
class Identity(AbstractCurvature):
    """C = I: scores become gradient dot products (Grad-Dot). No curvature at all; a baseline."""

    forms: ClassVar[tuple[Form, ...]] = (Form.SPECTRAL, Form.IMPLICIT)

    def of(self, derivatives: Derivatives, form: Form, budget: Budget) -> AbstractSymmetric:
        self.require(form)
        return ScaledIdentity(derivatives.space)


@final
@dataclass(frozen=True)
class Hessian(AbstractCurvature):
    """C = mean of the losses' second derivatives: Koh & Liang (2017). May be indefinite for deep networks."""

    forms: ClassVar[tuple[Form, ...]] = (Form.MATRIX, Form.IMPLICIT)

    def of(self, derivatives: Derivatives, form: Form, budget: Budget) -> AbstractSymmetric:
        self.require(form)
        data = _Passes.of(derivatives)
        data.products.check_hessian(*data.first)

        def mean() -> dict[str, float]:
            space = derivatives.space
            if isinstance(derivatives.objective, AbstractLikelihood):
                return _block_means(derivatives)  # of its positive part, the Gauss-Newton matrix
            like = next(iter(space.values(derivatives.problem.model).values()))
            traces = hutchinson_block_traces(operator, samples=8, seed=0, dtype=like.dtype, device=like.device)
            return {k: trace / space.numel(k) for k, trace in traces.items()}

        def product(rows: Rows, ids: Tensor | None = None) -> Rows:
            return data.average(lambda i, b: data.products.hessian_product(i, b, rows), rows, ids)

        operator = Implicit(derivatives.space, product, mean, len(derivatives.problem))
        if form is Form.IMPLICIT:
            return operator
        return _densified(operator, derivatives, budget)


@final
@dataclass(frozen=True)
class GGN(AbstractCurvature):
    """C = mean of J^T H J, with H the loss's Hessian in the outputs: positive semidefinite, equal to the Hessian for
    linear models and to the true Fisher for cross entropy, squared error and Bernoulli losses."""

    forms: ClassVar[tuple[Form, ...]] = (Form.MATRIX, Form.GRAM, Form.IMPLICIT)

    def of(self, derivatives: Derivatives, form: Form, budget: Budget) -> AbstractSymmetric:
        self.require(form)
        _likelihood(derivatives, "GGN()")
        if form is not Form.IMPLICIT:
            return _from_rows(derivatives, form, budget, lambda: root_rows(derivatives), len(derivatives.problem))
        data = _Passes.of(derivatives)

        def product(rows: Rows, ids: Tensor | None = None) -> Rows:
            return data.average(lambda i, b: data.products.ggn_product(i, b, rows), rows, ids)

        return Implicit(derivatives.space, product, lambda: _block_means(derivatives), len(derivatives.problem))


@final
@dataclass(frozen=True)
class Fisher(AbstractCurvature):
    """The true Fisher: gradients of labels the model itself would give.

    `samples=None` enumerates the labels, which equals `GGN()`; an integer draws that many per example from `seed`.
    """

    samples: int | None = None
    seed: int = 0
    forms: ClassVar[tuple[Form, ...]] = (Form.MATRIX, Form.GRAM, Form.IMPLICIT)

    def __post_init__(self) -> None:
        if self.samples is not None:
            whole_number("samples", self.samples, owner=self, hint="None takes every label into account")

    def of(self, derivatives: Derivatives, form: Form, budget: Budget) -> AbstractSymmetric:
        self.require(form)
        if self.samples is None:
            return GGN().of(derivatives, form, budget)
        _likelihood(derivatives, "Fisher()")
        samples, count = self.samples, len(derivatives.problem) * self.samples
        if form is Form.IMPLICIT:
            return _implicit_from_rows(
                derivatives,
                lambda ids, batch: sampled_rows(derivatives, ids, batch, samples, self.seed),
                samples,
            )
        return _from_rows(derivatives, form, budget, lambda: self._all(derivatives, samples), count)

    def _all(self, derivatives: Derivatives, samples: int) -> Iterator[Rows]:
        for ids, batch in sweep(derivatives.problem, label="sampled Fisher", world=World()):
            yield sampled_rows(derivatives, ids, batch, samples, self.seed)


@final
@dataclass(frozen=True)
class EmpiricalFisher(AbstractCurvature):
    """C = mean of grad grad^T at the given labels. Cheap, and not a curvature once the model fits its data: it shrinks
    with the residuals. In its dual form every scoring quantity comes from one N x N matrix.

    `measure` takes the gradients of something else than the training loss, such as `Margin()` as TRAK does.
    """

    measure: AbstractObjective | None = None
    forms: ClassVar[tuple[Form, ...]] = (Form.MATRIX, Form.GRAM, Form.IMPLICIT)

    def of(self, derivatives: Derivatives, form: Form, budget: Budget) -> AbstractSymmetric:
        self.require(form)
        if form is Form.IMPLICIT:
            return _implicit_from_rows(
                derivatives, lambda ids, batch: derivatives.loss_rows(ids, batch, self.measure).rows, 1
            )
        return _from_rows(
            derivatives,
            form,
            budget,
            lambda: (s.rows for s in derivatives.stream(None, self.measure, label="gradient rows", world=World())),
            len(derivatives.problem),
        )


def root_rows(derivatives: Derivatives) -> Iterator[Rows]:
    """Rows H^(1/2) J, batch by batch and column by column: C is their Gram. Classes are enumerated."""
    for ids, batch in sweep(derivatives.problem, label="Gauss-Newton rows", world=World()):
        yield from roots_of(derivatives, ids, batch)


def roots_of(derivatives: Derivatives, ids: Tensor, batch: Any) -> Iterator[Rows]:
    """The columns of H^(1/2) J for one batch, n rows each."""
    objective = _likelihood(derivatives, "GGN()")
    tape = derivatives.tape(batch, len(ids))
    outputs = tape.outputs.detach()
    objective.check(outputs, batch, ids)
    finite_outputs(outputs, ids)
    root = objective.root(outputs, batch)
    for k, column in enumerate(root):
        yield tape.rows(column, keep_graph=k + 1 < len(root))


def sampled_rows(derivatives: Derivatives, ids: Tensor, batch: Any, samples: int, seed: int) -> Rows:
    """Rows J^T c with E[c c^T] = H; the same draws for the same examples, however often they are asked for."""
    objective = _likelihood(derivatives, "Fisher()")
    tape = derivatives.tape(batch, len(ids))
    outputs = tape.outputs.detach()
    objective.check(outputs, batch, ids)
    finite_outputs(outputs, ids)
    made = []
    for k in range(samples):
        cotangent = objective.sample_cotangent(outputs, batch, Keyed(ids, draw_seed(seed, k)))
        made.append(tape.rows(cotangent, keep_graph=k + 1 < samples))
    return Rows.cat(made)


def draw_seed(seed: int, k: int) -> int:
    """The seed of the k-th draw: draws are independent of each other and of other seeds' draws."""
    return seed * 65_537 + k


def wide_source(derivatives: Derivatives, numbers_each: float) -> Source:
    """The training data in batches as wide as `_ACTIVATIONS` allows when an example takes `numbers_each` numbers."""
    room = int(_ACTIVATIONS / max(1.0, numbers_each))
    return replace(derivatives.problem.data, batch_size=max(_NARROWEST, min(room, _WIDEST)))


@dataclass(frozen=True, eq=False)
class _Passes:
    """Averages of a product over all examples or some, with small datasets kept collated for mini-batches."""

    derivatives: Derivatives
    world: World = field(default_factory=current)

    @staticmethod
    def of(derivatives: Derivatives) -> _Passes:
        return _Passes(derivatives)

    @cached_property
    def products(self) -> Products:
        ids, batch = self.first
        return Products.of(self.derivatives, batch, len(ids))

    @cached_property
    def first(self) -> tuple[Tensor, Any]:
        """The first examples, on which ways are compared."""
        problem = self.derivatives.problem
        together = replace(problem.data, batch_size=min(4, len(problem)))
        with first_batch(problem, together, torch.arange(together.batch_size)) as pair:
            return pair

    @cached_property
    def wide(self) -> Source:
        """The data in batches as wide as `_ACTIVATIONS` allows: a product over 64 examples of a small network is all
        overhead (measured on a 784-128-64-10 perceptron, 50 directions: 3.3 s in batches of 64, 0.9 s in 500)."""
        ids, batch = self.first
        rows = self.derivatives.loss_rows(ids, batch).rows
        return wide_source(self.derivatives, rows.numbers / len(ids) * DIRECTIONS)

    @cached_property
    def resident(self) -> Any | None:
        """The whole dataset as one batch on the device, when it is small and made of stackable tensors."""
        problem = self.derivatives.problem
        n = len(problem)
        with first_batch(problem, ids=torch.arange(1)) as (_, first):
            size = sum(t.numel() * t.element_size() for _, t in tensors_of(first)) * n
        if size > _RESIDENT_BYTES:
            return None
        whole = replace(problem.data, batch_size=n)
        try:
            with first_batch(problem, whole, label="loading") as (_, batch):
                stacked = all(t.dim() > 0 and t.shape[0] == n for _, t in tensors_of(batch))
        except InvalidInput:  # examples of unequal length cannot lie in one batch
            return None
        return batch if stacked else None

    def average(self, product: Callable[[Tensor, Any], Rows], rows: Rows, ids: Tensor | None) -> Rows:
        problem, space = self.derivatives.problem, self.derivatives.space
        if ids is not None and self.resident is not None:
            part = batch_slice(self.resident, len(problem), ids.to(problem.device))
            return product(ids, part).scaled(1 / len(ids))
        total = rows.flat().new_zeros(len(rows), space.size)
        world = self.world if ids is None else World()
        for batch_ids, batch in sweep(problem, self.wide, ids, "curvature products", world):
            total += product(batch_ids, batch).flat()
        return space.rows(world.all_sum(total) / (len(problem) if ids is None else len(ids)))


def _implicit_from_rows(derivatives: Derivatives, rows_of: Callable[[Tensor, Any], Rows], per: int) -> Implicit:
    """C x = mean of g <g, x> over rows made anew at every pass."""
    data = _Passes.of(derivatives)
    problem = derivatives.problem

    def product(x: Rows, ids: Tensor | None = None) -> Rows:
        total = x.flat().new_zeros(len(x), derivatives.space.size)
        world = data.world if ids is None else World()
        for batch_ids, batch in sweep(problem, ids=ids, label="curvature products", world=world):
            g = rows_of(batch_ids, batch)
            total += g.combine(g.inner(x).T).flat()
        count = (len(problem) if ids is None else len(ids)) * per
        return derivatives.space.rows(world.all_sum(total) / count)

    def mean() -> dict[str, float]:
        some = evenly_spaced(len(problem), _TRACE_EXAMPLES)
        rows = (rows_of(ids, batch) for ids, batch in sweep(problem, ids=some, label="trace", world=World()))
        return _means_of(derivatives, rows, len(some) * per)

    return Implicit(derivatives.space, product, mean, len(problem))


def _from_rows(
    derivatives: Derivatives, form: Form, budget: Budget, rows: Callable[[], Iterator[Rows]], count: int
) -> AbstractSymmetric:
    space = derivatives.space
    if form is Form.MATRIX:
        budget.check(
            8.0 * space.size**2 * 3, f"A dense matrix over {space.size:,} parameters", "use CG() or Woodbury()"
        )
        total = torch.zeros(space.size, space.size, dtype=torch.float64, device=derivatives.problem.device)
        for r in rows():
            flat = r.flat().double()
            total.addmm_(flat.T, flat)
        return Matrix(space, total / count)
    kept: list[Rows] = []
    held = 0.0
    for r in rows():
        kept.append(r.compact())
        held += kept[-1].numbers * kept[-1].dtype.itemsize
        # The first batch already tells what the rest will take.
        forecast = held / sum(map(len, kept)) * max(count, sum(map(len, kept)))
        budget.check(forecast, "Keeping the gradient rows", "use CG(), or name fewer parameters")
    return Gram(space, Rows.cat(kept), count)


def _densified(operator: Implicit, derivatives: Derivatives, budget: Budget) -> Matrix:
    space = derivatives.space
    budget.check(8.0 * space.size**2 * 3, f"A dense matrix over {space.size:,} parameters", "use CG()")
    reference = next(iter(space.values(derivatives.problem.model).values())).detach()
    eye = torch.eye(space.size, dtype=reference.dtype, device=reference.device)
    columns = [operator.apply(space.rows(part)).flat().double() for part in torch.split(eye, _COLUMNS)]
    matrix = torch.cat(columns)
    return Matrix(space, (matrix + matrix.T) / 2)


def _likelihood(derivatives: Derivatives, curvature: str) -> AbstractLikelihood:
    if not isinstance(derivatives.objective, AbstractLikelihood):
        raise not_a_likelihood(curvature, derivatives.objective)
    return derivatives.objective


def finite_outputs(outputs: Tensor, ids: Tensor) -> None:
    """Refuse NaN or infinite outputs, naming the examples."""
    good = torch.isfinite(outputs.flatten(1)).all(1)
    if not bool(good.all()):
        raise NonFinite(
            f"The model's output is NaN or infinite at dataset indices {name_ids(ids[~good.cpu()].tolist())}; "
            "look at these examples, or remove them with torch.utils.data.Subset."
        )


def _block_means(derivatives: Derivatives) -> dict[str, float]:
    """trace(GGN) / P block by block: exact for few outputs and examples, else from one sampled cotangent each."""
    problem = derivatives.problem
    some = evenly_spaced(len(problem), _TRACE_EXAMPLES)

    def rows() -> Iterator[Rows]:
        for ids, batch in sweep(problem, ids=some, label="trace", world=World()):
            objective = _likelihood(derivatives, "GGN()")
            with torch.no_grad():
                size = objective.root_size(objective.outputs(problem.model, batch))
            if size <= ENUMERATED_OUTPUTS:
                yield from roots_of(derivatives, ids, batch)
            else:
                yield sampled_rows(derivatives, ids, batch, 1, 0)

    return _means_of(derivatives, rows(), len(some))


def _means_of(derivatives: Derivatives, rows: Iterator[Rows], count: int) -> dict[str, float]:
    """Mean eigenvalue per block of sum g g^T / count."""
    traces = dict.fromkeys(derivatives.space.blocks, 0.0)
    for r in rows:
        for name, block in r.blocks.items():
            traces[name] += float(block.squared_norms().double().sum())
    return {k: trace / count / derivatives.space.numel(k) for k, trace in traces.items()}
