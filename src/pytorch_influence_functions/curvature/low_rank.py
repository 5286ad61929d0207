"""Low-rank curvature: the few directions that matter most, and a choice of what holds across them.

| record | directions | products with the data | meant for |
|---|---|---|---|
| `Arnoldi` | largest eigenvalues of either sign (Schioppa et al. 2022) | at most 4 rank + 64 | parity |
| `Nystrom` | random, pulled to the top (Frangella et al. 2021) | `rank`, in one pass | preconditioning CG |
"""

from __future__ import annotations

import logging
from abc import abstractmethod
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, final

from torch import Tensor

from ..core.errors import InvalidInput
from ..core.validate import choice, whole_number
from ..gradients.per_example import Derivatives
from ..linalg.lanczos import Eigenpairs, default_steps, leading_eigenpairs
from ..linalg.low_rank import LowRank
from ..linalg.nystrom import nystrom_pairs
from ..linalg.operator import AbstractSymmetric
from .base import AbstractCurvature, Budget, Form
from .cost import Amount, Cost, ProblemSize
from .exact import GGN, Hessian

log = logging.getLogger("pytorch_influence_functions")

Complement = Literal["zero", "smallest", "dropped"]
_COMPLEMENTS = ("zero", "smallest", "dropped")
# A Ritz pair with a larger relative residual than this is mentioned.
_ROUGH = 1e-2


class AbstractLowRank(AbstractCurvature):
    """What `Arnoldi` and `Nystrom` have in common: directions of another curvature, and what holds across them."""

    rank: int
    curvature: AbstractCurvature
    complement: Complement
    forms: ClassVar[tuple[Form, ...]] = (Form.SPECTRAL,)

    @property
    def drops_directions(self) -> bool:
        return self.complement == "dropped"

    @property
    def multiplied(self) -> AbstractCurvature | None:
        return self.curvature.multiplied

    @abstractmethod
    def vectors(self, parameters: int) -> int:
        """With how many vectors the other curvature is multiplied, for so many `parameters`."""

    @property
    @abstractmethod
    def together(self) -> int:
        """How many of them go through the data at once."""

    def cost(self, size: ProblemSize, form: Form) -> Cost:
        vectors, together = self.vectors(size.parameters), self.together
        products = self.curvature.product_cost(size, together).repeated(vectors / together)
        algebra = Cost(flops=4.0 * vectors**2 * size.parameters, bytes=self._bytes(size.parameters, size.number_bytes))
        return products + algebra

    def product_cost(self, size: ProblemSize, vectors: Amount) -> Cost:
        return Cost(flops=4.0 * self.rank * size.parameters * vectors)

    @abstractmethod
    def _bytes(self, parameters: int, number_bytes: int) -> int:
        """What all directions take while they are looked for."""

    def _check(self, derivatives: Derivatives, form: Form, budget: Budget) -> Tensor:
        """Refuse a form, rank or memory that cannot be; give a tensor of the model's type and device."""
        self.require(form)
        size, name = derivatives.space.size, type(self).__name__
        like = derivatives.space.like(derivatives.problem.model)
        if self.rank > size:
            raise InvalidInput(
                f"{name}(rank={self.rank}) asks for more directions than there are parameters ({size:,}); "
                f"use at most {size:,}, or exact()."
            )
        wanted = self._bytes(size, like.element_size())
        budget.check(wanted, f"Directions for {name}(rank={self.rank})", "use a smaller rank, or CG()")
        return like

    def _operator(self, derivatives: Derivatives, pairs: Eigenpairs, notes: tuple[str, ...]) -> LowRank:
        # Where the complement is everything that can be said of, zero is the smallest eigenvalue there is.
        rest = max(0.0, float(pairs.values.abs().min())) if self.complement == "smallest" else 0.0
        values = pairs.values.to(pairs.vectors.device)
        return LowRank.of(derivatives.space, pairs.vectors, values, rest, self.drops_directions, notes)


@final
@dataclass(frozen=True, repr=False)
class Arnoldi(AbstractLowRank):
    r"""C restricted to its `rank` eigenvectors of largest |eigenvalue|: x = V (V^T C V + lambda)^-1 V^T b.

    Args:
        rank: how many directions are kept, at most P.
        curvature: whose products are taken; `Hessian()` as in the paper, or `GGN()`, `Fisher()`, `EmpiricalFisher()`.
        steps: how many products with one vector; `None`: until the directions are found, at most 4 rank + 64.
            More than `rank`, and rounded up to whole blocks.
        complement: what C is across the directions. `"zero"`: zero, so that the inverse is 1 / lambda there;
            `"smallest"`: the smallest |eigenvalue| kept, for use as a preconditioner; `"dropped"`: the inverse is zero
            there, as in the paper, which throws low-curvature directions away (linear datamodelling score .31 instead
            of .80 on logistic regression over MNIST) and makes the reported residual the share of b that was dropped.
        width: vectors pushed through the data together; a repeated eigenvalue is seen up to `width` times at once.
        seed: of the first vectors, from a generator of its own.

    `Relative()` damping is a share of this matrix's own trace / P, which misses what C holds across the directions.
    Lanczos with full reorthogonalisation, so Arnoldi's iteration for a symmetric matrix. Negative eigenvalues of the
    Hessian are kept; `Spectral()` refuses to invert where damping does not outweigh them. Cost: `steps` curvature
    products, `width` at a time; memory (steps + rank) x P numbers.

    Raises `InvalidInput` for a curvature without products; when fitted, for a rank above P, and `TooLarge`.

    Reference: Schioppa et al. (2022), "Scaling Up Influence Functions"; Lanczos (1950).

    >>> Arnoldi(20, GGN()).rank
    20
    """

    rank: int
    curvature: AbstractCurvature = field(default_factory=Hessian)
    steps: int | None = None
    complement: Complement = "zero"
    width: int = 8
    seed: int = 0

    def __post_init__(self) -> None:
        _check_options(self, "GGN() or Hessian()")
        if self.steps is not None:
            whole_number("steps", self.steps, owner=self)
            if self.steps < self.rank:
                raise InvalidInput(
                    f"Arnoldi(rank={self.rank}, steps={self.steps}) cannot find {self.rank} directions with fewer "
                    "products; use twice the rank, or None."
                )
        whole_number("width", self.width, owner=self)

    def of(self, derivatives: Derivatives, form: Form, budget: Budget) -> AbstractSymmetric:
        like = self._check(derivatives, form, budget)
        inner = self.curvature.of(derivatives, Form.IMPLICIT, budget)
        pairs = leading_eigenpairs(inner, self.rank, self.steps, self.width, self.seed, like.dtype, like.device)
        return self._operator(derivatives, pairs, _describe_rough(self, pairs))

    def vectors(self, parameters: int) -> int:
        return min(parameters, (self.steps or default_steps(parameters, self.rank)) + self.width)

    @property
    def together(self) -> int:
        return self.width

    def _bytes(self, parameters: int, number_bytes: int) -> int:
        return (self.vectors(parameters) + self.rank) * parameters * number_bytes


@final
@dataclass(frozen=True, repr=False)
class Nystrom(AbstractLowRank):
    r"""The randomised Nystrom approximation C O^T (O C O^T)^+ O C from `rank` random directions O: one pass.

    Args:
        rank: how many directions, at most P.
        curvature: whose products are taken; positive semidefinite: `GGN()`, `Fisher()` or `EmpiricalFisher()`.
        seed: of the directions, from a generator of its own.
        complement: what C is across the directions. `"zero"`: the approximation itself, whose inverse is 1 / lambda
            there; `"smallest"`: the smallest eigenvalue kept, the preconditioner of Frangella et al. up to its scale;
            `"dropped"`: the inverse is zero there.

    Never exceeds C in any direction, so the eigenvalues are underestimates. As a curvature it is an approximation; as
    `preconditioner=Nystrom(rank)` of `CG` the answer is exact whatever the rank, and a spectrum that decays is solved
    in fewer steps: on a 64-48-10 perceptron over scikit-learn's digits (N = 600, 5 queries, residual 1e-4) rank 50
    takes 17 steps instead of 70 at a damping of one mean eigenvalue and 49 instead of 217 at a tenth of it; with
    `complement="smallest"` 18 and 54. Both bound the condition number by about 1 + |C - approximation| / lambda.
    Cost: `rank` products in one pass over the data; memory 3 x rank x P numbers in float64.

    Raises `InvalidInput` for `Hessian()`, which may be indefinite, or a curvature without products; when fitted, for a
    rank above P, `TooLarge`, and `SolveFailed` when what is met is indefinite after all.

    References: Frangella, Tropp & Udell (2021), "Randomized Nystrom Preconditioning"; Tropp et al. (2017).

    >>> Nystrom(50).curvature
    GGN()
    """

    rank: int
    curvature: AbstractCurvature = field(default_factory=GGN)
    seed: int = 0
    complement: Complement = "zero"

    def __post_init__(self) -> None:
        _check_options(self, "GGN()")
        if not self.curvature.semidefinite:
            raise InvalidInput(
                f"Nystrom(curvature={self.curvature!r}) needs a positive semidefinite curvature, which this one need "
                f"not be; use GGN(), or Arnoldi(rank, {self.curvature!r})."
            )

    def of(self, derivatives: Derivatives, form: Form, budget: Budget) -> AbstractSymmetric:
        like = self._check(derivatives, form, budget)
        inner = self.curvature.of(derivatives, Form.IMPLICIT, budget)
        pairs = nystrom_pairs(inner, self.rank, self.seed, like.dtype, like.device)
        return self._operator(derivatives, pairs, ())

    def vectors(self, parameters: int) -> int:
        return self.rank

    @property
    def together(self) -> int:
        return self.rank

    def _bytes(self, parameters: int, number_bytes: int) -> int:
        return 3 * 8 * self.rank * parameters


def _describe_rough(spec: Arnoldi, pairs: Eigenpairs) -> tuple[str, ...]:
    """In words, the directions that have not been found."""
    scale = float(pairs.values.abs().max())
    rough = pairs.residuals > _ROUGH * scale
    if not bool(rough.any()):
        return ()
    note = (
        f"{int(rough.sum())} of the {spec.rank} directions of Arnoldi are rough after {pairs.products} products "
        f"(residual up to {float(pairs.residuals.max()) / scale:.1e} of the largest eigenvalue); raise steps."
    )
    log.info(note)
    return (note,)


def _check_options(spec: Any, instead: str) -> None:
    name = type(spec).__name__
    whole_number("rank", spec.rank, owner=spec)
    inner: Any = spec.curvature
    if isinstance(inner, type):
        raise InvalidInput(f"{name}(curvature=) is the class {inner.__name__}; write {inner.__name__}(), an instance.")
    if not isinstance(inner, AbstractCurvature) or Form.IMPLICIT not in inner.forms:
        raise InvalidInput(f"{name}(curvature={inner!r}) has no products to take directions from; use {instead}.")
    choice("complement", spec.complement, _COMPLEMENTS, owner=spec)
