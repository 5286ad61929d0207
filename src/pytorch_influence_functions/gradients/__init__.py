"""Per-example gradients, products with them that are never written out, and projections."""

from ..linalg.rows import Route
from .projections import Gaussian

__all__ = [
    "Gaussian",
    "Route",
]


def __dir__() -> list[str]:
    return __all__
