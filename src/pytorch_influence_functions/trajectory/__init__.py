"""Attribution along the training run."""

from .segments import AdamState, Segment
from .source import SOURCE

__all__ = [
    "SOURCE",
    "AdamState",
    "Segment",
]


def __dir__() -> list[str]:
    return __all__
