"""Every error a user can meet. Messages are one sentence: what was seen, what was expected, what to do."""

from .core.errors import (
    InfluenceError,
    InvalidInput,
    MissingExtra,
    NonFinite,
    NotLikelihood,
    ProcessFailed,
    SolveFailed,
    TooLarge,
    TrainingDataWarning,
    UnknownName,
)

__all__ = [
    "InfluenceError",
    "InvalidInput",
    "MissingExtra",
    "NonFinite",
    "NotLikelihood",
    "ProcessFailed",
    "SolveFailed",
    "TooLarge",
    "TrainingDataWarning",
    "UnknownName",
]


def __dir__() -> list[str]:
    return __all__
