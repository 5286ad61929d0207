"""What is it worth to act on the scores? Test accuracy after training again on curated data.

    python benchmarks/curation.py            # all settings, about an hour on one core
    python benchmarks/curation.py --small    # breast cancer alone

Labels are made wrong on purpose, a model is trained, the training data are curated by what `find_label_issues` and the
scores on validation data say, and models are trained again. A quarter of the examples, with right labels, judges
the outcome and takes no part in anything else; another fifth, with right labels, is the validation data. Every number
is the change of the test accuracy against training on all the data as they are, with the same seeds, and Student's 95 %
interval over draws of the data.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from label_issues import SETTINGS, Setting, examples, spoil
from torch import Tensor, nn

import pytorch_influence_functions as ptif
from pytorch_influence_functions.evaluation import (
    Accuracy,
    ConstantRate,
    Estimate,
    Protocol,
    Recipe,
    Subsets,
    retrain,
    train_model,
)

CLEAN = [Setting("breast cancer", 16, 40, "any", 0.0), Setting("digits", 48, 30, "any", 0.0),
         Setting("Fashion-MNIST", 64, 25, "any", 0.0)]  # fmt: skip
ACTIONS = (
    "queue dropped",
    "queue relabelled",
    "queue dropped, validation",
    "queue relabelled, validation",
    "issues dropped, validation",
    "highest loss dropped",
    "as many at random dropped",
    "all labels right",
    "useful half",
    "useful half of each class",
    "… scored again half-way",
    "issues out, then random half",
    "random half",
    "random half of each class",
)


def make_recipe(setting: Setting, width: int, classes: int) -> Recipe:
    """The network of the benchmark of queues, and its training."""

    def network() -> nn.Module:
        return nn.Sequential(nn.Linear(width, setting.hidden), nn.ReLU(), nn.Linear(setting.hidden, classes))

    optimizer = partial(torch.optim.Adam, lr=3e-3, weight_decay=1e-4)
    return Recipe(network, optimizer, setting.epochs, 64, ConstantRate(), nn.CrossEntropyLoss())


def best_part(usefulness: Tensor, groups: Tensor, share: float = 0.5) -> Tensor:
    """The share of each group that is most useful, as a mask: of 5, with a half, 3."""
    kept = torch.zeros(len(usefulness), dtype=torch.bool)
    for group in groups.unique():
        members = (groups == group).nonzero()[:, 0]
        order = usefulness[members].argsort(descending=True)
        kept[members[order[: math.ceil(share * len(members))]]] = True
    return kept


def without(n: int, ids: Any) -> Tensor:
    kept = torch.ones(n, dtype=torch.bool)
    kept[ids] = False
    return kept


def compare(setting: Setting, draw: int, seeds: int) -> list[float]:
    """Test accuracy of training on everything, then what each action adds, means over seeds."""
    x, true = examples(setting.data)
    classes = int(true.max()) + 1
    order = torch.from_numpy(np.random.RandomState(draw).permutation(len(x)))
    x, true = x[order], true[order]
    test, validation = len(x) // 4, len(x) // 4 + len(x) // 5
    judge, helper = (x[:test], true[:test]), (x[test:validation], true[test:validation])
    x, true = x[validation:], true[validation:]
    y, planted = spoil(true, setting, classes, draw)
    n, k = len(x), int(planted.sum())
    recipe = make_recipe(setting, x.shape[1], classes)

    def fit(kept: Tensor) -> Any:
        data = (x[kept], y[kept])
        return ptif.ekfac().fit(ptif.Problem(train_model(recipe, data, 1000 + draw), nn.CrossEntropyLoss(), data))

    fitted = fit(torch.ones(n, dtype=torch.bool))
    alone, helped = ptif.find_label_issues(fitted), ptif.find_label_issues(fitted, helper)
    usefulness = fitted.score(helper).values.double().mean(0)
    # The most harmful quarter of each class goes; what is left is trained on and scored, and a third of it goes.
    half_way = best_part(usefulness, y, 3 / 4)
    again = torch.full((n,), -torch.inf, dtype=torch.float64)
    again[half_way] = fit(half_way).score(helper).values.double().mean(0)
    generator = torch.Generator().manual_seed(draw)
    shuffled = torch.randperm(n, generator=generator)
    chance = torch.rand(n, generator=generator)
    everything = torch.ones(n, dtype=torch.bool)
    edits: Sequence[tuple[Tensor, Mapping[int, int]]] = [
        (without(n, alone.ids(k)), {}),
        (everything, alone.relabelling(k)),
        (without(n, helped.ids(k)), {}),
        (everything, helped.relabelling(k)),
        (~helped.is_issue, {}),
        (without(n, alone.loss.argsort(descending=True)[:k]), {}),
        (without(n, shuffled[:k]), {}),
        (everything, {int(i): int(true[i]) for i in planted.nonzero()[:, 0]}),
        (best_part(usefulness, torch.zeros(n)), {}),
        (best_part(usefulness, y), {}),
        (best_part(again, y), {}),
        (best_part(chance.masked_fill(helped.is_issue, -1.0), y), {}),
        (without(n, shuffled[: n // 2]), {}),
        (best_part(chance, y), {}),
    ]
    kept, labels = torch.stack([mask for mask, _ in edits]), tuple(change for _, change in edits)
    subsets = Subsets(kept, Protocol.OWN, "curated", labels)
    truth = retrain(recipe, subsets, seeds, train=(x, y), queries=judge, measure=Accuracy(), workers=1)
    before = truth.baseline.double().mean()
    return [float(before), *(truth.measured.double().mean((1, 2)) - before).tolist()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", action="store_true", help="breast cancer alone")
    parser.add_argument("--draws", type=int, default=5, help="of data, wrong labels and the first model")
    parser.add_argument("--seeds", type=int, default=3, help="trainings on each edited data set")
    parser.add_argument("--only", default="", help="settings whose name holds this")
    options = parser.parse_args()
    torch.set_num_threads(1)
    settings = SETTINGS[:2] if options.small else [*SETTINGS, *CLEAN]
    for setting in [one for one in settings if options.only in str(one)]:
        began = time.perf_counter()
        table = torch.tensor([compare(setting, draw, options.seeds) for draw in range(options.draws)])
        print(f"{setting}: accuracy {float(table[:, 0].mean()):.3f}  [{time.perf_counter() - began:.0f} s]")
        for name, gains in zip(ACTIONS, table[:, 1:].unbind(1), strict=True):
            if gains.abs().sum() > 0:
                gain = Estimate.over_seeds(gains, "draws")
                beyond = ""
                if "half" in name:
                    paired = Estimate.over_seeds(gains - table[:, -1], "draws")
                    beyond = f"  less random: {paired.value:+.4f} ({paired.low:+.4f} to {paired.high:+.4f})"
                print(f"  {name:<32}{gain.value:+.4f} ({gain.low:+.4f} to {gain.high:+.4f}){beyond}", flush=True)


if __name__ == "__main__":
    main()
