"""The user's own model failed: one sentence saying where, on what, and what to do about it."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from ..core.batches import tensors_of
from ..core.errors import InfluenceError, InvalidInput, first_line

# What a function of a model and a batch calls its first argument; and what torch writes when numbers of two types meet.
_MODELS = ("model", "net", "network", "module")
_TYPE_PHRASES = ("dtype", "same type", "scalar type", "expected scalar")

_WAY_OUT = "write it as a function of (outputs, targets) that takes any number of examples"
_WAY_OUT_OF_PARTS = (
    "the model is asked in eval mode, so write it as a function of what it returns there and the targets, for any "
    "number of examples; a model that returns its losses in training mode only, as detectors do, needs a module around "
    "it whose forward takes images and targets, calls train() on it and returns each image's loss, with items (image, "
    "target, 0) and loss=lambda losses, _: losses"
)


def model_failed(cause: Exception, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Exception:
    """The error to raise for `cause`, met in the model's forward pass.

    It names the innermost layer that was running and the shapes of the model's inputs. Out-of-memory errors and errors
    of this library are returned as they are, because callers look for their type.
    """
    if isinstance(cause, (InfluenceError, torch.OutOfMemoryError, MemoryError)):
        return cause
    layer, where = _innermost(cause.__traceback__)
    floats = _first_float(layer)
    odd_input = None if floats is None else _find_misfit(floats.dtype, [t for _, t in _tensors(args, kwargs)])
    shapes = _describe_shapes(args, kwargs)
    if (
        floats is not None
        and odd_input is not None
        and any(phrase in str(cause) for phrase in _TYPE_PHRASES)
        and not isinstance(layer, (nn.Embedding, nn.EmbeddingBag))
    ):
        place = f"the model's {where}" if where else "the model"
        return InvalidInput(
            f"The data are {odd_input.dtype} (inputs of shape {shapes}) and {place} is {floats.dtype}; "
            f"{_suggest_conversion(odd_input.dtype, floats.dtype)}."
        )
    return InvalidInput(
        f"The model failed{f' at {where}' if where else ''} on inputs of shape {shapes} "
        f"({type(cause).__name__}: {first_line(cause)}); {_way_out(cause, layer, args, kwargs)}."
    )


def lacks_graph(cause: Exception) -> bool:
    """Whether forward differentiated something that has no graph.

    Args:
        cause: what was raised.
    """
    return isinstance(cause, RuntimeError) and "does not require grad" in str(cause)


def way_to_write(loss: Any, outputs: Any) -> str:
    """What to write instead of a loss function that failed.

    Args:
        loss: the function.
        outputs: what it was given.
    """
    try:
        first = next(iter(inspect.signature(loss).parameters), "")
    except (TypeError, ValueError):
        first = ""
    if first in _MODELS:
        return (
            f"its first argument, {first!r}, is what the model returned and not the model: write it as a function of "
            "(outputs, targets), or loss=ptif.objectives.ModelLoss() for the loss that the model itself returns"
        )
    return _WAY_OUT if isinstance(outputs, Tensor) else _WAY_OUT_OF_PARTS


def _way_out(cause: Exception, layer: nn.Module | None, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> str:
    if len(args) == 1 and isinstance(args[0], Mapping) and not kwargs:
        keys = ", ".join(map(repr, args[0]))
        return (
            f"the keys of the batch without its labels ({keys}) are no arguments of forward, so it is given the "
            "mapping whole: let forward take what it needs from there, or name the keys as its arguments"
        )
    if isinstance(layer, (nn.Embedding, nn.EmbeddingBag)):
        return (
            f"the embedding takes whole numbers from 0 to {layer.num_embeddings - 1}, so check the ids and convert "
            "them with .long()"
        )
    if isinstance(cause, NotImplementedError) and "forward" in str(cause):
        return "give the model a forward method that takes the inputs of a batch"
    if _writes_texts(cause.__traceback__) and "decoder_input_ids" not in kwargs:
        return (
            "an encoder-decoder is called without its labels here, so let a batch hold what its decoder reads, "
            "decoder_input_ids=model.prepare_decoder_input_ids_from_labels(labels), or pass its Trainer, or "
            "ptif.hf.problem(model, tokenizer, rows with prompt and completion)"
        )
    if isinstance(cause, TypeError) and ("argument" in str(cause) or "keyword" in str(cause)):
        return (
            "a batch (a, ..., y) is used as model(a, ...) and a mapping as model(**batch) without its labels, so let "
            "the dataset give what forward takes and no more, or wrap the model in a module with forward(self, "
            "**batch), and give several targets as one, (x, (y1, y2))"
        )
    if lacks_graph(cause):
        return (
            "forward differentiates by itself (forces, gradient penalties), so let it do so under `with "
            "torch.enable_grad():`, or by torch.func.grad"
        )
    return "give examples as the model was trained on, or try model(x) on one batch of them by hand"


def _running(trace: TracebackType | None) -> list[nn.Module]:
    """The modules that were running, the outermost first."""
    running: list[nn.Module] = []
    while trace is not None:
        code = trace.tb_frame.f_code
        # The first argument of a method is the module itself, whatever its name.
        owner = trace.tb_frame.f_locals.get(code.co_varnames[0]) if code.co_argcount else None
        if isinstance(owner, nn.Module):
            running.append(owner)
        trace = trace.tb_next
    return running


def _writes_texts(trace: TracebackType | None) -> bool:
    """Whether a model of transformers failed that reads one text and writes another."""
    return any(getattr(getattr(m, "config", None), "is_encoder_decoder", False) is True for m in _running(trace)[:1])


def _innermost(trace: TracebackType | None) -> tuple[nn.Module | None, str]:
    """The last module that was running, and its name in the outermost one."""
    running = _running(trace)
    if not running:
        return None, ""
    last = running[-1]
    name = next((name for name, module in running[0].named_modules() if module is last), "")
    return last, f"layer {name!r} ({type(last).__name__})" if name else ""


def _first_float(layer: nn.Module | None) -> Tensor | None:
    parameters = () if layer is None else layer.parameters()
    return next((p for p in parameters if p.is_floating_point()), None)


def _find_misfit(dtype: torch.dtype, inputs: list[Tensor]) -> Tensor | None:
    """The input of another type than a layer's; whole numbers are suspected only where nothing else was given."""
    other = [t for t in inputs if t.dtype != dtype]
    return next((t for t in other if t.is_floating_point()), other[0] if len(inputs) == len(other) == 1 else None)


def _tensors(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Iterator[tuple[str, Tensor]]:
    """The tensors among the arguments, with what to call them."""
    yield from (("", value) for value in args if isinstance(value, Tensor))
    yield from ((f"{name} ", value) for name, value in kwargs.items() if isinstance(value, Tensor))


def _describe_shapes(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> str:
    named = [*(("", value) for value in args), *((f"{name} ", value) for name, value in kwargs.items())]
    shapes = [f"{name}{_describe(value)}" for name, value in named if any(True for _ in tensors_of(value))]
    return ", ".join(shapes) if shapes else "none (no tensor)"


def _describe(value: Any) -> str:
    if isinstance(value, Tensor):
        return str(tuple(value.shape))
    first = next(tensor for _, tensor in tensors_of(value))
    return f"a {type(value).__name__} that holds {tuple(first.shape)}"


_METHODS = {torch.float64: "double", torch.float32: "float", torch.float16: "half", torch.bfloat16: "bfloat16"}


def _to(dtype: torch.dtype) -> str:
    return f".{_METHODS[dtype]}()" if dtype in _METHODS else f".to({dtype})"


def _suggest_conversion(data: torch.dtype, model: torch.dtype) -> str:
    """Which side to convert: weights cannot be whole numbers."""
    if not data.is_floating_point:
        kind = str(model).removeprefix("torch.")
        array = f" (an array or frame with .astype({kind!r}))" if model != torch.bfloat16 else ""
        return f"convert the data with {_to(model)} in the dataset{array}"
    array = f" (an array with .astype({str(model).removeprefix('torch.')!r}))" if model != torch.bfloat16 else ""
    return f"convert one of them: the data with {_to(model)} in the dataset{array}, or the model with model{_to(data)}"
