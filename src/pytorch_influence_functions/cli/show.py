"""Results on a terminal, at most 80 columns wide. Text from data is made harmless first."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from ..scores.diagnostics import Diagnostics
from ..scores.scores import Labels, Scores

_STYLES = {"ok": "green", "warn": "yellow", "bad": "bold red"}
_QUERIES, _EACH, _LABEL = 5, 3, 20


def harmless(text: str, most: int = 40) -> str:
    """Text without control characters (which could steer the terminal), on one line and cut at `most`.

    >>> harmless("a\\x1b[2Jb\\nc"), harmless("x" * 50, 5)
    ('a?[2Jb?c', 'xxxx…')
    """
    plain = "".join(c if c.isprintable() else "?" for c in text)
    return plain if len(plain) <= most else plain[: most - 1] + "…"


def signed(value: float) -> str:
    """A score with its sign, three digits.

    >>> signed(0.01234), signed(-2e-6), signed(0.0)
    ('+0.0123', '−2e-06', '+0')
    """
    return f"{value:+.3g}".replace("-", "−", 1) if value < 0 else f"{value:+.3g}"


def heading(words: str) -> Text:
    """A line that begins a part."""
    return Text(words, style="bold")


def indented(what: Any) -> Padding:
    """Two columns in from the left."""
    return Padding(what, (0, 0, 0, 2), expand=False)


def influences(scores: Scores) -> list[Any]:
    """The first queries, each with its most helpful and most harmful examples."""
    columns = [("query", "right"), ("label", "left")] if scores.query_labels is not None else [("query", "right")]
    table = plain_table([*columns, ("most helpful", "left"), ("most harmful", "left")])
    for at in range(min(_QUERIES, len(scores))):
        cells = [Text(str(int(scores.query_ids[at])))]
        if scores.query_labels is not None:
            cells.append(Text(harmless(_label(scores, scores.query_labels, at), _LABEL)))
        for pairs in (scores.helpful(at, _EACH), scores.harmful(at, _EACH)):
            cells.append(Text("\n".join(f"#{i} {signed(s)}" for i, s in pairs)))
        table.add_row(*cells)
    more = len(scores) - _QUERIES
    return [indented(table), *([Text(f"  and {more:,} more queries")] if more > 0 else [])]


def _label(scores: Scores, labels: Labels, at: int) -> str:
    return "" if labels is None else scores.label_name(labels[at])


def plain_table(columns: Sequence[tuple[str, str]]) -> Table:
    """A table without lines, of (title, "left" or "right")."""
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim")
    for title, justify in columns:
        table.add_column(title, justify="right" if justify == "right" else "left", no_wrap=True)
    return table


def checklist(diagnostics: Diagnostics) -> Padding:
    """The assumptions, each with its verdict."""
    table = Table(box=None, show_header=False, pad_edge=False, padding=(0, 1, 0, 0))
    for _ in range(3):
        table.add_column()
    for check in diagnostics.checks():
        table.add_row(Text(f"[{check.status}]", style=_STYLES[check.status]), Text(check.name), Text(check.text))
    for note in diagnostics.notes:
        table.add_row(Text("[note]"), Text(""), Text(harmless(note, 500)))
    return indented(table)


def written(files: Sequence[tuple[Path, str]]) -> Padding:
    """Files and what they hold."""
    table = Table(box=None, show_header=False, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column(overflow="fold")
    table.add_column()
    for path, what in files:
        table.add_row(Text(str(path)), Text(what))
    return indented(table)


def facts(pairs: Sequence[tuple[str, str]]) -> Padding:
    """Names and values, the values wrapped under their own column."""
    table = Table(box=None, show_header=False, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column(style="dim", no_wrap=True)
    table.add_column()
    for name, value in pairs:
        table.add_row(Text(name), Text(value))
    return indented(table)


def worst_first(values: torch.Tensor, order: torch.Tensor, labels: Sequence[str] | None, top: int) -> Padding:
    """The `top` examples of largest self-influence."""
    columns = [("rank", "right"), ("example", "right")] + ([("label", "left")] if labels is not None else [])
    table = plain_table([*columns, ("self-influence", "right")])
    for rank, i in enumerate(order[:top].tolist(), 1):
        cells = [Text(str(rank)), Text(f"#{i}")]
        cells += [] if labels is None else [Text(harmless(labels[i], 30))]
        table.add_row(*cells, Text(f"{float(values[i]):.3g}"))
    return indented(table)
