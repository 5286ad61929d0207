"""The Hessian of any loss in the model's outputs, by differentiating it twice."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import final

import torch
from jaxtyping import Float
from torch import Tensor

from ..core.batches import batch_slice, map_tensors
from ..core.errors import InfluenceError, NotLikelihood, first_line
from .base import AbstractObjective, AbstractOutputCurvature, Batch, inputs_and_targets, with_targets
from .draws import Randomness, draw

# So many outputs of an example may depend on each other: their Hessian is written out.
_COUPLED = 256
# Up to so many outputs it is written out without asking which of them depend on each other.
_FEW = 16
# Numbers of written-out Hessians that are held at once.
_NUMBERS = 1 << 24
# It needs nothing but gradients.
_WAY_OUT = "use the empirical Fisher instead, as ptif.dual() and ptif.ekfac(fisher=ptif.curvature.EmpiricalFisher()) do"


def output_curvature(objective: AbstractObjective) -> AbstractOutputCurvature:
    """The objective's own Hessian in the outputs where it knows one, else its second derivative.

    Args:
        objective: a loss.
    """
    return objective if isinstance(objective, AbstractOutputCurvature) else Differentiated(objective)


def no_curvature(objective: AbstractObjective, examples: int) -> NotLikelihood:
    """The error for a loss whose second derivative in the outputs is 0 everywhere.

    Args:
        objective: the loss.
        examples: on how many it was looked at.
    """
    return NotLikelihood(
        f"{loss_name(objective)} has no curvature in the model's outputs: its second derivative is 0 at all {examples} "
        f"examples looked at, as that of a piecewise linear loss is, and so is its Gauss-Newton matrix; {_WAY_OUT}."
    )


def loss_name(objective: AbstractObjective) -> str:
    """What a loss is called in a sentence: a function's own name rather than that of the record around it.

    Args:
        objective: a loss.
    """
    function = getattr(objective, "function", objective)
    return str(getattr(function, "__name__", type(function).__name__))


@final
@dataclass(frozen=True, eq=False)
class Differentiated(AbstractOutputCurvature):
    """The Hessian of any loss in the outputs, by automatic differentiation of the loss alone.

    It is computed in float64 where the loss can be, so that a loss that is nearly flat does not look curved downwards.
    Outputs that do not depend on each other (pixels, tokens) are found by trying, and only blocks that do are written
    out. Each block must be positive semi-definite: the loss must be convex in the outputs.

    Args:
        objective: the loss.

    Raises:
        NotLikelihood: when used, an example's loss is not convex in its outputs, has no second derivative, or couples
            more outputs than can be written out.
    """

    objective: AbstractObjective

    def sample_cotangent(
        self, outputs: Float[Tensor, "n *out"], batch: Batch, generator: Randomness = None
    ) -> Float[Tensor, "n *out"]:
        signs = torch.where(draw(outputs, generator) < 0.5, -1.0, 1.0).to(torch.float64)

        def turn(blocks: Blocks, part: slice) -> Tensor:
            return blocks.apply(signs[part], blocks.roots())

        return self._by_parts(outputs, batch, turn)

    def root(self, outputs: Float[Tensor, "n *out"], batch: Batch) -> Float[Tensor, "k n *out"]:
        def columns(blocks: Blocks, part: slice) -> Tensor:
            roots = blocks.roots()
            n, length, size, _ = roots.shape
            place = torch.eye(length, dtype=roots.dtype, device=roots.device)
            spread = torch.einsum("nacj,ab->najbc", roots, place).reshape(n, length * size, length, size)
            return blocks.unfold(spread)

        return self._by_parts(outputs, batch, columns).movedim(1, 0)

    def root_size(self, outputs: Float[Tensor, "n *out"]) -> int:
        return outputs[0].numel()

    def hessian_map(self, outputs: Float[Tensor, "n *out"], batch: Batch) -> Callable[[Tensor], Tensor]:
        n, parts = len(outputs), list(self._parts(outputs, batch))

        def product(v: Tensor) -> Tensor:
            wide = v.to(torch.float64)
            each = [blocks.apply(wide[part], blocks.values) for part, blocks in parts]
            return torch.cat(each).to(v.dtype) if n else v

        return product

    def blocks_of(self, outputs: Float[Tensor, "n *out"], batch: Batch) -> Iterator[Blocks]:
        """The Hessians of all examples in the smallest blocks that hold them, some examples at a time.

        Args:
            outputs: the model's outputs, one per example along the first axis.
            batch: the batch that the outputs came from.
        """
        for _, blocks in self._parts(outputs, batch):
            yield blocks

    def _blocks(self, outputs: Tensor, batch: Batch) -> Blocks:
        slope = _Slope.of(self.objective, outputs, batch)
        for axis in _axes(outputs):
            blocks = slope.blocks(axis)
            if axis is None or slope.agrees(blocks):
                return blocks
        raise NotLikelihood(
            f"{loss_name(self.objective)} couples the {outputs[0].numel():,} outputs of an example, and its second "
            f"derivative is written out for at most {_COUPLED} that depend on each other; {_WAY_OUT}."
        )

    def _parts(self, outputs: Tensor, batch: Batch) -> Iterator[tuple[slice, Blocks]]:
        """Some examples at a time, so that what is written out stays small."""
        size = outputs[0].numel() if len(outputs) else 1
        step = max(1, _NUMBERS // (size * min(size, _COUPLED)))
        n = len(outputs)
        for start in range(0, n, step):
            part = slice(start, min(n, start + step))
            yield part, self._blocks(outputs[part], batch_slice(batch, n, part))

    def _by_parts(self, outputs: Tensor, batch: Batch, use: Callable[[Blocks, slice], Tensor]) -> Tensor:
        return torch.cat([use(blocks, part) for part, blocks in self._parts(outputs, batch)]).to(outputs.dtype)


@final
@dataclass(frozen=True, eq=False)
class Blocks:
    """Symmetric blocks of every example's Hessian, one for each group of outputs that depend on each other.

    Args:
        values: [n, groups, size, size] in float64.
        axis: the axis of the outputs that runs over a group's members; 0: each output is a group; None: all are one.
        shape: of the outputs.
        name: of the loss.
    """

    values: Float[Tensor, "n l c c"]
    axis: int | None
    shape: tuple[int, ...]
    name: str

    def apply(self, v: Float[Tensor, "n *out"], matrices: Float[Tensor, "n l c c"]) -> Float[Tensor, "n *out"]:
        """Block times vector, for matrices of the form of `values`."""
        return _unfolded(torch.einsum("nlcd,nld->nlc", matrices, _folded(v, self.axis)), self.axis, self.shape)

    def unfold(self, columns: Float[Tensor, "n k l c"]) -> Float[Tensor, "n k *out"]:
        """Several vectors per example, in the shape of the outputs."""
        n, k = columns.shape[:2]
        flat = _unfolded(columns.flatten(0, 1), self.axis, self.shape)
        return flat.reshape(n, k, *self.shape[1:])

    def roots(self) -> Float[Tensor, "n l c c"]:
        """R with R Rᵀ = H, block by block.

        Raises:
            NotLikelihood: a block has a negative eigenvalue.
        """
        values, vectors = torch.linalg.eigh(self.values)
        self._refuse(values)
        root: Tensor = vectors * values.clamp_min(0.0).sqrt()[..., None, :]
        return root

    def refuse_negative(self) -> None:
        """Refuse blocks that are not positive semi-definite.

        Raises:
            NotLikelihood: one has a negative eigenvalue.
        """
        self._refuse(torch.linalg.eigvalsh(self.values))

    def _refuse(self, values: Tensor) -> None:
        worst = _most_negative(values)
        if bool((worst < 0).any()):
            raise NotLikelihood(
                f"{self.name} is not convex in the model's outputs (its second derivative there has an eigenvalue of "
                f"{float(worst.min()):.3g}), so its Gauss-Newton matrix would not be positive semidefinite; {_WAY_OUT}."
            )


def _most_negative(values: Float[Tensor, "n l c"]) -> Float[Tensor, " n"]:
    flat = values.flatten(1)
    # What is smaller than this beside the largest number is rounding, of float32 where the loss refuses float64.
    room = 1e-6 * flat.abs().amax(1) + 1e-9 * flat.abs().max()
    low = flat.amin(1)
    return torch.where(low < -room, low, torch.zeros_like(low))


def _axes(outputs: Tensor) -> list[int | None]:
    """Which groups of outputs to try, the smallest first."""
    shape = tuple(outputs.shape)
    size = outputs[0].numel() if len(outputs) else 1
    if size <= _FEW:
        return [None]
    several = [axis for axis in {1, len(shape) - 1} if len(shape) > 2 and 1 < shape[axis] <= _COUPLED]
    return [0, *sorted(several), *([None] if size <= _COUPLED else [])]


def _folded(v: Float[Tensor, "n *out"], axis: int | None) -> Float[Tensor, "n l c"]:
    """Outputs as groups of members that depend on each other."""
    if axis is None:
        return v.reshape(len(v), 1, -1)
    if axis == 0:
        return v.reshape(len(v), -1, 1)
    return v.movedim(axis, -1).flatten(1, -2)


def _unfolded(folded: Float[Tensor, "n l c"], axis: int | None, shape: tuple[int, ...]) -> Float[Tensor, "n *out"]:
    if not axis:
        return folded.reshape(-1, *shape[1:])
    rest = [d for i, d in enumerate(shape) if i not in (0, axis)]
    return folded.reshape(-1, *rest, shape[axis]).movedim(-1, axis)


@dataclass(frozen=True, eq=False)
class _Slope:
    """The derivative of every example's loss in its outputs, ready to be differentiated once more."""

    leaf: Tensor
    slope: Tensor
    name: str

    @staticmethod
    def of(objective: AbstractObjective, outputs: Tensor, batch: Batch) -> _Slope:
        name = loss_name(objective)
        try:
            return _Slope.at(objective, outputs.double(), _doubled(batch), name)
        except Exception:  # the loss holds float32 numbers of its own and takes no others
            pass
        try:
            return _Slope.at(objective, outputs, batch, name)
        except (RuntimeError, NotImplementedError) as reason:
            if isinstance(reason, InfluenceError):
                raise
            raise _no_second_derivative(name, reason) from reason

    @staticmethod
    def at(objective: AbstractObjective, outputs: Tensor, batch: Batch, name: str) -> _Slope:
        leaf = outputs.detach().requires_grad_()
        with torch.enable_grad():
            losses = objective.losses(leaf, batch)
            (slope,) = torch.autograd.grad(losses.sum(), leaf, create_graph=True, materialize_grads=True)
            result = _Slope(leaf, slope, name)
            result.product(torch.ones_like(leaf))
        return result

    def product(self, v: Tensor) -> Float[Tensor, "n *out"]:
        """H v in float64."""
        if not self.slope.requires_grad:
            return torch.zeros_like(self.leaf, dtype=torch.float64)
        (product,) = torch.autograd.grad(
            (self.slope * v.to(self.slope)).sum(), self.leaf, retain_graph=True, materialize_grads=True
        )
        return product.detach().double()

    def blocks(self, axis: int | None) -> Blocks:
        """The blocks, if outputs of different groups do not depend on each other."""
        like = _folded(self.leaf.detach().double(), axis)
        size, shape = like.shape[-1], tuple(self.leaf.shape)
        # A sign for each group: what a group takes from another does not show as its own, but in `agrees`.
        signs = _signs(like[..., 0], seed=0)
        columns = []
        for member in range(size):
            v = torch.zeros_like(like)
            v[..., member] = signs
            columns.append(_folded(self.product(_unfolded(v, axis, shape)), axis) * signs[..., None])
        values = torch.stack(columns, -1)
        return Blocks((values + values.mT) / 2, axis, shape, self.name)

    def agrees(self, blocks: Blocks) -> bool:
        """Whether the blocks are all of the Hessian, tried on a random vector."""
        v = _signs(self.leaf, seed=1)
        expected, product = self.product(v), blocks.apply(v, blocks.values)
        return bool((product - expected).norm() <= 1e-5 * expected.norm())


def _no_second_derivative(name: str, reason: Exception) -> NotLikelihood:
    return NotLikelihood(
        f"torch has no second derivative of {name} in the model's outputs ({first_line(reason)}), which a Gauss-Newton "
        f"matrix is made of; {_WAY_OUT}."
    )


def _signs(like: Tensor, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    uniform = torch.rand(like.shape, generator=generator, dtype=torch.float64)
    return torch.where(uniform < 0.5, -1.0, 1.0).to(like.device, torch.float64)


def _doubled(batch: Batch) -> Batch:
    """The batch with targets of real numbers in float64."""
    targets = inputs_and_targets(batch)[2]
    return with_targets(batch, map_tensors(targets, lambda t: t.double() if t.is_floating_point() else t))
