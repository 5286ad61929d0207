"""From scores to actions: what if training examples were removed, relabelled, replaced or added?"""

from .edits import Edit
from .what_if import WhatIf, what_if

__all__ = ["Edit", "WhatIf", "what_if"]


def __dir__() -> list[str]:
    return __all__
