"""The self-influence of training examples in a folder: a table for readers and the numbers for programs."""

import csv
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

from torch import Tensor

from ..core.distributed import World
from ..core.errors import InvalidInput
from ..core.files import read_tensors, write_bytes, write_tensors
from ..core.text import printable
from ..core.token_text import text_name_of
from ..problem.ingredients import CODE, OUTPUTS, WEIGHTS
from ..problem.problem import Problem, sweep
from ..scores.indexing import plain_value
from .fingerprints import TRAINING_DATA
from .folder import fingerprint_of, read_record

RECORD: Final = "self_influence.json"
NUMBERS: Final = "self_influence.safetensors"
TABLE: Final = "self_influence.csv"
_KIND: Final = "self-influence"
# A spreadsheet takes a cell that begins with one of these for a formula.
_FORMULA_STARTS: Final = ("=", "+", "-", "@", "\t", "\r")


def write_files(folder: Path, values: Tensor, labels: Sequence[str] | None, method: str, fingerprint: str) -> None:
    """Write both files: all N numbers in training order, and the table with the largest first."""
    record = {"n_train": len(values), "method": method, "fingerprint": fingerprint}
    write_tensors(folder / NUMBERS, _KIND, {"values": values.double()}, record)
    table = io.StringIO()
    writer = csv.writer(table, lineterminator="\n")
    writer.writerow(["rank", "index", *([] if labels is None else ["label"]), "self_influence"])
    for rank, i in enumerate(most_suspicious_first(values).tolist(), 1):
        label = [] if labels is None else [text_cell(labels[i])]
        writer.writerow([rank, i, *label, repr(float(values[i]))])
    write_bytes(folder / TABLE, printable(table.getvalue()).encode())


def most_suspicious_first(values: Tensor) -> Tensor:
    """Training indices, the largest self-influence first; equal values by index."""
    return values.argsort(descending=True, stable=True)


def read_numbers(folder: Path, fingerprint: str) -> Tensor:
    """The numbers that `write_files` wrote for this fingerprint.

    Raises:
        InvalidInput: there are none, or the file is damaged or of another run.
    """
    tensors, record = read_tensors(folder / NUMBERS, _KIND, cure="run ptif self-influence again")
    if record.get("fingerprint") != fingerprint or "values" not in tensors:
        raise InvalidInput(f"{str(folder / NUMBERS)!r} is of another run than {RECORD}; run ptif self-influence again.")
    return tensors["values"]


def find_self_influence(folder: Path) -> Tensor | None:
    """The numbers in the folder of a run, or None if there are none.

    Raises:
        InvalidInput: they are of another model or other training data than the run.
    """
    if not (folder / NUMBERS).exists():
        return None
    own, run = fingerprint_of(read_record(folder, RECORD)), fingerprint_of(read_record(folder))
    names = own.differences(run, among=(WEIGHTS, CODE, OUTPUTS, TRAINING_DATA))
    if names:
        raise InvalidInput(
            f"The self-influence in {str(folder)!r} is of other {', '.join(names)} than the scores; run "
            "ptif self-influence --overwrite, or remove its files."
        )
    return read_numbers(folder, own.identity)


def label_names(problem: Problem) -> list[str] | None:
    """The name of every training example's label, or of its text; None if targets are no labels."""
    if text_name_of(problem.data.whole, 0) is not None:
        return [text_name_of(problem.data.whole, index) or "" for index in range(len(problem.data.whole))]
    labels = problem.labels
    if not labels.complete:  # without a fit, the labels have not been read yet
        for _ in sweep(problem, label="labels", world=World()):
            pass
    label_list = labels.as_list(World())
    if label_list is None or any(label is None for label in label_list):
        return None
    names = problem.data.class_names
    return [_label_name(plain_value(label), names) for label in label_list]


def _label_name(label: Any, names: Sequence[str] | None) -> str:
    if isinstance(label, int) and names is not None and 0 <= label < len(names):
        return names[label]
    return f"{label:.4g}" if isinstance(label, float) else str(label)


def text_cell(text: str) -> str:
    """A cell that no spreadsheet takes for a formula."""
    try:
        float(text)
    except ValueError:
        return "'" + text if text.startswith(_FORMULA_STARTS) else text
    return text
