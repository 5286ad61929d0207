"""Diagonal blocks of any curvature: the curvature of the same problem with fewer parameters."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from ..core.distributed import alone, current
from ..gradients.per_example import Derivatives
from ..linalg.block_diagonal import restrict_rows, subspace
from ..linalg.dense import Matrix
from ..linalg.gram import Gram
from ..linalg.operator import AbstractSymmetric, dense_bytes
from ..linalg.rows import Rows
from ..linalg.rows_together import everyones_rows
from ..linalg.space import Space
from .base import AbstractCurvature, Budget, Form
from .from_rows import AbstractRowCurvature
from .second_moment import SecondMoment, column_groups


@dataclass(frozen=True)
class GroupRequest:
    """What is wanted of one group of blocks."""

    blocks: tuple[str, ...]
    curvature: AbstractCurvature
    form: Form


def block_operators(
    parts: Mapping[str, GroupRequest], derivatives: Derivatives, budget: Budget
) -> dict[str, AbstractSymmetric]:
    """The operator of every group, each in its own form.

    Groups that share a curvature made of rows share its pass over the data; the others take theirs one by one.

    Raises:
        TooLarge: the groups' matrices or rows together are above the bound.
    """
    operators: dict[str, AbstractSymmetric] = {}
    waiting: list[tuple[AbstractRowCurvature, dict[str, GroupRequest]]] = []
    for name, part in parts.items():
        curvature = part.curvature
        curvature.require(part.form)
        if not isinstance(curvature, AbstractRowCurvature) or part.form is Form.IMPLICIT:
            operators[name] = curvature.of(derivatives.restricted(part.blocks), part.form, budget)
            continue
        members = next((m for c, m in waiting if c == curvature), None)
        if members is None:
            waiting.append((curvature, {name: part}))
        else:
            members[name] = part
    for curvature, members in waiting:
        operators |= _from_one_pass(curvature, members, derivatives, budget)
    return {name: operators[name] for name in parts}


def _from_one_pass(
    curvature: AbstractRowCurvature, parts: Mapping[str, GroupRequest], derivatives: Derivatives, budget: Budget
) -> dict[str, AbstractSymmetric]:
    chosen = derivatives.restricted([b for part in parts.values() for b in part.blocks])
    curvature.check_objective(chosen)
    spaces = {name: subspace(derivatives.space, part.blocks) for name, part in parts.items()}
    matrices = _empty(parts, spaces, derivatives, budget)
    kept: dict[str, list[Rows]] = {name: [] for name in parts if name not in matrices}
    kept_bytes, looked_at, n = 0.0, 0, len(derivatives.problem)
    if n < current().size:
        with alone(apart=False):
            return _from_one_pass(curvature, parts, derivatives, budget)
    for batch in curvature.batches(chosen):
        so_far = looked_at
        for columns in column_groups(batch):
            for name, total in matrices.items():
                total.add([restrict_rows(column, spaces[name]) for column in columns])
            for name, several in kept.items():
                several += [restrict_rows(column, spaces[name]).compact() for column in columns]
                kept_bytes += sum(r.numbers * r.dtype.itemsize for r in several[-len(columns) :])
            looked_at = so_far + len(columns[0])
            # What the first batch takes tells what the rest will.
            expected = kept_bytes / looked_at * n
            budget.check(expected, "Keeping the groups' gradient rows", "use CG(), or name fewer parameters")
    count, world = curvature.count(n), current()
    operators: dict[str, AbstractSymmetric] = {
        name: Matrix(spaces[name], world.sum_into(total.matrix()) / count) for name, total in matrices.items()
    }
    return operators | {k: Gram(spaces[k], everyones_rows(Rows.cat(several)), count) for k, several in kept.items()}


def _empty(
    parts: Mapping[str, GroupRequest], spaces: Mapping[str, Space], derivatives: Derivatives, budget: Budget
) -> dict[str, SecondMoment]:
    """An empty sum for every group that wants a matrix."""
    sizes = {name: spaces[name].size for name, part in parts.items() if part.form is Form.MATRIX}
    if sizes:
        largest = max(sizes, key=lambda k: sizes[k])
        budget.check(
            sum(dense_bytes(p) for p in sizes.values()),
            f"Dense matrices of {len(sizes)} groups, the largest {largest!r} of {sizes[largest]:,} parameters,",
            "use smaller groups, or give large ones CG() or Woodbury()",
        )
    return {name: SecondMoment(spaces[name], derivatives.problem.device) for name in sizes}
