"""Per-example gradients and dense curvature, one example and one column at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

Loss = Callable[[Tensor, Any], Tensor]


def example_gradients(model: nn.Module, loss: Loss, xs: Any, ys: Any) -> Tensor:
    """Gradient of every example's own loss over all trainable parameters, [n, P] in `named_parameters` order."""
    model.eval()
    parameters = [p for p in model.parameters() if p.requires_grad]
    rows = []
    for x, y in zip(xs, ys, strict=True):
        value = loss(model(x[None]), y[None]).sum()
        grads = torch.autograd.grad(value, parameters, allow_unused=True)
        filled = [torch.zeros_like(p) if g is None else g for p, g in zip(parameters, grads, strict=True)]
        rows.append(torch.cat([g.flatten() for g in filled]))
    return torch.stack(rows)


def flat_parameters(model: nn.Module) -> Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters() if p.requires_grad])


def unflatten(model: nn.Module, flat: Tensor) -> dict[str, Tensor]:
    out, at = {}, 0
    for name, p in model.named_parameters():
        if p.requires_grad:
            out[name] = flat[at : at + p.numel()].view_as(p)
            at += p.numel()
    return out


def dense_hessian(model: nn.Module, loss: Loss, xs: Any, ys: Any) -> Tensor:
    """Second derivative of the mean loss, [P, P], by differentiating twice backwards.

    Not by torch.func.hessian: in torch 2.13 it is wrong by 9 % through a LayerNorm (against finite differences).
    """
    model.eval()
    here = flat_parameters(model).requires_grad_()
    value = loss(functional_call(model, unflatten(model, here), (xs,)), ys).mean()
    first = torch.autograd.grad(value, here, create_graph=True)[0]
    return torch.stack([torch.autograd.grad(g, here, retain_graph=True)[0] for g in first])


def dense_ggn(model: nn.Module, loss: Loss, xs: Any, ys: Any) -> Tensor:
    """mean_n J_n^T (d^2 loss / d outputs^2) J_n, [P, P]."""
    model.eval()
    parameters = [p for p in model.parameters() if p.requires_grad]
    total: Any = 0.0
    for x, y in zip(xs, ys, strict=True):
        outputs = model(x[None])
        rows = []
        for f in outputs.flatten():
            grads = torch.autograd.grad(f, parameters, retain_graph=True, allow_unused=True)
            filled = [torch.zeros_like(p) if g is None else g for p, g in zip(parameters, grads, strict=True)]
            rows.append(torch.cat([g.flatten() for g in filled]))
        j = torch.stack(rows)
        h = torch.autograd.functional.hessian(lambda out, y=y: loss(out, y[None]).sum(), outputs.detach())
        total = total + j.T @ h.reshape(len(j), len(j)) @ j
    return total / len(xs)


def influence(curvature: Tensor, damping: float, queries: Tensor, train: Tensor) -> Tensor:
    """score[q, i] = (1/N) g_q^T (C + damping)^-1 g_i."""
    damped = curvature + damping * torch.eye(len(curvature), dtype=curvature.dtype)
    return queries @ torch.linalg.solve(damped, train.T) / len(train)


def gradients_of(parameters: Sequence[Tensor], losses: Iterable[Tensor]) -> Tensor:
    """The gradient of every loss over the parameters, [n, P]; zeros where a loss does not depend on one."""
    rows = []
    for loss in losses:
        grads = torch.autograd.grad(loss, list(parameters), allow_unused=True, retain_graph=True)
        filled = [torch.zeros_like(p) if g is None else g for p, g in zip(parameters, grads, strict=True)]
        rows.append(torch.cat([g.flatten() for g in filled]))
    return torch.stack(rows)


def hessian_of(parameters: Sequence[Tensor], value: Tensor) -> Tensor:
    """The second derivative of one number over the parameters, [P, P], by differentiating twice backwards."""
    first = torch.autograd.grad(value, list(parameters), create_graph=True, materialize_grads=True)
    flat = torch.cat([g.flatten() for g in first])
    return gradients_of(parameters, flat.unbind()) if flat.requires_grad else torch.zeros(len(flat), len(flat))
