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
from pytorch_influence_functions.actions import LabelIssueFinder, find_label_issues, label_votes
from pytorch_influence_functions.core.errors import InvalidInput
from pytorch_influence_functions.evaluation import Recipe
from pytorch_influence_functions.scores.doubt import harm_reliability
from pytorch_influence_functions.scores.votes import RIDGES


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


def ridge_votes(kernel: Tensor, one_hot: Tensor, voting: Tensor, ridge: float) -> Tensor:
    """Votes of those who vote, fitted anew without each one in turn; their mean is that of all of them."""
    votes, mean = torch.zeros_like(one_hot), one_hot[voting].mean(0)
    for i in range(len(kernel)):
        others = voting.clone()
        others[i] = False
        k = kernel[others][:, others]
        weights = torch.linalg.solve(k + ridge * torch.eye(len(k), dtype=k.dtype), one_hot[others] - mean)
        votes[i] = mean + kernel[i, others] @ weights
    return votes


def best_votes(kernel: Tensor, one_hot: Tensor, voting: Tensor) -> Tensor:
    unit = float(kernel[voting][:, voting].diagonal().mean())
    tried = [ridge_votes(kernel, one_hot, voting, r * unit) for r in RIDGES]
    return min(tried, key=lambda v: float((v - one_hot)[voting].square().mean()))


def test_the_order_is_that_of_its_definition() -> None:
    x, y = blobs(48)
    y = y.clone()
    y[:6] = (y[:6] + 1) % 3
    xv, yv = blobs(12)
    model = trained(x, y, 3, steps=50)
    problem = ptif.Problem(model, nn.CrossEntropyLoss(), (x, y), batch_size=7)
    people, classes = torch.cat([x, xv]), torch.cat([y, yv])
    parameters = dict(model.named_parameters())
    jacobian = torch.func.jacrev(lambda p: torch.func.functional_call(model, p, (people,)))(parameters)
    flat = torch.cat([j.detach().reshape(60, 3, -1) for j in jacobian.values()], 2).double()
    whole = torch.einsum("ikp,jkp->ij", flat, flat)
    # Without validation data the examples vote alone; then those in doubt lose their vote.
    for m, validation in ((48, None), (60, (xv, yv))):
        issues = find_label_issues(problem, validation)
        kernel, one_hot = whole[:m, :m], nn.functional.one_hot(classes[:m], 3).double()
        voting = torch.ones(m, dtype=torch.bool)
        first = best_votes(kernel, one_hot, voting)
        given = nn.functional.one_hot(y, 3).bool()
        voting[:48] = first[:48].masked_fill(given, -9).amax(1) <= first[:48][given]
        votes = best_votes(kernel, one_hot, voting)[:48]
        assert 0 < int((~voting).sum()) < 24
        torch.testing.assert_close(issues.votes, votes, rtol=1e-4, atol=1e-4)
        doubt = votes.masked_fill(given, -9).amax(1) - votes[given]
        torch.testing.assert_close(issues.doubt, doubt, rtol=1e-4, atol=2e-4)
        assert issues.ids(5) == issues.doubt.argsort(descending=True, stable=True)[:5].tolist()
        assert issues.is_issue.tolist() == (issues.doubt > 0).tolist()
        assert bool((issues.suggested == votes.masked_fill(given, -9).argmax(1)).all())
    with torch.no_grad():
        probabilities = model(x).softmax(1).double()
    torch.testing.assert_close(issues.probability, probabilities[torch.arange(48), y], rtol=1e-5, atol=1e-6)
    harms = -ptif.ekfac().fit(problem).score((xv, yv)).values.double()
    assert issues.harm is not None and find_label_issues(problem).harm is None
    torch.testing.assert_close(issues.harm, harms.mean(0), rtol=1e-4, atol=1e-7)
    r = np.corrcoef(harms[::2].mean(0), harms[1::2].mean(0))[0, 1]
    assert issues.harm_reliability == pytest.approx(2 * r / (1 + r), rel=1e-3)


def test_a_memorised_wrong_label_is_voted_down() -> None:
    x, y = blobs()
    wrong = torch.arange(90) % 15 == 0
    given = torch.where(wrong, (y + 1) % 3, y)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 64), nn.ReLU(), nn.Linear(64, 3))
    optimiser = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(600):
        optimiser.zero_grad()
        nn.functional.cross_entropy(model(x), given).backward()
        optimiser.step()
    issues = find_label_issues(ptif.Problem(model, nn.CrossEntropyLoss(), (x, given)))
    # The model gives every label it was given, so that neither its loss nor its prediction says anything.
    assert int((issues.predicted != given).sum()) == 0
    average = sklearn.metrics.average_precision_score(wrong.numpy(), issues.doubt.numpy())
    by_loss = sklearn.metrics.average_precision_score(wrong.numpy(), issues.loss.numpy())
    assert average > by_loss + 0.1, (average, by_loss)


def test_groups_and_sketches_say_nearly_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    x, y = blobs()
    problem = ptif.Problem(trained(x, y, 3, steps=50), nn.CrossEntropyLoss(), (x, y))
    whole = find_label_issues(problem)
    monkeypatch.setattr(label_votes, "_TOGETHER", 45)
    groups = find_label_issues(problem, blobs(30))
    assert np.corrcoef(whole.doubt, groups.doubt)[0, 1] > 0.7
    monkeypatch.setattr(label_votes, "_TOGETHER", 4000)
    full = label_votes._affordable
    monkeypatch.setattr(label_votes, "_affordable", lambda derivatives, n, room: full(derivatives, n, 1.0))
    assert np.corrcoef(whole.doubt, find_label_issues(problem).doubt)[0, 1] > 0.7


def test_a_model_that_ends_in_a_softmax_is_read_like_one_with_logits() -> None:
    x, y = blobs()
    model = trained(x, y, 3, steps=50)
    logits = find_label_issues(ptif.Problem(model, ptif.CrossEntropy(), (x, y)))
    with_softmax = ptif.Problem(nn.Sequential(model, nn.Softmax(1)), ptif.CrossEntropy(from_probabilities=True), (x, y))
    issues = find_label_issues(with_softmax)
    torch.testing.assert_close(issues.probability, logits.probability, rtol=1e-4, atol=1e-5)
    assert issues.predicted.tolist() == logits.predicted.tolist()


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
    with pytest.raises(InvalidInput, match="got a table, which does not say what becomes of its rows"):
        ptif.actions.curate((x, y), frame)
    rows = frame.index[frame["label_score"] < 0.1]
    assert ptif.actions.curate((x, y), rows).removed == tuple(sorted(issues.ids(9)))
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
    with pytest.raises(InvalidInput, match="trains by a Recipe, got Linear; write"):
        LabelIssueFinder(nn.Linear(4, 3)).fit(x, y)  # type: ignore[arg-type]


def test_validation_labels_that_the_model_does_not_know() -> None:
    x, y = blobs()
    problem = ptif.Problem(nn.Linear(4, 3), nn.CrossEntropyLoss(ignore_index=7), (x, y))
    with pytest.raises(InvalidInput, match=r"name the classes \[7\] and the model knows 0 to 2"):
        find_label_issues(problem, (x[:2], torch.tensor([7, 2])))


BAD: dict[str, tuple[Any, str]] = {
    "numbers": (
        lambda x, y: ptif.Problem(nn.Linear(4, 1), nn.MSELoss(), (x, x[:, :1])),
        "one number for each example and the targets run from .*; .* for numbers and counts look at the residuals",
    ),
    "one-hot labels": (
        lambda x, y: ptif.Problem(nn.Linear(4, 3), nn.CrossEntropyLoss(), (x, nn.functional.one_hot(y, 3).float())),
        r"give one-hot labels as y.argmax\(1\)",
    ),
    "a model instead of a problem": (
        lambda x, y: nn.Linear(4, 3),
        r"got Linear; write find_label_issues\(Problem\(model, loss, train\)",
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
