"""A batch of examples in the model's outputs: a row for every output, slopes and Hessians of the loss there."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, final

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ..linalg.rows import Rows
from ..objectives.differentiated import output_curvature
from .per_example import Derivatives, Tape, slopes


@final
@dataclass(frozen=True, eq=False)
class OutputRows:
    """n examples with c outputs each.

    Attributes:
        tape: the forward pass; more rows can be taken of it.
        outputs: the model's outputs, without a graph, in their own shape.
        losses: of the examples.
        slopes: of the losses in the outputs.
        rows: for every output k the rows J_n^T e_k.
        hessian: of the losses in the outputs.
    """

    tape: Tape
    outputs: Tensor
    losses: Float[Tensor, " n"]
    slopes: Float[Tensor, "n c"]
    rows: list[Rows]
    hessian: Float[Tensor, "n c c"]

    @staticmethod
    def of(derivatives: Derivatives, ids: Int[Tensor, " n"], batch: Any) -> OutputRows:
        """One forward pass, and one backward pass for every output.

        Args:
            derivatives: how gradients are taken, and of which loss.
            ids: dataset indices of the batch, for messages.
            batch: what the collate function gave for them.
        """
        objective, n = derivatives.objective, len(ids)
        tape = derivatives.tape(batch, n)
        outputs = tape.outputs.detach()
        objective.check(outputs, batch, ids)
        losses, slope = slopes(objective, outputs, batch, ids)
        width = outputs[0].numel()
        units = torch.eye(width, dtype=outputs.dtype, device=outputs.device)
        rows = [tape.rows(unit.expand(n, -1).reshape(outputs.shape), keep_graph=True) for unit in units]
        hessian = output_curvature(objective).output_hessian(outputs, batch)
        return OutputRows(tape, outputs, losses, slope.reshape(n, width), rows, hessian)
