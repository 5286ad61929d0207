"""Edited examples as a change of the system: their Jacobian rows, and their losses in the outputs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, final

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ..core.distributed import World
from ..gradients.output_rows import OutputRows
from ..gradients.per_example import Derivatives, slopes
from ..linalg.rows import Rows
from ..objectives.differentiated import output_curvature
from ..problem.problem import sweep
from .edits import Edit, Term


@final
@dataclass(frozen=True, eq=False)
class EditedLosses:
    """Losses of n edited examples with k outputs each, as functions of how far the outputs move.

    What is taken out is the quadratic of the old loss, which is what the curvature holds of it; what is put in is the
    new loss itself.

    Attributes:
        derivatives: how gradients are taken, and of which loss.
        ids: of the examples, for messages.
        batch: the examples.
        outputs: the model's, of the trained weights.
        weights: by how much each example's weight changes.
        places: which of the rows of all edited examples are these outputs'.
        losses: of the examples at `outputs`.
        slopes: of the losses in the outputs there.
        hessian: of the losses in the outputs there.
    """

    derivatives: Derivatives
    ids: Int[Tensor, " n"]
    batch: Any
    outputs: Tensor
    weights: Float[Tensor, " n"]
    places: Int[Tensor, "n k"]
    losses: Float[Tensor, " n"]
    slopes: Float[Tensor, "n k"]
    hessian: Float[Tensor, "n k k"]

    def at(self, moves: Float[Tensor, " m"]) -> tuple[Tensor, Tensor, Tensor]:
        """(how far each loss rises [n], slopes [n, k], Hessians [n, k, k]) after all rows' outputs moved by `moves`."""
        u = moves[self.places]
        curved = torch.einsum("nij,nj->ni", self.hessian, u)
        rise, slope = ((self.slopes + 0.5 * curved) * u).sum(1), self.slopes + curved
        if bool((self.weights <= 0).all()):
            return rise, slope, self.hessian
        objective = self.derivatives.objective
        outputs = self.outputs + u.to(self.outputs.dtype).reshape(self.outputs.shape)
        losses, at_new = slopes(objective, outputs, self.batch, self.ids)
        hessian = output_curvature(objective).output_hessian(outputs, self.batch).double()
        new = self.weights > 0
        rise = torch.where(new, losses.double() - self.losses, rise)
        slope = torch.where(new[:, None], at_new.double().reshape(slope.shape), slope)
        return rise, slope, torch.where(new[:, None, None], hessian, self.hessian)


@final
@dataclass(frozen=True, eq=False)
class LocalRows:
    """The edited examples e with k columns each: J [m] and, in the order of its rows, their slopes and Hessians.

    The edit adds `sum_e J_e^T slope_e` to N times the objective's gradient and `J^T hessian J` to N times its
    curvature; changes of weight are multiplied in. `losses` are those of the edited examples where there is a row for
    every output; empty where there is one for each example.
    """

    rows: Rows
    slopes: Float[Tensor, " m"]
    hessian: Float[Tensor, "m m"]
    losses: tuple[EditedLosses, ...] = ()

    @staticmethod
    def per_output(derivatives: Derivatives, edit: Edit, by_gradient: bool) -> LocalRows:
        """A row for every output of the edited examples, with the losses there.

        Args:
            derivatives: how gradients are taken.
            edit: which examples, with their changes of weight.
            by_gradient: the curvature holds g g^T of every example rather than its loss's Hessian H: what is taken out
                of it has s s^T in H's place.
        """
        rows: list[Rows] = []
        losses: list[EditedLosses] = []
        before: list[EditedLosses] = []
        for term in edit.terms:
            same = iter(before) if term.repeats else None
            before = []
            done = sum(len(part) for part in rows)
            for ids, batch, weights in _batches(derivatives, term):
                if same is None:
                    part, taken = _look(derivatives, ids, batch, weights, done)
                    rows += taken
                    done += part.places.numel()
                else:
                    part = _look_again(derivatives, ids, batch, weights, next(same))
                before.append(_of_gradients(part) if by_gradient else part)
            losses += before
        all_rows, m = Rows.cat(rows), sum(len(part) for part in rows)
        still = torch.zeros(m, dtype=torch.float64, device=all_rows.device)
        _, slope, hessian = sum_up(losses, still)
        return LocalRows(all_rows, slope, hessian, tuple(losses))

    @staticmethod
    def per_example(derivatives: Derivatives, edit: Edit) -> LocalRows:
        """One row for each edited example, its gradient g: it stands for the part g g^T of an empirical Fisher matrix.

        Args:
            derivatives: how gradients are taken.
            edit: which examples, with their changes of weight.
        """
        rows, all_weights = [], []
        for term in edit.terms:
            for ids, batch, weights in _batches(derivatives, term):
                rows.append(derivatives.loss_rows(ids, batch).rows.compact())
                all_weights.append(weights.to(rows[-1].device))
        weights = torch.cat(all_weights)
        return LocalRows(Rows.cat(rows), weights, weights.diag())

    @property
    def removed_hessian(self) -> Float[Tensor, "m m"]:
        """The part of `hessian` that is taken out."""
        if not self.losses:
            return self.hessian.clamp_max(0.0)
        total = torch.zeros_like(self.hessian)
        for part in self.losses:
            _add(total, part.places, part.hessian * part.weights.clamp_max(0.0)[:, None, None])
        return total

    def with_flat_removals(self) -> LocalRows:
        """The same with what is taken out as its slope alone, without its Hessian."""
        parts = []
        for part in self.losses:
            old = (part.weights <= 0)[:, None, None]
            parts.append(replace(part, hessian=part.hessian.masked_fill(old, 0.0)))
        return replace(self, hessian=self.hessian - self.removed_hessian, losses=tuple(parts))

    def __len__(self) -> int:
        return len(self.rows)


def sum_up(
    losses: Sequence[EditedLosses], moves: Float[Tensor, " m"]
) -> tuple[float, Float[Tensor, " m"], Float[Tensor, "m m"]]:
    """The weighted sum of edited losses after their outputs moved: (rise, slope, Hessian), in float64.

    Args:
        losses: of the edited examples.
        moves: of the outputs, in the order of the rows.
    """
    rise, slope, hessian = 0.0, torch.zeros_like(moves), moves.new_zeros(len(moves), len(moves))
    for part in losses:
        rises, slopes_there, hessians = part.at(moves)
        rise += float((rises * part.weights).sum())
        slope.index_put_((part.places,), slopes_there * part.weights[:, None], accumulate=True)
        _add(hessian, part.places, hessians * part.weights[:, None, None])
    return rise, slope, hessian


def _add(total: Tensor, places: Tensor, blocks: Tensor) -> None:
    total.index_put_((places[:, :, None], places[:, None, :]), blocks, accumulate=True)


def _look(
    derivatives: Derivatives, ids: Tensor, batch: Any, weights: Tensor, start: int
) -> tuple[EditedLosses, list[Rows]]:
    examples, n = OutputRows.of(derivatives, ids, batch), len(ids)
    width, weights = len(examples.rows), weights.to(examples.outputs.device)
    # Rows lie column after column: row k n + e is output k of example e.
    places = start + torch.arange(width * n, device=weights.device).reshape(width, n).T
    part = EditedLosses(
        derivatives,
        ids,
        batch,
        examples.outputs,
        weights,
        places,
        examples.losses.double(),
        examples.slopes.double(),
        examples.hessian.double(),
    )
    return part, [rows.compact() for rows in examples.rows]


def _look_again(derivatives: Derivatives, ids: Tensor, batch: Any, weights: Tensor, same: EditedLosses) -> EditedLosses:
    """The same inputs with other labels: outputs and rows are known."""
    objective, outputs = derivatives.objective, same.outputs
    objective.check(outputs, batch, ids)
    losses, slope = slopes(objective, outputs, batch, ids)
    hessian = output_curvature(objective).output_hessian(outputs, batch).double()
    slope = slope.double().reshape(same.slopes.shape)
    weights = weights.to(outputs.device)
    return EditedLosses(derivatives, ids, batch, outputs, weights, same.places, losses.double(), slope, hessian)


def _of_gradients(part: EditedLosses) -> EditedLosses:
    """With s s^T where what is taken out has its Hessian."""
    outer = part.slopes[:, :, None] * part.slopes[:, None, :]
    old = (part.weights <= 0)[:, None, None]
    return replace(part, hessian=torch.where(old, outer, part.hessian))


def _batches(derivatives: Derivatives, term: Term) -> Iterator[tuple[Tensor, Any, Tensor]]:
    """(indices, batch, changes of weight)."""
    done = 0
    for ids, batch in sweep(derivatives.problem, term.source, term.ids, "edited examples", World()):
        yield ids, batch, term.weights[done : done + len(ids)]
        done += len(ids)
