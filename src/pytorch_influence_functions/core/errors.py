"""Every error a user can meet. Messages are one sentence: what was seen, what was expected, what to do."""

from __future__ import annotations

import difflib
import importlib
import re
from collections.abc import Iterable
from types import ModuleType


class InfluenceError(Exception):
    """Base of everything this library raises on purpose."""


class InvalidInput(InfluenceError, ValueError):
    """The data, model, loss or settings handed in cannot be used as they are."""


class UnknownName(InvalidInput):
    """A key, layer pattern or method name that does not exist; the nearest one is offered."""


class NonFinite(InfluenceError, ValueError):
    """A NaN or an infinity was met; the message names the dataset indices."""


class NotLikelihood(InfluenceError, TypeError):
    """The objective does not say enough for the curvature that was asked for."""


class SolveFailed(InfluenceError, RuntimeError):
    """A linear solve did not reach its tolerance; the message names cause and cure."""


class TooLarge(InfluenceError, MemoryError):
    """The forecast memory is above the bound; the message prints both and the way out."""


class ProcessFailed(InfluenceError, RuntimeError):
    """Another process that shares the work failed or ended; the message says which and why."""


class MissingExtra(InfluenceError, ImportError):
    """An optional library is not installed; the message is the line that installs it."""


class TrainingDataWarning(UserWarning):
    """The data or model break an assumption of influence functions without making the answer impossible."""


class IncompleteSolveWarning(UserWarning):
    """A solve ended before its tolerance and what it reached was used; the message says how far it got."""


def nearest(name: object, known: Iterable[str]) -> str:
    """`" Did you mean 'x'?"` with the closest known name, or an empty string: also for a key that is no text.

    >>> nearest("recursion_dept", ["recursion_depth", "damp"])
    " Did you mean 'recursion_depth'?"
    """
    if not isinstance(name, str):
        return ""
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f" Did you mean {close[0]!r}?" if close else ""


def name_ids(ids: Iterable[int], limit: int = 8) -> str:
    """Dataset indices in words, at most `limit` of them.

    >>> name_ids([3, 5])
    '3, 5'
    """
    ids = [int(i) for i in ids]
    more = f" and {len(ids) - limit} more" if len(ids) > limit else ""
    return ", ".join(map(str, ids[:limit])) + more


def first_line(failure: BaseException, most: int = 200) -> str:
    """The first line of a failure's message without a full stop, at most so long; its class where it has none.

    A message that begins with the numbers of a tensor, as where one is called, is shown without them.

    >>> first_line(ValueError("no such layer.\\nTraceback"))
    'no such layer'
    """
    text = re.sub(r"^tensor\(.*\)(?= )", "a tensor", str(failure).strip(), flags=re.DOTALL)
    lines = text.splitlines() or [type(failure).__name__]
    return lines[0][:most].rstrip(".")


def require(module: str, extra: str) -> ModuleType:
    """Import an optional library, or say in one line how to install it."""
    try:
        return importlib.import_module(module)
    except ImportError as cause:
        raise MissingExtra(
            f"{module} is not installed; this feature needs it: pip install 'pytorch-influence-functions[{extra}]'."
        ) from cause
