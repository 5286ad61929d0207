"""Ground truth by retraining, and how well scores predict it."""

from .correlate import Estimate
from .metrics import (
    evaluated,
    found_when_checking,
    lds,
    mislabel_auc,
    noise_ceiling,
    precision_at,
    removal_correlation,
    removal_slope,
    top_overlap,
)
from .outside import explanations, from_dattri, quanda_explainer
from .pbrf import pbrf
from .recipe import ConstantRate, CosineDecay, LinearDecay, Recipe
from .removal import RemovalCurves, removal_curves
from .retraining import retrain, trained
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
    "evaluated",
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
    "trained",
    "verify",
]


def __dir__() -> list[str]:
    return __all__
