"""Which matrix stands for the curvature of the training loss."""

from .base import AbstractCurvature as AbstractCurvature
from .base import Budget as Budget
from .base import Form as Form
from .diagonal import Diagonal as Diagonal
from .exact import GGN as GGN
from .exact import EmpiricalFisher as EmpiricalFisher
from .exact import Fisher as Fisher
from .exact import Hessian as Hessian
from .exact import Identity as Identity
from .kronecker.moments import Sharing as Sharing
from .kronecker.records import EKFAC as EKFAC
from .kronecker.records import KFAC as KFAC
from .kronecker.records import AbstractKronecker as AbstractKronecker
from .kronecker.records import Shampoo as Shampoo
from .low_rank import Arnoldi as Arnoldi
from .low_rank import Nystrom as Nystrom
from .subsample import Subsample as Subsample
