"""Per-example gradients, products with them that are never written out, and projections."""

from ..linalg.rows import Route
from .projections import AbstractProjection, Gaussian

__all__ = [
    "AbstractProjection",
    "Gaussian",
    "Route",
]


def __dir__() -> list[str]:
    return __all__
