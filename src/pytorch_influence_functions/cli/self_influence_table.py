"""Self-influence of the training examples in a folder: a table to read and the numbers to compute with."""

import csv
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

from torch import Tensor

from ..core.distributed import World
from ..core.errors import InvalidInput
from ..core.files import read_tensors, write_bytes, write_tensors
from ..problem.ingredients import CODE, OUTPUTS, WEIGHTS
from ..problem.problem import Problem, sweep
from ..scores.indexing import plain_value
from .fingerprints import TRAINING_DATA
from .folder import fingerprint_of, read_record

RECORD: Final = "self_influence.json"
NUMBERS: Final = "self_influence.safetensors"
TABLE: Final = "self_influence.csv"
_KIND: Final = "self-influence"
# What a spreadsheet would take for a formula at the start of a cell.
_FORMULA: Final = ("=", "+", "-", "@", "\t", "\r")


def save(folder: Path, values: Tensor, labels: Sequence[str] | None, method: str, fingerprint: str) -> None:
    """Write both files: all N numbers in training order, and the table with the largest first."""
    record = {"n_train": len(values), "method": method, "fingerprint": fingerprint}
    write_tensors(folder / NUMBERS, _KIND, {"values": values.double()}, record)
    table = io.StringIO()
    writer = csv.writer(table, lineterminator="\n")
    writer.writerow(["rank", "index", *([] if labels is None else ["label"]), "self_influence"])
    for rank, i in enumerate(worst(values).tolist(), 1):
        label = [] if labels is None else [_cell(labels[i])]
        writer.writerow([rank, i, *label, repr(float(values[i]))])
    write_bytes(folder / TABLE, table.getvalue().encode())


def worst(values: Tensor) -> Tensor:
    """Training indices, the largest self-influence first, equal ones by index."""
    return values.argsort(descending=True, stable=True)


def read(folder: Path, fingerprint: str) -> Tensor:
    """The numbers that `save` wrote for this fingerprint.

    Raises:
        InvalidInput: there are none, or the file is damaged or of another run.
    """
    tensors, record = read_tensors(folder / NUMBERS, _KIND, cure="run ptif self-influence again")
    if record.get("fingerprint") != fingerprint or "values" not in tensors:
        raise InvalidInput(f"{str(folder / NUMBERS)!r} is of another run than {RECORD}; run ptif self-influence again.")
    return tensors["values"]


def kept_self_influence(folder: Path) -> Tensor | None:
    """The numbers where they lie in the folder of a run, else None.

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
    return read(folder, own.identity)


def label_words(problem: Problem) -> list[str] | None:
    """Every training example's label as a person would read it; None where targets are no labels."""
    labels = problem.labels
    if not labels.complete:  # where nothing was computed, nothing has been read either
        for _ in sweep(problem, label="labels", world=World()):
            pass
    known = labels.as_list(World())
    if known is None or any(label is None for label in known):
        return None
    names = problem.data.class_names
    return [_word(plain_value(label), names) for label in known]


def _word(label: Any, names: Sequence[str] | None) -> str:
    if isinstance(label, int) and names is not None and 0 <= label < len(names):
        return names[label]
    return f"{label:.4g}" if isinstance(label, float) else str(label)


def _cell(text: str) -> str:
    try:
        float(text)
    except ValueError:
        return "'" + text if text.startswith(_FORMULA) else text
    return text
