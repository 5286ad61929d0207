"""Which method is right here? Handwritten digits, every method beside its plain baselines, judged by retraining.

Trains a small network again and again on random halves of scikit-learn's digits, and asks which method's scores predict
what that does to the test losses (the linear datamodelling score), with intervals and a noise ceiling.

    python examples/digits.py [--small] [--out FOLDER]

Needs the extra plot, and scikit-learn for its data.
"""

from __future__ import annotations

import argparse
from functools import partial
from pathlib import Path

import torch
from sklearn.datasets import load_digits
from torch import nn

import pytorch_influence_functions as ptif
from pytorch_influence_functions.evaluation import Recipe, Subsets, retrain, train_model


def main() -> None:
    parser = argparse.ArgumentParser(description="Methods compared by retraining, on handwritten digits.")
    parser.add_argument("--small", action="store_true", help="a few subsets and epochs: a test that it runs")
    parser.add_argument("--out", type=Path, default=Path("digits"), help="folder for what is written")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    n, subsets, seeds, epochs = (200, 6, 2, 3) if options.small else (800, 60, 3, 30)

    found = load_digits()
    order = torch.randperm(len(found.target), generator=torch.Generator().manual_seed(0))
    x = torch.from_numpy(found.data).float()[order] / 16
    y = torch.from_numpy(found.target).long()[order]
    train, queries = (x[:n], y[:n]), (x[-100:], y[-100:])

    decay = 1e-3
    recipe = Recipe(
        lambda: nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10)),
        partial(torch.optim.SGD, lr=0.1, momentum=0.9, weight_decay=decay),
        epochs=epochs,
        loss=nn.CrossEntropyLoss(),
    )

    # The truth first: kept in the folder, so that a second run starts where this one ends.
    halves = Subsets.halves(n, count=subsets)
    truth = retrain(recipe, halves, seeds=seeds, train=train, queries=queries, folder=options.out / "trainings")
    print(truth)

    model = train_model(recipe, train, seed=0, record=options.out / "run")
    problem = ptif.Problem(model, nn.CrossEntropyLoss(), train, weight_decay=decay)
    methods = {
        "EK-FAC": ptif.ekfac(),
        "EK-FAC along the run": ptif.methods.along(options.out / "run"),
        "K-FAC": ptif.methods.kfac(),
        "dual of the Gauss-Newton matrix": ptif.dual(ptif.curvature.GGN()),
        "dual of the empirical Fisher": ptif.dual(),
        "TRAK, one model": ptif.trak(256),
        "DataInf": ptif.methods.datainf(),
    }
    table = ptif.evaluate(methods, truth, problem=problem, queries=queries)
    print(table)
    print(f"Along the run EK-FAC gains {table.compare('EK-FAC along the run', 'EK-FAC')}")
    print(f"EK-FAC beats the gradient dot product by {table.compare('EK-FAC', 'gradient dot product')}")
    table.plot().savefig(options.out / "methods.png")

    # And for one user with one question: is the top of this ranking more than noise?
    scores = ptif.ekfac().fit(problem).score(queries)
    checked = scores.verify(recipe, n=6 if options.small else 12, seeds=seeds)
    print(checked.sentence)
    checked.plot().savefig(options.out / "verified.png")


if __name__ == "__main__":
    main()
