"""The original `influence_function` module: one batch at a time. Every function leaves the model as it was."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..core.batches import tensors_of, to_device
from ..core.errors import InvalidInput
from ..gradients.per_example import slopes
from ..gradients.vjp import weighted_gradient
from ..linalg.space import Space
from ..objectives.base import AbstractObjective, inputs_and_targets
from ..objectives.convert import as_objective
from ..objectives.likelihoods import CrossEntropy
from ..objectives.measures import FromFunction
from ..problem.data import Source
from ..problem.model_state import double_backward_safe
from ..problem.problem import model_device
from .config import Config, Number
from .engine import ClassicSettings, Engine, calculation, seed_from

# Autograd gives None for an input that plays no part.
OptionalGradients = tuple[Tensor | None, ...]


def _loss_objective(loss_fn: Any) -> AbstractObjective:
    return CrossEntropy() if loss_fn is None else as_objective(loss_fn)


def make_batch(z: Any, t: Any) -> tuple[Any, ...]:
    """Join inputs and targets to one batch; several inputs come as a tuple or list."""
    return (*z, t) if isinstance(z, (tuple, list)) else (z, t)


def _batch_length(batch: Any) -> int:
    targets = inputs_and_targets(batch)[2]
    first = targets if isinstance(targets, Tensor) and targets.dim() else next((x for _, x in tensors_of(batch)), None)
    if first is None or first.dim() == 0:
        raise InvalidInput("z and t have no batch axis; collate them, e.g. z[None] and torch.tensor([t]).")
    return int(first.shape[0])


def calc_loss(y: Tensor, t: Tensor, *, loss_fn: Any = None) -> Tensor:
    """The mean loss of outputs `y` and targets `t`, differentiable.

    Args:
        y: outputs [n, classes, ...] (before any softmax), or [classes] of a single example.
        t: targets [n, ...]; class numbers for the default, cross entropy over dimension 1.
        loss_fn: another loss: an objective, a `torch.nn` loss or `callable(outputs, targets)`.

    >>> round(float(calc_loss(torch.zeros(2, 4), torch.tensor([0, 3]))), 4)
    1.3863
    """
    if loss_fn is None:
        alone = y.dim() == 1
        return nn.functional.cross_entropy(y[None] if alone else y, t.reshape(1) if alone else t)
    return _loss_objective(loss_fn).losses(y, (None, t)).mean()


def grad_z(z: Any, t: Any, model: nn.Module, gpu: int = -1, *, loss_fn: Any = None, params: Any = None) -> list[Tensor]:
    """The gradient of the mean loss on a batch, one detached tensor per selected parameter, in parameter order.

    The gradient of a parameter that plays no part is zero.

    Args:
        z, t: a collated batch of inputs (a tensor, mapping, or tuple of several) and targets.
        model: left as it was, mode and `.grad` included.
        gpu: number of a GPU, -1 for where the model is.
        loss_fn: the loss, by default cross entropy.
        params: names, globs, modules or a predicate; by default everything trainable.

    Raises:
        NonFinite: the loss is NaN or infinite.
    """
    objective, batch = _loss_objective(loss_fn), make_batch(z, t)
    n = _batch_length(batch)
    with calculation(model, ClassicSettings(gpu=gpu)):
        batch = to_device(batch, model_device(model))
        space = Space.of(model, params)
        names = set(space.names)
        parameters = [p for name, p in model.named_parameters() if name in names]
        flags = [p.requires_grad for p in parameters]
        try:
            for p in parameters:
                p.requires_grad_(True)
            with torch.enable_grad():
                outputs = objective.outputs(model, batch)
            if isinstance(objective, FromFunction):
                objective = objective.resolved(outputs, t)
            objective.check(outputs.detach(), batch, torch.arange(n))
            _, slope = slopes(objective, outputs, batch, torch.arange(n))
            return weighted_gradient(outputs, parameters, slope / n)
        finally:
            for p, flag in zip(parameters, flags, strict=True):
                p.requires_grad_(flag)


def hvp(y: Tensor, w: Sequence[Tensor], v: Sequence[Tensor]) -> list[Tensor]:
    """The Hessian of `y` in `w` times `v`, detached.

    Args:
        y: a single number computed from `w`.
        w: parameters.
        v: one tensor per parameter, in its shape.

    Raises:
        InvalidInput: `w` and `v` do not fit, or `y` is not a single number.

    >>> w = torch.tensor([1.0, 2.0], requires_grad=True)
    >>> hvp((w**3).sum(), [w], [torch.tensor([1.0, 1.0])])
    [tensor([ 6., 12.])]
    """
    if len(w) != len(v) or any(a.shape != b.shape for a, b in zip(w, v, strict=False)):
        raise InvalidInput(
            f"w has shapes {[tuple(x.shape) for x in w]} and v {[tuple(x.shape) for x in v]}; they must be the same."
        )
    if y.numel() != 1:
        raise InvalidInput(f"y has shape {tuple(y.shape)}; hvp needs a single number, e.g. the mean loss.")
    with double_backward_safe(), torch.enable_grad():
        first: OptionalGradients = torch.autograd.grad(y.sum(), list(w), create_graph=True, allow_unused=True)
        # A gradient that does not depend on w has no second derivative.
        inner = [(g * x.detach()).sum() for g, x in zip(first, v, strict=True) if g is not None and g.requires_grad]
        if not inner:
            return [torch.zeros_like(x) for x in w]
        second: OptionalGradients = torch.autograd.grad(
            torch.stack(inner).sum(), list(w), retain_graph=True, allow_unused=True
        )
    return [torch.zeros_like(x) if g is None else g.detach() for x, g in zip(w, second, strict=True)]


def s_test(
    z_test: Any,
    t_test: Any,
    model: nn.Module,
    z_loader: Any,
    gpu: int = -1,
    damp: Number = 0.01,
    scale: Number = 25.0,
    recursion_depth: int = 5000,
    *,
    loss_fn: Any = None,
    params: Any = None,
    generator: torch.Generator | None = None,
    progress: Any = None,
    r: int = 1,
    batch_size: int | None = None,
    tolerance: float | int = 1e-4,
) -> list[Tensor]:
    r"""`(H + damp * scale)^-1 grad L(z_test)` by LiSSA, one tensor per selected parameter on the CPU.

    `h <- v + (1 - damp) h - H_B h / scale` on random mini-batches B of the training data, then `h / scale`; the mean
    over `r` runs. The result carries no graph for backpropagation.

    Args:
        z_test, t_test: a collated batch; of several examples the mean loss is taken.
        z_loader: the training data; its batch size is that of the mini-batches unless `batch_size` says otherwise.
        damp, scale, recursion_depth: as in the config; `None` for damp and scale are the README's values.
        generator: where the seed of the mini-batches is drawn from; by default it is 42.
        tolerance: the recursion stops early once it changes by less; 0 runs every step.
        model: the trained model; left as it was.
        gpu: where to compute; -1: where the model is.
        loss_fn, params, progress: as in `calc_img_wise`.
        r: how many runs are averaged.
        batch_size: examples per mini-batch; `None`: the loader's.

    Raises:
        SolveFailed: the recursion diverges; the message names a scale that works.

    Reference: Agarwal et al. (2017); Koh & Liang (2017), section 3.
    """
    config = Config(damp=damp, scale=scale, recursion_depth=recursion_depth, gpu=gpu, r=r)
    config.update(batch_size=batch_size, tolerance=tolerance, seed=seed_from(generator))
    settings = ClassicSettings.of(config, loss_fn, params, None, progress)
    with calculation(model, settings):
        engine = Engine.of(model, Source.of(z_loader), settings)
        batch = to_device(make_batch(z_test, t_test), engine.problem.device)
        return engine.to_lists(engine.s_test(engine.gradient_of(batch, _batch_length(batch))))[0]
