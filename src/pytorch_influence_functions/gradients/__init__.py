"""Per-example gradients, products with them that are never written out, and projections."""

from ..linalg.rows import Route
from .projections import AbstractProjection, Gaussian, Rescaled

__all__ = [
    "AbstractProjection",
    "Gaussian",
    "Rescaled",
    "Route",
]


def __dir__() -> list[str]:
    return __all__
