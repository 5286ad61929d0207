"""What is differentiated: losses known in closed form, measures, any function of outputs and targets."""

from .base import AbstractLikelihood, AbstractObjective
from .bernoulli import Bernoulli
from .likelihoods import CrossEntropy, SquaredError
from .margins import Logit, Margin
from .measures import FromFunction
from .model_functions import FromModel, Output
from .model_loss import ModelLoss
from .tokens import TokenCrossEntropy

__all__ = [
    "AbstractLikelihood",
    "AbstractObjective",
    "Bernoulli",
    "CrossEntropy",
    "FromFunction",
    "FromModel",
    "Logit",
    "Margin",
    "ModelLoss",
    "Output",
    "SquaredError",
    "TokenCrossEntropy",
]


def __dir__() -> list[str]:
    return __all__
