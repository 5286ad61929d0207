"""What products alone tell of a spectrum: both ends, its density, its leading eigenpairs. One block recurrence.

| function | starts from | gives |
|---|---|---|
| `estimate_extremes` | one random direction | the largest and the smallest eigenvalue |
| `estimate_density` | random signs, all probes in one block | trace f(C) for every f, with standard errors |
| `leading_eigenpairs` | a random block, renewed where it loses rank | eigenpairs of largest absolute eigenvalue |

Own generators: the global one is never touched.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from ..core.distributed import current
from ..core.errors import InvalidInput, NonFinite
from ..core.validate import whole_number
from .density import Density
from .operator import AbstractOperator, apply_flat

# A Ritz pair whose residual is this share of the largest eigenvalue has converged.
_CONVERGED = {torch.float64: 1e-8, torch.float32: 1e-4}
# Blocks spent, once all pairs have converged, on looking for copies of a repeated eigenvalue.
_CONFIRMATIONS = 3
# A direction shorter than this many units of rounding, beside the largest entry of V C V^T, is rounding.
_ROUNDING = 100
# Numbers that the Lanczos vectors of all probes may take.
_LARGEST_BASIS = 1 << 28


class Extremes(NamedTuple):
    """Estimates of both ends of a spectrum: `largest` from below, `smallest` from above."""

    largest: float
    smallest: float


class Eigenpairs(NamedTuple):
    """Approximate eigenpairs: `values` [k] float64, `vectors` [k, P] orthonormal rows, |C v - value v| [k]."""

    values: Float[Tensor, " k"]
    vectors: Float[Tensor, "k p"]
    residuals: Float[Tensor, " k"]
    products: int


@dataclass(eq=False)
class BlockLanczos:
    """Orthonormal rows V and the projected matrix V C V^T, which grow by a block of rows at a time (Lanczos 1950).

    All rows of a block go through one product. Every new block is made orthogonal to all before it, twice; the
    projected matrix holds the explicit inner products, so its eigenvalues are Ritz values and lie inside the spectrum
    of C whatever became of the recurrence. Memory: as many vectors of P numbers as there is room for.
    """

    operator: AbstractOperator
    basis: Float[Tensor, "room p"]
    projected: Float[Tensor, "room room"]
    used: int = 0

    @staticmethod
    def with_room(
        operator: AbstractOperator, vectors: int, dtype: torch.dtype, device: torch.device | str
    ) -> BlockLanczos:
        """An empty basis with room for `vectors`, or for P where that is less."""
        room = min(vectors, operator.size)
        basis = torch.zeros(room, operator.size, dtype=dtype, device=device)
        return BlockLanczos(operator, basis, torch.zeros(room, room, dtype=torch.float64))

    @property
    def room(self) -> int:
        """How many more vectors the basis can take."""
        return len(self.basis) - self.used

    @property
    def projection(self) -> Float[Tensor, "k k"]:
        """V C V^T for the vectors so far, in float64 on the CPU."""
        return self.projected[: self.used, : self.used]

    def expand(self, block: Float[Tensor, "w p"]) -> Float[Tensor, "w p"]:
        """Add orthonormal rows that are orthogonal to the basis; gives the part of C times them outside of it."""
        start, self.used = self.used, self.used + len(block)
        self.basis[start : self.used] = block
        vectors = self.basis[: self.used]
        products = apply_flat(self.operator, block)
        if not bool(torch.isfinite(products).all()):
            raise NonFinite("The curvature's product holds NaN or infinity; look for them in weights, data or loss.")
        coefficients = products @ vectors.T
        column = coefficients.T.double().cpu()
        column[start:] = (column[start:] + column[start:].T.clone()) / 2
        self.projected[: self.used, start : self.used] = column
        self.projected[start : self.used, : self.used] = column.T
        return self.outside(products - coefficients @ vectors)

    def outside(self, rows: Float[Tensor, "w p"]) -> Float[Tensor, "w p"]:
        """The part of every row that is orthogonal to the basis."""
        vectors = self.basis[: self.used]
        return rows - (rows @ vectors.T) @ vectors

    def directions(self, outside: Float[Tensor, "w p"]) -> Float[Tensor, "k p"]:
        """Orthonormal rows that span what `expand` found outside the basis, without what is only rounding."""
        q, r = torch.linalg.qr(outside.T)
        _, sizes, turns = torch.linalg.svd(r.T.cpu().double())
        scale = float(self.projection.abs().max())
        # Processes that share the products take blocks of one width.
        kept = turns[current().decided(sizes > _ROUNDING * torch.finfo(self.basis.dtype).eps * scale)]
        return self.orthonormalise(kept.to(q) @ q.T)

    def orthonormalise(self, rows: Float[Tensor, "w p"]) -> Float[Tensor, "w p"]:
        """The rows made orthogonal to the basis and to each other."""
        if not len(rows):
            return rows
        for _ in range(2):
            rows = orthonormal_rows(self.outside(rows))
        return rows

    def run(self, block: Float[Tensor, "w p"]) -> None:
        """Expand by the block, by C times it and so on, until the room is used or nothing new comes."""
        while 0 < len(block) <= self.room:
            block = self.directions(self.expand(block))


def estimate_extremes(
    operator: AbstractOperator,
    steps: int = 20,
    seed: int = 0,
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> Extremes:
    """Largest and smallest eigenvalue of a symmetric operator from `steps` products with one vector.

    The estimates are Ritz values: `largest <= lambda_max`, `smallest >= lambda_min`. `dtype` and `device` are those of
    the model.

    Raises `NonFinite` for a product that is not finite.

    >>> estimate_extremes(operator)  # doctest: +SKIP
    Extremes(largest=2.03, smallest=0.0001)
    """
    lanczos = BlockLanczos.with_room(operator, steps, dtype, device)
    lanczos.run(lanczos.orthonormalise(_random_rows(1, lanczos.basis, torch.Generator().manual_seed(seed))))
    values = torch.linalg.eigvalsh(lanczos.projection)
    return Extremes(float(values[-1]), float(values[0]))


def estimate_density(
    operator: AbstractOperator,
    steps: int = 30,
    probes: int = 8,
    seed: int = 0,
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> Density:
    """Stochastic Lanczos quadrature: block Gauss quadrature of z^T f(C) z for random signs z, from `steps` products of
    all probes at once.

    Full reorthogonalisation, so memory is probes x steps x P numbers; f(C) is exact for polynomials up to degree
    2 steps - 1. Standard errors come from the spread over probes; the quadrature's own error is not in them.

    Raises `InvalidInput` for fewer than two probes, no step, or vectors that would not fit; `NonFinite` for a product
    that is not finite.

    References: Ubaru, Chen & Saad (2017), "Fast estimation of tr(f(A)) via stochastic Lanczos quadrature"; Golub &
    Meurant (1994) for blocks.
    """
    size = operator.size
    whole_number("probes", probes, 2, owner="spectrum")
    whole_number("steps", steps, owner="spectrum")
    numbers = probes * min(steps, size) * size
    if numbers > _LARGEST_BASIS:
        raise InvalidInput(
            f"{probes} probes x {min(steps, size)} steps over {size:,} parameters make {numbers:,} numbers, more than "
            f"{_LARGEST_BASIS:,}; use fewer probes or steps."
        )
    generator = torch.Generator().manual_seed(seed)
    signs = 2 * torch.randint(0, 2, (probes, size), generator=generator, dtype=torch.int8) - 1
    lanczos = BlockLanczos.with_room(operator, probes * steps, dtype, device)
    probe_rows = signs.to(lanczos.basis)
    first = orthonormal_rows(probe_rows)
    lanczos.run(first)
    values, turns = torch.linalg.eigh(lanczos.projection)
    # Every probe lies in the first block, so its coordinates along the Ritz vectors are those of that block.
    coordinates = (probe_rows @ first.T).double().cpu() @ turns[: len(first)]
    return Density(values.repeat(probes, 1), coordinates.square(), exact=False)


def default_steps(size: int, rank: int) -> int:
    """How many products `leading_eigenpairs` may take unless it is told."""
    return min(size, 4 * rank + 64)


def leading_eigenpairs(
    operator: AbstractOperator,
    rank: int,
    steps: int | None,
    width: int,
    seed: int,
    dtype: torch.dtype,
    device: torch.device,
) -> Eigenpairs:
    """The `rank` eigenpairs of largest |eigenvalue|, from both ends of the spectrum, from `width` products at a time.

    When a block loses rank (an invariant subspace: repeated eigenvalues, or fewer distinct ones than asked for), fresh
    random directions orthogonal to all before take the place of the lost ones. Without `steps` it stops when all pairs
    have converged *and* fresh random directions beside them change nothing, which finds repeated eigenvalues that one
    Krylov space cannot see; at most `default_steps` products. Memory: products x P numbers.

    Raises `NonFinite` for a product that is not finite.
    """
    size, width = operator.size, min(width, operator.size)
    products = default_steps(size, rank) if steps is None else max(steps, rank)
    lanczos = BlockLanczos.with_room(operator, -(-products // width) * width, dtype, device)
    generator = torch.Generator().manual_seed(seed)
    block: Tensor | None = lanczos.orthonormalise(_random_rows(width, lanczos.basis, generator))
    confirmations, previous = 0, None
    while block is not None:
        outside = lanczos.expand(block)
        values, turns, residuals = _ritz_pairs(lanczos.projection, outside, rank)
        fresh = 0
        if steps is None and len(values) == rank and _have_converged(values, residuals, dtype):
            unchanged = previous is not None and current().decides(
                torch.allclose(previous, values, rtol=1e-6, atol=0.0)
            )
            confirmations = confirmations + 1 if unchanged else 0
            if confirmations >= _CONFIRMATIONS:
                break
            fresh = 0 if unchanged else width
            previous = values
        block = _next_block(lanczos, lanczos.directions(outside), width, fresh, generator)
    vectors = turns.T.to(lanczos.basis) @ lanczos.basis[: lanczos.used]
    return Eigenpairs(values, vectors, residuals, lanczos.used)


def _ritz_pairs(projection: Tensor, outside: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """The pairs of largest |value|: values, coefficients in the basis, and residuals, which lie all in `outside`."""
    values, turns = torch.linalg.eigh(projection)
    top = values.abs().argsort(descending=True, stable=True)[:rank]
    values, turns = values[top], turns[:, top]
    last = turns[len(projection) - len(outside) :]
    products = (outside @ outside.T).double().cpu()
    return values, turns, ((products @ last) * last).sum(0).clamp_min(0.0).sqrt()


def _have_converged(values: Tensor, residuals: Tensor, dtype: torch.dtype) -> bool:
    converged = (residuals <= _CONVERGED.get(dtype, 1e-3) * values.abs().max()).all()
    return bool(current().decided(converged))


def _next_block(
    lanczos: BlockLanczos, directions: Tensor, width: int, fresh: int, generator: torch.Generator
) -> Tensor | None:
    """The directions with `fresh` random ones beside them, and as many more as they are fewer than `width`.

    None when there is no room for all directions: without some of them the residuals would look smaller than they are.
    """
    room = lanczos.room
    if not room or (len(directions) > room and len(lanczos.basis) < lanczos.operator.size):
        return None
    wanted = min(room, max(width, len(directions)) + fresh)
    random = _random_rows(max(0, wanted - len(directions)), lanczos.basis, generator)
    return lanczos.orthonormalise(torch.cat([directions, random])[:wanted])


def _random_rows(count: int, like: Tensor, generator: torch.Generator) -> Tensor:
    """Random unit rows as long as those of `like`."""
    drawn = torch.randn(count, like.shape[1], generator=generator, dtype=torch.float64)
    unit: Tensor = drawn / drawn.norm(dim=1, keepdim=True)
    return unit.to(like)


def orthonormal_rows(rows: Float[Tensor, "w p"]) -> Float[Tensor, "k p"]:
    """An orthonormal basis of the rows' span, rows as well; at most P of them."""
    q, _ = torch.linalg.qr(rows.T)
    basis: Tensor = q.T.contiguous()
    return basis


def power_iteration(product: Callable[[Tensor], Tensor], start: Tensor, steps: int) -> float:
    """The largest |eigenvalue| of a linear map, from below, after `steps` products; the map need not be symmetric."""
    vector, size = start, 0.0
    for _ in range(steps):
        vector = product(vector / vector.norm().clamp_min(torch.finfo(vector.dtype).tiny))
        size = float(vector.norm())
    return size
