"""Figure 5: training images changed by a few grey levels, so that a model retrained on them gets a test image wrong."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

import pytorch_influence_functions as ptif
from pytorch_influence_functions.plots import style

from .fashion import WORDS, Garments, Head, garments
from .perturbation import slope_in_inputs
from .study import Band, Finding, Study, drawing, main

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

    def retrained(self, ids: Tensor, images: Tensor) -> Head:
        """The head fitted again, to its minimum, with some training images replaced."""
        head = self.garments.head
        features = head.features.clone()
        with torch.no_grad():
            features[ids] = self.garments.features(images)
        return Head.fit(features[:, :-1], head.labels, head.decay, head.model.weight.detach()[0])

    def margin(self, head: Head, query: int) -> float:
        """How far the query is on the right side, in logits; negative: flipped."""
        split = self.garments.split
        with torch.no_grad():
            logit = float(head.model(self.garments.features(split.qx[query, None]))[0, 0])
        return logit if split.qy[query] == 1 else -logit

    def slope(self, head: Head, query: int, ids: Tensor, images: Tensor) -> Tensor:
        """How the query's loss rises with the pixels of training images: from the score's slope in their features."""
        split = self.garments.split
        seen = images.clone().requires_grad_()
        features = self.garments.features(seen)
        with torch.no_grad():
            asked = self.garments.features(split.qx[query, None]), split.qy[query, None, None].double()
        attribution = ptif.exact(damping=0.0).fit(head.problem())
        rising = -slope_in_inputs(attribution, asked, features.detach(), split.y[ids, None].double())
        return torch.autograd.grad((features * rising).sum(), seen)[0]

    def order(self, query: int) -> Tensor:
        """Training images by what their pixels can do to the query, most first; ranked by the norm the paper ranks by.

        Only those whose features can do most are looked at in pixels.
        """
        head, split = self.garments.head, self.garments.split
        with torch.no_grad():
            asked = self.garments.features(split.qx[query, None]), split.qy[query, None, None].double()
        attribution = ptif.exact(damping=0.0).fit(head.problem())
        slopes = slope_in_inputs(attribution, asked, head.features, split.y[:, None].double())
        pool = slopes[:, :-1].abs().sum(1).argsort(descending=True)[:_POOL]
        pixels = self.slope(head, query, pool, split.x[pool]).flatten(1).abs().sum(1)
        return pool[pixels.argsort(descending=True)]

    def run(self, query: int, ids: Tensor, level: float) -> tuple[float, Tensor]:
        """The margin after the attack, and the images: steps along the sign, kept within `level` and in 0 to 1."""
        original = self.garments.split.x[ids]
        images, head, box = original, self.garments.head, level / 255
        best, found = self.margin(head, query), original
        for at in range(_ROUNDS):
            step = box * (1.0 if at == 0 else 0.5)
            moved = images + step * self.slope(head, query, ids, images).sign()
            images = torch.minimum(torch.maximum(moved, original - box), original + box).clamp(0, 1)
            head = self.retrained(ids, images)
            margin = self.margin(head, query)
            if margin < best:
                best, found = margin, images
            if best < 0:
                break
        return best, found

    def noise(self, query: int, ids: Tensor, level: float) -> float:
        """The smallest margin over as many random sign patterns as an attack has rounds."""
        original, random = self.garments.split.x[ids], torch.Generator().manual_seed(query)
        margins = []
        for _ in range(_ROUNDS):
            signs = torch.randint(0, 2, original.shape, generator=random) * 2.0 - 1
            images = (original + level / 255 * signs).clamp(0, 1)
            margins.append(self.margin(self.retrained(ids, images), query))
        return min(margins)


def run(study: Study) -> Finding:
    """The held-out images it is least sure of, attacked through 1, 2 and 10 training images at four strengths."""
    attack = Attack(garments())
    split = attack.garments.split
    margins = torch.tensor([attack.margin(attack.garments.head, q) for q in range(len(split.qy))])
    right = (margins > 0).nonzero().flatten()
    asked = right[margins[right].argsort()][: study.size(24, 10)].tolist()
    levels = LEVELS if not study.small else (LEVELS[0], LEVELS[-1])
    flipped = torch.zeros(len(IMAGES), len(levels), dtype=torch.float64)
    by_noise = torch.zeros(len(levels), dtype=torch.float64)
    shown: Shown | None = None
    for query in asked:
        order = attack.order(query)
        for j, level in enumerate(levels):
            for i, images in enumerate(IMAGES):
                margin, changed = attack.run(query, order[:images], level)
                flipped[i, j] += margin < 0
                if margin < 0 and (shown is None or images < shown.images):
                    shown = Shown(query, int(order[0]), changed[0, 0], level, images)
            by_noise[j] += attack.noise(query, order[: IMAGES[-1]], level) < 0
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
