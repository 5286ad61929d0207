"""Methods that explain without a curvature: representer points, and the plain ones that any other has to beat."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar, final

import torch
from jaxtyping import Float
from torch import Tensor, nn

from ..core.distributed import World
from ..core.errors import InvalidInput
from ..core.renames import OldNames
from ..curvature.exact import Identity
from ..damping.rules import Absolute
from ..influence.agreement import Units
from ..influence.attribution import Attribution, Influence
from ..influence.averaging import CheckpointAverage
from ..influence.checks import check_problem
from ..influence.method import AbstractMethod
from ..influence.question import Question, resolve_measure
from ..influence.scoring import ScoringPass
from ..linalg.space import ROOT, Space
from ..objectives.tokens import attention_mask_of
from ..problem.agreement import entry
from ..problem.checkpoints import at_checkpoint
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
    calls: list[tuple[str, Tensor]] = []
    handles = [
        module.register_forward_hook(lambda m, args, out, name=name: calls.append((name, out)))
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
    for name, out in reversed(calls):
        # A model may drop or add axes of its last layer's output: an output of one number often has no axis of its own.
        same_numbers = len(out) == len(outputs) and out.numel() == outputs.numel()
        if same_numbers and torch.equal(out.reshape(outputs.shape).to(outputs.dtype), outputs):
            return name or ROOT
    raise InvalidInput(
        f"The outputs of {type(problem.model).__name__} are not those of a torch.nn.Linear, so it has no last layer to "
        "find representer points in; use another method, such as ptif.ekfac()."
    )


# ------------------------------------------------------------------------------------------ plain ones


class AbstractBaseline(AbstractMethod):
    """A plain method: a number for every query and training example, without any derivative."""

    why: ClassVar[str]
    """What the number is, in words."""

    @abstractmethod
    def values(self, problem: Problem, queries: Source) -> Float[Tensor, "q n"]:
        """A number for every query and training example at the model's present weights, high where it helps.

        Args:
            problem: model, loss and training data.
            queries: the queries' data.
        """

    @abstractmethod
    def own_values(self, problem: Problem) -> Float[Tensor, " n"]:
        """Every training example's number on itself.

        Args:
            problem: model, loss and training data.
        """

    def fit(self, problem: Problem, n_queries: int = 1) -> FittedBaseline:
        check_problem(problem)
        return FittedBaseline(self, problem)


@final
@dataclass(frozen=True)
class Random(AbstractBaseline):
    """Numbers drawn at random: what any method has to beat.

    Args:
        seed: other seeds give other numbers.

    >>> Random(seed=1)
    Random(seed=1)
    """

    seed: int = 0
    why: ClassVar[str] = "random numbers"

    def values(self, problem: Problem, queries: Source) -> Tensor:
        return torch.randn(len(queries), len(problem), generator=torch.Generator().manual_seed(self.seed))

    def own_values(self, problem: Problem) -> Tensor:
        return torch.randn(len(problem), generator=torch.Generator().manual_seed(self.seed))


@final
@dataclass(frozen=True)
class TrainingLoss(AbstractBaseline):
    """The training loss of each example, the same for every query: what is learnt least is taken to matter most.

    As self-influence it is the usual way to look for wrong labels.

    >>> TrainingLoss()
    TrainingLoss()
    """

    why: ClassVar[str] = "the loss of each training example, whatever the query"

    def values(self, problem: Problem, queries: Source) -> Tensor:
        return self.own_values(problem).expand(len(queries), -1)

    def own_values(self, problem: Problem) -> Tensor:
        objective = resolve_measure(problem, problem.objective, problem.objective, problem.data)
        losses = []
        for _, batch in sweep(problem, label="losses", world=World()):
            with torch.no_grad():
                losses.append(objective.losses(objective.outputs(problem.model, batch), batch).float().cpu())
        return torch.cat(losses)


@final
@dataclass(frozen=True)
class EmbeddingSimilarity(AbstractBaseline):
    """Cosine between the features that enter the last linear layer: what looks alike is taken to help.

    Features of several positions (tokens) are averaged, without those that an attention mask calls padding. Raises
    (when fitted) `InvalidInput` where the outputs are not a linear layer's.

    >>> EmbeddingSimilarity()
    EmbeddingSimilarity()
    """

    why: ClassVar[str] = "cosine of the features before the last layer"

    def fit(self, problem: Problem, n_queries: int = 1) -> FittedBaseline:
        check_problem(problem)
        last_linear(problem)
        return FittedBaseline(self, problem)

    def values(self, problem: Problem, queries: Source) -> Tensor:
        layer = last_linear(problem)
        return self._features(problem, layer, queries) @ self._features(problem, layer, problem.data).T

    def own_values(self, problem: Problem) -> Tensor:
        return torch.ones(len(problem))

    def _features(self, problem: Problem, layer: str, source: Source) -> Tensor:
        features = []
        for _, batch in sweep(problem, source, label="features", world=World()):
            with entering(problem.model, layer) as calls, torch.no_grad():
                problem.objective.outputs(problem.model, batch)
            x = calls[-1].float().cpu()
            features.append(x if x.dim() == 2 else _mean_of_positions(x, batch))
        return nn.functional.normalize(torch.cat(features), dim=1)


def _mean_of_positions(x: Float[Tensor, "n ... d"], batch: Any) -> Float[Tensor, "n d"]:
    """The mean over an example's positions that are no padding."""
    mask = attention_mask_of(batch)
    if mask is None or x.dim() != 3 or mask.shape != x.shape[:2]:
        return x.flatten(1, -2).mean(1)
    weights = mask.to(x)[:, :, None]
    return (x * weights).sum(1) / weights.sum(1).clamp(min=1)


@final
@dataclass(frozen=True, eq=False)
class FittedBaseline(OldNames):
    """A plain baseline with a problem; what it gives is in no unit, only its order means something."""

    spec: AbstractBaseline
    problem: Problem

    @property
    def why(self) -> str:
        """What the numbers are."""
        return self.spec.why

    @property
    def method(self) -> str:
        """The method, as it would be written."""
        return repr(self.spec)

    @entry
    def score(
        self,
        queries: Any,
        measure: Any = None,
        top: int | None = None,
        *,
        aggregate: Any = None,
        contrast: Any = None,
        ids: Any = None,
        by: None = None,
    ) -> Scores:
        """A number for every query and training example, high (of a loss) where the example is taken to help.

        Args:
            queries: a Dataset, DataLoader, tensors or arrays `(x, y)`.
            measure: only says which sign is helpful; the numbers do not depend on it.
            top: keep only the k highest and k lowest numbers per query.
            aggregate, contrast, ids: as for `Attribution.score`, applied to the numbers.
            by: not to be had: these numbers are no sums over layers.

        Raises:
            InvalidInput: `by` is given, or the queries are a `FromModel`.
        """
        if by is not None:
            raise InvalidInput(
                f"by={by!r} tells apart what layers contribute, and a plain baseline is no sum over layers; use a "
                "method with gradients, such as ptif.ekfac()."
            )
        problem = self.problem
        asked = (queries, measure, top, None, aggregate, contrast, ids)
        question = Question.of(problem, problem.objective, *asked)
        checkpoints = problem.checkpoints or (None,)
        scoring = ScoringPass(problem, question, world=World())  # every process computes all of it
        sign = 1.0 if question.lower_is_better else -1.0
        everyone, query_ids = torch.arange(len(problem)), torch.arange(len(question))
        weights = (sign / len(checkpoints),) * len(checkpoints)
        average = CheckpointAverage(Units.RAW, weights, len(question), len(problem), World())
        for checkpoint in checkpoints:
            with at_checkpoint(problem.model, checkpoint):
                values = question.of_values(lambda source: self.spec.values(problem, source))
                average.add(query_ids, everyone, values)
            average.end_checkpoint()
        scoring.add(query_ids, everyone, average.result())
        facts = Diagnostics(
            method=self.method,
            why=self.spec.why,
            n_train=len(problem),
            objective=repr(problem.objective),
            reading=problem.data.reading,
            members=len(checkpoints),
            needs_minimum=False,
            approximation="a plain baseline: no prediction of any change",
        )
        return scoring.scores(lambda log: facts)

    @entry
    def self_influence(self) -> Float[Tensor, " n"]:
        """Every training example's number on itself: its loss, for `TrainingLoss`."""
        return self.problem.data.spread(self.spec.own_values(self.problem))


@contextmanager
def entering(model: nn.Module, layer: str) -> Iterator[list[Tensor]]:
    """What enters a layer, call by call, while this is open."""
    calls: list[Tensor] = []
    handle = model.get_submodule("" if layer == ROOT else layer).register_forward_pre_hook(
        lambda _, args: calls.append(args[0])
    )
    try:
        yield calls
    finally:
        handle.remove()
