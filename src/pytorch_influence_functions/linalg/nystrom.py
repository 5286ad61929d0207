"""Eigenpairs of a positive semidefinite operator from one product with random directions: randomised Nystrom."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from ..core.errors import NonFinite, SolveFailed
from .lanczos import Eigenpairs, orthonormal_rows
from .operator import AbstractOperator, apply_flat


def sketch(size: int, rank: int, seed: int) -> Float[Tensor, "k p"]:
    """Random orthonormal rows, float64: the directions a Nystrom approximation looks along."""
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randn(size, rank, generator=generator, dtype=torch.float64)
    return orthonormal_rows(drawn.T)


def nystrom_pairs(
    operator: AbstractOperator, rank: int, seed: int, dtype: torch.dtype, device: torch.device
) -> Eigenpairs:
    """(C O^T) (O C O^T)^-1 (O C) for random orthonormal rows O [rank, P], as eigenpairs: one product with `rank` rows.

    The stabilising shift of Tropp et al. (2017, Algorithm 3) and Frangella et al. (2021): nu = sqrt(P) eps |C O|
    is added before the Cholesky factor and taken off the eigenvalues after. The result never exceeds C.

    Raises:
        SolveFailed: O C O^T is not positive semidefinite beyond rounding.
        NonFinite: the product is not finite.
    """
    directions = sketch(operator.size, rank, seed).to(device=device)
    rounded = apply_flat(operator, directions.to(dtype))
    if not bool(torch.isfinite(rounded).all()):
        raise NonFinite("The curvature's product holds NaN or infinity; look for them in weights, data or loss.")
    products = rounded.double()
    norm = float(products.norm())
    if norm == 0.0:
        zeros = products.new_zeros(rank).cpu()
        return Eigenpairs(zeros, directions.to(dtype), zeros, rank)
    # The sketch went through the product rounded to the model's precision.
    nu = operator.size**0.5 * torch.finfo(dtype).eps * norm
    for _ in range(4):
        shifted = products + nu * directions
        core = shifted @ directions.T
        factor, info = torch.linalg.cholesky_ex((core + core.T) / 2)
        if not int(info):
            root = torch.linalg.solve_triangular(factor, shifted, upper=False)
            _, sizes, vectors = torch.linalg.svd(root, full_matrices=False)
            values = (sizes.square() - nu).clamp_min(0.0)
            return Eigenpairs(values.cpu(), vectors.to(dtype), torch.full_like(values, float("nan")).cpu(), rank)
        nu *= 10.0
    raise SolveFailed(
        "The curvature along random directions is not positive semidefinite, which Nystrom(...) needs; use GGN() or "
        "EmpiricalFisher(), or Arnoldi(...) for an indefinite one."
    )
