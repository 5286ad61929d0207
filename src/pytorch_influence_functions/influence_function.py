"""The old submodule's names; see `pytorch_influence_functions.classic`."""

from .classic import calc_loss as calc_loss
from .classic import grad_z as grad_z
from .classic import hvp as hvp
from .classic import s_test as s_test
