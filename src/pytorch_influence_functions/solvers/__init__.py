"""(C + D) x = b, for all rows at once."""

from __future__ import annotations

from .auto import Auto as Auto
from .auto import Composition as Composition
from .auto import Forecast as Forecast
from .auto import ProblemSize as ProblemSize
from .auto import choose as choose
from .auto import default_damping as default_damping
from .auto import forecast as forecast
from .auto import form_for as form_for
from .base import AbstractSolver as AbstractSolver
from .base import Result as Result
from .base import Solution as Solution
from .blockwise import BlockGroup as BlockGroup
from .blockwise import Blockwise as Blockwise
from .blockwise import operator_for as operator_for
from .blockwise import shift_for as shift_for
from .cg import CG as CG
from .datainf import DataInf as DataInf
from .direct import Cholesky as Cholesky
from .direct import Spectral as Spectral
from .dual import Woodbury as Woodbury
from .factored import Factored as Factored
from .neumann import Neumann as Neumann
from .neumann import Start as Start
from .preconditioner import Preconditioner as Preconditioner
from .trial import PreconditionerTrial as PreconditionerTrial
