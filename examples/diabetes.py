"""Regression with a loss and a measure of one's own: which patients does a prediction lean on?

A small network predicts the progression of diabetes (scikit-learn, 442 patients, 10 columns). The measure is not a loss
but the prediction itself: scores say by how much the number for this patient would move without that one.

    python examples/diabetes.py [--small] [--out FOLDER]

Needs the extra plot, and scikit-learn for its data.
"""

from __future__ import annotations

import argparse
from functools import partial
from pathlib import Path

import torch
from sklearn.datasets import load_diabetes
from torch import Tensor, nn

import pytorch_influence_functions as ptif
from pytorch_influence_functions.evaluation import Recipe, Subsets, removal_correlation, retrain, train_model


def network() -> nn.Module:
    return nn.Sequential(nn.Linear(10, 16), nn.Tanh(), nn.Linear(16, 1)).double()


def prediction(outputs: Tensor, targets: Tensor) -> Tensor:
    """What is measured on a query, in units of the target's standard deviation."""
    return outputs[:, 0]


def main() -> None:
    parser = argparse.ArgumentParser(description="Regression: which patients does a prediction lean on?")
    parser.add_argument("--small", action="store_true", help="fewer trainings: a test that it runs")
    parser.add_argument("--out", type=Path, default=Path("diabetes"), help="folder for what is written")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)

    table = load_diabetes()
    order = torch.randperm(442, generator=torch.Generator().manual_seed(0))
    x, y = (torch.from_numpy(v).double()[order] for v in (table.data, table.target))
    x, y = (x - x.mean(0)) / x.std(0), ((y - y.mean()) / y.std())[:, None]
    train, queries = (x[:342], y[:342]), (x[342:], y[342:])

    decay = 0.02
    recipe = Recipe(
        network,
        partial(torch.optim.SGD, lr=0.05, momentum=0.9, weight_decay=decay),
        epochs=40 if options.small else 400,
        batch_size=None,
        loss=ptif.SquaredError(),
    )
    model = train_model(recipe, train, seed=0)
    with torch.no_grad():
        said = model(queries[0])
    explained = 1 - float((said - queries[1]).square().mean() / queries[1].var())
    print(f"The network explains {explained:.0%} of the variance of {len(queries[1])} held-out patients.")

    measure = ptif.FromFunction(prediction, lower_is_better=False)
    problem = ptif.Problem(model, ptif.SquaredError(), train, weight_decay=decay)
    # A network this small: the Gauss-Newton matrix in full, nothing left out, no more damping than weight decay.
    attribution = ptif.exact(damping=0.0).fit(problem)
    scores = attribution.score(queries, measure)
    print(scores.diagnostics)

    q = int(scores.values.abs().amax(1).argmax())
    spread = float(y.new_tensor(table.target).std())
    print(f"\nPatient {q}: predicted {float(said[q, 0]):+.2f} standard deviations from the mean.")
    for i in scores.values[q].abs().argsort(descending=True)[:5].tolist():
        moved = float(scores.values[q, i])
        print(f"  without patient {i} the prediction would move by {moved:+.3f} ({moved * spread:+.2f} points)")
    names = list(table.feature_names)
    scores.plot(
        q,
        denormalize=lambda row: {name: float(v) for name, v in zip(names, row, strict=True)},
        path=options.out / "patient.png",
    )

    # Is it true? Warm-started leave-one-out: from these weights, without one patient, to the next minimum.
    again = Recipe(
        network,
        recipe.optimizer,
        epochs=recipe.epochs,
        batch_size=None,
        loss=ptif.SquaredError(),
        start=model.state_dict(),
    )
    ids = scores.values.abs().amax(0).argsort(descending=True)[: 6 if options.small else 60].tolist()
    truth = retrain(again, Subsets.leave_one_out(342, ids), seeds=1, train=train, queries=queries, measure=measure)
    print(f"Leave-one-out correlation over {len(ids)} patients: {removal_correlation(scores, truth)}")
    changes = truth.measured[:, 0, q] - truth.baseline[0, q]
    figure = ptif.plots.plot_agreement(
        scores.values[q, ids],
        changes,
        title=f"Patient {q}, others left out",
        xlabel="predicted change of the prediction",
    )
    figure.savefig(options.out / "left_out.png")


if __name__ == "__main__":
    main()
