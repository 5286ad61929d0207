"""Fitting Kronecker-factored curvature: as few passes as memory allows, block by block on disk where asked."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeAlias

import torch
from torch import Tensor

from ...core.distributed import World, current
from ...core.errors import NonFinite
from ...gradients.per_example import Derivatives, Tape
from ...linalg.blocks import AbstractBlock, Conv, Indexed, Outer, matrix_shape
from ...linalg.kronecker import Kronecker
from ...linalg.kronecker_block import KroneckerBlock
from ...linalg.rows import Rows
from ...objectives.base import AbstractObjective
from ...objectives.differentiated import output_curvature
from ...problem.checkpoints import Checkpoint, at_checkpoint
from ...problem.data import Source
from ...problem.problem import first_batch, sweep
from ..base import Budget
from ..cost import BlockSize, terms_of
from ..exact import GGN, Fisher, finite_outputs
from ..fisher import AbstractFisher
from ..own_losses import require_output_curvature
from .cache import FactorCache, fingerprint_factors
from .moments import BlockFactors, teaching_terms, unified
from .plan import (
    KEPT_SHARE,
    Plan,
    check_layers,
    columns_by_default,
    needed_examples,
    nested_samples,
    numbers_of,
    stretches,
    workspace_of,
)

AtCheckpoint: TypeAlias = tuple[Checkpoint | None, Derivatives]
Columns: TypeAlias = dict[str, list[AbstractBlock]]
"""Rows of one batch: per block, one entry per column of the Fisher matrix's root."""


@dataclass(eq=False)
class Fit:
    """One fit; `run` gives the operator."""

    plan: Plan
    members: list[AtCheckpoint]
    budget: Budget
    world: World = field(default_factory=current)
    columns: int = 1
    ids: Mapping[str, Tensor] = field(default_factory=dict)
    """Of every block, the examples that its basis is measured on: those of a block that needs fewer are among them."""
    more: Mapping[str, Tensor] = field(default_factory=dict)
    """Likewise the examples that its eigenvalues are measured on."""
    wide: Source | None = None
    counted: float | None = None
    """The output directions of this process's share of `_shared`, once a pass has gone over them."""

    def run(self) -> Kronecker:
        """Measure every block, in groups that fit in memory.

        Raises:
            NotLikelihood, TooLarge, NonFinite, SolveFailed: see `EKFAC`.
        """
        first = self.members[0][1]
        look = self._look()
        fisher, columns = self._fisher(look)
        self.plan = replace(self.plan, fisher=fisher)
        self.columns = columns
        self.ids, self.more = self._ids(look)
        self.wide = first.batched(first.problem.data)
        shapes = [b.shape for b in look.blocks.values()]
        numbers = sum(numbers_of(shape, self.plan) for shape in shapes)
        # With what decomposing the largest takes, while all are held.
        size = (numbers + max(workspace_of(shape, self.plan.largest) for shape in shapes)) * look.dtype.itemsize
        cache = self._cache(size)
        # Read and verified; kept in memory where all blocks have room there.
        on_disk = iter(()) if cache is None else cache.finished_by_all(self.world)
        stored = {name: block if size <= self.budget.bytes else None for name, block in on_disk}
        fitted: dict[str, KroneckerBlock] = {}
        for group in self._groups([k for k in look.blocks if k not in stored], look):
            finished = self._fit({name: look.blocks[name] for name in group}, cache)
            # What is on disk and has no room in memory is not kept there.
            fitted |= finished if size <= self.budget.bytes else {}
            del finished
        blocks: Mapping[str, KroneckerBlock] = fitted
        if cache is not None and size > self.budget.bytes:
            blocks = cache.blocks()
        elif cache is not None:
            present = fitted | {k: b for k, b in stored.items() if b is not None}
            blocks = {name: present[name] for name in look.blocks}
        notes = () if cache is None else cache.notes
        return Kronecker(first.space, blocks, (*notes, *self._notes(look, blocks)), self._output_directions())

    def _notes(self, look: Rows, blocks: Mapping[str, KroneckerBlock]) -> tuple[str, ...]:
        """What should be read with the result: layers without gradient, and bases measured on too little."""
        notes, short, long = [], [], []
        for name, block in look.blocks.items():
            terms = teaching_terms(block)
            count = int(len(self.ids[name]) * len(self.members) * terms * (self.columns if terms_of(block) == 1 else 1))
            if float(blocks[name].values.abs().max()) == 0.0:
                notes.append(f"no training example moves {name!r}: its gradients are all zero, and so is its influence")
            elif isinstance(block, (Outer, Conv)) and count < self._side(block):
                short.append(f"{name!r} ({count:,} gradients, side {self._side(block):,})")
            # An embedding's own side is one-hot, and so a diagonal without any loss.
            if not isinstance(block, Indexed) and max(matrix_shape(block.shape)) > self.plan.largest:
                long.append(f"{name!r} is {max(matrix_shape(block.shape)):,} long")
        if long:
            notes.append(
                f"a side of {', '.join(long[:3])}{f' and {len(long) - 3} more' if len(long) > 3 else ''}, above "
                f"largest={self.plan.largest:,}: it keeps its coordinates as basis (its second moment is taken as "
                "diagonal), with eigenvalues measured in them"
            )
        if short:
            more = f" and {len(short) - 3} more" if len(short) > 3 else ""
            notes.append(
                f"fewer gradients than a factor's side is long at {', '.join(short[:3])}{more}: damping alone decides "
                "where none points, and sizes may be far off; after a short fine-tuning in small batches "
                "ptif.dual(ptif.curvature.Fisher(samples=3)) comes nearer, after a long one it does not"
            )
        return tuple(notes)

    # ---------------------------------------------------------------- what to do

    def _look(self) -> Rows:
        """Rows of a few examples: the form of every block, and what it costs."""
        checkpoint, derivatives = self.members[0]
        with at_checkpoint(derivatives.problem.model, checkpoint):
            together = replace(derivatives.problem.data, batch_size=min(4, len(derivatives.problem)))
            some = torch.arange(together.batch_size)
            with first_batch(derivatives.problem, together, some) as (ids, batch):
                return derivatives.loss_rows(ids, batch).rows

    def _fisher(self, look: Rows) -> tuple[AbstractFisher, int]:
        """Whose gradients are measured, and how many columns that is: exact by default where they are few and cheap."""
        derivatives = self.members[0][1]
        fisher = self.plan.fisher or GGN()
        if not fisher.given_labels:
            require_output_curvature(derivatives)
        columns = fisher.column_count(derivatives)
        sizes = [BlockSize.of(b) for b in look.blocks.values()]
        if self.plan.fisher is None and columns_by_default(columns, sizes) is None:
            return Fisher(samples=1), 1
        return fisher, columns

    def _ids(self, look: Rows) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """The examples that each basis, and the eigenvalues in it, are measured on: spread over all.

        A basis needs more terms than a side is long, which examples with many positions give sooner than eigenvalues
        are known to a few per cent. A layer that few positions reach, as the last of a classifier of texts, needs more
        examples than the others, which do not read them all for its sake.
        """
        n = len(self.members[0][1].problem)
        # Padding teaches nothing, and must not decide on how many examples the basis is measured.
        sizes = {
            name: replace(BlockSize.of(b), terms=max(1, round(teaching_terms(b)))) for name, b in look.blocks.items()
        }
        basis, values = needed_examples(self.plan, sizes)
        return nested_samples(n, basis), nested_samples(n, values)

    @property
    def _shared(self) -> Tensor:
        """The examples that the eigenvalues of all blocks are measured on."""
        return min(self.more.values(), key=len)

    def _side(self, block: AbstractBlock) -> int:
        """The longest side that is decomposed."""
        return max((d for d in matrix_shape(block.shape) if d <= self.plan.largest), default=0)

    def _cache(self, size: int) -> FactorCache | None:
        """Where finished blocks go: the folder that was asked for, or a temporary one where memory is too small."""
        first = self.members[0][1]
        names, device = tuple(first.space.blocks), first.problem.device
        if self.plan.folder is None:
            return FactorCache.temporary(size, self.budget, names, device) if size > self.budget.bytes else None
        samples = [*stretches(self.ids, names), *stretches(self.more, names)]
        # Where all blocks are measured on the same, as a set: which of it was read first changes nothing.
        every = torch.cat([ids for _, ids in samples])
        every = torch.unique(every) if len(samples) == 2 else every
        checkpoints = [checkpoint for checkpoint, _ in self.members]
        fingerprint = fingerprint_factors(self.plan.settings, first, checkpoints, every)
        return FactorCache.of(self.plan.folder, fingerprint, names, device)

    def _groups(self, names: list[str], look: Rows) -> Iterator[list[str]]:
        """Blocks that are fitted together: as many as the budget holds, with what decomposing one of them takes."""
        shapes, size = {k: look.blocks[k].shape for k in names}, look.dtype.itemsize
        check_layers(shapes, self.plan, size, self.budget)
        room = self.budget.bytes / size - max((workspace_of(s, self.plan.largest) for s in shapes.values()), default=0)
        group: list[str] = []
        filled = 0
        for name, shape in shapes.items():
            numbers = numbers_of(shape, self.plan)
            if group and filled + numbers > room:
                yield group
                group, filled = [], 0
            group.append(name)
            filled += numbers
        if group:
            yield group

    # ---------------------------------------------------------------- doing it

    def _fit(self, blocks: Mapping[str, AbstractBlock], cache: FactorCache | None) -> dict[str, KroneckerBlock]:
        plan = self.plan
        factors = {
            k: BlockFactors.of(
                k, b, plan.moments, plan.sharing, plan.largest, int(teaching_terms(b) * len(self.ids[k]))
            )
            for k, b in blocks.items()
        }
        alike = all(torch.equal(self.ids[k], self.more[k]) for k in blocks)
        keep = plan.corrected and alike and self._fits(blocks)
        kept: list[Columns] = []
        for names, ids in stretches(self.ids, tuple(blocks)):
            for one, other in self._batches(names, ids, (0, 1) if keep else (0,)):
                for name in names:
                    factors[name].see(one[name])
                if keep:
                    kept.append(other)
        weight = len(self.members) * self.fisher.averaged
        self._decompose(factors, weight)
        fitted = {}
        if plan.corrected:
            for columns in iter(kept) if keep else self._second_look(tuple(blocks)):
                for name, rows in columns.items():
                    factors[name].see_squares(rows)
        for name, factor in factors.items():
            block = self._finished(factor, len(self.more[name]) * weight)
            if cache is not None:
                cache.write_once(name, block, self.world)
            fitted[name] = block
        return fitted

    def _second_look(self, blocks: tuple[str, ...]) -> Iterator[Columns]:
        """The columns that eigenvalues are measured on, of the blocks that take part in each batch."""
        for names, ids in stretches(self.more, blocks):
            for _, columns in self._batches(names, ids, (1,)):
                yield columns

    def _decompose(self, factors: Mapping[str, BlockFactors], weight: int) -> None:
        """Sum the moments of every process's share of the data, and decompose them: each side on one process.

        Args:
            factors: of every block.
            weight: how often each example was seen.
        """
        sides = [(factor, axis, what) for factor in factors.values() for axis, what in factor.sides()]
        for _, axis, _ in sides:
            self.world.sum_into(axis.moment)
        terms = self.world.all_sum(torch.tensor([factor.terms for factor in factors.values()]))
        for factor, total in zip(factors.values(), terms.tolist(), strict=True):
            factor.terms = int(total)
        eigen: dict[int, tuple[Tensor | None, Tensor]] = {}
        owners = owners_of([axis.size if axis.full else 0 for _, axis, _ in sides], self.world.size)
        for (_, axis, what), owner in zip(sides, owners, strict=True):
            if owner == self.world.rank or not axis.full:
                eigen[id(axis)] = axis.eigen(what)
        for (_, axis, _), owner in zip(sides, owners, strict=True):
            if axis.full:
                vectors, values = eigen.get(id(axis)) or axis.room()
                assert vectors is not None
                eigen[id(axis)] = self.world.broadcast(vectors, owner), self.world.broadcast(values, owner)
        for name, factor in factors.items():
            factor.rebase(eigen[id(factor.left)], eigen[id(factor.right)], len(self.ids[name]) * weight)

    def _finished(self, factor: BlockFactors, count: int) -> KroneckerBlock:
        assert factor.basis is not None, "decompose() came first"
        block = factor.basis
        if self.plan.corrected:
            self.world.sum_into(factor.squares)
            block = factor.corrected(count)
        if not bool(torch.isfinite(block.values).all()):
            raise NonFinite(
                f"The curvature of {factor.name!r} holds NaN or infinity; look for them in weights, data or loss."
            )
        return block

    @property
    def fisher(self) -> AbstractFisher:
        """Whose gradients are measured."""
        return self.plan.fisher or GGN()

    def _fits(self, blocks: Mapping[str, AbstractBlock]) -> bool:
        """Whether the rows of a whole pass may be kept for a second look."""
        bytes_each = sum(_held(b, self.columns) * b.reference.element_size() / len(b) for b in blocks.values())
        most = max(len(self.more[name]) for name in blocks)
        return bytes_each * most * len(self.members) <= self.budget.bytes * KEPT_SHARE

    def _output_directions(self) -> float:
        """In how many directions the outputs of all examples have curvature, from those that all blocks read."""
        (checkpoint, derivatives), n = self.members[0], len(self.members[0][1].problem)
        if self.fisher.given_labels:
            return float(n)  # one gradient each
        if self.counted is None:  # every block was on disk
            objective, model, self.counted = derivatives.objective, derivatives.problem.model, 0.0
            with at_checkpoint(model, checkpoint), torch.no_grad():
                for ids, batch in sweep(derivatives.problem, self.wide, self._shared, "output directions", self.world):
                    self.counted += _count_directions(objective, objective.outputs(model, batch), batch, len(ids))
        counted = self.world.all_sum(torch.tensor([self.counted], dtype=torch.float64))
        return float(counted) * n / len(self._shared)

    def _batches(
        self, names: tuple[str, ...], over: Tensor, draws: tuple[int, ...]
    ) -> Iterator[tuple[Columns, Columns]]:
        """For every batch the columns of draw 0 and of draw 1, as far as asked for.

        Both are the same where nothing is drawn. The first pass over what all blocks read counts output directions.
        """
        counts = self.counted is None and torch.equal(over, self._shared) and not self.fisher.given_labels
        counted = 0.0
        for number, (checkpoint, derivatives) in enumerate(self.members):
            if derivatives.projector is None and len(names) < len(derivatives.space.blocks):
                derivatives = derivatives.restricted(names)  # nothing is recorded of the other layers
            with at_checkpoint(derivatives.problem.model, checkpoint):
                for ids, batch in sweep(derivatives.problem, self.wide, over, "curvature factors", self.world):
                    tape, several = self._cotangents(derivatives, ids, batch, draws)
                    if counts and number == 0:
                        outputs = tape.outputs.detach()
                        counted += _count_directions(derivatives.objective, outputs, batch, len(ids))
                    column_sets: list[Columns] = []
                    for last, cotangents in several:
                        columns: Columns = {}
                        while cotangents:  # none is kept after its use: it is as large as the outputs
                            cotangent = cotangents.pop(0)
                            rows = tape.rows(cotangent, keep_graph=bool(cotangents) or not last)
                            for k in names:
                                so_far = columns.setdefault(k, [])
                                so_far += unified([*so_far[:1], rows.blocks[k]])[-1:]
                            del rows  # its inputs, which the columns share, before those of the next are made
                        column_sets.append(columns)
                    yield column_sets[0], column_sets[-1]
        if counts:
            self.counted = counted

    def _cotangents(
        self, derivatives: Derivatives, ids: Tensor, batch: Any, draws: tuple[int, ...]
    ) -> tuple[Tape, Iterator[tuple[bool, list[Tensor]]]]:
        """A forward pass, and per draw (made when asked for, and whether it is the last) the columns c of the Fisher
        matrix's root: E[sum c c^T] is the Hessian."""
        fisher = self.fisher
        objective = fisher.measured_objective(derivatives)
        tape = derivatives.tape(batch, len(ids), objective)
        outputs = tape.outputs.detach()
        objective.check(outputs, batch, ids)
        finite_outputs(outputs, ids)
        several = draws if fisher.draws_labels else draws[:1]
        return tape, (
            (draw == several[-1], fisher.cotangents(derivatives, outputs, batch, ids, draw)) for draw in several
        )


def _count_directions(objective: AbstractObjective, outputs: Tensor, batch: Any, examples: int) -> float:
    """In how many directions the outputs of a batch have curvature, all its examples together."""
    return examples * output_curvature(objective).output_directions(outputs, batch)


def owners_of(sizes: Sequence[int], workers: int) -> list[int]:
    """Which of `workers` processes decomposes each side: the longest first, each to whom has the least work, of d^3.

    >>> owners_of([10, 30, 20, 0], 2)
    [1, 0, 1, 1]
    """
    work, owners = [0.0] * workers, [0] * len(sizes)
    for k in sorted(range(len(sizes)), key=lambda k: -sizes[k]):
        owners[k] = min(range(workers), key=work.__getitem__)
        work[owners[k]] += float(sizes[k]) ** 3
    return owners


def _held(block: AbstractBlock, columns: int) -> int:
    """Numbers that the columns of one block hold when their input is kept once."""
    if isinstance(block, Outer):
        return block.left.numel() * columns + block.right.numel()
    if isinstance(block, Conv):
        return block.left.numel() * columns + block.x.numel()
    return block.numbers * columns
