"""The proximal Bregman response: what an influence function predicts, measured by moving the weights."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..core.batches import map_tensors
from ..core.errors import SolveFailed
from ..core.progress import track
from ..core.validate import finite_number
from ..gradients.vjp import as_function, detach_parameters
from ..influence.question import resolve_measure
from ..objectives.base import AbstractObjective
from ..problem.model_state import plain_autograd
from ..problem.problem import Problem
from .subsets import Subsets
from .training import Examples
from .truth import Truth


@plain_autograd()
def pbrf(
    problem: Problem,
    ids: Sequence[int] | Tensor,
    queries: Any,
    damping: float,
    measure: Any = None,
    step: float = 1.0,
    max_steps: int = 500,
    rtol: float = 1e-3,
) -> Truth:
    r"""Fine-tune the trained weights theta_0 without one example, held near them in outputs and in weights.

    For each i the minimum of

        (1/N) sum_j D(f(x_j), f_0(x_j)) + sum (d + damping) / 2 |theta - theta_0|^2 - (step / N) loss_i(theta)

    with the Bregman divergence D(h, h_0) = loss(h) - loss(h_0) - <loss'(h_0), h - h_0> and the weight decay d. Its
    linearisation is the influence function with the Gauss-Newton matrix and this damping, so agreement is a test of the
    computation, also where retraining is dominated by noise and the weights are no minimum. In float64, on the whole
    data at once: for models of up to some 100,000 parameters.

    Args:
        problem: the trained model and its data.
        ids: the examples removed, one at a time.
        queries: what is measured, in the forms `ptif.attribute` takes.
        damping: lambda, as `scores.diagnostics.damping` has it.
        measure: `None`: the training loss.
        step: how much of the removal; changes are divided by it. Small steps stay where the linearisation holds.
        max_steps: of L-BFGS.
        rtol: the gradient must fall to this share of what it starts from.

    Returns:
        `Truth` of leave-one-out with one seed; `changes()` are the responses.

    Raises:
        SolveFailed: the minimum was not reached.

    Reference: Bae et al. (2022), "If Influence Functions are the Answer, Then What is the Question?".
    """
    finite_number("damping", damping, above=0, hint="take scores.diagnostics.damping")
    finite_number("step", step, above=0, most=1)
    query_source = problem.data.read_alike(queries)
    training_loss = resolve_measure(problem, problem.objective, problem.objective, problem.data)
    measured = resolve_measure(problem, training_loss, measure, query_source)
    subsets = Subsets.leave_one_out(len(problem), ids)
    response = _Response(problem, training_loss, damping, step)
    query_batch = _double(Examples.of(query_source).batch)

    def measure_with(model: Any) -> Tensor:
        with torch.no_grad():
            return measured.losses(measured.outputs(model, query_batch), query_batch)

    before = measure_with(response.model)
    responses = []
    for row in track(~subsets.kept, len(subsets), "proximal responses", unit="model"):
        move = response.without(int(row.nonzero()), max_steps, rtol)
        responses.append(before + (measure_with(response.moved(move)) - before) / step)
    return Truth(
        subsets,
        torch.stack(responses)[:, None],
        before[None],
        (0,),
        measured.lower_is_better,
        recipe=f"PBRF(damping={damping:.3g}, step={step:g})",
        measure=repr(measured),
        how="from the trained weights",
    )


def _double(batch: Any) -> Any:
    return map_tensors(batch, lambda t: t.double() if t.is_floating_point() else t)


class _Response:
    """A float64 copy of the model, and how far from its weights each removal moves it.

    The unknown is the move in units of step / N, so that numbers stay near 1: L-BFGS treats far smaller ones as zero.
    """

    def __init__(self, problem: Problem, objective: AbstractObjective, damping: float, step: float) -> None:
        self.model: nn.Module = copy.deepcopy(problem.model).double().eval()
        self.objective = objective
        self.n = len(problem)
        self.unit = step / self.n
        self.batch = _double(Examples.of(problem.data).batch)
        blocks = problem.space.blocks.values()
        self.strengths = {p: block.decay + damping for block in blocks for p in block.parameters}
        self.start = detach_parameters(self.model, list(self.strengths))
        outputs = objective.outputs(self.model, self.batch).detach().requires_grad_()
        with torch.enable_grad():
            losses = objective.losses(outputs, self.batch)
            self.slope = torch.autograd.grad(losses.sum(), outputs)[0]
        self.outputs, self.losses = outputs.detach(), losses.detach()

    def moved(self, move: Mapping[str, Tensor]) -> Any:
        """The model after a move."""
        return as_function(self.model, {name: start + self.unit * move[name] for name, start in self.start.items()})

    def value(self, move: Mapping[str, Tensor], i: int) -> Tensor:
        """The function whose minimum is the response to removing example `i`, in units of (step / N)^2."""
        outputs = self.objective.outputs(self.moved(move), self.batch)
        losses = self.objective.losses(outputs, self.batch)
        # Differences are taken first, because the result is far smaller than the losses themselves.
        change = losses - self.losses
        near = (change.sum() - (self.slope * (outputs - self.outputs)).sum()) / self.n
        pull = torch.stack([s / 2 * move[name].square().sum() for name, s in self.strengths.items()]).sum()
        return (near - self.unit * change[i]) / self.unit**2 + pull

    def without(self, i: int, max_steps: int, rtol: float) -> dict[str, Tensor]:
        """The move to the minimum without example `i`."""
        move = {name: torch.zeros_like(start, requires_grad=True) for name, start in self.start.items()}
        # The gradients alone decide when to stop: near the minimum, values differ by less than their rounding.
        optimizer = torch.optim.LBFGS(
            list(move.values()), max_iter=max_steps, max_eval=4 * max_steps, tolerance_grad=0.0, tolerance_change=0.0,
            history_size=50,
        )  # fmt: skip
        sizes: list[float] = []

        def closure() -> Any:
            optimizer.zero_grad()
            with torch.enable_grad():
                value = self.value(move, i)
                value.backward()  # type: ignore[no-untyped-call]
            size = torch.stack([p.grad.square().sum() for p in move.values() if p.grad is not None]).sum().sqrt()
            sizes.append(float(size))
            if sizes[-1] <= rtol * sizes[0]:
                raise _Arrived
            return value.detach()

        try:
            optimizer.step(closure)  # type: ignore[no-untyped-call]
        except _Arrived:
            return {name: p.detach() for name, p in move.items()}
        raise SolveFailed(
            f"The response to removing example {i} stopped at a gradient of {sizes[-1] / sizes[0]:.1e} of its start, "
            f"above rtol = {rtol:.1e}, within {max_steps} steps; raise max_steps or the damping."
        )


class _Arrived(Exception):
    """The minimum is near enough."""
