"""What a loader's sampler says about the training set: all of the dataset, a part of it, or what cannot be honoured."""

from __future__ import annotations

import itertools
import warnings
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
from .model_state import same_rng

# In every epoch they visit the whole dataset once (a distributed one, its processes together).
_WHOLE: Final = (SequentialSampler, DistributedSampler)


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
    if isinstance(sampler, _WHOLE) or (type(sampler) is RandomSampler and not _draws_otherwise(sampler, size)):
        return dataset, ""
    if type(sampler) is RandomSampler:
        how = "with replacement" if sampler.replacement else f"only {sampler.num_samples:,} in an epoch"
        return dataset, _take_all(f"{name}, which draws examples {how}", size)
    with _generators_kept(sampler), same_rng():
        first, second = _indices(sampler, size), _indices(sampler, size)
    if first is None or second is None or set(first) != set(second):
        return dataset, _take_all(f"{name}, whose examples differ from epoch to epoch or come twice", size)
    if not first:
        raise InvalidInput(f"The DataLoader's sampler {name} draws no example; at least one is needed.")
    if len(first) == size:
        return dataset, ""
    return SampledSubset(dataset, sorted(first)), f"{len(first):,} of {size:,} examples, those of {name}"


def _draws_otherwise(sampler: RandomSampler, size: int) -> bool:
    return sampler.replacement or sampler.num_samples != size


def _take_all(what: str, size: int) -> str:
    warnings.warn(
        f"The DataLoader's sampler is {what}; all {size:,} examples of its dataset are taken as the training set, each "
        "once: if training saw only a part, pass torch.utils.data.Subset(dataset, indices).",
        TrainingDataWarning,
        stacklevel=5,
    )
    return f"all {size:,} examples, each once, whatever the loader's {what.split(',')[0]} draws"


def _indices(sampler: Any, size: int) -> list[int] | None:
    """The positions that a sampler, or a batch sampler, visits; None where they are no part of the dataset."""
    try:
        # One more than there are is enough to see that one comes twice, also where the sampler never ends.
        drawn = list(itertools.islice(_flat(sampler), size + 1))
        positions = [int(i) for i in drawn]
    except Exception:
        return None
    valid = len(positions) <= size and len(set(positions)) == len(positions) and positions == drawn
    return positions if valid and all(0 <= i < size for i in positions) else None


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
