"""From scores to actions: what if training examples were removed, relabelled, replaced or added?"""

from .curate import CuratedData, CurationEffect, curate
from .edits import Edit
from .inputs import input_influence
from .label_issues import LabelIssueFinder, LabelIssues, find_label_issues
from .smallest_removal import SmallestRemoval, flip_prediction, smallest_removal
from .statistic import TStatistic
from .training_set_attack import Front, SignSteps, TrainingSetAttack, attack_training_set
from .what_if import WhatIf, what_if

__all__ = [
    "CuratedData",
    "CurationEffect",
    "Edit",
    "Front",
    "LabelIssueFinder",
    "LabelIssues",
    "SignSteps",
    "SmallestRemoval",
    "TStatistic",
    "TrainingSetAttack",
    "WhatIf",
    "attack_training_set",
    "curate",
    "find_label_issues",
    "flip_prediction",
    "input_influence",
    "smallest_removal",
    "what_if",
]


def __dir__() -> list[str]:
    return __all__
