"""Figure 4: the same test images seen by a kernel on pixels and by a network's features have different influences."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

import pytorch_influence_functions as ptif
from pytorch_influence_functions.plots import style

from . import training
from .fashion import DECAY, WORDS, garments
from .figure_3 import smooth_hinge, svm
from .study import Band, Finding, Study, drawing, main, spearman

# The paper's 0.05 / 1,800 on 299 x 299 x 3 pixels from -1 to 1, per pixel.
GAMMA = 0.05 / 1800 * (299 * 299 * 3) / 784
# "Large" and "small", of the reference design, in numbers.
_BETWEEN = 0.4


def run(study: Study) -> Finding:
    """A support vector machine with an RBF kernel against logistic regression on the features of a network."""
    found = garments()
    x, y, qx, qy = found.split
    with torch.no_grad():
        features = found.features(qx)
        right = (found.head.model(features)[:, 0] > 0) == (qy == 1)
    kernel, held = _kernel_features(2 * x.flatten(1) - 1, 2 * qx.flatten(1) - 1)
    sign, held_sign = 2 * y.double() - 1, 2 * qy.double() - 1
    weight = svm(kernel, sign, 1 / (DECAY * len(y)))
    machine = training.linear(len(y), 1)
    machine.weight.data.copy_(weight)
    margin = (held @ weight.T)[:, 0] * held_sign
    # Both get them right; beyond a margin of one the hinge has no slope, and nothing any influence.
    asked = (right & (margin > 0) & (margin < 1)).nonzero().flatten()[: study.size(20, 8)]
    problem = ptif.Problem(machine, smooth_hinge(0.001), (kernel, sign[:, None]), weight_decay=DECAY, batch_size=len(y))
    method = ptif.methods.koh_liang(damping=0.0, rtol=1e-3, max_steps=5000)
    rbf = method.fit(problem).score((held[asked], held_sign[asked, None])).values
    queries = features[asked], qy[asked, None].double()
    network = ptif.exact(damping=0.0).fit(found.head.problem()).score(queries).values
    distance = torch.cdist(2 * qx[asked].flatten(1) - 1, 2 * x.flatten(1) - 1)
    # Examples beyond the margin have no influence at all on the machine: they have no rank.
    support = (kernel @ weight.T)[:, 0] * sign < 1 + 1e-3
    of_rbf = [spearman(s[support].abs(), d[support]) for s, d in zip(rbf, distance, strict=True)]
    of_network = [spearman(s.abs(), d) for s, d in zip(network, distance, strict=True)]
    ratio = float((rbf.abs().max(1).values / network.abs().max(1).values).median())
    picture = study.picture("4")
    same = qy[asked[0]] == y
    _draw(picture, distance[0], {"RBF kernel on pixels": rbf[0], "features of a network": network[0]}, same)
    return Finding(
        "4",
        "influence against distance in pixels, under two models",
        WORDS,
        "60 times; distance matters to the kernel and not to the network",
        (
            Band("median ratio of the largest influences, kernel to network", ratio, low=10),
            Band("|Spearman| of influence and distance, kernel", abs(float(np.median(of_rbf))), low=_BETWEEN),
            Band("|Spearman| of influence and distance, network", abs(float(np.median(of_network))), high=_BETWEEN),
        ),
        picture,
        (
            f"medians over {len(asked)} held-out images that both get right; {int(support.sum()):,} of {len(y):,} are "
            f"support vectors; held-out accuracy {float((margin > 0).double().mean()):.3f} and "
            f"{float(right.double().mean()):.3f}",
        ),
    )


def _kernel_features(x: Tensor, qx: Tensor) -> tuple[Tensor, Tensor]:
    """Features whose inner products are the kernel's values: rows of the Cholesky factor, [n, n] and [q, n]."""
    kernel = torch.exp(-GAMMA * torch.cdist(x, x).square())
    factor = torch.linalg.cholesky(kernel + 1e-10 * torch.eye(len(x)))
    across = torch.exp(-GAMMA * torch.cdist(qx, x).square())
    return factor, torch.linalg.solve_triangular(factor, across.T, upper=False).T.contiguous()


def _draw(path: Path, distance: Tensor, scores: dict[str, Tensor], same: Tensor) -> None:
    with drawing(path, 7.2, 3.2) as figure:
        for axes, (name, values) in zip(figure.subplots(1, 2), scores.items(), strict=True):
            up = style.power_of_ten(float(values.abs().max()))
            shown = (("the other class", ~same, style.HARMFUL), ("the test image's class", same, style.HELPFUL))
            for label, mask, colour in shown:
                height = values[mask].numpy() / 10.0**up
                axes.scatter(distance[mask].numpy(), height, s=6, color=colour, alpha=0.5, linewidths=0, label=label)
            axes.axhline(0, color=style.FAINT, linewidth=0.6)
            axes.set(xlabel="distance in pixels", ylabel=f"score{style.format_power(up)}", title=name)
        axes.legend(frameon=False, fontsize=7)


if __name__ == "__main__":
    sys.exit(main(run))
