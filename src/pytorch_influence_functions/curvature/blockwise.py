"""Diagonal blocks of any curvature: the curvature of the same problem with fewer parameters."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..gradients.per_example import Derivatives
from ..linalg.block_diagonal import restrict_rows, subspace
from ..linalg.dense import Matrix
from ..linalg.gram import Gram
from ..linalg.operator import AbstractSymmetric
from ..linalg.rows import Rows
from ..linalg.space import Space
from .base import AbstractCurvature, Budget, Form
from .diagonal import FromRows, streamed
from .exact import GGN, EmpiricalFisher, Fisher


@dataclass(frozen=True)
class Part:
    """What is wanted of one group of blocks."""

    blocks: tuple[str, ...]
    curvature: AbstractCurvature
    form: Form


def restricted(derivatives: Derivatives, names: Iterable[str]) -> Derivatives:
    """The same derivatives over some blocks only: every curvature of it is the diagonal block of the whole one's."""
    space = subspace(derivatives.whole, names)
    layers = {}
    for key, layer in derivatives.layers.items():
        parts = {block: part for block, part in layer.parts.items() if block in space.blocks}
        if parts:
            layers[key] = replace(layer, parts=parts)
    return replace(
        derivatives,
        whole=space,
        layers=layers,
        vmapped=tuple(b for b in derivatives.vmapped if b in space.blocks),
        looped=tuple(b for b in derivatives.looped if b in space.blocks),
    )


def block_operators(
    parts: Mapping[str, Part], derivatives: Derivatives, budget: Budget
) -> dict[str, AbstractSymmetric]:
    """The operator of every group, each in its own form.

    Groups that share a curvature made of rows share its pass over the data; the others take theirs one by one.

    Raises:
        TooLarge: the groups' matrices or rows together are above the bound.
    """
    made: dict[str, AbstractSymmetric] = {}
    waiting: list[tuple[FromRows, dict[str, Part]]] = []
    for name, part in parts.items():
        part.curvature.require(part.form)
        if not isinstance(part.curvature, (GGN, Fisher, EmpiricalFisher)) or part.form is Form.IMPLICIT:
            made[name] = part.curvature.of(restricted(derivatives, part.blocks), part.form, budget)
            continue
        members = next((m for c, m in waiting if c == part.curvature), None)
        if members is None:
            waiting.append((part.curvature, {name: part}))
        else:
            members[name] = part
    for curvature, members in waiting:
        made |= _from_one_pass(curvature, members, derivatives, budget)
    return {name: made[name] for name in parts}


def _from_one_pass(
    curvature: FromRows, parts: Mapping[str, Part], derivatives: Derivatives, budget: Budget
) -> dict[str, AbstractSymmetric]:
    seen = restricted(derivatives, [b for part in parts.values() for b in part.blocks])
    spaces = {name: subspace(derivatives.space, part.blocks) for name, part in parts.items()}
    matrices = _empty(parts, spaces, derivatives, budget)
    kept: dict[str, list[Rows]] = {name: [] for name in parts if name not in matrices}
    rows, count = streamed(curvature, seen)
    held, seen_rows = 0.0, 0
    for some in rows:
        for name, total in matrices.items():
            flat = restrict_rows(some, spaces[name]).flat().double()
            total.addmm_(flat.T, flat)
        seen_rows += len(some)
        for name, several in kept.items():
            several.append(restrict_rows(some, spaces[name]).compact())
            held += several[-1].numbers * several[-1].dtype.itemsize
        # The first batch already tells what the rest will take.
        forecast = held / seen_rows * max(count, seen_rows)
        budget.check(forecast, "Keeping the groups' gradient rows", "use CG(), or name fewer parameters")
    made: dict[str, AbstractSymmetric] = {k: Matrix(spaces[k], total / count) for k, total in matrices.items()}
    return made | {k: Gram(spaces[k], Rows.cat(several), count) for k, several in kept.items()}


def _empty(
    parts: Mapping[str, Part], spaces: Mapping[str, Space], derivatives: Derivatives, budget: Budget
) -> dict[str, Tensor]:
    """A matrix of zeros for every group that wants one."""
    sizes = {name: spaces[name].size for name, part in parts.items() if part.form is Form.MATRIX}
    if sizes:
        largest = max(sizes, key=lambda k: sizes[k])
        budget.check(
            8.0 * 3 * sum(p**2 for p in sizes.values()),
            f"Dense matrices of {len(sizes)} groups, the largest {largest!r} of {sizes[largest]:,} parameters,",
            "use smaller groups, or give large ones CG() or Woodbury()",
        )
    device = derivatives.problem.device
    return {name: torch.zeros(p, p, dtype=torch.float64, device=device) for name, p in sizes.items()}
