"""The old submodule's names; see `pytorch_influence_functions.classic`."""

from .classic.calc import calc_all_grad_then_test as calc_all_grad_then_test
from .classic.calc import calc_img_wise as calc_img_wise
from .classic.files import load_grad_z as load_grad_z
from .classic.files import load_s_test as load_s_test
from .classic.selection import get_dataset_sample_ids as get_dataset_sample_ids
from .classic.selection import get_dataset_sample_ids_per_class as get_dataset_sample_ids_per_class
from .classic.vectors import calc_grad_z as calc_grad_z
from .classic.vectors import calc_influence_function as calc_influence_function
from .classic.vectors import calc_influence_single as calc_influence_single
from .classic.vectors import calc_s_test as calc_s_test
from .classic.vectors import calc_s_test_single as calc_s_test_single
