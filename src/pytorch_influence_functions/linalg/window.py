"""Where a convolution looks: its input as patches, or as patches times a matrix that are not written out."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from .sides import Side, times


@dataclass(frozen=True)
class Window:
    """Where a convolution looks: everything a patch needs besides the (already padded) input."""

    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    dilation: tuple[int, ...]
    bias: bool

    def patches(self, x: Float[Tensor, "n i *space"]) -> Float[Tensor, "n t k"]:
        """Padded input [n, i, *space] -> patches [n, positions, i * kernel (+1)].

        A view of memory laid out [k, n, positions]: what is next to each other in the image stays so (the copy is twice
        as fast), the bias column is written in place, and every product takes it as a transposed matrix.
        """
        d = len(self.kernel)
        for axis, (k, s, r) in enumerate(zip(self.kernel, self.stride, self.dilation, strict=True)):
            x = x.unfold(2 + axis, r * (k - 1) + 1, s)[..., ::r]
        # now [n, i, *positions, *kernel]; wanted [i, *kernel, n, *positions]
        x = x.permute([1, *range(2 + d, 2 + 2 * d), 0, *range(2, 2 + d)])
        width = int(torch.Size(x.shape[: 1 + d]).numel())
        n, positions = x.shape[1 + d], int(torch.Size(x.shape[2 + d :]).numel())
        out = x.new_empty(width + int(self.bias), n, positions)
        out[:width].view(x.shape).copy_(x)
        if self.bias:
            out[width] = 1.0
        return out.permute(1, 2, 0)

    def patches_times(self, x: Float[Tensor, "n i *space"], side: Side) -> Float[Tensor, "n t k"]:
        """Every patch times a matrix, by convolving the input with it: no patch is written out; None: the patches."""
        if not isinstance(side, Tensor):
            return times(self.patches(x), side)
        weight = side[:-1] if self.bias else side
        kernels = weight.T.reshape(side.shape[1], x.shape[1], *self.kernel)
        convolve = (F.conv1d, F.conv2d, F.conv3d)[len(self.kernel) - 1]
        pushed = convolve(x, kernels, side[-1] if self.bias else None, self.stride, 0, self.dilation)
        return pushed.flatten(2).mT
