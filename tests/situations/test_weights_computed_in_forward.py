"""A layer computes a tensor that it keeps in every forward pass: pruning, the old weight_norm, stored features."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import prune

import pytorch_influence_functions as ptif
from tests.oracles.autograd import example_gradients
from tests.tolerance import gap, rounding

X, Y = torch.randn(20, 4, generator=torch.Generator().manual_seed(0)).double(), torch.arange(20) % 3
TRAIN, QUERIES = (X[:16], Y[:16]), (X[16:], Y[16:])


def with_layer(change: Callable[[nn.Module], object]) -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()
    change(model[0])
    with torch.no_grad():
        model(X)
    return model.train()


class Remembers(nn.Module):
    """A network that keeps its last features for a picture of them."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body, self.head = nn.Linear(4, 5), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        self.features = torch.tanh(self.body(x))
        return self.head(self.features)


MODELS: dict[str, Callable[[], nn.Module]] = {
    "pruned": lambda: with_layer(lambda layer: prune.l1_unstructured(layer, "weight", 0.5)),
    "weight_norm": lambda: with_layer(nn.utils.weight_norm),
    "spectral_norm": lambda: with_layer(nn.utils.spectral_norm),
    "remembers its features": lambda: Remembers().double(),
}


def tensors_beside_the_parameters(model: nn.Module) -> dict[str, Tensor]:
    named = [(f"{m}.{n}", v) for m, module in model.named_modules() for n, v in vars(module).items()]
    return {name: value for name, value in named if isinstance(value, Tensor)}


@pytest.mark.filterwarnings("ignore:.*weight_norm.*deprecated")
@pytest.mark.parametrize("method", ["grad_dot", "ekfac", "exact"])
@pytest.mark.parametrize("name", MODELS)
def test_scores_are_right_and_nothing_is_left_behind(name: str, method: str) -> None:
    model = MODELS[name]()
    before = tensors_beside_the_parameters(model)
    curvature = {"exact": ptif.exact(ptif.curvature.GGN(), damping=0.1)}
    scores = ptif.attribute(model, TRAIN, QUERIES, loss=nn.CrossEntropyLoss(), method=curvature.get(method, method))
    after = tensors_beside_the_parameters(model)
    assert after.keys() == before.keys() and all(after[k] is before[k] for k in before)
    if method == "grad_dot":
        rows = [example_gradients(model, F.cross_entropy, *data) for data in (QUERIES, TRAIN)]
        assert gap(scores.values, rows[0] @ rows[1].T / 16) < rounding(torch.float64, 100)


@pytest.mark.parametrize("name", ["pruned", "spectral_norm", "remembers its features"])
def test_the_model_can_be_copied_afterwards(name: str) -> None:
    """Tensors of a transform of torch.func would refuse."""
    model = MODELS[name]()
    ptif.attribute(model, TRAIN, QUERIES, loss=nn.CrossEntropyLoss(), method="ekfac")
    outputs = copy.deepcopy(model).eval()(X).detach()
    assert gap(outputs, model.eval()(X).detach()) < rounding(torch.float64)


@pytest.mark.filterwarnings("ignore:.*weight_norm.*deprecated")
@pytest.mark.parametrize("name", MODELS)
def test_an_edited_model_moves_as_predicted(name: str) -> None:
    model = MODELS[name]()
    model.train(False)(X)  # with its graph: the weight is then no leaf, which torch does not copy
    problem = ptif.Problem(model, nn.CrossEntropyLoss(), TRAIN)
    outcome = ptif.what_if(problem, reweight={0: 1.001})
    losses = [F.cross_entropy(m.eval()(QUERIES[0]), QUERIES[1], reduction="none") for m in (outcome.model(), model)]
    predicted = outcome.change(QUERIES)
    assert gap(losses[0] - losses[1], predicted) < 0.05
