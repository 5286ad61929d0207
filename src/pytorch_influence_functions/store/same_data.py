"""Whether data that come with an index are those it was made from, told by the digests of some examples."""

from __future__ import annotations

import os
from collections.abc import Sequence

import torch

from ..core.errors import InvalidInput
from ..core.indexing import spread_sample
from ..problem.data import Source
from .build import CURVATURE_DATA, SAMPLE
from .examples import COMPARED, digest_alone
from .folder import IndexFolder


def check_data(opened: IndexFolder, source: Source) -> bool:
    """Compare data with the examples that an index holds, by their number and a sample spread over them.

    Args:
        opened: the index; one that an earlier version wrote kept no digests, and is taken at its word.
        source: the data.

    Returns:
        Whether they are the examples of the index, in their order; otherwise they are those that its curvature is of,
        and it holds others.

    Raises:
        InvalidInput: they are neither.
    """
    manifest, count = opened.manifest, len(source)
    known = manifest.facts.get(CURVATURE_DATA)
    if known is None:
        return True
    differing = None
    if count in (*manifest.parts[1:], manifest.examples) or not manifest.complete:
        differing = _first_differing(source, _stored_digests(opened, count))
        if differing is None:
            return True
    if count == known["examples"] and _first_differing(source, known[SAMPLE]) is None:
        return False
    held = f"holds {manifest.examples:,} examples"
    told = f"{count:,} were given" if differing is None else f"example {differing:,} is another one"
    raise InvalidInput(
        f"These are not the data that the index in {os.fspath(opened.path)!r} was built from: it {held}, and {told}; "
        "give the same data in the same order and form, or build another index."
    )


def _stored_digests(opened: IndexFolder, stop: int) -> list[tuple[int, str]]:
    """(example, digest) of some of the examples before one."""
    shards = opened.manifest.shards
    digests = [(shard.first + place, digest) for shard in shards for place, digest in shard.sample]
    return [pair for pair in digests if pair[0] < stop]


def _first_differing(source: Source, digests: Sequence[tuple[int, str]]) -> int | None:
    """The first of the compared examples that is another one; None: all are the same."""
    some = [digests[k] for k in spread_sample(len(digests), COMPARED).tolist()]
    ids = torch.tensor([example for example, _ in some], dtype=torch.long)
    given = digest_alone(source, ids)
    return next((example for (example, own), other in zip(some, given, strict=True) if own != other), None)
