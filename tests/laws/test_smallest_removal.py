"""Law: what smallest_removal finds flips the conclusion after a real refit, and is near the smallest set there is."""

from __future__ import annotations

from collections.abc import Callable
from itertools import combinations
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import pytorch_influence_functions as ptif
from pytorch_influence_functions.actions import AccuracyStatistic, TStatistic, flip_prediction, smallest_removal
from pytorch_influence_functions.actions.smallest_removal import removal_moves
from pytorch_influence_functions.actions.statistic import DataStatistic
from pytorch_influence_functions.core.errors import InvalidInput
from tests.covering import FULL


def slope(x: Tensor, y: Tensor) -> Tensor:
    """The coefficient of the first column in least squares with an intercept."""
    columns = torch.cat([x, torch.ones(len(x), 1).double()], 1)
    return torch.linalg.lstsq(columns, y).solution[0, 0]


def fitted_line(x: Tensor, y: Tensor) -> nn.Linear:
    columns = torch.cat([x, torch.ones(len(x), 1).double()], 1)
    theta = torch.linalg.lstsq(columns, y).solution[:, 0]
    model = nn.Linear(x.shape[1], 1).double()
    with torch.no_grad():
        model.weight.copy_(theta[None, :-1])
        model.bias.copy_(theta[-1:])
    return model


def without(x: Tensor, ids: tuple[int, ...]) -> Tensor:
    return x[[i for i in range(len(x)) if i not in ids]]


@pytest.mark.parametrize("seed", range(6))
def test_the_sign_of_a_coefficient(seed: int) -> None:
    torch.manual_seed(seed)
    x = torch.randn(18, 2).double()
    y = 0.25 * x[:, :1] + torch.randn(18, 1).double()
    outcome = smallest_removal(
        ptif.Problem(fitted_line(x, y), nn.MSELoss(), (x, y)), lambda m: m.weight[0, 0], method=ptif.exact(damping=0.0)
    )
    assert outcome.found
    after = float(slope(without(x, outcome.ids), without(y, outcome.ids)))
    assert after == pytest.approx(outcome.predicted, rel=1e-8), "a Newton step of least squares is the refit"
    assert after * outcome.before < 0
    smallest = next(
        size
        for size in range(1, 6)
        if any(
            float(slope(without(x, ids), without(y, ids))) * outcome.before < 0 for ids in combinations(range(18), size)
        )
    )
    assert len(outcome.ids) <= smallest + 1


def test_masked_outliers_are_found_by_looking_again() -> None:
    """Two clusters pull the same way and hide each other: the first scores alone would need many more."""
    torch.manual_seed(0)
    x = torch.cat([torch.randn(60, 1), torch.full((5, 1), 6.0) + 0.1 * torch.randn(5, 1)]).double()
    y = torch.cat([-0.3 * x[:60], torch.full((5, 1), 5.0)]) + 0.3 * torch.randn(65, 1).double()
    problem = ptif.Problem(fitted_line(x, y), nn.MSELoss(), (x, y))
    outcome = smallest_removal(problem, lambda m: m.weight[0, 0], method=ptif.exact(damping=0.0))
    assert outcome.found and len(outcome.ids) <= 5
    assert set(outcome.ids) <= set(range(60, 65))


def test_nothing_is_found_where_nothing_would_do() -> None:
    torch.manual_seed(0)
    x = torch.randn(50, 1).double()
    y = 5 * x + 0.1 * torch.randn(50, 1).double()
    problem = ptif.Problem(fitted_line(x, y), nn.MSELoss(), (x, y))
    outcome = smallest_removal(problem, lambda m: m.weight[0, 0], most=5, method=ptif.exact(damping=0.0))
    assert not outcome.found and outcome.confirmed is None and len(outcome.ids) <= 5
    assert "none found" in repr(outcome)


def test_a_statistic_of_another_model_than_its_argument_is_refused() -> None:
    torch.manual_seed(0)
    x = torch.randn(50, 1).double()
    model, other = (fitted_line(x, 0.1 * x + torch.randn(50, 1).double()) for _ in range(2))
    problem = ptif.Problem(model, nn.MSELoss(), (x, 0.1 * x))
    for read in (model, other):
        for most in (1, 0.5):
            with pytest.raises(
                InvalidInput, match=r"not change with the parameters of the model it is given.* argument"
            ):
                smallest_removal(problem, lambda _, read=read: read.weight[0, 0], 5.0, most, ptif.exact(damping=0.0))


def test_a_statistic_in_steps_may_stay_where_it_is() -> None:
    torch.manual_seed(0)
    x = torch.randn(40, 1)
    problem = ptif.Problem(nn.Linear(1, 2), nn.CrossEntropyLoss(), (x, (x[:, 0] > 0).long()))
    step = AccuracyStatistic(x[:4], (x[:4, 0] > 0).long())
    outcome = smallest_removal(problem, step, -1.0, most=2)
    assert not outcome.found and outcome.predicted == outcome.before


@pytest.mark.parametrize("ask", [smallest_removal, flip_prediction])
def test_a_model_in_place_of_a_problem(ask: Callable[..., Any]) -> None:
    words = (
        rf"{ask.__name__}\(\) takes a Problem, got Linear; write {ask.__name__}\(ptif\.Problem\(model, loss, train\)"
    )
    with pytest.raises(InvalidInput, match=words):
        ask(nn.Linear(1, 2), torch.zeros(1, 1))


def test_a_confirmation_is_beside_training_again_with_all_of_the_data() -> None:
    torch.manual_seed(0)
    x = torch.randn(50, 1).double()
    y = 0.1 * x + torch.randn(50, 1).double()
    problem = ptif.Problem(fitted_line(x, y), nn.MSELoss(), (x, y))

    def refit(dataset: Any, seed: int) -> nn.Module:
        return fitted_line(*(torch.stack(part) for part in zip(*dataset, strict=True)))

    def moved(dataset: Any, seed: int) -> nn.Module:
        line = refit(dataset, seed)
        with torch.no_grad():
            line.weight.mul_(-1)  # on the other side whether the set is in or out
        return line

    def slope(model: nn.Module) -> Tensor:
        return model.weight[0, 0]

    outcome = smallest_removal(problem, slope, method=ptif.exact(damping=0.0), recipe=refit)
    assert outcome.retrained == pytest.approx(outcome.before) and outcome.confirmed
    assert outcome.measured == pytest.approx(outcome.predicted)
    outcome = smallest_removal(problem, slope, method=ptif.exact(damping=0.0), recipe=moved)
    assert outcome.retrained == pytest.approx(-outcome.before) and not outcome.confirmed


def t_by_hand(x: Tensor, y: Tensor) -> float:
    """The t statistic of the first column's coefficient, from a fit of its own."""
    columns = torch.cat([x, torch.ones(len(x), 1).double()], 1)
    theta = torch.linalg.lstsq(columns, y).solution
    variance = (y - columns @ theta).square().sum() / (len(x) - columns.shape[1])
    return float(theta[0, 0] / (variance * torch.linalg.inv(columns.T @ columns)[0, 0]).sqrt())


@pytest.mark.parametrize("seed", range(4))
def test_the_significance_of_a_coefficient(seed: int) -> None:
    torch.manual_seed(seed)
    x = torch.randn(60, 2).double()
    y = 0.5 * x[:, :1] + torch.randn(60, 1).double()
    problem = ptif.Problem(fitted_line(x, y), nn.MSELoss(), (x, y))
    outcome = smallest_removal(problem, TStatistic(x, y), threshold=1.96, method=ptif.exact(damping=0.0))
    assert outcome.before == pytest.approx(t_by_hand(x, y), rel=1e-8) and outcome.before > 1.96
    after = t_by_hand(without(x, outcome.ids), without(y, outcome.ids))
    assert after == pytest.approx(outcome.predicted, rel=1e-7) and after < 1.96
    assert len(outcome.ids) <= 12


def test_the_moves_of_a_statistic_of_the_data_are_those_of_leaving_one_out() -> None:
    torch.manual_seed(0)
    x = torch.randn(30, 2).double()
    y = 0.5 * x[:, :1] + torch.randn(30, 1).double()
    fitted = ptif.exact(damping=0.0).fit(ptif.Problem(fitted_line(x, y), nn.MSELoss(), (x, y)))
    statistic = DataStatistic.of(TStatistic(x, y), 30)
    moves = removal_moves(fitted, statistic, torch.arange(30))
    actual = torch.tensor([t_by_hand(without(x, (i,)), without(y, (i,))) for i in range(30)]) - t_by_hand(x, y)
    # To first order in the weights, so that a large move is a little off.
    assert float(torch.corrcoef(torch.stack([moves, actual.double()]))[0, 1]) > 0.98
    assert float((moves @ actual.double()) / (moves @ moves)) == pytest.approx(1.0, abs=0.15)
    ignoring = removal_moves(
        fitted, DataStatistic.of(lambda m: TStatistic(x, y)(m, torch.ones(30)), 30), torch.arange(30)
    )
    assert float((ignoring - actual).norm()) > 3 * float((moves - actual).norm())


def test_statistics_that_cannot_be_used_are_refused() -> None:
    x, y = torch.randn(10, 2).double(), torch.randn(10, 1).double()
    problem = ptif.Problem(fitted_line(x, y), nn.MSELoss(), (x, y))
    with pytest.raises(InvalidInput, match="The statistic takes 3 arguments; give a function of the model"):
        smallest_removal(problem, lambda a, b, c: a)
    with pytest.raises(InvalidInput, match="The statistic is of type int; give a function of the model"):
        smallest_removal(problem, 3)
    with pytest.raises(InvalidInput, match=r"TStatistic\(column=2\) must be a whole number from 0 to 1"):
        TStatistic(x, y, 2)
    with pytest.raises(InvalidInput, match=r"TStatistic got inputs of shape \(10, 2\) and targets of shape \(9, 1\)"):
        TStatistic(x, y[1:])


def softmax_regression(x: Tensor, y: Tensor, weight: float = 1.0, decay: float = 0.02) -> nn.Linear:
    """At its minimum; `weight` is the share of the examples that are there, since the weight decay stays."""
    model = nn.Linear(x.shape[1], 3).double()
    nn.init.zeros_(model.weight), nn.init.zeros_(model.bias)
    optimiser = torch.optim.LBFGS(model.parameters(), max_iter=300, line_search_fn="strong_wolfe", tolerance_grad=1e-9)

    def closure() -> Tensor:
        optimiser.zero_grad()
        loss = weight * nn.functional.cross_entropy(model(x), y)
        loss = loss + decay / 2 * torch.stack([p.square().sum() for p in model.parameters()]).sum()
        loss.backward()
        return loss

    optimiser.step(closure)
    return model


@pytest.mark.parametrize("metric", ["accuracy", "mean loss"])
def test_a_metric_crosses_its_threshold_when_trained_again(metric: str) -> None:
    torch.manual_seed(0)
    y, yq = torch.arange(150) % 3, torch.arange(90) % 3
    centres = 1.2 * torch.eye(3, 4).double()
    x, xq = torch.randn(150, 4).double() + centres[y], torch.randn(90, 4).double() + centres[yq]
    model = softmax_regression(x, y)
    statistic: Callable[[nn.Module], Tensor] = AccuracyStatistic(xq, yq)
    before = float(statistic(model).detach())
    assert before == pytest.approx(float((model(xq).argmax(1) == yq).double().mean()))
    threshold, slack = before - 0.03, 1 / 90  # an accuracy moves in steps of one answer
    if metric == "mean loss":
        statistic = lambda m: nn.functional.cross_entropy(m(xq), yq)  # noqa: E731
        before = float(statistic(model).detach())
        threshold, slack = 1.05 * before, 0.0
    problem = ptif.Problem(model, nn.CrossEntropyLoss(), (x, y), weight_decay=0.02)
    outcome = smallest_removal(problem, statistic, threshold, method=ptif.exact(damping=0.0))
    assert outcome.found and 1 <= len(outcome.ids) <= 40
    kept = [i for i in range(150) if i not in outcome.ids]
    after = float(statistic(softmax_regression(x[kept], y[kept], len(kept) / 150)).detach())
    side = 1.0 if before > threshold else -1.0
    assert side * (after - threshold) < slack
    for seed in range(5):
        kept = torch.randperm(150, generator=torch.Generator().manual_seed(seed))[len(outcome.ids) :].tolist()
        chance = float(statistic(softmax_regression(x[kept], y[kept], len(kept) / 150)).detach())
        assert side * (chance - threshold) > slack, "as many at random do not come to it"


def test_the_slope_of_accuracy_is_that_of_the_smooth_one() -> None:
    torch.manual_seed(0)
    x, y = torch.randn(20, 3).double(), torch.arange(20) % 2
    two, one = nn.Linear(3, 2).double(), nn.Linear(3, 1).double()
    with torch.no_grad():
        one.weight.copy_(two.weight[1:] - two.weight[:1]), one.bias.copy_(two.bias[1:] - two.bias[:1])
    value, same = AccuracyStatistic(x, y, 0.5)(two), AccuracyStatistic(x, y, 0.5)(one)
    right = float((two(x).argmax(1) == y).double().mean())
    assert float(value.detach()) == pytest.approx(right) and float(same.detach()) == pytest.approx(right)
    value.backward(), same.backward()
    smooth = ((2 * y - 1) * one(x)[:, 0] / 0.5).sigmoid().mean()
    expected = torch.autograd.grad(smooth, one.weight)[0]
    torch.testing.assert_close(one.weight.grad, expected)
    torch.testing.assert_close(two.weight.grad, torch.cat([-expected, expected]))


@pytest.mark.slow
def test_flipped_predictions_flip_when_trained_again() -> None:
    from functools import partial

    import sklearn.datasets

    data = sklearn.datasets.load_digits()
    x, y = torch.tensor(data.data / 16).float(), torch.tensor(data.target)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    train, test = order[:400], order[400:]
    optimizer = partial(torch.optim.LBFGS, max_iter=400, line_search_fn="strong_wolfe", tolerance_grad=1e-7)

    decay = 1e-2

    def train_on(ids: Tensor) -> nn.Linear:
        model = nn.Linear(64, 10).double()
        nn.init.zeros_(model.weight), nn.init.zeros_(model.bias)
        optimiser = optimizer(model.parameters())

        def closure() -> Tensor:
            optimiser.zero_grad()
            loss = nn.functional.cross_entropy(model(x[ids].double()), y[ids])
            # The weight decay is fixed while the sum over the examples shrinks.
            loss = loss * len(ids) / len(train) + decay / 2 * sum(p.square().sum() for p in model.parameters())
            loss.backward()
            return loss

        optimiser.step(closure)
        return model

    model = train_on(train)
    problem = ptif.Problem(model, nn.CrossEntropyLoss(), (x[train].double(), y[train]), weight_decay=decay)
    margins = model(x[test].double()).topk(2, 1).values
    nearest = (margins[:, 0] - margins[:, 1]).argsort()[5 : 85 : 8 if FULL else 16]
    flipped = 0
    for q in test[nearest].tolist():
        outcome = flip_prediction(problem, (x[q : q + 1].double(), y[q : q + 1]), method=ptif.exact(damping=0.0))
        assert outcome.found
        again = train_on(train[[i for i in range(len(train)) if i not in outcome.ids]])
        flipped += int(again(x[q].double()).argmax() != model(x[q].double()).argmax())
    assert flipped >= 0.8 * len(nearest), f"{flipped} of {len(nearest)} predictions flipped"


def problem() -> ptif.Problem:
    torch.manual_seed(0)
    x, y = torch.randn(30, 3), torch.arange(30) % 2
    return ptif.Problem(nn.Linear(3, 2), nn.CrossEntropyLoss(), (x, y))


def test_bad_input_in_one_sentence() -> None:
    with pytest.raises(InvalidInput, match="The statistic gave float, expected one number as a tensor"):
        smallest_removal(problem(), lambda m: float(m.weight[0, 0]))  # type: ignore[arg-type,return-value]
    with pytest.raises(InvalidInput, match=r"a tensor of shape \(3,\), expected one number"):
        smallest_removal(problem(), lambda m: m.weight[0])
    with pytest.raises(InvalidInput, match="does not depend on the parameters through autograd"):
        smallest_removal(problem(), lambda m: m.weight[0, 0].detach())
    with pytest.raises(InvalidInput, match="the threshold itself"):
        smallest_removal(problem(), lambda m: m.weight[0, 0] * 0)
    with pytest.raises(InvalidInput, match="most=30 must be a whole number from 1 to 29; or a share"):
        smallest_removal(problem(), lambda m: m.weight[0, 0], most=30)
    with pytest.raises(InvalidInput, match=r"AccuracyStatistic got 3 inputs and labels of shape \(2,\)"):
        AccuracyStatistic(torch.randn(3, 1), torch.tensor([0, 1]))
    with pytest.raises(InvalidInput, match=r"AccuracyStatistic.*width=0"):
        AccuracyStatistic(torch.randn(2, 1), torch.tensor([0, 1]), width=0)
    with pytest.raises(InvalidInput, match="about one query, and 2 were given"):
        flip_prediction(problem(), (torch.randn(2, 3), torch.tensor([0, 1])))
    with pytest.raises(InvalidInput, match="moves one model along"):
        smallest_removal(problem(), lambda m: m.weight[0, 0], method=ptif.methods.Random())
