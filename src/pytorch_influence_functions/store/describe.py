"""What is told of an index: what it will cost, what it holds, and how far its scores can be trusted."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import final

import torch
from torch import Tensor

from ..core.notebook import Printable
from ..curvature.base import Budget
from ..curvature.cost import ProblemSize
from ..influence.assumptions import StationarityCheck
from ..influence.run_log import describe_mode
from ..problem.problem import Problem
from ..scores.diagnostics import Diagnostics
from ..solvers.forecast import operations_per_second
from .build import LABELS, Plan
from .fidelity import estimate_fidelity
from .fitted_basis import composition_of, make_projector
from .folder import IndexFolder
from .manifest import Manifest
from .representation import Factors


@final
@dataclass(frozen=True, repr=False)
class IndexForecast(Printable):
    """What building an index will cost, before it is paid for.

    Args:
        representation: what would be kept of a gradient.
        dtype: the type of stored numbers.
        why: why this one.
        examples: how many there are; None: not known.
        bytes_each: of one example on the disk.
        bytes: of all of them; None: not known.
        passes: forward and backward passes over the training data.
        seconds: from one measured batch, and counted operations; None: not known.
        fidelity: how true a random projection is, in words; empty for what is not projected at random.
    """

    representation: str
    dtype: str
    why: str
    examples: int | None
    bytes_each: float
    bytes: float | None
    passes: float
    seconds: float | None
    fidelity: str = ""

    @staticmethod
    def of(plan: Plan, count: int | None) -> IndexForecast:
        """Count, and time one batch.

        Args:
            plan: what would be built.
            count: how many examples there are; None: not known.
        """
        choice, budget = plan.choice, Budget.of(plan.method.memory)
        composition, _ = composition_of(plan.method)
        exact = isinstance(choice.representation, Factors)
        projector = (
            None if exact else make_projector(choice.representation, composition.curvature, plan.derivatives, budget)
        )
        projected = plan.derivatives if projector is None else replace(plan.derivatives, projector=projector)
        size = ProblemSize.of(projected, 0)
        fitting = composition.solver.cost(size, composition.curvature)
        n = len(plan.problem)
        rotated = 2.0 * sum(torch.Size(b.shape).numel() * sum(b.shape) for b in size.blocks.values())
        each = size.seconds + (0.0 if exact else rotated / operations_per_second())
        seconds = (
            None
            if count is None
            else (fitting.passes * n * size.seconds + fitting.flops / operations_per_second() + count * each)
        )
        passes = fitting.passes + (1.0 if count is None else count / n)
        total = None if count is None else count * choice.bytes_each
        fidelity = estimate_fidelity(choice.representation, plan.derivatives)
        return IndexForecast(
            repr(choice.representation),
            choice.codec.name,
            choice.why,
            count,
            choice.bytes_each,
            total,
            passes,
            seconds,
            "" if fidelity is None else str(fidelity),
        )

    def __str__(self) -> str:
        count = "an unknown number of" if self.examples is None else f"{self.examples:,}"
        size = "" if self.bytes is None else f", {self.bytes / 1e6:,.1f} MB in all"
        took = (
            "unknown"
            if self.seconds is None
            else f"about {self.seconds:,.1f} s on this machine (measured on one batch)"
        )
        return (
            f"keeps    {self.representation} in {self.dtype}\nwhy      {self.why}\n"
            f"size     {count} examples of {self.bytes_each:,.0f} bytes each{size}\n"
            f"passes   {self.passes:,.1f} forward+backward passes over the training data\n"
            f"time     {took}" + (f"\ntrue     {self.fidelity}" if self.fidelity else "")
        )


def labels_of_index(folder: IndexFolder) -> Tensor | None:
    """One label per example that was given, 0 for those that compaction dropped; None where some have none."""
    manifest = folder.manifest
    labels: Tensor | None = None
    for shard in manifest.shards:
        own = folder.glance(shard.file).tensors.get(LABELS)
        if own is None:
            return None
        if labels is None:
            labels = torch.zeros(manifest.examples, dtype=own.dtype)
        labels[shard.ids] = own.to(labels.dtype)
    return labels


def diagnostics_of(
    manifest: Manifest, problem: Problem, damping: float, decay: Mapping[str, float], queries: int, start: float
) -> Diagnostics:
    """The record that goes with scores from an index.

    Args:
        manifest: of the index.
        problem: the model that answered.
        damping: the mean of what was added to the curvature.
        decay: weight decay by block.
        queries: how many were asked.
        start: when it began, by `time.perf_counter()`.
    """
    facts = manifest.facts
    check = StationarityCheck(**facts["stationarity"])
    removed = sum(stop - first for first, stop in manifest.removed)
    kept = f"{facts['described']} in {facts['dtype']}"
    notes = [f"from an index of {manifest.examples:,} examples that keeps {kept}"]
    notes += [facts["fidelity"]] if facts.get("fidelity") else []
    notes += [f"{removed:,} examples were removed from the index and have no score"] if removed else []
    if len(manifest.parts) > 1:
        notes.append(
            f"{manifest.examples - manifest.parts[1]:,} of the examples were appended; the curvature is that of the "
            "data that the index was built from"
        )
    return Diagnostics(
        method=facts["method"],
        why="the index was built with it",
        damping=damping,
        residual_max=0.0,
        residual_mean=0.0,
        n_train=manifest.examples,
        n_queries=queries,
        parameters_used=check.used,
        parameters_total=check.total,
        gradient_shares=check.shares,
        relative_gradient=check.relative_gradient,
        relative_gradient_error=check.error,
        gradient_examples=check.looked_at,
        loss_factor=check.loss_factor,
        mode=describe_mode(problem),
        objective=facts["loss"],
        routes=facts["routes"],
        seconds=time.perf_counter() - start,
        notes=(*notes, *manifest.notes),
        weight_decay=min(decay.values(), default=0.0),
        weight_decay_most=max(decay.values(), default=0.0),
        measures_gradients=False,
    )
