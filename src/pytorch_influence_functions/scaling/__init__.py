"""Scaling of raw first-order scores."""

from .base import AbstractScaling, Raw
from .leverage import Leverage
from .relative import Cosine, RelatIF, Whitened

__all__ = [
    "AbstractScaling",
    "Cosine",
    "Leverage",
    "Raw",
    "RelatIF",
    "Whitened",
]


def __dir__() -> list[str]:
    return __all__
