"""Symmetric eigendecompositions that are checked before anyone relies on them."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from ..core.digest import digest
from ..core.errors import NonFinite, SolveFailed

log = logging.getLogger("pytorch_influence_functions")

# The largest relative error of a decomposition that is accepted: far above the rounding of the type in which it is
# computed (1e-15 and, for matrices of up to 1,600, 2e-6), far below a wrong one.
_TOLERANCES = {torch.float64: 1e-8, torch.float32: 3e-5}
# The shortest side for which single precision is worth it, which takes half the time from 400 on.
SINGLE_FROM = 256


def eigh(
    matrix: Float[Tensor, "d d"], what: str = "the matrix", single: bool = False
) -> tuple[Float[Tensor, " d"], Float[Tensor, "d d"]]:
    """Eigenvalues (ascending, float64) and eigenvectors (columns) of a symmetric matrix, in the type they came from.

    LAPACK's divide and conquer fails to converge on some matrices, and some builds return a wrong result without an
    error. Every result is therefore verified with random vectors (two products), and another algorithm is tried when
    it is wrong.

    Args:
        matrix: the matrix.
        what: what it is called in a message.
        single: compute in float32 where the matrix is long and no finer itself, as a sum in float32 is not: its own
            rounding is then as large as that of the decomposition, which takes half the time.

    Raises:
        NonFinite: the matrix holds NaN or infinity.
        SolveFailed: no algorithm gave a correct decomposition.
    """
    low, high = (float(end) for end in torch.aminmax(matrix)) if matrix.numel() else (0.0, 0.0)
    scale = max(-low, high)
    if not math.isfinite(scale):
        raise NonFinite(f"The curvature of {what} holds NaN or infinity; look for them in weights, data or loss.")
    if scale == 0.0:
        zeros = matrix.new_zeros(len(matrix), dtype=torch.float64)
        return zeros, torch.eye(len(matrix), dtype=torch.float64, device=matrix.device)
    algorithms = [(name, torch.float64, algorithm) for name, algorithm in _ALGORITHMS.items()]
    if single and len(matrix) >= SINGLE_FROM and matrix.dtype != torch.float64:
        algorithms.insert(0, ("torch.linalg.eigh in float32", torch.float32, torch.linalg.eigh))
    for name, dtype, algorithm in algorithms:
        # In the type of the algorithm: copies of a long side in float64 take a third of what decomposing it does.
        unit = matrix.to(dtype) / scale
        unit = (unit + unit.T).div_(2)
        try:
            values, vectors = algorithm(unit)
        except (RuntimeError, np.linalg.LinAlgError) as reason:
            log.info("%s failed on %s: %s", name, what, str(reason).splitlines()[0][:120])
            continue
        if is_decomposition(unit, values, vectors, _TOLERANCES[dtype]):
            return values.double() * scale, vectors
        log.info("%s gave a wrong decomposition of %s.", name, what)
    raise SolveFailed(
        f"The eigendecomposition of {what} ({len(matrix)} x {len(matrix)}) failed by every algorithm; "
        "scale the inputs of this layer, or leave it out with parameters=."
    )


@dataclass(eq=False)
class Decompositions:
    """Decompositions that are the same in several fits: of a layer's inputs, where those do not depend on the weights.

    While `in_use` is open, `eigh_shared` computes the decomposition of a matrix that came before under the same name
    once. Only matrices that came twice in a row are kept with their decomposition.
    """

    _digests: dict[str, str] = field(default_factory=dict)
    _kept: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)

    @contextmanager
    def in_use(self) -> Iterator[None]:
        """Share within this block."""
        token = _shared.set(self)
        try:
            yield
        finally:
            _shared.reset(token)

    def find(self, matrix: Tensor, what: str, single: bool = False) -> tuple[Tensor, Tensor]:
        """Eigenvalues and eigenvectors of a matrix, computed or kept."""
        identity = digest(matrix)
        again, self._digests[what] = self._digests.get(what) == identity, identity
        if not again:
            self._kept.pop(what, None)
            return eigh(matrix, what, single)
        if what not in self._kept:
            self._kept[what] = eigh(matrix, what, single)
        return self._kept[what]


_shared: ContextVar[Decompositions | None] = ContextVar("shared decompositions", default=None)


def eigh_shared(
    matrix: Float[Tensor, "d d"], what: str, single: bool = False
) -> tuple[Float[Tensor, " d"], Float[Tensor, "d d"]]:
    """`eigh`, where a block of `Decompositions` is open with what is known there."""
    known = _shared.get()
    return eigh(matrix, what, single) if known is None else known.find(matrix, what, single)


def is_decomposition(matrix: Tensor, values: Tensor, vectors: Tensor, tolerance: float = 1e-8) -> bool:
    """Whether Q^T Q = I and A Q = Q diag(lam), tested on random vectors in the type of the matrix."""
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(len(matrix), 2, generator=generator, dtype=torch.float64).to(matrix)
    rotated = vectors @ z
    orthonormal = (vectors.T @ rotated - z).norm() <= tolerance * z.norm()
    diagonal = (matrix @ rotated - vectors @ (values[:, None] * z)).norm() <= tolerance * z.norm() * matrix.norm()
    return bool(orthonormal & diagonal)


def _by_numpy(matrix: Tensor) -> tuple[Tensor, Tensor]:
    values, vectors = np.linalg.eigh(matrix.cpu().numpy())
    return torch.from_numpy(values).to(matrix), torch.from_numpy(vectors).to(matrix)


def _by_svd(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Shifted to be positive definite, where singular values are eigenvalues."""
    shift = float(matrix.norm())
    eye = torch.eye(len(matrix), dtype=matrix.dtype, device=matrix.device)
    vectors, values, _ = torch.linalg.svd(matrix + shift * eye)
    return values.flip(0) - shift, vectors.flip(1)


_ALGORITHMS: dict[str, Callable[[Tensor], tuple[Tensor, Tensor]]] = {
    "torch.linalg.eigh": torch.linalg.eigh,
    "numpy.linalg.eigh": _by_numpy,
    "torch.linalg.svd": _by_svd,
}
