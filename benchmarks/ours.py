"""This package's side of every workload."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from nets import FASHION, SEED, cifar, floor_case, load_fashion, mlp, spearman

from pytorch_influence_functions.curvature.exact import GGN, EmpiricalFisher, Identity
from pytorch_influence_functions.demo.data import load as demo_data
from pytorch_influence_functions.influence.attribution import Influence
from pytorch_influence_functions.objectives import CrossEntropy, TokenCrossEntropy
from pytorch_influence_functions.problem.problem import Problem
from pytorch_influence_functions.solvers.cg import CG
from pytorch_influence_functions.solvers.direct import Spectral
from pytorch_influence_functions.solvers.dual import Woodbury

Run = Callable[[], Any]

GRAD_DOT = Influence(Identity(), Spectral(), 0.0)
DUAL_DAMPING = 1e-4
EXACT_DAMPING = 1e-3


def cifar_score(options: dict[str, Any]) -> Run:
    """`Attribution.score` for one query: its gradient, all checks, and the pass over the training images."""
    model, x, y, qx, qy = cifar(options["n"])
    attribution = GRAD_DOT.fit(Problem(model, CrossEntropy(), (x, y), batch_size=options["batch_size"]))
    return lambda: np.asarray(attribution.score((qx, qy)).values)


def floor_score(options: dict[str, Any]) -> Run:
    """`Attribution.score` for one query with a model of one kind."""
    case = options["case"]
    model, x, y, size = floor_case(case, options["quick"])
    objective = TokenCrossEntropy() if case == "transformer" else CrossEntropy()
    attribution = GRAD_DOT.fit(Problem(model, objective, (x[:-1], y[:-1]), batch_size=size))
    query = (x[-1:], y[-1:])
    return lambda: np.asarray(attribution.score(query).values)


def fashion_dual(options: dict[str, Any]) -> Run:
    """Read the data, fit the dual over all parameters, score all queries."""

    def run() -> np.ndarray:
        model, a = load_fashion(options["folder"])
        problem = Problem(model, CrossEntropy(), (a["train_x"], a["train_y"]), batch_size=options["batch_size"])
        attribution = Influence(EmpiricalFisher(), Woodbury(), DUAL_DAMPING).fit(problem)
        return np.asarray(attribution.score((a["query_x"], a["query_y"])).values)

    return run


def fashion_prepare(options: dict[str, Any]) -> Run:
    """Train the MLP on the bundled images with their true labels, to zero training error; write all to one file."""

    def run() -> dict[str, float]:
        data = demo_data()
        x, qx = (torch.from_numpy(v).float().flatten(1) / 255 for v in (data.train_images, data.test_images))
        y, qy = torch.from_numpy(data.true_labels), torch.from_numpy(data.test_labels)
        x, y = x[: options["n"]], y[: options["n"]]
        # The test images are ordered by nothing in particular; every step-th one keeps all classes in.
        picked = torch.linspace(0, len(qx) - 1, options["queries"]).long()
        torch.manual_seed(SEED)
        model = mlp(*FASHION)
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
        for _ in range(options["epochs"]):
            for batch in torch.randperm(len(x)).split(100):
                optimizer.zero_grad()
                F.cross_entropy(model(x[batch]), y[batch]).backward()
                optimizer.step()
        with torch.no_grad():
            train, test = ((model(v).argmax(1) == t).float().mean() for v, t in ((x, y), (qx, qy)))
        arrays = {f"w.{k}": v.numpy() for k, v in model.state_dict().items()}
        arrays |= {"train_x": x.numpy(), "train_y": y.numpy()}
        arrays |= {"query_x": qx[picked].numpy(), "query_y": qy[picked].numpy()}
        np.savez(Path(options["folder"]) / "fashion.npz", **arrays)
        return {"train_accuracy": float(train), "test_accuracy": float(test)}

    return run


def fashion_exact(options: dict[str, Any]) -> Run:
    """Conjugate gradients on the exact Gauss-Newton matrix in float64, and how the others' ranks agree with it."""

    def run() -> dict[str, Any]:
        folder = Path(options["folder"])
        model, a = load_fashion(options["folder"])
        model = model.double()
        data = (a["train_x"].double(), a["train_y"])
        problem = Problem(model, CrossEntropy(), data, batch_size=500)
        some = slice(0, options["exact_queries"])
        method = Influence(GGN(), CG(rtol=1e-3, max_steps=1000), EXACT_DAMPING)
        scores = method.fit(problem).score((a["query_x"][some].double(), a["query_y"][some]))
        exact = np.asarray(scores.values)
        found = {p.stem: spearman(exact, np.load(p)[some]) for p in sorted(folder.glob("*.npy"))}
        return {"queries": len(exact), "damping": EXACT_DAMPING, "spearman": found}

    return run
