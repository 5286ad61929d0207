"""Attribution along the training run."""

from .along import Along
from .callbacks import lightning_callback, trainer_callback
from .metasmoothness import Metasmoothness
from .recorded_step import GroupState, RecordedStep
from .recorder import Recorder
from .recording import Recording
from .replay import Replay
from .segments import AdamState, Segment
from .source import SOURCE
from .update_rules import AdamRule, SGDRule

__all__ = [
    "SOURCE",
    "AdamRule",
    "AdamState",
    "Along",
    "GroupState",
    "Metasmoothness",
    "RecordedStep",
    "Recorder",
    "Recording",
    "Replay",
    "SGDRule",
    "Segment",
    "lightning_callback",
    "trainer_callback",
]


def __dir__() -> list[str]:
    return __all__
