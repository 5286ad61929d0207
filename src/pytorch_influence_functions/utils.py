"""The old submodule's names; see `pytorch_influence_functions.classic`."""

from .classic.config import get_default_config as get_default_config
from .classic.console import display_progress as display_progress
from .classic.console import init_logging as init_logging
from .classic.files import save_json as save_json
