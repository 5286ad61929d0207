"""How a query's measure moves with the inputs of training examples: the paper's I_pert,loss, for every number."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..core.distributed import World
from ..core.errors import InvalidInput
from ..core.functional import call_with
from ..curvature.base import Budget
from ..gradients.per_example import Derivatives
from ..influence.attribution import Attribution
from ..influence.question import Question
from ..influence.scoring import ScoringPass
from ..linalg.rows import Rows
from ..objectives.base import inputs_and_targets
from ..problem.checkpoints import at_checkpoint
from ..problem.model_state import double_backward_safe, plain_autograd
from ..problem.problem import Problem, sweep
from .edits import read_indices
from .fitted_system import fit_system


@plain_autograd()
def input_influence(
    problem: Problem | Attribution, queries: Any, ids: Any = None, measure: Any = None, method: Any = None
) -> Tensor:
    """The slope of each query's measure in the inputs of training examples, [Q, n, *input shape].

    Moving the inputs of training example i by a small d and training again changes the measure of query q by about
    <result[q, i], d>:

        result[q, i] = -(1/N) d/dx <grad loss(x_i), (C + D)^-1 grad measure(q)>.

    As a heat map over a picture it shows what in a training example matters to the query; for the columns of a table,
    which of them. One double backward pass over the chosen examples for every query.

    Args:
        problem: model, loss and training data; or what a method's `fit(problem)` gave.
        queries: a Dataset, DataLoader, tensors or arrays `(x, y)`.
        ids: places in the training dataset, or a bool mask over it; `None`: all of them.
        measure: what is measured on a query, an objective or loss; `None`: the training objective.
        method: an `Influence` by name or made; `None`: chosen by size.

    Returns:
        The slopes, on the CPU, in the inputs' precision; a mean over checkpoints.

    Raises:
        InvalidInput: an index is out of range or doubled, or the inputs have no slope: they are no real numbers, or
            the model takes no gradient from them.

    Reference: Koh & Liang (2017), "Understanding Black-box Predictions via Influence Functions", §2.2.

    Example:
        >>> x, y = torch.randn(40, 3), torch.arange(40) % 2
        >>> problem = Problem(torch.nn.Linear(3, 2), torch.nn.CrossEntropyLoss(), (x, y))
        >>> input_influence(problem, (x[:2], y[:2]), ids=[5, 6, 7]).shape
        torch.Size([2, 3, 3])
    """
    fitted = fit_system(problem, method, "input_influence")
    data = fitted.problem.data
    chosen = None if ids is None else read_indices(data, ids, "ids")
    if chosen == []:
        raise InvalidInput("ids= names no training example; give at least one, or None for all.")
    question = Question.of(fitted.problem, fitted.members[0].derivatives.objective, queries, measure)
    total: Tensor | None = None
    for member in fitted.members:
        with at_checkpoint(fitted.problem.model, member.checkpoint):
            scoring = ScoringPass(fitted.problem, question)
            parts = []
            for _, rows in scoring.query_groups(member.derivatives, member.room(Budget.of(fitted.spec.memory))):
                solved = member.solve(rows).unwrap().rows()
                parts.append(_slopes(member.derivatives, solved, chosen))
            slopes = torch.cat(parts) / -len(fitted.problem) / len(fitted.members)
            total = slopes if total is None else total + slopes
    assert total is not None, "an attribution has at least one member"
    return total


def _slopes(derivatives: Derivatives, solved: Rows, ids: Any) -> Tensor:
    """d/dx <grad loss(x_i), solved_q>, [q, n, ...]."""
    problem, directions = derivatives.problem, derivatives.whole.to_parameters(solved)
    kept: list[Tensor] = []
    for batch_ids, batch in sweep(problem, ids=ids, label="slopes in the inputs", world=World()):
        changed, inputs = _with_gradient(batch)
        named = problem.model.named_parameters()
        parameters = {k: p.detach().clone().requires_grad_() for k, p in named if k in directions}
        with torch.enable_grad(), double_backward_safe(problem.model):

            def forward(*args: Any, parameters: Any = parameters, **kwargs: Any) -> Any:
                return call_with(problem.model, parameters, args, kwargs)

            outputs = derivatives.objective.outputs(forward, changed)
            derivatives.objective.check(outputs.detach(), changed, batch_ids)
            losses = derivatives.objective.losses(outputs, changed).sum()
            gradients = torch.autograd.grad(
                losses, list(parameters.values()), create_graph=True, materialize_grads=True
            )
            rows = []
            for q in range(len(solved)):
                along = torch.stack(
                    [(g * directions[k][q].to(g)).sum() for k, g in zip(parameters, gradients, strict=True)]
                )
                rows.append(_slope_of(along.sum(), inputs, q + 1 < len(solved)).detach().cpu())
        kept.append(torch.stack(rows))
    return torch.cat(kept, 1)


def _slope_of(value: Tensor, inputs: Tensor, keep: bool) -> Tensor:
    slope = torch.autograd.grad(value, inputs, retain_graph=keep, allow_unused=True)[0] if value.requires_grad else None
    if slope is None:
        raise InvalidInput(
            "The model takes no gradient from its inputs, so its loss has no slope in them; look for .detach(), "
            "no_grad() or numpy between the inputs and the trained layers."
        )
    return slope


def _with_gradient(batch: Any) -> tuple[Any, Tensor]:
    """The batch with its first input of real numbers as a leaf that takes a gradient, and that leaf."""
    args, kwargs, targets = inputs_and_targets(batch)
    named: dict[Any, Any] = {**dict(enumerate(args)), **kwargs}
    name = next((k for k, v in named.items() if isinstance(v, Tensor) and v.is_floating_point()), None)
    if name is None:
        kinds = ", ".join(f"{k!r}: {getattr(v, 'dtype', type(v).__name__)}" for k, v in named.items())
        raise InvalidInput(
            f"The inputs ({kinds}) are no real numbers, so they have no slope; ask for tokens with "
            "attribution.token_scores(), or give the embeddings as inputs."
        )
    leaf = named[name].detach().clone().requires_grad_()
    if not args:
        return {**batch, name: leaf}, leaf
    if kwargs:
        return ({**kwargs, name: leaf} if name in kwargs else kwargs, *args, targets), leaf
    return (*(leaf if k == name else v for k, v in enumerate(args)), targets), leaf
