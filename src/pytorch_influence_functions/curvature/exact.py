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
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any, ClassVar, final

import torch
from torch import Tensor

from ..core.batches import batch_slice, tensors_of
from ..core.distributed import World, current
from ..core.errors import InvalidInput, NonFinite, name_ids
from ..core.validate import whole_number
from ..gradients.per_example import Derivatives, slopes
from ..gradients.products import DIRECTIONS, Products
from ..linalg.dense import Matrix
from ..linalg.gram import Gram
from ..linalg.implicit import Implicit
from ..linalg.operator import AbstractSymmetric
from ..linalg.rows import Rows
from ..linalg.scaled_identity import ScaledIdentity
from ..linalg.trace import hutchinson_block_traces
from ..objectives.base import AbstractObjective
from ..objectives.differentiated import output_curvature
from ..objectives.draws import Keyed
from ..problem.data import Source
from ..problem.problem import first_batch, sweep
from ..problem.working_precision import full_precision, offers_full_precision
from .base import AbstractCurvature, Budget, Form
from .cost import Amount, Cost, ProblemSize, root_size
from .fisher import AbstractFisher
from .from_rows import AbstractRowCurvature, check_dense
from .own_losses import find_obstacle, require_output_curvature

# A dataset smaller than this, in bytes, is kept collated for mini-batch products.
_RESIDENT_BYTES = 256 << 20
# Up to this many independent outputs (one less than the classes) they are enumerated rather than sampled.
ENUMERATED_OUTPUTS = 16
# Products of random vectors that tell the trace of a Hessian whose loss is no likelihood.
_TRACE_PRODUCTS = 8
# Columns of H^(1/2) whose rows are held at once, roughly.
_HELD = 8
# Roundings that a product takes on its way through a model and back.
_HALF_ROUNDINGS = 4
# Columns of the identity pushed through products together.
_COLUMNS = 64
# Numbers that H^(1/2) of one example may have: above, a dense matrix is taken from products, which need no root.
_ROOT_NUMBERS = 1 << 25


@final
@dataclass(frozen=True, repr=False)
class Identity(AbstractCurvature):
    """C = I: scores become gradient dot products (Grad-Dot). No curvature at all; a baseline."""

    forms: ClassVar[tuple[Form, ...]] = (Form.SPECTRAL, Form.IMPLICIT)
    keeps_factors: ClassVar[bool] = True

    def of(self, derivatives: Derivatives, form: Form, budget: Budget) -> AbstractSymmetric:
        self.require(form)
        return ScaledIdentity(derivatives.space)

    def projectable(self, form: Form) -> bool:
        return True

    def cost(self, size: ProblemSize, form: Form) -> Cost:
        return Cost()

    def product_cost(self, size: ProblemSize, vectors: Amount) -> Cost:
        return Cost()


@final
@dataclass(frozen=True, repr=False)
class Hessian(AbstractCurvature):
    """C = mean of the losses' second derivatives: Koh & Liang (2017). May be indefinite for deep networks."""

    forms: ClassVar[tuple[Form, ...]] = (Form.MATRIX, Form.IMPLICIT)
    semidefinite: ClassVar[bool] = False

    def of(self, derivatives: Derivatives, form: Form, budget: Budget) -> AbstractSymmetric:
        self.require(form)
        data = _Passes.of(derivatives)
        data.products.check_hessian(*data.first)
        mean = partial(_means_of_hessian, data)
        operator = Implicit(derivatives.space, data.hessian_product, mean, len(derivatives.problem))
        return operator if form is Form.IMPLICIT else _densify(operator, derivatives, budget)

    def product_cost(self, size: ProblemSize, vectors: Amount) -> Cost:
        # Along each vector a gradient is differentiated: forward, and back to the parameters, each twice.
        return Cost(3.0 * vectors, products=3.0 * vectors)

    def trace_cost(self, size: ProblemSize) -> Cost:
        if size.outputs is None:
            return self.product_cost(size, _TRACE_PRODUCTS)
        return GGN().trace_cost(size)


@final
@dataclass(frozen=True, repr=False)
class GGN(AbstractFisher):
    """C = mean of J^T H J, with H the loss's Hessian in the outputs: positive semidefinite, equal to the Hessian for
    linear models and to the true Fisher for cross entropy, squared error and Bernoulli losses."""

    label: ClassVar[str] = "Gauss-Newton rows"
    gauss_newton: ClassVar[bool] = True

    @property
    def title(self) -> str:
        return "Gauss-Newton matrix"

    def columns(self, size: ProblemSize) -> int:
        return size.columns

    @property
    def averaged(self) -> int:
        return 1

    def check_objective(self, derivatives: Derivatives) -> None:
        require_output_curvature(derivatives)

    def rows_of(self, derivatives: Derivatives, ids: Tensor, batch: Any) -> Iterator[Rows]:
        return roots_of(derivatives, ids, batch)

    def column_count(self, derivatives: Derivatives) -> int:
        return self._root_size(derivatives)

    def cotangents(
        self, derivatives: Derivatives, outputs: Tensor, batch: Any, ids: Tensor, draw: int = 0
    ) -> list[Tensor]:
        return list(output_curvature(derivatives.objective).root(outputs.detach(), batch))

    @property
    def splits_by_example(self) -> bool:
        return True

    def source(self, derivatives: Derivatives) -> Source:
        columns = self._root_size(derivatives)
        most = max(1, _ROOT_NUMBERS // columns**2)
        return derivatives.batched(derivatives.problem.data, times=min(columns, _HELD), most=most)

    def dense(self, derivatives: Derivatives, budget: Budget) -> Matrix:
        # Projected rows have no products with the parameters, and are made whatever that takes.
        by_rows = derivatives.projector is not None or _takes_rows(self._root_size(derivatives), derivatives.space.size)
        if by_rows:
            return AbstractRowCurvature.dense(self, derivatives, budget)
        return _densify(self.implicit(derivatives), derivatives, budget)

    def stored(self, derivatives: Derivatives, budget: Budget) -> Gram:
        columns = self._root_size(derivatives)
        whole = 4.0 * max(columns**2, columns * len(derivatives.problem))
        budget.check(whole, f"Rows for each of {columns:,} independent outputs per example", "use EKFAC() or CG()")
        return AbstractRowCurvature.stored(self, derivatives, budget)

    def implicit(self, derivatives: Derivatives) -> Implicit:
        if offers_full_precision(derivatives.problem.model):
            derivatives = replace(derivatives, precision=torch.float32)
        data = _Passes.of(derivatives)
        count, rounding = len(derivatives.problem), _product_rounding(derivatives)
        return Implicit(derivatives.space, data.ggn_product, partial(self.block_means, derivatives), count, rounding)

    def block_means(self, derivatives: Derivatives) -> dict[str, float]:
        """Mean eigenvalue per block, exact for few independent outputs, else from one sampled cotangent per example.

        Args:
            derivatives: how gradients are taken.
        """
        few = self._root_size(derivatives) <= ENUMERATED_OUTPUTS
        return AbstractRowCurvature.block_means(self if few else Fisher(samples=1), derivatives)

    def cost(self, size: ProblemSize, form: Form) -> Cost:
        if form is Form.MATRIX and not _takes_rows(size.columns, size.parameters):
            return AbstractCurvature.cost(self, size, form)
        return AbstractRowCurvature.cost(self, size, form)

    def product_cost(self, size: ProblemSize, vectors: Amount) -> Cost:
        return AbstractCurvature.product_cost(self, size, vectors)

    def trace_cost(self, size: ProblemSize) -> Cost:
        few = size.columns <= ENUMERATED_OUTPUTS
        return AbstractRowCurvature.trace_cost(self if few else Fisher(samples=1), size)

    def _root_size(self, derivatives: Derivatives) -> int:
        return root_size(derivatives)


@final
@dataclass(frozen=True, repr=False)
class Fisher(AbstractFisher):
    """The true Fisher: gradients of labels the model itself would give.

    Args:
        samples: labels that are drawn per example; `None`: all labels are enumerated, which equals `GGN()`.
        seed: of the draws.
    """

    samples: int | None = None
    seed: int = 0
    label: ClassVar[str] = "sampled Fisher"

    def __post_init__(self) -> None:
        if self.samples is not None:
            whole_number("samples", self.samples, owner=self, hint="None takes every label into account")

    def of(self, derivatives: Derivatives, form: Form, budget: Budget) -> AbstractSymmetric:
        if self.samples is None:
            return GGN().of(derivatives, form, budget)
        return AbstractRowCurvature.of(self, derivatives, form, budget)

    def columns(self, size: ProblemSize) -> int:
        return size.columns if self.samples is None else self.samples

    @property
    def averaged(self) -> int:
        return self.samples or 1

    def check_objective(self, derivatives: Derivatives) -> None:
        require_output_curvature(derivatives)

    def rows_of(self, derivatives: Derivatives, ids: Tensor, batch: Any) -> Iterator[Rows]:
        if self.samples is None:
            return roots_of(derivatives, ids, batch)
        return draws_of(derivatives, ids, batch, self.samples, self.seed)

    @property
    def draws_labels(self) -> bool:
        return self.samples is not None

    @property
    def splits_by_example(self) -> bool:
        return not self.draws_labels

    def column_count(self, derivatives: Derivatives) -> int:
        return self.samples or root_size(derivatives)

    def cotangents(
        self, derivatives: Derivatives, outputs: Tensor, batch: Any, ids: Tensor, draw: int = 0
    ) -> list[Tensor]:
        objective, outputs = output_curvature(derivatives.objective), outputs.detach()
        if self.samples is None:
            return list(objective.root(outputs, batch))
        first = draw * self.samples
        keys = [Keyed(ids, draw_seed(self.seed, first + k)) for k in range(self.samples)]
        return [objective.sample_cotangent(outputs, batch, key) for key in keys]

    def cost(self, size: ProblemSize, form: Form) -> Cost:
        enumerated = self.samples is None
        return GGN().cost(size, form) if enumerated else AbstractRowCurvature.cost(self, size, form)

    def product_cost(self, size: ProblemSize, vectors: Amount) -> Cost:
        enumerated = self.samples is None
        return (
            GGN().product_cost(size, vectors) if enumerated else AbstractRowCurvature.product_cost(self, size, vectors)
        )


@final
@dataclass(frozen=True, repr=False)
class EmpiricalFisher(AbstractFisher):
    """C = mean of grad grad^T at the given labels. Cheap, and not a curvature once the model fits its data: it shrinks
    with the residuals. In its dual form every scoring quantity comes from one N x N matrix.

    `measure` takes the gradients of something else than the training loss, such as `Margin()` as TRAK does.
    """

    measure: AbstractObjective | None = None
    given_labels: ClassVar[bool] = True

    @property
    def title(self) -> str:
        return "empirical Fisher"

    @property
    def holds_gradients(self) -> bool:
        return self.measure is None

    @property
    def splits_by_example(self) -> bool:
        return self.measure is None

    def measured_objective(self, derivatives: Derivatives) -> AbstractObjective:
        """`measure`, or the training loss of `derivatives`."""
        return self.measure or derivatives.objective

    def column_count(self, derivatives: Derivatives) -> int:
        return 1

    def cotangents(
        self, derivatives: Derivatives, outputs: Tensor, batch: Any, ids: Tensor, draw: int = 0
    ) -> list[Tensor]:
        return [slopes(self.measured_objective(derivatives), outputs, batch, ids)[1]]

    def columns(self, size: ProblemSize) -> int:
        return 1

    @property
    def averaged(self) -> int:
        return 1

    def rows_of(self, derivatives: Derivatives, ids: Tensor, batch: Any) -> Iterator[Rows]:
        yield derivatives.loss_rows(ids, batch, self.measure).rows

    def batches(self, derivatives: Derivatives) -> Iterator[Iterator[Rows]]:
        for batch in derivatives.stream(None, self.measure, label="gradient rows"):
            yield iter((batch.rows,))


def _takes_rows(columns: int, parameters: int) -> bool:
    """Whether a dense matrix is made of a row per output, or of products with every column of the identity.

    A row takes half a pass and a product one and a half; and with many outputs H^(1/2) is too large to write out.
    """
    return columns**2 <= _ROOT_NUMBERS and columns <= 3 * parameters


def roots_of(derivatives: Derivatives, ids: Tensor, batch: Any) -> Iterator[Rows]:
    """The columns of H^(1/2) J for one batch, n rows each."""
    objective = derivatives.objective
    tape = derivatives.tape(batch, len(ids))
    outputs = tape.outputs.detach()
    objective.check(outputs, batch, ids)
    finite_outputs(outputs, ids)
    root = output_curvature(objective).root(outputs, batch)
    for k, column in enumerate(root):
        yield tape.rows(column, keep_graph=k + 1 < len(root))


def draws_of(derivatives: Derivatives, ids: Tensor, batch: Any, samples: int, seed: int) -> Iterator[Rows]:
    """Rows J^T c with E[c c^T] = H, draw by draw; the same for the same examples, however often they are asked for."""
    objective = derivatives.objective
    tape = derivatives.tape(batch, len(ids))
    outputs = tape.outputs.detach()
    objective.check(outputs, batch, ids)
    finite_outputs(outputs, ids)
    for k in range(samples):
        cotangent = output_curvature(objective).sample_cotangent(outputs, batch, Keyed(ids, draw_seed(seed, k)))
        yield tape.rows(cotangent, keep_graph=k + 1 < samples)


def draw_seed(seed: int, k: int) -> int:
    """The seed of the k-th draw: draws are independent of each other and of other seeds' draws."""
    return seed * 65_537 + k


@dataclass(frozen=True, eq=False)
class _Passes:
    """Averages of a product over all examples or some, with small datasets kept collated for mini-batches."""

    derivatives: Derivatives

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
        """The data in wide batches: a product over 64 examples of a small network is all overhead (measured on a
        784-128-64-10 perceptron, 50 directions: 3.3 s in batches of 64, 0.9 s in 500)."""
        return self.derivatives.batched(self.derivatives.problem.data, times=DIRECTIONS)

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
        world = current() if ids is None else World()
        for batch_ids, batch in sweep(problem, self.wide, ids, "curvature products", world):
            total += product(batch_ids, batch).flat()
        return space.rows(world.sum_into(total) / (len(problem) if ids is None else len(ids)))

    def hessian_product(self, rows: Rows, ids: Tensor | None = None) -> Rows:
        return self.average(lambda i, b: self.products.hessian_product(i, b, rows), rows, ids)

    def ggn_product(self, rows: Rows, ids: Tensor | None = None) -> Rows:
        with full_precision():
            return self.average(lambda i, b: self.products.ggn_product(i, b, rows), rows, ids)


def _means_of_hessian(data: _Passes) -> dict[str, float]:
    derivatives, space = data.derivatives, data.derivatives.space
    if find_obstacle(derivatives) is None:
        return GGN().block_means(derivatives)  # of its positive part, the Gauss-Newton matrix
    like, n = space.like(derivatives.problem.model), len(derivatives.problem)
    operator = Implicit(space, data.hessian_product, dict, n)
    traces = hutchinson_block_traces(operator, samples=_TRACE_PRODUCTS, seed=0, dtype=like.dtype, device=like.device)
    return {k: trace / space.numel(k) for k, trace in traces.items()}


def _densify(operator: Implicit, derivatives: Derivatives, budget: Budget) -> Matrix:
    """The matrix of an operator, from its products with the columns of the identity."""
    space = derivatives.space
    check_dense(space.size, budget)
    reference = space.like(derivatives.problem.model)
    eye = torch.eye(space.size, dtype=reference.dtype, device=reference.device)
    columns = [operator.apply(space.rows(part)).flat().double() for part in torch.split(eye, _COLUMNS)]
    matrix = torch.cat(columns)
    return Matrix(space, (matrix + matrix.T) / 2)


def _product_rounding(derivatives: Derivatives) -> float:
    """The relative error of J^T H J v where the model computes in half precision, as under autocast."""
    eps = float(torch.finfo(derivatives.precision).eps)
    return _HALF_ROUNDINGS * eps if eps > torch.finfo(torch.float32).eps else 0.0


def finite_outputs(outputs: Tensor, ids: Tensor) -> None:
    """Refuse NaN or infinite outputs, naming the examples."""
    # A sum is finite only where all is, and takes an eighth of the time on logits.
    if bool(torch.isfinite(outputs.sum())):
        return
    good = torch.isfinite(outputs.reshape(len(outputs), -1)).all(1)
    if not bool(good.all()):
        raise NonFinite(
            f"The model's output is NaN or infinite at dataset indices {name_ids(ids[~good.cpu()].tolist())}; "
            "look at these examples, or remove them with torch.utils.data.Subset."
        )
