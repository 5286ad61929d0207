"""kronfluence 1.0.1. Damping is absolute, added to eigenvalues averaged over examples: ours."""

from __future__ import annotations

import copy
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from kronfluence.analyzer import Analyzer, prepare_model
from kronfluence.arguments import FactorArguments, ScoreArguments
from kronfluence.task import Task
from nets import load_fashion
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from peers.workloads import losses, read, workload


class Classification(Task):
    """Sums over the batch, as the library asks; for sequences over tokens too, each of which is a class."""

    def compute_train_loss(self, batch: Any, model: nn.Module, sample: bool = False) -> Tensor:
        x, y = batch
        logits = model(x)
        if sample:  # the true Fisher: labels drawn from the model
            y = logits.detach().flatten(0, -2).softmax(-1).multinomial(1).view(y.shape)
        return losses(logits, y).sum()

    def compute_measurement(self, batch: Any, model: nn.Module) -> Tensor:
        return losses(model(batch[0]), batch[1]).sum()


def _scores(
    model: nn.Module,
    train: TensorDataset,
    queries: TensorDataset,
    strategy: str,
    damping: float | None,
    size: int,
) -> tuple[np.ndarray, dict[str, float]]:
    """`damping=None` is the library's own rule: a tenth of each layer's mean eigenvalue."""
    task = Classification()
    with tempfile.TemporaryDirectory() as folder:
        analyzer = Analyzer(
            "bench",
            prepare_model(model, task),
            task,
            cpu=True,
            output_dir=folder,
            disable_tqdm=True,
            disable_model_save=True,
        )
        start = time.perf_counter()
        factors = FactorArguments(strategy=strategy)
        analyzer.fit_all_factors("f", train, per_device_batch_size=size, factor_args=factors)
        half = time.perf_counter()
        analyzer.compute_pairwise_scores(
            scores_name="s",
            factors_name="f",
            query_dataset=queries,
            train_dataset=train,
            per_device_query_batch_size=len(queries),
            per_device_train_batch_size=size,
            score_args=ScoreArguments(damping_factor=damping),
        )
        found = analyzer.load_pairwise_scores("s")["all_modules"].numpy()
        return found, {"fit": half - start, "score": time.perf_counter() - half}


ALONG = "ekfac, own damping, along the run"


def _along(case: Any, folder: Path) -> tuple[np.ndarray, dict[str, float]]:
    """The library asked at every checkpoint of the run, and averaged as we average ourselves."""
    found, seconds = [], {"fit": 0.0, "score": 0.0}
    with np.load(folder / "run.npz") as run:
        count = 1 + max(int(name.split(".")[0]) for name in run.files)
        for k in range(count):
            names = [name for name in run.files if name.startswith(f"{k}.")]
            # The library wraps a model's layers, so every checkpoint has a model of its own.
            model = copy.deepcopy(case.model)
            model.load_state_dict({name.split(".", 1)[1]: torch.from_numpy(run[name]) for name in names})
            train, queries = TensorDataset(case.x, case.y), TensorDataset(case.qx, case.qy)
            scores, spent = _scores(model, train, queries, "ekfac", None, case.slab)
            found.append(scores.astype(np.float64))
            seconds = {part: seconds[part] + spent[part] for part in seconds}
    spreads = np.stack([scores.std(1, keepdims=True) for scores in found])
    mean = np.mean([scores / spread for scores, spread in zip(found, spreads, strict=True)], 0)
    return np.exp(np.log(spreads).mean(0)) * mean, seconds


METHODS: dict[str, tuple[str, bool]] = {
    "kfac": ("kfac", True),
    "ekfac": ("ekfac", True),
    "ekfac, own damping": ("ekfac", False),
}


def make(options: dict[str, Any]) -> Callable[[], Any]:
    if options["method"] == ALONG:
        return lambda: _along(read(options), workload(options["workload"], options["quick"]).folder)
    strategy, equal = METHODS[options["method"]]

    def run() -> tuple[np.ndarray, dict[str, float]]:
        case = read(options)
        train, queries = TensorDataset(case.x, case.y), TensorDataset(case.qx, case.qy)
        return _scores(case.model, train, queries, strategy, case.damping if equal else None, case.slab)

    return run


def fashion_ekfac(options: dict[str, Any]) -> Callable[[], Any]:
    """Workload b of `benchmarks/run.py`: read the data, fit all factors, score all queries."""

    def run() -> np.ndarray:
        model, a = load_fashion(str(Path(options["folder"])))
        train, queries = TensorDataset(a["train_x"], a["train_y"]), TensorDataset(a["query_x"], a["query_y"])
        return _scores(model, train, queries, "ekfac", None, options["batch_size"])[0]

    return run
