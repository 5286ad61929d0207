"""Whether padding changes what a model gives for an example, so that scores depend on who shares a batch."""

from __future__ import annotations

from dataclasses import replace
from typing import Final

import torch
from torch import Tensor
from torch.utils.data import default_collate

from ..core.batches import tensors_of
from ..core.errors import InfluenceError, TrainingDataWarning
from ..core.indexing import spread_sample, while_cheap
from ..core.warn import warn_caller
from ..objectives.base import AbstractObjective
from ..problem.data import Source
from ..problem.problem import Problem, first_batch
from ..problem.random_state import same_rng

# Among how many examples the shortest and the longest are taken; beyond the fewest only while it is cheap.
_FEWEST, _MOST, _SECONDS = 3, 16, 0.02
_CURE: Final = (
    "pass batch_size=1 for examples as they are alone, tell the model their lengths (a mask, pack_padded_sequence), or "
    "let the dataset pad all to one length"
)


def warn_of_padding(problem: Problem, objective: AbstractObjective, allowed: float) -> None:
    """Compare a short example padded beside a long one with the same alone; warn, and note it, where they differ.

    Args:
        problem: whose training data are looked at, where their collate function pads.
        objective: the loss.
        allowed: the largest relative difference of two correct results.
    """
    source = problem.data
    alone_already = source.fixed and source.batch_size == 1
    if source.collate is default_collate or alone_already or problem.is_cut_up or source.padding is not None:
        return
    source.note_padding("")
    # Of random data two readings differ anyway.
    if not source.is_cut_by_rows or source.determinism != "yes":
        return
    pair = _shortest_and_longest(source)
    if pair is None:
        return
    short, long = pair
    try:
        padded, alone = (_outputs_and_loss(problem, objective, ids) for ids in ([short, long], [short]))
    except InfluenceError:
        return  # what does not run alone, or has no such loss, is refused in its own words where it is used
    what, values = "outputs", (padded[0], alone[0])
    if padded[0].shape != alone[0].shape:  # one per token: those of padding have no part in the loss
        what, values = "loss", (padded[1], alone[1])
    gap, size = float((values[0] - values[1]).abs().max()), float(values[1].abs().max())
    if gap <= allowed * (size + 1e-6):
        return
    source.note_padding(f"padding changes the {what} of an example by {gap / (size + 1e-6):.2g}")
    warn_caller(
        f"Example {short} has {what} that differ by {gap:.2g} (of {size:.2g}) alone and padded beside example {long}, "
        f"so scores depend on which examples share a batch; {_CURE}.",
        TrainingDataWarning,
    )


def _shortest_and_longest(source: Source) -> tuple[int, int] | None:
    """Of a few examples; None where none is longer than another."""
    sizes: dict[int, int] = {}
    with same_rng():
        for i in while_cheap(spread_sample(len(source), _MOST).tolist(), _FEWEST, _SECONDS):
            sizes[i] = sum(tensor.numel() for _, tensor in tensors_of(source.collate([source.item(i)])))
    short, long = min(sizes, key=sizes.__getitem__), max(sizes, key=sizes.__getitem__)
    return (short, long) if sizes[short] < sizes[long] else None


def _outputs_and_loss(problem: Problem, objective: AbstractObjective, ids: list[int]) -> tuple[Tensor, Tensor]:
    """Of the first of a few examples in one batch."""
    together = replace(problem.data, batch_size=len(ids))
    with first_batch(problem, together, torch.tensor(ids)) as (_, batch), torch.no_grad():
        outputs = objective.outputs(problem.model, batch).detach()
        return outputs[0].double(), objective.losses(outputs, batch)[0].detach().double()
