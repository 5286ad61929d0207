"""The projection and the eigenbasis that an index stores its rows in, fitted once and kept in a file of their own."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final, final

import torch
from jaxtyping import Float
from torch import Tensor

from ..core.distributed import World
from ..core.errors import InvalidInput, SolveFailed, TooLarge
from ..core.indexing import spread_sample
from ..curvature.base import AbstractCurvature, Budget
from ..curvature.kronecker.records import EKFAC, AbstractKronecker
from ..damping.rules import AbstractDamping, as_damping
from ..gradients.per_example import Derivatives
from ..gradients.projections import AbstractProjector
from ..gradients.sketches import EIGENVECTORS, TwoSided, TwoSidedProjector
from ..influence.attribution import Influence
from ..linalg.eigenbasis import Eigenbasis, EigenPart
from ..linalg.kronecker import Kronecker
from ..linalg.kronecker_block import KroneckerBlock
from ..linalg.operator import AbstractSymmetric, mean_determined
from ..linalg.rows import Rows
from ..linalg.shift import Shift
from ..linalg.space import BlockSpec, Space
from ..scaling.base import Raw
from ..solvers.auto import Auto
from ..solvers.base import AbstractSolver
from ..solvers.direct import Spectral
from ..solvers.forecast import Composition
from .codecs import AbstractCodec, column_sizes
from .layouts import AbstractLayout, ColumnLayout, FactorLayout
from .representation import Factors, Representation
from .shard_files import MappedFile

# Examples whose coordinates tell the sizes of the columns.
_SAMPLED: Final = 512
_FEWEST: Final = 256
_SIDES: Final = ("left", "right")


def check_method(method: Any) -> Influence:
    """Refuse a method whose solves are no division in an eigenbasis.

    Raises:
        InvalidInput: it is none of ours, or has settings that an index would leave out.
    """
    if not isinstance(method, Influence):
        raise InvalidInput(
            f"An index is built by an Influence(...) such as ptif.ekfac(), not by {type(method).__name__}; for several "
            "checkpoints build one index each."
        )
    for name, unused in (("preconditioner", None), ("truncation", None), ("weights", None), ("projection", None)):
        if getattr(method, name) is not unused:
            instead = "; the projection of an index is its representation=" if name == "projection" else ""
            raise InvalidInput(f"An index has no use for {name}={getattr(method, name)!r}{instead}; leave it out.")
    check_damping(method.damping)
    if method.scaling != Raw():
        raise InvalidInput(
            f"An index holds raw scores, not scaling={method.scaling!r}; leave it out, and ask with normalised=True."
        )
    return method


def check_damping(damping: AbstractDamping | float | None) -> None:
    """Refuse a rule that measures gradients of the training data, of which an index keeps the curvature only.

    Args:
        damping: a rule or a number; None: that of the method.

    Raises:
        InvalidInput: it is such a rule.
    """
    if damping is not None and (rule := as_damping(damping)).measures_gradients:
        raise InvalidInput(
            f"An index cannot measure damping={rule!r}, which looks at a fitted model; use PerDirection(), or "
            "Absolute(value) with the value that ptif.attribute(..., method=ptif.ekfac(damping=...)) shows as "
            "scores.diagnostics.damping."
        )


def composition_of(method: Influence) -> tuple[Composition, AbstractDamping]:
    """Curvature, the solver that divides in its eigenbasis, and the damping that belongs to the method."""
    curvature: AbstractCurvature = method.curvature or EKFAC()
    asked = None if isinstance(method.solver, Auto) else method.solver
    solver: AbstractSolver[Any] = asked if asked is not None and asked.is_blockwise else Spectral()
    default = (asked or solver).default_damping(curvature)
    return Composition(curvature, solver, "asked for"), default if method.damping is None else as_damping(
        method.damping
    )


@final
@dataclass(frozen=True, eq=False)
class Scale:
    """The size of a curvature per parameter, whatever the gradients are projected to.

    Random signs keep the trace on average, and few numbers then share what many parameters had: a damping in units of
    their mean would be too large by parameters over numbers.

    Args:
        means: trace(C_bb) of every block over its number of parameters.
        sizes: that number.
        directions: the most eigenvalues that can differ from zero; inf: not known.
    """

    means: Mapping[str, float]
    sizes: Mapping[str, int]
    directions: float = math.inf

    @staticmethod
    def of(operator: AbstractSymmetric, whole: Space) -> Scale:
        """Of the curvature of (projected) gradients, where the parameters are those of `whole`."""
        means, space = operator.block_means(), operator.space
        sizes = {k: whole.numel(k) if k in whole.blocks else whole.size for k in space.blocks}
        own = {k: means[k] * space.numel(k) / sizes[k] for k in space.blocks}
        return Scale(own, sizes, operator.directions)

    def block_means(self) -> dict[str, float]:
        """trace(C_bb) of every block over its number of parameters."""
        return dict(self.means)

    def mean_eigenvalue(self) -> float:
        """trace(C) over the number of parameters."""
        return sum(mean * self.sizes[name] for name, mean in self.means.items()) / sum(self.sizes.values())

    def mean_determined(self) -> float:
        """trace(C) over the number of eigenvalues that can differ from zero."""
        return mean_determined(self.means, self.sizes, self.directions)


@final
@dataclass(frozen=True, eq=False)
class FittedBasis:
    """What stays the same for all rows of an index.

    Args:
        whole: the space of all parameters.
        basis: of the (projected) curvature with the weight decay; its vectors in the rows' precision.
        projector: the projection of gradients; None: none.
        columns: what columns are divided by before they are stored.
        scale: of the curvature, which damping rules ask for.
        damping: per block, of the method.
        notes: what should be read with the scores.
    """

    whole: Space
    basis: Eigenbasis
    projector: AbstractProjector | None
    columns: Tensor
    scale: Scale
    damping: Mapping[str, float]
    notes: tuple[str, ...]

    def inverse(self, damping: AbstractDamping | float | None) -> tuple[Float[Tensor, " k"], float]:
        """1 / (eigenvalue + damping) per coordinate, and the mean damping.

        Args:
            damping: a rule or a number; None: that of the method.

        Raises:
            InvalidInput: the rule measures gradients.
            SolveFailed: an eigenvalue with its damping is not positive.
        """
        check_damping(damping)
        space, per_block = self.basis.space, dict(self.damping)
        if damping is not None:
            rule = as_damping(damping)
            per_block = rule.blocks(self.scale) or dict.fromkeys(space.blocks, rule.of(self.scale))
        total = self.basis.values + self.basis.spread(per_block)
        smallest, largest = float(total.min()), float(total.max())
        if not smallest > 1e-14 * abs(largest):
            raise SolveFailed(
                f"The smallest eigenvalue of the curvature with damping is {smallest:.3g}, so it cannot be inverted; "
                "use a larger damping, such as Relative(0.1)."
            )
        mean = sum(d * space.numel(name) for name, d in per_block.items()) / space.size
        return 1.0 / total, mean

    def layout(self, representation: Representation, codec: AbstractCodec) -> AbstractLayout:
        """How rows are stored."""
        if isinstance(representation, Factors):
            return FactorLayout(self.basis, codec)
        return ColumnLayout(self.basis, codec, self.columns)

    def to_file(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Tensors, and a record of plain values."""
        tensors: dict[str, Tensor] = {"columns": self.columns}
        parts = []
        for number, part in enumerate(self.basis.parts):
            tensors[f"part.{number}.values"] = part.basis.values
            for side in _SIDES:
                vectors = getattr(part.basis, side)
                if vectors is not None:
                    tensors[f"part.{number}.{side}"] = vectors
            parts.append(list(part.names))
        measured = isinstance(self.projector, TwoSidedProjector) and self.projector.measured
        if measured and isinstance(self.projector, TwoSidedProjector):
            for number, sides in enumerate(self.projector.sides.values()):
                for side, matrix in zip(_SIDES, sides, strict=True):
                    if matrix is not None:
                        tensors[f"side.{number}.{side}"] = matrix
        record = {
            "parts": parts,
            "space": _describe_space(self.basis.space),
            "whole": _describe_space(self.whole),
            "means": dict(self.scale.means),
            "sizes": dict(self.scale.sizes),
            "directions": None if math.isinf(self.scale.directions) else self.scale.directions,
            "damping": dict(self.damping),
            "notes": list(self.notes),
        }
        return tensors, record

    @staticmethod
    def from_file(file: MappedFile, representation: Representation) -> FittedBasis:
        """What `to_file` gave.

        Args:
            file: the file.
            representation: that of the index.
        """
        tensors, record = file.tensors, file.record
        space, whole = _read_space(record["space"]), _read_space(record["whole"])
        parts = []
        for number, names in enumerate(record["parts"]):
            left, right = (tensors.get(f"part.{number}.{side}") for side in _SIDES)
            parts.append(EigenPart(tuple(names), KroneckerBlock(left, right, tensors[f"part.{number}.values"])))
        projector: AbstractProjector | None = None
        if isinstance(representation, TwoSided) and representation.basis == EIGENVECTORS:
            sides = {
                name: (tensors.get(f"side.{number}.left"), tensors.get(f"side.{number}.right"))
                for number, name in enumerate(whole.blocks)
            }
            projector = TwoSidedProjector.of(representation, whole, sides, measured=True)
        elif not isinstance(representation, Factors):
            projector = representation.projector(whole)
        basis = Eigenbasis(space, tuple(parts))
        directions = record.get("directions")  # not in indexes of earlier versions
        scale = Scale(dict(record["means"]), dict(record["sizes"]), math.inf if directions is None else directions)
        damping = {k: float(v) for k, v in record["damping"].items()}
        return FittedBasis(whole, basis, projector, tensors["columns"], scale, damping, tuple(record["notes"]))


def _describe_space(space: Space) -> dict[str, Any]:
    blocks = [[b.name, list(b.parameters), list(b.shape), b.transposed, b.decay] for b in space.blocks.values()]
    return {"blocks": blocks, "shapes": {name: list(shape) for name, shape in space.shapes.items()}}


def _read_space(stored: Mapping[str, Any]) -> Space:
    blocks = {b[0]: BlockSpec(b[0], tuple(b[1]), tuple(b[2]), bool(b[3]), float(b[4])) for b in stored["blocks"]}
    return Space(blocks, {name: tuple(shape) for name, shape in stored["shapes"].items()})


def fit_basis(
    method: Influence,
    representation: Representation,
    codec: AbstractCodec,
    derivatives: Derivatives,
    rows: Sequence[Rows] = (),
) -> FittedBasis:
    """Fit the curvature of the (projected) gradients and decompose it.

    Args:
        method: whose curvature and damping.
        representation: what is kept of a gradient.
        codec: how its numbers are stored.
        derivatives: how gradients are taken, not projected.
        rows: gradients of some examples drawn at random, which tell the sizes of the columns; of too few: others are
            taken.

    Raises:
        InvalidInput: the curvature has no eigenbasis.
        TooLarge: it would not fit in the method's memory.
    """
    budget = Budget.of(method.memory)
    composition, rule = composition_of(method)
    projector = make_projector(representation, composition.curvature, derivatives, budget)
    projected = derivatives if projector is None else replace(derivatives, projector=projector)
    try:
        operator = composition.solver.operator(composition.curvature, projected, budget)
        composition.solver.check_memory(operator, budget)
    except TooLarge as cause:
        raise TooLarge(
            f"{cause} For an index of {composition.curvature!r} take a representation= with fewer numbers, or "
            "method=ptif.ekfac()."
        ) from cause
    space = projected.space
    parts = operator.eigenparts(space.decay)
    if parts is None:
        raise InvalidInput(
            f"{composition.curvature!r} has no eigenbasis in which rows could be stored; use ptif.ekfac(), "
            "ptif.methods.kfac(), ptif.methods.shampoo() or, for projected rows, ptif.exact() or ptif.dual()."
        )
    like = derivatives.whole.like(derivatives.problem.model)
    dtype = torch.promote_types(like.dtype, torch.float32)
    basis = Eigenbasis(space, parts).to(dtype, like.device)
    scale = Scale.of(operator, derivatives.whole)
    shift = composition.solver.damped(operator, Shift(rule.of(scale), blocks=rule.blocks(scale)))
    columns = torch.ones(0)
    if not isinstance(representation, Factors):
        columns = _measure_columns(basis, projected, rows) if codec.scales_columns else torch.ones(basis.size)
    notes = tuple(getattr(operator, "notes", ()))
    fitted = FittedBasis(derivatives.whole, basis, projector, columns, scale, shift.over(space.blocks), notes)
    fitted.inverse(None)
    return fitted


def _measure_columns(basis: Eigenbasis, projected: Derivatives, rows: Sequence[Rows]) -> Tensor:
    projector = projected.projector
    if projector is not None and sum(map(len, rows)) >= min(_FEWEST, len(projected.problem)):
        return column_sizes(torch.cat([basis.coordinates(projector.apply(some)) for some in rows]))
    ids = spread_sample(len(projected.problem), _SAMPLED)
    batches = projected.stream(ids=ids, label="sizes of the columns", world=World())
    return column_sizes(torch.cat([basis.coordinates(g.rows) for g in batches]))


def make_projector(
    representation: Representation, curvature: AbstractCurvature, derivatives: Derivatives, budget: Budget
) -> AbstractProjector | None:
    """The projection of gradients; None where nothing is projected."""
    if isinstance(representation, Factors):
        return None
    if not isinstance(representation, TwoSided) or representation.basis != EIGENVECTORS:
        return representation.projector(derivatives.whole)
    measuring = curvature if isinstance(curvature, AbstractKronecker) else EKFAC()
    fitted = measuring.of(derivatives, measuring.forms[0], budget)
    assert isinstance(fitted, Kronecker)
    sides = {}
    for name, block in fitted.blocks.items():
        kept = representation.shape_of(derivatives.whole.blocks[name])
        # The squared size of the gradient along each eigenvector of a side.
        sides[name] = (
            _leading(block.left, block.values.sum(1), kept[0]),
            _leading(block.right, block.values.sum(0), kept[1]),
        )
    return TwoSidedProjector.of(representation, derivatives.whole, sides, measured=True)


def _leading(vectors: Tensor | None, energies: Tensor, k: int) -> Tensor | None:
    """The k directions with the largest energies, [length, k]; None where there are no more."""
    length = len(energies)
    if k >= length:
        return None
    chosen = torch.argsort(energies, descending=True, stable=True)[:k]
    if vectors is not None:
        return vectors[:, chosen].contiguous()
    return torch.zeros(length, k).index_put_((chosen, torch.arange(k)), torch.ones(k))
