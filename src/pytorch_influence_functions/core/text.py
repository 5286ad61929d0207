"""Text that somebody else's data hold, made fit to be drawn and written."""

from __future__ import annotations


def printable(text: str) -> str:
    """The text with a question mark for every lone surrogate: half of a letter, which no file and no font can hold.

    >>> printable("a" + chr(0xD800) + "b")
    'a?b'
    """
    return text.encode("utf-8", "replace").decode("utf-8")
