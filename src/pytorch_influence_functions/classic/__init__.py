"""The API of the original package, kept working: it is translated to `Influence` and computes nothing of its own.

    config = ptif.get_default_config()
    influences, harmful, helpful = ptif.calc_img_wise(config, model, trainloader, testloader)

**Sign.** A value is the predicted *increase of the test loss* if that training example were removed and the model
retrained: positive = helpful.
"""

from __future__ import annotations

from .calc import calc_all_grad_then_test, calc_img_wise, calc_influences
from .config import Config, get_default_config
from .console import display_progress, init_logging
from .files import load_grad_z, load_s_test, save_json
from .helpers import influential_loader, plot_influences, plot_loo_scatter
from .results import InfluenceResult
from .selection import get_dataset_sample_ids, get_dataset_sample_ids_per_class
from .single import calc_loss, grad_z, hvp, s_test
from .vectors import calc_grad_z, calc_influence_function, calc_influence_single, calc_s_test, calc_s_test_single

__all__ = [
    "Config",
    "InfluenceResult",
    "calc_all_grad_then_test",
    "calc_grad_z",
    "calc_img_wise",
    "calc_influence_function",
    "calc_influence_single",
    "calc_influences",
    "calc_loss",
    "calc_s_test",
    "calc_s_test_single",
    "display_progress",
    "get_dataset_sample_ids",
    "get_dataset_sample_ids_per_class",
    "get_default_config",
    "grad_z",
    "hvp",
    "influential_loader",
    "init_logging",
    "load_grad_z",
    "load_s_test",
    "plot_influences",
    "plot_loo_scatter",
    "s_test",
    "save_json",
]


def __dir__() -> list[str]:
    return __all__
