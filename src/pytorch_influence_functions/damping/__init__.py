"""lambda: rules that choose how much is added to the curvature."""

from .curve import DampingCurve, FromCurve
from .rules import Absolute, AbstractDamping, FromTraining, PerDirection, Relative

__all__ = [
    "Absolute",
    "AbstractDamping",
    "DampingCurve",
    "FromCurve",
    "FromTraining",
    "PerDirection",
    "Relative",
]


def __dir__() -> list[str]:
    return __all__
