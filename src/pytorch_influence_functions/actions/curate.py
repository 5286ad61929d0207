"""Decisions about training examples carried out: the edited dataset, and what training on it is worth."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias, final

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Subset

from ..core.errors import InvalidInput
from ..evaluation.accuracy import Accuracy
from ..evaluation.correlate import Estimate
from ..evaluation.retraining import retrain
from ..evaluation.subsets import Protocol, Subsets
from ..evaluation.truth import Truth
from ..problem.data import Source
from ..problem.edited import EditedExamples, label_of
from ..problem.labels import labels_of
from ..problem.model_state import plain_autograd
from ..report.decisions import Decisions, read_decisions
from .edits import label_from_text, read_indices, read_label, whole_label
from .label_issues import LabelIssues

ReadLabel: TypeAlias = Callable[[str | float], Any]


@final
@dataclass(frozen=True, eq=False, repr=False)
class CuratedData:
    """Training data after decisions about them; `curate` makes it.

    Attributes:
        source: the training data as they were.
        removed: which examples were taken out: places in the training dataset, ascending.
        relabelled: the new labels by place, as the dataset holds labels.
    """

    source: Source
    removed: tuple[int, ...]
    relabelled: Mapping[int, Any]

    @property
    def ids(self) -> Int[Tensor, " m"]:
        """The examples that stay, as places in the training dataset, [m]."""
        positions = self.source.positions
        return self._stays if positions is None else positions[self._stays]

    @property
    def weights(self) -> Float[Tensor, " n"]:
        """One weight for every training example, [N]: 1 for those that stay, 0 for the others.

        For `torch.utils.data.WeightedRandomSampler`, or the `sample_weight` of other libraries.
        """
        return torch.zeros(len(self.source.whole)).index_fill(0, self.ids, 1.0)

    @property
    def dataset(self) -> Dataset[Any]:
        """The examples that stay, with their new labels."""
        stays = self._stays.tolist()
        if not self.relabelled:
            return Subset(self.source.dataset, stays)
        return EditedExamples(self.source.dataset, stays, self._labels)

    def loader(self, **options: Any) -> DataLoader[Any]:
        """A loader of the edited data, with the batch size and the collate function of the one that was given.

        Args:
            options: for the `DataLoader`; `shuffle=True` unless said otherwise.
        """
        settings: dict[str, Any] = {
            "batch_size": self.source.batch_size,
            "collate_fn": self.source.collate,
            "shuffle": True,
        }
        return DataLoader(self.dataset, **(settings | options))

    @plain_autograd()
    def retrain(
        self,
        recipe: Any,
        test: Any,
        seeds: int | Sequence[int] = 5,
        *,
        measure: Any = None,
        folder: str | os.PathLike[str] | None = None,
        workers: int | None = None,
    ) -> CurationEffect:
        """Train on the data as they were and as they are now, with each seed, and measure both on test data.

        Args:
            recipe: a `ptif.evaluation.Recipe`, or your own function `(dataset, seed) -> trained model`.
            test: labelled data that had no part in the decisions.
            seeds: how many (0, 1, ...), or which.
            measure: what is measured on every test example, an objective or loss; `None`: whether the class is right.
            folder, workers: as in `ptif.evaluation.retrain`.

        Raises:
            InvalidInput: the recipe, the data or the seeds cannot be used.

        Example:
            >>> from pytorch_influence_functions.evaluation import Recipe
            >>> x, y = torch.randn(40, 3), torch.arange(40) % 2
            >>> recipe = Recipe(lambda: torch.nn.Linear(3, 2), epochs=2)
            >>> effect = curate((x, y), {4: 1, 7: None}).retrain(recipe, (x[:9], y[:9]), seeds=2)
            >>> effect.after.low <= effect.after.value <= effect.after.high
            True
        """
        test_source = self.source.read_alike(test)
        measured = Accuracy() if measure is None else measure
        truth = retrain(
            recipe, self._subsets, seeds, train=self.source, queries=test_source, measure=measured, folder=folder,
            workers=workers,
        )  # fmt: skip
        return CurationEffect.of(truth, str(self), "accuracy" if isinstance(measured, Accuracy) else truth.measure)

    @property
    def _labels(self) -> dict[int, Any]:
        """New labels by position in the source."""
        return {self.source.index_of(i): label for i, label in self.relabelled.items()}

    @property
    def _stays(self) -> Int[Tensor, " m"]:
        """Positions in the source of the examples that stay."""
        stays = torch.ones(len(self.source), dtype=torch.bool)
        stays[[self.source.index_of(i) for i in self.removed]] = False
        return stays.nonzero()[:, 0]

    @property
    def _subsets(self) -> Subsets:
        kept = torch.zeros(1, len(self.source), dtype=torch.bool)
        kept[0, self._stays] = True
        protocol = Protocol.RELABELLED if self.relabelled else Protocol.GROUPS
        return Subsets(kept, protocol, str(self), (self._labels,))

    def __str__(self) -> str:
        n = len(self.source)
        parts = [f"{len(self.removed)} of {n} examples removed"] if self.removed else []
        parts += [f"{len(self.relabelled)} of {n} relabelled"] if self.relabelled else []
        return ", ".join(parts)

    def __repr__(self) -> str:
        return f"CuratedData({self})"


@final
@dataclass(frozen=True, eq=False, repr=False)
class CurationEffect:
    """What training on the edited data was worth. `CuratedData.retrain` makes it.

    Attributes:
        before: the measure after training on the data as they were: the mean over test examples and seeds, with
            Student's 95 % interval over seeds (NaN for one seed).
        after: the same for the edited data.
        gain: after minus before, seed by seed, so that luck of the seed falls out.
        truth: every measurement.
        edit: what was changed, in words.
        measure: what was measured, in words.
    """

    before: Estimate
    after: Estimate
    gain: Estimate
    truth: Truth
    edit: str
    measure: str

    @classmethod
    def of(cls, truth: Truth, edit: str, measure: str) -> CurationEffect:
        """Sum up measurements of one edit.

        Args:
            truth: of one subset.
            edit: what was changed, in words.
            measure: what was measured, in words.
        """
        before, after = truth.baseline.double().mean(1), truth.measured[0].double().mean(1)
        protocol = f"{len(truth.seeds)} seeds, {truth.baseline.shape[1]} test examples"
        gain = Estimate.over_seeds(after - before, protocol)
        return cls(
            Estimate.over_seeds(before, protocol), Estimate.over_seeds(after, protocol), gain, truth, edit, measure
        )

    def __str__(self) -> str:
        around = "" if math.isnan(self.gain.low) else f" ({self.gain.low:+.3f} to {self.gain.high:+.3f})"
        return (
            f"{self.edit}: {self.measure} {self.before.value:.3f} -> {self.after.value:.3f}, {self.gain.value:+.3f}"
            f"{around} over {self.gain.protocol}"
        )

    __repr__ = __str__


def curate(
    train: Any,
    decisions: Any,
    class_names: Sequence[str] | None = None,
    as_label: ReadLabel | None = None,
) -> CuratedData:
    """Carry out decisions about training examples: some are removed, others get another label.

    Nothing is trained; `.retrain(recipe, test)` of the result says what it is worth.

    Args:
        train: the training data, as `ptif.attribute` takes them.
        decisions: what to do, as one of
            what the report page downloaded (a path, or `read_decisions` of it): wrong labels with a new one get it,
            other wrong labels and duplicates are removed, what is to be kept stays;
            a `LabelIssues` of `find_label_issues`: those with `is_issue` are removed;
            a mapping by index: the new label, or None to remove the example, such as `issues.relabelling(20)`;
            indices, a bool mask or pairs (index, score): these are removed, such as `issues.ids(20)` or
            `scores.harmful(0, 20)`.
        class_names: the names that labels were shown by; `None`: those of the data.
        as_label: makes a label of the data from what the page wrote (a text, or a number in raw units, where the
            page was given `denormalize_target=`); `None`: class names become class numbers.

    Raises:
        InvalidInput: an index is out of range or doubled, a label is no class, everything is removed, or nothing is
            changed.

    Example:
        >>> x, y = torch.randn(40, 3), torch.arange(40) % 2
        >>> curated = curate((x, y), {4: 1, 7: None})
        >>> curated, len(curated.dataset)
        (CuratedData(1 of 40 examples removed, 1 of 40 relabelled), 39)
    """
    source = Source.of(train)
    chosen = _read_choice(source, decisions)
    places = list(chosen)
    positions = read_indices(source, places, "decisions")
    relabelled = {i: label for i, label in chosen.items() if label is not None}
    names = source.class_names if class_names is None else list(class_names)
    labels = _read_labels(source, relabelled, names, as_label)
    removed = tuple(sorted(i for i in places if i not in relabelled))
    if not positions:
        raise InvalidInput(_of_nothing(decisions))
    if len(removed) == len(source):
        raise InvalidInput(f"Of the {len(source)} training examples nothing would be left; leave some in.")
    return CuratedData(source, removed, labels)


def _read_choice(source: Source, decisions: Any) -> dict[int, Any]:
    """The new label of every example that changes, by place; None: it is removed."""
    if isinstance(decisions, (str, os.PathLike)):
        decisions = read_decisions(decisions, len(source.whole))
    if isinstance(decisions, Decisions):
        size = decisions.training_examples
        if size is not None and size != len(source.whole):
            raise InvalidInput(
                f"The decisions are on a report of {size:,} training examples, and these are {len(source.whole):,}; "
                "give the training set of that report."
            )
        return dict.fromkeys((*decisions.wrong_labels, *decisions.duplicates)) | decisions.relabels
    if isinstance(decisions, LabelIssues):
        if len(decisions) != len(source.whole):
            raise InvalidInput(
                f"The label issues are of {len(decisions):,} training examples, and these are {len(source.whole):,}; "
                "give the training set that was looked at."
            )
        return dict.fromkeys(decisions.is_issue.nonzero()[:, 0].tolist())
    if isinstance(decisions, Mapping):
        return dict(decisions)
    if hasattr(decisions, "columns"):
        raise InvalidInput(
            "decisions= got a table, which does not say what becomes of its rows; give the indices of those to remove, "
            "such as table.index[table.is_label_issue], or {index: new label}."
        )
    indices = read_indices(source, decisions, "decisions")
    positions = source.positions
    return dict.fromkeys(indices if positions is None else positions[indices].tolist())


def _of_nothing(decisions: Any) -> str:
    if isinstance(decisions, (str, os.PathLike)):
        return (
            f"The decisions in {os.fspath(decisions)!r} change nothing: none is wrong_label or duplicate; decide so on "
            "at least one example, in the report page or in the table's column decision."
        )
    in_one_line = " ".join(repr(decisions).split())[:100]
    return f"These decisions change nothing ({in_one_line}); decide on at least one example."


def _read_labels(
    source: Source, labels: Mapping[int, Any], names: list[str] | None, read: ReadLabel | None
) -> dict[int, Any]:
    """Labels as the dataset holds them, by place."""
    if not labels:
        return {}
    most = len(names) if names else _count_classes(source)
    by_place: dict[int, Any] = {}
    for place, given in labels.items():
        old = label_of(source.item(source.index_of(place)))
        new = label_from_text(old, given, names) if read is None else read(given)
        label = read_label(place, old, new, names)
        number = whole_label(label)
        if number is not None and whole_label(old) is not None and most is not None and not 0 <= number < most:
            raise InvalidInput(
                f"The new label {number} of example {place} is no class: they are 0 to {most - 1}; choose one of them."
            )
        by_place[place] = label.tolist() if hasattr(label, "tolist") else label
    return by_place


def _count_classes(source: Source) -> int | None:
    """How many classes there are, from labels that cost nothing to look at; None where they would."""
    if not source.in_memory:
        return None
    every = torch.arange(len(source))
    labels = labels_of(next(iter(source.load([every])))[1], len(source))
    return None if labels is None or labels.is_floating_point() else int(labels.max()) + 1
