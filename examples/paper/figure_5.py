"""Figure 5: training images changed by a few grey levels, so that a model retrained on them gets a test image wrong."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import pytorch_influence_functions as ptif
from pytorch_influence_functions.actions import Front, SignSteps, TrainingSetAttack, attack_training_set
from pytorch_influence_functions.plots import style

from .fashion import WORDS, Garments, garments
from .study import Band, Finding, Study, drawing, main
from .training import newton

IMAGES = (1, 2, 10)
LEVELS = (0.5, 1.0, 2.0, 4.0)
"""Largest change of a pixel, in grey levels of 255."""
_ROUNDS = 4
_POOL = 50


@dataclass(frozen=True, eq=False)
class Shown:
    """One success for the picture: the test image, a training image before and after, how strong, among how many."""

    query: int
    image: int
    changed: Tensor
    level: float
    images: int


@dataclass(frozen=True, eq=False)
class Attack:
    """What the attacker knows: everything, as in the paper."""

    garments: Garments

    def fit(self, dataset: Any, seed: int) -> nn.Module:
        """The head fitted again, to its minimum."""
        features, labels = dataset.dataset.tensors
        head = self.garments.head
        return newton(features, labels[:, 0].long(), head.decay, head.model.weight.detach()[0])

    def margin(self, query: int) -> float:
        """How far the query is on the right side, in logits."""
        asked, label = self.asked(query)
        with torch.no_grad():
            logit = float(self.garments.head.model(asked)[0, 0])
        return logit if float(label) == 1 else -logit

    def asked(self, query: int) -> tuple[Tensor, Tensor]:
        """One held-out image as the head sees it, and its label."""
        split = self.garments.split
        with torch.no_grad():
            return self.garments.features(split.qx[query, None]), split.qy[query, None, None].double()

    def pool(self, query: int) -> list[int]:
        """Training images whose features can do most to the query: only these are looked at in pixels."""
        fitted = ptif.exact(damping=0.0).fit(self.garments.head.problem())
        slopes = ptif.actions.input_influence(fitted, self.asked(query))[0, :, :-1]
        return [int(i) for i in slopes.abs().sum(1).argsort(descending=True)[:_POOL]]

    def run(self, query: int, pool: list[int], images: int, level: float) -> TrainingSetAttack:
        """Change some training images by at most so many grey levels, against as many tries of random signs."""
        steps = SignSteps(level / 255, rounds=_ROUNDS)
        return attack_training_set(
            self.garments.head.problem(), self.asked(query), self.fit, images, steps, pool,
            Front(self.garments.features, self.garments.split.x), controls=_ROUNDS if images == IMAGES[-1] else 0,
            method=ptif.exact(damping=0.0), seed=query,
        )  # fmt: skip


def run(study: Study) -> Finding:
    """The held-out images it is least sure of, attacked through 1, 2 and 10 training images at four strengths."""
    attack = Attack(garments())
    split = attack.garments.split
    margins = torch.tensor([attack.margin(q) for q in range(len(split.qy))])
    right = (margins > 0).nonzero().flatten()
    asked = right[margins[right].argsort()][: study.size(24, 10)].tolist()
    levels = LEVELS if not study.small else (LEVELS[0], LEVELS[-1])
    flipped = torch.zeros(len(IMAGES), len(levels), dtype=torch.float64)
    by_noise = torch.zeros(len(levels), dtype=torch.float64)
    shown: Shown | None = None
    for query in asked:
        pool = attack.pool(query)
        for j, level in enumerate(levels):
            for i, images in enumerate(IMAGES):
                outcome = attack.run(query, pool, images, level)
                flipped[i, j] += bool(outcome.wrong)
                by_noise[j] += bool(outcome.control_wrong)
                if bool(outcome.wrong) and (shown is None or images < shown.images):
                    shown = Shown(query, outcome.ids[0], outcome.inputs[0, 0], level, images)
    share, noise = flipped / len(asked), by_noise / len(asked)
    rising = all(bool((share.diff(dim=d) >= 0).all()) for d in (0, 1))
    picture = study.picture("5")
    _draw(picture, attack, levels, share, noise, shown)
    table = "; ".join(
        f"{n} image{'s' * (n > 1)}: " + ", ".join(f"{v:.0%}" for v in row) for n, row in zip(IMAGES, share, strict=True)
    )
    grey = ", ".join(f"{level:g}" for level in levels)
    return Finding(
        "5",
        "test images flipped by changing training images, and retraining",
        WORDS,
        "57 % by one image, 77 % by two, nearly all by ten, at 0.5 of 255",
        (
            Band("share flipped by ten images at 4 of 255", float(share[-1, -1]), low=float(noise[-1])),
            Band("the share never falls with images or strength", float(rising), low=0.5),
            Band("what ten images flip more than one, at 4 of 255", float(share[-1, -1] - share[0, -1]), low=0),
            Band("what 4 of 255 flips more than 0.5, ten images", float(share[-1, -1] - share[-1, 0]), low=0),
        ),
        picture,
        (
            f"of the {len(asked)} least certain of {len(right)} held-out images it gets right, at {grey} of 255: "
            f"{table}; random signs on ten: {', '.join(f'{v:.0%}' for v in noise)}",
        ),
    )


def _draw(
    path: Path, attack: Attack, levels: tuple[float, ...], share: Tensor, noise: Tensor,
    shown: Shown | None,
) -> None:  # fmt: skip
    split = attack.garments.split
    with drawing(path, 8.4, 3.0) as figure:
        axes = figure.subplots(1, 4, width_ratios=[2, 1, 1, 1])
        for number, row, colour in zip(IMAGES, share, style.PALETTE, strict=False):
            label = f"{number} image{'s' if number > 1 else ''}"
            axes[0].plot(levels, 100 * row.numpy(), color=colour, marker="o", markersize=4, label=label)
        axes[0].plot(levels, 100 * noise.numpy(), color=style.FAINT, linestyle="--", label="10, random signs")
        axes[0].set(xlabel="largest change of a pixel, of 255", ylabel="test images flipped, %")
        axes[0].set_xscale("log", base=2)
        axes[0].set_xticks(levels, [f"{v:g}" for v in levels])
        axes[0].minorticks_off()
        axes[0].legend(frameon=False, fontsize=7)
        for one in axes[1:]:
            one.set_axis_off()
        if shown is None:
            return
        before, words = split.x[shown.image, 0], f"changed by\n{shown.level:g} of 255"
        pictures = (
            ("training image" + f"\n(one of {shown.images})" * (shown.images > 1), before),
            (words, shown.changed),
        )
        for one, (title, pixels) in zip(
            axes[1:], (*pictures, ("flips this\ntest image", split.qx[shown.query, 0])), strict=True
        ):
            one.imshow(pixels.numpy(), cmap="gray", vmin=0, vmax=1)
            one.set_title(title, loc="center", fontsize=8)


if __name__ == "__main__":
    sys.exit(main(run))
