"""The old submodule's names; see `pytorch_influence_functions.classic`."""

from .classic import calc_all_grad_then_test as calc_all_grad_then_test
from .classic import calc_grad_z as calc_grad_z
from .classic import calc_img_wise as calc_img_wise
from .classic import calc_influence_function as calc_influence_function
from .classic import calc_influence_single as calc_influence_single
from .classic import calc_s_test as calc_s_test
from .classic import calc_s_test_single as calc_s_test_single
from .classic import get_dataset_sample_ids as get_dataset_sample_ids
from .classic import get_dataset_sample_ids_per_class as get_dataset_sample_ids_per_class
from .classic import load_grad_z as load_grad_z
from .classic import load_s_test as load_s_test
