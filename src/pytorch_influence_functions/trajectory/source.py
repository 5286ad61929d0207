r"""SOURCE: attribution by approximate unrolling of the training run (Bae et al. 2024).

Training is cut into L segments; within segment l curvature H_l and gradients g_l(i) are constant, each the mean over
the segment's checkpoints, so that K_l steps of learning rate eta_l amount to

    S_l = exp(-eta_l K_l H_l),        r_l(i) = (1/N) (I - S_l) H_l^-1 g_l(i)

and the effect of never having had example i is what each segment contributes, carried to the end by the later ones.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, final

import torch
from jaxtyping import Float
from torch import Tensor

from ..core.distributed import World, current
from ..core.errors import InvalidInput, NonFinite, TooLarge
from ..curvature.base import AbstractCurvature, Budget, Form
from ..curvature.exact import GGN
from ..gradients.per_example import Derivatives, GradientBatch
from ..influence.assumptions import StationarityCheck
from ..influence.checks import check_problem, check_top, in_queries
from ..influence.method import AbstractMethod, as_scores, resolved_measure, weights_of
from ..influence.run_log import RunLog, refuse_nonfinite
from ..influence.topk import TopK
from ..linalg.dense import Matrix
from ..linalg.operator import AbstractSpectral
from ..linalg.rows import Route, Rows
from ..objectives.base import AbstractObjective
from ..problem.checkpoints import Checkpoint
from ..problem.data import Source
from ..problem.problem import Problem
from ..scores.diagnostics import Diagnostics
from ..scores.scores import Scores
from .segments import Segment, apart, evenly, refuse_shared
from .unrolling import FittedSegment, form_of, preconditioned, refuse_overflow

# Share of the memory budget that propagated queries may take.
_QUERY_SHARE = 1 / 4


@final
@dataclass(frozen=True, eq=False, repr=False)
class SOURCE(AbstractMethod):
    r"""Attribution along the training run: for models that have not converged, or were trained in stages.

    With S_l = exp(-eta_l K_l H_l) over segments l = 1..L,

        score[q, i] = (1/N) sum_l < S_{l+1} ... S_L grad m(q), (I - S_l) H_l^-1 g_l(i) >

    is the predicted change of `m(q)` when example i is removed: positive = helpful, for a loss. No damping is needed:
    (1 - exp(-eta K lam)) / lam is finite for every lam, is about 1 / (lam + 1 / (eta K)), and tends to 1 / lam, the
    influence function, as eta K grows. (That gives the damping rule `FromTraining(lr, steps)`.) L2 weight decay is part
    of H; under `AdamState` H becomes P H, P being Adam's diagonal preconditioner.

    Args:
        segments: `Segment(checkpoints, lr, steps, momentum, adam)` in the order of training; see also `source`.
        curvature: anything that has eigenvalues: `GGN()`, `Hessian()`, `Fisher()` or `EmpiricalFisher()` dense for
            small models, a Kronecker-factored one for large.
        final: the weights at which queries are measured; `None`: the model's own.
        memory: the most bytes that curvature and propagated queries may take.
        route: force one route for gradients and inner products; see `Route`.

    Cost: one fit of the curvature per checkpoint, and one pass over the training data per checkpoint for all queries
    together (as many as `memory` holds at once).
    Means of the weights as a segment's only checkpoint make it cheaper (the paper's FAST-SOURCE).

    Raises:
        InvalidInput: no segment, or parts that are no curvature, route or budget.

    Reference: Bae, Lin, Lorraine & Grosse (2024), "Training Data Attribution via Approximate Unrolling".
    Identity: exact for gradient flow on a quadratic; tested against real gradient descent.

    >>> model, x, y = torch.nn.Linear(3, 2), torch.randn(20, 3), torch.randint(0, 2, (20,))
    >>> start = {k: torch.zeros_like(v) for k, v in model.state_dict().items()}
    >>> method = SOURCE([Segment(start, lr=0.1, steps=50), Segment(model.state_dict(), lr=0.01, steps=50)])
    >>> method.fit(Problem(model, torch.nn.CrossEntropyLoss(), (x, y))).score((x[:2], y[:2])).values.shape
    torch.Size([2, 20])
    """

    segments: Sequence[Segment] | Segment
    curvature: AbstractCurvature = field(default_factory=GGN)
    final: Checkpoint | None = None
    memory: Budget | int = field(default_factory=Budget)
    route: Route | str | None = None

    def __post_init__(self) -> None:
        given: Any = self.segments
        several = (given,) if isinstance(given, Segment) else given
        if not isinstance(several, Sequence) or not several or not all(isinstance(s, Segment) for s in several):
            raise InvalidInput(
                f"SOURCE takes segments, [Segment(checkpoints, lr=..., steps=...), ...], got {_named(given)}; "
                "ptif.source(checkpoints, lr, steps) splits a run evenly."
            )
        object.__setattr__(self, "segments", tuple(several))
        if not isinstance(self.curvature, AbstractCurvature):
            raise InvalidInput(f"SOURCE's curvature must be one such as GGN(), got {_named(self.curvature)}.")
        refuse_shared([c for s in self.parts for c in s.held])
        form_of(self.curvature, adam=any(s.adam is not None for s in self.parts))
        object.__setattr__(self, "memory", Budget.of(self.memory))
        object.__setattr__(self, "route", Route.of(self.route))
        if self.route is Route.FORWARD:
            raise InvalidInput("SOURCE makes rows, which route='forward' does not; leave the route to 'auto'.")

    @property
    def parts(self) -> tuple[Segment, ...]:
        """The segments, in the order of training."""
        return tuple(self.segments) if isinstance(self.segments, Sequence) else (self.segments,)

    def __repr__(self) -> str:
        words = [f"[{', '.join(map(repr, self.parts))}]", f"curvature={self.curvature!r}"]
        words += ["final=..."] if self.final is not None else []
        return f"SOURCE({', '.join(words)})"

    def fit(self, problem: Problem, n_queries: int = 1) -> SourceAttribution:
        """The curvature of every segment, once.

        Raises:
            InvalidInput: a checkpoint does not fit the model, the problem has checkpoints of its own, or negative
                curvature would blow every number up.
            TooLarge: the dense matrices do not fit `memory`.
        """
        start = time.perf_counter()
        check_problem(problem)
        if problem.checkpoints:
            raise InvalidInput(
                f"SOURCE takes its checkpoints by segment and the problem has {len(problem.checkpoints)} of its own; "
                "leave checkpoints= out."
            )
        with weights_of(problem, self.final):
            derivatives = self._derivatives(problem)
            standing = StationarityCheck.of(derivatives)
        self._check_room(problem)
        stretches = tuple(self._stretch(problem, number) for number in range(len(self.parts)))
        refuse_overflow(stretches, problem)
        return SourceAttribution(self, problem, derivatives, standing, stretches, time.perf_counter() - start)

    def _derivatives(self, problem: Problem) -> Derivatives:
        return Derivatives.of(problem, Route.of(self.route) if self.route in (Route.VMAP, Route.LOOP) else Route.AUTO)

    def _stretch(self, problem: Problem, number: int) -> FittedSegment:
        segment = self.parts[number]
        members = []
        for k, given in enumerate(segment.held):
            with _speaking_of(number, k):
                checkpoint = apart(given, problem.model)
                with weights_of(problem, checkpoint):
                    members.append((checkpoint, self._derivatives(problem)))
        form = form_of(self.curvature, segment.adam is not None)
        operator = self.curvature.mean_of(members, form, Budget.of(self.memory))
        assert isinstance(operator, AbstractSpectral)
        root = None
        if any(problem.space.decay.values()):
            operator = operator.shifted(problem.space.decay)
        if segment.adam is not None:
            root = segment.adam.root(problem.space)
            operator = preconditioned(operator, root, segment.adam.decays(problem.space))
        # The eigenvectors say it all: the matrix itself need not be kept beside them.
        return FittedSegment(
            segment, tuple(members), operator.eigen() if isinstance(operator, Matrix) else operator, root
        )

    def _check_room(self, problem: Problem) -> None:
        if form_of(self.curvature, any(s.adam is not None for s in self.parts)) is not Form.MATRIX:
            return
        size, budget = problem.space.size, Budget.of(self.memory).bytes
        # Eigenvectors of every segment, and one matrix with its mean and LAPACK's workspace.
        wanted = 8.0 * size**2 * (len(self.parts) + 4)
        if wanted > budget:
            raise TooLarge(
                f"SOURCE with the dense {self.curvature!r} of {size:,} parameters over {len(self.parts)} segments "
                f"would take {wanted / 2**30:.3g} GiB and the bound is {budget / 2**30:.3g} GiB; use a "
                "Kronecker-factored curvature, name fewer parameters, or raise the bound with memory=bytes."
            )


def source(
    checkpoints: Sequence[Checkpoint],
    lr: float | int | Sequence[float | int],
    steps: float | int | Sequence[float | int],
    segments: int = 3,
    momentum: float | int = 0.0,
    curvature: AbstractCurvature | None = None,
) -> SOURCE:
    """`SOURCE` for a run given by checkpoints in order, split evenly into segments.

    Args:
        checkpoints: state dicts or paths, from early to late.
        lr: the learning rate, or one per checkpoint: the mean over the stretch it stands for.
        steps: the optimiser steps of the whole run, or one number per checkpoint.
        segments: how many; the paper uses 3, with 6 checkpoints.
        momentum: SGD's.
        curvature: as for `SOURCE`.

    Raises:
        InvalidInput: the lengths disagree, a number is not positive, or there are fewer checkpoints than segments.

    >>> state = torch.nn.Linear(2, 1).state_dict()
    >>> source([state] * 4, lr=[0.1, 0.1, 0.02, 0.01], steps=400, segments=2)
    SOURCE([Segment(2 checkpoints, lr=0.1, steps=200), Segment(2 checkpoints, lr=0.015, steps=200)], curvature=GGN())
    """
    return SOURCE(evenly(checkpoints, lr, steps, segments, momentum), GGN() if curvature is None else curvature)


# --------------------------------------------------------------------------- the fitted run


@dataclass(frozen=True, eq=False)
class SourceAttribution:
    """A fitted `SOURCE`: every segment's curvature is ready, any number of queries may follow."""

    spec: SOURCE
    problem: Problem
    derivatives: Derivatives
    standing: StationarityCheck
    stretches: tuple[FittedSegment, ...]
    fit_seconds: float = 0.0

    @property
    def why(self) -> str:
        """Why this method."""
        return "asked for"

    @property
    def method(self) -> str:
        """The composition in use, as it would be written."""
        return repr(self.spec)

    def score(self, queries: Any, measure: Any = None, top: int | None = None, batch_size: int | None = None) -> Scores:
        """Predicted change of the measure on every query had each training example been absent.

        Args:
            queries: a Dataset, DataLoader, tensors or arrays `(x, y)`.
            measure: what is measured on a query, an objective or loss; `None`: the training objective.
            top: keep only the k most helpful and k most harmful examples per query.

        Returns:
            `Scores` of shape (queries, N).

        Raises:
            NonFinite: a gradient or score is NaN or infinite; the indices are named.
        """
        start = time.perf_counter()
        check_top(top)
        with in_queries():
            source = Source.of(queries, self.problem.batch_size if batch_size is None else batch_size)
        n, ledger = len(self.problem), RunLog()
        merged = TopK(len(source), top) if top is not None else None
        whole = torch.zeros(len(source) if merged is None else 0, n, dtype=torch.float64)
        with weights_of(self.problem, self.spec.final):
            objective = resolved_measure(self.problem, self.derivatives.objective, measure, source)
            for at, rows in self._queries(source, objective, ledger):
                block = current().all_sum(self._block(at, rows, ledger))
                if merged is None:
                    whole[at] = block
                else:
                    merged.add(at, torch.arange(n), block)
        ledger.seconds = self.fit_seconds + time.perf_counter() - start
        found = whole if merged is None else merged
        return as_scores(self.problem, found, objective, source, ledger, self._diagnostics(ledger, len(source)))

    def self_influence(self) -> Float[Tensor, " n"]:
        """Every training example's score on its own loss, shape [N]: how much the model leant on it to fit it.

        The loss is taken at the final weights, the gradients along the run, so a sign is not guaranteed. Costs one pass
        over the data per checkpoint and one at the end.
        """
        out = torch.zeros(len(self.problem), dtype=torch.float64)
        with weights_of(self.problem, self.spec.final):
            for held in self._grouped(self.derivatives.stream(label="self-influence", world=World())):
                ids = torch.cat([s.ids for s in held])
                solved = self._propagated(Rows.cat([s.rows for s in held]))
                for stretch, x in zip(self.stretches, solved, strict=True):
                    for checkpoint, derivatives in stretch.members:
                        with weights_of(self.problem, checkpoint):
                            out[ids] += self._own(derivatives, ids, x) / (len(out) * len(stretch.members))
        return out

    # ---------------------------------------------------------------- inner workings

    def _own(self, derivatives: Derivatives, ids: Tensor, solved: Rows) -> Tensor:
        """<x_n, g_n> at these weights for matching rows, in float64."""
        found, at = [], 0
        for slab in derivatives.stream(ids=ids, label="self-influence", world=World()):
            found.append(solved.take(slice(at, at + len(slab.ids))).rowwise(slab.rows))
            at += len(slab.ids)
        pull = self._decay_term(derivatives, solved)
        own = torch.cat(found)
        return (own if pull is None else own + pull).double().cpu()

    def _grouped(self, slabs: Iterator[GradientBatch]) -> Iterator[list[GradientBatch]]:
        """Batches in groups as large as memory allows: a query is held once per segment."""
        each = self.derivatives.space.size * 8 * (len(self.stretches) + 2)
        room = max(1, int(Budget.of(self.spec.memory).bytes * _QUERY_SHARE / each))
        held: list[GradientBatch] = []
        for slab in slabs:
            for part in torch.split(torch.arange(len(slab.ids)), room):
                piece = slab if len(part) == len(slab.ids) else _part(slab, part)
                if held and sum(len(s.ids) for s in held) + len(part) > room:
                    yield held
                    held = []
                held.append(piece)
        if held:
            yield held

    def _queries(self, source: Source, objective: AbstractObjective, ledger: RunLog) -> Iterator[tuple[Tensor, Rows]]:
        """(query indices, gradients of the measure at the final weights), group by group."""

        def seen() -> Iterator[GradientBatch]:
            slabs = self.derivatives.stream(source, objective, label="query gradients", world=World())
            while True:
                with in_queries():
                    slab = next(slabs, None)
                if slab is None:
                    return
                ledger.see_queries(slab.ids, slab.batch)
                yield slab

        for held in self._grouped(seen()):
            yield torch.cat([s.ids for s in held]), Rows.cat([s.rows for s in held])

    def _propagated(self, rows: Rows, ledger: RunLog | None = None) -> list[Rows]:
        """For every segment x_l with <x_l, g> = <S_{l+1} ... S_L u, (I - S_l) H_l^-1 g>, from the last to the first."""
        u, found = rows, []
        for k in reversed(range(len(self.stretches))):
            stretch = self.stretches[k]
            found.append(stretch.responds(u).dense())
            if ledger is not None:
                ledger.residuals.append(stretch.residual(u.take(slice(0, 1))))
            u = stretch.survives(u) if k else u
        return found[::-1]

    def _block(self, at: Tensor, rows: Rows, ledger: RunLog) -> Tensor:
        """Scores [q, N] of a group of queries: the training data pass once per checkpoint."""
        n, route = len(self.problem), Route.of(self.spec.route)
        total = torch.zeros(len(at), n, dtype=torch.float64)
        for stretch, x in zip(self.stretches, self._propagated(rows, ledger), strict=True):
            share = 1.0 / (n * len(stretch.members))
            for checkpoint, derivatives in stretch.members:
                with weights_of(self.problem, checkpoint):
                    pull = self._decay_term(derivatives, x)
                    for slab in derivatives.stream(label="scoring"):
                        ledger.see_training(slab.ids, slab.batch)
                        values = slab.rows.inner(x, route).T
                        values = values if pull is None else values + pull[:, None]
                        refuse_nonfinite(values, at, slab.ids)
                        total[:, slab.ids] += values.double().cpu() * share
        return total

    def _decay_term(self, derivatives: Derivatives, solved: Rows) -> Tensor | None:
        """<x, weight decay * theta> at these weights: only where every example carries its own penalty."""
        if not self.problem.weight_decay.per_example or self.problem.weight_decay.is_zero:
            return None
        space = derivatives.space
        values = {k: v.detach()[None] for k, v in space.values(self.problem.model).items()}
        return solved.inner(space.from_parameters(values).scaled(space.decay))[:, 0]

    def _diagnostics(self, ledger: RunLog, n_queries: int) -> Diagnostics:
        spans = [s.segment.span for s in self.stretches]
        found = ledger.of_method(self, self.problem, self.standing, self.derivatives.routes, n_queries)
        return replace(
            found,
            damping=1.0 / sum(spans),
            smallest_curvature=min(s.extremes[0] for s in self.stretches),
            needs_minimum=False,
            notes=tuple(self._notes()),
        )

    def _notes(self) -> Iterator[str]:
        members = sum(len(s.members) for s in self.stretches)
        yield (
            f"unrolled over {len(self.stretches)} segments with {members} checkpoints; no damping was added, the "
            "lambda above is 1 / (learning rate x steps), which the length of training stands for"
        )
        for k, s in enumerate(self.stretches):
            low, high = s.extremes
            # Where heavy-ball descent on a quadratic diverges: lr * lam > 2 (1 + momentum).
            if s.segment.lr * high > 2 * (1 + s.segment.momentum):
                yield (
                    f"segment {k + 1}: learning rate x largest curvature is {s.segment.lr * high:.3g}, where descent "
                    "itself would diverge, so constant curvature does not describe these steps"
                )
            if s.growth > 1:
                yield (
                    f"segment {k + 1}: negative curvature {low:.3g} is taken to grow by e^{s.growth:.3g} over its "
                    "steps; compare with GGN()"
                )


def _part(slab: GradientBatch, part: Tensor) -> GradientBatch:
    return GradientBatch(slab.ids[part], slab.rows.take(part), slab.losses[part.to(slab.losses.device)], slab.batch)


@contextmanager
def _speaking_of(segment: int, checkpoint: int) -> Iterator[None]:
    """Say which of many checkpoints a sentence is about."""
    try:
        yield
    except (InvalidInput, NonFinite) as error:
        words = str(error)
        error.args = (f"Segment {segment + 1}, checkpoint {checkpoint + 1}: {words[0].lower() + words[1:]}",)
        raise


def _named(given: Any) -> str:
    if isinstance(given, type):
        return f"the class {given.__name__}"
    return "none" if isinstance(given, Sequence) and not given else type(given).__name__
