"""Methods that explain without a curvature: representer points of the last layer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor, nn

from .attribution import Attribution, Influence
from .checks import check_problem
from .curvature import Identity
from .damping import Absolute
from .errors import InvalidInput
from .fitting import AbstractMethod
from .guard import undisturbed
from .problem import Problem, WeightDecay, sweep
from .solvers import Spectral
from .space import ROOT, Space
from .world import World


@final
@dataclass(frozen=True)
class RepresenterPoints(AbstractMethod):
    r"""Representer points: the last layer's outputs as a weighted sum over training examples.

    Where the training objective (1/N) sum loss_i + s/2 |W|^2 is stationary in the last layer W, reading features f,
    that layer is W = sum_i alpha_i f_i^T with alpha_i = -(1 / (s N)) d loss_i / d output_i, so a query's output is
    sum_i alpha_i <f_i, f_q>. The score is what a measure of the output loses with example i's term:

        score[q, i] = (1 / (s N)) <d m / d output_q, d loss_i / d output_i> <f_i, f_q>

    which is a gradient dot product in the last layer over s N. Needs weight decay on that layer, and a model trained to
    convergence there: the sum over i of the scores on `Logit()` is minus the logit only as far as it is stationary.
    Cost: one epoch. A baseline: curvature and all other layers are left out.

    Raises (when fitted) `InvalidInput` where the outputs are not a linear layer's, or that layer has no weight decay.

    Reference: Yeh et al. (2018), "Representer Point Selection"; their penalty is lambda |W|^2, so s = 2 lambda.

    >>> RepresenterPoints()
    RepresenterPoints()
    """

    def fit(self, problem: Problem, queries: int = 1) -> Attribution:
        check_problem(problem)
        layer = last_linear(problem)
        space = Space.of(problem.model, layer, problem.weight_decay.strength)
        decayed = {name: block for name, block in space.blocks.items() if block.decay > 0}
        strengths = {block.decay for block in decayed.values()}
        if len(strengths) != 1:
            raise InvalidInput(
                f"Representer points weigh examples by 1 / weight decay of the last layer {layer!r}, and its strength "
                f"is {'not one number' if strengths else '0'}; give the strength it was trained with as weight_decay=."
            )
        if problem.weight_decay.per_example:
            raise InvalidInput(
                "Representer points take the weight decay as one fixed term; use "
                "WeightDecay(strength, per_example=False)."
            )
        names = [p for block in decayed.values() for p in block.parameters]
        members = max(1, len(problem.checkpoints))
        weights = (1.0 / (strengths.pop() * members),) * members
        part = problem.with_(parameters=names, weight_decay=WeightDecay())
        return Influence(Identity(), Spectral(), Absolute(0.0), weights=weights).fit(part, queries)


def last_linear(problem: Problem) -> str:
    """The name of the linear layer whose output is the model's.

    Raises:
        InvalidInput: there is none.
    """
    seen: list[tuple[str, Tensor]] = []
    handles = [
        module.register_forward_hook(lambda m, args, out, name=name: seen.append((name, out)))
        for name, module in problem.model.named_modules()
        if isinstance(module, nn.Linear)
    ]
    try:
        _, batch = next(iter(sweep(problem, ids=torch.arange(min(2, len(problem))), world=World())))
        with undisturbed(problem.model), torch.no_grad():
            outputs: Any = problem.objective.outputs(problem.model, batch)
    finally:
        for handle in handles:
            handle.remove()
    for name, out in reversed(seen):
        if out.shape == outputs.shape and torch.equal(out, outputs):
            return name or ROOT
    raise InvalidInput(
        f"The outputs of {type(problem.model).__name__} are not those of a torch.nn.Linear, so it has no last layer to "
        "find representer points in; use another method, such as ptif.ekfac()."
    )
