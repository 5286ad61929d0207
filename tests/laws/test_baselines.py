"""Laws of the plain baselines: each is what its name says, written out in float64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import pytorch_influence_functions as ptif
from pytorch_influence_functions.methods import EmbeddingSimilarity, Random, TrainingLoss
from tests.tolerance import gap, rounding


def case() -> tuple[nn.Sequential, tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Inputs of very different lengths, so that a dot product ranks otherwise than a cosine."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3)).double()
    lengths = torch.logspace(-1, 2, 24, dtype=torch.float64)[torch.randperm(24)]
    x, y = torch.randn(24, 4).double() * lengths[:, None], torch.arange(24) % 3
    return model, (x[:20], y[:20]), (x[20:], y[20:])


def test_similarity_is_the_cosine_of_the_features_before_the_last_layer() -> None:
    model, train, queries = case()
    fitted = EmbeddingSimilarity().fit(ptif.Problem(model, ptif.CrossEntropy(), train))
    features, asked = (torch.relu(model[0](x)).detach() for x in (train[0], queries[0]))
    want = F.cosine_similarity(asked[:, None], features[None], dim=2)
    scores = fitted.score(queries)
    torch.testing.assert_close(scores.values.double(), want, rtol=1e-5, atol=1e-6)
    assert torch.equal(fitted.self_influence(), torch.ones(20))
    orders = [(asked @ features.T).argsort(1), want.argsort(1)]
    assert not torch.equal(*orders), "a dot product would rank in the same way here"


def test_similarity_of_several_positions_is_that_of_their_mean() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 2)).double()
    x, y, q = torch.randn(8, 3, 4).double(), torch.zeros(8, 3, 2).double(), torch.randn(2, 3, 4).double()
    scores = EmbeddingSimilarity().fit(ptif.Problem(model, ptif.SquaredError(), (x, y))).score((q, y[:2]))
    features, asked = (torch.tanh(model[0](t)).mean(1).detach() for t in (x, q))
    want = F.cosine_similarity(asked[:, None], features[None], dim=2)
    torch.testing.assert_close(scores.values.double(), want, rtol=1e-5, atol=1e-6)


def test_the_loss_of_an_example_is_the_same_for_every_query() -> None:
    model, train, queries = case()
    fitted = TrainingLoss().fit(ptif.Problem(model, ptif.CrossEntropy(), train))
    want = F.cross_entropy(model(train[0]), train[1], reduction="none").detach()
    torch.testing.assert_close(fitted.score(queries).values.double(), want.expand(4, 20), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(fitted.self_influence().double(), want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("method", [EmbeddingSimilarity(), TrainingLoss(), Random(3)], ids=repr)
def test_what_is_taken_to_help_does_not_depend_on_the_measures_sense(method: ptif.methods.Random) -> None:
    model, train, queries = case()
    fitted = method.fit(ptif.Problem(model, ptif.CrossEntropy(), train))
    of_loss, of_margin = fitted.score(queries), fitted.score(queries, ptif.Margin())
    assert gap(of_margin.values, -of_loss.values) < rounding(of_loss.values)
    assert [i for i, _ in of_margin.helpful(0, 5)] == [i for i, _ in of_loss.helpful(0, 5)]
