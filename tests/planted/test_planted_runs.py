"""Bugs planted in what follows the training run: each must break its law."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

import pytorch_influence_functions as ptif
from pytorch_influence_functions.curvature import GGN
from pytorch_influence_functions.influence import scoring
from pytorch_influence_functions.linalg.kronecker import KroneckerBlock
from pytorch_influence_functions.trajectory import SOURCE, AdamState, Segment, preconditioner, unrolling
from pytorch_influence_functions.trajectory import segments as schedule
from pytorch_influence_functions.trajectory import source as trajectory
from tests.laws import test_source, test_source_adam
from tests.laws.test_influence import cross_entropy, relative_gap
from tests.laws.test_source import dense_source, flow, moved, problem_of
from tests.oracles.autograd import dense_ggn, example_gradients, flat_parameters
from tests.planted.planting import Bug, Law, must_be_noticed, swap, swap_everywhere


def run_law(with_adam: bool = False) -> Law:
    """Two segments, one of two checkpoints: the formula, written out in float64."""

    def law() -> None:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 2)).double()
        x, y, xq, yq = torch.randn(12, 3).double(), torch.arange(12) % 2, torch.randn(2, 3).double(), torch.arange(2)
        states, decay = [moved(model, 0.4, s) for s in (1, 2, 3)], 0.05
        moments = {k: v.square() + 0.1 for k, v in moved(model, 0.5, 4).items()}
        adam = AdamState(moments, eps=0.1, decay=0.02) if with_adam else None
        segments = [Segment(states[:2], 0.1, 30, adam=adam)]
        segments.append(Segment(states[2], 0.05, 20, momentum=0.0 if with_adam else 0.6, adam=adam))
        matrices, gradients, own = [], [], model.state_dict()
        own = {k: v.clone() for k, v in own.items()}
        for state in states:
            model.load_state_dict(state)
            matrices.append(dense_ggn(model, cross_entropy, x, y))
            gradients.append(example_gradients(model, cross_entropy, x, y) + decay * flat_parameters(model))
        model.load_state_dict(own)
        p = torch.eye(len(matrices[0])).double()
        if with_adam:
            p = torch.cat([1 / (moments[k].sqrt() + 0.1).flatten() for k in own]).diag()
        extra = decay * torch.eye(len(p)).double() + (0.02 * torch.linalg.inv(p) if with_adam else 0.0)
        h = [(matrices[0] + matrices[1]) / 2 + extra, matrices[2] + extra]
        flows = [flow(h[0], 3.0, p), flow(h[1], segments[1].lr * 20 * (1.0 if with_adam else 2.5), p)]
        gq = example_gradients(model, cross_entropy, xq, yq)
        want = dense_source(gq, flows, [(gradients[0] + gradients[1]) / 2, gradients[2]])
        problem = problem_of((model, x, y), weight_decay=ptif.WeightDecay(decay, per_example=True))
        fitted = SOURCE(segments).fit(problem)
        assert relative_gap(fitted.score((xq, yq)).values, want) < 1e-8
        assert all(torch.equal(v, own[k]) for k, v in model.state_dict().items())

    return law


def only_first(original: Any, self: Any, members: Any, form: Any, budget: Any) -> Any:
    return original(self, members[:1], form, budget)


def other_end(original: Any, self: Any, rows: Any, log: Any = None) -> Any:
    return original(self, rows, log)[::-1]


def adam_on_both_sides(original: Any, self: Any, rows: Any, operator: Any, into: int, out: int) -> Any:
    return original(self, rows, operator, 1, 1)


def transposed(original: Any, self: Any, rows: Any, operator: Any, into: int, out: int) -> Any:
    return original(self, rows, operator, into * (1 if out > 0 else -1), abs(out))


def rates_of_equal_weight(original: Any, checkpoints: Any, lr: Any, steps: Any, segments: int, momentum: float) -> Any:
    """A segment's lr as the mean over its checkpoints, however many steps each stands for."""
    made = original(checkpoints, lr, steps, segments, momentum)
    counts = [len(s.checkpoint_tuple) for s in made]
    means = [sum(lr[sum(counts[:k]) : sum(counts[: k + 1])]) / counts[k] for k in range(segments)]
    return tuple(replace(s, lr=mean) for s, mean in zip(made, means, strict=True))


def turned(original: Any, self: KroneckerBlock, diagonal: Any) -> Any:
    assert self.left is not None and self.right is not None
    return original(replace(self, left=self.left.T, right=self.right.T), diagonal)


def squared(original: Any, self: Any, name: str, twice: int) -> Any:
    return original(self, name, 2 * twice)


def split_law() -> None:
    test_source.test_an_even_split_keeps_the_training_time()


def eigenbasis_law() -> None:
    test_source_adam.test_the_formula_in_the_eigenbasis()


EIGENBASIS = preconditioner.EigenbasisPreconditioner
STRETCH, RUN, BOTH = unrolling.FittedSegment, trajectory.SourceAttribution, run_law(True)
BUGS = [
    Bug("queries not carried back", swap(STRETCH, "survives", lambda f, self, u: u), run_law()),
    Bug("plain gradients", swap(STRETCH, "responds", lambda f, self, u: u.scaled(self.segment.span)), run_law()),
    Bug("the inverse alone", swap(unrolling, "response", lambda f, lam, span: 1 / lam), run_law()),
    Bug("one learning rate too many", swap(unrolling, "survival", lambda f, lam, t: f(lam, 2 * t)), run_law()),
    Bug("segments in the wrong order", swap(RUN, "_propagated", other_end), run_law()),
    Bug("curvature of one checkpoint only", swap(GGN, "mean_of", only_first), run_law()),
    Bug("penalty lost", swap(scoring, "decay_term", lambda f, d, x: None), run_law()),
    Bug("rates not weighted by steps", swap_everywhere(schedule.split_evenly, rates_of_equal_weight), split_law),
    Bug("Adam on both sides", swap(STRETCH, "_between", adam_on_both_sides), BOTH),
    Bug("Adam transposed", swap(STRETCH, "_between", transposed), BOTH),
    Bug("Adam's eps lost", swap(schedule.AdamState, "root", lambda f, self, s: f(self, s) * 1.1), BOTH),
    Bug(
        "Adam's square in the eigenbasis",
        swap(EIGENBASIS, "_power", squared),
        eigenbasis_law,
    ),
    Bug(
        "basis transposed",
        swap(KroneckerBlock, "diagonal_in_basis", turned),
        eigenbasis_law,
    ),
    Bug("decoupled decay lost", swap(schedule.AdamState, "decays", lambda f, self, s: 0 * f(self, s)), BOTH),
]


@pytest.mark.parametrize("bug", BUGS, ids=lambda bug: bug.name)
def test_a_planted_bug_breaks_its_law(bug: Bug, monkeypatch: pytest.MonkeyPatch) -> None:
    must_be_noticed(bug, monkeypatch)
