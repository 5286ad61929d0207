"""Layer rules: from a module's input and the gradient at its output to per-example gradients.

A rule is a function `(module, x, g, part) -> AbstractBlock`, where

* `x` is the module's input and `g` the gradient at its output, both with one *row* per example (or several rows per
  example, which `fold` puts together afterwards) on the first axis,
* `part` says which parameter block is asked for: `"joint"` (weight and bias side by side, `[o, i + 1]`), `"weight"` or
  `"bias"`.

To teach the library a new layer, write such a function, add it to `RULES`, and add a model with that
layer to `CASES` in `tests/laws/zoo.py`: the law `tests/laws/test_gradients.py` then requires that the
rule is used, and that its rows are those of one-example autograd. A rule can only be written for a
layer that reads one tensor, its first argument, and whose parameters are named `weight` and `bias`.

Modules without a rule are only slower. Every rule is verified against autograd on real examples before it is used, so a
rule that is wrong for a particular module is not used for it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..linalg.blocks import AbstractBlock, Conv, Dense, Indexed, Outer
from ..linalg.space import is_conv1d
from ..linalg.window import Window

ParameterPart: TypeAlias = Literal["joint", "weight", "bias"]
Rule: TypeAlias = Callable[[Any, Tensor, Tensor, ParameterPart], AbstractBlock]
Layout: TypeAlias = Literal["first", "second", "folded", "shared"]
"""Where the examples are in a module's input: axis 0; axis 1 (time first); folded into axis 0
together with positions; or nowhere, the input being the same for all (position embeddings)."""


def _terms(a: Tensor) -> Tensor:
    """[rows, ..., d] -> [rows, t, d]"""
    return a.reshape(a.shape[0], -1, a.shape[-1])


def _with_ones(x: Tensor) -> Tensor:
    return torch.cat([x, x.new_ones(*x.shape[:-1], 1)], -1)


def linear(module: nn.Linear, x: Tensor, g: Tensor, part: ParameterPart) -> AbstractBlock:
    """y = W x + b: G = sum_t g_t [x_t, 1]^T."""
    left, right = _terms(g), _terms(x)
    if part == "bias":
        return Dense(left.sum(1))
    return Outer(left, _with_ones(right) if part == "joint" else right)


def transposed_linear(module: nn.Module, x: Tensor, g: Tensor, part: ParameterPart) -> AbstractBlock:
    """y = x W + b with W [in, out] (the transformers' `Conv1D`); the joint block is [out, in + 1]."""
    left, right = _terms(g), _terms(x)
    if part == "bias":
        return Dense(left.sum(1))
    return Outer(left, _with_ones(right)) if part == "joint" else Outer(right, left)


_Conv = nn.Conv1d | nn.Conv2d | nn.Conv3d


def pad_input(module: _Conv, x: Tensor) -> Tensor:
    """The input with the module's own padding written out, whatever its mode."""
    sides: list[int] = []
    for axis in reversed(range(len(module.kernel_size))):
        if module.padding == "valid":
            sides += [0, 0]
        elif module.padding == "same":
            total = module.dilation[axis] * (module.kernel_size[axis] - 1)
            sides += [total // 2, total - total // 2]
        else:
            sides += [int(module.padding[axis])] * 2
    if not any(sides):
        return x
    return F.pad(x, sides, mode="constant" if module.padding_mode == "zeros" else module.padding_mode)


def convolution(module: _Conv, x: Tensor, g: Tensor, part: ParameterPart) -> AbstractBlock:
    """G = sum over positions of g_p patch_p^T; groups are written out, their blocks being small."""
    if part == "bias":
        return Dense(g.flatten(2).sum(2))
    window = Window(tuple(module.kernel_size), tuple(module.stride), tuple(module.dilation), part == "joint")
    x = pad_input(module, x)
    if module.groups == 1:
        return Conv(g, x, window)
    n, k = x.shape[0], module.groups
    patches = window.patches(x.reshape(n * k, x.shape[1] // k, *x.shape[2:]))
    left = g.flatten(2).reshape(n * k, g.shape[1] // k, -1)
    return Dense(torch.bmm(left, patches).reshape(n, g.shape[1], -1))


def embedding(module: nn.Embedding, x: Tensor, g: Tensor, part: ParameterPart) -> AbstractBlock:
    """G[x_t] += g_t; the padding row gets nothing, as in training."""
    index, values = x.reshape(x.shape[0], -1), _terms(g)
    if module.padding_idx is not None:
        values = values * (index != module.padding_idx)[:, :, None]
    return Indexed(index, values, module.num_embeddings)


def _scale_and_shift(normed: Tensor, g: Tensor, part: ParameterPart, trailing: int) -> Dense:
    """y = w * normed + b over the last `trailing` axes: sums over the others, per row."""
    terms = g * normed if part == "weight" else g
    shape = terms.shape[terms.dim() - trailing :]
    return Dense(terms.reshape(terms.shape[0], -1, *shape).sum(1))


def layer_norm(module: nn.LayerNorm, x: Tensor, g: Tensor, part: ParameterPart) -> AbstractBlock:
    normed = F.layer_norm(x, module.normalized_shape, eps=module.eps)
    return _scale_and_shift(normed, g, part, len(module.normalized_shape))


def rms_norm(module: Any, x: Tensor, g: Tensor, part: ParameterPart) -> AbstractBlock:
    """`nn.RMSNorm`, and the similar classes of language models whose epsilon has another name."""
    eps = getattr(module, "eps", None)
    eps = getattr(module, "variance_epsilon", None) if eps is None else eps
    shape = tuple(module.weight.shape)
    return _scale_and_shift(F.rms_norm(x, shape, eps=eps), g, part, len(shape))


def _per_channel(normed: Tensor, g: Tensor, part: ParameterPart) -> Dense:
    terms = g * normed if part == "weight" else g
    return Dense(terms.flatten(2).sum(2) if terms.dim() > 2 else terms)


def group_norm(module: nn.GroupNorm, x: Tensor, g: Tensor, part: ParameterPart) -> AbstractBlock:
    return _per_channel(F.group_norm(x, module.num_groups, eps=module.eps), g, part)


def instance_norm(module: Any, x: Tensor, g: Tensor, part: ParameterPart) -> AbstractBlock:
    return _per_channel(F.instance_norm(x, eps=module.eps), g, part)


def batch_norm(module: Any, x: Tensor, g: Tensor, part: ParameterPart) -> AbstractBlock:
    """Eval mode: the running statistics are constants."""
    normed = F.batch_norm(x, module.running_mean, module.running_var, eps=module.eps)
    return _per_channel(normed, g, part)


RULES: dict[type[nn.Module], Rule] = {
    nn.Linear: linear,
    nn.Conv1d: convolution,
    nn.Conv2d: convolution,
    nn.Conv3d: convolution,
    nn.Embedding: embedding,
    nn.LayerNorm: layer_norm,
    nn.RMSNorm: rms_norm,
    nn.GroupNorm: group_norm,
    nn.BatchNorm1d: batch_norm,
    nn.BatchNorm2d: batch_norm,
    nn.BatchNorm3d: batch_norm,
    nn.SyncBatchNorm: batch_norm,
    nn.InstanceNorm1d: instance_norm,
    nn.InstanceNorm2d: instance_norm,
    nn.InstanceNorm3d: instance_norm,
}


def _applies(module: Any, rule: Rule) -> bool:
    """Whether a rule can express this module; the verification finds what is not seen here."""
    if rule is embedding:
        return module.max_norm is None and not module.scale_grad_by_freq
    if rule is batch_norm:
        return module.running_mean is not None
    if rule is instance_norm:
        return not module.track_running_stats
    return True


def find_rule(module: nn.Module) -> Rule | None:
    """The rule for a module, or None. A subclass inherits a rule only if it keeps `forward`."""
    name = type(module).__name__
    rule: Rule | None = None
    for kind, candidate in RULES.items():
        if isinstance(module, kind) and type(module).forward is kind.forward:
            rule = candidate
    if rule is None and is_conv1d(module):
        rule = transposed_linear
    if rule is None and name.endswith(("RMSNorm", "T5LayerNorm")) and "weight" in module._parameters:
        rule = rms_norm
    own = {k for k, p in module._parameters.items() if p is not None}
    if rule is None or not own <= {"weight", "bias"} or "weight" not in own or not _applies(module, rule):
        return None
    return rule


def layout_of(two: tuple[int, ...], three: tuple[int, ...]) -> Layout | None:
    """Where the examples sit, from the input's shape when 2 and when 3 examples were run."""
    if len(two) != len(three) or not two:
        return None
    changed = [axis for axis, (a, b) in enumerate(zip(two, three, strict=True)) if a != b]
    if not changed:
        return "shared"
    axis = changed[0]
    if len(changed) > 1 or 3 * two[axis] != 2 * three[axis] or axis > 1:
        return None
    if two[axis] == 2:
        return "first" if axis == 0 else "second"
    return "folded" if axis == 0 else None


def rows_first(a: Tensor, layout: Layout) -> Tensor:
    """The examples' axis (or the axis folded with it) moved to the front."""
    return a.transpose(0, 1) if layout == "second" else a
