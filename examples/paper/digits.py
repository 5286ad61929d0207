"""Softmax regression on ten digits, and leaving training examples out one at a time: figures 2a and 2b share it."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor, nn
from torch.nn.utils import parameters_to_vector

import pytorch_influence_functions as ptif

from . import data, training
from .study import Study, first_wrong

DECAY = 0.01


@dataclass(frozen=True, eq=False)
class Digits:
    """A trained model, its problem, one held-out example it gets wrong, and what leaving out really does to that one.

    `ids` are the training examples of largest exact influence, `predicted` their scores for the test example,
    `actual` the change of its loss after retraining without each.
    """

    problem: ptif.Problem
    query: tuple[Tensor, Tensor]
    wrong: tuple[int, int]
    scores: Tensor
    ids: Tensor
    actual: Tensor
    gradient: float

    @property
    def predicted(self) -> Tensor:
        """The exact scores of the examples that were left out."""
        return self.scores[self.ids]

    @property
    def words(self) -> str:
        """What the model is."""
        return f"MNIST-5k softmax, {len(self.problem):,} digits, lambda {DECAY}"


@cache
def digits(study: Study) -> Digits:
    """Train, score by conjugate gradients on the exact Hessian, retrain without the examples of largest influence."""
    split = data.mnist(4500)
    model = training.linear(784, 10)
    objective = training.penalised(training.losses_of(model, training.softmax_losses, split.x, split.y), DECAY)
    gradient = training.minimise(model, objective, len(split.y))
    predicted = model(split.qx).argmax(1)
    at = first_wrong(predicted, split.qy)
    query = split.qx[at : at + 1], split.qy[at : at + 1]
    # Retraining leaves out the example's loss and its share of the penalty, as the paper's rescaled C does.
    decay = ptif.WeightDecay(DECAY, per_example=True)
    problem = ptif.Problem(model, ptif.CrossEntropy(), (split.x, split.y), weight_decay=decay, batch_size=500)
    scores = ptif.methods.koh_liang(damping=0.0, rtol=1e-8).fit(problem).score(query).values[0]
    ids = scores.abs().argsort(descending=True)[: study.size(500, 40)]
    actual = _retrained(model, split, objective, ids, query)
    return Digits(problem, query, (int(predicted[at]), int(split.qy[at])), scores, ids, actual, gradient)


def _retrained(
    model: nn.Linear, split: data.Split, objective: training.Objective, ids: Tensor, query: tuple[Tensor, Tensor]
) -> Tensor:
    """The change of the query's loss without each of `ids`."""
    start = parameters_to_vector(model.parameters()).detach()
    steer = training.by_cholesky(training.softmax_curvature(model.weight.detach(), split.x, DECAY))
    found = training.refit(objective, start, training.left_out(ids, len(split.y)), steer, at_once=25)
    logits = torch.einsum("mcd,qd->mqc", found.view(len(ids), 10, 784), query[0])
    after = torch.stack([training.softmax_losses(z, query[1])[0] for z in logits])
    return after - training.softmax_losses(model(query[0]), query[1]).detach()
