"""Small spaces, operators and dense oracles that the laws on solvers share."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from pytorch_influence_functions.linalg.blocks import Outer
from pytorch_influence_functions.linalg.dense import Matrix
from pytorch_influence_functions.linalg.gram import Gram
from pytorch_influence_functions.linalg.implicit import Implicit
from pytorch_influence_functions.linalg.rows import Rows
from pytorch_influence_functions.linalg.shift import Shift
from pytorch_influence_functions.linalg.space import Space

F64 = torch.float64


def a_space() -> Space:
    """Two Linear layers, one block each: P = 4 * 6 + 3 * 5 = 39."""
    model = nn.Sequential(nn.Linear(5, 4), nn.ReLU(), nn.Linear(4, 3))
    return Space.of(model)


def some_rows(space: Space, n: int, seed: int = 0, dtype: torch.dtype = F64) -> Rows:
    """Dense random rows."""
    generator = torch.Generator().manual_seed(seed)
    return space.rows(torch.randn(n, space.size, generator=generator, dtype=F64).to(dtype))


def outer_rows(space: Space, n: int, seed: int = 0, terms: int = 1, dtype: torch.dtype = F64) -> Rows:
    """Factored random rows, as Linear layers give them."""
    generator = torch.Generator().manual_seed(seed)
    blocks = {}
    for name, spec in space.blocks.items():
        left = torch.randn(n, terms, spec.shape[0], generator=generator, dtype=F64)
        right = torch.randn(n, terms, spec.shape[1], generator=generator, dtype=F64)
        blocks[name] = Outer(left.to(dtype), right.to(dtype))
    return Rows(blocks)


def spectrum_matrix(space: Space, low: float = 1e-6, high: float = 1.0, seed: int = 3) -> Matrix:
    """A symmetric matrix with eigenvalues spread evenly in log, or from `low` to `high` when `low` < 0."""
    generator = torch.Generator().manual_seed(seed)
    q, _ = torch.linalg.qr(torch.randn(space.size, space.size, generator=generator, dtype=F64))
    if low > 0:
        values = torch.logspace(float(torch.log10(torch.tensor(low))), 0.0, space.size, dtype=F64) * high
    else:
        values = torch.linspace(low, high, space.size, dtype=F64)
    dense = (q * values) @ q.T
    return Matrix(space, (dense + dense.T) / 2)


def implicit(matrix: Matrix) -> Implicit:
    """The same matrix, known by its products only."""
    return Implicit(matrix.space, lambda rows, ids: matrix.apply(rows), matrix.mean_eigenvalue, 1)


def implicit_examples(space: Space, n: int, seed: int = 5) -> tuple[Implicit, Matrix]:
    """C = mean of n rank-one curvatures, sampled by example, and the same C written out."""
    g = some_rows(space, n, seed).flat() * torch.logspace(0, -1.5, space.size, dtype=F64)

    def product(rows: Rows, ids: Tensor | None) -> Rows:
        part = g if ids is None else g[ids]
        return space.rows(rows.flat() @ part.T @ part / len(part))

    dense = Matrix(space, g.T @ g / n)
    return Implicit(space, product, dense.mean_eigenvalue, n), dense


def uneven(space: Space, damping: float = 1e-3) -> Shift:
    """Weight decay that differs between blocks."""
    return Shift(damping, {k: 0.05 * (i + 1) for i, k in enumerate(space.blocks)})


def dense_shift(space: Space, shift: Shift) -> Tensor:
    """D as a dense matrix, straight from its definition."""
    d = shift.over(space.blocks)
    return torch.cat([torch.full((spec.numel,), d[k], dtype=F64) for k, spec in space.blocks.items()]).diag()


def dense_solve(space: Space, matrix: Tensor, shift: Shift, b: Tensor) -> Tensor:
    """The oracle."""
    return torch.linalg.solve(matrix.to(F64) + dense_shift(space, shift), b.to(F64).T).T


def dense_residual(space: Space, matrix: Tensor, shift: Shift, x: Tensor, b: Tensor) -> Tensor:
    """The true relative residual, from the dense matrix."""
    x, b = x.to(F64), b.to(F64)
    return (x @ (matrix.to(F64) + dense_shift(space, shift)) - b).norm(dim=1) / b.norm(dim=1)


def dense_gram(gram: Gram) -> Tensor:
    """C of a Gram, written out."""
    g = gram.rows.flat().to(F64)
    return g.T @ g / gram.count


def worst(a: Tensor, b: Tensor) -> float:
    """Largest relative error over rows."""
    a, b = a.to(F64), b.to(F64)
    return float(((a - b).flatten(1).norm(dim=1) / b.flatten(1).norm(dim=1).clamp_min(1e-300)).max())
