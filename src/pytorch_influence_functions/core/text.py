"""Text that somebody else's data hold, made fit to be drawn and written."""

from __future__ import annotations

import re


def printable(text: str) -> str:
    """The text with a question mark for every lone surrogate: half of a letter, which no file and no font can hold.

    >>> printable("a" + chr(0xD800) + "b")
    'a?b'
    """
    return text.encode("utf-8", "replace").decode("utf-8")


def as_title(name: str) -> str:
    """A name as a title: what the library calls a row begins with a capital letter, somebody's text is left as it is.

    >>> as_title("query 3"), as_title("mean over 2 queries"), as_title("a book")
    ('Query 3', 'Mean over 2 queries', 'a book')
    """
    return name[:1].upper() + name[1:] if re.match(r"query -?\d|mean over ", name) else name
