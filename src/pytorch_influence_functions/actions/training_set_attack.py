"""Training inputs changed by a little, so that a model trained on them answers wrongly: how robust is an answer?"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, final

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from ..core.distributed import World
from ..core.errors import InvalidInput, name_ids
from ..core.validate import finite_number, whole_number
from ..evaluation.accuracy import Accuracy
from ..methods.names import as_method
from ..problem.data import Source
from ..problem.edited import EditedExamples
from ..problem.model_state import plain_autograd
from ..problem.problem import Problem, sweep
from .edits import read_indices
from .inputs import input_influence
from .training_once import train_once

# Slopes of so many candidates are taken at a time.
_BLOCK = 256


@final
@dataclass(frozen=True)
class SignSteps:
    """How training inputs may be changed: every number by at most `size`, along the sign of its slope.

    Args:
        size: the largest change of any number, such as 2 / 255 for pictures from 0 to 1.
        rounds: how many times the slope is taken; the model is trained again after each step.
        step: how far one step goes; `None`: the full size at first, half of it later.
        bounds: the smallest and largest value that an input may have; `None`: any. One that lies outside already is
            moved inwards only.

    Example:
        >>> SignSteps(2 / 255).rounds
        4
    """

    size: float
    rounds: int = 4
    step: float | None = None
    bounds: tuple[float, float] | None = (0.0, 1.0)

    def __post_init__(self) -> None:
        finite_number("size", self.size, above=0, owner=self)
        whole_number("rounds", self.rounds, owner=self)
        if self.step is not None:
            finite_number("step", self.step, above=0, owner=self)

    def moved(self, now: Tensor, original: Tensor, direction: Tensor, at: int) -> Tensor:
        """Inputs one step further, within the size and the bounds.

        Args:
            now: the inputs before this step.
            original: the inputs before the first.
            direction: -1, 0 or 1 for every number.
            at: which step, counted from 0.
        """
        step = (self.size if at == 0 else self.size / 2) if self.step is None else self.step
        moved = torch.minimum(torch.maximum(now + step * direction, original - self.size), original + self.size)
        if self.bounds is None:
            return moved
        low, high = self.bounds
        return torch.minimum(torch.maximum(moved, original.clamp(max=low)), original.clamp(min=high))


@final
@dataclass(frozen=True, eq=False)
class Front:
    """A frozen part of the model that lies before the problem's own: what is attacked are its inputs.

    The problem's model and data are then what comes after, and its training inputs what `module` makes of `inputs`.

    Args:
        module: from inputs to what the problem's model sees, differentiable.
        inputs: of all training examples, [N, ...], in dataset order.
    """

    module: Any
    inputs: Float[Tensor, "n *shape"]


@final
@dataclass(frozen=True, eq=False, repr=False)
class TrainingSetAttack:
    """What changed training inputs did to the queries. `attack_training_set(...)` makes it.

    Attributes:
        ids: which training examples were changed, the most effective first: places in the training dataset.
        inputs: their changed inputs, [k, ...].
        before: each query's loss under the trained model, [Q].
        after: the same after training again on the changed data: that of the best round, [Q].
        wrong: whether each query is then answered wrongly, bool [Q]; before, all are answered rightly.
        predicted: what the slopes say of the first step: the change of the summed loss.
        path: the mean loss after every round.
        control: the mean loss after training on random signs of the same size on the same inputs, once for each try.
        control_wrong: in how many of these tries each query is answered wrongly, [Q].
        model: the model of the best round.
    """

    ids: tuple[int, ...]
    inputs: Tensor
    before: Float[Tensor, " q"]
    after: Float[Tensor, " q"]
    wrong: Tensor
    predicted: float
    path: tuple[float, ...]
    control: tuple[float, ...]
    control_wrong: Tensor
    model: nn.Module

    def __repr__(self) -> str:
        random = f"; random signs {max(self.control):.3g} at most" if self.control else ""
        return (
            f"TrainingSetAttack({len(self.ids)} training inputs changed: loss {float(self.before.mean()):.3g} -> "
            f"{float(self.after.mean()):.3g}, {int(self.wrong.sum())} of {len(self.wrong)} queries wrong{random})"
        )


@plain_autograd()
def attack_training_set(
    problem: Problem,
    queries: Any,
    recipe: Any,
    count: int = 1,
    steps: SignSteps | None = None,
    candidates: Any = None,
    front: Front | None = None,
    controls: int = 4,
    method: Any = None,
    seed: int = 0,
) -> TrainingSetAttack:
    """Change a few training inputs by a little, so that a model trained on them gets the queries wrong.

    Candidates are ranked by the largest change of the queries' loss that sign steps on their inputs are predicted to
    make, the 1-norm of `input_influence`; the first `count` are moved along its sign, within `steps`; the model is
    trained again; and so on from the slopes of the new model, until all queries are wrong. Random signs of the same
    size on the same inputs are the control: an attack that does no more than they do has found nothing.

    For auditing how robust a model is to its data being tampered with. Everything is known to the attacker: the model,
    the data and how it is trained.

    Args:
        problem: model, loss and training data, at one set of weights.
        queries: labelled data that the model gets right; with `front`, as the problem's model takes them.
        recipe: how the model is trained: a `Recipe`, or your own function `(dataset, seed) -> trained model`.
        count: how many training examples are changed.
        steps: how; `None`: `SignSteps(2 / 255)`, for pictures from 0 to 1.
        candidates: places in the training dataset to choose from; `None`: all.
        front: a frozen part before the problem's model, whose inputs are changed.
        controls: how many times random signs are tried; 0: not at all.
        method: an `Influence` by name or made; `None`: chosen by size.
        seed: of the trainings and of the random signs.

    Raises:
        InvalidInput: a query is already answered wrongly, more are to be changed than there are candidates, or the
            inputs have no slope.

    Reference: Koh & Liang (2017), "Understanding Black-box Predictions via Influence Functions", §5.2.

    Example:
        >>> from pytorch_influence_functions.evaluation import Recipe
        >>> x, y = torch.rand(40, 3), torch.arange(40) % 2
        >>> x[:, 0] += y
        >>> def fit(dataset, seed):
        ...     model = nn.Linear(3, 2)
        ...     with torch.no_grad():
        ...         model.weight.copy_(torch.tensor([[-9.0, 0.0, 0.0], [9.0, 0.0, 0.0]]))
        ...         model.bias.copy_(torch.tensor([9.0, -9.0]))
        ...     return model
        >>> problem = Problem(fit(None, 0), nn.CrossEntropyLoss(), (x, y))
        >>> attack_training_set(problem, (x[:1], y[:1]), fit, count=2, controls=1).inputs.shape
        torch.Size([2, 3])
    """
    whole_number("controls", controls, 0)
    attack = _Attack(
        problem, problem.data.read_alike(queries), recipe, as_method(method),
        SignSteps(2 / 255) if steps is None else steps, front, seed,
    )  # fmt: skip
    before = attack.look(problem)
    already = before.wrong.nonzero()[:, 0].tolist()
    if already:
        raise InvalidInput(f"Query {name_ids(already)} is already answered wrongly; attack queries that are right.")
    ids, slopes = attack.choose(candidates, count)
    rounds, predicted = attack.climb(ids, slopes)
    best = max(rounds, key=lambda one: float(one.losses.mean()))
    random = [attack.try_random(ids, k) for k in range(controls)]
    positions = problem.data.positions
    return TrainingSetAttack(
        tuple(ids if positions is None else positions[ids].tolist()),
        best.inputs,
        before.losses,
        best.losses,
        best.wrong,
        predicted,
        tuple(float(one.losses.mean()) for one in rounds),
        tuple(float(one.losses.mean()) for one in random),
        sum((one.wrong.long() for one in random), torch.zeros(len(best.wrong), dtype=torch.long)),
        best.problem.model,
    )


@dataclass(frozen=True, eq=False)
class _Round:
    """A model trained on changed inputs, and how it answers the queries."""

    problem: Problem
    inputs: Tensor
    losses: Float[Tensor, " q"]
    wrong: Tensor


@dataclass(frozen=True, eq=False)
class _Attack:
    problem: Problem
    queries: Source
    recipe: Any
    method: Any
    steps: SignSteps
    front: Front | None
    seed: int

    def look(self, problem: Problem, inputs: Tensor | None = None) -> _Round:
        """Losses of the queries under a problem's model, and whether each is answered wrongly."""
        objective = problem.objective
        right = Accuracy(0.5 if getattr(objective, "from_probabilities", False) else 0.0)
        losses, wrong = [], []
        for ids, batch in sweep(problem, self.queries, label="queries", world=World()):
            with torch.no_grad():
                outputs = objective.outputs(problem.model, batch)
                right.check(outputs, batch, ids)
                losses.append(objective.losses(outputs, batch).double().cpu())
                wrong.append(right.losses(outputs, batch).cpu() == 0)
        return _Round(problem, torch.empty(0) if inputs is None else inputs, torch.cat(losses), torch.cat(wrong))

    def choose(self, candidates: Any, count: int) -> tuple[list[int], Tensor]:
        """The candidates whose inputs can do most, as positions in the data, and the slopes in their inputs."""
        data = self.problem.data
        positions = list(range(len(data))) if candidates is None else read_indices(data, candidates, "candidates")
        whole_number("count", count, 1, len(positions), hint="no more than there are candidates")
        blocks = [positions[start : start + _BLOCK] for start in range(0, len(positions), _BLOCK)]
        slopes = torch.cat([self.slopes(self.problem, block, self.inputs(block)) for block in blocks])
        order = slopes.flatten(1).abs().sum(1).argsort(descending=True, stable=True)[:count]
        return [positions[i] for i in order.tolist()], slopes[order]

    def climb(self, ids: list[int], slopes: Tensor) -> tuple[list[_Round], float]:
        """Every round of the attack, and what the slopes say of the first step."""
        original = now = self.inputs(ids)
        rounds: list[_Round] = []
        predicted = 0.0
        for at in range(self.steps.rounds):
            slopes = slopes if at == 0 else self.slopes(rounds[-1].problem, ids, now)
            now = self.steps.moved(now, original, slopes.sign(), at)
            predicted = predicted if at else float((slopes * (now - original)).sum())
            rounds.append(self.look(self.trained_on(ids, now), now))
            if bool(rounds[-1].wrong.all()):
                break
        return rounds, predicted

    def try_random(self, ids: list[int], k: int) -> _Round:
        """The same inputs with random signs."""
        original = self.inputs(ids)
        generator = torch.Generator().manual_seed(1_000_003 * self.seed + k)
        signs = torch.randint(0, 2, original.shape, generator=generator).to(original) * 2 - 1
        now = replace(self.steps, step=self.steps.size).moved(original, original, signs, 0)
        return self.look(self.trained_on(ids, now), now)

    def inputs(self, positions: Sequence[int]) -> Tensor:
        """The attacked inputs of some training examples, as they were, [n, ...] on the CPU."""
        data = self.problem.data
        if self.front is not None:
            if len(self.front.inputs) != len(data.whole):
                raise InvalidInput(
                    f"front.inputs are of {len(self.front.inputs)} examples and the training data hold "
                    f"{len(data.whole)}; give one for each, in dataset order."
                )
            places = torch.tensor(positions) if data.positions is None else data.positions[list(positions)]
            return self.front.inputs[places].detach()
        items = [data.item(i) for i in positions]
        if not all(isinstance(item, (tuple, list)) and len(item) == 2 and _is_real(item[0]) for item in items):
            raise InvalidInput(
                "attack_training_set() changes one tensor of real numbers per example; expected examples "
                "(input, target), so wrap the dataset, or attack embeddings as the inputs."
            )
        return torch.stack([item[0] for item in items]).detach()

    def slopes(self, problem: Problem, positions: Sequence[int], inputs: Tensor) -> Tensor:
        """How the queries' summed loss rises with the attacked inputs of some training examples, [n, ...]."""
        places = problem.data.positions
        ids = list(positions) if places is None else places[list(positions)].tolist()
        fitted = self.method.fit(problem)
        slopes = input_influence(fitted, self.queries, ids).sum(0)
        if self.front is None:
            return slopes
        leaf = inputs.clone().requires_grad_()
        with torch.enable_grad():
            features = self.front.module(leaf)
            moved: Tensor = torch.autograd.grad((features * slopes.to(features)).sum(), leaf)[0]
        return moved

    def trained_on(self, ids: list[int], inputs: Tensor) -> Problem:
        """The problem after training with some inputs changed."""
        with torch.no_grad():
            seen = inputs if self.front is None else self.front.module(inputs).detach()
        data = _with_inputs(self.problem.data, ids, seen)
        model = train_once(self.recipe, data, self.seed)
        return self.problem.with_(model=model, data=data)


def _with_inputs(source: Source, ids: list[int], inputs: Tensor) -> Source:
    """The data with other inputs of some examples."""
    if type(source.dataset) is TensorDataset and len(source.dataset.tensors) == 2:
        x, y = source.dataset.tensors
        changed = x.clone()
        changed[ids] = inputs.to(x)
        return replace(source, dataset=TensorDataset(changed, y))
    by_position = dict(zip(ids, inputs, strict=True))
    return replace(source, dataset=EditedExamples(source.dataset, list(range(len(source))), {}, by_position))


def _is_real(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()
