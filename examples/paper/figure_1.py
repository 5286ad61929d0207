"""Figure 1: what the two parts of influence do. Without the training loss, or without the Hessian, it goes wrong."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from torch import Tensor

import pytorch_influence_functions as ptif
from pytorch_influence_functions.plots import style

from . import data, training
from .study import Band, Finding, Study, drawing, main, pearson

DECAY = 0.01
# "Clearly below one", of the reference design, in numbers.
_CLEARLY = 0.9


def run(study: Study) -> Finding:
    """Scores for a held-out seven: whole, without the training loss, and without the Hessian."""
    split = data.one_against_seven(900)
    y, qy = split.y[:, None].double(), split.qy[:, None].double()
    model = training.linear(784, 1)
    objective = training.penalised(training.losses_of(model, training.binary_losses, split.x, y), DECAY)
    training.minimise(model, objective, len(y))
    at = int((split.qy == 1).nonzero()[0])
    query = split.qx[at : at + 1], qy[at : at + 1]
    problem = ptif.Problem(model, ptif.Bernoulli(), (split.x, y), weight_decay=DECAY)
    whole = ptif.methods.koh_liang(damping=0.0, rtol=1e-8).fit(problem).score(query).values[0]
    # A training gradient is -y sigma(-y theta.x) x: the middle factor is the training loss's part.
    with torch.no_grad():
        doubt = torch.sigmoid(-(2 * y - 1) * model(split.x))[:, 0]
    no_loss = whole / doubt
    no_hessian = ptif.methods.grad_dot().fit(problem).score(query).values[0]
    same = split.y == 1
    harmful = {name: int((s[same] < 0).sum()) for name, s in (("whole", whole), ("no_hessian", no_hessian))}
    picture = study.picture("1")
    _draw(picture, whole, {"without the training loss": no_loss, "without the Hessian": no_hessian}, same)
    return Finding(
        "1",
        "the parts of influence, taken away one at a time",
        f"MNIST-5k, ones against sevens, {len(y)} digits, lambda {DECAY}",
        "orderings lost (a picture)",
        (
            Band("r of scores with and without the training loss", pearson(whole, no_loss), high=_CLEARLY),
            Band("r of scores with and without the Hessian", pearson(whole, no_hessian), high=_CLEARLY),
            Band("harmful sevens without the Hessian", float(harmful["no_hessian"]), high=1),
            Band("harmful sevens with it", float(harmful["whole"]), low=0),
        ),
        picture,
    )


def _draw(picture: Path, whole: Tensor, others: dict[str, Tensor], same: Tensor) -> None:
    with drawing(picture, 6.6, 3.2) as figure:
        for axes, (name, scores) in zip(figure.subplots(1, 2), others.items(), strict=True):
            across, up = (style.power_of_ten(float(s.abs().max())) for s in (scores, whole))
            x, y = scores.numpy() / 10.0**across, whole.numpy() / 10.0**up
            axes.scatter(x[~same], y[~same], s=14, color=style.HARMFUL, marker="x", linewidths=0.7, label="ones")
            axes.scatter(x[same], y[same], s=9, color=style.HELPFUL, linewidths=0, alpha=0.6, label="sevens")
            axes.axhline(0, color=style.FAINT, linewidth=0.6)
            axes.axvline(0, color=style.FAINT, linewidth=0.6)
            axes.set(xlabel=f"score {name}{style.format_power(across)}", ylabel=f"score{style.format_power(up)}")
            axes.set_title(f"{name}\nr = {pearson(whole, scores):.2f}")
            axes.locator_params(nbins=5)
            axes.legend(frameon=False)


if __name__ == "__main__":
    sys.exit(main(run))
