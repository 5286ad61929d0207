"""Any curvature, on a fixed random part of the training data."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, final

import torch
from torch.utils.data import Subset

from ..core.errors import InvalidInput
from ..core.validate import whole_number
from ..gradients.per_example import Derivatives
from ..linalg.operator import AbstractSymmetric
from .base import AbstractCurvature, Budget, Form
from .cost import Amount, Cost, ProblemSize


@final
@dataclass(frozen=True, repr=False)
class Subsample(AbstractCurvature):
    """Another curvature, its mean taken over `examples` drawn without replacement: the same ones every time.

    Scores are still of all N training examples; only C comes from fewer, so every product of `CG` costs
    `examples / N` of a full one. With all of them it is the curvature itself.

    Args:
        curvature: which matrix, such as `GGN()`.
        examples: how many; at least 1, at most N (a smaller dataset is taken whole).
        seed: which ones.

    Raises `InvalidInput` for something that is no curvature, a subsample of a subsample, or a number below 1.

    >>> from pytorch_influence_functions.curvature import GGN
    >>> Subsample(GGN(), examples=500)
    Subsample(curvature=GGN(), examples=500)
    """

    # Checked below, in words a type checker at run time would not find.
    curvature: Any
    examples: Any
    seed: int = 0

    def __post_init__(self) -> None:
        inner = self.curvature
        if not isinstance(inner, AbstractCurvature) or isinstance(inner, Subsample):
            raise InvalidInput(f"Subsample() takes a curvature such as GGN(), got {inner!r}.")
        whole_number("examples", self.examples, owner=self)

    @property
    def forms(self) -> tuple[Form, ...]:  # type: ignore[override]
        """Those of the curvature inside."""
        return self._inner.forms

    @property
    def layerwise(self) -> bool:  # type: ignore[override]
        return self._inner.layerwise

    @property
    def semidefinite(self) -> bool:  # type: ignore[override]
        return self._inner.semidefinite

    @property
    def drops_directions(self) -> bool:
        return self._inner.drops_directions

    @property
    def multiplied(self) -> AbstractCurvature | None:
        return self._inner.multiplied

    def rows(self, size: ProblemSize) -> int | None:
        return self._inner.rows(self._part(size)[0])

    def projectable(self, form: Form) -> bool:
        return self._inner.projectable(form)

    def of(self, derivatives: Derivatives, form: Form, budget: Budget) -> AbstractSymmetric:
        self.require(form)
        return self._inner.of(self._fewer(derivatives), form, budget)

    def cost(self, size: ProblemSize, form: Form) -> Cost:
        part, share = self._part(size)
        return self._inner.cost(part, form).over_share(share)

    def product_cost(self, size: ProblemSize, vectors: Amount) -> Cost:
        part, share = self._part(size)
        return self._inner.product_cost(part, vectors).over_share(share)

    # ---------------------------------------------------------------- inner workings

    @property
    def _inner(self) -> AbstractCurvature:
        inner: AbstractCurvature = self.curvature
        return inner

    def _part(self, size: ProblemSize) -> tuple[ProblemSize, float]:
        """The size of the part, and its share of all examples."""
        fewer = min(size.examples, self.examples)
        return replace(size, examples=fewer), fewer / size.examples

    def _fewer(self, derivatives: Derivatives) -> Derivatives:
        problem = derivatives.problem
        n = len(problem)
        if self.examples >= n:
            return derivatives
        # In dataset order, so that reading them is as local as reading all.
        chosen = torch.randperm(n, generator=torch.Generator().manual_seed(self.seed))[: self.examples].sort().values
        source = replace(
            problem.data,
            dataset=Subset(problem.data.dataset, chosen.tolist()),
            _determinism=dict(problem.data._determinism),
        )
        return replace(derivatives, problem=problem.with_(data=source))
