"""The fewest training examples whose removal changes a conclusion: a prediction, a sign, a metric's threshold."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias, final

import torch
from torch import Tensor, nn

from ..core.distributed import current
from ..core.errors import InvalidInput
from ..core.validate import finite_number, whole_number
from ..curvature.own_losses import find_obstacle
from ..influence.attribution import Attribution, Influence
from ..influence.question import read_asked
from ..methods.names import as_method
from ..objectives.class_scores import class_scores
from ..problem.agreement import entry
from ..problem.edited import label_of
from ..problem.problem import Problem, first_batch
from ..problem.weight_decay import WeightDecay
from ..scaling.base import Raw
from ..scaling.leverage import Leverage
from .classes import require_class_scores
from .statistic import DataStatistic
from .training_once import train_once
from .what_if import what_if

Statistic: TypeAlias = Callable[..., Tensor]
"""`model -> number`, or `(model, weights) -> number` with a weight for every training example, [N]: 1 in, 0 out."""

# Every round removes this share of the examples that seem still needed, then looks again.
_SHARE = 0.5
# Sets of up to so many examples are pruned, for the price of one Newton step each.
_PRUNED = 200


@final
@dataclass(frozen=True, eq=False)
class SmallestRemoval:
    """A set of training examples whose removal is predicted to carry a statistic past a threshold.

    Attributes:
        ids: which training examples, the most effective first; places in the whole dataset.
        n_train: how many training examples there are.
        before: the statistic of the trained model.
        predicted: the statistic of the edited model without them.
        threshold: what had to be passed.
        measured: the statistic after training again without them; None where no recipe was given.
        retrained: the statistic after training again with all of the data, in the same way: `measured - retrained` is
            what the removal did, to be compared with `predicted - before`. Far from `before`, the recipe does not lead
            back to this model.
        path: (how many are out, predicted statistic) after every round.
    """

    ids: tuple[int, ...]
    n_train: int
    before: float
    predicted: float
    threshold: float
    measured: float | None
    retrained: float | None
    path: tuple[tuple[int, float], ...]

    @property
    def found(self) -> bool:
        """Whether the prediction passes the threshold."""
        return _passes(self.before, self.predicted, self.threshold)

    @property
    def confirmed(self) -> bool | None:
        """Whether training again without them passed it, and with all of the data did not; None: not tried."""
        if self.measured is None or self.retrained is None:
            return None
        passed, by_itself = (_passes(self.before, v, self.threshold) for v in (self.measured, self.retrained))
        return passed and not by_itself

    def __repr__(self) -> str:
        share = f"{len(self.ids)} of {self.n_train} training examples ({100 * len(self.ids) / self.n_train:.3g} %)"
        if not self.found:
            return f"SmallestRemoval(none found: without {share} the statistic is still {self.predicted:.4g})"
        tried = "" if self.measured is None else f"; training again {self.retrained:.4g} -> {self.measured:.4g}"
        return f"SmallestRemoval({share}: {self.before:.4g} -> {self.predicted:.4g}, past {self.threshold:.4g}{tried})"


@entry
def smallest_removal(
    problem: Problem,
    statistic: Statistic,
    threshold: float = 0.0,
    most: int | float = 0.5,
    method: Any = None,
    recipe: Any = None,
    seed: int = 0,
) -> SmallestRemoval:
    """The smallest set of training examples whose removal carries a statistic past a threshold, found adaptively.

    Each round scores every example that is left by how far its removal moves the statistic, takes out half of those
    that seem needed, moves the model by one Newton step (see `what_if`), and scores again: masked examples come to
    light, which one sort of the first scores misses. In the end, whoever is not needed is put back. The set is an upper
    bound of the smallest one.

    Args:
        problem: model, loss and training data, at one set of weights.
        statistic: `model -> number`, differentiable in the parameters: a coefficient, a margin, a mean over a slice; or
            `(model, weights) -> number`, where it depends on the training data themselves, such as `TStatistic`:
            `weights` [N] are 1 for the examples that are in and 0 for those that are out, and it is differentiable in
            them too.
        threshold: what has to be passed, from whichever side the statistic is on.
        most: the largest set to try: a number of examples, or a share of them.
        method: an `Influence` by name or made; `None`: chosen by size.
        recipe: how to train again without the set, to confirm: a `ptif.evaluation.Recipe`, or your own function
            `(dataset, seed) -> trained model`; `None`: not tried. It is trained with all of the data as well.
        seed: of these trainings.

    Raises:
        InvalidInput: the problem is none; the statistic is no number, is not differentiable in a parameter, reads
            another model than the one it is given, or lies on the threshold.

    Reference: Broderick, Giordano & Meager (2020), "An Automatic Finite-Sample Robustness Metric"; Hu et al. (2024),
    "Most Influential Subset Selection".

    Example:
        >>> x = torch.randn(60, 2)
        >>> y = 0.1 * x[:, :1] + torch.randn(60, 1)
        >>> model = nn.Linear(2, 1)
        >>> problem = Problem(model, nn.MSELoss(), (x, y))
        >>> smallest_removal(problem, lambda m: m.weight[0, 0], most=0.2).n_train
        60
    """
    _check_problem(problem, "smallest_removal")
    finite_number("threshold", threshold)
    limit = _limit(problem, most)
    spec = as_method(method)
    if not isinstance(spec, Influence) or problem.checkpoints:
        raise InvalidInput(
            "smallest_removal() moves one model along one Newton step after another; give an Influence such as "
            "method='exact', and a problem without checkpoints."
        )
    everything = torch.arange(len(problem))
    measured_by = DataStatistic.of(statistic, len(problem))
    before = measured_by.value(problem.model, everything)
    if before == threshold:
        raise InvalidInput(f"The statistic is {before:.4g}, the threshold itself; give another threshold.")
    search = _Search(spec, measured_by, before, threshold)
    state, path = _State(problem, everything, before), []
    first = spec.fit(problem)
    while not search.passes(state.value) and len(state.order) < limit:
        fitted = spec.fit(state.problem) if state.order else first
        chosen = search.choose(fitted, state, limit - len(state.order))
        if not len(chosen):
            measured_by.check_reads(state.problem, state.kept)
            break
        state = search.without(fitted, state, chosen)
        path.append((len(state.order), state.value))
    if search.passes(state.value):
        state = search.prune(first, state)
    order = torch.tensor(state.order, dtype=torch.long)
    positions = problem.data.positions
    ids = tuple((order if positions is None else positions[order]).tolist())
    measured = retrained = None
    if recipe is not None and search.passes(state.value):
        again = train_once(recipe, problem.data.subset(state.kept), seed)
        measured = measured_by.value(again, state.kept)
        retrained = measured_by.value(train_once(recipe, problem.data, seed), everything)
    return SmallestRemoval(ids, len(problem), before, state.value, threshold, measured, retrained, tuple(path))


def flip_prediction(
    problem: Problem,
    query: Any,
    most: int | float = 0.5,
    method: Any = None,
    recipe: Any = None,
    seed: int = 0,
) -> SmallestRemoval:
    """The smallest set of training examples without which the model would predict another class for a query.

    The statistic is how far the predicted class's output lies above the next one; below zero the prediction flips. For
    one logit it is the logit, with the sign of the prediction.

    Args:
        problem, most, method, recipe, seed: as for `smallest_removal`.
        query: one query, as data: `(x[None], y[None])`, or a dataset of one example. Its label is not used, so the
            inputs alone, `x[None]`, will do; a text where the problem is of texts with labels (`ptif.hf.problem`).

    Raises:
        InvalidInput: the problem is none, there is more than one query, or the model gives no class scores (a
            regression).

    Example:
        >>> x, y = torch.randn(60, 2), torch.arange(60) % 2
        >>> problem = Problem(nn.Linear(2, 2), nn.CrossEntropyLoss(), (x, y))
        >>> flip_prediction(problem, (x[:1], y[:1]), most=5).threshold
        0.0
    """
    _check_problem(problem, "flip_prediction")
    if isinstance(query, Tensor):
        label = torch.as_tensor(label_of(problem.data.item(0)))
        query = (query, label.expand(len(query), *label.shape))
    query = read_asked(problem, query, "query")
    source = problem.data.read_alike(query, problem.batch_size)
    if len(source) != 1:
        raise InvalidInput(f"flip_prediction() is about one query, and {len(source)} were given; pick one.")
    require_class_scores(
        problem,
        "flip_prediction",
        "use smallest_removal() with a statistic of your own that changes its sign with the answer, such as lambda m: "
        "m(x)[0, 0]",
    )
    with first_batch(problem, source) as (_, batch), torch.no_grad():
        scores = class_scores(problem.objective, problem.objective.outputs(problem.model, batch))[0]
    predicted = int(scores.argmax()) if len(scores) > 1 else int(scores[0] > 0)

    def lead(model: nn.Module) -> Tensor:
        scores = class_scores(problem.objective, problem.objective.outputs(model, batch))[0]
        if len(scores) == 1:
            return (2 * predicted - 1) * scores[0]
        others = torch.cat([scores[:predicted], scores[predicted + 1 :]])
        return scores[predicted] - others.max()

    return smallest_removal(problem, lead, 0.0, most, method, recipe, seed)


@dataclass(frozen=True, eq=False)
class _State:
    """The problem after some rounds: the edited model with the data that are left."""

    problem: Problem
    kept: Tensor
    """Positions in the first problem's data."""
    value: float
    order: tuple[int, ...] = ()
    """Positions that were taken out, in that order."""


@dataclass(frozen=True, eq=False)
class _Search:
    """What is looked for, and how a set grows and shrinks towards it."""

    spec: Influence
    statistic: DataStatistic
    before: float
    threshold: float

    def passes(self, value: float) -> bool:
        return _passes(self.before, value, self.threshold)

    def choose(self, fitted: Attribution, state: _State, most: int) -> Tensor:
        """Which to take out next, as positions in this round's data: half of those that seem needed."""
        moves = removal_moves(fitted, self.statistic, state.kept)
        wanted = self.threshold - state.value
        sizes, order = (moves * (1.0 if wanted > 0 else -1.0)).sort(descending=True)
        enough = (sizes.clamp_min(0.0).cumsum(0) >= abs(wanted)).nonzero()
        needed = int(enough[0]) + 1 if len(enough) else int((sizes > 0).sum())
        count = min(max(1, int(_SHARE * needed)), most, len(order) - 1)
        return order[:count][sizes[:count] > 0]

    def without(self, fitted: Attribution, state: _State, chosen: Tensor) -> _State:
        """One Newton step later, without the chosen examples."""
        problem, left = state.problem, torch.ones(len(state.kept), dtype=torch.bool)
        left[chosen] = False
        rest = left.nonzero().flatten()
        positions = problem.data.positions
        edited = what_if(fitted, remove=(chosen if positions is None else positions[chosen]).tolist()).model()
        decay = problem.weight_decay
        if not decay.per_example:
            # The sum over the examples shrinks and the weight decay does not.
            decay = _scaled(decay, len(state.kept) / len(rest))
        smaller = problem.with_(model=edited, data=problem.data.subset(rest), weight_decay=decay)
        order = (*state.order, *state.kept[chosen].tolist())
        kept = state.kept[rest]
        value = self.statistic.value(edited, kept)
        if value == state.value:
            self.statistic.check_reads(smaller, kept)
        return _State(smaller, kept, value, order)

    def prune(self, first: Attribution, state: _State) -> _State:
        """Put back whoever is not needed, the last first: later rounds make some of the earlier choices superfluous."""
        if not 1 < len(state.order) <= _PRUNED:
            return state
        whole = _State(first.problem, torch.arange(len(first.problem)), self.before)
        for candidate in reversed(state.order):
            fewer = [i for i in state.order if i != candidate]
            if fewer:
                trial = self.without(first, whole, torch.tensor(fewer))
                state = trial if self.passes(trial.value) else state
        return state


def removal_moves(fitted: Attribution, statistic: DataStatistic, kept: Tensor) -> Tensor:
    """How far the removal of each training example moves a statistic of the model; [n] in float64.

    Corrected for each example's own leverage where the fit solves directly, so that it costs little; else to first
    order.

    Args:
        fitted: a method fitted at one set of weights.
        statistic: what is moved.
        kept: positions of the fitted data's examples among those that the statistic weighs, [n].
    """
    member, n = fitted.members[0], len(fitted.problem)
    by_parameters, by_weights = statistic.gradients(fitted, kept)
    solved = member.solve(by_parameters).unwrap()
    direct = member.composition.solver.vectors_held == 0
    corrected = direct and find_obstacle(member.derivatives) is None
    scaling = Leverage() if corrected else Raw()
    by_rows = torch.zeros_like(by_weights)
    for gradients in member.training_rows(scaling):
        by_rows[gradients.ids] = solved.inner(gradients.rows)[0].double().cpu() / n
    # Of processes that share the work each has gone through examples of its own.
    return current().sum_into(by_rows) - by_weights


def _passes(before: float, value: float, threshold: float) -> bool:
    return value < threshold if before > threshold else value > threshold


def _check_problem(problem: Any, asking: str) -> None:
    if not isinstance(problem, Problem):
        raise InvalidInput(
            f"{asking}() takes a Problem, got {type(problem).__name__}; write "
            f"{asking}(ptif.Problem(model, loss, train), ...)."
        )


def _limit(problem: Problem, most: int | float) -> int:
    if isinstance(most, float):
        share = finite_number("most", most, above=0, below=1, hint="or a whole number of examples")
        return max(1, int(share * len(problem)))
    return whole_number("most", most, 1, len(problem) - 1, hint="or a share between 0 and 1")


def _scaled(decay: WeightDecay, factor: float) -> WeightDecay:
    strength = decay.strength
    if isinstance(strength, Mapping):
        return WeightDecay({k: v * factor for k, v in strength.items()}, decay.per_example)
    return WeightDecay(strength * factor, decay.per_example)
