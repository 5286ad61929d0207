"""Bugs planted in what is measured around a solve: damping, residual, checks, bounds. Each must break its law."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

import pytorch_influence_functions as ptif
from pytorch_influence_functions.curvature import from_rows
from pytorch_influence_functions.curvature.exact import EmpiricalFisher
from pytorch_influence_functions.influence.assumptions import Moments, StationarityCheck
from pytorch_influence_functions.influence.run_log import RunLog
from pytorch_influence_functions.linalg.gram import Gram
from pytorch_influence_functions.linalg.shift import Shift
from pytorch_influence_functions.objectives import differentiated
from pytorch_influence_functions.solvers import base, blockwise, cg
from pytorch_influence_functions.solvers.truncation import Truncated
from tests.laws import test_assumptions, test_blockwise, test_cg, test_large_data, test_residual, test_truncation
from tests.planted.planting import Bug, must_be_noticed, swap, swap_everywhere
from tests.situations import test_half_precision, test_losses_of_practice


def by_all_examples(original: Any, derivatives: Any, rows: Any, count: int) -> Any:
    """Summed over some, divided by how many there are in all."""
    per = count // min(count, from_rows.TRACE_EXAMPLES)
    return original(derivatives, rows, len(derivatives.problem) * per)


def summed(original: Any, operator: Any, shift: Any, rows: Any, value: Any) -> Tensor:
    """The combinations' squares added up instead of averaged."""
    return original(operator, shift, rows, value) * (base._COMBINED**0.5 if len(rows) > base._COMBINED else 1.0)


def without_decay(original: Any, derivatives: Any) -> Any:
    plain = derivatives.problem.with_(weight_decay=ptif.WeightDecay())
    return original(replace(derivatives, problem=plain, whole=plain.space))


def without_noise_correction(original: Any, self: Moments) -> tuple[float, float]:
    """As if the sample were all there is: its mean's own variance stays in."""
    value, _ = original(replace(self, population=int(self.counts.sum())))
    return value, original(self)[1]


def mean_of_norms(original: Any, derivatives: Any) -> Any:
    """The examples' mean norm in place of the root mean square."""
    look = original(derivatives)
    norms = torch.cat([g.rows.squared_norms().sqrt() for g in derivatives.stream()])
    ratio = float(norms.square().mean().sqrt() / norms.mean())
    return replace(look, relative_gradient=look.relative_gradient * ratio)


def in_fresh_patch(law: Any) -> Any:
    """A law that patches on its own account, called without pytest's fixture."""

    def run() -> None:
        with pytest.MonkeyPatch.context() as patch:
            law(patch)

    return run


def of_the_last_layer(original: Any, self: Truncated, training: Any) -> Tensor:
    last = list(self.lost)[-1]
    return original(Truncated(self.rows, {last: self.lost[last]}), training)


def mean_of_blocks(original: Any, shift: Shift, part: Any) -> Shift:
    found = original(shift, part)
    return replace(found, damping=sum(found.blocks.values()) / len(found.blocks))


def as_one_number_per_output(original: Any, outputs: Tensor) -> Any:
    """As if no output depended on another."""
    return [0]


def never_agrees_to_less(original: Any, self: Any, blocks: Any) -> bool:
    return True


def not_refined(original: Any, self: Gram) -> None:
    """The note is made, and nothing else."""
    self._known["precision"] = torch.float32


TRACE = swap(from_rows, "mean_eigenvalues", by_all_examples)
LAMBDA = test_large_data.test_relative_damping_is_a_share_of_the_mean_eigenvalue_whatever_the_size
BUGS = [
    Bug(
        "outputs taken for independent",
        lambda patch: (
            swap(differentiated, "_axes", as_one_number_per_output)(patch),
            swap(differentiated._Slope, "agrees", never_agrees_to_less)(patch),
        )[0],
        partial(
            test_losses_of_practice.test_the_gauss_newton_matrix_of_any_convex_loss_is_that_of_its_second_derivative,
            "label smoothing by hand",
        ),
    ),
    Bug(
        "a dual below rounding in float32",
        swap(Gram, "refine", not_refined),
        partial(test_half_precision.test_a_damping_below_rounding_is_solved_in_float64, EmpiricalFisher(), 1e-9),
    ),
    Bug("trace of some divided by all", TRACE, partial(LAMBDA, "GGN")),
    Bug(
        "trace of some rows divided by all",
        swap(from_rows, "mean_eigenvalues", by_all_examples),
        partial(LAMBDA, "Fisher"),
    ),
    Bug(
        "conjugate gradients judged by the residual alone",
        swap(cg, "error_bound", lambda original, x, *others: x.new_zeros(len(x))),
        test_cg.test_columns_of_different_scale_are_solved_and_not_only_their_steepest,
    ),
    Bug(
        "residuals of many queries added up twice",
        swap_everywhere(base.combined_residual, summed),
        partial(
            test_residual.test_the_residual_of_many_queries_is_the_root_of_the_sum_of_all_squares,
            test_residual.SHIFTS[0],
        ),
    ),
    Bug(
        "weight decay left out of the minimum's check",
        swap(StationarityCheck, "of", without_decay),
        test_assumptions.test_a_minimum_with_weight_decay_is_seen_as_one,
    ),
    Bug(
        "the minimum's check without its correction for sampling",
        swap(Moments, "relative", without_noise_correction),
        in_fresh_patch(test_assumptions.test_a_sample_at_an_exact_minimum_raises_no_alarm),
    ),
    Bug(
        "the mean norm in the minimum's check",
        swap(StationarityCheck, "of", mean_of_norms),
        partial(test_assumptions.test_the_distance_from_a_minimum_is_that_of_loss_and_weight_decay_together, 0.3),
    ),
    Bug(
        "a certificate from the last layer only",
        swap(Truncated, "bound", of_the_last_layer),
        partial(test_truncation.test_the_bound_adds_up_what_every_layer_loses, 1),
    ),
    Bug(
        "a certificate without the checkpoints' weights",
        swap(RunLog, "end_checkpoints", lambda f, self, weights: f(self, [1.0] * len(weights))),
        partial(test_truncation.test_the_certificate_of_weighted_checkpoints_is_the_weighted_sum, (10.0, 5.0)),
    ),
    Bug(
        "a group's damping as the mean over its blocks",
        swap(blockwise, "_part_of", mean_of_blocks),
        test_blockwise.test_a_group_of_unequal_blocks_is_recorded_with_their_mean_damping_by_size,
    ),
]


@pytest.mark.parametrize("bug", BUGS, ids=lambda bug: bug.name)
def test_a_planted_bug_breaks_its_law(bug: Bug, monkeypatch: pytest.MonkeyPatch) -> None:
    must_be_noticed(bug, monkeypatch)
