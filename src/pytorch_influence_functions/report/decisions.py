"""What was ticked on a report page, read back: the file that its Decisions view downloads."""

from __future__ import annotations

import csv
import io
import itertools
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, final

from ..core.errors import InvalidInput
from ..core.notebook import html_table

FORMAT: Final = "pytorch-influence-functions/decisions"
VERSIONS: Final = (1, 2)
WRONG_LABEL, DUPLICATE, KEEP = "wrong_label", "duplicate", "keep"
_KINDS = (WRONG_LABEL, DUPLICATE, KEEP)
_COLUMNS = ("index", "decision", "label", "name", "suggested_label", "self_influence")


@final
@dataclass(frozen=True)
class Decision:
    """One ticked training example.

    Attributes:
        index: its position in the training dataset.
        decision: `"wrong_label"`, `"duplicate"` or `"keep"`.
        relabel_as: the label it should have, as the page shows labels, or a number; None where none was given.
        label, name, suggested_label, self_influence: as the report showed them; None where unknown.
    """

    index: int
    decision: str
    relabel_as: str | float | None = None
    label: str | None = None
    name: str | None = None
    suggested_label: str | None = None
    self_influence: float | None = None


@final
@dataclass(frozen=True, repr=False)
class Decisions:
    """The decisions on one report, ordered by index.

    Attributes:
        entries: one for every ticked example.
        training_examples: how many training examples the report was of; None for a CSV file, which does not say.
        report: the fingerprint of the page's contents; None for a CSV file.
    """

    entries: tuple[Decision, ...]
    training_examples: int | None = None
    report: str | None = None

    def __len__(self) -> int:
        return len(self.entries)

    def _of(self, kind: str) -> list[int]:
        return [d.index for d in self.entries if d.decision == kind]

    @property
    def wrong_labels(self) -> list[int]:
        """Indices ticked as wrong labels."""
        return self._of(WRONG_LABEL)

    @property
    def duplicates(self) -> list[int]:
        """Indices ticked as duplicates."""
        return self._of(DUPLICATE)

    @property
    def kept(self) -> list[int]:
        """Indices ticked to be kept."""
        return self._of(KEEP)

    @property
    def relabels(self) -> dict[int, str | float]:
        """The new label of each example that was given one, by index."""
        return {d.index: d.relabel_as for d in self.entries if d.relabel_as is not None}

    def __repr__(self) -> str:
        counts = f"{len(self.wrong_labels)} wrong labels ({len(self.relabels)} with a new one)"
        return f"Decisions({counts}, {len(self.duplicates)} duplicates, {len(self.kept)} kept)"

    def _repr_html_(self) -> str:
        def text(value: Any) -> str:
            return "" if value is None else str(value)

        rows = [(str(d.index), d.decision, text(d.label), text(d.relabel_as), text(d.name)) for d in self.entries]
        return html_table(rows, ("index", "decision", "label", "relabel as", "name"))


def read_decisions(path: str | os.PathLike[str], training_examples: int | None = None) -> Decisions:
    """Read `decisions.json` or `decisions.csv`, as the page wrote it, or the table of `ptif label-issues`.

    A row of a table with an empty decision is one on which nothing is decided.

    Args:
        path: the file; its ending says which of the two.
        training_examples: the size of the training set the decisions are for, to check that they are of its report.

    Raises:
        InvalidInput: another format, another training set, an unknown decision, or an index that is outside it or
            named twice.

    >>> decisions = read_decisions("decisions.json", len(train))  # doctest: +SKIP
    >>> clean = [i for i in range(len(train)) if i not in set(decisions.wrong_labels)]  # doctest: +SKIP
    """
    file = Path(path)
    try:
        text = file.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as cause:
        raise InvalidInput(f"{os.fspath(path)!r} cannot be read ({cause}); give what the page downloaded.") from cause
    table = file.suffix.lower() == ".csv"
    rows, size, report = _read_csv(file, text) if table else _read_json(file, text)
    if training_examples is not None and size is not None and size != training_examples:
        raise InvalidInput(
            f"{file.name} was written on a report of {size:,} training examples, and these are {training_examples:,}; "
            "give the training set of that report."
        )
    limit = training_examples if size is None else size
    entries = sorted((_as_decision(file, row, limit) for row in rows), key=lambda d: d.index)
    twice = next((a.index for a, b in itertools.pairwise(entries) if a.index == b.index), None)
    if twice is not None:
        raise InvalidInput(f"{file.name} decides twice on training example {twice}; keep one of the two.")
    return Decisions(tuple(entries), size if size is not None else training_examples, report)


def _read_json(file: Path, text: str) -> tuple[list[Any], int, str | None]:
    try:
        content = json.loads(text)
    except ValueError as cause:
        raise InvalidInput(f"{file.name} is not JSON ({cause}); give what the page downloaded.") from cause
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise InvalidInput(f"{file.name} holds no decisions (its format is not {FORMAT!r}); give decisions.json.")
    if content.get("version") not in VERSIONS:
        raise InvalidInput(
            f"{file.name} has version {content.get('version')!r} of the format and versions "
            f"{' and '.join(map(str, VERSIONS))} can be read; read it with the version that wrote the report."
        )
    rows, size = content.get("decisions"), content.get("training_examples")
    if not isinstance(rows, list) or isinstance(size, bool) or not isinstance(size, int):
        raise InvalidInput(f"{file.name} lacks its decisions or its number of training examples; download it again.")
    report = content.get("report")
    return rows, size, report if isinstance(report, str) else None


def _read_csv(file: Path, text: str) -> tuple[list[Any], None, None]:
    reader = csv.DictReader(io.StringIO(text, newline=""))
    missing = [name for name in _COLUMNS[:2] if name not in (reader.fieldnames or ())]
    if missing:
        raise InvalidInput(f"{file.name} has no column {missing[0]!r}; give what the page downloaded.")
    rows = [_from_csv(row) for row in reader]
    return [row for row in rows if row["decision"] is not None], None, None


def _from_csv(row: Mapping[str, str | None]) -> dict[str, Any]:
    """Texts as they were before the apostrophe that keeps spreadsheets from running them; empty cells as None."""
    plain: dict[str, Any] = {}
    for name, cell in row.items():
        text = cell or ""
        plain[name] = (text[1:] if text[:1] == "'" and text[1:2] in tuple("=+-@\t\r") else text) or None
    for name in ("index", "self_influence"):
        try:
            plain[name] = json.loads(plain.get(name) or "null")
        except ValueError:
            continue  # refused below, with the row
    return plain


def _as_decision(file: Path, row: Any, size: int | None) -> Decision:
    index = row.get("index") if isinstance(row, dict) else None
    if isinstance(index, bool) or not isinstance(index, int) or index < 0 or (size is not None and index >= size):
        of = "" if size is None else f" of {size:,}"
        raise InvalidInput(f"{file.name} decides on training example {index!r}, which is none{of}; download it again.")
    if row.get("decision") not in _KINDS:
        raise InvalidInput(
            f"{file.name} has the decision {row.get('decision')!r} for training example {index}; it must be one of "
            f"{', '.join(_KINDS)}."
        )
    relabel = row.get("relabel_as")
    if isinstance(relabel, bool) or not isinstance(relabel, (str, int, float, type(None))):
        raise InvalidInput(f"{file.name} relabels training example {index} as {relabel!r}; give a text or a number.")
    if relabel is not None and row["decision"] != WRONG_LABEL:
        raise InvalidInput(f"{file.name} relabels training example {index}, which is not ticked as a wrong label.")
    rest = {name: row.get(name) for name in _COLUMNS[2:]}
    return Decision(index, row["decision"], relabel, **rest)
