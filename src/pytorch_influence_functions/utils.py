"""The old submodule's names; see `pytorch_influence_functions.classic`."""

from .classic import display_progress as display_progress
from .classic import get_default_config as get_default_config
from .classic import init_logging as init_logging
from .classic import save_json as save_json
