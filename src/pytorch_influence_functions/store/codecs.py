"""How numbers are stored: in full, in half precision, as whole numbers of 8 bits, or as signs."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Final, final

import numpy as np
import torch
from jaxtyping import Float, Shaped
from torch import Tensor

from ..core.errors import InvalidInput
from .integer_products import float_products, integer_products

VALUES, SCALES = "values", "scales"
# What a column is divided by is at least this share of the root mean square of all: a column that was empty in the
# sample must not take all the precision once it is not.
_SMALLEST_COLUMN: Final = 1e-2
_LARGEST_HALF: Final = 65504.0


class AbstractCodec(ABC):
    """One way to store rows of numbers; a frozen record without settings.

    Rows come divided by one number per column, so that all columns are of one size.
    """

    name: ClassVar[str]
    scales_columns: ClassVar[bool] = True
    """Whether columns are divided by their size before they are stored."""
    multiplies_as_stored: ClassVar[bool] = True
    """Whether products need little memory beside what is stored."""

    @abstractmethod
    def encode(self, rows: Float[Tensor, "n k"]) -> dict[str, Tensor]:
        """The stored form of rows, on the CPU: `values` and perhaps `scales`, one per row. Rows may be overwritten."""

    @abstractmethod
    def decode(self, stored: Mapping[str, Tensor], width: int) -> Float[Tensor, "n k"]:
        """The rows again, float32 (float64 where that is stored), `width` numbers each."""

    def products(self, queries: Float[Tensor, "q k"], stored: Mapping[str, Tensor]) -> Float[Tensor, "q n"]:
        """<query, row> for all pairs.

        Args:
            queries: float32, times the column sizes.
            stored: what `encode` gave.
        """
        return float_products(stored[VALUES], queries)

    @abstractmethod
    def bytes_of(self, width: int) -> int:
        """Bytes of one row of `width` numbers."""


@final
@dataclass(frozen=True)
class Float32(AbstractCodec):
    """As computed."""

    name: ClassVar[str] = "float32"
    scales_columns: ClassVar[bool] = False

    def encode(self, rows: Float[Tensor, "n k"]) -> dict[str, Tensor]:
        return {VALUES: rows.float().cpu().contiguous()}

    def decode(self, stored: Mapping[str, Tensor], width: int) -> Float[Tensor, "n k"]:
        return stored[VALUES]

    def bytes_of(self, width: int) -> int:
        return 4 * width


@final
@dataclass(frozen=True)
class Float64(AbstractCodec):
    """As computed by a model in float64."""

    name: ClassVar[str] = "float64"
    scales_columns: ClassVar[bool] = False

    def encode(self, rows: Float[Tensor, "n k"]) -> dict[str, Tensor]:
        return {VALUES: rows.double().cpu().contiguous()}

    def decode(self, stored: Mapping[str, Tensor], width: int) -> Float[Tensor, "n k"]:
        return stored[VALUES]

    def bytes_of(self, width: int) -> int:
        return 8 * width


@final
@dataclass(frozen=True)
class Half(AbstractCodec):
    """Two bytes: eleven significant bits in float16, eight in bfloat16."""

    dtype: torch.dtype

    @property
    def name(self) -> str:  # type: ignore[override]
        return "float16" if self.dtype is torch.float16 else "bfloat16"

    def encode(self, rows: Float[Tensor, "n k"]) -> dict[str, Tensor]:
        if self.dtype is torch.float16:
            rows = rows.clamp_(-_LARGEST_HALF, _LARGEST_HALF)
        return {VALUES: rows.to(self.dtype).cpu().contiguous()}

    def decode(self, stored: Mapping[str, Tensor], width: int) -> Float[Tensor, "n k"]:
        return stored[VALUES].float()

    def bytes_of(self, width: int) -> int:
        return 2 * width


@final
@dataclass(frozen=True)
class Int8(AbstractCodec):
    """Whole numbers from -127 to 127 with one scale per row (and one per column): off by at most half a step."""

    name: ClassVar[str] = "int8"

    def encode(self, rows: Float[Tensor, "n k"]) -> dict[str, Tensor]:
        scales = (rows.abs().amax(1) / 127).float()
        steps = rows.float() / torch.where(scales > 0, scales, torch.ones_like(scales))[:, None]
        return {VALUES: steps.round().clamp(-127, 127).to(torch.int8).cpu(), SCALES: scales.cpu()}

    def decode(self, stored: Mapping[str, Tensor], width: int) -> Float[Tensor, "n k"]:
        return stored[VALUES].float().mul_(stored[SCALES][:, None])

    def products(self, queries: Float[Tensor, "q k"], stored: Mapping[str, Tensor]) -> Float[Tensor, "q n"]:
        return integer_products(stored[VALUES], queries).mul_(stored[SCALES])

    def bytes_of(self, width: int) -> int:
        return width + 4


@final
@dataclass(frozen=True)
class Bit(AbstractCodec):
    """The sign of every number, eight to a byte, and one scale per row."""

    name: ClassVar[str] = "1bit"
    multiplies_as_stored: ClassVar[bool] = False

    def encode(self, rows: Float[Tensor, "n k"]) -> dict[str, Tensor]:
        signs = np.packbits((rows > 0).cpu().numpy(), axis=1, bitorder="little")
        return {VALUES: torch.from_numpy(signs), SCALES: rows.abs().mean(1).float().cpu()}

    def decode(self, stored: Mapping[str, Tensor], width: int) -> Float[Tensor, "n k"]:
        signs = self._bits(stored[VALUES], width).float().mul_(2).sub_(1)
        return signs.mul_(stored[SCALES][:, None])

    def products(self, queries: Float[Tensor, "q k"], stored: Mapping[str, Tensor]) -> Float[Tensor, "q n"]:
        # A sign is twice its bit less one.
        signed = integer_products(self._bits(stored[VALUES], queries.shape[1]), 2 * queries)
        return (signed - queries.sum(1, keepdim=True)).mul_(stored[SCALES])

    def _bits(self, values: Tensor, width: int) -> Shaped[Tensor, "n k"]:
        bits = np.unpackbits(values.cpu().numpy(), axis=1, count=width, bitorder="little")
        return torch.from_numpy(bits.view(np.int8)).to(values.device)

    def bytes_of(self, width: int) -> int:
        return -(-width // 8) + 4


CODECS: Final[Mapping[str, AbstractCodec]] = {
    codec.name: codec for codec in (Float32(), Half(torch.float16), Half(torch.bfloat16), Int8(), Bit(), Float64())
}
"""Every codec by its name."""


def find_codec(dtype: str | torch.dtype) -> AbstractCodec:
    """The codec of a name or of a torch dtype.

    Raises:
        InvalidInput: there is none.

    >>> find_codec("int8"), find_codec(torch.float32)
    (Int8(), Float32())
    """
    name = str(dtype).removeprefix("torch.").replace(" ", "")
    if name not in CODECS:
        raise InvalidInput(f"dtype={dtype!r} is none of those that are stored; choose one of {', '.join(CODECS)}.")
    return CODECS[name]


def column_sizes(sample: Float[Tensor, "n k"]) -> Float[Tensor, " k"]:
    """The root mean square of every column of a sample of rows, none of them next to nothing, float32."""
    squares = sample.double().square().mean(0)
    overall = float(squares.mean().sqrt())
    return squares.sqrt().clamp_min(_SMALLEST_COLUMN * overall if overall > 0 else 1.0).float().cpu()
