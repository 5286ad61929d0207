"""A table: find wrong diagnoses in the training data, repair them, and see what it was worth.

Logistic regression on scikit-learn's breast cancer table (569 patients, 30 columns), 30 of whose training labels are
flipped. Everything is exact here: predicted leave-one-out changes are compared with refits.

    python examples/breast_cancer.py [--small] [--out FOLDER]

Needs the extras plot and report, and scikit-learn for its data.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

import torch
from sklearn.datasets import load_breast_cancer
from torch import Tensor, nn
from torch.nn import functional as F

import pytorch_influence_functions as ptif
from pytorch_influence_functions.evaluation import found_when_checking, precision_at

DECAY = 0.01


def fitted(x: Tensor, y: Tensor) -> nn.Module:
    """Logistic regression at its minimum: the assumption that influence functions make, met."""
    model = nn.Linear(x.shape[1], 2).double()
    nn.init.zeros_(model.weight)
    nn.init.zeros_(model.bias)
    optimiser = torch.optim.LBFGS(model.parameters(), max_iter=500, line_search_fn="strong_wolfe", tolerance_grad=1e-10)

    def loss() -> Tensor:
        optimiser.zero_grad()
        value = F.cross_entropy(model(x), y) + DECAY / 2 * sum(p.square().sum() for p in model.parameters())
        value.backward()
        return value

    optimiser.step(loss)
    return model


def accuracy(model: nn.Module, x: Tensor, y: Tensor) -> float:
    return float((model(x).argmax(1) == y).float().mean())


def main() -> None:
    parser = argparse.ArgumentParser(description="Wrong labels in a table: found, repaired, measured.")
    parser.add_argument("--small", action="store_true", help="fewer refits: a test that it runs")
    parser.add_argument("--out", type=Path, default=Path("breast_cancer"), help="folder for what is written")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)

    found = load_breast_cancer()
    generator = torch.Generator().manual_seed(0)
    order = torch.randperm(569, generator=generator)
    x, truth = torch.from_numpy(found.data)[order], torch.from_numpy(found.target).long()[order]
    x = (x - x[:300].mean(0)) / x[:300].std(0)
    y, planted = truth[:300].clone(), torch.zeros(300, dtype=torch.bool)
    planted[torch.randperm(300, generator=generator)[:30]] = True
    y[planted] = 1 - y[planted]
    train, test = (x[:300], y), (x[300:], truth[300:])

    model = fitted(*train)
    problem = ptif.Problem(model, ptif.CrossEntropy(), train, weight_decay=DECAY)
    # One Newton step without the example instead of the first-order answer; no more damping than weight decay.
    attribution = ptif.methods.one_step_newton(damping=0.0).fit(problem)
    scores = replace(attribution.score(test), class_names=[str(name) for name in found.target_names])

    # Is it true? Leave patients out for real.
    total = scores.values.mean(0)
    checked = total.abs().argsort(descending=True)[: 5 if options.small else 40]
    with torch.no_grad():
        base = F.cross_entropy(model(test[0]), test[1])
    actual = []
    for i in checked.tolist():
        kept = torch.arange(300) != i
        with torch.no_grad():
            # N - 1 examples left: the mean over all N, with one of them gone.
            actual.append(float(F.cross_entropy(fitted(x[:300][kept], y[kept])(test[0]), test[1]) - base))
    figure = ptif.plots.plot_agreement(
        total[checked], actual, title="The patients with the largest influence, left out"
    )
    figure.savefig(options.out / "left_out.png")
    r = float(torch.corrcoef(torch.stack([total[checked], torch.tensor(actual).double()]))[0, 1])
    print(
        f"The {len(checked)} most influential patients left out one by one: predicted and refitted change of the test "
        f"loss correlate with r = {r:.4f}."
    )

    # Suspects: those without whom the test loss would fall most.
    harm = -total
    print(f"Flipped labels among the 30 most harmful patients: {precision_at(harm, planted, 30)}")
    losses = F.cross_entropy(model(x[:300]), y, reduction="none").detach()
    shares = (0.05, 0.1, 0.2)
    for name, suspicion in (
        ("influence on the test loss", harm),
        ("self-influence", attribution.self_influence()),
        ("training loss", losses),
    ):
        parts = [
            f"{p:.0%} after {s:.0%}"
            for p, s in zip(found_when_checking(suspicion, planted, shares), shares, strict=True)
        ]
        print(f"  flipped labels found by {name}: {', '.join(parts)}")

    # What to change: have the 45 most suspect diagnoses checked, correct the wrong ones, fit again.
    looked_at = harm.argsort(descending=True)[:45]
    repaired = y.clone()
    repaired[looked_at] = truth[looked_at]
    print(
        f"accuracy on {len(test[1])} held-out patients: {accuracy(model, *test):.1%} with 30 flipped labels, "
        f"{accuracy(fitted(train[0], repaired), *test):.1%} after 45 were looked at, "
        f"{accuracy(fitted(train[0], truth[:300]), *test):.1%} had all been right"
    )
    report = scores.report(
        options.out / "report.html",
        predictions=model(test[0]).softmax(1).detach(),
        train_predictions=model(train[0]).softmax(1).detach(),
        self_influence=attribution.self_influence(),
        columns=[str(name) for name in found.feature_names],
    )
    print(report)


if __name__ == "__main__":
    main()
