"""Training and retraining to the very minimum, so that nothing but the influence is judged.

`refit` retrains many models that differ in the weights of their examples. The curvature it is given only steers: a
model counts as retrained when the gradient of its own training loss is as small as was asked for.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.nn.utils import parameters_to_vector, vector_to_parameters

from pytorch_influence_functions.core.errors import InvalidInput

Losses = Callable[[Tensor], Tensor]
"""From the flat weights of one model [P] to the losses of its training examples [n]."""
Objective = Callable[[Tensor, Tensor], Tensor]
"""From the flat weights of one model [P] and its own numbers [n] to what it minimises."""


def losses_of(model: nn.Module, loss: Callable[[Tensor, Tensor], Tensor], x: Tensor, y: Tensor) -> Losses:
    """The losses of (x, y) as a function of the model's weights as one vector."""
    names, shapes = zip(*((k, p.shape) for k, p in model.named_parameters()), strict=True)
    sizes = [shape.numel() for shape in shapes]

    def losses(theta: Tensor) -> Tensor:
        parts = theta.split(sizes)
        named = {k: v.view(shape) for k, v, shape in zip(names, parts, shapes, strict=True)}
        return loss(functional_call(model, named, (x,)), y)

    return losses


def penalised(losses: Losses, decay: float) -> Objective:
    """Mean over all n of weight x (loss + decay/2 |theta|^2): the paper's loss, each example with its share of L2."""

    def objective(theta: Tensor, weights: Tensor) -> Tensor:
        return (weights * losses(theta)).mean() + weights.mean() * decay / 2 * theta.square().sum()

    return objective


def minimise(model: nn.Module, objective: Objective, n: int, tolerance: float = 1e-9, steps: int = 2000) -> float:
    """Bring the model to the minimum by L-BFGS; returns the norm of the gradient there."""
    theta = parameters_to_vector(model.parameters()).detach().requires_grad_()
    weights = torch.ones(n, dtype=theta.dtype)
    walk = torch.optim.LBFGS(
        [theta], max_iter=steps, max_eval=2 * steps, tolerance_grad=tolerance / max(1, len(theta)) ** 0.5,
        tolerance_change=0.0, history_size=50, line_search_fn="strong_wolfe",
    )  # fmt: skip

    def closure() -> Tensor:
        walk.zero_grad()
        value = objective(theta, weights)
        value.backward()
        return value.detach()

    walk.step(closure)
    closure()
    vector_to_parameters(theta.detach(), model.parameters())
    return float(theta.grad.norm())


def left_out(ids: Tensor, n: int) -> Tensor:
    """Weights [M, n]: one everywhere, and zero for the one example that each model does without."""
    weights = torch.ones(len(ids), n, dtype=torch.float64)
    weights[torch.arange(len(ids)), ids] = 0.0
    return weights


def refit(
    objective: Objective,
    start: Tensor,
    weights: Tensor,
    inverse: Callable[[Tensor], Tensor],
    tolerance: float = 1e-9,
    at_once: int = 50,
    steps: int = 200,
) -> Tensor:
    """The minimum next to `start` for every row of weights [M, n]; the models' weights [M, P].

    theta <- theta - t inverse(gradient), t halved where the gradient does not become smaller.

    Raises:
        InvalidInput: a model's gradient did not get down to `tolerance`.
    """
    slopes = vmap(grad(objective))
    found = []
    for own in weights.split(at_once):
        theta = start.repeat(len(own), 1)
        g, t = slopes(theta, own), torch.ones(len(own), 1, dtype=start.dtype)
        for _ in range(steps):
            open_ = (g.norm(dim=1) > tolerance).nonzero().flatten()
            if not len(open_):
                break
            tried = theta[open_] - t[open_] * inverse(g[open_])
            slope = slopes(tried, own[open_])
            better = slope.norm(dim=1) < g[open_].norm(dim=1)
            theta[open_[better]], g[open_[better]] = tried[better], slope[better]
            t[open_] = torch.where(better[:, None], (2 * t[open_]).clamp(max=1.0), t[open_] / 2)
        left = g.norm(dim=1).max()
        if left > tolerance:
            raise InvalidInput(f"Retraining stopped at a gradient of {left:.1e}, {tolerance:.1e} was asked for.")
        found.append(theta)
    return torch.cat(found)


def by_cholesky(matrix: Tensor) -> Callable[[Tensor], Tensor]:
    """rows [M, P] -> rows matrix^-1, by one decomposition."""
    factor = torch.linalg.cholesky(matrix)
    return lambda rows: torch.cholesky_solve(rows.to(factor.dtype).T, factor).T.to(rows.dtype)


# ------------------------------------------------------------------------------------------ linear models


def linear(inputs: int, outputs: int) -> nn.Linear:
    """A linear model without bias, all zero, in float64: the paper's logistic regression."""
    model = nn.Linear(inputs, outputs, bias=False).double()
    nn.init.zeros_(model.weight)
    return model


def binary_losses(logits: Tensor, y: Tensor) -> Tensor:
    """Logistic losses of logits [n, 1] and labels [n, 1]."""
    return F.binary_cross_entropy_with_logits(logits, y, reduction="none")[:, 0]


def softmax_losses(logits: Tensor, y: Tensor) -> Tensor:
    """Cross entropies of logits [n, c] and labels [n]."""
    return F.cross_entropy(logits, y, reduction="none")


def softmax_curvature(weight: Tensor, x: Tensor, decay: float) -> Tensor:
    """The Hessian of softmax regression's training loss, [c d, c d] in float32: enough to steer by."""
    p = (x @ weight.T).softmax(1).float()
    x, (c, d) = x.float(), weight.shape
    found = torch.empty(c * d, c * d)
    for a in range(c):
        for b in range(a + 1):
            strength = p[:, a] * (float(a == b) - p[:, b]) / len(x)
            block = (x * strength[:, None]).T @ x
            found[a * d : (a + 1) * d, b * d : (b + 1) * d] = block
            found[b * d : (b + 1) * d, a * d : (a + 1) * d] = block.T
    found.diagonal().add_(decay)
    return found


def with_constant(x: Tensor) -> Tensor:
    """A column of ones beside features [n, d], in place of a bias."""
    return torch.cat([x, torch.ones(len(x), 1, dtype=x.dtype)], 1)


def newton(x: Tensor, y: Tensor, decay: float, start: Tensor | None = None) -> nn.Linear:
    """Logistic regression without bias on x [n, d] and labels 0 and 1, by Newton's method with halved steps.

    Raises:
        InvalidInput: the gradient did not get down to 1e-8.
    """
    y = y.double()
    w = torch.zeros(x.shape[1], dtype=x.dtype) if start is None else start.clone()

    def value(w: Tensor) -> Tensor:
        return F.binary_cross_entropy_with_logits(x @ w, y) + decay / 2 * w.square().sum()

    for _ in range(100):
        p = (x @ w).sigmoid()
        g = x.T @ (p - y) / len(y) + decay * w
        if g.norm() < 1e-8:
            break
        h = (x * (p * (1 - p) / len(y))[:, None]).T @ x
        h.diagonal().add_(decay)
        step = torch.cholesky_solve(g[:, None], torch.linalg.cholesky(h))[:, 0]
        t = 1.0
        # Next to the minimum the value is the same to its last digit: any step does there.
        while t > 1e-6 and value(w - t * step) > value(w) + 1e-14:
            t /= 2
        w = w - t * step
    else:
        raise InvalidInput(f"Newton's method stopped at a gradient of {float(g.norm()):.1e}.")
    model = linear(x.shape[1], 1)
    model.weight.data.copy_(w)
    return model
