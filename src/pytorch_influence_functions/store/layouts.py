"""What a stored row is: coordinates in an eigenbasis, or the exact factors of a gradient."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, final

import torch
from jaxtyping import Float
from torch import Tensor

from ..core.errors import InvalidInput
from ..linalg.chunks import chunks
from ..linalg.eigenbasis import Eigenbasis
from ..linalg.rows import Rows
from .block_forms import build_block, split_block
from .codecs import SCALES, VALUES, AbstractCodec, Bit, Float32, Float64, Half

Stored = Mapping[str, Tensor]
"""Tensors of some rows; the first axis of each runs over them."""

_PEAKS: Final = "peaks"
# Coordinates that are made and stored at once.
_CACHED: Final = 1 << 18


class AbstractLayout(ABC):
    """How rows are stored and scored.

    Args:
        basis: where a damped solve is a division; rows and queries have coordinates there.
        codec: how numbers are stored.
    """

    basis: Eigenbasis
    codec: AbstractCodec

    @property
    def multiplies_as_stored(self) -> bool:
        """Whether products need little memory beside what is stored."""
        return False

    @abstractmethod
    def encode(self, rows: Rows) -> tuple[dict[str, list[Tensor]], dict[str, Any]]:
        """The stored form of gradient rows, in pieces that follow one another, and what else is needed to read it."""

    @abstractmethod
    def ready(self, solved: Float[Tensor, "q k"]) -> Any:
        """Solved queries, given by their coordinates (float64), in the form in which they meet stored rows."""

    @abstractmethod
    def ready_by_part(self, solved: Float[Tensor, "q k"], parts: Iterable[Sequence[str]]) -> list[Any]:
        """For each part what `ready` gives, of the blocks of that part alone: products with all of them add up."""

    @abstractmethod
    def products(self, ready: Any, stored: Stored, forms: Mapping[str, Any]) -> Float[Tensor, "q n"]:
        """<solved query, gradient> for all pairs."""

    @abstractmethod
    def coordinates(self, stored: Stored, forms: Mapping[str, Any]) -> Float[Tensor, "n k"]:
        """The stored gradients' coordinates in the eigenbasis."""

    @abstractmethod
    def tensors(self) -> dict[str, Tensor]:
        """What belongs to the layout beside the basis."""


@final
@dataclass(frozen=True, eq=False)
class ColumnLayout(AbstractLayout):
    """Rows of k coordinates, each column divided by its size."""

    basis: Eigenbasis
    codec: AbstractCodec
    columns: Float[Tensor, " k"]

    @property
    def multiplies_as_stored(self) -> bool:
        return self.codec.multiplies_as_stored

    def encode(self, rows: Rows) -> tuple[dict[str, list[Tensor]], dict[str, Any]]:
        # A few rows at a time stay in the cache on their way to what is stored.
        pieces = [self._encode(rows.take(some)) for some in chunks(len(rows), self.basis.size, _CACHED)]
        return {key: [piece[key] for piece in pieces] for key in pieces[0]}, {}

    def _encode(self, rows: Rows) -> dict[str, Tensor]:
        coordinates = self.basis.coordinates(rows)
        if self.codec.scales_columns:
            coordinates = coordinates.div_(self.columns.to(coordinates))
        return self.codec.encode(coordinates)

    def ready(self, solved: Float[Tensor, "q k"]) -> Float[Tensor, "q k"]:
        if self.codec.scales_columns:
            solved = solved * self.columns.double()
        return solved.to(torch.float64 if isinstance(self.codec, Float64) else torch.float32)

    def ready_by_part(self, solved: Float[Tensor, "q k"], parts: Iterable[Sequence[str]]) -> list[Any]:
        # <P s, g> of a part's blocks alone is <Q^T P Q s, Q^T g>: coordinates of the query restricted to them.
        basis = self.basis.to(torch.float64, solved.device)
        rows = basis.rows_of(solved.double())
        kept = ({name: float(name in names) for name in rows.blocks} for names in parts)
        return [self.ready(basis.coordinates(rows.scaled(factors))) for factors in kept]

    def products(self, ready: Any, stored: Stored, forms: Mapping[str, Any]) -> Float[Tensor, "q n"]:
        return self.codec.products(ready, stored)

    def coordinates(self, stored: Stored, forms: Mapping[str, Any]) -> Float[Tensor, "n k"]:
        rows = self.codec.decode(stored, self.basis.size)
        return rows * self.columns if self.codec.scales_columns else rows

    def tensors(self) -> dict[str, Tensor]:
        return {"columns": self.columns}


@final
@dataclass(frozen=True, eq=False)
class FactorLayout(AbstractLayout):
    """Gradients in the exact form in which they are taken: nothing is lost in float32."""

    basis: Eigenbasis
    codec: AbstractCodec

    def __post_init__(self) -> None:
        if isinstance(self.codec, Bit):
            raise InvalidInput(
                "Factors() in 1 bit would lose the products of its signs; use dtype='int8', or TwoSided(k_in)."
            )

    def encode(self, rows: Rows) -> tuple[dict[str, list[Tensor]], dict[str, Any]]:
        tensors: dict[str, Tensor] = {}
        forms: dict[str, Any] = {}
        # What takes fewer numbers: factors, or the gradient written out.
        for number, (name, block) in enumerate(rows.compact().blocks.items()):
            split, form = split_block(block, str(number))
            shapes = {}
            for key, value in split.items():
                if not value.is_floating_point():
                    tensors[key] = value.to(torch.int32)
                    continue
                shapes[key] = list(value.shape[1:])
                tensors |= self._encode_tensor(key, value)
            forms[name] = {"number": number, "shapes": shapes, **form}
        return {key: [tensor] for key, tensor in tensors.items()}, forms

    def _encode_tensor(self, key: str, value: Tensor) -> dict[str, Tensor]:
        flat = value.flatten(1)
        coded = {}
        if isinstance(self.codec, Half):
            # float16 has no room for the gradients of examples that are fitted well.
            peaks = flat.abs().amax(1).float()
            flat = flat / torch.where(peaks > 0, peaks, torch.ones_like(peaks)).to(flat)[:, None]
            coded[f"{key}.{_PEAKS}"] = peaks.cpu()
        return coded | {f"{key}.{part}": tensor for part, tensor in self.codec.encode(flat).items()}

    def rows(self, stored: Stored, forms: Mapping[str, Any], names: Iterable[str] | None = None) -> Rows:
        """The stored gradients: of some blocks, or of all."""
        blocks = {}
        for name in self.basis.space.blocks if names is None else names:
            form = forms[name]
            own = f"{form['number']}."
            tensors = {k: v for k, v in stored.items() if k.startswith(own) and k.endswith(".index")}
            for key, shape in form["shapes"].items():
                tensors[key] = self._decode_tensor(stored, key, shape)
            blocks[name] = build_block(tensors, str(form["number"]), form)
        return Rows(blocks)

    def _decode_tensor(self, stored: Stored, key: str, shape: list[int]) -> Tensor:
        parts = {part: stored[f"{key}.{part}"] for part in (VALUES, SCALES) if f"{key}.{part}" in stored}
        flat = self.codec.decode(parts, torch.Size(shape).numel())
        peaks = stored.get(f"{key}.{_PEAKS}")
        flat = flat if peaks is None else flat * peaks[:, None]
        return flat.reshape(len(flat), *shape)

    def ready(self, solved: Float[Tensor, "q k"]) -> Rows:
        return self.basis.rows_of(solved.to(self.basis.dtype or self._dtype)).to(self._dtype)

    def ready_by_part(self, solved: Float[Tensor, "q k"], parts: Iterable[Sequence[str]]) -> list[Rows]:
        rows = self.ready(solved)
        return [rows.only(names) for names in parts]

    @property
    def _dtype(self) -> torch.dtype:
        return torch.float64 if isinstance(self.codec, Float64) else torch.float32

    def products(self, ready: Any, stored: Stored, forms: Mapping[str, Any]) -> Float[Tensor, "q n"]:
        products: Tensor = ready.against(self.rows(stored, forms, ready.blocks))
        return products

    def coordinates(self, stored: Stored, forms: Mapping[str, Any]) -> Float[Tensor, "n k"]:
        return self.basis.coordinates(self.rows(stored, forms).to(self.basis.dtype or self._dtype))

    def tensors(self) -> dict[str, Tensor]:
        return {}


def lossless(dtype: torch.dtype) -> AbstractCodec:
    """The codec that keeps a model's gradients as they are."""
    return Float64() if dtype == torch.float64 else Float32()
