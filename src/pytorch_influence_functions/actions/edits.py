"""What is changed in the training data: examples removed, relabelled, replaced, added or weighted otherwise."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence, Set
from dataclasses import dataclass
from dataclasses import replace as replace_fields
from typing import Any, final

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from ..core.errors import InvalidInput, name_ids, nearest
from ..core.validate import finite_number
from ..problem.data import Source
from ..problem.edited import EditedExamples, label_of
from ..problem.problem import Problem
from ..problem.tables import row_in_order_of


@final
@dataclass(frozen=True, eq=False)
class Term:
    """Examples whose weight in the sum over the training data changes."""

    source: Source
    ids: Int[Tensor, " n"]
    """Their indices in `source`."""
    weights: Float[Tensor, " n"]
    """By how much each one's weight changes: -1 removes it, +1 adds it."""
    repeats: bool = False
    """The inputs are those of the term before, in its order, with other labels."""


@final
@dataclass(frozen=True, eq=False)
class Edit:
    """A change of the training data, as the examples whose weights it changes.

    A new label or new inputs take the old example out and put the new one in.

    Args:
        terms: the examples and by how much their weights change.
        description: what is changed, in words.
    """

    terms: tuple[Term, ...]
    description: str

    @staticmethod
    def of(
        problem: Problem,
        remove: Any = None,
        relabel: Mapping[int, Any] | None = None,
        replace: Mapping[int, Any] | None = None,
        add: Any = None,
        reweight: Mapping[int, float] | None = None,
    ) -> Edit:
        """Read what was asked; indices are places in the whole training dataset.

        Args:
            problem: whose training data are changed.
            remove: indices, pairs (index, score) such as `scores.harmful(0, 5)`, or a bool mask over the training data.
            relabel: new labels by index; names of classes where the data have them.
            replace: new inputs by index.
            add: more examples: a dataset, a loader, tensors or arrays `(x, y)`.
            reweight: new weights by index; 1 is the weight that an example has now.

        Raises:
            InvalidInput: nothing is changed, everything is removed, or an index or label cannot be used.
        """
        relabel, replace, reweight = _as_mapping(relabel), _as_mapping(replace), _as_mapping(reweight)
        removed = read_indices(problem.data, remove, "remove")
        names = problem.data.class_names
        labels = {
            i: read_label(place, label_of(problem.data.item(i)), label, names)
            for (i, label), place in zip(
                _by_index(problem.data, relabel, "relabel").items(), relabel or {}, strict=True
            )
        }
        inputs = _by_index(problem.data, replace, "replace")
        inputs = {i: row_in_order_of(row, problem.data.columns) for i, row in inputs.items()}
        weights = _by_index(problem.data, reweight, "reweight")
        _refuse_twice(removed=removed, reweighted=weights, changed=[*labels, *(i for i in inputs if i not in labels)])
        terms, parts = [], []
        if removed:
            terms.append(_term(problem.data, removed, -1.0))
            parts.append(f"{_count(removed)} removed")
        if labels or inputs:
            # All examples, so that messages name them by their own indices.
            edited = EditedExamples(problem.data.dataset, range(len(problem.data)), labels, inputs)
            changed = replace_fields(problem.data, dataset=edited)
            for ids, repeats in ((sorted({*labels} - {*inputs}), True), (sorted(inputs), False)):
                if ids:
                    terms += [_term(problem.data, ids, -1.0), _term(changed, ids, 1.0, repeats)]
            parts += [f"{_count(labels)} relabelled"] if labels else []
            parts += [f"{_count(inputs)} replaced"] if inputs else []
        if add is not None:
            more = problem.data.read_alike(add, problem.batch_size)
            terms.append(_term(more, range(len(more)), 1.0))
            parts.append(f"{_count(range(len(more)))} added")
        if weights:
            changes = [finite_number(f"reweight[{i}]", w, least=0) - 1.0 for i, w in weights.items()]
            terms.append(Term(problem.data, torch.tensor(list(weights)), torch.tensor(changes, dtype=torch.float64)))
            parts.append(f"{_count(weights)} weighted otherwise")
        if not terms:
            raise InvalidInput("Nothing is changed; give remove=, relabel=, replace=, add= or reweight=.")
        edit = Edit(tuple(terms), ", ".join(parts))
        if len(problem) + edit.weight <= 1e-9 * len(problem):
            raise InvalidInput(f"Of the {len(problem)} training examples nothing would be left; leave some in.")
        return edit

    @property
    def adds(self) -> bool:
        """Whether any loss gets more weight than it has: a new label, new inputs, an added example, a larger weight."""
        return any(bool((term.weights > 0).any()) for term in self.terms)

    @property
    def weight(self) -> float:
        """The sum of all changes of weight: -k where k examples are removed."""
        return float(sum(term.weights.sum() for term in self.terms))

    def __len__(self) -> int:
        return sum(len(term.ids) for term in self.terms)


def _term(source: Source, ids: Iterable[int], weight: float, repeats: bool = False) -> Term:
    indices = torch.tensor(list(ids), dtype=torch.long)
    return Term(source, indices, torch.full((len(indices),), weight, dtype=torch.float64), repeats)


def _count(examples: Any) -> str:
    return f"{len(examples)} example{'' if len(examples) == 1 else 's'}"


def read_indices(source: Source, given: Any, name: str) -> list[int]:
    """Positions in the source of what was given as places in the whole dataset, each once.

    Args:
        source: the training data.
        given: indices, pairs (index, score) as `Scores.harmful` gives them, or a bool mask over the whole dataset;
            None: none.
        name: of the argument, for messages.

    Raises:
        InvalidInput: no whole numbers, out of range, or one more than once.
    """
    if given is None:
        return []
    if isinstance(given, Set):
        given = sorted(given)
    elif _are_ranked(given):
        given = [index for index, _ in given]
    elif hasattr(given, "__array__") and not isinstance(given, Tensor):
        given = np.array(given)  # a copy: a column of a table may not be written to
    single = hasattr(given, "__index__") and not hasattr(given, "__len__")
    try:
        values = torch.as_tensor(int(given) if single else given if hasattr(given, "__len__") else list(given))
    except (TypeError, ValueError, RuntimeError) as cause:
        raise InvalidInput(f"{name}= takes indices of training examples, such as [3, 7], got {given!r}.") from cause
    whole = len(source.whole)
    if values.dtype == torch.bool:
        if values.shape != (whole,):
            raise InvalidInput(
                f"{name}= is a mask of shape {tuple(values.shape)} and there are {whole} training examples; give one "
                "bool for each, or indices."
            )
        values = values.nonzero()
    if values.numel() and values.is_floating_point():
        raise InvalidInput(f"{name}= takes whole numbers, the indices of training examples, got {values.dtype}.")
    chosen = [int(i) for i in values.reshape(-1).tolist()]
    outside = [i for i in chosen if not 0 <= i < whole]
    if outside:
        raise InvalidInput(
            f"{name}= names index {name_ids(outside)}, and the training examples are 0 to {whole - 1}; choose others."
        )
    twice = sorted({i for i in chosen if chosen.count(i) > 1}) if len(set(chosen)) < len(chosen) else []
    if twice:
        raise InvalidInput(f"{name}= names index {name_ids(twice)} more than once; give each once.")
    return [source.index_of(i) for i in chosen]


def _are_ranked(given: Any) -> bool:
    """Whether these are pairs of an index and a score."""
    return isinstance(given, (list, tuple)) and all(
        isinstance(pair, tuple) and [type(part) for part in pair] == [int, float] for pair in given
    )


def _as_mapping(given: Any) -> Any:
    """A column of a pandas table as the mapping that it stands for; anything else as it is."""
    return given.to_dict() if hasattr(given, "to_dict") else given


def _by_index(source: Source, given: Any, name: str) -> dict[int, Any]:
    if given is None:
        return {}
    if not isinstance(given, Mapping):
        example = {"relabel": "{3: 0}", "replace": "{3: x}", "reweight": "{3: 0.5}"}[name]
        raise InvalidInput(f"{name}= takes a mapping by index, such as {example}, got {type(given).__name__}.")
    return dict(zip(read_indices(source, list(given), name), given.values(), strict=True))


def class_number(names: Sequence[str] | None, label: Any) -> Any:
    """A class given by its name as its number; anything else as it is.

    Args:
        names: of the classes, where the data know them.
        label: what was given.

    Raises:
        InvalidInput: no class has this name.
    """
    if not isinstance(label, str):
        return label
    if names is None or label not in names:
        known = f"{nearest(label, names)} The classes are {', '.join(names)}." if names else " Give its number."
        raise InvalidInput(f"{label!r} is no class of the training data.{known}")
    return list(names).index(label)


def label_from_text(old: Any, given: Any, names: Sequence[str] | None) -> Any:
    """A number that came as a text, where the data hold numbers; anything else as it is.

    Args:
        old: the example's label, as the dataset holds it.
        given: the new one, as a page or a command line has it.
        names: of the classes, where the data know them.

    >>> label_from_text(1, "2", None), label_from_text(0.5, "2", None), label_from_text(1, "cat", ["cat", "dog"])
    (2, 2.0, 'cat')
    """
    if not isinstance(given, str) or isinstance(old, str) or (names is not None and given in names):
        return given
    try:
        return int(given) if whole_label(old) is not None else float(given)
    except ValueError:
        return given


def read_label(place: int, old: Any, given: Any, names: Sequence[str] | None) -> Any:
    """A new label of the kind of the old one.

    Args:
        place: of the example in the training dataset, for messages.
        old: its label, as the dataset holds it.
        given: the new one: a class by its name or number, where the old one is a class number.
        names: of the classes, where the data know them.

    Raises:
        InvalidInput: no class has this name, or it is no class number where the old label is one.
    """
    label = given if isinstance(old, str) else class_number(names, given)
    if whole_label(old) is not None and isinstance(label, float) and label.is_integer():
        label = int(label)
    if whole_label(old) is not None and whole_label(label) is None:
        raise InvalidInput(f"The new label {given!r} of example {place} is no class number, as {old!r} is; give one.")
    if label is None:
        raise InvalidInput(f"Example {place} has no new label; give one, or remove the example.")
    return label


def whole_label(label: Any) -> int | None:
    """A class number as an int, from a tensor, an array or a number; None for anything else.

    Args:
        label: as a dataset holds it, or as it was given.
    """
    if isinstance(label, Tensor):
        label = label.item() if label.numel() == 1 else None
    elif hasattr(label, "item") and not isinstance(label, (int, float)):
        label = label.item()
    return label if isinstance(label, int) else None


def _refuse_twice(**groups: Iterable[int]) -> None:
    """Refuse an example to which two different things are done."""
    done: dict[int, str] = {}
    for name, ids in groups.items():
        for index in ids:
            if index in done:
                raise InvalidInput(f"Example {index} is both {done[index]} and {name}; do one thing to each example.")
            done[index] = name
