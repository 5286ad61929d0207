"""Ground truth read from dattri's layout, and scores handed to quanda's and captum's metrics."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from ..core.errors import InvalidInput, name_ids, require
from ..influence.method import AbstractMethod
from ..objectives.base import with_targets
from ..problem.data import Source
from ..problem.problem import Problem
from ..scores.scores import Scores
from .subsets import Protocol, Subsets
from .truth import Truth


def from_dattri(
    ground_truth: Any, n: int, lower_is_better: bool = True, removed: bool = False, baseline: Any = None
) -> Truth:
    """Read a truth in dattri's layout `(values, indices)`, as its `calculate_lds_ground_truth` gives it.

    Args:
        ground_truth: values float [M, Q], the measurement of every query after each of M trainings; indices int
            [M, k], the training examples that each *kept* (`removed=True`: left out, its leave-one-out layout).
        n: training examples in all.
        lower_is_better: of the measure.
        removed: what the indices say.
        baseline: [Q], the measurement after training on everything; needed for slopes, not for correlations.

    Returns:
        `Truth` with one seed. dattri has averaged over seeds, so there is no noise ceiling.

    Raises:
        InvalidInput: shapes that do not fit, or indices outside the training data.

    >>> truth = from_dattri((torch.randn(5, 2), torch.stack([torch.randperm(8)[:4] for _ in range(5)])), n=8)
    >>> truth.measured.shape, truth.protocol.value
    (torch.Size([5, 1, 2]), 'half-subset LDS')
    """
    values, indices = (torch.as_tensor(part) for part in ground_truth)
    indices = indices.reshape(len(indices), -1).long()
    if values.ndim != 2 or len(values) != len(indices):
        raise InvalidInput(
            f"Values of shape {tuple(values.shape)} and indices of shape {tuple(indices.shape)} do not fit; expected "
            "(trainings, queries) and (trainings, examples)."
        )
    outside = indices[(indices < 0) | (indices >= n)].flatten().tolist()
    if outside:
        raise InvalidInput(f"Index {name_ids(outside)} is outside the {n} training examples; give the right n.")
    kept = torch.zeros(len(indices), n, dtype=torch.bool).scatter(1, indices, True)
    kept = ~kept if removed else kept
    out = int((~kept[0]).sum())
    protocol = Protocol.LEAVE_ONE_OUT if out == 1 else Protocol.HALVES if 0.2 * n <= out <= 0.8 * n else Protocol.OWN
    detail = f"{len(kept)} subsets of {100 * (n - out) / n:.3g} % of {n} examples, read from dattri's layout"
    base = torch.zeros(1, values.shape[1]) if baseline is None else torch.as_tensor(baseline).reshape(1, -1)
    return Truth(
        Subsets(kept, protocol, detail), values[:, None].float(), base.float(), (0,), lower_is_better,
        recipe="read from dattri's layout",
    )  # fmt: skip


def explanations(scores: Scores) -> Float[Tensor, "q n"]:
    """Scores as quanda and captum take them: [Q, N], positive for proponents under every measure.

    Args:
        scores: scores of every example.

    Raises:
        InvalidInput: only some examples are held (`top=`).

    >>> explanations(Scores(torch.tensor([[1.0, -2.0]]), lower_is_better=False))
    tensor([[-1.,  2.]])
    """
    if scores.indices is not None:
        raise InvalidInput(
            "Only some training examples are held (top=, or a loader's sampler), and metrics need all; score without "
            "top=, and give a part of a dataset as torch.utils.data.Subset(dataset, indices)."
        )
    return scores.values if scores.lower_is_better else -scores.values


def quanda_explainer(method: AbstractMethod, loss: Any, **options: Any) -> Any:
    """A quanda `Explainer` class that explains with one of our methods: for `explainer_cls=` of its metrics.

    It is fitted once per model, and its queries come with targets of their own. Instead of self-influences it returns
    their ranks from the bottom, spaced apart: quanda 0.5 only ranks them, and breaks ties by adding 1e-4 per position,
    which would change the order of small numbers.

    Args:
        method: such as `ptif.ekfac()`.
        loss: the training loss.
        options: of `Problem`, such as weight_decay.

    Raises:
        MissingExtra: quanda is not installed.
    """
    base = require("quanda.explainers", "quanda").Explainer

    class PtifExplainer(base):  # type: ignore[misc,valid-type]
        """Explains through pytorch_influence_functions."""

        accepted_tasks = ("image_classification", "text_classification")

        def __init__(
            self,
            model: Any,
            train_dataset: Any,
            task: str = "image_classification",
            checkpoints: Any = None,
            checkpoints_load_func: Any = None,
            **kwargs: Any,
        ) -> None:
            super().__init__(model, train_dataset, task, checkpoints, checkpoints_load_func)
            self.load_last_checkpoint()
            problem = Problem(self.model.eval(), loss, train_dataset, **options)
            self.fitted = method.fit(problem)

        def explain(self, test_data: Any, targets: Any) -> Tensor:
            """Scores [Q, N] of test inputs with these targets, positive for proponents."""
            labels = torch.as_tensor(targets)
            batch = with_targets(test_data, labels) if isinstance(test_data, Mapping) else (test_data, labels)
            return explanations(self.fitted.score(Source.of(batch)))

        def self_influence(self, batch_size: int = 1) -> Tensor:
            """Every training example's rank by self-influence, 0 for the lowest; ties share a rank."""
            ranks: Tensor = torch.unique(self.fitted.self_influence(), return_inverse=True)[1].double()
            return ranks * (1 + 1e-4 * len(ranks))

    return PtifExplainer
