"""How far the assumptions hold at the trained weights: is it a minimum, and which parameters carry the gradient?"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from ..core.batches import batch_slice
from ..core.cut_up import whole
from ..core.distributed import World
from ..gradients.one_by_one import gradients_one_by_one
from ..gradients.per_example import Derivatives, GradientBatch, slopes
from ..gradients.vjp import squared_gradient_norms
from ..problem.model_state import preserved
from ..problem.offloaded import brought_in
from ..scores.diagnostics import FROZEN, LEFT_OUT

# The most examples that are looked at: at a minimum the standard error is then about 1 %.
_MOST = 2048
# All of the data are looked at while their rows take no more numbers than this; beyond it an eighth at most, so that
# a look costs less than a fifth of a pass.
_CHEAP = 1 << 24
# The numbers in the rows of a large model's sample, and the fewest examples.
_AFFORDABLE, _FEWEST = 1 << 30, 16

# Groups of the jackknife: the fewest, the most, and the numbers that their sums may take.
_GROUPS, _GROUP_NUMBERS = (2, 16), 1 << 26

# A factor of the loss is told where it leaves a tenth of the gradient that a minimum may have, or sampling error; where
# gradient of loss and decay are opposite up to this tangent; and of so many parameters, as fewer may be so by chance.
_MET, _OPPOSITE, _PARAMETERS = 0.006, 0.1, 3

# Examples on which the parameters that take no part are looked at, one by one.
_ONE_BY_ONE = 3


@dataclass(frozen=True)
class StationarityCheck:
    """How the trained weights stand: is it a minimum, and which parameters carry the gradient?"""

    relative_gradient: float
    """|gradient of the mean objective| / root mean square of the examples' gradients: 0 at a minimum. Unbiased."""
    error: float
    """Its standard error; 0 where every example was looked at."""
    looked_at: int
    shares: Mapping[str, float]
    """Share of the squared per-example gradient norm by block; parameters left out are under `LEFT_OUT`, or `FROZEN`
    if they are not trainable."""
    used: int
    total: int
    loss_factor: float = 1.0
    """The factor of the loss with which it is, beside the decay, at a minimum; 1 where no other number makes it one."""

    @staticmethod
    def of(
        derivatives: Derivatives, most: int | None = None, also: Callable[[GradientBatch], None] | None = None
    ) -> StationarityCheck:
        """Look once at a random sample of the examples, or at all of them where that is cheap.

        Args:
            derivatives: how gradients are taken.
            most: the most examples that are looked at; None: as many as are worth it.
            also: is given the gradients too, batch by batch.
        """
        problem, space = derivatives.problem, derivatives.space
        sample = Sample.draw(len(problem), space.size, derivatives.numbers or space.size, most)
        look = _Look(derivatives, sample)
        for gradients in derivatives.stream(ids=sample.ids, label="looking at the gradient", world=World()):
            look.add(gradients)
            if also is not None:
                also(gradients)
        moments = look.moments()
        relative, error = moments.relative()
        factor = moments.loss_factor() if relative > _MET and space.size >= _PARAMETERS else 1.0
        total_count = sum(p.numel() for p in problem.model.parameters())
        return StationarityCheck(relative, error, len(sample.ids), look.shares(), space.size, total_count, factor)


@dataclass(frozen=True, eq=False)
class Sample:
    """Which examples are looked at, in dataset order, and the group of each for the jackknife."""

    ids: Tensor
    groups: Tensor
    count: int
    """How many groups there are."""

    @staticmethod
    def draw(n: int, parameters: int, numbers: float, most: int | None = None) -> Sample:
        """A random sample, the same at every call.

        Args:
            n: how many examples there are.
            parameters: the length of a gradient.
            numbers: how many numbers one example's row takes.
            most: the most examples; None: as `sample_size` says.
        """
        size = sample_size(n, numbers)
        size = size if most is None else min(most, size)
        if size == n:
            return Sample(torch.arange(n), torch.zeros(n, dtype=torch.long), 1)
        fewest_groups, most_groups = _GROUPS
        count = min(max(fewest_groups, min(most_groups, _GROUP_NUMBERS // max(1, parameters))), size)
        chosen = torch.randperm(n, generator=torch.Generator().manual_seed(0))[:size]
        ids, order = chosen.sort()
        return Sample(ids, order % count, count)


def sample_size(n: int, numbers: float) -> int:
    """How many of n examples are looked at, where one example's row takes so many numbers.

    >>> sample_size(600, 2e3), sample_size(60_000, 2e3), sample_size(50_000, 2e6), sample_size(32, 1e8)
    (600, 2048, 536, 16)
    """
    if n * numbers <= _CHEAP:
        return min(n, _MOST)
    return max(min(n, _FEWEST), min(_MOST, int(_AFFORDABLE / numbers), n // 8))


@dataclass(frozen=True, eq=False)
class Moments:
    """What the sample says of the examples' gradients, group by group.

    The decay's own gradient w = strength * theta comes last in `products`.
    """

    counts: Tensor
    """Examples per group [B]."""
    products: Tensor
    """Inner products [B + 1, B + 1] of the groups' summed gradients, and of w."""
    squares: Tensor
    """Sum of the squared norms per group [B]."""
    square: float
    """|gradient of the objective|^2 over all groups. From the vector itself: the products would leave rounding of 1e-16
    of their size, whose root is not small."""
    population: int
    per_example: bool
    """Whether every example carries the decay."""

    def relative(self) -> tuple[float, float]:
        """|gradient of the objective| over the typical example's, and its standard error."""
        everyone = torch.ones(len(self.counts), dtype=torch.float64)
        square = self._relative_square(everyone, self.square)
        unseen = 1 - int(self.counts.sum()) / self.population
        variance = 0.0
        if unseen > 0:
            groups = len(self.counts)
            without = torch.tensor([self._relative_square(everyone - row) for row in torch.eye(groups).double()])
            variance = (groups - 1) / groups * float((without - without.mean()).square().sum()) * unseen
        value = math.sqrt(max(0.0, square))
        # The error is known for the square. Far from 0 this is the error of the square over twice the value; at 0 it is
        # the root, which stays finite.
        return value, math.sqrt(value**2 + math.sqrt(variance)) - value

    def loss_factor(self) -> float:
        """The c with which c times the losses and the decay are at a minimum; 1 where no other number makes it one.

        A loss that training took c times (a sum over the examples, a mean over fewer positions, without a factor 1/2)
        has its minimum where its gradient g is -w / c. The c that leaves least is -<g, w> / |g|^2.
        """
        n = float(self.counts.sum())
        mean = self.counts.new_ones(len(self.counts)) / n
        of_losses, along = float(mean @ self.products[:-1, :-1] @ mean), float(mean @ self.products[:-1, -1])
        decay = float(self.products[-1, -1])
        unbiased = of_losses - self._noise(n, float(self.squares.sum()) / n, of_losses)
        if along >= 0 or unbiased <= 0 or decay * unbiased > (1 + _OPPOSITE**2) * along**2:
            return 1.0
        factor = -along / unbiased
        products = self.products.clone()
        products[-1] /= factor
        products[:, -1] /= factor
        square = max(0.0, of_losses + 2 * along / factor + decay / factor**2)
        value, error = replace(self, products=products, square=square).relative()
        return factor if value <= max(_MET, 2 * error) and error < 5 * _MET else 1.0

    def _noise(self, n: float, mean_square: float, of_losses: float) -> float:
        """By how much the square of a sample's mean is too large: the variance of that mean."""
        return (1 - n / self.population) * (mean_square - of_losses) / (n - 1) if n > 1 else 0.0

    def _relative_square(self, taken: Tensor, of_objective: float | None = None) -> float:
        """The unbiased square of the objective's gradient over the examples' mean square, of the groups `taken`."""
        n, mean_square = float(taken @ self.counts), float(taken @ self.squares)
        mean_square /= n
        mean = torch.cat([taken / n, torch.ones(1, dtype=torch.float64)])
        decay = float(self.products[-1, -1])
        of_losses = float(mean[:-1] @ self.products[:-1, :-1] @ mean[:-1])
        of_objective = float(mean @ self.products @ mean) if of_objective is None else of_objective
        noise = self._noise(n, mean_square, of_losses)
        # A fixed decay is no example's; where it outweighs all of them, it is the scale.
        typical = mean_square + of_objective - of_losses if self.per_example else max(mean_square, decay)
        return (of_objective - noise) / typical if typical > 0 else 0.0


@dataclass(eq=False)
class _Look:
    """Adds up what one pass over the sample shows."""

    derivatives: Derivatives
    sample: Sample
    sums: dict[str, Tensor] = field(init=False)
    """The groups' summed gradients by block, [B, P_b]."""
    squares: Tensor = field(init=False)
    """Sum of the squared norms, by group and block."""
    few: dict[str, float] = field(default_factory=dict)
    """Squared norms by block over the few examples that are looked at one by one."""
    done: int = 0
    frozen: frozenset[str] = field(init=False)
    """Parameters that are not trainable."""
    offloaded: bool = field(init=False)
    """Whether some are brought in for each pass, so that their share of the gradient cannot be seen."""

    def __post_init__(self) -> None:
        space = self.derivatives.space
        named = self.derivatives.problem.model.named_parameters()
        # Noted before the pass, which makes exactly the chosen parameters trainable.
        self.frozen = frozenset(name for name, p in named if not p.requires_grad)
        self.offloaded = bool(brought_in(self.derivatives.problem.model))
        like = space.like(self.derivatives.problem.model)
        wide = torch.promote_types(like.dtype, torch.float32)
        shape = self.sample.count
        self.sums = {k: torch.zeros(shape, b.numel, dtype=wide, device=like.device) for k, b in space.blocks.items()}
        self.squares = torch.zeros(self.sample.count, len(space.blocks), dtype=torch.float64)

    def add(self, gradients: GradientBatch) -> None:
        """Add one batch of the sample."""
        groups = self.sample.groups[self.done : self.done + len(gradients.ids)]
        squares = torch.stack([b.squared_norms() for b in gradients.rows.blocks.values()], 1)
        self.squares.index_add_(0, groups, squares.double().cpu())
        for group in sorted(set(groups.tolist())):
            rows = gradients.rows if self.sample.count == 1 else gradients.rows.take(torch.where(groups == group)[0])
            ones = torch.ones(1, len(rows), dtype=rows.dtype, device=rows.device)
            for name, block in rows.blocks.items():
                self.sums[name][group] += block.combine(ones)[0].flatten()
        self._add_left_out(gradients, min(_ONE_BY_ONE - self.done, len(gradients.ids)))
        self.done += len(gradients.ids)

    def _add_left_out(self, gradients: GradientBatch, count: int) -> None:
        """Squared norms over all floating-point parameters, where some take no part."""
        problem, space = self.derivatives.problem, self.derivatives.space
        named = dict(problem.model.named_parameters())
        names = [k for k, p in named.items() if p.is_floating_point()]
        if count <= 0 or self.offloaded or not set(names) - set(space.names):
            return
        for e in range(count):  # one at a time, and of its gradient one parameter's: all are as large as the model
            one = batch_slice(gradients.batch, len(gradients.ids), slice(e, e + 1))
            with preserved(problem.model, names):
                squares = self._squares_of(one, gradients.ids[e : e + 1], {name: named[name] for name in names})
            for name, square in squares.items():
                key = "used" if name in space.names else FROZEN if name in self.frozen else LEFT_OUT
                self.few[key] = self.few.get(key, 0.0) + square

    def _squares_of(self, one: Any, ids: Tensor, parameters: dict[str, Tensor]) -> dict[str, float]:
        """Squared norm of one example's gradient in each parameter."""
        model, objective = self.derivatives.problem.model, self.derivatives.objective
        cut_up = self.derivatives.problem.is_cut_up
        with torch.set_grad_enabled(not cut_up):
            outputs = objective.outputs(model, one)
        _, slope = slopes(objective, outputs, one, ids)
        if not cut_up:
            return squared_gradient_norms(outputs, parameters, slope)
        rows = gradients_one_by_one(model, objective, list(parameters), one, slope)
        return {name: float(whole(value).double().square().sum()) for name, value in next(rows).items()}

    def moments(self) -> Moments:
        """The inner products of what was added up."""
        problem, space = self.derivatives.problem, self.derivatives.space
        weights = space.values(problem.model)
        products = torch.zeros(self.sample.count + 1, self.sample.count + 1, dtype=torch.float64)
        square = 0.0
        for name, sums in self.sums.items():
            own = {part: whole(weights[part]).detach()[None] for part in space.blocks[name].parameters}
            decay = space.block(name, own).dense().flatten(1).to(sums) * space.decay[name]
            cross = (sums @ decay.T).double().cpu()
            products[:-1, :-1] += (sums @ sums.T).double().cpu()
            products[:-1, -1:] += cross
            products[-1:, :-1] += cross.T
            products[-1:, -1:] += (decay @ decay.T).double().cpu()
            mean = sums.sum(0, dtype=torch.float64) / self.done + decay[0].double()
            square += float(mean @ mean)
        counts = torch.bincount(self.sample.groups, minlength=self.sample.count).double()
        per_example = problem.weight_decay.per_example
        return Moments(counts, products, self.squares.sum(1), square, len(problem), per_example)

    def shares(self) -> dict[str, float]:
        """Squared gradient norm by block, as shares of the whole; what takes no part is judged by the few.

        Empty where what takes no part cannot be seen.
        """
        if self.offloaded:
            return {}
        by_block = self.squares.sum(0)
        few, whole = sum(self.few.values()), float(by_block.sum())
        apart = {k: self.few[k] / few if few > 0 else 0.0 for k in (LEFT_OUT, FROZEN) if k in self.few}
        used = 1 - sum(apart.values())
        names = self.derivatives.space.blocks
        shares = {k: float(v) / whole * used if whole > 0 else 0.0 for k, v in zip(names, by_block, strict=True)}
        return shares | apart
