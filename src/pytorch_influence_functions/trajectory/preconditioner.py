"""Adam's diagonal preconditioner P beside a curvature H, in the coordinates in which P H is symmetric.

A step of Adam is `theta -= lr * P * gradient`, so K of them survive as exp(-lr K (P H + D)) with D the decoupled decay.
That has the eigenvalues of the symmetric P^(1/2) H P^(1/2) + D.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import final

import torch
from jaxtyping import Float
from torch import Tensor

from ..linalg.dense import Eigen, Matrix
from ..linalg.kronecker import Kronecker
from ..linalg.operator import AbstractSpectral
from ..linalg.rows import Rows
from .segments import AdamState

# Below this share of a layer's largest eigenvalue a direction holds nothing but the rounding of float32, squared.
_NOTHING = 1e-12


class AbstractPreconditioner(ABC):
    """P, and what it makes of a curvature."""

    @property
    @abstractmethod
    def curvature(self) -> AbstractSpectral:
        """P^(1/2) H P^(1/2) + D."""

    @abstractmethod
    def between(self, operator: AbstractSpectral, rows: Rows, into: int, out: int) -> Rows:
        """P^(out/2) f P^(into/2) rows, where `operator` is a function f of `curvature`.

        Args:
            operator: the function.
            rows: what it is applied to.
            into: twice the power of P before it.
            out: twice the power of P after it.
        """

    @abstractmethod
    def scaled(self, rows: Rows, power: int) -> Float[Tensor, "n p"]:
        """P^(power/2) rows, written out."""


@final
@dataclass(frozen=True, eq=False)
class DensePreconditioner(AbstractPreconditioner):
    """P entry by entry beside a dense curvature: exact.

    Args:
        dense: P^(1/2) H P^(1/2) + D.
        root: P^(1/2), [P] in float64.
    """

    dense: Matrix
    root: Float[Tensor, " p"]

    @staticmethod
    def of(operator: Matrix | Eigen, adam: AdamState) -> DensePreconditioner:
        """From a curvature and Adam's state.

        Args:
            operator: H.
            adam: second moments, eps and decay.
        """
        matrix = operator.matrix if isinstance(operator, Matrix) else None
        if isinstance(operator, Eigen):
            matrix = (operator.vectors * operator.values) @ operator.vectors.T
        assert matrix is not None
        root, decay = (v.to(matrix) for v in (adam.root(operator.space), adam.decays(operator.space)))
        return DensePreconditioner(Matrix(operator.space, root[:, None] * matrix * root[None] + decay.diag()), root)

    @property
    def curvature(self) -> Matrix:
        return self.dense

    def between(self, operator: AbstractSpectral, rows: Rows, into: int, out: int) -> Rows:
        space, like = operator.space, rows.flat()
        product = operator.apply(space.rows(self.scaled(rows, into).to(like))).flat().double()
        return space.rows((product * self.root.to(product) ** out).to(like))

    def scaled(self, rows: Rows, power: int) -> Tensor:
        flat = rows.flat().double()
        return flat * self.root.to(flat) ** power


@final
@dataclass(frozen=True, eq=False)
class EigenbasisPreconditioner(AbstractPreconditioner):
    r"""P in the Kronecker eigenbasis of a layer's curvature, where it is taken as diagonal as well.

    Along an eigenvector q, P is one over the mean of what Adam divides by there, sum_p q_p^2 (sqrt(v_p) + eps). With
    Lambda the eigenvalues of H, P H then has the eigenvalues p_q Lambda_q. Exact where all weights of a layer have the
    same second moment.

    Averaging P itself would let weights that never had a gradient, whose P is 1 / eps, speak for all.

    Args:
        kronecker: P^(1/2) H P^(1/2) + D.
        values: P by block, 0 along directions that no training gradient has: what happens there moves no score.
    """

    kronecker: Kronecker
    values: Mapping[str, Float[Tensor, "o i"]]

    @staticmethod
    def of(operator: Kronecker, adam: AdamState) -> EigenbasisPreconditioner:
        """From a curvature and Adam's state.

        Args:
            operator: H.
            adam: second moments, eps and decay.

        Raises:
            InvalidInput: as `AdamState.denominators`.
        """
        space = operator.space
        denominators = operator.diagonal_in_basis(adam.denominators(space))
        decays = operator.diagonal_in_basis(space.rows(adam.decays(space)[None]))
        values = {}
        for name, block in operator.blocks.items():
            seen = block.values > _NOTHING * block.values.max()
            inverse = 1.0 / denominators[name]
            values[name] = torch.where(seen, inverse, torch.zeros_like(inverse))
        kronecker = operator.map_values(lambda name, lam: values[name] * lam + decays[name])
        return EigenbasisPreconditioner(kronecker, values)

    @property
    def curvature(self) -> Kronecker:
        return self.kronecker

    def between(self, operator: AbstractSpectral, rows: Rows, into: int, out: int) -> Rows:
        assert isinstance(operator, Kronecker), "functions of a Kronecker are Kronecker"
        return operator.map_values(lambda name, lam: lam * self._power(name, into + out)).apply(rows)

    def scaled(self, rows: Rows, power: int) -> Tensor:
        product = self.kronecker.map_values(lambda name, _: self._power(name, power)).apply(rows)
        return product.flat().double()

    def _power(self, name: str, twice: int) -> Tensor:
        """P^(twice/2) by eigenvector; 0 stays 0."""
        values = self.values[name]
        powers = values.clamp_min(torch.finfo(values.dtype).tiny) ** (twice / 2)
        return powers if twice == 0 else torch.where(values > 0, powers, torch.zeros_like(values))


def preconditioner_of(operator: AbstractSpectral, adam: AdamState) -> AbstractPreconditioner:
    """P beside a curvature, as exactly as the curvature's form allows.

    Args:
        operator: H, dense or in Kronecker eigenbases.
        adam: second moments, eps and decay.
    """
    if isinstance(operator, Kronecker):
        return EigenbasisPreconditioner.of(operator, adam)
    assert isinstance(operator, (Matrix, Eigen)), "form_of() chose one of the forms"
    return DensePreconditioner.of(operator, adam)
