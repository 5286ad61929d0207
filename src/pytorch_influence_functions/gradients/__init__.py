"""Per-example gradients, products with them that are never written out, and projections."""

from ..linalg.rows import Route
from .projections import AbstractProjection, AbstractReduction, Gaussian, Rescaled
from .sketches import Sketch, TwoSided

__all__ = [
    "AbstractProjection",
    "AbstractReduction",
    "Gaussian",
    "Rescaled",
    "Route",
    "Sketch",
    "TwoSided",
]


def __dir__() -> list[str]:
    return __all__
