"""Law: the queue of doubtful labels is what its sentence says, and finds planted ones where the loss alone does not."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import sklearn.datasets
import sklearn.metrics
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, SubsetRandomSampler, TensorDataset

import pytorch_influence_functions as ptif
from pytorch_influence_functions.actions import LabelIssueFinder, find_label_issues
from pytorch_influence_functions.core.errors import InvalidInput
from pytorch_influence_functions.evaluation import Recipe
from pytorch_influence_functions.scores.doubt import harm_reliability


def trained(x: Tensor, y: Tensor, classes: int, steps: int = 400) -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(x.shape[1], 16), nn.Tanh(), nn.Linear(16, classes))
    optimiser = torch.optim.Adam(model.parameters(), lr=5e-3)
    for _ in range(steps):
        optimiser.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimiser.step()
    return model


def blobs(n: int = 90) -> tuple[Tensor, Tensor]:
    torch.manual_seed(1)
    y = torch.arange(n) % 3
    return torch.randn(n, 4) + 2 * nn.functional.one_hot(y, 4), y


def test_the_order_is_that_of_its_definition() -> None:
    x, y = blobs()
    xv, yv = blobs(30)
    model = trained(x, y, 3, steps=50)
    problem = ptif.Problem(model, nn.CrossEntropyLoss(), (x, y), batch_size=7)
    issues = find_label_issues(problem, (xv, yv))
    with torch.no_grad():
        loss = nn.functional.cross_entropy(model(x), y, reduction="none").double()
    harms = -ptif.ekfac().fit(problem).score((xv, yv)).values.double().numpy()
    harm = torch.from_numpy(harms.mean(0))
    r = np.corrcoef(harms[::2].mean(0), harms[1::2].mean(0))[0, 1]
    weight = 2 * r / (1 + r)
    assert 0.05 < weight < 1 and issues.harm_reliability == pytest.approx(weight, rel=1e-4)
    own = ptif.dual().fit(problem).self_influence().double()
    left_out = loss + own / (1 - own)
    torch.testing.assert_close(issues.left_out_loss, left_out, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(
        issues.doubt, left_out / left_out.std() + weight * harm / harm.std(), rtol=1e-4, atol=1e-5
    )
    assert issues.ids(5) == issues.doubt.argsort(descending=True)[:5].tolist()
    alone = find_label_issues(problem)
    assert alone.harm is None and alone.ids(20) == left_out.argsort(descending=True, stable=True)[:20].tolist()
    # One probability and one class for each, and the suggestion is never the given class.
    with torch.no_grad():
        probabilities = model(x).softmax(1).double()
    torch.testing.assert_close(issues.probability, probabilities[torch.arange(90), y], rtol=1e-5, atol=1e-6)
    assert bool((issues.suggested != y).all())
    agree = issues.predicted == y
    assert bool((issues.suggested[~agree] == issues.predicted[~agree]).all())


def test_harm_counts_as_far_as_two_halves_of_the_validation_data_agree() -> None:
    torch.manual_seed(0)
    signal, noise = torch.randn(1, 4000), torch.randn(100, 4000)
    # The mean of 100 queries is signal plus noise of variance 4: a fifth of its variance comes back elsewhere.
    assert harm_reliability(signal + 20 * noise) == pytest.approx(1 / 5, abs=0.05)
    assert harm_reliability(signal + 1e-3 * noise) == pytest.approx(1.0, abs=1e-4)
    assert harm_reliability(noise - torch.tensor([1.0, -1.0]).repeat(50)[:, None] * signal) == 0.0
    assert harm_reliability(signal) == 1.0 and harm_reliability(torch.ones(4, 5)) == 0.0


def test_planted_labels_between_neighbouring_classes() -> None:
    data = sklearn.datasets.load_digits()
    x, y = torch.tensor(data.data / 16).float()[:900], torch.tensor(data.target)[:900]
    train, validation = (x[:700], y[:700].clone()), (x[700:], y[700:])
    planted = torch.zeros(700, dtype=torch.bool)
    planted[torch.randperm(700, generator=torch.Generator().manual_seed(0))[:70]] = True
    train[1][planted] = (train[1][planted] + 1) % 10
    model = trained(*train, classes=10)
    problem = ptif.Problem(model, nn.CrossEntropyLoss(), train)
    issues = find_label_issues(problem, validation)
    queue, loss = (
        sklearn.metrics.average_precision_score(planted.numpy(), v.numpy()) for v in (issues.doubt, issues.loss)
    )
    assert queue > loss + 0.01
    right = issues.suggested[planted] == y[:700][planted]
    assert float(right.double().mean()) > 0.8


def test_a_table_for_cleanlab_with_names() -> None:
    pytest.importorskip("pandas")
    x, y = blobs()
    words = np.array(["ant", "bee", "cow"])[y.numpy()]
    problem = ptif.Problem(trained(x, y, 3), nn.CrossEntropyLoss(), (x.numpy(), words))
    issues = find_label_issues(problem, (x[:9].numpy(), words[:9]))
    frame = issues.to_frame()
    assert frame.index.tolist() == issues.order.tolist()
    assert {"is_label_issue", "label_score", "given_label", "predicted_label", "harm"} <= set(frame.columns)
    assert frame["label_score"].is_monotonic_increasing and set(frame["given_label"]) == {"ant", "bee", "cow"}
    assert "labels in doubt, first" in repr(issues)
    outcome = ptif.what_if(problem, relabel=issues.relabelling(3))
    assert outcome.edit.description == "3 examples relabelled"


def test_one_logit_and_samplers() -> None:
    torch.manual_seed(0)
    x, y = torch.randn(60, 3), (torch.arange(60) % 2)
    model = nn.Linear(3, 1)
    loader = DataLoader(TensorDataset(x, y.float()[:, None]), batch_size=8, sampler=SubsetRandomSampler(range(20, 50)))
    issues = find_label_issues(ptif.Problem(model, nn.BCEWithLogitsLoss(), loader), (x[:5], y[:5].float()[:, None]))
    assert len(issues) == 60
    assert set(issues.ids(30)) == set(range(20, 50)), "an example that training never saw is not in doubt"
    with torch.no_grad():
        p = model(x)[:, 0].sigmoid().double()
    want = torch.where(y == 1, p, 1 - p)[20:50]
    torch.testing.assert_close(issues.probability[20:50], want, rtol=1e-5, atol=1e-6)


def test_in_the_manner_of_scikit_learn() -> None:
    x, y = blobs()
    finder = LabelIssueFinder(Recipe(lambda: nn.Linear(4, 3), epochs=3), validation=(x[:9], y[:9]))
    with pytest.raises(InvalidInput, match=r"has not been fitted; call fit\(x, y\) first"):
        _ = finder.ranked_label_issues_
    assert sorted(finder.fit(x, y).ranked_label_issues_.tolist()) == list(range(90))


BAD: dict[str, tuple[Any, str]] = {
    "numbers": (
        lambda x, y: ptif.Problem(nn.Linear(4, 1), nn.MSELoss(), (x, x[:, :1])),
        "which are no class numbers; find_label_issues",
    ),
    "a method without a system": (
        lambda x, y: ptif.Problem(nn.Linear(4, 3), nn.CrossEntropyLoss(), (x, y)),
        "solves a linear system, which Random does not have",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_in_one_sentence(name: str) -> None:
    problem, match = BAD[name]
    with pytest.raises(InvalidInput, match=match):
        find_label_issues(problem(*blobs()), method=ptif.methods.Random() if "method" in name else None)
