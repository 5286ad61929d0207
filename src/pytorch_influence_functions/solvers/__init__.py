"""(C + lambda) x = b, for all queries at once."""

from .auto import Auto
from .base import AbstractSolver, Result, Solution
from .blockwise import BlockGroup, Blockwise
from .cg import CG
from .datainf import DataInf
from .direct import Cholesky, Spectral
from .dual import Woodbury
from .factored import Factored
from .forecast import Forecast
from .neumann import Neumann
from .truncation import Truncation

__all__ = [
    "CG",
    "AbstractSolver",
    "Auto",
    "BlockGroup",
    "Blockwise",
    "Cholesky",
    "DataInf",
    "Factored",
    "Forecast",
    "Neumann",
    "Result",
    "Solution",
    "Spectral",
    "Truncation",
    "Woodbury",
]


def __dir__() -> list[str]:
    return __all__
