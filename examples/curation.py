"""From suspicion to a better model: doubtful labels looked at, corrected, trained again, judged on a test set.

2,000 images of Fashion-MNIST, a tenth of whose labels were made wrong on purpose. 400 of them, with right labels, are
held out as validation data. Writes the report page on which one would decide, and a table of the queue.

    python examples/curation.py [--small] [--out FOLDER] [--decisions decisions.json]

Without `--decisions` (what the page's Decisions view downloads) a careful person is played: of the first of the queue,
those whose label is wrong get the right one, the others stay. Needs the extras report and frame.
"""

from __future__ import annotations

import argparse
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

import pytorch_influence_functions as ptif
from pytorch_influence_functions.demo.data import datasets, load
from pytorch_influence_functions.evaluation import Recipe, train_model


def network() -> nn.Module:
    """26,000 parameters."""
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, stride=2, padding=1), nn.GroupNorm(4, 16), nn.ReLU(),
        nn.Conv2d(16, 32, 3, stride=2, padding=1), nn.GroupNorm(4, 32), nn.ReLU(),
        nn.Flatten(), nn.Linear(32 * 7 * 7, 10),
    )  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description="From doubtful labels to a better model, measured.")
    parser.add_argument("--small", action="store_true", help="a few images and epochs: a test that it runs")
    parser.add_argument("--out", type=Path, default=Path("curation"), help="folder for what is written")
    parser.add_argument("--decisions", type=Path, help="what the report page downloaded")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    n, held_out, looked_at = (240, 60, 30) if options.small else (1600, 400, 200)

    data = load()
    every, test = datasets(data)
    train = torch.utils.data.Subset(every, range(n))
    truth = torch.from_numpy(data.true_labels)
    images = torch.stack([every[i][0] for i in range(n, n + held_out)])
    validation = (images, truth[n : n + held_out])

    decay = 2e-3
    optimizer = partial(torch.optim.SGD, lr=0.05, momentum=0.9, weight_decay=decay)
    recipe = Recipe(network, optimizer, epochs=3 if options.small else 20)
    model = train_model(recipe, train, seed=0)

    # Suspicion: a queue of labels, by the loss that a model would have which never saw them, and by the harm they do.
    attribution = ptif.ekfac().fit(ptif.Problem(model, ptif.CrossEntropy(), train, weight_decay=decay))
    issues = ptif.find_label_issues(attribution, validation)
    first = issues.ids(looked_at)
    planted = torch.from_numpy(data.planted[:n])
    right = (issues.suggested == truth[:n])[first][planted[first]]
    print(
        f"Of the first {looked_at} of {n} labels in the queue {int(planted[first].sum())} were made wrong; "
        f"{int(planted.sum())} were in all. The suggested class is right for {float(right.double().mean()):.0%}."
    )
    issues.to_frame().to_csv(options.out / "queue.csv")

    # Look: the page shows each of them, what speaks against it, and what its removal would change.
    with torch.no_grad():
        said = model(images).softmax(1)
        said_in_training = model(torch.stack([train[i][0] for i in range(n)])).softmax(1)
    report = attribution.score(validation).report(
        options.out / "report.html",
        predictions=said,
        train_predictions=said_in_training,
        self_influence=issues.self_influence,
        doubt=issues.doubt,
        title="Which of these labels are wrong?",
    )
    print(report)

    # Decide.
    wrong = {i: int(truth[i]) for i in first if int(truth[i]) != int(issues.given[i])}
    decisions: Any = wrong if options.decisions is None else options.decisions
    curated = ptif.actions.curate(train, decisions)

    # Train again, and judge on images that had no part in any of this.
    seeds = 2 if options.small else 5
    print(curated.retrain(recipe, test, seeds))
    blind = ptif.actions.curate(train, issues)  # nobody looks: what the model disagrees with and does harm goes
    print("Without looking: ", blind.retrain(recipe, test, seeds))


if __name__ == "__main__":
    main()
