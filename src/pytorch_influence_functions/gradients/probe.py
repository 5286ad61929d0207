"""A few real examples on which every way to take gradients is tried before it is used."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from ..core.batches import batch_slice, tensors_of
from ..linalg.rows import Rows
from ..objectives.base import AbstractObjective, check_outputs
from ..objectives.measures import FromFunction
from ..objectives.model_loss import ModelLoss
from ..problem.problem import Problem, first_batch
from .one_by_one import Gathered, Known, gradients_one_by_one, rows_one_by_one
from .padding import warn_of_padding
from .recording import NarrowestType
from .separability import refuse_batch_loss, refuse_mixing, refuse_shared_losses, warn_of_batch_loss

log = logging.getLogger("pytorch_influence_functions")

# The numbers that the rows of the examples on which rules are verified may take together.
_PROBE_NUMBERS = 1 << 26


@dataclass(frozen=True, eq=False)
class Probe:
    """A few real examples, and their rows by definition, with which every faster way is compared."""

    problem: Problem
    objective: AbstractObjective
    batch: Any
    n: int
    outputs: Tensor
    precision: torch.dtype
    held: float
    """Numbers that one example's inputs and activations take."""
    reference: Rows | None = None
    """The rows by definition; None where those of all are large, and are made one at a time."""

    @staticmethod
    def take(problem: Problem) -> Probe:
        model = problem.model
        count = min(3, len(problem.data))
        together = replace(problem.data, batch_size=count)
        ids = torch.arange(3) % count
        with first_batch(problem, together, torch.arange(count)) as (_, several), torch.no_grad():
            batch = batch_slice(several, count, ids)
            with NarrowestType() as narrowest:
                outputs = _look(problem.objective, model, batch)
        check_outputs(outputs, ids)
        objective = problem.objective
        precision = max(narrowest.dtype, outputs.dtype, key=lambda dtype: torch.finfo(dtype).eps)
        refuse_mixing(model, objective, batch, outputs, tolerance(precision))
        if isinstance(objective, FromFunction):
            objective = objective.resolved_on(outputs, batch)
            with torch.no_grad():
                outputs = objective.outputs(model, batch)
            refuse_batch_loss(problem, objective)
        if isinstance(objective, ModelLoss):
            warn_of_batch_loss(problem, objective)
        refuse_shared_losses(objective, batch, outputs)
        warn_of_padding(problem, objective, tolerance(precision))
        held = (narrowest.numbers + sum(tensor.numel() for _, tensor in tensors_of(batch))) / 3
        return Probe(problem, objective, batch, 3, outputs, precision, held)._with_reference()

    def wider(self, batch: Any, n: int) -> Probe:
        """The same of other examples.

        Args:
            batch: the examples.
            n: how many they are.
        """
        with torch.no_grad():
            outputs = self.objective.outputs(self.problem.model, batch)
        return replace(self, batch=batch, n=n, outputs=outputs)._with_reference()

    def _with_reference(self) -> Probe:
        """Before anything is compared: a model that does not run on one example, or not backwards, says so here."""
        space, model = self.problem.space, self.problem.model
        if self.n * space.size > _PROBE_NUMBERS or self.problem.is_cut_up:
            return replace(self, reference=None)
        rows = rows_one_by_one(model, self.objective, list(space.names), self.batch, self.cotangent)
        return replace(self, reference=space.from_parameters(rows))

    @cached_property
    def cotangent(self) -> Tensor:
        """A number for every output, at random and the same every time."""
        generator = torch.Generator().manual_seed(0)
        return torch.randn(self.outputs.shape, generator=generator, dtype=torch.float64).to(self.outputs)

    def _references(self) -> Iterator[tuple[slice, Known | Gathered]]:
        """Rows by definition, with which examples they belong to."""
        if self.reference is not None:
            yield slice(0, self.n), Known(self.reference)
            return
        space, model, names = self.problem.space, self.problem.model, list(self.problem.space.names)
        if self.problem.is_cut_up:
            several = gradients_one_by_one(model, self.objective, names, self.batch, self.cotangent)
            yield from ((slice(e, e + 1), Gathered(space, parts)) for e, parts in enumerate(several))
            return
        for e in range(self.n):
            part = slice(e, e + 1)
            one = batch_slice(self.batch, self.n, part)
            rows = rows_one_by_one(model, self.objective, names, one, self.cotangent[part])
            yield part, Known(space.from_parameters(rows))

    def disagreeing(self, pullback: Callable[[Any, int, Tensor], Rows], blocks: Any) -> list[str]:
        """The blocks on which rows differ from the definition.

        Args:
            pullback: gives rows J_n^T c_n of a batch of n examples, where c has the shape of their outputs.
            blocks: those that are compared.
        """
        try:
            rows = pullback(self.batch, self.n, self.cotangent)
        except (RuntimeError, ValueError, TypeError, NotImplementedError, IndexError, AttributeError) as failure:
            log.debug("probe failed: %s", failure)
            return list(blocks)
        differing: set[str] = set()
        for part, reference in self._references():
            total, some = reference.squared_norms().sqrt(), rows.take(part)
            for name in self.problem.space.blocks:
                if name not in blocks or name in differing:
                    continue
                expected = reference.dense(name).flatten(1)
                gap = (some.blocks[name].dense().flatten(1) - expected).norm(dim=1)
                allowed = tolerance(self.precision) * (expected.norm(dim=1) + 1e-3 * total)
                # NaN agrees with nothing but NaN, which is refused with its index.
                if bool((~(gap <= allowed) & allowed.isfinite()).any()):
                    differing.add(name)
        return [name for name in self.problem.space.blocks if name in differing]


def _look(objective: AbstractObjective, model: nn.Module, batch: Any) -> Tensor:
    return objective.look(model, batch, 3) if isinstance(objective, FromFunction) else objective.outputs(model, batch)


def tolerance(dtype: torch.dtype) -> float:
    """The largest relative difference of two correct results in a dtype."""
    return {torch.float64: 1e-8, torch.float32: 1e-3}.get(dtype, 5e-2)
