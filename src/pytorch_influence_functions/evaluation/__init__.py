"""Ground truth by retraining, and how well scores predict it."""

from typing import TYPE_CHECKING

from ..core.renames import moved_names as _moved_names
from .accuracy import Accuracy
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
from .tail_patch import TailPatch, tail_patch
from .truth import Truth
from .verification import Verification, verify

__all__ = [
    "BASELINES",
    "Accuracy",
    "ConstantRate",
    "CosineDecay",
    "Estimate",
    "Evaluation",
    "LinearDecay",
    "Protocol",
    "Recipe",
    "RemovalCurves",
    "Subsets",
    "TailPatch",
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
    "tail_patch",
    "top_overlap",
    "train_model",
    "verify",
]

# Where the names went that stood here in the previews of version 1.0.
_MOVED = {
    "Constant": "evaluation.ConstantRate",
    "Cosine": "evaluation.CosineDecay",
    "Linear": "evaluation.LinearDecay",
    "evaluated": "evaluation.evaluate_one",
    "trained": "evaluation.train_model",
}

if not TYPE_CHECKING:  # a type checker shall see only the names that are there
    __getattr__ = _moved_names(__name__, _MOVED, __all__)


def __dir__() -> list[str]:
    return __all__
