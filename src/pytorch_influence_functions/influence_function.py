"""The old submodule's names; see `pytorch_influence_functions.classic`."""

from .classic.single import calc_loss as calc_loss
from .classic.single import grad_z as grad_z
from .classic.single import hvp as hvp
from .classic.single import s_test as s_test
