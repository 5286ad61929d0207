"""Ground truth by retraining, and how well scores predict it."""

import warnings
from typing import Any

from ..core.errors import nearest
from .correlate import Estimate
from .interop import explanations, from_dattri, quanda_explainer
from .metrics import (
    evaluate_one,
    found_when_checking,
    lds,
    mislabel_auc,
    noise_ceiling,
    precision_at,
    removal_correlation,
    removal_slope,
    top_overlap,
)
from .pbrf import pbrf
from .recipe import ConstantRate, CosineDecay, LinearDecay, Recipe
from .removal import RemovalCurves, removal_curves
from .retraining import retrain, train_model
from .subsets import Protocol, Subsets
from .table import BASELINES, Evaluation, evaluate
from .truth import Truth
from .verification import Verification, verify

__all__ = [
    "BASELINES",
    "ConstantRate",
    "CosineDecay",
    "Estimate",
    "Evaluation",
    "LinearDecay",
    "Protocol",
    "Recipe",
    "RemovalCurves",
    "Subsets",
    "Truth",
    "Verification",
    "evaluate",
    "evaluate_one",
    "explanations",
    "found_when_checking",
    "from_dattri",
    "lds",
    "mislabel_auc",
    "noise_ceiling",
    "pbrf",
    "precision_at",
    "quanda_explainer",
    "removal_correlation",
    "removal_curves",
    "removal_slope",
    "retrain",
    "top_overlap",
    "train_model",
    "verify",
]

# Names of version 1.0's previews.
_RENAMED = {
    "Constant": "ConstantRate",
    "Cosine": "CosineDecay",
    "Linear": "LinearDecay",
    "evaluated": "evaluate_one",
    "trained": "train_model",
}


def __getattr__(name: str) -> Any:
    """Answer an old name with the renamed object, and say in one sentence what it is called now."""
    if name not in _RENAMED:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}{nearest(name, __all__)}")
    warnings.warn(f"ptif.evaluation.{name} is now ptif.evaluation.{_RENAMED[name]}.", DeprecationWarning, stacklevel=2)
    return globals()[_RENAMED[name]]


def __dir__() -> list[str]:
    return __all__
