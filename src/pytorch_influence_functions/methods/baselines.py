"""Methods that explain without a curvature: representer points, and the plain ones that any other has to beat."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, final

import torch
from jaxtyping import Float
from torch import Tensor, nn

from ..core.distributed import World
from ..core.errors import InvalidInput
from ..curvature.exact import Identity
from ..damping.rules import Absolute
from ..influence.attribution import Attribution, Influence
from ..influence.checks import check_problem, in_queries
from ..influence.method import AbstractMethod, resolved_measure, weights_of
from ..linalg.space import ROOT, Space
from ..objectives.base import AbstractObjective
from ..problem.data import Source
from ..problem.problem import Problem, first_batch, sweep
from ..problem.weight_decay import WeightDecay
from ..scores.diagnostics import Diagnostics
from ..scores.scores import Scores
from ..solvers.direct import Spectral


@final
@dataclass(frozen=True)
class RepresenterPoints(AbstractMethod):
    r"""Representer points: the last layer's outputs as a weighted sum over training examples.

    Where the training objective (1/N) sum loss_i + s/2 |W|^2 is stationary in the last layer W, reading features f,
    that layer is W = sum_i alpha_i f_i^T with alpha_i = -(1 / (s N)) d loss_i / d output_i, so a query's output is
    sum_i alpha_i <f_i, f_q>. The score is what a measure of the output loses with example i's term:

        score[q, i] = (1 / (s N)) <d m / d output_q, d loss_i / d output_i> <f_i, f_q>

    which is a gradient dot product in the last layer over s N. Needs weight decay on that layer, and a model trained to
    convergence there: the sum over i of the scores on `Logit()` is minus the logit only as far as it is stationary.
    Cost: one epoch. A baseline: curvature and all other layers are left out.

    Raises (when fitted) `InvalidInput` where the outputs are not a linear layer's, or that layer has no weight decay.

    Reference: Yeh et al. (2018), "Representer Point Selection"; their penalty is lambda |W|^2, so s = 2 lambda.

    >>> RepresenterPoints()
    RepresenterPoints()
    """

    def fit(self, problem: Problem, n_queries: int = 1) -> Attribution:
        check_problem(problem)
        layer = last_linear(problem)
        space = Space.of(problem.model, layer, problem.weight_decay.strength)
        decayed = {name: block for name, block in space.blocks.items() if block.decay > 0}
        strengths = {block.decay for block in decayed.values()}
        if len(strengths) != 1:
            raise InvalidInput(
                f"Representer points weigh examples by 1 / weight decay of the last layer {layer!r}, and its strength "
                f"is {'not one number' if strengths else '0'}; give the strength it was trained with as weight_decay=."
            )
        if problem.weight_decay.per_example:
            raise InvalidInput(
                "Representer points take the weight decay as one fixed term; use "
                "WeightDecay(strength, per_example=False)."
            )
        names = [p for block in decayed.values() for p in block.parameters]
        members = max(1, len(problem.checkpoints))
        weights = (1.0 / (strengths.pop() * members),) * members
        part = problem.with_(parameters=names, weight_decay=WeightDecay())
        return Influence(Identity(), Spectral(), Absolute(0.0), weights=weights).fit(part, n_queries)


def last_linear(problem: Problem) -> str:
    """The name of the linear layer whose output is the model's.

    Raises:
        InvalidInput: there is none.
    """
    seen: list[tuple[str, Tensor]] = []
    handles = [
        module.register_forward_hook(lambda m, args, out, name=name: seen.append((name, out)))
        for name, module in problem.model.named_modules()
        if isinstance(module, nn.Linear)
    ]
    try:
        two = torch.arange(min(2, len(problem)))
        with first_batch(problem, ids=two) as (_, batch), torch.no_grad():
            outputs: Any = problem.objective.outputs(problem.model, batch)
    finally:
        for handle in handles:
            handle.remove()
    for name, out in reversed(seen):
        if out.shape == outputs.shape and torch.equal(out, outputs):
            return name or ROOT
    raise InvalidInput(
        f"The outputs of {type(problem.model).__name__} are not those of a torch.nn.Linear, so it has no last layer to "
        "find representer points in; use another method, such as ptif.ekfac()."
    )


# ------------------------------------------------------------------------------------------ plain ones


@final
@dataclass(frozen=True)
class Random(AbstractMethod):
    """Numbers drawn at random: what any method has to beat.

    >>> Random(seed=1)
    Random(seed=1)
    """

    seed: int = 0

    def fit(self, problem: Problem, n_queries: int = 1) -> FittedBaseline:
        return FittedBaseline(self, problem, "random numbers")


@final
@dataclass(frozen=True)
class TrainingLoss(AbstractMethod):
    """The training loss of each example, the same for every query: what is learnt least is taken to matter most.

    As self-scores it is the usual way to look for wrong labels.

    >>> TrainingLoss()
    TrainingLoss()
    """

    def fit(self, problem: Problem, n_queries: int = 1) -> FittedBaseline:
        return FittedBaseline(self, problem, "the loss of each training example, whatever the query")


@final
@dataclass(frozen=True)
class EmbeddingSimilarity(AbstractMethod):
    """Cosine between the features that enter the last linear layer: what looks alike is taken to help.

    Features of several positions (tokens) are averaged. Raises (when fitted) `InvalidInput` where the outputs are not a
    linear layer's.

    >>> EmbeddingSimilarity()
    EmbeddingSimilarity()
    """

    def fit(self, problem: Problem, n_queries: int = 1) -> FittedBaseline:
        return FittedBaseline(self, problem, "cosine of the features before the last layer", last_linear(problem))


@final
@dataclass(frozen=True, eq=False)
class FittedBaseline:
    """A plain baseline with a problem; what it gives is in no unit, only its order means something."""

    spec: Random | TrainingLoss | EmbeddingSimilarity
    problem: Problem
    why: str
    layer: str = ROOT

    def __post_init__(self) -> None:
        check_problem(self.problem)

    @property
    def method(self) -> str:
        """The method, as it would be written."""
        return repr(self.spec)

    def score(self, queries: Any, measure: Any = None, top: int | None = None) -> Scores:
        """A number for every query and training example, high (of a loss) where the example is taken to help."""
        with in_queries():
            source = Source.of(queries, self.problem.batch_size)
        objective = resolved_measure(self.problem, self.problem.objective, measure, source)
        members = self.problem.checkpoints or (None,)
        total = torch.zeros(len(source), len(self.problem))
        for member in members:
            with weights_of(self.problem, member):
                total += self._values(source) / len(members)
        values = total if objective.lower_is_better else -total
        found = Scores(
            values,
            lower_is_better=objective.lower_is_better,
            class_names=self.problem.data.class_names,
            diagnostics=Diagnostics(
                method=self.method,
                why=self.why,
                n_train=len(self.problem),
                n_queries=len(source),
                members=len(members),
                needs_minimum=False,
                approximation="a plain baseline: no prediction of any change",
            ),
            train_source=self.problem.data,
            query_source=source,
        )
        return found if top is None else found.top(top)

    def self_influence(self) -> Float[Tensor, " n"]:
        """Every training example's number on itself: its loss, for `TrainingLoss`."""
        if isinstance(self.spec, TrainingLoss):
            return self._losses()
        if isinstance(self.spec, EmbeddingSimilarity):
            return torch.ones(len(self.problem))
        return self._drawn(1)[0]

    def _values(self, queries: Source) -> Tensor:
        if isinstance(self.spec, Random):
            return self._drawn(len(queries))
        if isinstance(self.spec, TrainingLoss):
            return self._losses().expand(len(queries), -1)
        return self._features(queries) @ self._features(self.problem.data).T

    def _drawn(self, n_queries: int) -> Tensor:
        assert isinstance(self.spec, Random)
        return torch.randn(n_queries, len(self.problem), generator=torch.Generator().manual_seed(self.spec.seed))

    def _losses(self) -> Tensor:
        objective: AbstractObjective = self.problem.objective
        objective = resolved_measure(self.problem, objective, objective, self.problem.data)
        found = []
        for _, batch in sweep(self.problem, label="losses", world=World()):
            with torch.no_grad():
                found.append(objective.losses(objective.outputs(self.problem.model, batch), batch).float().cpu())
        return torch.cat(found)

    def _features(self, source: Source) -> Tensor:
        found = []
        for _, batch in sweep(self.problem, source, label="features", world=World()):
            with entering(self.problem.model, self.layer) as seen, torch.no_grad():
                self.problem.objective.outputs(self.problem.model, batch)
            x = seen[-1].float().cpu()
            found.append(x if x.dim() == 2 else x.flatten(1, -2).mean(1))
        return nn.functional.normalize(torch.cat(found), dim=1)


@contextmanager
def entering(model: nn.Module, layer: str) -> Iterator[list[Tensor]]:
    """What enters a layer, call by call, while this is open."""
    seen: list[Tensor] = []
    handle = model.get_submodule("" if layer == ROOT else layer).register_forward_pre_hook(
        lambda _, args: seen.append(args[0])
    )
    try:
        yield seen
    finally:
        handle.remove()
