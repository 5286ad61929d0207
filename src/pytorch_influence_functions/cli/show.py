"""Results on a terminal, at most 80 columns wide. Control characters are removed from the data's texts."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Group
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from ..scores.diagnostics import Diagnostics
from ..scores.scores import Labels, Scores

_STYLES = {"ok": "green", "warn": "yellow", "bad": "bold red"}
_MAX_PARTS, _MAX_QUERIES, _EXAMPLES, _LABEL_LENGTH, _NAME_LENGTH = 8, 5, 3, 20, 18


def printable(text: str, length: int = 40) -> str:
    """Text without control characters (which could steer the terminal), on one line and cut to `length`.

    >>> printable("a\\x1b[2Jb\\nc"), printable("x" * 50, 5)
    ('a?[2Jb?c', 'xxxx…')
    """
    line = "".join(c if c.isprintable() else "?" for c in text)
    return line if len(line) <= length else line[: length - 1] + "…"


def format_score(value: float) -> str:
    """A score with its sign and three digits.

    >>> format_score(0.01234), format_score(-2e-6), format_score(0.0)
    ('+0.0123', '−2e-06', '+0')
    """
    return f"{value:+.3g}".replace("-", "−", 1) if value < 0 else f"{value:+.3g}"


def count_queries(count: int) -> str:
    """`1 query`, or `2 queries`."""
    return f"{count:,} {'query' if count == 1 else 'queries'}"


def heading(title: str) -> Text:
    """The first line of a part."""
    return Text(title, style="bold")


def indent(item: Any) -> Padding:
    """Indent by two columns."""
    return Padding(item, (0, 0, 0, 2), expand=False)


def influence_table(scores: Scores, names: Callable[[int], str] | None = None) -> list[Any]:
    """The first queries, each with its most helpful and most harmful examples, and their names where there are any."""
    columns = [("query", "right"), ("label", "left")] if scores.query_labels is not None else [("query", "right")]
    table = borderless_table([*columns, ("most helpful", "left"), ("most harmful", "left")])
    for row in range(min(_MAX_QUERIES, len(scores))):
        cells = [Text(str(int(scores.query_ids[row])))]
        if scores.query_labels is not None:
            cells.append(Text(printable(_label_name(scores, scores.query_labels, row), _LABEL_LENGTH)))
        for pairs in (scores.helpful(row, _EXAMPLES), scores.harmful(row, _EXAMPLES)):
            words = ["" if names is None else " " + printable(names(i), _NAME_LENGTH) for i, _ in pairs]
            lines = [f"#{i} {format_score(s)}{name}" for (i, s), name in zip(pairs, words, strict=True)]
            cells.append(Text("\n".join(lines)))
        table.add_row(*cells)
    more = len(scores) - _MAX_QUERIES
    return [indent(table), *([Text(f"  and {more:,} more queries")] if more > 0 else [])]


def _query_names(scores: Scores) -> list[Any]:
    """The first queries by their names, where they have any; the table has no room for them."""
    places, rows = scores.query_ids.tolist(), range(min(_MAX_QUERIES, len(scores)))
    names = [(str(places[row]), scores.describe_query(row)) for row in rows]
    known = [(place, printable(name, 60)) for place, name in names if name != f"query {place}"]
    return [fact_table([(f"query {place}", name) for place, name in known])] if known else []


def influence_tables(parts: Mapping[str, Scores], names: Callable[[int], str] | None = None) -> list[Any]:
    """The names of the queries, and the table of the whole model or one for each of the first parts."""
    lines = _query_names(next(iter(parts.values())))
    for part, scores in list(parts.items())[:_MAX_PARTS]:
        lines += ([indent(Text(printable(part, 60)))] if part else []) + influence_table(scores, names)
    more = len(parts) - _MAX_PARTS
    return [*lines, *([Text(f"  and {more:,} more parts")] if more > 0 else [])]


def _label_name(scores: Scores, labels: Labels, row: int) -> str:
    return "" if labels is None else scores.label_name(labels[row])


def borderless_table(columns: Sequence[tuple[str, str]]) -> Table:
    """A table without lines, with columns (title, "left" or "right")."""
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim")
    for title, justify in columns:
        table.add_column(title, justify="right" if justify == "right" else "left", no_wrap=True)
    return table


def checklist(diagnostics: Diagnostics) -> Padding:
    """The assumptions of influence functions, each with its verdict."""
    table = Table(box=None, show_header=False, pad_edge=False, padding=(0, 1, 0, 0))
    for _ in range(3):
        table.add_column()
    for check in diagnostics.checks():
        table.add_row(Text(f"[{check.status}]", style=_STYLES[check.status]), Text(check.name), Text(check.text))
    for note in diagnostics.notes:
        table.add_row(Text("[note]"), Text(""), Text(printable(note, 500)))
    return indent(table)


def file_table(files: Sequence[tuple[Path, str]]) -> Padding:
    """Files and their descriptions, under their folder where it is another: so no name of a file is broken in two."""
    table = Table(box=None, show_header=False, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column(no_wrap=True)
    table.add_column()
    for path, description in files:
        table.add_row(Text(path.name), Text(description))
    folders = dict.fromkeys(str(path.parent) for path, _ in files)
    if list(folders) == ["."]:
        return indent(table)
    return indent(Group(Text("in " + ", ".join(folders), overflow="fold"), table))


def fact_table(pairs: Sequence[tuple[str, str]]) -> Padding:
    """Names and values; long values wrap inside their own column."""
    table = Table(box=None, show_header=False, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column(style="dim", no_wrap=True)
    table.add_column()
    for name, value in pairs:
        table.add_row(Text(name), Text(value))
    return indent(table)


def ranking_table(values: torch.Tensor, order: torch.Tensor, labels: Sequence[str] | None, top: int) -> Padding:
    """The `top` examples of the largest self-influence."""
    columns = [("rank", "right"), ("example", "right")] + ([("label", "left")] if labels is not None else [])
    table = borderless_table([*columns, ("self-influence", "right")])
    for rank, i in enumerate(order[:top].tolist(), 1):
        cells = [Text(str(rank)), Text(f"#{i}")]
        cells += [] if labels is None else [Text(printable(labels[i], 30))]
        table.add_row(*cells, Text(f"{float(values[i]):.3g}"))
    return indent(table)
