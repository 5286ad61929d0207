"""Whether training has one minimum: outputs affine in the parameters, under a loss that is convex in the outputs."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from ..core.cut_up import part_like, whole
from ..core.errors import InfluenceError
from ..core.indexing import spread_sample
from ..gradients.per_example import Derivatives
from ..problem.checkpoints import at_checkpoint, named_tensors
from ..problem.problem import Problem, first_batch
from ..problem.working_precision import in_working_precision
from .own_losses import find_obstacle

# Examples whose outputs are looked at.
_EXAMPLES = 16


def is_convex(problem: Problem) -> bool:
    """Whether the training objective is convex in the parameters that take part, whatever their values.

    Outputs are seen to be affine by value: at weights w + d and w - d, with d random and as large as w, those of some
    examples average to what they are at w. Of a network trained as a whole they are not; of its last layer alone they
    are. Costs three forward passes of a few examples and a copy of the weights, and once those are affine a look at the
    loss (`find_obstacle`).

    Args:
        problem: model, loss and training data.

    Example:
        >>> data = torch.randn(9, 3), torch.arange(9) % 2
        >>> two = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Tanh(), torch.nn.Linear(4, 2))
        >>> is_convex(Problem(two, torch.nn.CrossEntropyLoss(), data))
        False
        >>> is_convex(Problem(two, torch.nn.CrossEntropyLoss(), data, parameters="2"))
        True
    """
    problem = in_working_precision(problem)
    return is_affine(problem) and find_obstacle(Derivatives.of(problem)) is None


def is_affine(problem: Problem) -> bool:
    """Whether the outputs at w + d and w - d average to those at w.

    Args:
        problem: model, loss and training data, in the precision that is computed in.
    """
    model = problem.model
    parameters = dict(model.named_parameters(remove_duplicate=False))
    steps = {
        id(parameters[name]): part_like(_random_step(whole(parameters[name]).detach(), k), parameters[name])
        for k, name in enumerate(problem.space.names)
    }
    with first_batch(problem, ids=spread_sample(len(problem), _EXAMPLES)) as (_, batch), torch.no_grad():

        def outputs(sign: float) -> Tensor:
            moved = {
                name: t.detach() + sign * steps[id(t)] if id(t) in steps else t.detach() for name, t in tensors.items()
            }
            with at_checkpoint(model, moved):
                return problem.objective.outputs(model, batch).double()

        here = problem.objective.outputs(model, batch)
        tensors = named_tensors(model, persistent_only=True)  # with the buffers that a first pass makes
        try:
            there, back = outputs(1.0), outputs(-1.0)
        except InfluenceError:  # a model that does not run at other weights is not affine in them
            return False
        bend = (there + back - 2 * here.double()).abs().max()
        rounding = torch.finfo(here.dtype).eps ** 0.5 * torch.maximum(there.abs().max(), back.abs().max())
    return bool(bend <= rounding)  # not where anything is NaN


def _random_step(weights: Float[Tensor, "*shape"], seed: int) -> Float[Tensor, "*shape"]:
    """As large as the weights, or of size 1 where they are 0."""
    size = weights.double().square().mean().sqrt()
    noise = torch.randn(weights.shape, generator=torch.Generator().manual_seed(seed)).to(weights)
    return noise * torch.where(size > 0, size, 1.0).to(weights)
