"""The directions that matter most to an operator, from products alone: block Lanczos and randomised Nystrom."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from ..core.errors import NonFinite, SolveFailed
from .operator import AbstractOperator

# A Ritz pair whose residual is this share of the largest eigenvalue counts as found.
_FOUND = {torch.float64: 1e-8, torch.float32: 1e-4}
# Blocks spent, once all pairs are found, on looking for copies of a repeated eigenvalue.
_SECOND_LOOK = 3


class Pairs(NamedTuple):
    """Approximate eigenpairs: `values` [k] float64, `vectors` [k, P] orthonormal rows, |C v - value v| [k]."""

    values: Float[Tensor, " k"]
    vectors: Float[Tensor, "k p"]
    residuals: Float[Tensor, " k"]
    products: int


def default_steps(size: int, rank: int) -> int:
    """How many products block Lanczos may take unless it is told."""
    return min(size, 4 * rank + 64)


@dataclass(eq=False)
class BlockLanczos:
    """The `rank` eigenpairs of largest |eigenvalue|, from both ends of the spectrum, by Lanczos on blocks of vectors.

    All `width` vectors of a block go through one product. Every new block is made orthogonal to all before, twice; the
    projected matrix is the explicit V C V^T, so the pairs are Ritz pairs whatever became of the recurrence. When a
    block loses rank (an invariant subspace: repeated eigenvalues, or fewer distinct ones than asked for), fresh random
    directions orthogonal to all before take the lost ones' place.

    Without `steps` it stops when all pairs are found *and* a fresh random block beside them changes nothing, which
    finds repeated eigenvalues that one Krylov space cannot see; at most `default_steps` products. Memory: products x P
    numbers. Own generator: the global one is never touched.
    """

    operator: AbstractOperator
    rank: int
    steps: int | None
    width: int
    seed: int
    dtype: torch.dtype
    device: torch.device
    basis: Tensor = field(init=False)
    small: Tensor = field(init=False)
    used: int = 0

    def __post_init__(self) -> None:
        p = self.operator.size
        self.width = min(self.width, p)
        wanted = default_steps(p, self.rank) if self.steps is None else max(self.steps, self.rank)
        room = min(p, -(-wanted // self.width) * self.width)
        self.basis = torch.zeros(room, p, dtype=self.dtype, device=self.device)
        self.small = torch.zeros(room, room, dtype=torch.float64)
        self.generator = torch.Generator().manual_seed(self.seed)

    def run(self) -> Pairs:
        """Products until the pairs are found or the steps are spent."""
        block = self._orthonormal(self._fresh(self.width))
        looks, before = 0, None
        while True:
            left = self._take(block)
            values, turns, residuals = self._ritz(left, len(block))
            if self.used == len(self.basis):
                break
            fresh = 0
            if self.steps is None and self._found(values, residuals):
                same = before is not None and bool(torch.allclose(before, values, rtol=1e-6, atol=0.0))
                looks = looks + 1 if same else 0
                if looks >= _SECOND_LOOK:
                    break
                fresh = 0 if same else self.width
                before = values
            following = self._next(left, fresh)
            if following is None:
                break
            block = following
        vectors = turns.T.to(self.basis) @ self.basis[: self.used]
        return Pairs(values, vectors, residuals, self.used)

    def _take(self, block: Tensor) -> Tensor:
        """One product with a block: the projected matrix grows, and what lies outside the basis is given back."""
        start, self.used = self.used, self.used + len(block)
        self.basis[start : self.used] = block
        seen = self.basis[: self.used]
        moved = self.operator.apply(self.operator.space.rows(block)).flat()
        if not bool(torch.isfinite(moved).all()):
            raise NonFinite("The curvature's product holds NaN or infinity; look for them in weights, data or loss.")
        column = (seen @ moved.T).double().cpu()
        self.small[: self.used, start : self.used] = column
        self.small[start : self.used, : self.used] = column.T
        here = self.small[start : self.used, start : self.used]
        self.small[start : self.used, start : self.used] = (here + here.T.clone()) / 2
        return self._outside(moved)

    def _ritz(self, left: Tensor, last: int) -> tuple[Tensor, Tensor, Tensor]:
        """The pairs of largest |value| as (values, coefficients in the basis, residuals): only `left` is outside."""
        values, turns = torch.linalg.eigh(self.small[: self.used, : self.used])
        top = values.abs().argsort(descending=True, stable=True)[: self.rank]
        values, turns = values[top], turns[:, top]
        tail = turns[self.used - last :]
        outside = (left @ left.T).double().cpu()
        return values, turns, ((outside @ tail) * tail).sum(0).clamp_min(0.0).sqrt()

    def _found(self, values: Tensor, residuals: Tensor) -> bool:
        share = _FOUND.get(self.dtype, 1e-3)
        return len(values) == self.rank and bool((residuals <= share * values.abs().max()).all())

    def _next(self, left: Tensor, fresh: int) -> Tensor | None:
        """An orthonormal basis of what is outside, what it lacks in rank made up with random directions.

        None when there is no room for all of it: leaving some out would make the residuals too rosy.
        """
        _, sizes, directions = torch.linalg.svd(left, full_matrices=False)
        scale = float(self.small[: self.used, : self.used].abs().max())
        kept = directions[sizes > 100 * torch.finfo(self.dtype).eps * scale]
        room = len(self.basis) - self.used
        if len(kept) > room and len(self.basis) < self.basis.shape[1]:
            return None
        wanted = min(room, max(self.width, len(kept)) + fresh)
        made = torch.cat([kept, self._fresh(max(0, wanted - len(kept)))])[:wanted]
        return self._orthonormal(made)

    def _fresh(self, n: int) -> Tensor:
        made = torch.randn(n, self.basis.shape[1], generator=self.generator, dtype=torch.float64)
        unit: Tensor = made / made.norm(dim=1, keepdim=True)
        return unit.to(self.basis)

    def _outside(self, rows: Tensor) -> Tensor:
        seen = self.basis[: self.used]
        for _ in range(2):
            rows = rows - (rows @ seen.T) @ seen
        return rows

    def _orthonormal(self, rows: Tensor) -> Tensor:
        for _ in range(2):
            rows = _orthonormal_rows(self._outside(rows))
        return rows


def _orthonormal_rows(rows: Tensor) -> Tensor:
    q, _ = torch.linalg.qr(rows.T)
    made: Tensor = q.T.contiguous()
    return made


def sketch(size: int, rank: int, seed: int) -> Float[Tensor, "k p"]:
    """Random orthonormal rows, float64: the directions a Nystrom approximation looks along."""
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randn(size, rank, generator=generator, dtype=torch.float64)
    return _orthonormal_rows(drawn.T)


def nystrom(operator: AbstractOperator, rank: int, seed: int, dtype: torch.dtype, device: torch.device) -> Pairs:
    """(C O^T) (O C O^T)^-1 (O C) for random orthonormal rows O [rank, P], as eigenpairs: one product with `rank` rows.

    The stabilising shift of Tropp et al. (2017, Algorithm 3) and Frangella et al. (2021): nu = sqrt(P) eps |C O|
    is added before the Cholesky factor and taken off the eigenvalues after. The result never exceeds C.

    Raises:
        SolveFailed: O C O^T is not positive semidefinite beyond rounding.
        NonFinite: the product is not finite.
    """
    o = sketch(operator.size, rank, seed).to(device=device)
    moved = operator.apply(operator.space.rows(o.to(dtype))).flat()
    if not bool(torch.isfinite(moved).all()):
        raise NonFinite("The curvature's product holds NaN or infinity; look for them in weights, data or loss.")
    y = moved.double()
    norm = float(y.norm())
    if norm == 0.0:
        return Pairs(y.new_zeros(rank).cpu(), o.to(dtype), y.new_zeros(rank).cpu(), rank)
    # The sketch went through the product rounded to the model's precision.
    nu = operator.size**0.5 * torch.finfo(dtype).eps * norm
    for _ in range(4):
        shifted = y + nu * o
        core = shifted @ o.T
        factor, info = torch.linalg.cholesky_ex((core + core.T) / 2)
        if not int(info):
            b = torch.linalg.solve_triangular(factor, shifted, upper=False)
            _, sizes, vectors = torch.linalg.svd(b, full_matrices=False)
            values = (sizes.square() - nu).clamp_min(0.0)
            return Pairs(values.cpu(), vectors.to(dtype), torch.full_like(values, float("nan")).cpu(), rank)
        nu *= 10.0
    raise SolveFailed(
        "The curvature along random directions is not positive semidefinite, which Nystrom(...) needs; use GGN() or "
        "EmpiricalFisher(), or Arnoldi(...) for an indefinite one."
    )
