"""What else is known of every example, by which `where=` chooses: columns of texts, numbers, or True and False."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final, cast, final

import numpy as np
import torch
from jaxtyping import Bool
from torch import Tensor

from ..core.errors import InvalidInput, UnknownName, first_line, nearest
from .folder import IndexFolder, write_columns, writing

LABEL: Final = "label"
"""The column that is the label, where the index has none of that name."""
# The place of a text that is not there among those of a column.
_NONE: Final = -1

Array = np.ndarray[Any, Any]


@final
@dataclass(frozen=True, eq=False)
class Column:
    """One value per example.

    Args:
        name: of the column.
        values: numbers, or places among `texts`.
        texts: the different texts; None: these are numbers.
    """

    name: str
    values: Array
    texts: tuple[str, ...] | None = None

    @staticmethod
    def of(name: str, given: Any) -> Column:
        """Read one.

        Raises:
            InvalidInput: it holds neither texts nor numbers.
        """
        values = np.asarray(given.detach().cpu() if isinstance(given, Tensor) else given)
        if values.ndim == 1 and values.dtype.kind in "OUST":
            values = np.asarray([None if _is_missing(value) else value for value in values.tolist()], dtype=object)
            if all(value is None or isinstance(value, str) for value in values):
                return _of_texts(name, values)
            if all(value is None or isinstance(value, (bool, int, float)) for value in values):
                values = np.asarray([np.nan if value is None else value for value in values])
        if values.ndim != 1 or values.dtype.kind not in "biuf":
            shape = f"{values.dtype} of shape {values.shape}" if values.ndim != 1 else f"{values.dtype}"
            raise InvalidInput(
                f"Column {name!r} holds {shape}; a column has one text, number, True or False for every example "
                "(dates as texts: .astype(str))."
            )
        return Column(name, values.astype({"b": np.uint8, "f": np.float64}.get(values.dtype.kind, np.int64)))

    def array(self) -> Array:
        """The values as they were given."""
        if self.texts is None:
            return self.values.astype(bool) if self.values.dtype == np.uint8 else self.values
        return np.array([*self.texts, None], dtype=object)[self.values]

    def matching(self, wanted: Any) -> Array:
        """Which examples have the value, one of the values, or what a function says of the column.

        Raises:
            InvalidInput: the value is of another kind, or the function gives something else than one answer each.
            UnknownName: no example has the text; the nearest one is offered.
        """
        if callable(wanted):
            return self._asked(wanted)
        several = [wanted] if isinstance(wanted, str) or not isinstance(wanted, Iterable) else list(wanted)
        chosen = np.zeros(len(self.values), dtype=bool)
        for value in several:
            chosen |= self._equal(value.item() if isinstance(value, (np.generic, Tensor)) else value)
        return chosen

    def _equal(self, value: Any) -> Array:
        chosen: Array
        if self.texts is not None and (value is None or isinstance(value, str)):
            if value is not None and value not in self.texts:
                raise UnknownName(f"No example has {value!r} in the column {self.name!r}.{nearest(value, self.texts)}")
            chosen = self.values == (_NONE if value is None else self.texts.index(value))
            return chosen
        if self.texts is None and (value is None or isinstance(value, (bool, int, float))):
            chosen = np.isnan(self.values.astype(float)) if value is None else self.values == value
            return chosen
        kind = "numbers" if self.texts is None else "texts"
        raise InvalidInput(
            f"The column {self.name!r} of where= holds {kind}, and {value!r:.60} was asked for; give a value of that "
            "kind, a list of them, or a function of the column such as lambda values: values > 3."
        )

    def _asked(self, wanted: Callable[[Array], Any]) -> Array:
        try:
            chosen = np.asarray(wanted(self.array()))
        except Exception as cause:
            raise InvalidInput(
                f"The function of the column {self.name!r} in where= failed with {type(cause).__name__}: "
                f"{first_line(cause)}; it is given an array with one value per example."
            ) from cause
        if chosen.dtype != bool or chosen.shape != self.values.shape:
            raise InvalidInput(
                f"The function of the column {self.name!r} in where= gave {chosen.dtype} of shape {chosen.shape} for "
                f"{len(self.values):,} values; it must give True or False for each."
            )
        return chosen


def _is_missing(value: Any) -> bool:
    return value is None or (isinstance(value, float) and np.isnan(value)) or type(value).__name__ == "NAType"


def _of_texts(name: str, values: Array) -> Column:
    texts = tuple(sorted({value for value in values if value is not None}))
    place = {text: number for number, text in enumerate(texts)}
    return Column(name, np.asarray([place.get(value, _NONE) for value in values], dtype=np.int32), texts)


@final
@dataclass(frozen=True, eq=False)
class Columns:
    """All columns of some examples."""

    by_name: Mapping[str, Column]

    def __len__(self) -> int:
        return max((len(column.values) for column in self.by_name.values()), default=0)

    @staticmethod
    def of(given: Any, count: int | None) -> Columns:
        """Read `columns=`.

        Args:
            given: columns by name, a table of pandas, or one dictionary per example.
            count: how many examples there are; None: not known.

        Raises:
            InvalidInput: it is none of these, or columns are of another length.
        """
        if isinstance(given, Sequence) and given and all(isinstance(record, Mapping) for record in given):
            names = dict.fromkeys(name for record in given for name in record)
            given = {name: [record.get(name) for record in given] for name in names}
        if not hasattr(given, "items") or not len(given):
            raise InvalidInput(
                f"columns= must be columns by name such as {{'source': [...]}}, a table of pandas, or a list with one "
                f"dictionary per example, got {type(given).__name__}."
            )
        columns = Columns({str(name): Column.of(str(name), values) for name, values in given.items()})
        columns.check_length(len(next(iter(columns.by_name.values())).values) if count is None else count)
        return columns

    def check_length(self, count: int, advice: str = "give one for each") -> None:
        """Refuse columns of another length.

        Args:
            count: how many examples there are.
            advice: what to do then.

        Raises:
            InvalidInput: a column has more or fewer values.
        """
        for name, column in self.by_name.items():
            if len(column.values) != count:
                raise InvalidInput(
                    f"Column {name!r} has {len(column.values):,} values for {count:,} examples; {advice}."
                )

    @staticmethod
    def stored(folder: IndexFolder) -> Columns:
        """Those of an index.

        Raises:
            InvalidInput: some examples have none.
        """
        read = [_from_file(folder.read(file)) for file in folder.manifest.columns]
        if not read:
            return Columns({})
        joined = Columns({name: _join([some.by_name[name] for some in read]) for name in read[0].by_name})
        manifest = folder.manifest
        # Those of an append that goes on are not there yet.
        count = manifest.examples if manifest.complete else manifest.parts[-1]
        if len(joined) != count:
            raise InvalidInput(
                f"The index has columns for {len(joined):,} of its {count:,} examples: an append was interrupted, or "
                "came with another number of them; give all of them with index.annotate(columns)."
            )
        return joined

    def arrays(self) -> dict[str, Array]:
        """Every column as it was given."""
        return {name: column.array() for name, column in self.by_name.items()}

    def matching(self, where: Mapping[Any, Any], labels: Callable[[], Tensor | None]) -> Bool[Tensor, " n"]:
        """Which examples have all of these values.

        Args:
            where: a value, several values or a function, by the name of the column.
            labels: gives the labels, one per example.

        Raises:
            InvalidInput: no condition is given, or one cannot be compared.
            UnknownName: there is no such column.
        """
        if not where:
            raise InvalidInput('where={} names no column; write {"source": "web"}, or leave where= out.')
        chosen: Array | bool = True
        for name, wanted in where.items():
            column = self.by_name.get(name)
            if column is None and name == LABEL:
                own = labels()
                column = None if own is None else Column.of(LABEL, own)
            if column is None:
                known = ", ".join(map(repr, self.by_name)) or "none: give them with index.annotate(columns)"
                raise UnknownName(
                    f"The index has no column {name!r}; its columns are {known}.{nearest(str(name), self.by_name)}"
                )
            chosen = chosen & column.matching(wanted)
        return torch.from_numpy(cast("Array", chosen))

    def to_file(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Tensors, and a record of plain values."""
        tensors = {f"column.{n}": torch.from_numpy(column.values) for n, column in enumerate(self.by_name.values())}
        record = [[name, column.texts] for name, column in self.by_name.items()]
        return tensors, {"columns": record}


def _from_file(file: Any) -> Columns:
    columns = {}
    for n, (name, texts) in enumerate(file.record["columns"]):
        values = file.tensors[f"column.{n}"].numpy()
        columns[name] = Column(name, values, None if texts is None else tuple(texts))
    return Columns(columns)


def _join(parts: Sequence[Column]) -> Column:
    first = parts[0]
    if len(parts) == 1:
        return first
    if first.texts is None:
        return replace(first, values=np.concatenate([part.values for part in parts]))
    return _of_texts(first.name, np.concatenate([part.array() for part in parts]))


def annotate(folder: IndexFolder, columns: Columns, anew: bool = False) -> IndexFolder:
    """Store columns: after those that are there, or in their place.

    Args:
        folder: the index.
        columns: of all examples, or of those that were appended.
        anew: in place of those that are there.
    """
    with writing(folder.path):
        opened = IndexFolder.open(folder.path, folder.check)
        before = () if anew else opened.manifest.columns
        written = write_columns(opened.path, *columns.to_file())
        opened.write(replace(opened.manifest, columns=(*before, written)))
        opened.drop_unlisted()
    return opened


def further_columns(folder: IndexFolder, given: Any, count: int | None) -> Columns | None:
    """The columns of appended examples, which must be those that the index has.

    Raises:
        InvalidInput: they are not.
    """
    have = _kinds(Columns.stored(folder)) if folder.manifest.columns else {}
    table = None if given is None else Columns.of(given, count)
    new = {} if table is None else _kinds(table)
    if have != new:
        raise InvalidInput(
            f"The index has {_listed(have)} and the appended examples have {_listed(new)}; give columns= with the same "
            "names and kinds, or give all examples other ones afterwards with index.annotate(columns)."
        )
    return table


def _kinds(columns: Columns) -> dict[str, str]:
    return {n: "texts" if c.texts is not None else str(c.values.dtype) for n, c in columns.by_name.items()}


def _listed(kinds: Mapping[str, str]) -> str:
    if not kinds:
        return "no columns"
    return "the columns " + ", ".join(f"{name!r} ({kind})" for name, kind in sorted(kinds.items()))
