"""Names that moved: each is handed out from its new place, with one sentence that says where that is."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import reduce
from typing import Any

from .errors import nearest

_PACKAGE = __name__.partition(".")[0]


def moved_names(module: str, places: Mapping[str, str], public: Sequence[str]) -> Callable[[str], Any]:
    """A module's `__getattr__`, which answers old names.

    Args:
        module: its `__name__`.
        places: old name -> where it is now, seen from the package, such as `"curvature.GGN"`.
        public: the module's names, the nearest of which is offered for one that does not exist.
    """
    prefix = module.replace(_PACKAGE, "ptif", 1)

    def look_up(name: str) -> Any:
        if name not in places:
            raise AttributeError(f"module {module!r} has no attribute {name!r}.{nearest(name, [*public, *places])}")
        warnings.warn(f"{prefix}.{name} is now ptif.{places[name]}.", DeprecationWarning, stacklevel=2)
        value = reduce(getattr, places[name].split("."), sys.modules[_PACKAGE])
        # `from ... import name` looks twice; the second look shall not warn again.
        setattr(sys.modules[module], name, value)
        return value

    return look_up
