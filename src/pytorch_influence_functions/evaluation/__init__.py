"""Ground truth by retraining, and how well scores predict it."""

import warnings
from typing import Any

from ..core.errors import nearest
from .correlate import Estimate as Estimate
from .interop import explanations as explanations
from .interop import from_dattri as from_dattri
from .interop import quanda_explainer as quanda_explainer
from .metrics import evaluate_one as evaluate_one
from .metrics import found_when_checking as found_when_checking
from .metrics import lds as lds
from .metrics import mislabel_auc as mislabel_auc
from .metrics import noise_ceiling as noise_ceiling
from .metrics import precision_at as precision_at
from .metrics import removal_correlation as removal_correlation
from .metrics import removal_slope as removal_slope
from .metrics import top_overlap as top_overlap
from .pbrf import pbrf as pbrf
from .recipe import ConstantRate as ConstantRate
from .recipe import CosineDecay as CosineDecay
from .recipe import LinearDecay as LinearDecay
from .recipe import Recipe as Recipe
from .removal import RemovalCurves as RemovalCurves
from .removal import removal_curves as removal_curves
from .retraining import retrain as retrain
from .retraining import train_model as train_model
from .subsets import Protocol as Protocol
from .subsets import Subsets as Subsets
from .table import BASELINES as BASELINES
from .table import Evaluation as Evaluation
from .table import evaluate as evaluate
from .truth import Truth as Truth
from .verification import Verification as Verification
from .verification import verify as verify

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
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}{nearest(name, globals())}")
    warnings.warn(f"ptif.evaluation.{name} is now ptif.evaluation.{_RENAMED[name]}.", DeprecationWarning, stacklevel=2)
    return globals()[_RENAMED[name]]
