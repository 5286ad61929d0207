"""How far the assumptions hold at the trained weights: is it a minimum, and which parameters carry the gradient?"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ..core.distributed import World
from ..core.indexing import evenly_spaced
from ..gradients.per_example import Derivatives, rows_one_by_one, slopes
from ..gradients.vjp import weighted_gradient
from ..problem.model_state import preserved
from ..problem.problem import first_batch, sweep
from ..scores.diagnostics import FROZEN, LEFT_OUT

# Examples on which the gradient at the trained weights is looked at.
_LOOK = 128


# Examples whose own gradient's length is measured.
_NORMED = 32


_SHARES = 3


@dataclass(frozen=True)
class StationarityCheck:
    """How the trained weights stand: is it a minimum, and which parameters carry the gradient?"""

    relative_gradient: float
    """|mean gradient of the objective| / mean |per-example gradient|: 0 at a minimum."""
    looked_at: int
    shares: Mapping[str, float]
    """Share of the squared per-example gradient norm by block; parameters left out are under `LEFT_OUT`, or `FROZEN`
    if they are not trainable."""
    used: int
    total: int

    @staticmethod
    def of(derivatives: Derivatives) -> StationarityCheck:
        """Look at a few evenly spaced examples."""
        problem, space = derivatives.problem, derivatives.space
        some = evenly_spaced(len(problem), _LOOK)
        mean = _mean_gradient(derivatives, some)
        if not problem.weight_decay.is_zero:
            here = space.from_parameters({k: v.detach()[None] for k, v in space.values(problem.model).items()})
            mean = mean + here.scaled(space.decay).flat()[0]
        # One backward pass per batch tells the mean; what is typical for one example, fewer of them tell as well.
        few = derivatives.stream(
            ids=evenly_spaced(len(problem), _NORMED), label="looking at the gradient", world=World()
        )
        norms = torch.cat([slab.rows.squared_norms().double().sqrt() for slab in few])
        relative = float(mean.norm()) / float(norms.mean()) if float(norms.max()) > 0 else 0.0
        total_count = sum(p.numel() for p in problem.model.parameters())
        return StationarityCheck(relative, len(some), _shares(derivatives), space.size, total_count)


def _mean_gradient(derivatives: Derivatives, some: Tensor) -> Tensor:
    """The gradient of the mean loss over `some`, flat [P], by ordinary backward passes."""
    problem, space, objective = derivatives.problem, derivatives.space, derivatives.objective
    total: list[Tensor] = []
    for ids, batch in sweep(problem, ids=some, label="looking at the gradient", world=World()):
        with preserved(problem.model, space.names), torch.enable_grad():
            outputs = objective.outputs(problem.model, batch)
            objective.check(outputs.detach(), batch, ids)
            _, slope = slopes(objective, outputs, batch, ids)
            part = weighted_gradient(outputs, list(space.values(problem.model).values()), slope)
        total = part if not total else [a + b for a, b in zip(total, part, strict=True)]
    mean = {k: g[None] / len(some) for k, g in zip(space.names, total, strict=True)}
    return space.from_parameters(mean).flat()[0]


def _shares(derivatives: Derivatives) -> dict[str, float]:
    """Squared gradient norm by block over all floating-point parameters, whether they take part or not."""
    problem, model = derivatives.problem, derivatives.problem.model
    names = [k for k, p in model.named_parameters() if p.is_floating_point()]
    frozen = {k for k, p in model.named_parameters() if not p.requires_grad}
    count = min(_SHARES, len(problem))
    with first_batch(problem, ids=torch.arange(count)) as (ids, batch), preserved(model, names):
        with torch.no_grad():
            outputs = derivatives.objective.outputs(model, batch)
        _, slope = slopes(derivatives.objective, outputs, batch, ids)
        rows = rows_one_by_one(model, derivatives.objective, names, batch, slope)
    block_of = {p: b for b, spec in derivatives.space.blocks.items() for p in spec.parameters}
    sums: dict[str, float] = {}
    for name, value in rows.items():
        key = block_of.get(name, FROZEN if name in frozen else LEFT_OUT)
        sums[key] = sums.get(key, 0.0) + float(value.double().square().sum())
    whole = sum(sums.values())
    return {k: v / whole if whole > 0 else 0.0 for k, v in sums.items()}
