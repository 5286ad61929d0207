"""How results look at a prompt and in a notebook: one short line, and small tables in which every text is escaped."""

from __future__ import annotations

import html
from collections.abc import Iterable

_WIDTH = 120
"""The most characters of the line that stands for a result at a prompt."""
_LEFT = "text-align:left;vertical-align:top"


class Printable:
    """A record with a long `str`: its `repr` is one line, and a notebook shows what `print` would.

    Derive from it and write `@dataclass(frozen=True, repr=False)`.
    """

    def __repr__(self) -> str:
        first, *more = str(self).splitlines() or [""]
        fact = " ".join(first.split())
        line = f"<{type(self).__name__}: {fact}{'; print() shows it all' if more else ''}>"
        return line if len(line) <= _WIDTH else f"<{type(self).__name__}; print() shows it>"

    def _repr_html_(self) -> str:
        return f"<pre>{html.escape(str(self))}</pre>"


def html_table(rows: Iterable[Iterable[str]], head: Iterable[str] = (), title: str = "") -> str:
    """A table for a notebook; cells, head and title are plain text.

    >>> "&lt;b&gt;</td>" in html_table([("a", "<b>")])
    True
    """

    def line(cells: Iterable[str], tag: str) -> str:
        return "<tr>" + "".join(f"<{tag} style='{_LEFT}'>{html.escape(c)}</{tag}>" for c in cells) + "</tr>"

    titles = list(head)
    lines = ([line(titles, "th")] if titles else []) + [line(cells, "td") for cells in rows]
    heading = f"<p><b>{html.escape(title)}</b></p>" if title else ""
    return f"{heading}<table>{''.join(lines)}</table>"
