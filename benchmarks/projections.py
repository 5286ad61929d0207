"""What a projection costs beside EK-FAC, and what it keeps: `python benchmarks/projections.py [--truth FILE]`.

TRAK with each projection on a perceptron and a convolutional network: CPU seconds of fitting and scoring
100 queries on one thread. With `--truth`, a `Truth` of the league's first setting and the folder of its models, the
linear datamodelling score over three seeds of the projection.
"""

from __future__ import annotations

import argparse
import os
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from costs import CASES
from nets import mlp

import pytorch_influence_functions as ptif
from pytorch_influence_functions.evaluation import Truth, evaluate_one
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a tenth of the examples: does it still run?")
    parser.add_argument("--truth", type=Path, help="truth of the league's first setting")
    parser.add_argument("--models", type=Path, help="the folder of its trained.npz")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    os.environ["PTIF_PROGRESS"] = "0"
    print(f"load when started {os.getloadavg()[0]:.1f}\n")
    print("| network | method | CPU seconds | of EK-FAC |\n|---|---|---|---|")
    for name in NETWORKS:
        price(name, asked.quick)
    if asked.truth:
        print("\n| method | LDS by seed | CPU seconds |\n|---|---|---|")
        quality(Truth.load(asked.truth), asked.models or asked.truth.parent)


if __name__ == "__main__":
    main()
