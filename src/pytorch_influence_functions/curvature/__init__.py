"""C: which matrix stands for the curvature of the training loss."""

from .base import AbstractCurvature, Budget, Form
from .diagonal import Diagonal
from .exact import GGN, EmpiricalFisher, Fisher, Hessian, Identity
from .kronecker.moments import Sharing
from .kronecker.records import EKFAC, KFAC, Shampoo
from .low_rank import Arnoldi, Nystrom
from .spectrum import Spectrum
from .subsample import Subsample

__all__ = [
    "EKFAC",
    "GGN",
    "KFAC",
    "AbstractCurvature",
    "Arnoldi",
    "Budget",
    "Diagonal",
    "EmpiricalFisher",
    "Fisher",
    "Form",
    "Hessian",
    "Identity",
    "Nystrom",
    "Shampoo",
    "Sharing",
    "Spectrum",
    "Subsample",
]


def __dir__() -> list[str]:
    return __all__
