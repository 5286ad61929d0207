"""Gradients by definition: one forward and one backward pass per example. What every faster way is compared with."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from ..core.batches import batch_slice
from ..core.cut_up import cut_modules, whole
from ..core.errors import InvalidInput, first_line
from ..linalg.rows import Rows
from ..linalg.space import Space
from ..objectives.base import AbstractObjective
from .vjp import as_dense, weighted_gradient


def rows_one_by_one(
    model: nn.Module, objective: AbstractObjective, names: list[str], batch: Any, cotangent: Tensor
) -> dict[str, Tensor]:
    """Rows J_n^T c_n by one forward and backward pass per example: the definition, and the slowest route."""
    each = list(gradients_one_by_one(model, objective, names, batch, cotangent))
    return {k: torch.stack([gradients[k] for gradients in each]) for k in names}


def gradients_one_by_one(
    model: nn.Module, objective: AbstractObjective, names: list[str], batch: Any, cotangent: Tensor
) -> Iterator[dict[str, Tensor]]:
    """For every example J_n^T c_n by parameter; of a model that is cut up, this process's part of it."""
    by_name = dict(model.named_parameters())
    parameters, n = [by_name[k] for k in names], cotangent.shape[0]
    take = _gradient_in_parts if cut_modules(model) else weighted_gradient
    for e in range(n):
        with torch.enable_grad():
            outputs = objective.outputs(model, batch_slice(batch, n, slice(e, e + 1)))
            if outputs.numel() != cotangent[e].numel():
                raise InvalidInput(
                    f"The model gave outputs of shape {tuple(outputs.shape)} for one example alone, but "
                    f"{tuple(cotangent.shape)} for {n} together; each example needs an output of its own."
                )
            _refuse_detached(outputs, model, names)
            try:
                gradients = take(outputs, parameters, cotangent[e].reshape(outputs.shape))
            except torch.OutOfMemoryError:
                raise
            except RuntimeError as cause:
                raise InvalidInput(
                    f"The backward pass of {type(model).__name__} failed ({first_line(cause)}), as it would in "
                    "training; correct its forward, where an operation in place is the usual cause."
                ) from cause
        yield dict(zip(names, gradients, strict=True))


def _gradient_in_parts(outputs: Tensor, parameters: Sequence[Tensor], cotangent: Tensor) -> list[Tensor]:
    """J^T c as `fully_shard` leaves it in `.grad`: the mean of all processes, which all have the same example here."""
    outputs.backward(cotangent.to(outputs.dtype))  # type: ignore[no-untyped-call]
    gradients = [torch.zeros_like(p) if p.grad is None else as_dense(p.grad) for p in parameters]
    for parameter in parameters:
        parameter.grad = None
    return [gradient.detach() for gradient in gradients]


def _refuse_detached(outputs: Tensor, model: nn.Module, names: list[str]) -> None:
    """Refuse outputs that have no derivative in the parameters."""
    if outputs.requires_grad:
        return
    few = ", ".join(map(repr, names[:3])) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
    raise InvalidInput(
        f"The outputs of {type(model).__name__} have no derivative in the parameters {few}: forward detaches them, "
        "runs under torch.no_grad() or numpy, or does not use these parameters; make it differentiable, or select "
        "others with parameters=."
    )


@dataclass(frozen=True, eq=False)
class Gathered:
    """One example's row by definition, of which each process has a part: a block is gathered when it is asked for."""

    space: Space
    parts: Mapping[str, Tensor]

    def squared_norms(self) -> Float[Tensor, " 1"]:
        return torch.stack([whole(g).double().square().sum() for g in self.parts.values()]).sum()[None]

    def dense(self, block: str) -> Tensor:
        own = {name: whole(self.parts[name])[None] for name in self.space.blocks[block].parameters}
        return self.space.block(block, own).dense()


@dataclass(frozen=True, eq=False)
class Known:
    """Rows by definition."""

    rows: Rows

    def squared_norms(self) -> Float[Tensor, " n"]:
        return self.rows.squared_norms()

    def dense(self, block: str) -> Tensor:
        return self.rows.blocks[block].dense()
