"""A folder that is gone when whoever needs it is: for what has no room in memory."""

from __future__ import annotations

import shutil
import tempfile
import weakref
from pathlib import Path
from typing import final

from .errors import TooLarge


@final
class TemporaryFolder:
    """A folder under the system's temporary one, removed when this object is let go, or at the end of the program.

    Args:
        size: how many bytes will be written.
        what: what they are, the subject of a sentence.
        way_out: what to do where the disk has no room.

    Raises:
        TooLarge: the disk has no room for them.
    """

    def __init__(self, size: float, what: str, way_out: str) -> None:
        base = tempfile.gettempdir()
        free = shutil.disk_usage(base).free
        if size > free:
            raise TooLarge(
                f"{what} take {size / 2**30:.3g} GiB, more than memory may be taken, and {base!r} has "
                f"{free / 2**30:.3g} GiB free for them; {way_out}."
            )
        self.path = Path(tempfile.mkdtemp(prefix="ptif-"))
        self._finalizer = weakref.finalize(self, shutil.rmtree, self.path, ignore_errors=True)
