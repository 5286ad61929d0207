"""Attribution along the training run."""

from .along import Along
from .callbacks import lightning_callback, trainer_callback
from .recorded_step import GroupState, RecordedStep
from .recorder import Recorder
from .recording import Recording
from .segments import AdamState, Segment
from .source import SOURCE

__all__ = [
    "SOURCE",
    "AdamState",
    "Along",
    "GroupState",
    "RecordedStep",
    "Recorder",
    "Recording",
    "Segment",
    "lightning_callback",
    "trainer_callback",
]


def __dir__() -> list[str]:
    return __all__
