"""Exact unrolling by value: against finite differences of real training with torch's own optimisers, in float64."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import pytorch_influence_functions as ptif
from pytorch_influence_functions.core.errors import InvalidInput
from pytorch_influence_functions.evaluation import LinearDecay, Recipe, train_model
from pytorch_influence_functions.methods import unrolled
from pytorch_influence_functions.trajectory import AdamRule, Replay, SGDRule
from pytorch_influence_functions.trajectory.metasmoothness import measure_metasmoothness
from pytorch_influence_functions.trajectory.unrolled import UnrolledAttribution
from tests.laws.pictures import differences, picture
from tests.laws.test_influence import relative_gap

SGD, ADAM, ADAMW = torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW
OPTIMIZERS = {
    "sgd": partial(SGD, lr=0.1),
    "momentum and decay": partial(SGD, lr=0.1, momentum=0.9, weight_decay=0.02),
    "dampening": partial(SGD, lr=0.1, momentum=0.8, dampening=0.3),
    "nesterov": partial(SGD, lr=0.1, momentum=0.9, nesterov=True, weight_decay=0.02),
    "adam with decay": partial(ADAM, lr=0.03, weight_decay=0.05, betas=(0.8, 0.95)),
    "adamw": partial(ADAMW, lr=0.03, weight_decay=0.3, eps=1e-6),
}


@dataclass
class Run:
    """A real training loop over fixed batches, with a weight on every example."""

    make: Callable[[Any], torch.optim.Optimizer]
    n: int = 12

    def __post_init__(self) -> None:
        g = torch.Generator().manual_seed(0)
        self.x, self.y = torch.randn(self.n, 3, generator=g).double(), torch.arange(self.n) % 3
        self.queries = torch.randn(4, 3, generator=g).double(), torch.arange(4) % 3
        self.batches = [torch.randperm(self.n, generator=g)[:5] for _ in range(9)]
        self.rates = [0.03 * (1 - step / 12) for step in range(9)]
        torch.manual_seed(1)
        self.model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3)).double()
        self.start = {k: v.clone() for k, v in self.model.state_dict().items()}
        self.optimizer = self.train(torch.ones(self.n).double())

    def train(self, weights: Tensor) -> torch.optim.Optimizer:
        self.model.load_state_dict(self.start)
        optimizer = self.make(self.model.parameters())
        for ids, rate in zip(self.batches, self.rates, strict=True):
            optimizer.param_groups[0]["lr"] = rate
            optimizer.zero_grad()
            losses = nn.functional.cross_entropy(self.model(self.x[ids]), self.y[ids], reduction="none")
            (losses * weights[ids]).mean().backward()
            optimizer.step()
        return optimizer

    def differences(self, measure: Callable[[Tensor, Tensor], Tensor], h: float = 1e-4) -> Tensor:
        """-d measure / d weight of every example, by central differences of retraining."""
        slopes = torch.zeros(4, self.n, dtype=torch.float64)
        for i in range(self.n):
            ends = []
            for sign in (1.0, -1.0):
                weights = torch.ones(self.n).double()
                weights[i] += sign * h
                self.train(weights)
                with torch.no_grad():
                    ends.append(measure(self.model(self.queries[0]), self.queries[1]))
            slopes[:, i] = -(ends[0] - ends[1]) / (2 * h)
        self.train(torch.ones(self.n).double())
        return slopes

    @property
    def replay(self) -> Replay:
        return Replay(self.start, self.batches, self.make(self.model.parameters()), self.rates)

    def problem(self, **changes: Any) -> ptif.Problem:
        return ptif.Problem(self.model, ptif.CrossEntropy(), (self.x, self.y), **changes)

    def fit(self, **settings: Any) -> UnrolledAttribution:
        return unrolled(self.replay, **({"least_smoothness": -1} | settings)).fit(self.problem())


def cross_entropy(outputs: Tensor, targets: Tensor) -> Tensor:
    return nn.functional.cross_entropy(outputs, targets, reduction="none")


@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_scores_are_finite_differences_of_retraining(make: Callable[[Any], torch.optim.Optimizer]) -> None:
    run = Run(make)
    want = run.differences(cross_entropy)
    scores = run.fit().score(run.queries)
    assert relative_gap(scores.values, want) < 1e-6
    assert scores.values.shape == (4, run.n)
    influence = ptif.exact().fit(run.problem()).score(run.queries).values
    assert relative_gap(influence, want) > 0.1


def test_any_measure_may_be_asked() -> None:
    run = Run(OPTIMIZERS["momentum and decay"])
    want = run.differences(lambda outputs, targets: outputs.gather(1, targets[:, None])[:, 0])
    assert relative_gap(run.fit().score(run.queries, measure=ptif.Logit()).values, want) < 1e-6


@pytest.mark.parametrize("name", ["nesterov", "adamw"])
def test_memory_changes_nothing_but_what_is_kept(name: str) -> None:
    """Few bytes: every fourth step is kept, and queries go one after the other."""
    run = Run(OPTIMIZERS[name])
    whole, few = (run.fit(memory=m).score(run.queries) for m in ("4GB", 3000))
    assert relative_gap(few.values, whole.values) < 1e-12
    top = run.fit().score(run.queries, top=2)
    assert torch.equal(top.indices[0, :1], whole.values[0].argmax()[None])


def test_self_influence_is_the_diagonal() -> None:
    run = Run(OPTIMIZERS["adamw"])
    fitted = run.fit(memory=8000)
    assert relative_gap(fitted.self_influence(), fitted.score((run.x, run.y)).values.diagonal()) < 1e-10


def recipe(rate: float, activation: type[nn.Module] = nn.Tanh, epochs: int = 3) -> Recipe:
    def make() -> nn.Module:
        return nn.Sequential(nn.Linear(6, 12), activation(), nn.Linear(12, 3))

    return Recipe(make, partial(SGD, lr=rate, momentum=0.9), epochs, 8, LinearDecay(), nn.CrossEntropyLoss())


def images(n: int = 50) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(3)
    return 3 * torch.randn(n, 6, generator=g), torch.randint(0, 3, (n,), generator=g)


def test_a_recipe_is_followed_step_by_step() -> None:
    """Scores add up to what real retraining without two examples changes, where both are in the same batches."""
    data = images()
    trained = recipe(0.02)
    model = train_model(trained, data, seed=4)
    fitted = unrolled(trained, seed=4).fit(ptif.Problem(model, nn.CrossEntropyLoss(), data))
    assert fitted.apart < 1e-5 and fitted.smoothness.value > 0.95
    queries = images(60)[0][50:], images(60)[1][50:]
    scores = fitted.score(queries)
    assert "correlation of 1.00" in scores.diagnostics.notes[2] or "correlation of 0.99" in scores.diagnostics.notes[2]
    weights = torch.ones(50).double()
    weights[[3, 17]] = 0.0
    with fitted.runner.open():
        after = []
        for theta in (fitted.runner.train(weights).theta, fitted.runner.train().theta):
            fitted.runner.load(theta)
            with torch.no_grad():
                after.append(cross_entropy(model(queries[0]), queries[1]))
    predicted = scores.values[:, [3, 17]].sum(1)
    assert torch.corrcoef(torch.stack([predicted, after[0] - after[1]]))[0, 1] > 0.98


def test_a_run_that_is_not_smooth_is_refused_in_words() -> None:
    data = images()
    trained = recipe(0.2, nn.ReLU, 20)
    problem = ptif.Problem(train_model(trained, data, seed=4), nn.CrossEntropyLoss(), data)
    with pytest.raises(InvalidInput, match=r"^Do not use unrolled\(\) here: .* metasmoothness -?[.\d]+ \(three"):
        unrolled(trained, seed=4, least_smoothness=0.99).fit(problem)
    fitted = unrolled(trained, seed=4, least_smoothness=-1).fit(problem)
    assert fitted.smoothness.value < 0.9
    notes = fitted.score((data[0][:4], data[1][:4])).diagnostics.notes
    assert any(note.startswith("metasmoothness") for note in notes), notes


def test_metasmoothness_is_its_formula() -> None:
    run = Run(OPTIMIZERS["adamw"])
    fitted = run.fit()
    signs, h = fitted.smoothness.signs, fitted.smoothness.step
    assert h == pytest.approx(1 / 12**0.5) and set(signs.tolist()) == {1.0, -1.0}
    ends = []
    for k in range(3):
        run.train(1 + k * h * signs)
        ends.append(torch.cat([p.detach().flatten() for p in run.model.parameters()]))
    run.train(torch.ones(12).double())
    first, second = ends[1] - ends[0], ends[2] - ends[1]
    want = (first.abs() * first.sign() * second.sign()).sum() / first.abs().sum()
    assert fitted.smoothness.value == pytest.approx(float(want), abs=1e-12)
    alone = measure_metasmoothness(fitted.runner)
    assert alone.value == pytest.approx(fitted.smoothness.value, abs=1e-12)


def test_the_model_is_as_it_was() -> None:
    run = Run(OPTIMIZERS["adamw"])
    run.model.train()
    before = picture(run.model, (run.x, run.y), run.queries)
    fitted = run.fit()
    fitted.score(run.queries)
    fitted.self_influence()
    with pytest.raises(InvalidInput, match=r"^Do not use"):
        run.fit(least_smoothness=1)
    assert differences(before, picture(run.model, (run.x, run.y), run.queries)) == []


# --------------------------------------------------------------------------- what is refused


def test_another_run_is_noticed() -> None:
    run = Run(OPTIMIZERS["sgd"])
    with torch.no_grad():
        run.model[0].weight.add_(1.0)
    with pytest.raises(InvalidInput, match=r"^The run trained again ends .* of its way from the model's weights"):
        run.fit()


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda p: torch.optim.RMSprop(p), r"SGD, Adam and AdamW, got RMSprop; use another"),
        (lambda p: ADAM(p, amsgrad=True), r"has no amsgrad=True, with which this Adam was made"),
        (lambda p: SGD(p, maximize=True), r"has no maximize=True"),
        (lambda p: SGD([{"params": [x]} for x in p]), r"one parameter group, this SGD has 2"),
    ],
)
def test_optimisers_without_a_rule_are_refused(make: Callable[[Any], Any], words: str) -> None:
    model = nn.Linear(2, 1)
    with pytest.raises(InvalidInput, match=words):
        Replay(model.state_dict(), [torch.tensor([0])], make(model.parameters()))


def test_bad_runs_get_one_sentence() -> None:
    state = nn.Linear(2, 1).state_dict()
    with pytest.raises(InvalidInput, match=r"^Replay takes the indices of every step's examples"):
        Replay(state, [], SGDRule(), 0.1)
    with pytest.raises(InvalidInput, match=r"^Replay got 2 rates for 1 steps; give one number"):
        Replay(state, [torch.tensor([0])], AdamRule(), [0.1, 0.2])
    with pytest.raises(InvalidInput, match=r"^Replay does not know the learning rates; give rates="):
        Replay(state, [torch.tensor([0])], SGDRule())
    with pytest.raises(InvalidInput, match=r"^unrolled\(\) takes a run that can be repeated.*got str; a recording"):
        unrolled("runs/first")  # type: ignore[arg-type]
    with pytest.raises(InvalidInput, match=r"^Replay has steps with example 7, and there are 4; give indices in"):
        Replay(state, [torch.tensor([7])], SGDRule(), 0.1).replay(4, 0)


def test_layers_that_cannot_be_repeated_are_refused() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3))
    run = Replay(model.state_dict(), [torch.arange(4)], SGDRule(), 0.1)
    problem = ptif.Problem(model, nn.CrossEntropyLoss(), (torch.randn(8, 3), torch.arange(8) % 3))
    with pytest.raises(InvalidInput, match=r"^BatchNorm1d makes training steps that cannot be repeated"):
        unrolled(run).fit(problem)
    part = ptif.Problem(nn.Linear(3, 3), nn.CrossEntropyLoss(), (torch.randn(8, 3), torch.arange(8) % 3), "weight")
    with pytest.raises(InvalidInput, match=r"^Unrolling follows all 12 parameters that training moved, and 9 were"):
        unrolled(run).fit(part)
