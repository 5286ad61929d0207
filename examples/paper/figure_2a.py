"""Figure 2a: exact influence against leave-one-out retraining, ten-class logistic regression on MNIST."""

from __future__ import annotations

import sys

from .digits import digits
from .study import Band, Finding, Study, agreement, drawing, main, pearson, slope


def run(study: Study) -> Finding:
    """Conjugate gradients on the exact Hessian, at a test digit the model gets wrong."""
    found = digits(study)
    r = pearson(found.predicted, found.actual)
    picture = study.picture("2a")
    with drawing(picture, 3.4, 3.2) as figure:
        title = f"conjugate gradients\nr = {r:.4f}"
        agreement(figure.add_subplot(), found.predicted, found.actual, title)
    return Finding(
        "2a",
        "exact influence against leave-one-out retraining",
        found.words,
        "on the diagonal, r not printed",
        (Band("Pearson's r", r, low=0.99),),
        picture,
        (
            f"{len(found.ids)} examples of largest influence on a {found.wrong[1]} taken for a {found.wrong[0]}; "
            f"slope of actual on predicted {slope(found.predicted, found.actual):.3f}",
        ),
    )


if __name__ == "__main__":
    sys.exit(main(run))
