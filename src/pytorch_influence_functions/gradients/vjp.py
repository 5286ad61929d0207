"""The model as a function of its parameters, and batches taken apart example by example."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import vjp, vmap

from ..core.batches import example_tensors, with_example_tensors
from ..core.functional import call_with
from ..core.warn import silence_torch
from ..objectives.base import AbstractObjective


def as_function(model: nn.Module, parameters: Mapping[str, Tensor]) -> Callable[..., Any]:
    """The model as a callable, with the named parameters replaced; the module itself is not changed."""

    def call(*args: Any, **kwargs: Any) -> Any:
        return call_with(model, parameters, args, kwargs)

    return call


def detach_parameters(model: nn.Module, names: Sequence[str]) -> dict[str, Tensor]:
    """The named parameters, detached."""
    parameters = dict(model.named_parameters())
    return {k: parameters[k].detach() for k in names}


def per_example_vjp(
    model: nn.Module,
    objective: AbstractObjective,
    parameters: Mapping[str, Tensor],
    batch: Any,
    cotangent: Tensor,
    chunk: int | None,
) -> dict[str, Tensor]:
    """Rows J_n^T c_n over `parameters`, shape [n, *shape] each, by `torch.func.vmap`."""
    n = cotangent.shape[0]

    def pull_one(c: Tensor, *parts: Tensor) -> dict[str, Tensor]:
        one_batch = with_example_tensors(batch, n, [x[None] for x in parts])

        def f(p: dict[str, Tensor]) -> Tensor:
            return objective.outputs(as_function(model, p), one_batch).reshape(c.shape)

        _, pull = vjp(f, dict(parameters))  # type: ignore[misc]
        result: dict[str, Tensor] = pull(c)[0]
        return result

    with silence_torch():
        rows: dict[str, Tensor] = vmap(pull_one, randomness="different", chunk_size=chunk)(
            cotangent, *example_tensors(batch, n)
        )
    return {k: v.detach() for k, v in rows.items()}


class _StartingFrom(torch.autograd.Function):
    """A root whose derivative in the outputs is the cotangent itself.

    The sum of their product has the same, and takes four passes over the logits of a language model to say so.
    """

    @staticmethod
    def forward(outputs: Tensor, cotangent: Tensor) -> Tensor:
        return outputs.new_zeros(())

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(inputs[1])

    @staticmethod
    def backward(ctx: Any, *slopes: Tensor) -> tuple[Tensor, None]:
        (cotangent,) = ctx.saved_tensors
        # Complex numbers are seen as pairs, which only what begins at an even place can be.
        return cotangent.clone() if cotangent.storage_offset() else cotangent, None


def grads(
    outputs: Tensor,
    inputs: Sequence[Any],
    cotangent: Tensor | None = None,
    retain_graph: bool | None = None,
    create_graph: bool = False,
) -> tuple[Tensor | None, ...]:
    """`torch.autograd.grad` over tensors or graph edges; None where the outputs do not depend on an input."""
    # Not through grad_outputs: checking those makes torch import its symbolic shapes, a second at the first call.
    if cotangent is None:
        root = outputs
    elif create_graph or cotangent.requires_grad or cotangent.shape != outputs.shape:
        root = (outputs * cotangent).sum()
    else:
        root = _StartingFrom.apply(outputs, cotangent.to(outputs.dtype))  # type: ignore[no-untyped-call]
    gradients: tuple[Tensor | None, ...] = torch.autograd.grad(
        root, list(inputs), retain_graph=retain_graph, create_graph=create_graph, allow_unused=True
    )
    return tuple(None if gradient is None else as_dense(gradient) for gradient in gradients)


def as_dense(gradient: Tensor) -> Tensor:
    """A gradient with all its zeros: `functional.embedding(..., sparse=True)` gives one that leaves them out."""
    return gradient.to_dense() if gradient.is_sparse else gradient


def weighted_gradient(outputs: Tensor, parameters: Sequence[Tensor], cotangent: Tensor) -> list[Tensor]:
    """J^T c over the parameters; zeros where the outputs do not depend on a parameter."""
    gradients = grads(outputs, parameters, cotangent)
    return [torch.zeros_like(p) if g is None else g.detach() for p, g in zip(parameters, gradients, strict=True)]


def squared_gradient_norms(outputs: Tensor, parameters: Mapping[str, Tensor], cotangent: Tensor) -> dict[str, float]:
    """|J^T c|^2 by parameter, of which each part is let go as soon as it is known: together they are a second model.

    Args:
        outputs: computed with a graph from the parameters.
        parameters: leaves of that graph, by name.
        cotangent: c, in the shape of the outputs.
    """
    squares: dict[str, Tensor] = {}

    def measure(name: str) -> Callable[[Tensor], Tensor]:
        def hook(gradient: Tensor) -> Tensor:
            gradient = as_dense(gradient)
            squares[name] = torch.linalg.vector_norm(gradient, dtype=torch.promote_types(gradient.dtype, torch.float32))
            return gradient.new_zeros(()).expand_as(gradient)

        return hook

    before = [p._backward_hooks for p in parameters.values()]
    handles = [p.register_hook(measure(name)) for name, p in parameters.items()]  # type: ignore[no-untyped-call]
    try:
        grads(outputs, list(parameters.values()), cotangent)
    finally:
        for handle in handles:
            handle.remove()
        for p, hooks in zip(parameters.values(), before, strict=True):
            if hooks is None:  # a removed hook leaves an empty dictionary
                p._backward_hooks = None
    return {name: float(norm) ** 2 for name, norm in squares.items()}
