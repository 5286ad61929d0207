"""What a loader's sampler says about the training set: all of the dataset, a part of it, or what cannot be honoured."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Final

import torch
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    DistributedSampler,
    RandomSampler,
    SequentialSampler,
    Subset,
    WeightedRandomSampler,
)

from ..core.errors import InvalidInput, TrainingDataWarning
from ..core.warn import warn_caller
from .random_state import same_rng

# An epoch of more than this many times the dataset is taken to have no end.
_LONGEST: Final = 4


class SampledSubset(Subset[Any]):
    """The part of a dataset that a loader's sampler draws; `indices` are positions in the dataset, in its order."""


def examples_of(loader: DataLoader[Any]) -> tuple[Any, str]:
    """The dataset that a loader trains on, and how it was read, in words.

    Args:
        loader: the loader. Its sampler is asked twice for its indices, where its type does not say them; the random
            generators are put back.

    Returns:
        the loader's dataset, or a `SampledSubset` of it; and words for the diagnostics, empty for the whole dataset.

    Raises:
        InvalidInput: the sampler draws examples with weights, or draws nothing.
    """
    dataset: Any = loader.dataset
    batches: Any = loader.batch_sampler
    # A batch sampler of one's own says which examples, whatever the loader's sampler says.
    sampler = batches.sampler if type(batches) is BatchSampler else batches
    name, size = type(sampler).__name__, len(dataset)
    if isinstance(sampler, WeightedRandomSampler):
        raise InvalidInput(
            "The DataLoader draws examples with weights (WeightedRandomSampler), so training minimised a weighted "
            "loss; pass its dataset, loader.dataset, with a loss that has the weights, such as "
            "CrossEntropy(weight=...) with one per class."
        )
    if _visits_all(sampler, size):
        return dataset, ""
    if type(sampler) is RandomSampler and sampler.replacement:
        return dataset, _take_all(f"{name}, which draws examples with replacement", size)
    with _generators_kept(sampler), same_rng():
        first, second = _indices(sampler, size), _indices(sampler, size)
    if first is None or second is None or set(first) != set(second):
        return dataset, _take_all(f"{name}, whose examples differ from epoch to epoch or never end", size)
    if not first:
        raise InvalidInput(f"The DataLoader's sampler {name} draws no example; at least one is needed.")
    part = sorted(set(first))
    reading = "" if len(part) == size else f"{len(part):,} of {size:,} examples, those of {name}"
    if len(part) < len(first):
        reading = reading or f"all {size:,} examples of {name}"
        _warn(f"The DataLoader's sampler {name} draws some examples more than once; each counts once", "")
        reading += ", each once although it repeats some"
    return (dataset if len(part) == size else SampledSubset(dataset, part)), reading


def _visits_all(sampler: Any, size: int) -> bool:
    """Whether it is known by its type to visit every example once in an epoch, without a look at its indices."""
    if isinstance(sampler, DistributedSampler):
        return True  # its processes together
    if type(sampler) is RandomSampler and (sampler.replacement or len(sampler.data_source) != size):
        return False
    return type(sampler) in (SequentialSampler, RandomSampler) and len(sampler) == size


def _take_all(what: str, size: int) -> str:
    _warn(
        f"The DataLoader's sampler is {what}; all {size:,} examples of its dataset are taken as the training set, each "
        "once",
        ": if training saw only a part, pass torch.utils.data.Subset(dataset, indices)",
    )
    return f"all {size:,} examples, each once, whatever the loader's {what.split(',')[0]} draws"


def _warn(fact: str, advice: str) -> None:
    warn_caller(f"{fact}{advice}.", TrainingDataWarning)


def _indices(sampler: Any, size: int) -> list[int] | None:
    """The positions that a sampler, or a batch sampler, visits; None where it never ends or they are no positions."""
    most = _LONGEST * size
    try:
        drawn = list(itertools.islice(_flat(sampler), most + 1))
        positions = [int(i) for i in drawn]
    except Exception:
        return None
    valid = len(positions) <= most and positions == drawn and all(0 <= i < size for i in positions)
    return positions if valid else None


def _flat(sampler: Any) -> Iterator[Any]:
    for entry in sampler:
        if isinstance(entry, (list, tuple)):
            yield from entry
        else:
            yield entry


@contextmanager
def _generators_kept(sampler: Any) -> Iterator[None]:
    """A sampler's own generators are as before: asking it must not change the user's next epoch."""
    own = [sampler, getattr(sampler, "sampler", None)]
    generators = {id(g): g for s in own for g in getattr(s, "__dict__", {}).values() if isinstance(g, torch.Generator)}
    states = [(g, g.get_state()) for g in generators.values()]
    try:
        yield
    finally:
        for generator, state in states:
            generator.set_state(state)
