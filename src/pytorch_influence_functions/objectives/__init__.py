"""What is differentiated: losses known in closed form, measures, any function of outputs and targets."""

from .base import AbstractLikelihood, AbstractObjective
from .bernoulli import Bernoulli
from .likelihoods import CrossEntropy, SquaredError, TokenCrossEntropy
from .measures import FromFunction, Logit, Margin

__all__ = [
    "AbstractLikelihood",
    "AbstractObjective",
    "Bernoulli",
    "CrossEntropy",
    "FromFunction",
    "Logit",
    "Margin",
    "SquaredError",
    "TokenCrossEntropy",
]


def __dir__() -> list[str]:
    return __all__
