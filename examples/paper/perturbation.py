"""How a score changes when a training input changes: the paper's I_pert,loss.

With s = (C + lambda)^-1 grad m(q) from the library, a score is <s, grad loss(x)> / N, and its slope in x is what
autograd gives. Moving a training input by d changes the query's loss by about minus this slope times d: the removal of
the example becomes worth less or more.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.func import functional_call

import pytorch_influence_functions as ptif
from pytorch_influence_functions.core.distributed import World
from pytorch_influence_functions.problem.data import Source


def solved(attribution: ptif.Attribution, queries: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
    """s for the summed loss of the queries, in the shapes of the parameters."""
    member = attribution.members[0]
    source = Source.of(queries, len(queries[1]))
    total: dict[str, Tensor] = {}
    for slab in member.derivatives.stream(source, member.derivatives.objective, world=World()):
        rows = member.solve(slab.rows).unwrap()
        for name, values in member.derivatives.space.to_parameters(rows).items():
            total[name] = total.get(name, 0) + values.sum(0)
    return total


def slope_in_inputs(
    attribution: ptif.Attribution, queries: tuple[Tensor, Tensor], inputs: Tensor, labels: Tensor
) -> Tensor:
    """d score / d input for every given training example (N counts them all), in the shape of `inputs` [k, ...]."""
    problem, along = attribution.problem, solved(attribution, queries)
    x = inputs.detach().clone().requires_grad_()
    kept = {k: p.detach().clone() for k, p in problem.model.named_parameters()}
    moving = {k: kept[k].requires_grad_() for k in along}
    logits = functional_call(problem.model, kept, (x,))
    losses = problem.objective.losses(logits, (x, labels)).sum()
    slopes = torch.autograd.grad(losses, list(moving.values()), create_graph=True)
    score = sum(((g * along[k]).sum() for k, g in zip(moving, slopes, strict=True)), torch.zeros(()))
    return torch.autograd.grad(score / len(problem), x)[0]
