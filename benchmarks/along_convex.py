"""Is the run worth asking where training has one minimum? `python benchmarks/along_convex.py [--quick]`: two minutes.

Linear models trained by SGD for longer and shorter, with and without weight decay. Prints the table of `docs/along.md`:
half-subset LDS, and how far training had come.
"""

from __future__ import annotations

import argparse
import tempfile
from functools import partial
from typing import Any

import torch
from nets import mlp
from peers.prepare import DATA
from peers.workloads import CACHE

import pytorch_influence_functions as ptif
from pytorch_influence_functions.curvature import EKFAC
from pytorch_influence_functions.evaluation import LinearDecay, Recipe, Subsets, evaluate_one, retrain, train_model
from pytorch_influence_functions.methods import along
from pytorch_influence_functions.trajectory import SOURCE, Recording

# Data, epochs, weight decay, learning rate.
CASES = (
    ("fashion", 3, 0.0, 0.05),
    ("fashion", 10, 0.0, 0.05),
    ("fashion", 60, 0.0, 0.1),
    ("fashion", 60, 0.01, 0.1),
    ("diabetes", 3, 0.0, 0.02),
    ("diabetes", 20, 0.0, 0.02),
    ("diabetes", 60, 1e-3, 0.02),
)


def measure(name: str, epochs: int, decay: float, lr: float, quick: bool) -> str:
    """One row of the table."""
    fashion = name == "fashion"
    x, y, *queries = DATA[name](600, 60) if fashion else DATA[name](350, 92)
    loss: Any = ptif.CrossEntropy() if fashion else ptif.SquaredError()
    sgd = partial(torch.optim.SGD, lr=lr, momentum=0.9, weight_decay=decay)
    widths = (784, 10) if fashion else (10, 1)
    recipe = Recipe(partial(mlp, *widths), sgd, 1 if quick else epochs, 50, LinearDecay(0.1), loss)
    subsets, seeds = (6, 1) if quick else (30, 2 if epochs < 10 else 1)
    truth = retrain(
        recipe, Subsets.halves(len(x), subsets), seeds, train=(x, y), queries=tuple(queries), measure=loss,
        folder=CACHE / "along-convex", workers=1,
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        model = train_model(recipe, (x, y), 1000, record=folder)
        run = Recording.open(folder)
        problem = ptif.Problem(model, loss, (x, y), weight_decay=decay)
        methods = {
            "chosen by itself": ptif.Influence(),
            "EK-FAC": ptif.ekfac(),
            "along": along(run),
            "SOURCE": SOURCE(run.segments(3), EKFAC()),
        }
        scores = {key: method.fit(problem, len(queries[0])).score(tuple(queries)) for key, method in methods.items()}
    moving = scores["chosen by itself"].diagnostics.relative_gradient
    judged = [evaluate_one(s.values.double(), truth) for s in scores.values()]
    shown = " | ".join(f"{e.value:.3f} ({e.low:.3f} to {e.high:.3f})" for e in judged)
    return f"| {name}, {epochs} epochs, decay {decay:g} | {moving:.1%} | {shown} |"


def main() -> None:
    parser = argparse.ArgumentParser(description="Convex problems along the run.")
    parser.add_argument("--quick", action="store_true", help="tiny sizes")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    print("| linear model | gradient left | chosen by itself, final | EK-FAC, final | EK-FAC along the run | SOURCE |")
    print("| --- | --- | --- | --- | --- | --- |")
    for case in CASES:
        print(measure(*case, asked.quick), flush=True)


if __name__ == "__main__":
    main()
