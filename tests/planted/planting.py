"""How a bug is planted, and how its law has to answer.

A row is a bug, the patch that plants it, and the law that has to notice. Every law also runs without the bug.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeAlias

import pytest
from _pytest.outcomes import Failed

from pytorch_influence_functions.core.errors import IncompleteSolveWarning, InfluenceError

Patch: TypeAlias = Callable[[pytest.MonkeyPatch], None]
Law: TypeAlias = Callable[[], None]


@dataclass(frozen=True)
class Bug:
    name: str
    plant: Patch
    law: Law


def swap(owner: Any, name: str, bug: Callable[..., Any]) -> Patch:
    """Plant `bug(original, *args, **kwargs)` in place of `owner.name`."""

    def plant(monkeypatch: pytest.MonkeyPatch) -> None:
        original = getattr(owner, name)
        monkeypatch.setattr(owner, name, lambda *args, **kwargs: bug(original, *args, **kwargs))

    return plant


def swap_everywhere(function: Callable[..., Any], bug: Callable[..., Any]) -> Patch:
    """Plant `bug(function, *args, **kwargs)` in every module that imported the function, the laws' modules too."""

    def plant(monkeypatch: pytest.MonkeyPatch) -> None:
        places = [
            (module, name)
            for key, module in list(sys.modules.items())
            if key.partition(".")[0] in ("pytorch_influence_functions", "tests")
            for name, value in list(vars(module).items())
            if value is function
        ]
        for module, name in places:
            monkeypatch.setattr(module, name, lambda *args, **kwargs: bug(function, *args, **kwargs))

    return plant


def all_of(*patches: Patch) -> Patch:
    """Several patches that make up one bug."""

    def plant(monkeypatch: pytest.MonkeyPatch) -> None:
        for patch in patches:
            patch(monkeypatch)

    return plant


def must_be_noticed(bug: Bug, monkeypatch: pytest.MonkeyPatch) -> None:
    """The law holds, and fails while the bug is there."""
    bug.law()
    with monkeypatch.context() as planted:
        bug.plant(planted)
        with pytest.raises((AssertionError, InfluenceError, IncompleteSolveWarning, Failed)):
            bug.law()
