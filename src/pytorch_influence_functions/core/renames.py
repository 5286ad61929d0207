"""Old names: each still works, with one sentence that says what or where it is now."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from functools import reduce
from typing import TYPE_CHECKING, Any

from .errors import nearest
from .warn import warn_caller

_PACKAGE = __name__.partition(".")[0]
# Names that methods of fitted objects had in version 1.0's previews.
_METHODS = {
    "self_scores": "self_influence",
    "redamped": "with_damping",
    "path": "scores_over_damping",
    "damping_path": "damping_curve",
}


class OldNames:
    """The base of fitted objects, whose methods had other names."""

    # Hidden from type checkers: they should report an old name.
    if not TYPE_CHECKING:

        def __getattr__(self, name: str) -> Any:
            new_name = _METHODS.get(name)
            if new_name is None or not hasattr(type(self), new_name):
                raise AttributeError(f"{type(self).__name__} has no attribute {name!r}.")
            warn_caller(f".{name}() is now .{new_name}().", DeprecationWarning)
            return getattr(self, new_name)


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
        warn_caller(f"{prefix}.{name} is now ptif.{places[name]}.", DeprecationWarning)
        value = reduce(getattr, places[name].split("."), sys.modules[_PACKAGE])
        # `from ... import name` looks twice; the second look shall not warn again.
        setattr(sys.modules[module], name, value)
        return value

    return look_up
