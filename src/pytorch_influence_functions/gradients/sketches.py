"""Projections by random signs from a counter-based generator: the same on every machine, and no P x k matrix."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final, final

import numpy as np
import torch
from jaxtyping import Complex, Float, Int
from torch import Tensor

from ..core.errors import InvalidInput
from ..core.validate import choice, whole_number
from ..linalg.blocks import AbstractBlock, Conv, Dense, Indexed, Outer, Sum, matrix_shape
from ..linalg.chunks import chunks
from ..linalg.rows import Rows
from ..linalg.space import BlockSpec, Space
from .projections import JOINT, AbstractProjector, AbstractReduction, reduced_to

RANDOM_SIGNS: Final = "random signs"
EIGENVECTORS: Final = "eigenvectors"


def random_words(count: int, *key: object) -> np.ndarray[tuple[int], np.dtype[np.uint64]]:
    """So many 64-bit words that depend on the key alone: on no device, no version, and not on what was drawn before.

    The generator is Philox, whose raw words numpy promises to keep (Salmon et al. 2011).
    """
    name = hashlib.blake2b("/".join(map(str, key)).encode(), digest_size=16).digest()
    return np.random.Philox(key=int.from_bytes(name, "little")).random_raw(count)


def random_signs(count: int, *key: object) -> Float[Tensor, " n"]:
    """So many numbers +1 and -1 for a key, float32 on the CPU.

    >>> random_signs(4, 0, "layer", "input").tolist() == random_signs(9, 0, "layer", "input")[:4].tolist()
    True
    """
    words = random_words(-(-count // 64), *key).astype("<u8").view(np.uint8)
    bits = torch.from_numpy(np.unpackbits(words, count=count, bitorder="little"))
    return bits.float().mul_(2).sub_(1)


# --------------------------------------------------------------------------- two-sided


@final
@dataclass(frozen=True, repr=False)
class TwoSided(AbstractReduction):
    r"""Every layer's gradient G = sum_t d_t a_t^T as sum_t (P_out d_t)(P_in a_t)^T, `k_out` x `k_in` numbers.

    Inputs and output gradients are projected before they meet, so the gradient itself is never written out. Inner
    products are kept on average, up to about sqrt(1 / k_in + 1 / k_out). A side no longer than its k stays as it is;
    a scale or bias that stands alone has k_in * k_out numbers.

    Args:
        k_in: numbers that a layer's input is projected to.
        k_out: numbers that the gradient at its output is projected to; `None`: as many.
        basis: `"random signs"`, or `"eigenvectors"`: the leading ones of the layer's input and output-gradient second
            moments, which an index measures when it is built.
        seed: of the signs; each layer and side has its own.

    Reference: Choe et al. (2024), "What is Your Data Worth to GPT?" (LoGra).

    >>> TwoSided(16)
    TwoSided(k_in=16)
    """

    k_in: int
    k_out: int | None = None
    basis: str = RANDOM_SIGNS
    seed: int = 0

    def __post_init__(self) -> None:
        whole_number("k_in", self.k_in, owner=self, hint="8 to 64 are usual")
        if self.k_out is not None:
            whole_number("k_out", self.k_out, owner=self, hint="8 to 64 are usual")
        choice("basis", self.basis, (RANDOM_SIGNS, EIGENVECTORS), owner=self)

    @property
    def sides(self) -> tuple[int, int]:
        """(k_out, k_in)."""
        return self.k_out or self.k_in, self.k_in

    def shape_of(self, block: BlockSpec) -> tuple[int, int]:
        """The shape of a block's projected gradient.

        Args:
            block: the block of parameters.
        """
        o, i = matrix_shape(block.shape)
        left, right = self.sides
        return (min(o, left * right), 1) if i == 1 else (min(o, left), min(i, right))

    @property
    def keeps_layers_apart(self) -> bool:
        """Always: each layer is projected by itself."""
        return True

    def reduced(self, space: Space) -> Space:
        """k_out x k_in numbers for every block, fewer where it has fewer.

        Args:
            space: the parameters.
        """
        return Space({n: BlockSpec(n, (), self.shape_of(b), decay=b.decay) for n, b in space.blocks.items()}, {})

    def projector(self, space: Space) -> TwoSidedProjector:
        """The projection of one parameter `space`, by random signs.

        Raises:
            InvalidInput: its directions are measured, which needs data.
        """
        if self.basis == EIGENVECTORS:
            raise InvalidInput(
                f"{self!r} measures its directions on the training data, which only an index does; leave basis= out, "
                "or use ptif.Index.build(...)."
            )
        sides = {}
        for name, block in space.blocks.items():
            lengths, kept = matrix_shape(block.shape), self.shape_of(block)
            sides[name] = (
                self._signs(name, "output", lengths[0], kept[0]),
                self._signs(name, "input", lengths[1], kept[1]),
            )
        return TwoSidedProjector.of(self, space, sides)

    def _signs(self, block: str, side: str, length: int, k: int) -> Float[Tensor, "length k"] | None:
        if k >= length:
            return None
        return random_signs(length * k, self.seed, block, side).reshape(length, k) / math.sqrt(k)


@final
@dataclass(frozen=True, eq=False)
class TwoSidedProjector(AbstractProjector):
    """The map of one space.

    Args:
        space: of the projected rows: every block has the shape [k_out, k_in].
        sides: per block the matrices [o, k_out] and [i, k_in]; None leaves a side as it is.
        measured: whether they were measured on data, not drawn from a seed.
    """

    space: Space
    sides: Mapping[str, tuple[Tensor | None, Tensor | None]]
    measured: bool = False
    _known: dict[object, tuple[Tensor | None, Tensor | None]] = field(default_factory=dict, repr=False)

    @staticmethod
    def of(
        projection: TwoSided,
        space: Space,
        sides: Mapping[str, tuple[Tensor | None, Tensor | None]],
        measured: bool = False,
    ) -> TwoSidedProjector:
        """The map with these matrices."""
        return TwoSidedProjector(projection.reduced(space), sides, measured)

    def apply(self, rows: Rows) -> Rows:
        """Projected rows; layers stay in factors."""
        return rows.map(lambda name, block: block.project(*self._sides_for(name, block.reference)))

    def _sides_for(self, name: str, like: Tensor) -> tuple[Tensor | None, Tensor | None]:
        key = (name, like.dtype, like.device)
        if key not in self._known:
            left, right = (None if side is None else side.to(like) for side in self.sides[name])
            self._known[key] = left, right
        return self._known[key]


# --------------------------------------------------------------------------- sketch


@final
@dataclass(frozen=True, repr=False)
class Sketch(AbstractReduction):
    r"""Every gradient as k numbers: each coordinate is added, with a random sign, to one of k sums.

    The coordinate (j, i) of a layer's gradient G = sum_t d_t a_t^T gets the sign s_j s_i and goes to the sum
    h(j) + h(i) mod k. The sums are then the circular convolution of two short vectors, one of d_t and one of a_t, and
    their Fourier transform, which is what is kept, is the product of two: the gradient itself is never written out.
    Inner products are kept on average. As long as a layer's sides are no longer than k, no two coordinates of one row
    or column meet, and the variance is that of independent signs, (|g|^2 |g'|^2 + <g, g'>^2) / k; a longer side, cut
    into pieces of k, adds at most |G G'^T|^2 / k or |G^T G'|^2 / k.

    With `per_layer` each block of parameters becomes k numbers of its own, so that `Blockwise(Spectral())` gives every
    layer its own kernel; blocks of at most k coordinates are left as they are.

    Args:
        k: how many numbers a gradient becomes.
        per_layer: sketch every block of parameters by itself.
        seed: of signs and places; each block of parameters has its own.

    References: Charikar, Chen & Farach-Colton (2002); Pham & Pagh (2013), TensorSketch, here with places that differ
        along each side; Hu et al. (2025), GraSS.

    >>> Sketch(1024).k
    1024
    """

    k: int
    seed: int = 0
    per_layer: bool = False

    def __post_init__(self) -> None:
        whole_number("k", self.k, owner=self, hint="512 to 8192 are usual")

    @property
    def keeps_layers_apart(self) -> bool:
        """As `per_layer` says."""
        return self.per_layer

    def reduced(self, space: Space) -> Space:
        """k numbers, or up to k for every block.

        Args:
            space: the parameters.
        """
        return reduced_to(self.k, space, self.per_layer, repr(self), "use TwoSided(k_in)")

    def projector(self, space: Space) -> SketchProjector:
        """The sketch of one parameter `space`.

        Raises:
            InvalidInput: k is no smaller than the number of parameters, or weight decay differs between parameters that
                are mixed.
        """
        return SketchProjector(self.reduced(space), self)


# Numbers that are worked on at once: temporaries that stay in a core's cache.
_CACHED: Final = 1 << 17
_WRITTEN_OUT: Final = 1 << 20
# Sides up to this length are transformed by a product with a matrix, longer ones by a fast transform.
_SHORT: Final = 160
# Multiplications of a matrix product in the time that another operation takes for one number.
_PRODUCTS: Final = 50


@final
@dataclass(frozen=True, eq=False)
class Side:
    """Where the coordinates of one side of a layer go, and with which factor.

    Args:
        places: h, from 0 to k - 1.
        factors: the signs s, on one of the sides times what keeps inner products, float64.
        k: how many sums there are.
    """

    places: Int[Tensor, " length"]
    factors: Float[Tensor, " length"]
    k: int
    _known: dict[object, Any] = field(default_factory=dict, repr=False)

    @staticmethod
    def of_outputs(length: int, k: int, *key: object) -> Side:
        """Pieces of k coordinates in random order, so that all pairs of coordinates meet with the same chance."""
        pieces = -(-length // k)
        words = random_words(pieces * k, *key, "places").reshape(pieces, k)
        places = np.argsort(words, axis=1, kind="stable")
        return Side(_first(places, length), random_signs(length, *key, "signs").double(), k)

    @staticmethod
    def of_inputs(length: int, k: int, *key: object) -> Side:
        """Pieces of k coordinates, each but the first moved round: neighbours stay neighbours."""
        shifts = (random_words(-(-length // k), *key, "shifts") % np.uint64(k)).astype(np.int64)
        shifts[0] = 0
        places = (np.arange(k) + shifts[:, None]) % k
        signs = random_signs(length, *key, "signs").double()
        return Side(_first(places, length), signs * math.sqrt(2 / k), k)

    @property
    def cost(self) -> float:
        """Of one transform, in operations on a number."""
        return self.k * min(1.0, len(self.places) / _SHORT)

    def transform(self, x: Float[Tensor, "n length"], out: Complex[Tensor, "n f"]) -> None:
        """Put the Fourier transform of the k sums of each row, up to its middle, into `out`."""
        if len(self.places) > _SHORT:
            torch.fft.rfft(self.placed(x), self.k, out=out)
        else:
            torch.mm(x, self._kept("matrix", x, self._matrix), out=torch.view_as_real(out).flatten(1))

    def transform_at(self, index: Int[Tensor, " n"], out: Complex[Tensor, "n f"]) -> None:
        """The same of rows that are 1 at one coordinate and 0 elsewhere."""
        places, factors = self._kept("places", torch.view_as_real(out), lambda: (self.places, self.factors))
        sums = factors.new_zeros(len(index), self.k)
        sums.scatter_(1, places[index][:, None], factors[index][:, None])
        torch.fft.rfft(sums, out=out)

    def placed(self, x: Float[Tensor, "*n length"]) -> Float[Tensor, "*n w"]:
        """The sums of each row; those behind its end, which are 0, are left out where every coordinate is its place."""
        total: Tensor | None = None
        for start, (source, factors) in enumerate(self._kept("pieces", x, self._pieces)):
            some = x[..., start * self.k : (start + 1) * self.k]
            some = (some if source is None else some.index_select(-1, source)) * factors
            total = some if total is None else total.add_(some)
        assert total is not None
        return total

    def _pieces(self) -> list[tuple[Tensor | None, Tensor]]:
        """For each piece which coordinate every sum takes, and its factor."""
        if torch.equal(self.places, torch.arange(len(self.places))):
            return [(None, self.factors)]
        pieces: list[tuple[Tensor | None, Tensor]] = []
        for places, factors in zip(torch.split(self.places, self.k), torch.split(self.factors, self.k), strict=True):
            source = torch.zeros(self.k, dtype=torch.long).index_copy_(0, places, torch.arange(len(places)))
            pieces.append((source, factors.new_zeros(self.k).index_copy_(0, places, factors)))
        return pieces

    def _matrix(self) -> Float[Tensor, "length f2"]:
        """The spectrum of every coordinate, real and imaginary parts in turn."""
        turns = self.places[:, None] * torch.arange(self.k // 2 + 1) % self.k
        waves = torch.polar(self.factors[:, None].abs().expand(turns.shape), turns.double() * (-2 * math.pi / self.k))
        return torch.view_as_real(waves * self.factors.sign()[:, None]).flatten(1)

    def _kept(self, name: str, like: Tensor, make: Callable[[], Any]) -> Any:
        """What `make` gives, where and in the precision in which it meets `like`."""
        key = (name, like.dtype, like.device)
        if key not in self._known:
            self._known[key] = _moved(make(), like)
        return self._known[key]


def _first(places: np.ndarray[Any, np.dtype[np.int64]], length: int) -> Int[Tensor, " length"]:
    return torch.from_numpy(places.reshape(-1)[:length].copy())


def _moved(x: Any, like: Tensor) -> Any:
    if isinstance(x, Tensor):
        return x.to(like) if x.is_floating_point() else x.to(like.device)
    return type(x)(_moved(part, like) for part in x) if isinstance(x, (list, tuple)) else x


@final
@dataclass(frozen=True, eq=False)
class SketchProjector(AbstractProjector):
    """The map of any space to the k numbers of one sketch."""

    space: Space
    sketch: Sketch
    _known: dict[str, tuple[Side, Side]] = field(default_factory=dict, repr=False)

    def apply(self, rows: Rows) -> Rows:
        """Projected rows, written out."""
        k, per_layer = self.sketch.k, self.sketch.per_layer
        kept = {name for name, block in rows.blocks.items() if per_layer and math.prod(block.shape) <= k}
        projected = {name: rows.blocks[name].dense().flatten(1) for name in kept}
        mixed = {name: block for name, block in rows.blocks.items() if name not in kept}
        together = {name: {name: block} for name, block in mixed.items()} if per_layer else {JOINT: mixed}
        for name, some in together.items():
            projected[name] = self._sketched(some)
        return Rows({name: Dense(projected[name]) for name in self.space.blocks})

    def _sketched(self, blocks: Mapping[str, AbstractBlock]) -> Float[Tensor, "n k"]:
        """The sum of the sketches of all blocks, a few rows at a time."""
        first = next(iter(blocks.values()))
        like, k = first.reference, self.sketch.k
        sketch = torch.empty(len(first), k, dtype=like.dtype, device=like.device)
        workspace = _Workspace(k, torch.promote_types(like.dtype, torch.float32), like.device)
        for some in chunks(len(first), k, _CACHED):
            total = workspace.spectra("total", some.stop - some.start).zero_()
            for name, block in blocks.items():
                self._add(name, block.take(some), total, workspace)
            _write_out(total, sketch[some])
        return sketch

    def _add(self, name: str, block: AbstractBlock, total: Complex[Tensor, "n f"], workspace: _Workspace) -> None:
        """Add the transform of the k sums of every row, by the cheaper of two ways to the same numbers."""
        if isinstance(block, Sum):
            for part in block.parts:
                self._add(name, part, total, workspace)
            return
        left, right = self._sides(name, block.shape)
        if block.reference.dtype != workspace.dtype:
            block = block.to(workspace.dtype)
        if not isinstance(block, (Outer, Conv, Indexed)) or self._is_cheaper_written_out(block, left, right):
            total += self._of_dense(block, left, right)
            return
        terms = _terms(block)
        for some in chunks(len(block), terms * self.sketch.k, _CACHED):
            part = block.take(some)
            outer = part.outer() if isinstance(part, Conv) else part
            n = len(outer) * terms
            a, b = workspace.spectra("left", n), workspace.spectra("right", n)
            if isinstance(outer, Indexed):
                left.transform_at(outer.index.flatten(), a)
                right.transform(outer.values.flatten(0, 1), b)
            else:
                left.transform(outer.left.flatten(0, 1), a)
                right.transform(outer.right.flatten(0, 1), b)
            if terms == 1:
                total[some].addcmul_(a, b)
            else:
                total[some] += a.mul_(b).reshape(len(outer), terms, -1).sum(1)

    def _is_cheaper_written_out(self, block: Outer | Conv | Indexed, left: Side, right: Side) -> bool:
        size, terms = math.prod(block.shape), _terms(block)
        products = terms * (left.cost + right.cost + self.sketch.k)
        return terms * size / _PRODUCTS + 2 * size + self.sketch.k < products

    def _of_dense(self, block: AbstractBlock, left: Side, right: Side) -> Complex[Tensor, "n f"]:
        """Rows written out: along the longer side they are brought to their places, then moved round and added."""
        k, (o, i) = self.sketch.k, matrix_shape(block.shape)
        long, short = (right, left) if o <= i else (left, right)
        sums = torch.zeros(len(block), 2 * k, dtype=block.reference.dtype, device=block.reference.device)
        turned = list(zip(short.places.tolist(), short.factors.tolist(), strict=True))
        for some in chunks(len(block), o * i, _WRITTEN_OUT):
            dense = block.take(some).dense().reshape(-1, o, i)
            placed = long.placed(dense if o <= i else dense.mT)
            for number, (place, factor) in enumerate(turned):
                sums[some, place : place + placed.shape[-1]].add_(placed[:, number], alpha=factor)
        spectrum: Tensor = torch.fft.rfft(sums[:, :k] + sums[:, k:])
        return spectrum

    def _sides(self, name: str, shape: tuple[int, ...]) -> tuple[Side, Side]:
        """Those of outputs and of inputs."""
        if name not in self._known:
            k, seed, (o, i) = self.sketch.k, self.sketch.seed, matrix_shape(shape)
            self._known[name] = Side.of_outputs(o, k, seed, name, "output"), Side.of_inputs(i, k, seed, name, "input")
        return self._known[name]


def _terms(block: Outer | Conv | Indexed) -> int:
    return block.index.shape[1] if isinstance(block, Indexed) else block.terms


@dataclass(eq=False)
class _Workspace:
    """Places for spectra, used again for every few rows: fresh memory would cost as much as what is computed."""

    k: int
    dtype: torch.dtype
    device: torch.device

    def __post_init__(self) -> None:
        self._places: dict[str, Tensor] = {}

    def spectra(self, name: str, n: int) -> Complex[Tensor, "n f"]:
        """Room for so many, with anything in it."""
        if name not in self._places or len(self._places[name]) < n:
            kind = torch.complex128 if self.dtype == torch.float64 else torch.complex64
            self._places[name] = torch.empty(n, self.k // 2 + 1, dtype=kind, device=self.device)
        return self._places[name][:n]


def _write_out(spectrum: Complex[Tensor, "n f"], out: Float[Tensor, "n k"]) -> None:
    """A spectrum times sqrt(2 / k) as k real numbers with the inner products of the sums that it was made from."""
    k = out.shape[1]
    numbers = torch.view_as_real(spectrum).flatten(1)
    torch.mul(numbers[:, 0], math.sqrt(0.5), out=out[:, 0])
    if k % 2 == 0:
        torch.mul(numbers[:, k], math.sqrt(0.5), out=out[:, 1])
    rest = 2 - k % 2
    out[:, rest:] = numbers[:, 2 : 2 + k - rest]
