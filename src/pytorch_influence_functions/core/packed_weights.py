"""Which buffers of a model are weights in few bits."""

from __future__ import annotations

from typing import Final

from torch import Tensor

# A buffer of so many integers is packed weights.
_PACKED: Final = 1 << 16


def is_packed(buffer: Tensor) -> bool:
    """Whether a buffer holds weights in few bits (int8, or packed in int32): most of a model, which no forward changes.

    What a forward does change, counters, running statistics and memories of features, is small or real numbers.
    """
    return not (buffer.is_floating_point() or buffer.is_complex()) and buffer.numel() >= _PACKED
