"""Law: the attack's first step does what its slopes predict, and all of it does more than random signs of its size."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, SubsetRandomSampler, TensorDataset

import pytorch_influence_functions as ptif
from pytorch_influence_functions.actions import Front, SignSteps, attack_training_set
from pytorch_influence_functions.core.errors import InvalidInput
from pytorch_influence_functions.evaluation import Recipe

DECAY = 0.02


def fit(dataset: Any, seed: int) -> nn.Module:
    """Logistic regression at its minimum, by Newton's method."""
    x, y = (torch.stack([torch.as_tensor(row[k]) for row in (dataset[i] for i in range(len(dataset)))]) for k in (0, 1))
    return newton(x.double(), y)


def newton(x: Tensor, y: Tensor) -> nn.Module:
    theta = torch.zeros(x.shape[1], dtype=torch.float64)
    for _ in range(30):
        p = (x @ theta).sigmoid()
        hessian = (x * (p * (1 - p))[:, None]).T @ x / len(x) + DECAY * torch.eye(x.shape[1]).double()
        theta = theta - torch.linalg.solve(hessian, x.T @ (p - y[:, 0]) / len(x) + DECAY * theta)
    model = nn.Linear(x.shape[1], 1, bias=False).double()
    with torch.no_grad():
        model.weight.copy_(theta[None])
    return model


def examples(n: int = 40) -> tuple[Tensor, Tensor]:
    torch.manual_seed(0)
    y = (torch.arange(n) % 2).double()[:, None]
    return torch.rand(n, 12).double() * 0.8 + 0.1 * y, y


def problem_of(x: Tensor, y: Tensor) -> ptif.Problem:
    return ptif.Problem(newton(x, y), nn.BCEWithLogitsLoss(), (x, y), weight_decay=DECAY)


def least_sure(problem: ptif.Problem, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    with torch.no_grad():
        margin = problem.model(x)[:, 0] * (2 * y[:, 0] - 1)
    margin[margin < 0] = torch.inf
    i = int(margin.argmin())
    return x[i : i + 1], y[i : i + 1]


def test_a_small_step_does_what_its_slopes_say() -> None:
    x, y = examples()
    problem = problem_of(x, y)
    torch.manual_seed(5)
    queries = (torch.rand(3, 12).double(), torch.ones(3, 1).double())
    with torch.no_grad():
        queries[1][:, 0] = (problem.model(queries[0])[:, 0] > 0).double()
    outcome = attack_training_set(
        problem, queries, fit, count=5, steps=SignSteps(1e-4, rounds=1, bounds=None), controls=2,
        method=ptif.exact(damping=0.0),
    )  # fmt: skip
    change = float((outcome.after - outcome.before).sum())
    assert change == pytest.approx(outcome.predicted, rel=1e-3) and change > 0
    changed = outcome.inputs - x[list(outcome.ids)]
    torch.testing.assert_close(changed.abs(), torch.full_like(changed, 1e-4))
    slopes = ptif.actions.input_influence(problem, queries, method=ptif.exact(damping=0.0)).sum(0)
    assert list(outcome.ids) == slopes.abs().sum(1).argsort(descending=True)[:5].tolist()
    assert torch.equal(changed.sign(), slopes[list(outcome.ids)].sign())


def test_it_does_more_than_random_signs_and_stays_in_its_box() -> None:
    x, y = examples()
    problem = problem_of(x, y)
    query = least_sure(problem, x, y)
    before = [p.clone() for p in problem.model.parameters()]
    outcome = attack_training_set(problem, query, fit, count=4, steps=SignSteps(0.1, rounds=3), controls=6)
    assert float(outcome.after.mean()) > max(outcome.control) and len(outcome.control) == 6
    assert float(outcome.after.mean() - outcome.before.mean()) > 2 * (max(outcome.control) - float(outcome.before))
    assert bool((outcome.inputs - x[list(outcome.ids)]).abs().max() <= 0.1 + 1e-9)
    assert float(outcome.inputs.min()) >= 0 and float(outcome.inputs.max()) <= 1
    # What is said of the model is so when training on these inputs by hand.
    changed = x.clone()
    changed[list(outcome.ids)] = outcome.inputs
    again = newton(changed, y)
    loss = nn.functional.binary_cross_entropy_with_logits(again(query[0]), query[1]).detach()
    assert float(loss) == pytest.approx(float(outcome.after), rel=1e-9) == pytest.approx(max(outcome.path))
    assert bool(outcome.wrong) == bool((again(query[0]) > 0).double() != query[1]) and outcome.model is not again
    assert all(torch.equal(a, b) for a, b in zip(before, problem.model.parameters(), strict=True))
    assert "4 training inputs changed: loss" in repr(outcome) and "random signs" in repr(outcome)


def test_through_a_frozen_front() -> None:
    """The same as an attack on the whole model whose front is not trained."""
    x, y = examples()
    torch.manual_seed(1)
    front = nn.Sequential(nn.Linear(12, 6), nn.Tanh()).double().requires_grad_(False)
    features = front(x)
    head = problem_of(features, y)
    query = least_sure(head, features, y)
    steps = SignSteps(0.05, rounds=2)
    outcome = attack_training_set(head, query, fit, 3, steps, front=Front(front, x), controls=1)

    def fit_whole(dataset: Any, seed: int) -> nn.Module:
        seen = torch.stack([front(dataset[i][0]) for i in range(len(dataset))])
        return nn.Sequential(*front, newton(seen, y))

    place = int((features == query[0]).all(1).nonzero()[0])
    whole = ptif.Problem(
        nn.Sequential(*front, head.model), nn.BCEWithLogitsLoss(), (x, y), weight_decay=DECAY, parameters=["2.weight"]
    )
    same = attack_training_set(whole, (x[place, None], y[place, None]), fit_whole, 3, steps, controls=1)
    assert outcome.ids == same.ids
    torch.testing.assert_close(outcome.inputs, same.inputs)
    torch.testing.assert_close(outcome.after, same.after, rtol=1e-6, atol=1e-9)


def test_candidates_samplers_and_recipes() -> None:
    x, y = torch.rand(40, 3), torch.arange(40) % 2
    x[:, 0] += y
    recipe = Recipe(lambda: nn.Linear(3, 2), lambda p: torch.optim.SGD(p, lr=1.0), epochs=40, batch_size=None)
    model = ptif.evaluation.train_model(recipe, (x, y))
    loader = DataLoader(TensorDataset(x, y), batch_size=8, sampler=SubsetRandomSampler(range(20, 40)))
    problem = ptif.Problem(model, nn.CrossEntropyLoss(), loader)
    with torch.no_grad():
        right = (model(x).argmax(1) == y).nonzero()[:1, 0]
    outcome = attack_training_set(
        problem, (x[right], y[right]), recipe, 2, SignSteps(0.1, 1, bounds=None), candidates=[21, 25, 33], controls=0
    )
    assert set(outcome.ids) <= {21, 25, 33} and outcome.control == () and "random" not in repr(outcome)
    torch.testing.assert_close((outcome.inputs - x[list(outcome.ids)]).abs(), torch.full((2, 3), 0.1))


def test_bounds_do_not_pull_an_input_in_that_lies_outside() -> None:
    original = torch.tensor([-2.0, 0.0, 0.5, 1.0, 3.0])
    steps = SignSteps(0.1)
    up, down = (steps.moved(original, original, sign * torch.ones(5), 0) for sign in (1, -1))
    torch.testing.assert_close(up, torch.tensor([-1.9, 0.1, 0.6, 1.0, 3.0]))
    torch.testing.assert_close(down, torch.tensor([-2.0, 0.0, 0.4, 0.9, 2.9]))


def test_bad_input_in_one_sentence() -> None:
    x, y = examples()
    problem = problem_of(x, y)
    query = least_sure(problem, x, y)
    wrong = (query[0], 1 - query[1])
    with pytest.raises(InvalidInput, match="Query 0 is already answered wrongly; attack queries that are right"):
        attack_training_set(problem, wrong, fit)
    with pytest.raises(InvalidInput, match="count=41 must be a whole number from 1 to 40; no more than there are"):
        attack_training_set(problem, query, fit, 41)
    with pytest.raises(InvalidInput, match="candidates= names index 40"):
        attack_training_set(problem, query, fit, candidates=[40])
    with pytest.raises(InvalidInput, match=r"front\.inputs are of 39 examples and the training data hold 40"):
        attack_training_set(problem, query, fit, front=Front(nn.Identity(), x[1:]))
    with pytest.raises(InvalidInput, match="recipe must be a Recipe or a function"):
        attack_training_set(problem, query, 3)
    with pytest.raises(InvalidInput, match=r"SignSteps\(size=0\) must be"):
        SignSteps(0)
    several = [(x[i], x[i], y[i]) for i in range(40)]

    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one = nn.Linear(12, 1, bias=False).double()

        def forward(self, a: Tensor, b: Tensor) -> Tensor:
            out: Tensor = self.one(a + b)
            return out

    two = ptif.Problem(Two(), nn.BCEWithLogitsLoss(), several)
    with torch.no_grad():
        label = (two.model(x[:1], x[:1]) > 0).double()
    with pytest.raises(InvalidInput, match="changes one tensor of real numbers per example"):
        attack_training_set(two, [(x[0], x[0], label[0])], fit)
