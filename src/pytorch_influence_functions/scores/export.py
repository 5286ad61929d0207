"""Scores as tables: the long table, comma-separated values, and the short table that a notebook shows."""

from __future__ import annotations

import csv
import html
import io
from collections.abc import Mapping
from typing import Any, TypeAlias

import numpy as np

from ..core.token_text import text_name_of
from . import indexing

Scores: TypeAlias = Any  # the class is of the file above, which imports this one


def long_table(scores: Scores) -> dict[str, Any]:
    """Columns of one row per query and training example held, ordered by query, then rank."""
    queries, width = scores.shape
    ranked = [scores.helpful(row, None) for row in range(queries)]
    places = [index for pairs in ranked for index, _ in pairs]
    table: dict[str, Any] = {
        "query": scores.query_ids.repeat_interleave(width).numpy(),
        "train": np.array(places, dtype=np.int64),
        "score": np.array([score for pairs in ranked for _, score in pairs], dtype=np.float64),
        "rank": np.tile(np.arange(1, width + 1), queries),
    }
    rows = np.repeat(np.arange(queries), width).tolist()
    for side, at in (("query", rows), ("train", places)):
        labels, names = getattr(scores, f"{side}_labels"), getattr(scores, f"{side}_names")
        if labels is not None:
            values = indexing.plain_values(labels)
            table[f"{side}_label"] = [values[i] for i in at]
            if scores.class_names is not None:
                class_names = [scores.label_name(label) for label in values]
                table[f"{side}_class"] = [class_names[i] for i in at]
        if names is not None:
            table[f"{side}_name"] = [names[i] for i in at]
        elif side == "train" and text_name_of(scores.train_source, 0) is not None:
            texts = {i: text_name_of(scores.train_source, i) for i in set(places)}
            table["train_name"] = [texts[i] for i in places]
    return table


def as_csv(table: Mapping[str, Any]) -> str:
    """A table of equally long columns as comma-separated values with a head."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(table)
    writer.writerows(zip(*(indexing.plain_values(column) for column in table.values()), strict=True))
    return text.getvalue()


def as_html(scores: Scores, rows: int, k: int) -> str:
    """The first queries, each with its `k` most helpful and harmful examples."""

    # Names and labels come from data: everything is escaped.
    def cell(pairs: list[tuple[int, float]]) -> str:
        return "<br>".join(f"{html.escape(scores.describe_train(i))} <code>{s:+.3g}</code>" for i, s in pairs)

    lines = []
    for row in range(min(rows, len(scores))):
        name = html.escape(scores.describe_query(row))
        label = html.escape(scores.label_name(indexing.member_at(scores.query_labels, row)))
        cells = (f"{name}<br>{label}", cell(scores.helpful(row, k)), cell(scores.harmful(row, k)))
        lines.append("<tr>" + "".join(f"<td style='text-align:left'>{c}</td>" for c in cells) + "</tr>")
    more = f"<p>and {len(scores) - rows:,} more queries</p>" if len(scores) > rows else ""
    first, *more_facts = repr(scores).splitlines()
    head = html.escape("\n".join([first, *more_facts[: 1 if scores.provenance else 0]]))
    titles = "<tr><th>query</th><th>most helpful</th><th>most harmful</th></tr>"
    return f"<pre>{head}</pre><table>{titles}{''.join(lines)}</table>{more}"
