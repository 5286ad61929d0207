"""Tail patch: take one training step on what a method puts first, and see how far the query moves."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, final

import torch
from jaxtyping import Float
from torch import Tensor

from ..core.distributed import World
from ..core.errors import InvalidInput, NonFinite, UnknownName, name_ids, nearest
from ..core.validate import whole_number
from ..influence.checks import check_problem
from ..influence.question import resolve_measure
from ..objectives.base import AbstractObjective
from ..problem.data import Source
from ..problem.model_state import plain_autograd, preserved
from ..problem.problem import Problem, sweep
from .correlate import RESAMPLES, Estimate
from .recipe import Optimizer
from .removal import helpful_orders
from .table import contenders

_STEP: Optimizer = partial(torch.optim.SGD, lr=1e-3)


@final
@dataclass(frozen=True, eq=False, repr=False)
class TailPatch:
    """How much better each query became by one step on an example that a method put first. More is better.

    Args:
        k: how many of each query's first examples were stepped on, each alone.
        changes: for each method [Q, k], the measure after the step less before it; column j is the j-th most helpful.
        lower_is_better: of the measure.
        protocol: a description.
        left_out: baselines that could not be computed, with the reason.
    """

    k: int
    changes: Mapping[str, Float[Tensor, "q k"]]
    lower_is_better: bool
    protocol: str
    left_out: Mapping[str, str]

    def gain(self, name: str, resamples: int = RESAMPLES) -> Estimate:
        """The mean over queries and their k examples of how much better the measure became; of -log p, in nats.

        The interval resamples queries, the same ones for every method, so that `gain(a).minus(gain(b))` is paired.

        Args:
            name: of a method.
            resamples: of the queries.

        Raises:
            UnknownName: no such method.
        """
        if name not in self.changes:
            raise UnknownName(f"No method {name!r} in this tail patch.{nearest(name, self.changes)}")
        change = self.changes[name].double().mean(1)
        better = -change if self.lower_is_better else change
        return Estimate.mean_of(better, self.protocol, resamples)

    def __str__(self) -> str:
        gains = {name: self.gain(name) for name in self.changes}
        width = max(map(len, gains))
        lines = [f"gain of a query by {self.protocol}; 95 % intervals over queries"]
        for name, gain in sorted(gains.items(), key=lambda pair: -pair[1].value):
            lines.append(f"  {name:<{width}}  {gain.value:+.3g} ({gain.low:+.3g} to {gain.high:+.3g})")
        lines += [f"  {name:<{width}}  not available: {why}" for name, why in self.left_out.items()]
        return "\n".join(lines)

    __repr__ = __str__


@plain_autograd()
def tail_patch(
    problem: Problem,
    methods: Any,
    queries: Any,
    k: int = 10,
    *,
    optimizer: Optimizer = _STEP,
    measure: Any = None,
) -> TailPatch:
    """One training step on each of a query's k most helpful examples: how far does the query's measure move?

    What *adding* an example once more does, at the trained weights and without any retraining: the measure of
    retrieval for large language models. The step is taken on the loss of one example alone, from the problem's own
    weights every time, in eval mode and without weight decay; afterwards the model is as it was. For small steps of
    plain SGD it is what a gradient dot product predicts to first order, so it favours that method by construction:
    read it as *does a step on this text teach the answer*, and beside removal (`removal_curves`).

    Up to `k` steps per query and method, and as many forward passes of one query; an example that several ask for is
    stepped on once. The baselines of `evaluate` are run beside the methods, BM25 too where the data are texts.

    Args:
        problem: the trained model with its data.
        methods: as in `evaluate`: names, methods, or scores [queries, examples] of all training examples, in a
            dictionary or a list.
        queries: a Dataset, DataLoader, tensors or arrays, or `ptif.hf.query(...)`.
        k: how many examples of each query, from 1 to the number of training examples.
        optimizer: makes the optimiser from parameters, a new one for every step; its rate is the size of the step,
            such as the last one of training. Plain SGD with 1e-3 where nothing is said.
        measure: what is measured on a query; `None`: the training loss.

    Raises:
        InvalidInput: k out of range, scores that do not fit, an optimizer that is not a function.
        NonFinite: a step leads to a measure that is NaN or infinite; the example is named.

    Reference: Chang et al. (2024), "Scalable Influence and Fact Tracing for Large Language Model Pretraining".

    >>> import pytorch_influence_functions as ptif
    >>> model, x = torch.nn.Linear(2, 1, bias=False), torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    >>> problem = ptif.Problem(model, ptif.SquaredError(), (x, torch.full((2, 1), 9.0)))
    >>> patch = tail_patch(problem, {"dot": ptif.methods.grad_dot()}, (x[:1], torch.full((1, 1), 9.0)), k=1)
    >>> patch.gain("dot").value > 0
    True
    """
    check_problem(problem)
    n = len(problem)
    k = whole_number("k", k, 1, n, hint="there are no more training examples")
    if not callable(optimizer):
        raise InvalidInput(
            f"optimizer must be a function of parameters that makes one, got {type(optimizer).__name__}; every step "
            "needs a new one, so give functools.partial(torch.optim.SGD, lr=1e-3) or the like."
        )
    source = problem.data.read_alike(queries)
    trained = resolve_measure(problem, problem.objective, problem.objective, problem.data)
    measured = resolve_measure(problem, trained, measure, source)
    scored, left_out = contenders(methods, (len(source), n), problem, source, measure)
    first = {c.name: helpful_orders(c.scores, (len(source), n))[:, :k] for c in scored}
    asked: dict[int, set[int]] = {}
    for order in first.values():
        for q, row in enumerate(order.tolist()):
            for i in row:
                asked.setdefault(i, set()).add(q)
    changes = _Steps(problem, trained, measured, optimizer).changes(asked, source)
    tables = {
        name: torch.tensor([[changes[i, q] for i in row] for q, row in enumerate(order.tolist())], dtype=torch.float64)
        for name, order in first.items()
    }
    protocol = f"one step on each of its first {k}, {_step_name(optimizer)}, {len(source)} queries"
    return TailPatch(k, tables, measured.lower_is_better, protocol, left_out)


def _step_name(optimizer: Any) -> str:
    made = optimizer.func if isinstance(optimizer, partial) else optimizer
    settings = [f"{key}={value:g}" for key, value in getattr(optimizer, "keywords", {}).items() if key == "lr"]
    return f"{getattr(made, '__name__', type(made).__name__)}({', '.join(settings)})"


@dataclass(frozen=True, eq=False)
class _Steps:
    """Single steps away from a problem's weights, and what they do to queries."""

    problem: Problem
    trained: AbstractObjective
    measured: AbstractObjective
    optimizer: Optimizer

    def changes(self, asked: Mapping[int, set[int]], source: Source) -> dict[tuple[int, int], float]:
        """(training example, query) -> the change of the query's measure by one step on the example."""
        problem = self.problem
        changes: dict[tuple[int, int], float] = {}
        single = replace(source, batch_size=1, fixed=True)
        own = replace(problem.data, batch_size=1, fixed=True)
        batches = [(int(ids), batch) for ids, batch in sweep(problem, single, label="queries", world=World())]
        before = {q: self._measure(batch) for q, batch in batches}
        queries = dict(batches)
        for ids, batch in sweep(problem, own, sorted(asked), "tail patch", World()):
            example = int(ids)
            with self._stepped(batch):
                after = {q: self._measure(queries[q]) for q in sorted(asked[example])}
            bad = [q for q, value in after.items() if not math.isfinite(value)]
            if bad:
                raise NonFinite(
                    f"After one step on training example {example} the measure of queries {name_ids(bad)} is NaN or "
                    "infinite; give an optimizer with a smaller rate."
                )
            changes |= {(example, q): value - before[q] for q, value in after.items()}
        return changes

    def _measure(self, batch: Any) -> float:
        with preserved(self.problem.model), torch.no_grad():
            return float(self.measured.losses(self.measured.outputs(self.problem.model, batch), batch).sum())

    @contextmanager
    def _stepped(self, batch: Any) -> Iterator[None]:
        """The model after one step on one example; its weights are put back to the bit."""
        model, names = self.problem.model, self.problem.space.names
        with preserved(model, names):
            by_name = dict(model.named_parameters())
            parameters = [by_name[name] for name in names]
            before = [p.detach().clone() for p in parameters]
            try:
                with torch.enable_grad():
                    loss = self.trained.losses(self.trained.outputs(model, batch), batch).sum()
                    gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
                for parameter, gradient in zip(parameters, gradients, strict=True):
                    parameter.grad = gradient
                self.optimizer(parameters).step()
                yield
            finally:
                with torch.no_grad():
                    for parameter, value in zip(parameters, before, strict=True):
                        parameter.grad = None
                        parameter.copy_(value)
