"""Linear maps on rows."""

from __future__ import annotations

from .base import AbstractOperator as AbstractOperator
from .base import AbstractSampled as AbstractSampled
from .base import AbstractSpectral as AbstractSpectral
from .base import AbstractSymmetric as AbstractSymmetric
from .base import Eigen as Eigen
from .base import Gram as Gram
from .base import Identity as Identity
from .base import Implicit as Implicit
from .base import Matrix as Matrix
from .base import check_dense as check_dense
from .base import dense_bytes as dense_bytes
from .block_diagonal import BlockDiagonal as BlockDiagonal
from .diagonal import DiagonalOperator as DiagonalOperator
from .expansion import Expansion as Expansion
from .low_rank import LowRank as LowRank
from .low_rank import Span as Span
from .spectrum import Extremes as Extremes
from .spectrum import hutchinson_trace as hutchinson_trace
from .spectrum import hutchinson_traces as hutchinson_traces
from .spectrum import lanczos as lanczos
