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
from dataclasses import dataclass, field
from typing import Any, ClassVar, final

import torch
from jaxtyping import Float
from torch import Tensor

from ..core.distributed import World, current
from ..core.errors import InvalidInput, NonFinite, TooLarge
from ..curvature.base import AbstractCurvature, Budget, Form
from ..curvature.exact import GGN
from ..gradients.per_example import Derivatives
from ..influence.assumptions import StationarityCheck
from ..influence.checks import check_problem
from ..influence.method import AbstractMethod
from ..influence.parts import Parts
from ..influence.run_attribution import RunAttribution
from ..influence.run_log import RunLog
from ..influence.scoring import (
    QUERY_SHARE,
    ScoringPass,
    TrainingStream,
    decay_term,
    grouped,
    refuse_nonfinite,
    self_influence_rows,
)
from ..linalg.dense import Matrix
from ..linalg.operator import AbstractSpectral
from ..linalg.rows import Route, Rows
from ..problem.agreement import agree_on_problem, entry
from ..problem.checkpoints import Checkpoint, at_checkpoint
from ..problem.problem import Problem
from ..problem.working_precision import in_working_precision
from .preconditioner import preconditioner_of
from .segments import Segment, copy_if_live, refuse_shared, split_evenly
from .unrolling import FittedSegment, form_of, refuse_overflow


@final
@dataclass(frozen=True, eq=False, repr=False)
class SOURCE(AbstractMethod):
    r"""Attribution along the training run: for models that have not converged, or were trained in stages.

    With S_l = exp(-eta_l K_l H_l) over segments l = 1..L,

        score[q, i] = (1/N) sum_l < S_{l+1} ... S_L grad m(q), (I - S_l) H_l^-1 g_l(i) >

    is the predicted change of `m(q)` when example i is removed: positive = helpful, for a loss. No damping is needed:
    (1 - exp(-eta K lam)) / lam is finite for every lam, is about 1 / (lam + 1 / (eta K)), and tends to 1 / lam, the
    influence function, as eta K grows. (That gives the damping rule `FromTraining(lr, steps)`.) L2 weight decay is part
    of H; under `AdamState` H becomes P H, P being Adam's diagonal preconditioner: exactly with a dense curvature, and
    with a Kronecker-factored one as a diagonal in its eigenbasis, from the second moments along its eigenvectors.

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
        refuse_shared([c for s in self.parts for c in s.checkpoint_tuple])
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
        parts = [f"[{', '.join(map(repr, self.parts))}]", f"curvature={self.curvature!r}"]
        parts += ["final=..."] if self.final is not None else []
        return f"SOURCE({', '.join(parts)})"

    @entry
    def fit(self, problem: Problem, n_queries: int = 1) -> SourceAttribution:
        """The curvature of every segment, once.

        Args:
            problem: model, loss and training data.
            n_queries: how many queries are expected; not used.

        Raises:
            InvalidInput: a checkpoint does not fit the model, the problem has checkpoints of its own, or negative
                curvature would blow every number up.
            TooLarge: the dense matrices do not fit `memory`.
        """
        start = time.perf_counter()
        check_problem(problem)
        agree_on_problem(problem, self)
        problem = in_working_precision(problem)
        if problem.checkpoints:
            raise InvalidInput(
                f"SOURCE takes its checkpoints by segment and the problem has {len(problem.checkpoints)} of its own; "
                "leave checkpoints= out."
            )
        with at_checkpoint(problem.model, self.final):
            derivatives = self._derivatives(problem)
            stationarity = StationarityCheck.of(derivatives)
        self._check_room(problem)
        segments = tuple(self._fit_segment(problem, number) for number in range(len(self.parts)))
        refuse_overflow(segments, problem)
        return SourceAttribution(self, problem, derivatives, stationarity, time.perf_counter() - start, segments)

    def _derivatives(self, problem: Problem) -> Derivatives:
        return Derivatives.of(problem, Route.of(self.route) if self.route in (Route.VMAP, Route.LOOP) else Route.AUTO)

    def _fit_segment(self, problem: Problem, number: int) -> FittedSegment:
        segment = self.parts[number]
        members = []
        for k, given in enumerate(segment.checkpoint_tuple):
            with _speaking_of(number, k):
                checkpoint = copy_if_live(given, problem.model)
                with at_checkpoint(problem.model, checkpoint):
                    members.append((checkpoint, self._derivatives(problem)))
        form = form_of(self.curvature, segment.adam is not None)
        operator = self.curvature.mean_of(members, form, Budget.of(self.memory))
        assert isinstance(operator, AbstractSpectral)
        if any(problem.space.decay.values()):
            operator = operator.shifted(problem.space.decay)
        preconditioner = None if segment.adam is None else preconditioner_of(operator, segment.adam)
        operator = operator if preconditioner is None else preconditioner.curvature
        # The eigenvectors say it all: the matrix itself need not be kept beside them.
        operator = operator.eigen() if isinstance(operator, Matrix) else operator
        return FittedSegment(segment, tuple(members), operator, preconditioner)

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
    return SOURCE(split_evenly(checkpoints, lr, steps, segments, momentum), GGN() if curvature is None else curvature)


# --------------------------------------------------------------------------- the fitted run


@final
@dataclass(frozen=True, eq=False)
class SourceAttribution(RunAttribution):
    """A fitted `SOURCE`: a score is the predicted change of the measure had the example been absent.

    Attributes:
        segments: every segment with its curvature.
    """

    spec: SOURCE
    segments: tuple[FittedSegment, ...]

    shares_work: ClassVar[bool] = True
    tells_parts: ClassVar[bool] = True

    def _add_scores(self, scoring: ScoringPass) -> Iterator[str]:
        with at_checkpoint(self.problem.model, self.spec.final):
            for query_ids, rows in scoring.query_groups(self.derivatives, self._room()):
                if scoring.parts is not None or scoring.question.candidates is not None:
                    self._add_shares(scoring, query_ids, rows)
                else:
                    scoring.add(query_ids, self._columns, self._block(query_ids, rows, scoring.log))
        return self._notes()

    @entry
    def self_influence(self) -> Float[Tensor, " n"]:
        """Every training example's score on its own loss, shape [N]: how much the model leant on it to fit it.

        The loss is taken at the final weights, the gradients along the run, so a sign is not guaranteed. Costs one pass
        over the data per checkpoint and one at the end.
        """
        model, n = self.problem.model, len(self.problem)
        own = torch.zeros(n, dtype=torch.float64)
        with at_checkpoint(model, self.spec.final):
            for ids, rows in grouped(self_influence_rows(self.derivatives, self._room()), self._room()):
                for segment, solved in zip(self.segments, self._propagated(rows), strict=True):
                    for checkpoint, derivatives in segment.members:
                        with at_checkpoint(model, checkpoint):
                            own[ids] += self._own(derivatives, ids, solved) / (n * len(segment.members))
        return self.problem.data.spread(current().sum_into(own))

    # ---------------------------------------------------------------- inner workings

    @property
    def _columns(self) -> Tensor:
        """The training examples that this process scores."""
        return torch.arange(len(self.problem))[current().share(len(self.problem))]

    def _own(self, derivatives: Derivatives, ids: Tensor, solved: Rows) -> Tensor:
        """<x_n, g_n> at these weights for matching rows, in float64."""
        products, start = [], 0
        for gradients in derivatives.stream(ids=ids, label="self-influence", world=World()):
            part = solved.take(slice(start, start + len(gradients.ids)))
            products.append(part.rowwise(gradients.rows))
            start += len(gradients.ids)
        constant = decay_term(derivatives, solved)
        own = torch.cat(products)
        return (own if constant is None else own + constant).double().cpu()

    def _room(self) -> int:
        """How many queries fit the memory budget: each is held once per segment."""
        each = self.derivatives.space.size * 8 * (len(self.segments) + 2)
        return max(1, int(Budget.of(self.spec.memory).bytes * QUERY_SHARE / each))

    def _propagated(self, rows: Rows, log: RunLog | None = None) -> list[Rows]:
        """For every segment x_l with <x_l, g> = <S_{l+1} ... S_L u, (I - S_l) H_l^-1 g>, in the order of training."""
        u, solved = rows, []
        for k in reversed(range(len(self.segments))):
            segment = self.segments[k]
            solved.append(segment.responds(u).dense())
            if log is not None:
                log.residuals.append(segment.residual(u.take(slice(0, 1))))
            u = segment.survives(u) if k else u
        return solved[::-1]

    def _block(self, query_ids: Tensor, rows: Rows, log: RunLog) -> Tensor:
        """Scores of a group of queries on the examples in `_columns`: the training data pass once per checkpoint."""
        columns = self._columns
        total = torch.zeros(len(query_ids), len(columns), dtype=torch.float64)
        for stream, share in self._streams(rows, log):
            for ids, values in stream.blocks():
                refuse_nonfinite(values, query_ids, ids)
                total[:, ids - columns[0]] += values.double().cpu() * share
        return total

    def _add_shares(self, scoring: ScoringPass, query_ids: Tensor, rows: Rows) -> None:
        """Add what every checkpoint contributes to the scores of a group of queries."""
        candidates, parts = scoring.question.candidates, scoring.parts
        wanted = None if candidates is None else candidates.union
        for stream, share in self._streams(rows, scoring.log, wanted, parts):
            if parts is None:
                for ids, values in stream.blocks():
                    scoring.add(query_ids, ids, values.double() * share)
            else:
                for ids, by_part in stream.part_blocks():
                    for part, values in enumerate(by_part):
                        scoring.add(query_ids, ids, values.double() * share, part)

    def _streams(
        self, rows: Rows, log: RunLog, ids: Tensor | None = None, parts: Parts | None = None
    ) -> Iterator[tuple[TrainingStream, float]]:
        """The training data of every checkpoint, at its weights, and its share in its segment."""
        route = Route.of(self.spec.route)
        for segment, solved in zip(self.segments, self._propagated(rows, log), strict=True):
            for checkpoint, derivatives in segment.members:
                with at_checkpoint(self.problem.model, checkpoint):
                    stream = TrainingStream(derivatives, solved, route, ids=ids, parts=parts)
                    yield stream, 1.0 / len(segment.members)

    def _facts(self) -> dict[str, Any]:
        damping = 1.0 / sum(s.segment.span for s in self.segments)
        return {"damping": damping, "smallest_curvature": min(s.extremes[0] for s in self.segments)}

    def _notes(self) -> Iterator[str]:
        members = sum(len(s.members) for s in self.segments)
        yield (
            f"unrolled over {len(self.segments)} segments with {members} checkpoints; no damping was added, the "
            "lambda above is 1 / (learning rate x steps), which the length of training stands for"
        )
        for k, s in enumerate(self.segments):
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


@contextmanager
def _speaking_of(segment: int, checkpoint: int) -> Iterator[None]:
    """Say which of many checkpoints a sentence is about."""
    try:
        yield
    except (InvalidInput, NonFinite) as error:
        message = str(error)
        error.args = (f"Segment {segment + 1}, checkpoint {checkpoint + 1}: {message[0].lower() + message[1:]}",)
        raise


def _named(given: Any) -> str:
    if isinstance(given, type):
        return f"the class {given.__name__}"
    return "none" if isinstance(given, Sequence) and not given else type(given).__name__
