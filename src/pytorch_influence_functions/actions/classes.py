"""Whether a problem is one of classes: what is asked before its model's outputs are called a prediction."""

from __future__ import annotations

import torch

from ..core.errors import InvalidInput
from ..objectives.class_scores import check_class_scores
from ..problem.problem import Problem, first_batch


def require_class_scores(problem: Problem, asking: str, instead: str) -> None:
    """Refuse a model whose outputs are no score for each class, on the first batch of its training data.

    Args:
        problem: model, loss and training data.
        asking: the function that needs them.
        instead: what to do otherwise.

    Raises:
        InvalidInput: they are none under the problem's loss.
    """
    with first_batch(problem) as (ids, batch):
        with torch.no_grad():
            outputs = problem.objective.outputs(problem.model, batch)
            problem.objective.check(outputs, batch, ids)
        try:
            check_class_scores(problem.objective, outputs, batch)
        except InvalidInput as misfit:
            raise InvalidInput(f"{asking}() needs a score for each class, and {misfit}; {instead}.") from None
