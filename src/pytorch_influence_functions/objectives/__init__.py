"""What is differentiated: losses known in closed form, measures, any function of outputs and targets."""

from __future__ import annotations

from .base import AbstractLikelihood as AbstractLikelihood
from .base import AbstractObjective as AbstractObjective
from .base import inputs_and_targets as inputs_and_targets
from .bernoulli import Bernoulli as Bernoulli
from .convert import as_objective as as_objective
from .draws import Keyed as Keyed
from .likelihoods import CrossEntropy as CrossEntropy
from .likelihoods import SquaredError as SquaredError
from .likelihoods import TokenCrossEntropy as TokenCrossEntropy
from .measures import FromFunction as FromFunction
from .measures import Logit as Logit
from .measures import Margin as Margin
from .measures import detect_reduction as detect_reduction
