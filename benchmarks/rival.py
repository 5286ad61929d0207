"""kronfluence's side of workload b; runs in the environment that `peers.py` makes, without this package."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from typing import Any

import numpy as np
import torch.nn.functional as F
from kronfluence.analyzer import Analyzer, prepare_model
from kronfluence.arguments import FactorArguments, ScoreArguments
from kronfluence.task import Task
from nets import load_fashion
from torch import Tensor, nn
from torch.utils.data import TensorDataset


class Classification(Task):
    def compute_train_loss(self, batch: Any, model: nn.Module, sample: bool = False) -> Tensor:
        x, y = batch
        logits = model(x)
        if sample:  # the true Fisher: labels drawn from the model
            y = logits.detach().softmax(-1).multinomial(1).flatten()
        return F.cross_entropy(logits, y, reduction="sum")

    def compute_measurement(self, batch: Any, model: nn.Module) -> Tensor:
        return F.cross_entropy(model(batch[0]), batch[1], reduction="sum")


def fashion_ekfac(options: dict[str, Any]) -> Callable[[], Any]:
    """Read the data, fit all factors, score all queries: EK-FAC with the library's own damping heuristic."""

    def run() -> np.ndarray:
        model, a = load_fashion(options["folder"])
        train = TensorDataset(a["train_x"], a["train_y"])
        queries = TensorDataset(a["query_x"], a["query_y"])
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
            size = options["batch_size"]
            factors = FactorArguments(strategy="ekfac")
            analyzer.fit_all_factors("f", train, per_device_batch_size=size, factor_args=factors)
            analyzer.compute_pairwise_scores(
                scores_name="s",
                factors_name="f",
                query_dataset=queries,
                train_dataset=train,
                per_device_query_batch_size=len(queries),
                per_device_train_batch_size=size,
                score_args=ScoreArguments(damping_factor=None),
            )
            return analyzer.load_pairwise_scores("s")["all_modules"].numpy()

    return run
