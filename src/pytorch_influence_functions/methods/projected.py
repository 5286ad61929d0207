"""What methods on projected gradients share: the projection that was asked for, and what solves with its kernel."""

from __future__ import annotations

from typing import Any

from ..core.errors import InvalidInput
from ..gradients.projections import AbstractReduction
from ..gradients.sketches import Sketch
from ..solvers.base import AbstractSolver
from ..solvers.blockwise import Blockwise
from ..solvers.direct import Spectral


def sketched(
    method: str, k: int | None, per_layer: bool, seed: int, projection: AbstractReduction | None
) -> tuple[AbstractReduction, AbstractSolver[Any]]:
    """The projection that a method was asked for, and what solves with the second moment of its rows.

    Args:
        method: its name.
        k: dimensions; None: 2,048, where no projection is given.
        per_layer: whether every layer has its own kernel.
        seed: of the projection.
        projection: one that was given instead.

    Raises:
        InvalidInput: both were given, or the projection mixes layers that are to be kept apart.
    """
    if projection is None:
        projection = Sketch(2048 if k is None else k, seed=seed, per_layer=per_layer)
    elif k is not None or seed != 0:
        given = f"k={k}" if k is not None else f"seed={seed}"
        raise InvalidInput(f"{method}() got {given} and projection={projection!r}, which has its own; leave one out.")
    elif not isinstance(projection, AbstractReduction):
        raise InvalidInput(f"projection= must be a projection such as Sketch(1024), got {projection!r}.")
    elif per_layer and not projection.keeps_layers_apart:
        raise InvalidInput(
            f"per_layer=True gives every layer a kernel of its own, and projection={projection!r} mixes all layers; "
            "leave per_layer out, or use Sketch(k, per_layer=True) or TwoSided(k_in)."
        )
    return projection, Blockwise(Spectral()) if per_layer else Spectral()
