"""What a projection costs beside EK-FAC, and what it keeps: `python benchmarks/projections.py [--truth | --adam]`.

TRAK with each projection on a perceptron and a convolutional network: CPU seconds of fitting and scoring
100 queries on one thread. With `--truth`, a `Truth` of the league's first setting and the folder of its models, the
linear datamodelling score over three seeds of the projection. With `--adam`, that of TrackStar and LESS, which follow
Adam, and how far they rank as without a projection: a perceptron on 1,000 images, trained here, 40 halves x 2 seeds.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from costs import CASES
from index import rank_agreement
from nets import mlp
from torch import nn

import pytorch_influence_functions as ptif
from pytorch_influence_functions.demo.data import datasets as demo_datasets
from pytorch_influence_functions.evaluation import Recipe, Subsets, Truth, evaluate_one, retrain
from pytorch_influence_functions.gradients import Gaussian, Sketch, TwoSided

K = 1024
PROJECTIONS: dict[str, Any] = {
    "Gaussian(1024)": lambda seed: Gaussian(K, seed=seed),
    "Sketch(1024), the default": lambda seed: Sketch(K, seed=seed),
    "TwoSided(18)": lambda seed: TwoSided(18, seed=seed),
}
NETWORKS = {"perceptron": ("Fashion MLP, 1,000", 1000), "convolutions": ("convnet, 500", 500)}


def seconds(method: Any, problem: ptif.Problem, queries: Any) -> tuple[float, ptif.Scores]:
    """CPU seconds of fit and score."""
    start = time.process_time()
    scores = method.fit(problem, n_queries=len(queries[0])).score(queries)
    return time.process_time() - start, scores


def price(name: str, quick: bool) -> None:
    case, n = NETWORKS[name]
    model, x, y = CASES[case].build()
    n = n // 10 if quick else n
    problem, queries = ptif.Problem(model, ptif.CrossEntropy(), (x[:n], y[:n])), (x[:100], y[:100])
    seconds(ptif.ekfac(), problem, queries)
    base = min(seconds(ptif.ekfac(), problem, queries)[0] for _ in range(2))
    print(f"| {name}, {n:,} examples | EK-FAC | {base:.2f} | 1 |", flush=True)
    for label, make in PROJECTIONS.items():
        best = min(seconds(ptif.trak(projection=make(0)), problem, queries)[0] for _ in range(2))
        print(f"| | TRAK, {label} | {best:.2f} | {best / base:.1f} |", flush=True)


def quality(truth: Truth, folder: Path) -> None:
    model = mlp(784, 128, 64, 10)
    with np.load(folder / "trained.npz") as file:
        arrays = {key: torch.from_numpy(file[key]) for key in file.files}
    model.load_state_dict({key[2:]: value for key, value in arrays.items() if key.startswith("w.")})
    problem, queries = (
        ptif.Problem(model, ptif.CrossEntropy(), (arrays["x"], arrays["y"])),
        (arrays["qx"], arrays["qy"]),
    )
    rows = {"EK-FAC": [ptif.ekfac()]}
    rows |= {label: [ptif.trak(projection=make(seed)) for seed in range(3)] for label, make in PROJECTIONS.items()}
    for label, methods in rows.items():
        runs = [seconds(method, problem, queries) for method in methods]
        agreement = ", ".join(f"{evaluate_one(scores, truth).value:.3f}" for _, scores in runs)
        print(f"| {label} | {agreement} | {min(cpu for cpu, _ in runs):.2f} |", flush=True)


def after_adam(folder: Path) -> None:
    """TrackStar and LESS with and without a projection, against retraining."""
    train, test = (part.tensors for part in demo_datasets()[:2])
    x, y, queries = train[0].flatten(1)[:1000], train[1][:1000], (test[0].flatten(1)[:100], test[1][:100])
    recipe = Recipe(
        lambda: mlp(784, 128, 64, 10), partial(torch.optim.Adam, lr=1e-3), epochs=15, batch_size=50,
        loss=nn.CrossEntropyLoss(),
    )  # fmt: skip
    truth = retrain(recipe, Subsets.halves(1000, count=40), seeds=2, train=(x, y), queries=queries)
    torch.manual_seed(100)
    model = mlp(784, 128, 64, 10)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    with ptif.Recorder(model, optimizer, folder / "run", steps=300, overwrite=True):
        for _ in range(15):
            for some in torch.randperm(1000).split(50):
                optimizer.zero_grad()
                nn.functional.cross_entropy(model(x[some]), y[some]).backward()
                optimizer.step()
    problem = ptif.Problem(model, ptif.CrossEntropy(), (x, y))
    less, trackstar = (partial(make, folder / "run") for make in (ptif.methods.less, ptif.methods.trackstar))
    exact = less().fit(problem).score(queries).values
    rows: dict[str, list[Any]] = {"EK-FAC": [ptif.ekfac()], "LESS, the exact cosine": [less()]}
    rows["LESS, Sketch(1024)"] = [less(projection=Sketch(K, seed=seed)) for seed in range(3)]
    rows["LESS, Sketch(8192)"] = [less(projection=Sketch(8 * K))]
    for label, make in (("Sketch", Sketch), ("Gaussian", Gaussian)):
        rows[f"TrackStar, {label}(1024)"] = [
            trackstar(projection=make(K, per_layer=True, seed=seed)) for seed in range(3)
        ]
    rows["TrackStar, its default"] = [trackstar(seed=seed) for seed in range(3)]
    print("\n| method | LDS by seed | rank agreement with the exact cosine | CPU seconds |\n|---|---|---|---|")
    for label, methods in rows.items():
        runs = [seconds(method, problem, queries) for method in methods]
        agreement = ", ".join(f"{evaluate_one(scores, truth).value:.3f}" for _, scores in runs)
        ranks = [rank_agreement(exact, scores.values) for _, scores in runs] if label.startswith("LESS") else []
        print(
            f"| {label} | {agreement} | {', '.join(f'{rank:.2f}' for rank in ranks)} | "
            f"{min(cpu for cpu, _ in runs):.2f} |",
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a tenth of the examples: does it still run?")
    parser.add_argument("--truth", type=Path, help="truth of the league's first setting")
    parser.add_argument("--models", type=Path, help="the folder of its trained.npz")
    parser.add_argument("--adam", action="store_true", help="TrackStar and LESS instead")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    os.environ["PTIF_PROGRESS"] = "0"
    print(f"load when started {os.getloadavg()[0]:.1f}\n")
    if asked.adam:
        with tempfile.TemporaryDirectory() as folder:
            after_adam(Path(folder))
        return
    print("| network | method | CPU seconds | of EK-FAC |\n|---|---|---|---|")
    for name in NETWORKS:
        price(name, asked.quick)
    if asked.truth:
        print("\n| method | LDS by seed | CPU seconds |\n|---|---|---|")
        quality(Truth.load(asked.truth), asked.models or asked.truth.parent)


if __name__ == "__main__":
    main()
