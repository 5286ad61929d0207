"""When does the exact derivative of a run predict removals? `python benchmarks/unrolled.py [--run tanh] [--quick]`.

Small networks on 300 digits, trained by the built-in recipe. Truth: the same run (same start, batches, learning rates)
with some examples at weight 0. About ten minutes on one core. Prints the table of `docs/along.md`: metasmoothness, and
the rank correlation of predicted with real changes over 20 removals (12 halves), mean over 40 queries.
"""

from __future__ import annotations

import argparse
from functools import partial

import torch
from scipy.stats import spearmanr
from sklearn.datasets import load_digits
from torch import Tensor, nn

import pytorch_influence_functions as ptif
from pytorch_influence_functions.evaluation import Recipe, train_model
from pytorch_influence_functions.trajectory.unrolled import UnrolledAttribution

N, QUERIES = 300, 40


def sgd(lr: float) -> partial[torch.optim.Optimizer]:
    return partial(torch.optim.SGD, lr=lr, momentum=0.9)


def adamw(lr: float) -> partial[torch.optim.Optimizer]:
    return partial(torch.optim.AdamW, lr=lr)


def mlp(activation: type[nn.Module]) -> nn.Module:
    return nn.Sequential(nn.Linear(64, 32), activation(), nn.Linear(32, 10))


# Network, optimiser, epochs.
RUNS = {
    "logistic regression, SGD .1, 10 epochs": (partial(nn.Linear, 64, 10), sgd(0.1), 10),
    "tanh, SGD .02, 5 epochs": (partial(mlp, nn.Tanh), sgd(0.02), 5),
    "tanh, SGD .1, 20 epochs": (partial(mlp, nn.Tanh), sgd(0.1), 20),
    "GELU, SGD .3, 20 epochs": (partial(mlp, nn.GELU), sgd(0.3), 20),
    "ReLU, SGD .02, 5 epochs": (partial(mlp, nn.ReLU), sgd(0.02), 5),
    "ReLU, SGD .1, 20 epochs": (partial(mlp, nn.ReLU), sgd(0.1), 20),
    "ReLU, SGD .3, 20 epochs": (partial(mlp, nn.ReLU), sgd(0.3), 20),
    "ReLU, AdamW .001, 5 epochs": (partial(mlp, nn.ReLU), adamw(1e-3), 5),
    "ReLU, AdamW .003, 10 epochs": (partial(mlp, nn.ReLU), adamw(3e-3), 10),
    "ReLU, AdamW .01, 20 epochs": (partial(mlp, nn.ReLU), adamw(1e-2), 20),
}
REMOVED = {"one": (1, 20), "5 %": (N // 20, 20), "a half": (N // 2, 12)}


def data() -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    digits = load_digits()
    x, y = torch.tensor(digits.data, dtype=torch.float32) / 16, torch.tensor(digits.target)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    train, queries = order[:N], order[N : N + QUERIES]
    return (x[train], y[train]), (x[queries], y[queries])


def measure(fitted: UnrolledAttribution, weights: Tensor, queries: tuple[Tensor, Tensor]) -> Tensor:
    """The queries' losses after the same run with other weights on the data."""
    runner = fitted.runner
    theta = runner.train(weights).theta
    with runner.open(), torch.no_grad():
        runner.load(theta)
        return nn.functional.cross_entropy(fitted.problem.model(queries[0]), queries[1], reduction="none").double()


def correlation(predicted: Tensor, real: Tensor) -> float:
    """The mean over queries of the rank correlation over removals."""
    each = [spearmanr(p, r)[0] for p, r in zip(predicted, real, strict=True)]
    return float(torch.tensor(each).nanmean())


def main() -> None:
    parser = argparse.ArgumentParser(description="The exact derivative of a run against the same run without examples.")
    parser.add_argument("--run", help="only the runs whose name holds these words")
    parser.add_argument("--quick", action="store_true", help="four queries, three removals of each size")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    train, queries = data()
    if asked.quick:
        queries = queries[0][:4], queries[1][:4]
    print("| run | metasmoothness | exact: one · 5 % · a half removed | EK-FAC: the same |\n| --- | --- | --- | --- |")
    for title, (make, optimizer, epochs) in RUNS.items():
        if asked.run is not None and asked.run not in title:
            continue
        recipe = Recipe(make, optimizer, epochs, 50, loss=nn.CrossEntropyLoss())
        problem = ptif.Problem(train_model(recipe, train), nn.CrossEntropyLoss(), train)
        fitted = ptif.methods.unrolled(recipe, least_smoothness=-1).fit(problem)
        exact = fitted.score(queries).values.double()
        ekfac = ptif.ekfac().fit(problem).score(queries).values.double()
        base, found = measure(fitted, torch.ones(N), queries), []
        for size, count in REMOVED.values():
            generator = torch.Generator().manual_seed(1)
            removed = [torch.randperm(N, generator=generator)[:size] for _ in range(3 if asked.quick else count)]
            weights = [torch.ones(N).index_fill(0, ids, 0.0) for ids in removed]
            real = torch.stack([measure(fitted, w, queries) - base for w in weights], 1)
            predicted = [torch.stack([s[:, ids].sum(1) for ids in removed], 1) for s in (exact, ekfac)]
            found.append([correlation(p, real) for p in predicted])
        columns = [" · ".join(f"{row[k]:.2f}" for row in found) for k in (0, 1)]
        print(f"| {title} | {fitted.smoothness.value:.2f} | {columns[0]} | {columns[1]} |", flush=True)


if __name__ == "__main__":
    main()
