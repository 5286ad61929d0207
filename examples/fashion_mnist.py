"""Images: which garments made a convolutional network take a coat for a shirt, and which labels are wrong?

EK-FAC along the training run over 2,000 images of Fashion-MNIST, 200 of whose labels were made wrong on purpose. Writes
a picture of the clearest mistakes, the class-to-class matrix, and a report to open in a browser.

    python examples/fashion_mnist.py [--small] [--out FOLDER]

Needs the extras plot and report.
"""

from __future__ import annotations

import argparse
from functools import partial
from pathlib import Path

import torch
from torch import nn

import pytorch_influence_functions as ptif
from pytorch_influence_functions.demo.data import datasets, load
from pytorch_influence_functions.evaluation import Recipe, found_when_checking, train_model


def network() -> nn.Module:
    """26,000 parameters."""
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, stride=2, padding=1), nn.GroupNorm(4, 16), nn.ReLU(),
        nn.Conv2d(16, 32, 3, stride=2, padding=1), nn.GroupNorm(4, 32), nn.ReLU(),
        nn.Flatten(), nn.Linear(32 * 7 * 7, 10),
    )  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description="Influence on images: a small convolutional network, EK-FAC.")
    parser.add_argument("--small", action="store_true", help="a few images and epochs: a test that it runs")
    parser.add_argument("--out", type=Path, default=Path("fashion_mnist"), help="folder for what is written")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    n, asked = (150, 10) if options.small else (2000, 200)

    data = load()
    train, test = (torch.utils.data.Subset(d, range(k)) for d, k in zip(datasets(data), (n, asked), strict=True))
    planted = torch.from_numpy(data.planted[:n])

    decay = 2e-3
    recipe = Recipe(
        network, partial(torch.optim.SGD, lr=0.05, momentum=0.9, weight_decay=decay), epochs=4 if options.small else 20
    )
    # Recorded, as `ptif.Recorder` would around a loop of one's own.
    model = train_model(recipe, train, seed=0, record=options.out / "run")
    images = torch.stack([test[i][0] for i in range(asked)])
    labels = torch.tensor([int(test[i][1]) for i in range(asked)])
    with torch.no_grad():
        said = model(images).softmax(1)
    print(f"{float((said.argmax(1) == labels).float().mean()):.1%} of {asked} test images are right")

    # Seven checkpoints of the run know more than the final weights, which have forgotten what they learned early.
    problem = ptif.Problem(model, ptif.CrossEntropy(), train, weight_decay=decay)
    scores = ptif.methods.along(options.out / "run").fit(problem, asked).score(test)
    print(scores.diagnostics)

    # The most confident mistake, and what it rests on.
    wrong = (said.argmax(1) != labels) * said.max(1).values
    q = int(wrong.argmax())
    print(f"\nTest image {q} is a {data.class_names[labels[q]]}; the model says {data.class_names[said[q].argmax()]}.")
    for index, score in scores.harmful(q, 5):
        note = ", whose label was made wrong" if planted[index] else ""
        print(f"  without training image {index} its loss would change by {score:+.2g}{note}")
    scores.plot(q, path=options.out / "mistake.png")

    # Labels to look at first: those that harm the test images, or, without any, those the model leans on alone. That is
    # a question to the final weights.
    own = ptif.ekfac().fit(problem).self_influence()
    print()
    for name, suspicion in (("harm to the test images", -scores.values.sum(0)), ("self-influence", own)):
        found = found_when_checking(suspicion, planted, (0.1, 0.2))
        print(
            f"Wrong labels found by looking at a tenth of the images: {found[0]:.0%}; a fifth: {found[1]:.0%} ({name})."
        )
    ptif.plots.plot_self_influence(own, marked=planted, path=options.out / "self_influence.png")
    ptif.plots.plot_class_matrix(scores, options.out / "classes.png")
    print(scores.report(options.out / "report.html", predictions=said, self_influence=own))


if __name__ == "__main__":
    main()
