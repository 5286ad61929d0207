"""kronfluence 1.0.1. Damping is absolute, added to eigenvalues averaged over examples: ours."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from kronfluence.analyzer import Analyzer, prepare_model
from kronfluence.arguments import FactorArguments, ScoreArguments
from kronfluence.task import Task
from nets import load_fashion
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from peers.workloads import losses, read


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


METHODS: dict[str, tuple[str, bool]] = {
    "kfac": ("kfac", True),
    "ekfac": ("ekfac", True),
    "ekfac, own damping": ("ekfac", False),
}


def make(options: dict[str, Any]) -> Callable[[], Any]:
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
