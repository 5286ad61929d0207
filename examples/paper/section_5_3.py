"""Section 5.3: a wrong prediction for children is traced to the one child like it that was left in training."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from torch import Tensor

import pytorch_influence_functions as ptif
from pytorch_influence_functions.plots import style

from . import data, training
from .study import Band, Finding, Study, drawing, main

DECAY = 1e-4


def run(study: Study) -> Finding:
    """Training data from which all but one of the children who did not survive were taken out."""
    everyone = data.titanic()
    lost = (everyone.child & (everyone.survived == 0)).nonzero().flatten()
    order = torch.randperm(len(lost), generator=torch.Generator().manual_seed(0))
    kept_one, taken = lost[order[0]], lost[order[1:]]
    kept = torch.ones(len(everyone.child), dtype=torch.bool)
    kept[taken] = False
    x, y = everyone.x[kept], everyone.survived[kept][:, None].double()
    child = everyone.child[kept]
    one = int(kept[:kept_one].sum())
    model = training.linear(x.shape[1], 1)
    training.minimise(model, training.penalised(training.losses_of(model, training.binary_losses, x, y), DECAY), len(y))
    problem = ptif.Problem(model, ptif.Bernoulli(), (x, y), weight_decay=DECAY)
    attribution = ptif.exact(damping=0.0).fit(problem)
    with torch.no_grad():
        wrong = taken[(model(everyone.x[taken])[:, 0] > 0)]
    queries = everyone.x[wrong], everyone.survived[wrong][:, None].double()
    scores = attribution.score(queries).values.abs()
    # The one lost child left in, against whoever counts most among all the others who are no children.
    ratios = scores[:, one] / scores[:, ~child].max(1).values
    first = attribution.score((queries[0][:1], queries[1][:1])).values[0]
    # How the score changes: the removal undoes what a change of the features does.
    slope = -ptif.actions.input_influence(attribution, (queries[0][:1], queries[1][:1]), ids=[one])[0, 0]
    steepest = everyone.names[int(slope.abs().argmax())]
    picture = study.picture("section_5_3")
    _draw(picture, first, child, y[:, 0], everyone.names, slope)
    top = first.abs().argsort(descending=True)[:2]
    return Finding(
        "section 5.3",
        "a wrong prediction traced to the only child like it",
        f"Titanic, {len(y):,} of 1,317 passengers: {len(taken)} of {len(lost)} lost children taken out, "
        f"lambda {DECAY:g}",
        "28 to 56 times",
        (
            Band("times the largest influence of any adult", float(ratios[0]), low=5),
            Band("the same, median of all lost children predicted wrongly", float(ratios.median()), low=5),
            Band("children among the two of largest influence", float(child[top].sum()), low=1),
            Band("the slope in the child's features is steepest in 'child'", float(steepest == "child under ten"), 0.5),
        ),
        picture,
        (f"{len(wrong)} of {len(taken)} taken-out children are predicted to survive; the one left in has index {one}",),
    )


def _draw(path: Path, scores: Tensor, child: Tensor, survived: Tensor, names: tuple[str, ...], slope: Tensor) -> None:
    with drawing(path, 7.6, 3.2) as figure:
        left, right = figure.subplots(1, 2, width_ratios=[1.1, 1])
        order = scores.abs().argsort(descending=True)[:20]
        kinds = (
            ("child, lost", child & (survived == 0), style.HELPFUL),
            ("child, survived", child & (survived == 1), style.PALETTE[5]),
            ("adult", ~child, style.FAINT),
        )
        for label, kind, colour in kinds:
            places = kind[order].nonzero().flatten()
            left.bar(places.numpy(), scores[order[places]].numpy(), color=colour, label=label)
        left.legend(frameon=False, title="left in training", title_fontsize=8, fontsize=8)
        left.axhline(0, color=style.FAINT, linewidth=0.6)
        left.set(xlabel="training passengers, by influence", ylabel="score", title="on a lost child's loss")
        left.set_xticks([])
        right.barh(range(len(names)), slope.numpy(), color=style.HELPFUL)
        right.set_yticks(range(len(names)), names)
        right.invert_yaxis()
        right.axvline(0, color=style.FAINT, linewidth=0.6)
        right.set(xlabel="slope of the score", title="in the one lost child's features")


if __name__ == "__main__":
    sys.exit(main(run))
