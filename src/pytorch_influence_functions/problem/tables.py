"""Arrays, frames, lists and sparse matrices as datasets: columns of equal length, labels in words as class numbers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import ConcatDataset, Dataset, TensorDataset

from ..core.errors import InvalidInput


@dataclass(frozen=True, eq=False)
class NamedTensors(Dataset[dict[str, Tensor]]):
    """A mapping of equally long tensors as a dataset of dictionaries."""

    tensors: Mapping[str, Tensor]

    def __len__(self) -> int:
        return len(next(iter(self.tensors.values())))

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {name: values[index] for name, values in self.tensors.items()}


class LabelledTensors(TensorDataset):
    """Tensors whose last member was words: the class numbers, and the words as `classes`."""

    def __init__(self, tensors: Sequence[Tensor], classes: list[str]) -> None:
        super().__init__(*tensors)
        self.classes = classes


@dataclass(frozen=True, eq=False)
class SparseRows(Dataset[Any]):
    """A sparse matrix, of scipy or torch, beside dense columns; rows are written out when read, a batch at a time."""

    matrix: Any
    columns: Dataset[Any]

    def __len__(self) -> int:
        return int(self.matrix.shape[0])

    def __getitem__(self, index: int) -> Any:
        return self.__getitems__([index])[0]

    def __getitems__(self, ids: list[int]) -> list[Any]:
        if isinstance(self.matrix, Tensor):
            rows = self.matrix.index_select(0, torch.tensor(ids, device=self.matrix.device)).to_dense()
        else:
            rows = torch.as_tensor(self.matrix[ids].toarray()).to(torch.get_default_dtype())
        return [(row, *self.columns[i]) for row, i in zip(rows, ids, strict=True)]

    @property
    def classes(self) -> list[str] | None:
        """The names of the classes, where labels were words."""
        return getattr(self.columns, "classes", None)


def as_dataset(data: Any, classes: Sequence[str] | None = None) -> Any:
    """Arrays, frames and lists become a dataset; whatever has a length and items is one already.

    Args:
        data: what was given.
        classes: the names of the classes that labels in words are numbered by; None: their own, in alphabetical order.

    Raises:
        InvalidInput: columns of different lengths or without numbers, a table without a target, an unknown label.
    """
    if _is_frame(data) and len(data.shape) == 2:
        names = [str(name) for name in list(data.columns)]
        raise InvalidInput(
            f"A table with the columns {', '.join(map(repr, names[:4]))}{', ...' if len(names) > 4 else ''} does not "
            f"say which is the target; pass a pair, such as (frame.drop(columns={names[-1]!r}), frame[{names[-1]!r}])."
        )
    if _is_array(data) or _is_frame(data):
        data = (data,)
    if type(data) is TensorDataset and any(map(_is_sparse, data.tensors)):
        data = data.tensors  # of which no batch could be made
    if isinstance(data, (tuple, list)) and data and _are_columns(data):
        return _dataset_of_columns(data, classes)
    if isinstance(data, Mapping) and not isinstance(data, Dataset):
        if data and all(_is_array(x) or _is_frame(x) for x in data.values()):
            return NamedTensors(_check_lengths({str(k): as_tensor(v, str(k)) for k, v in data.items()}))
        raise InvalidInput(
            f"A mapping with {', '.join(map(repr, list(data)[:4])) or 'nothing'} is not a dataset; "
            "pass one split of it, or a mapping of equally long tensors or arrays."
        )
    return data


def columns_of(data: Any) -> dict[str, tuple[Any, ...]]:
    """The names of the columns of every frame in the data, by the frame's place, or its key in a mapping.

    Args:
        data: what was given.
    """
    return {place: names for place, member in _members(data).items() if (names := _column_names(member))}


def in_order_of(data: Any, columns: Mapping[str, tuple[Any, ...]]) -> Any:
    """The data with their frames' columns in the order that these have: by name, not by place.

    Args:
        data: what was given.
        columns: see `columns_of`; a place that is not in it has no names, and is taken as it stands.

    Raises:
        InvalidInput: a frame has other columns.
    """
    members = _members(data)
    changed = {
        place: _ordered(member, columns[place], f"Array {place}")
        for place, member in members.items()
        if place in columns and _column_names(member) not in ((), columns[place])
    }
    if not changed:
        return data
    if isinstance(data, Mapping):
        return {key: changed.get(str(key), member) for key, member in data.items()}
    return type(data)(changed.get(place, member) for place, member in members.items())


def row_in_order_of(row: Any, columns: Mapping[str, tuple[Any, ...]]) -> Any:
    """New inputs of one example, of which a series with the names of the columns is put in their order.

    Args:
        row: one input, a tuple of one for each, or a mapping of them.
        columns: see `columns_of`.

    Raises:
        InvalidInput: a series has other names.
    """
    if isinstance(row, Mapping):
        return {key: _row_ordered(value, columns.get(str(key)), f"The new {key}") for key, value in row.items()}
    if isinstance(row, tuple) and any(_is_frame(value) for value in row):
        return tuple(_row_ordered(value, columns.get(str(i)), f"New input {i}") for i, value in enumerate(row))
    return _row_ordered(row, columns.get("0"), "The new input")


def _members(data: Any) -> dict[str, Any]:
    """What stands side by side in the data, where that is a pair or a mapping of arrays."""
    if isinstance(data, Mapping) and not isinstance(data, Dataset):
        return {str(key): member for key, member in data.items()}
    if isinstance(data, (tuple, list)) and any(map(_is_frame, data[:8])) and _are_columns(data):
        return {str(place): member for place, member in enumerate(data)}
    return {}


def _column_names(member: Any) -> tuple[Any, ...]:
    """Those of a frame of several columns; none where they are only numbered, as in a frame made of an array."""
    if not _is_frame(member) or len(member.shape) != 2 or not hasattr(member, "columns"):
        return ()
    names = tuple(member.columns)
    return () if len(names) < 2 or names == tuple(range(len(names))) else names


def _ordered(frame: Any, names: tuple[Any, ...], what: str) -> Any:
    given = _column_names(frame)
    if len(set(given)) == len(given) and set(given) == set(names):
        return frame[list(names)]
    raise InvalidInput(_other_columns(what, given, names, "frame[[...]]", "frame"))


def _row_ordered(row: Any, names: tuple[Any, ...] | None, what: str) -> Any:
    labels = getattr(row, "index", None)
    if names is None or not _is_frame(row) or len(row.shape) != 1 or labels is None:
        return row
    given = tuple(labels)
    if given in (names, tuple(range(len(given)))):
        return np.array(row)
    if len(set(given)) == len(given) and set(given) == set(names):
        return np.array(row[list(names)])
    raise InvalidInput(_other_columns(what, given, names, "row[[...]]", "row"))


def _other_columns(what: str, given: tuple[Any, ...], names: tuple[Any, ...], choice: str, variable: str) -> str:
    missing, more = [n for n in names if n not in given], [n for n in given if n not in names]
    differences = [f"lacks {_listed(missing)}"] if missing else []
    differences += [f"has {_listed(more)} besides"] if more else []
    differences = differences or ["has a name twice"]
    return (
        f"{what} {' and '.join(differences)}, and columns go together by name with those of the training data "
        f"({_listed(names)}); choose or rename them, {choice} or rename(), or pass {variable}.to_numpy() where the "
        "places are right."
    )


def _listed(names: Sequence[Any]) -> str:
    return ", ".join(map(repr, names[:4])) + (", ..." if len(names) > 4 else "")


def holds_double_arrays(data: Any) -> bool:
    """Whether some of the columns that were given are NumPy's arrays of float64.

    Args:
        data: what was given.
    """
    columns = data if isinstance(data, (tuple, list)) else data.values() if isinstance(data, Mapping) else [data]
    # By kind and size: numbers of the other byte order are another type to NumPy.
    kinds = [column.dtype for column in columns if isinstance(column, np.ndarray)]
    return any(kind.kind == "f" and kind.itemsize == 8 for kind in kinds)


def as_tensor(value: Any, name: str) -> Tensor:
    """One column as a tensor; a frame's or list's real numbers in torch's default precision.

    Raises:
        InvalidInput: it holds no numbers, or only one.
    """
    if isinstance(value, Tensor):
        tensor = value.detach()
        tensor = tensor if tensor.layout is torch.strided else tensor.to_dense()
    else:
        array = value.to_numpy() if _is_frame(value) else np.asarray(value)
        if array.dtype == object and _is_frame(value):
            array = _as_real(value, array, name)
        if array.dtype.kind not in "biuf":
            raise InvalidInput(
                f"Array {name} has dtype {array.dtype}, which is not numeric; "
                "convert it to a numeric array first (labels to class numbers, ragged lists to a Dataset)."
            )
        # A copy where torch cannot share: negative strides, foreign byte order, read-only memory.
        shareable = array.flags.writeable and array.flags.c_contiguous and array.dtype.isnative
        array = array if shareable else np.array(array, dtype=array.dtype.newbyteorder("="), order="C")
        tensor = torch.as_tensor(array)
        if tensor.dtype == torch.float64 and not isinstance(value, np.ndarray):
            # Frames and lists know one real type only; it says nothing about the model.
            tensor = tensor.to(torch.get_default_dtype())
    if tensor.ndim == 0:
        raise InvalidInput(
            f"Array {name} is a single number; expected one entry per example, and a single example is written as a "
            "list of one, [(x, y)]."
        )
    return tensor


def _as_real(frame: Any, array: np.ndarray[Any, Any], name: str) -> np.ndarray[Any, Any]:
    """A frame of columns of several types as real numbers: booleans and whole numbers too, what is missing as NaN."""
    try:
        return array.astype(np.float64)
    except (TypeError, ValueError):
        pass
    try:
        # pandas' own numbers that may be missing; polars has NaN there already.
        missing = np.vectorize(lambda entry: type(entry).__name__ in ("NAType", "NoneType"), otypes=[bool])(array)
        return np.where(missing, np.nan, array).astype(np.float64)
    except (TypeError, ValueError):
        pass
    if len(frame.shape) == 1:
        entry = min((e for e in array.tolist() if not isinstance(e, (int, float))), key=lambda e: isinstance(e, str))
        raise InvalidInput(
            f"Array {name} holds {entry!r}, which is no number, and not words alone; leave out examples without a "
            "label, and give numbers, or words for all."
        )
    where, way_out = "", "encode them as numbers first, e.g. with pandas.get_dummies(frame)"
    if len(frame.shape) == 2:
        arrays = {str(column): frame[column].to_numpy() for column in list(frame.columns)}
        odd = [repr(column) for column, entries in arrays.items() if not _is_numeric(entries)]
        where = f" ({', '.join(odd[:4])}{', ...' if len(odd) > 4 else ''})"
        if any(entries.dtype.kind in "mM" for entries in arrays.values()):
            way_out = "drop dates or count days in them, and encode words, e.g. with pandas.get_dummies(frame)"
    raise InvalidInput(f"Array {name} is a table with columns that are not numeric{where}; {way_out}.")


def _is_numeric(array: np.ndarray[Any, Any]) -> bool:
    if array.dtype.kind != "O":
        return array.dtype.kind in "biuf"
    try:
        array.astype(np.float64)
    except (TypeError, ValueError):
        return False
    return True


def _dataset_of_columns(data: Sequence[Any], classes: Sequence[str] | None) -> Any:
    *first, last = data
    names: list[str] | None = None
    if len(data) > 1 and (words := _as_words(last)) is not None:
        last, names = _encode(words, classes if classes is not None else _categories(last))
    if len(data) > 1 and _is_sparse(data[0]):
        rest = _dataset_of_columns([*first[1:], last], None)
        rest = rest if names is None else LabelledTensors(rest.tensors, names)
        _check_lengths({"0": data[0], "1": rest})
        sparse = data[0].detach().to_sparse().coalesce() if isinstance(data[0], Tensor) else data[0].tocsr()
        return SparseRows(sparse, rest)
    _refuse_other_order(data)
    tensors = _check_lengths({str(i): as_tensor(x, str(i)) for i, x in enumerate([*first, last])})
    return TensorDataset(*tensors.values()) if names is None else LabelledTensors(list(tensors.values()), names)


def _refuse_other_order(columns: Sequence[Any]) -> None:
    """Rows go together by place, so frames that label the same rows must hold them in one order."""
    labels = [(i, x.index) for i, x in enumerate(columns) if _is_frame(x) and hasattr(x, "index")]
    # Of polars nothing has an index; of pandas every frame and series.
    for place, index in labels[1:]:
        first, other = labels[0]
        if len(index) == len(other) and not index.equals(other) and set(index) == set(other):
            differing = next(k for k, (a, b) in enumerate(zip(other, index, strict=True)) if a != b)
            raise InvalidInput(
                f"Arrays {first} and {place} label the same rows in different orders (row {differing} is "
                f"{other[differing]!r} and {index[differing]!r}), and rows go together by place; order one by the "
                "other, y.loc[x.index], or pass y.to_numpy() where the places are right."
            )


def _check_lengths(columns: dict[str, Any]) -> dict[str, Any]:
    sizes = {name: column.shape[0] if _is_sparse(column) else len(column) for name, column in columns.items()}
    if len(set(sizes.values())) > 1:
        lengths = ", ".join(f"{name} has {size}" for name, size in sizes.items())
        raise InvalidInput(
            f"The arrays have different lengths ({lengths}); each needs one entry per example, and a single example is "
            "written as a list of one, [(x, y)]."
        )
    return columns


def class_names_of(dataset: Any) -> list[str] | None:
    """The names of the classes, where a dataset knows them.

    Args:
        dataset: any dataset, or one around another.
    """
    for attribute in ("classes", "class_names"):
        names = getattr(dataset, attribute, None)
        if isinstance(names, (list, tuple)) and names and all(isinstance(name, str) for name in names):
            return list(names)
    for label in ("label", "labels"):
        if (named := class_names_in(dataset, label)) is not None:
            return named
    if isinstance(dataset, ConcatDataset):
        several = [class_names_of(part) for part in dataset.datasets]
        return several[0] if all(names == several[0] for names in several) else None
    inner = getattr(dataset, "dataset", None)
    return None if inner is None or inner is dataset else class_names_of(inner)


def class_names_in(dataset: Any, column: str) -> list[str] | None:
    """The names of the classes in a column, where a dataset of Hugging Face has them (`ClassLabel`).

    Args:
        dataset: any dataset.
        column: of the labels.
    """
    features = getattr(dataset, "features", None)
    names = getattr(features.get(column), "names", None) if isinstance(features, Mapping) else None
    return list(names) if isinstance(names, list) and all(isinstance(name, str) for name in names) else None


# --------------------------------------------------------------------------- what is what


def _is_array(value: Any) -> bool:
    return isinstance(value, (Tensor, np.ndarray))


def _is_frame(value: Any) -> bool:
    """A frame or series of pandas, polars and their like."""
    return callable(getattr(value, "to_numpy", None)) and hasattr(value, "shape")


def _is_sparse(value: Any) -> bool:
    if isinstance(value, Tensor):
        return value.layout not in (torch.strided, torch.jagged)
    return hasattr(value, "nnz") and callable(getattr(value, "tocsr", None))


def _are_columns(data: tuple[Any, ...] | list[Any]) -> bool:
    """(x, y) as two columns; a list of (x, y) pairs is a dataset as it stands."""
    columns = [_is_array(x) or _is_frame(x) or _is_sparse(x) for x in data]
    if isinstance(data, list):
        return all(columns)
    if any(columns):
        return True
    # Two lists of numbers, equally long; examples are tuples or hold things of several kinds.
    return len(data) > 1 and all(type(x) is list and _is_regular(x) for x in data)


def _is_regular(values: list[Any]) -> bool:
    try:
        return np.asarray(values).dtype.kind in "biufU" and len(values) > 0
    except ValueError:
        return False


def _as_words(values: Any) -> list[str] | None:
    """Labels that are words, one per example; None where they are something else."""
    if isinstance(values, Tensor) or _is_sparse(values):
        return None
    array = values.to_numpy() if _is_frame(values) else np.asarray(values) if _is_array(values) else None
    if array is None:
        array = np.asarray(values) if type(values) is list and _is_regular(values) else None
    if array is None or array.ndim != 1 or array.dtype.kind not in "OUT":
        return None
    entries = array.tolist()
    return entries if entries and all(isinstance(entry, str) for entry in entries) else None


def _categories(values: Any) -> list[str] | None:
    """The names of a categorical series, in its own order."""
    categories: Any = getattr(getattr(values, "dtype", None), "categories", None)
    names = categories.tolist() if hasattr(categories, "tolist") else None
    return names if names and all(isinstance(name, str) for name in names) else None


def _encode(words: list[str], classes: Sequence[str] | None) -> tuple[Tensor, list[str]]:
    """Class numbers of labels in words."""
    names = sorted(set(words)) if classes is None else list(classes)
    if not names:
        raise InvalidInput(
            f"Label {words[0]!r} is a word and the training labels are not; give class numbers, as for training."
        )
    number = {name: i for i, name in enumerate(names)}
    unknown = sorted(set(words) - set(number))
    if unknown:
        raise InvalidInput(
            f"Label {unknown[0]!r} is none of the classes {', '.join(map(repr, names[:6]))}; give labels by these "
            "names, or as class numbers."
        )
    return torch.tensor([number[word] for word in words]), names
