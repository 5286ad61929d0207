"""Figure 2b: as figure 2a, with LiSSA at the paper's settings in place of conjugate gradients."""

from __future__ import annotations

import sys

import pytorch_influence_functions as ptif
from pytorch_influence_functions.plots import style

from .digits import digits
from .study import Band, Finding, Study, agreement, drawing, main, pearson


def run(study: Study) -> Finding:
    """Scale 25, 5,000 steps of one example each, no damping beside the weight decay, ten repeats averaged."""
    found = digits(study)
    paper = ptif.methods.lissa(damping=0.0, step=1 / 25, steps=5000, batch_size=1, repeats=study.size(10, 4), seed=17)
    tuned = ptif.methods.lissa(damping=0.0)
    scores = {name: m.fit(found.problem).score(found.query).values[0] for name, m in (("p", paper), ("t", tuned))}
    to_actual = {name: pearson(s[found.ids], found.actual) for name, s in scores.items()}
    to_exact = {name: pearson(s[found.ids], found.predicted) for name, s in scores.items()}
    picture = study.picture("2b")
    with drawing(picture, 6.6, 3.2) as figure:
        left, right = figure.subplots(1, 2)
        agreement(left, scores["p"][found.ids], found.actual, f"the paper's settings\nr = {to_actual['p']:.4f}")
        title = f"settings by measurement\nr = {to_actual['t']:.4f}"
        agreement(right, scores["t"][found.ids], found.actual, title, style.HARMFUL)
    return Finding(
        "2b",
        f"LiSSA (scale 25, 5,000 steps of one example, {paper.solver.repeats} repeats) against retraining",
        found.words,
        "nearly identical to figure 2a",
        (
            Band("Pearson's r, the paper's settings", to_actual["p"], low=0.95),
            Band("Pearson's r, settings measured by the library", to_actual["t"], low=0.95),
        ),
        picture,
        (f"against exact influence: {to_exact['p']:.4f} and {to_exact['t']:.4f}",),
    )


if __name__ == "__main__":
    sys.exit(main(run))
