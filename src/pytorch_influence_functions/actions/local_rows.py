"""Edited examples as a change of the system: their Jacobian rows, slopes and Hessians in the outputs."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, final

import torch
from jaxtyping import Float
from torch import Tensor

from ..core.distributed import World
from ..gradients.output_rows import OutputRows
from ..gradients.per_example import Derivatives
from ..linalg.rows import Rows
from ..problem.problem import sweep
from .edits import Edit, Term


@final
@dataclass(frozen=True, eq=False)
class LocalRows:
    """The edited examples e with k columns each: J [m] and, in the order of its rows, their slopes and Hessians.

    The edit adds `sum_e J_e^T slope_e` to N times the objective's gradient and `J^T hessian J` to N times its
    curvature; changes of weight are multiplied in.
    """

    rows: Rows
    slopes: Float[Tensor, " m"]
    hessian: Float[Tensor, "m m"]

    @staticmethod
    def of(derivatives: Derivatives, edit: Edit, per_output: bool) -> LocalRows:
        """Look at the edited examples.

        Args:
            derivatives: how gradients are taken.
            edit: which examples, with their changes of weight.
            per_output: a row for every output, with the loss's Hessian there; otherwise one row for each example, its
                gradient g, which stands for the part g g^T of an empirical Fisher matrix.
        """
        look = _per_output if per_output else _per_example
        parts = [part for term in edit.terms for part in look(derivatives, term)]
        return LocalRows(
            Rows.cat([part.rows for part in parts]),
            torch.cat([part.slopes for part in parts]),
            torch.block_diag(*[part.hessian for part in parts]),  # type: ignore[no-untyped-call]
        )

    def __len__(self) -> int:
        return len(self.rows)


def _per_example(derivatives: Derivatives, term: Term) -> list[LocalRows]:
    parts: list[LocalRows] = []
    done = 0
    for ids, batch in _batches(derivatives, term):
        rows = derivatives.loss_rows(ids, batch).rows.compact()
        weights = term.weights[done : done + len(ids)].to(rows.device)
        done += len(ids)
        parts.append(LocalRows(rows, weights, weights.diag()))
    return parts


def _per_output(derivatives: Derivatives, term: Term) -> list[LocalRows]:
    parts: list[LocalRows] = []
    done = 0
    for ids, batch in _batches(derivatives, term):
        examples, n = OutputRows.of(derivatives, ids, batch), len(ids)
        width = len(examples.rows)
        weights = term.weights[done : done + n].to(examples.outputs.device)
        done += n
        # Rows lie column after column: row k n + e is output k of example e.
        hessian = (examples.hessian.double() * weights[:, None, None]).permute(1, 2, 0)
        blocks = torch.diag_embed(hessian).permute(0, 2, 1, 3).reshape(width * n, width * n)
        weighted = examples.slopes.double() * weights[:, None]
        parts.append(LocalRows(Rows.cat([rows.compact() for rows in examples.rows]), weighted.T.reshape(-1), blocks))
    return parts


def _batches(derivatives: Derivatives, term: Term) -> Iterator[tuple[Tensor, Any]]:
    return sweep(derivatives.problem, term.source, term.ids, "edited examples", World())
