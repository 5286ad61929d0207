"""The density of a spectrum: every eigenvalue where they are at hand, quadrature from products where they are not."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import final

import torch
from jaxtyping import Float
from torch import Tensor

from ..core.errors import InvalidInput, NonFinite
from .dense import Eigen, Matrix
from .diagonal import DiagonalOperator
from .gram import Gram
from .kronecker import Kronecker
from .low_rank import LowRank
from .operator import AbstractSymmetric, Identity

# Numbers that the Lanczos vectors of all probes may take.
_BASIS = 1 << 28


@final
@dataclass(frozen=True, eq=False)
class Density:
    """Eigenvalues with how many there are of each: `sum(f)` is trace f(C), exactly or by quadrature.

    Each row of `values` [r, k] and `weights` [r, k] is one estimate (one probe; r = 1 where exact), its weights summing
    to P. Both are float64.
    """

    values: Float[Tensor, "r k"]
    weights: Float[Tensor, "r k"]
    exact: bool

    def sum(self, f: Callable[[Tensor], Tensor]) -> tuple[float, float]:
        """trace f(C), and the standard error of that estimate: 0 where exact."""
        per = (f(self.values) * self.weights).sum(1)
        error = 0.0 if self.exact else float(per.std()) / len(per) ** 0.5
        return float(per.mean()), error

    @property
    def extremes(self) -> tuple[float, float]:
        """The smallest and the largest eigenvalue (where not exact: from inside)."""
        seen = self.values[self.weights > 0]
        return float(seen.min()), float(seen.max())


def known(operator: AbstractSymmetric) -> Density | None:
    """Every eigenvalue, where the operator has them or one decomposition gives them; None otherwise."""
    if isinstance(operator, Gram):
        found = operator.eigen()[0] / operator.count
        if len(found) > operator.size:
            # A Gram matrix larger than the space has zeros that are no eigenvalues of C.
            found = found.sort().values[-operator.size :]
        return _exact(found, zeros=operator.size - len(found))
    if isinstance(operator, Matrix):
        return _exact(operator.eigen().values)
    if isinstance(operator, (Eigen, DiagonalOperator)):
        return _exact(operator.values)
    if isinstance(operator, Kronecker):
        return _exact(operator.eigenvalues())
    if isinstance(operator, Identity):
        scales = operator.block_means()
        counts = [float(operator.space.numel(k)) for k in scales]
        return _weighted(torch.tensor(list(scales.values())), torch.tensor(counts))
    if isinstance(operator, LowRank):
        rests = [(s.rest, float(s.basis.shape[1] - s.basis.shape[0])) for s in operator.spans]
        rest, count = torch.tensor(rests, dtype=torch.float64).T
        ones = torch.ones(len(operator.values), dtype=torch.float64)
        return _weighted(torch.cat([operator.values.cpu(), rest]), torch.cat([ones, count]))
    return None


def _exact(values: Tensor, zeros: int = 0) -> Density:
    values = values.double().cpu().flatten()
    weights = torch.ones_like(values)
    if zeros:
        values, weights = torch.cat([values, values.new_zeros(1)]), torch.cat([weights, weights.new_tensor([zeros])])
    return _weighted(values, weights)


def _weighted(values: Tensor, weights: Tensor) -> Density:
    return Density(values.double()[None], weights.double()[None], exact=True)


def quadrature(
    operator: AbstractSymmetric,
    steps: int = 30,
    probes: int = 8,
    seed: int = 0,
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> Density:
    """Stochastic Lanczos quadrature: Gauss quadrature of z^T f(C) z for random signs z, from `steps` products of all
    probes at once.

    Full reorthogonalisation, so memory is probes x steps x P numbers; f(C) is exact for polynomials up to degree
    2 steps - 1. Standard errors come from the spread over probes; the quadrature's own error is not in them.

    Raises `InvalidInput` for fewer than two probes, no step, or vectors that would not fit; `NonFinite` for a product
    that is.

    Reference: Ubaru, Chen & Saad (2017), "Fast estimation of tr(f(A)) via stochastic Lanczos quadrature".
    """
    p = operator.size
    steps = min(steps, p)
    if probes < 2 or steps < 1:
        raise InvalidInput(f"The spectrum takes at least 2 probes and 1 step, got {probes} and {steps}.")
    if probes * steps * p > _BASIS:
        raise InvalidInput(
            f"{probes} probes x {steps} steps over {p:,} parameters make {probes * steps * p:,} numbers, more than "
            f"{_BASIS:,}; use fewer probes or steps."
        )
    generator = torch.Generator().manual_seed(seed)
    signs = 2 * torch.randint(0, 2, (probes, p), generator=generator, dtype=torch.int8) - 1
    v = signs.to(device=device, dtype=dtype) / p**0.5
    basis, tri = v.new_zeros(probes, steps, p), torch.zeros(probes, steps, steps, dtype=torch.float64)
    scale = torch.zeros(probes, dtype=torch.float64)
    for k in range(steps):
        basis[:, k] = v
        w = operator.apply(operator.space.rows(v)).flat()
        if not bool(torch.isfinite(w).all()):
            raise NonFinite("A product with the curvature holds NaN or infinity; look for them in weights or data.")
        tri[:, k, k] = (w * v).sum(1).double().cpu()
        for _ in range(2):
            w = w - torch.einsum("rkp,rk->rp", basis[:, : k + 1], torch.einsum("rkp,rp->rk", basis[:, : k + 1], w))
        beta = w.norm(dim=1).double().cpu()
        scale = torch.maximum(scale, torch.maximum(tri[:, k, k].abs(), beta))
        # A probe whose space is invariant has found all it can: from here on it only adds zeros of no weight.
        live = beta > 10 * torch.finfo(dtype).eps * scale
        if k + 1 == steps or not bool(live.any()):
            break
        tri[:, k, k + 1] = tri[:, k + 1, k] = torch.where(live, beta, torch.zeros_like(beta))
        v = torch.where(live[:, None].to(w.device), w / beta.clamp_min(1e-300)[:, None].to(w), torch.zeros_like(w))
    values, vectors = torch.linalg.eigh(tri)
    return Density(values, vectors[:, 0].square() * p, exact=False)
