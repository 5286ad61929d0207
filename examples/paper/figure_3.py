"""Figure 3: a support vector machine has no second derivative; a smooth hinge at its solution stands in for one."""

from __future__ import annotations

import sys
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import pytorch_influence_functions as ptif
from pytorch_influence_functions.core.errors import require

from . import data, training
from .study import Band, Finding, Study, agreement, drawing, main, pearson

# The paper's weight of one example: lambda 0.01 on the 13,007 ones and sevens of all of MNIST. With lambda itself kept,
# a fourteenth of its examples would each weigh fourteen times as much, and single ones would decide which are support
# vectors.
WEIGHT = 1 / (0.01 * 13_007)
PAPER = {0.0: 0.632, 0.001: 0.950, 0.1: 0.914}
_WIDTH = 0.1


def svm(x: Tensor, y: Tensor, weight: float = WEIGHT) -> Tensor:
    """The exact minimum of |w|^2 / 2 + weight x sum of hinge losses, labels -1 and 1; [1, d]. By liblinear."""
    machines = require("sklearn.svm", "test")
    machine = machines.LinearSVC(
        loss="hinge", C=weight, fit_intercept=False, tol=1e-8, max_iter=1_000_000, random_state=0
    )
    return torch.from_numpy(machine.fit(x.numpy(), y.numpy()).coef_.copy())


def smooth_hinge(t: float) -> ptif.FromFunction:
    """t log(1 + exp((1 - y f) / t)); the hinge itself at t = 0."""
    if t == 0:
        return ptif.FromFunction(lambda f, y: F.relu(1 - y * f)[:, 0], reduction="none")
    return ptif.FromFunction(lambda f, y: t * F.softplus((1 - y * f) / t)[:, 0], reduction="none")


@dataclass(frozen=True)
class Seen:
    """Predicted and actual changes of one test digit's loss, for each smoothing's own examples of largest influence."""

    predicted: dict[float, Tensor]
    actual: dict[float, Tensor]

    @property
    def r(self) -> dict[float, float]:
        """Pearson's correlation for each t."""
        return {t: pearson(self.predicted[t], self.actual[t]) for t in PAPER}


def run(study: Study) -> Finding:
    """Predictions of three smoothings at the hinge's solution, against retraining with the hinge itself."""
    split = data.one_against_seven(900)
    y, qy = 2 * split.y.double() - 1, 2 * split.qy.double() - 1
    model = training.linear(784, 1)
    model.weight.data.copy_(svm(split.x, y))
    wrong = (model(split.qx)[:, 0] * qy <= 0).nonzero().flatten()
    found = [_seen(model, split.x, y, split.qx[i, None], qy[i, None, None]) for i in wrong]
    r = found[0].r  # of the first wrong one; the others are for the record
    picture = study.picture("3")
    with drawing(picture, 9.0, 3.2) as figure:
        for axes, t in zip(figure.subplots(1, 3), PAPER, strict=True):
            title = f"t = {t:g}\nr = {r[t]:.3f}, in the paper {PAPER[t]:.3f}"
            agreement(axes, found[0].predicted[t], found[0].actual[t], title)
    bands = [Band(f"r at t = {t:g}", r[t], PAPER[t] - _WIDTH, PAPER[t] + _WIDTH) for t in (0.001, 0.1, 0.0)]
    bands.append(Band("r at t = 0.001 less r at t = 0.1", r[0.001] - r[0.1], low=0))
    bands.append(Band("r at t = 0.1 less r at t = 0", r[0.1] - r[0.0], low=0))
    others = "; ".join(", ".join(f"{one.r[t]:.3f}" for t in (0.001, 0.1, 0.0)) for one in found[1:])
    largest = ", ".join(f"{float(s.abs().max()):.2g} at t = {t:g}" for t, s in found[0].predicted.items())
    most = max(float(a.abs().max()) for a in found[0].actual.values())
    return Finding(
        "3",
        "smooth hinges at a support vector machine's solution",
        f"MNIST-5k, ones against sevens, {len(y)} digits, the paper's weight per example ({WEIGHT:.4f})",
        "0.950 at t = 0.001, 0.914 at 0.1, 0.632 at 0",
        tuple(bands),
        picture,
        (
            f"largest prediction {largest}; largest actual change {most:.2g}",
            f"in the same order for the other held-out digits it gets wrong: {others or 'there are none'}",
        ),
    )


def _seen(model: nn.Linear, x: Tensor, y: Tensor, query: Tensor, label: Tensor) -> Seen:
    predicted, actual = {}, {}
    changes: dict[int, float] = {}
    before = _hinge(model.weight.detach(), query, label)
    for t in PAPER:
        # In units of the mean loss, with the penalty fixed while an example goes.
        problem = ptif.Problem(model, smooth_hinge(t), (x, y[:, None]), weight_decay=1 / (WEIGHT * len(y)))
        method = ptif.methods.koh_liang(damping=0.0, rtol=1e-6, max_steps=5000)
        scores = method.fit(problem).score((query, label)).values[0]
        ids = scores.abs().argsort(descending=True)[:100]
        for i in ids.tolist():
            if i not in changes:
                changes[i] = _hinge(_without(x, y, i), query, label) - before
        predicted[t], actual[t] = scores[ids], torch.tensor([changes[i] for i in ids.tolist()])
    return Seen(predicted, actual)


def _without(x: Tensor, y: Tensor, i: int) -> Tensor:
    kept = torch.arange(len(y)) != i
    return svm(x[kept], y[kept])


def _hinge(weight: Tensor, x: Tensor, label: Tensor) -> float:
    return float(F.relu(1 - label * (x @ weight.T)))


if __name__ == "__main__":
    sys.exit(main(run))
