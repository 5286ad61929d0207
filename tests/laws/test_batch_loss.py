"""Law: a step of the built-in recipe minimises what the user's loss makes of its batch, as a hand-written loop does."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import pytorch_influence_functions as ptif
from pytorch_influence_functions.core.errors import InvalidInput
from pytorch_influence_functions.evaluation import ConstantRate, Recipe, Subsets, retrain, train_model
from pytorch_influence_functions.evaluation.recipe import draw_orders
from pytorch_influence_functions.objectives.batch_loss import combine_losses
from pytorch_influence_functions.objectives.convert import as_batch_loss, as_objective
from pytorch_influence_functions.objectives.measures import FromFunction

N, CLASSES = 18, 3
WEIGHT = torch.tensor([1.0, 2.0, 9.0], dtype=torch.float64)
Loss = Callable[[Any, Any], Tensor]


def summed(outputs: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(outputs, targets, reduction="sum")


OF_CLASSES: dict[str, Loss] = {
    "plain": nn.CrossEntropyLoss(),
    "weight": nn.CrossEntropyLoss(weight=WEIGHT),
    "ignore_index": nn.CrossEntropyLoss(ignore_index=2),
    "both, smoothed": nn.CrossEntropyLoss(weight=WEIGHT, ignore_index=0, label_smoothing=0.2),
    "sum": nn.CrossEntropyLoss(reduction="sum"),
    "weighted sum": nn.CrossEntropyLoss(weight=WEIGHT, ignore_index=0, reduction="sum"),
    "functional": partial(F.cross_entropy, weight=WEIGHT),
}


def data(seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(N, 4, generator=generator).double(), torch.arange(N) % CLASSES


def minimised(loss: Any, outputs: Tensor, targets: Tensor) -> Tensor:
    objective = as_objective(loss)
    if isinstance(objective, FromFunction):
        objective = objective.resolved(outputs, targets)
    batch = (outputs, targets)
    return combine_losses(as_batch_loss(loss, objective), objective.losses(outputs, batch), batch, None)


@pytest.mark.parametrize("shape", [(), (5,), (2, 3)], ids=str)
@pytest.mark.parametrize("name", OF_CLASSES)
def test_a_batch_of_labels_is_torchs_number(name: str, shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    outputs, targets = torch.randn(6, CLASSES, *shape).double(), torch.randint(0, CLASSES, (6, *shape))
    torch.testing.assert_close(minimised(OF_CLASSES[name], outputs, targets), OF_CLASSES[name](outputs, targets))


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_a_batch_of_probabilities_is_torchs_number(reduction: str) -> None:
    torch.manual_seed(0)
    loss = nn.CrossEntropyLoss(weight=WEIGHT, reduction=reduction)
    for shape in ((), (5,)):
        outputs, targets = torch.randn(6, CLASSES, *shape).double(), torch.rand(6, CLASSES, *shape).double()
        torch.testing.assert_close(minimised(loss, outputs, targets), loss(outputs, targets))


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("kind", [nn.MSELoss, nn.BCEWithLogitsLoss, nn.L1Loss, nn.HuberLoss])
def test_a_batch_of_numbers_is_torchs_number(kind: Any, reduction: str) -> None:
    torch.manual_seed(0)
    outputs, targets = torch.rand(6, 2).double(), torch.rand(6, 2).double()
    loss = kind(reduction=reduction)
    torch.testing.assert_close(minimised(loss, outputs, targets), loss(outputs, targets))


def test_a_batch_without_a_label_that_counts_moves_nothing() -> None:
    loss = nn.CrossEntropyLoss(ignore_index=1)
    outputs = torch.randn(3, CLASSES).double().requires_grad_()
    minimised(loss, outputs, torch.ones(3, dtype=torch.long)).backward()
    assert outputs.grad is not None and not outputs.grad.any()


def linear() -> nn.Module:
    return nn.Linear(4, CLASSES).double()


def with_random_layer() -> nn.Module:
    """Trained one by one, for what it draws."""
    return nn.Sequential(nn.Linear(4, CLASSES), nn.Dropout(0.5)).double()


def by_hand(recipe: Recipe, loss: Loss, ids: Tensor, targets: Tensor) -> nn.Module:
    """The user's own loop."""
    x, _ = data()
    torch.manual_seed(0)
    model = recipe.model()
    model.load_state_dict(recipe.fresh(0).state_dict())
    optimizer = recipe.optimizer(model.parameters())
    torch.manual_seed(0)
    for order in draw_orders(N, recipe.epochs, 0):
        for batch in order[torch.isin(order, ids)].split(recipe.batch_size or N):
            optimizer.zero_grad()
            loss(model(x[batch]), targets[batch]).backward()
            optimizer.step()
    return model.eval()


@pytest.mark.parametrize("model", [linear, with_random_layer])
@pytest.mark.parametrize("batch_size", [None, 5])
@pytest.mark.parametrize("name", [*OF_CLASSES, "own sum"])
def test_the_recipe_trains_what_the_users_own_loop_trains(name: str, batch_size: int | None, model: Any) -> None:
    loss = summed if name == "own sum" else OF_CLASSES[name]
    optimizer = partial(torch.optim.SGD, lr=0.02, weight_decay=0.1)
    recipe = Recipe(model, optimizer, 4, batch_size, ConstantRate(), loss)
    x, y = data()
    trained = train_model(recipe, (x, y), seed=0)
    expected = by_hand(recipe, loss, torch.arange(N), y)
    for mine, own in zip(trained.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(mine, own, rtol=1e-10, atol=1e-12)

    subsets = Subsets.halves(N, 2)
    truth = retrain(recipe, subsets, [0], train=(x, y), queries=(x, y), measure=ptif.CrossEntropy())
    for kept, measured in zip(subsets.kept, truth.measured[:, 0], strict=True):
        own_model = by_hand(recipe, loss, kept.nonzero().flatten(), y)
        with torch.no_grad():
            expected_losses = F.cross_entropy(own_model(x), y, reduction="none")
        torch.testing.assert_close(measured.double(), expected_losses, rtol=1e-6, atol=1e-6)
    said = any(words in truth.how for words in ("class weights, as torch does", "are summed, as the loss does"))
    assert said is (name not in ("plain", "ignore_index"))


def test_a_relabelled_example_has_the_weight_of_its_new_label() -> None:
    loss = OF_CLASSES["weight"]
    recipe = Recipe(linear, partial(torch.optim.SGD, lr=0.02, weight_decay=0.1), 4, 5, ConstantRate(), loss)
    x, y = data()
    truth = retrain(recipe, Subsets.relabelled(N, [{3: 2}]), [0], train=(x, y), queries=(x, y))
    changed = y.clone()
    changed[3] = 2
    model = by_hand(recipe, loss, torch.arange(N), changed)
    with torch.no_grad():
        expected = WEIGHT[y] * F.cross_entropy(model(x), y, reduction="none")
    torch.testing.assert_close(truth.measured[0, 0].double(), expected, rtol=1e-6, atol=1e-6)


def test_an_objective_is_trained_by_its_mean_over_the_examples() -> None:
    recipe = Recipe(linear, partial(torch.optim.SGD, lr=0.1), 3, None, ConstantRate(), ptif.CrossEntropy(WEIGHT))
    x, y = data()
    trained = train_model(recipe, (x, y), seed=0)

    def mean_of_examples(outputs: Tensor, targets: Tensor) -> Tensor:
        return (WEIGHT[targets] * F.cross_entropy(outputs, targets, reduction="none")).mean()

    expected = by_hand(recipe, mean_of_examples, torch.arange(N), y)
    for mine, own in zip(trained.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(mine, own, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name", ["weight", "sum"])
def test_unrolling_goes_back_along_means_over_the_examples_only(name: str) -> None:
    recipe = Recipe(linear, partial(torch.optim.SGD, lr=0.1), 3, 5, ConstantRate(), OF_CLASSES[name])
    with pytest.raises(InvalidInput, match=r"^The recipe's loss is CrossEntropyLoss\(.*steps of the mean over the ex"):
        recipe.replay(N, 0)
