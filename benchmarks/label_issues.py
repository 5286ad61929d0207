"""Which queue finds wrong labels: highest loss, confident learning, or `find_label_issues`?

    python benchmarks/label_issues.py            # all settings, about half an hour on two cores
    python benchmarks/label_issues.py --small    # breast cancer alone

Average precision for labels that were made wrong on purpose. "margin, 5 folds" is confident learning's normalised
margin on out-of-sample probabilities of the same model, trained five times more (Northcutt et al. 2021); the others use
the one model. The rule was fixed on digits and breast cancer; Fashion-MNIST judges it.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import dataclass

import numpy as np
import sklearn.datasets
import torch
from sklearn.metrics import average_precision_score
from torch import Tensor, nn

import pytorch_influence_functions as ptif
from pytorch_influence_functions.demo.data import load

QUEUES = ("highest loss", "margin, 5 folds", "find_label_issues", "… with validation")


@dataclass(frozen=True)
class Setting:
    """Which data, how many epochs, and how labels are made wrong."""

    data: str
    hidden: int
    epochs: int
    kind: str
    share: float

    def __str__(self) -> str:
        among = "any other class" if self.kind == "any" else "the next class"
        return f"{self.data}, {100 * self.share:.0f} % moved to {among}"


SETTINGS = [
    *(Setting("breast cancer", 16, 40, "any", share) for share in (0.1, 0.2)),
    *(Setting("digits", 48, 30, kind, share) for kind, share in (("any", 0.1), ("next", 0.1), ("any", 0.2))),
    *(Setting("Fashion-MNIST", 64, 25, kind, share) for kind, share in (("any", 0.1), ("next", 0.1), ("any", 0.2))),
]


def examples(name: str) -> tuple[Tensor, Tensor]:
    """Inputs and true classes."""
    if name == "Fashion-MNIST":
        data = load()
        return torch.tensor(data.train_images).float().flatten(1) / 255, torch.tensor(data.true_labels)
    source = sklearn.datasets.load_digits() if name == "digits" else sklearn.datasets.load_breast_cancer()
    x = torch.tensor(source.data, dtype=torch.float64)
    x = x / 16 if name == "digits" else (x - x.mean(0)) / x.std(0)
    return x.float(), torch.tensor(source.target)


def spoil(y: Tensor, setting: Setting, classes: int, seed: int) -> tuple[Tensor, Tensor]:
    """Labels with a share of them wrong, and which."""
    random = np.random.RandomState(100 + seed)
    chosen = random.permutation(len(y))[: int(setting.share * len(y))]
    wrong = y.clone()
    steps = np.ones(len(chosen), dtype=int) if setting.kind == "next" else random.randint(1, classes, len(chosen))
    wrong[chosen] = (wrong[chosen] + torch.from_numpy(steps)) % classes
    planted = torch.zeros(len(y), dtype=torch.bool)
    planted[chosen] = True
    return wrong, planted


def train(x: Tensor, y: Tensor, classes: int, setting: Setting, seed: int) -> nn.Module:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(x.shape[1], setting.hidden), nn.ReLU(), nn.Linear(setting.hidden, classes))
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3, weight_decay=1e-4)
    for _ in range(setting.epochs):
        for batch in torch.randperm(len(x)).split(64):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x[batch]), y[batch]).backward()
            optimizer.step()
    return model


def compare(setting: Setting, seed: int) -> list[float]:
    """Average precision of every queue."""
    x, true = examples(setting.data)
    classes = int(true.max()) + 1
    order = torch.from_numpy(np.random.RandomState(seed).permutation(len(x)))
    x, true = x[order], true[order]
    held_out = len(x) // 5
    validation = (x[:held_out], true[:held_out])
    x = x[held_out:]
    y, planted = spoil(true[held_out:], setting, classes, seed)
    model = train(x, y, classes, setting, seed)
    folds, probabilities = torch.arange(len(x)) % 5, torch.zeros(len(x), classes)
    for fold in range(5):
        rest = folds != fold
        other = train(x[rest], y[rest], classes, setting, seed + fold + 1)
        with torch.no_grad():
            probabilities[~rest] = other(x[~rest]).softmax(1)
    given = probabilities.gather(1, y[:, None])[:, 0]
    margin = probabilities.scatter(1, y[:, None], -1.0).max(1).values - given
    problem = ptif.Problem(model, nn.CrossEntropyLoss(), (x, y))
    alone, with_validation = ptif.find_label_issues(problem), ptif.find_label_issues(problem, validation)
    queues = (alone.loss, margin, alone.doubt, with_validation.doubt)
    return [float(average_precision_score(planted.numpy(), queue.numpy())) for queue in queues]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", action="store_true", help="breast cancer alone")
    parser.add_argument("--seeds", type=int, default=3)
    options = parser.parse_args()
    torch.set_num_threads(1)
    print("| setting | " + " | ".join(QUEUES) + " |\n|---|" + "---|" * len(QUEUES))
    for setting in SETTINGS[:2] if options.small else SETTINGS:
        began = time.perf_counter()
        precision = np.array([compare(setting, seed) for seed in range(options.seeds)])
        cells = [f"{mean:.3f} ± {spread:.3f}" for mean, spread in zip(precision.mean(0), precision.std(0), strict=True)]
        print(f"| {setting} | {' | '.join(cells)} |  <!-- {time.perf_counter() - began:.0f} s -->", flush=True)


if __name__ == "__main__":
    main()
