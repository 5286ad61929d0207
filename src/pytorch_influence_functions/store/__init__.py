"""Gradients stored once: what an index keeps of them, and what building one will cost."""

from ..gradients.sketches import Sketch, TwoSided
from .describe import IndexForecast
from .representation import Factors

__all__ = ["Factors", "IndexForecast", "Sketch", "TwoSided"]


def __dir__() -> list[str]:
    return __all__
