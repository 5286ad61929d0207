"""One mean over many queries against every query by itself: `python benchmarks/questions.py --queries 10000`.

Both ask what training examples do to the mean loss over the queries: `aggregate="mean"` adds the gradients up before
the one solve; the other way scores every query and takes the mean of the rows. CPU seconds in the same process.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

import pytorch_influence_functions as ptif

METHODS: dict[str, Callable[[], ptif.Influence]] = {
    "ekfac": ptif.ekfac,
    "dual": ptif.dual,
    "cg": lambda: ptif.Influence(ptif.curvature.EmpiricalFisher(), ptif.solvers.CG(1e-3, 200), 1e-2),
}


def setting(n: int, queries: int) -> tuple[ptif.Problem, tuple[torch.Tensor, torch.Tensor]]:
    """A perceptron 784-128-64-10 trained for a few epochs on noise that a random teacher labels."""
    torch.manual_seed(0)

    def network() -> nn.Module:
        return nn.Sequential(nn.Linear(784, 128), nn.ReLU(), nn.Linear(128, 64), nn.ReLU(), nn.Linear(64, 10))

    teacher, model = network(), network()
    x = torch.randn(n + queries, 784)
    y = (10 * teacher(x).detach()).argmax(1)
    optimiser = torch.optim.Adam(model.parameters(), lr=1e-3)
    for _ in range(5):
        for part in torch.randperm(n).split(64):
            optimiser.zero_grad()
            F.cross_entropy(model(x[part]), y[part]).backward()
            optimiser.step()
    problem = ptif.Problem(model, nn.CrossEntropyLoss(), (x[:n], y[:n]), deterministic="ignore")
    return problem, (x[n:], y[n:])


def both_ways(attribution: ptif.Attribution, queries: Any) -> tuple[float, float, torch.Tensor, torch.Tensor]:
    """CPU seconds of the one mean and of every query, and the row that each gives."""
    mean_seconds, mean = timed(lambda: attribution.score(queries, aggregate="mean").values[0].double())
    each_seconds, each = timed(lambda: attribution.score(queries).values.double().mean(0))
    return mean_seconds, each_seconds, mean, each


def timed(ask: Callable[[], torch.Tensor]) -> tuple[float, torch.Tensor]:
    """CPU seconds, and what came out."""
    start = time.process_time()
    answer = ask()
    return time.process_time() - start, answer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--examples", type=int, default=2000)
    parser.add_argument("--queries", type=int, default=10_000)
    parser.add_argument("--methods", nargs="*", default=["ekfac", "dual"], choices=list(METHODS))
    options = parser.parse_args()
    torch.set_num_threads(1)
    ptif.progress(False)
    problem, queries = setting(options.examples, options.queries)
    print(f"{options.queries:,} queries x {options.examples:,} training examples, 784-128-64-10, one thread")
    print("| method | one mean | every query | times | largest difference |\n|---|---|---|---|---|")
    for name in options.methods:
        mean_seconds, each_seconds, mean, each = both_ways(METHODS[name]().fit(problem), queries)
        difference = float((mean - each).abs().max() / each.abs().max())
        ratio = each_seconds / mean_seconds
        print(f"| {name} | {mean_seconds:.2f} s | {each_seconds:.2f} s | {ratio:.0f} | {difference:.1e} |", flush=True)


if __name__ == "__main__":
    main()
