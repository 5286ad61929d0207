"""Bugs planted in what reads batches, outputs and losses of other shapes: each must break its law."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from pytorch_influence_functions.core.batches import Collated
from pytorch_influence_functions.gradients.per_example import Derivatives
from pytorch_influence_functions.objectives import measures, outputs
from pytorch_influence_functions.objectives.outputs import OutputLayouts
from pytorch_influence_functions.problem import checkpoints, data, problem
from tests.planted.planting import Bug, all_of, must_be_noticed, swap
from tests.situations import test_batches_only_collate_understands as collated
from tests.situations import test_several_outputs as several
from tests.situations import test_weights_inside_the_loss as weights

GRADIENTS_OF_OUTPUTS = several.test_my_own_loss_of_all_outputs_has_the_gradients_of_one_example_autograd
GRADIENTS_OF_BATCHES = collated.test_gradients_are_those_of_collate_of_one_example


def without_slope_of_the_second(original: Any, self: OutputLayouts, returned: Any, n: int) -> Tensor:
    """As if the other outputs were constants."""
    places = iter(range(100))
    return original(self, outputs.map_outputs(returned, lambda t: t.detach() if next(places) else t), n)


def of_the_training_loss(original: Any, self: Derivatives, batch: Any, cotangent: Tensor, objective: Any) -> Any:
    """As if only the outputs of the training loss were known: of others, nothing is pulled back."""
    return original(self, batch, cotangent, objective) if objective is self.objective else {}


def first_example(original: Any, self: Collated, index: Any) -> Collated:
    part = original(self, index)
    return original(self, slice(0, 1)) if len(part.items) == 1 else part


def parts_unchanged(original: Any, self: Collated, change: Any) -> Collated:
    return Collated(change(self.whole), self.items, self.collate)


NO_WEIGHTS = swap(problem, "join_loss", lambda original, model, objective: (model, objective))
NO_REFUSAL = swap(measures, "refuse_hidden_weights", lambda original, *args: None)

BUGS = [
    Bug(
        "the second output's slope left out",
        swap(OutputLayouts, "flatten", without_slope_of_the_second),
        partial(GRADIENTS_OF_OUTPUTS, "dict"),
    ),
    Bug(
        "shared outputs taken for the batch at once",
        swap(OutputLayouts, "has_shared", lambda original, *args: False),
        partial(GRADIENTS_OF_OUTPUTS, "learned scale, per example"),
    ),
    Bug(
        "no rows for a measure of other outputs than the loss's",
        all_of(
            swap(Derivatives, "_by_vmap", of_the_training_loss), swap(Derivatives, "_by_loop", of_the_training_loss)
        ),
        several.test_a_measure_may_look_at_all_outputs_or_at_the_logits,
    ),
    Bug(
        "batches cut by rows whatever they are",
        swap(data, "is_cut_by_rows", lambda original, *args: True),
        partial(GRADIENTS_OF_BATCHES, "bags with offsets"),
    ),
    Bug(
        "the first example stands for all",
        swap(Collated, "part", first_example),
        partial(GRADIENTS_OF_BATCHES, "detection, lists"),
    ),
    Bug(
        "changes of a batch not made to its parts",
        swap(Collated, "changed", parts_unchanged),
        collated.test_parts_are_changed_as_the_batch_was,
    ),
    Bug(
        "weights of the loss left out",
        all_of(NO_WEIGHTS, NO_REFUSAL),
        partial(weights.test_the_weights_of_the_loss_take_part, "ArcFace", 5),
    ),
    Bug(
        "weights of the loss hidden in a function",
        NO_REFUSAL,
        partial(weights.test_weights_hidden_in_a_function_are_refused, "module", "loss"),
    ),
    Bug(
        "a checkpoint keeps the present weights of the loss",
        swap(checkpoints, "_check_fits", lambda original, *args: None),
        partial(weights.test_a_checkpoint_without_the_weights_of_the_loss_is_refused, None),
    ),
]


@pytest.mark.parametrize("bug", BUGS, ids=lambda bug: bug.name)
def test_a_planted_bug_breaks_its_law(bug: Bug, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    must_be_noticed(bug, monkeypatch)
