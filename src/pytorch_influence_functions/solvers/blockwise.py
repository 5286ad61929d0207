"""One system per layer or group of layers: what lies between the groups is left out of the curvature."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from typing import Any, ClassVar, TypeAlias, final

import torch

from ..core.errors import InfluenceError, InvalidInput, UnknownName, nearest
from ..core.records import Record
from ..curvature.base import AbstractCurvature, Budget, Form
from ..curvature.blockwise import GroupRequest, block_operators
from ..curvature.cost import Cost, ProblemSize
from ..damping.rules import AbstractDamping, as_damping
from ..gradients.per_example import Derivatives
from ..linalg.block_diagonal import BlockDiagonal, join_rows, restrict_rows
from ..linalg.operator import AbstractOperator, AbstractSymmetric
from ..linalg.rows import Rows
from ..linalg.shift import Shift
from ..linalg.space import ROOT, BlockSpec, Space
from .base import AbstractSolver, Result, Solution, no_preconditioner, relative
from .direct import Spectral

Patterns: TypeAlias = str | Sequence[str]


@final
@dataclass(frozen=True, repr=False)
class BlockGroup(Record):
    """Which parameters form one block of the curvature, and what is different there; `None` is as everywhere else.

    Args:
        patterns: globs over block, parameter or module names (`"fc*"`, `"layers.3"`), one or several. A weight and its
            bias that form one block stay together.
        solver: solves this group.
        curvature: stands for this group's curvature.
        damping: of this group; `Relative(share)` is a share of the group's own mean eigenvalue.
    """

    patterns: Patterns
    solver: AbstractSolver[Any] | None = None
    curvature: AbstractCurvature | None = None
    damping: AbstractDamping | float | None = None

    def __post_init__(self) -> None:
        given: Any = self.patterns
        patterns = (given,) if isinstance(given, str) else tuple(given) if isinstance(given, (list, tuple)) else ()
        if not patterns or not all(isinstance(p, str) for p in patterns):
            raise InvalidInput(
                f"BlockGroup(patterns={given!r}) must name blocks by one or several patterns, such as 'fc*' or "
                "['layers.0', 'layers.1']."
            )
        object.__setattr__(self, "patterns", patterns)
        _check_solver("BlockGroup", self.solver, optional=True)
        if self.curvature is not None and not isinstance(self.curvature, AbstractCurvature):
            raise InvalidInput(f"BlockGroup(curvature={self.curvature!r}) must be a curvature such as GGN(), or None.")
        object.__setattr__(self, "damping", None if self.damping is None else as_damping(self.damping))

    def matches(self, pattern: str, block: BlockSpec) -> bool:
        """Whether a pattern means a block: by its name, its parameters' names, or a module above them.

        Args:
            pattern: a glob.
            block: the block.
        """
        names = {block.name, *block.parameters}
        above = {name[:position] for name in block.parameters for position, letter in enumerate(name) if letter == "."}
        return any(fnmatchcase(name, pattern) for name in names | above)


@dataclass(frozen=True, eq=False)
class BlockwiseState:
    """One prepared system per group."""

    space: Space
    shift: Shift
    parts: Mapping[str, tuple[Space, AbstractSolver[Any], Any]]


@final
@dataclass(frozen=True, repr=False)
class Blockwise(AbstractSolver[BlockwiseState]):
    """x_g = (C_gg + D_g)^-1 b_g for every group g of blocks: the curvature's diagonal blocks, each solved by itself.

    Args:
        solver: solves every group that has none of its own.
        groups: `None`: one group per layer (all parameters of one module). Or names to patterns, or to
            `BlockGroup(...)` with a solver, curvature or damping of its own. Every block must be in exactly one group.

    With `Influence(curvature, Blockwise(solver))` any curvature is restricted, each group in the form its solver needs:
    a group's dense matrix takes 24 P_g^2 bytes and P_g^3 operations instead of P of all. Curvatures made of rows share
    one pass over the data, others take one per group. `Influence(damping=...)` holds where a group has none of its own;
    `Relative(share, per_block=True)` then damps each block by its own mean eigenvalue.

    The residual is that of the block-diagonal system, whose blocks are exact; what lies between groups is not in it.

    Raises `UnknownName` for a pattern that matches nothing, `InvalidInput` for a block in two groups or in none, and
    whatever the groups' solvers raise, naming the group.

    Reference: block-diagonal curvature as in Martens & Grosse (2015), without the Kronecker factors.

    >>> Blockwise(groups={"head": "fc2", "body": ["conv*", "fc1"]}).groups["body"].patterns
    ('conv*', 'fc1')
    """

    solver: AbstractSolver[Any] = field(default_factory=Spectral)
    groups: Mapping[str, Patterns | BlockGroup] | None = None
    is_blockwise: ClassVar[bool] = True
    takes_preconditioner: ClassVar[bool] = False

    def __post_init__(self) -> None:
        _check_solver("Blockwise", self.solver)
        if self.groups is None:
            return
        given: Any = self.groups
        if not isinstance(given, Mapping) or not given:
            raise InvalidInput(
                f"Blockwise(groups={given!r}) must map names to patterns, such as {{'head': 'fc2', 'body': 'conv*'}}, "
                "or be None for one group per layer."
            )
        object.__setattr__(
            self, "groups", {str(k): v if isinstance(v, BlockGroup) else BlockGroup(v) for k, v in self.groups.items()}
        )

    @property
    def damps_itself(self) -> bool:
        """Whether every group has a damping of its own, so that one given from outside would say nothing."""
        return self.groups is not None and all(isinstance(g, BlockGroup) and g.damping for g in self.groups.values())

    def members(self, space: Space) -> dict[str, tuple[str, ...]]:
        """The blocks of every group, in a parameter `space`."""
        if self.groups is None:
            return _layers(space)
        owner: dict[str, str] = {}
        for name, group in self._groups().items():
            for pattern in group.patterns:
                matching = [k for k, block in space.blocks.items() if group.matches(pattern, block)]
                if not matching:
                    hint = nearest(pattern, [*space.blocks, *space.names])
                    hint = hint or f" There are {', '.join(map(repr, list(space.blocks)[:6]))}."
                    raise UnknownName(f"The pattern {pattern!r} of group {name!r} matches no block.{hint}")
                for block in matching:
                    if owner.setdefault(block, name) != name:
                        raise InvalidInput(
                            f"The block {block!r} is in the groups {owner[block]!r} and {name!r}; a block has one "
                            "curvature, so make the patterns disjoint."
                        )
        if left := [k for k in space.blocks if k not in owner]:
            raise InvalidInput(
                f"No group holds {len(left)} of the blocks ({', '.join(map(repr, left[:4]))}); add a group for them, "
                "or leave them out with parameters=."
            )
        return {name: tuple(k for k in space.blocks if owner[k] == name) for name in self._groups()}

    def operator(self, curvature: AbstractCurvature, derivatives: Derivatives, budget: Budget) -> BlockDiagonal:
        """The diagonal blocks of a curvature, each in the form its group's solver needs.

        Args:
            curvature: of the groups that have none of their own.
            derivatives: how the problem's gradients are taken.
            budget: what all groups together may take.
        """
        requests = self._requests(curvature, derivatives.space)
        return BlockDiagonal(derivatives.space, block_operators(requests, derivatives, budget))

    def form(self, curvature: AbstractCurvature) -> Form:
        """The form in which groups without a solver of their own want a `curvature`."""
        return self.solver.form(curvature)

    @property
    def vectors_held(self) -> int:  # type: ignore[override]
        """Groups are solved in turn, but all answers are held."""
        return 1 + max(solver.vectors_held for solver in self._solvers())

    def check_memory(self, operator: AbstractSymmetric, budget: Budget) -> None:
        if isinstance(operator, BlockDiagonal):
            for name, part in operator.parts.items():
                with _in_group(name):
                    self._solver(name).check_memory(part, budget)

    def cost(self, size: ProblemSize, curvature: AbstractCurvature, guided: bool = False) -> Cost:
        total, shared = Cost(), dict[AbstractCurvature, float]()
        for name, request in self._requests(curvature, size.space).items():
            part = self._solver(name).cost(size.over(request.blocks), request.curvature)
            if request.curvature.rows(size) is not None and request.form is not Form.IMPLICIT:
                # Groups that are made of the same rows share the passes that make them.
                shared[request.curvature] = part.passes
                part = replace(part, passes=0.0)
            total += part
        return total + Cost(passes=sum(shared.values()))

    def damped(self, operator: AbstractSymmetric, shift: Shift) -> Shift:
        """D with the dampings that groups have of their own.

        Args:
            operator: the diagonal blocks.
            shift: D, as it was given.
        """
        own = {k: as_damping(g.damping) for k, g in self._groups().items() if g.damping is not None}
        if not own or not isinstance(operator, BlockDiagonal):
            return shift
        blocks = {k: shift.blocks.get(k, shift.damping) for k in operator.space.blocks}
        for name, rule in own.items():
            part = operator.parts[name]
            with _in_group(name):
                blocks |= rule.blocks(part) or dict.fromkeys(part.space.blocks, rule.of(part))
        mean = sum(d * operator.space.numel(k) for k, d in blocks.items()) / operator.size
        return Shift(mean, shift.decay, blocks)

    def init(
        self, operator: AbstractOperator, shift: Shift, preconditioner: AbstractOperator | None = None
    ) -> BlockwiseState:
        no_preconditioner(self, preconditioner)
        if not isinstance(operator, BlockDiagonal):
            raise InvalidInput(
                f"Blockwise() needs the diagonal blocks of a curvature and got {type(operator).__name__}; use it in "
                "Influence(curvature, Blockwise()), or make them with Blockwise().operator(...)."
            )
        shift.over(operator.space.blocks)
        parts = {}
        for name, part in operator.parts.items():
            solver = self._solver(name)
            with _in_group(name):
                parts[name] = part.space, solver, solver.init(part, _part_of(shift, part))
        return BlockwiseState(operator.space, shift, parts)

    def solve(self, state: BlockwiseState, rows: Rows) -> Solution:
        solved = {}
        for name, (space, solver, part) in state.parts.items():
            inside = restrict_rows(rows, space)
            solved[name] = solver.solve(part, inside), inside.squared_norms().double()
        values = [solution.value.rows() for solution, _ in solved.values()]
        squares = torch.stack([(s.residual.double().square() * size) for s, size in solved.values()]).sum(0)
        residual = relative(squares.sqrt(), rows.squared_norms().double().sqrt())
        bad = [(name, s) for name, (s, _) in solved.items() if s.result is not Result.successful]
        bad.sort(key=lambda pair: pair[1].ended_early)  # what cannot be used speaks first
        failed = tuple(sorted({i for _, s in bad for i in s.failed}))
        # Squared, groups' errors and sizes add up: relative to all, none is larger than the largest of a group.
        errors = [s.error for s, _ in solved.values() if s.error is not None]
        detail = f"It happened in group {bad[0][0]!r}. {bad[0][1].detail}".strip() if bad else ""
        return Solution(
            join_rows(state.space, values),
            residual,
            bad[0][1].result if bad else Result.successful,
            max(s.steps for s, _ in solved.values()),
            _notes({name: s for name, (s, _) in solved.items()}, state.shift),
            failed,
            detail,
            bad[0][1].incomplete if bad else "error",
            torch.stack(errors).amax(0) if errors else None,
        )

    # ---------------------------------------------------------------- inner workings

    def _groups(self) -> dict[str, BlockGroup]:
        return {k: g for k, g in (self.groups or {}).items() if isinstance(g, BlockGroup)}

    def _requests(self, curvature: AbstractCurvature, space: Space) -> dict[str, GroupRequest]:
        """The blocks, curvature and form of every group."""
        groups, requests = self._groups(), {}
        for name, blocks in self.members(space).items():
            own = groups.get(name)
            chosen = curvature if own is None or own.curvature is None else own.curvature
            self._solver(name).check_answers(chosen)
            requests[name] = GroupRequest(blocks, chosen, self._solver(name).form(chosen))
        return requests

    def _solvers(self) -> list[AbstractSolver[Any]]:
        return [self.solver, *(g.solver for g in self._groups().values() if g.solver is not None)]

    def _solver(self, name: str) -> AbstractSolver[Any]:
        group = self._groups().get(name)
        return self.solver if group is None or group.solver is None else group.solver


def _check_solver(owner: str, solver: Any, optional: bool = False) -> None:
    if optional and solver is None:
        return
    if isinstance(solver, type):
        raise InvalidInput(f"{owner}(solver=) is the class {solver.__name__}; write {solver.__name__}(), an instance.")
    if not isinstance(solver, AbstractSolver) or solver.is_blockwise:
        raise InvalidInput(f"{owner}(solver={solver!r}) must be a solver for one group, such as Spectral() or CG().")


def _layers(space: Space) -> dict[str, tuple[str, ...]]:
    """Blocks by the module that holds them."""
    layers: dict[str, tuple[str, ...]] = {}
    for name, block in space.blocks.items():
        # A projected block has no parameters; it is named like the layer it was made from.
        layer = (block.parameters[0].rpartition(".")[0] or ROOT) if block.parameters else name
        layers[layer] = (*layers.get(layer, ()), name)
    return layers


def _part_of(shift: Shift, part: AbstractSymmetric) -> Shift:
    """D over one group's blocks."""
    names = part.space.blocks
    blocks = {k: shift.blocks[k] for k in names} if shift.blocks else {}
    mean = sum(d * part.space.numel(k) for k, d in blocks.items()) / part.size if blocks else shift.damping
    return Shift(mean, {k: shift.decay[k] for k in names} if shift.decay else {}, blocks)


def _notes(solutions: Mapping[str, Solution], shift: Shift) -> dict[str, Any]:
    """The ends of the block-diagonal spectrum, where every group knows its own."""
    notes: dict[str, Any] = {"damping": shift.damping, "groups": {k: dict(s.notes) for k, s in solutions.items()}}
    for key, pick in (("smallest_curvature", min), ("largest_curvature", max)):
        if all(key in s.notes for s in solutions.values()):
            notes[key] = pick(s.notes[key] for s in solutions.values())
    if approximate := next((s.notes["approximation"] for s in solutions.values() if "approximation" in s.notes), None):
        notes["approximation"] = approximate
    return notes


@contextmanager
def _in_group(name: str) -> Iterator[None]:
    """Say which group an error speaks of."""
    try:
        yield
    except InfluenceError as error:
        error.args = (f"In group {name!r}: {error}",)
        raise
