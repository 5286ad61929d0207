"""Ground truth by retraining, and how well scores predict it."""

from .correlate import Estimate as Estimate
from .metrics import evaluated as evaluated
from .metrics import found_when_checking as found_when_checking
from .metrics import lds as lds
from .metrics import mislabel_auc as mislabel_auc
from .metrics import noise_ceiling as noise_ceiling
from .metrics import precision_at as precision_at
from .metrics import removal_correlation as removal_correlation
from .metrics import removal_slope as removal_slope
from .metrics import top_overlap as top_overlap
from .pbrf import pbrf as pbrf
from .recipe import Constant as Constant
from .recipe import Cosine as Cosine
from .recipe import Linear as Linear
from .recipe import Recipe as Recipe
from .removal import RemovalCurves as RemovalCurves
from .removal import removal_curves as removal_curves
from .retraining import retrain as retrain
from .subsets import Protocol as Protocol
from .subsets import Subsets as Subsets
from .table import BASELINES as BASELINES
from .table import Evaluation as Evaluation
from .table import evaluate as evaluate
from .truth import Truth as Truth
from .verification import Verification as Verification
from .verification import verify as verify
