"""The Neumann series, which is stochastic gradient descent on the damped quadratic (LiSSA)."""

from .series import Neumann, Start
from .tuning import Tuning

__all__ = ["Neumann", "Start", "Tuning"]
