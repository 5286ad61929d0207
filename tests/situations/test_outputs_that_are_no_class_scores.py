"""What asks for a prediction reads the outputs as scores of classes only where the loss does."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributions import Categorical, Normal

import pytorch_influence_functions as ptif
from pytorch_influence_functions.actions import find_label_issues, flip_prediction
from pytorch_influence_functions.core.errors import InvalidInput
from pytorch_influence_functions.objectives.class_scores import check_class_scores, class_scores
from tests.tolerance import gap, rounding

N = 30
_FIXED = torch.Generator().manual_seed(1)
X = torch.randn(N, 4, generator=_FIXED, dtype=torch.float64)
KIND = torch.arange(N) % 3
YES = (torch.arange(N) % 2).double()[:, None]
LABELS = (torch.randn(N, 3, generator=_FIXED) > 0).double()
AGE = 40 + 10 * torch.randn(N, 1, generator=_FIXED, dtype=torch.float64)
COUNTS = torch.arange(N) % 5


class Heads(nn.Module):
    """Class logits and an age, as a tuple or with the logits called so."""

    def __init__(self, named: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.trunk = nn.Linear(4, 5)
        self.kind, self.age = nn.Linear(5, 3), nn.Linear(5, 1)
        self.named = named
        self.double()

    def forward(self, x: Tensor) -> Any:
        hidden = self.trunk(x).tanh()
        kind, age = self.kind(hidden), 100 + self.age(hidden)
        return {"age": age, "logits": kind} if self.named else (kind, age)


class Answer(nn.Module):
    """A linear layer, and what is made of its outputs."""

    def __init__(self, width: int, make: Callable[[Tensor], Any] = lambda outputs: outputs) -> None:
        super().__init__()
        torch.manual_seed(2)
        self.linear, self.make = nn.Linear(4, width).double(), make

    def forward(self, x: Tensor) -> Any:
        return self.make(self.linear(x))


def _of_both(out: Any, y: Tensor) -> Tensor:
    kind, age = (out["logits"], out["age"]) if isinstance(out, dict) else out
    return F.cross_entropy(kind, y) + 1e-4 * age.square().mean()


def _ordinal(out: Tensor, y: Tensor) -> Tensor:
    return F.binary_cross_entropy_with_logits(out, (y[:, None] > torch.arange(2)).double())


def _contrastive(out: Tensor, y: Tensor) -> Tensor:
    distance = F.pairwise_distance(out[:, :3], out[:, 3:])
    return (y * distance.square() + (1 - y) * F.relu(1.5 - distance).square()).mean()


def _normal(out: Tensor) -> Normal:
    return Normal(out[:, 0], out[:, 1].exp())


NO_SCORES: dict[str, tuple[nn.Module, Any, Tensor, str]] = {
    "two heads": (
        Heads(False),
        _of_both,
        KIND,
        r"returned a tuple of \(30, 3\) and \(30, 1\), none of them called log",
    ),
    "a normal distribution": (
        Answer(2, _normal),
        lambda out, y: -out.log_prob(y[:, 0]).mean(),
        AGE,
        r"returned a Normal of loc \(30,\) and scale \(30,\)",
    ),
    "several labels": (Answer(3), nn.BCEWithLogitsLoss(), LABELS, r"targets of shape \(30, 3\) are no class"),
    "two numbers": (Answer(2), lambda out, y: (out - y).square().mean(), X[:, :2], r"targets of shape \(30, 2\)"),
    "one number": (Answer(1), nn.MSELoss(), AGE, "gives one number for each example and the targets run from"),
    "a share": (Answer(1), nn.MSELoss(), YES, r"SquaredError\(.* the sign of the one output is no yes or no"),
    "a probability": (
        Answer(1, Tensor.sigmoid),
        lambda out, y: -(y * out.log() + (1 - y) * (1 - out).log()).mean(),
        YES,
        "the sign of the one output is no yes or no",
    ),
    "quantiles": (
        Answer(3),
        lambda out, y: (torch.tensor([0.1, 0.5, 0.9]) * (y - out)).maximum((1 - 0.5) * (out - y)).mean(),
        AGE,
        "no whole numbers, as those of classes are",
    ),
    "counts": (Answer(1), nn.PoissonNLLLoss(), COUNTS[:, None].double(), "the targets run from 0 to 4"),
    "few counts": (Answer(1), nn.PoissonNLLLoss(), YES, "the sign of the one output is no yes or no"),
    "a mean and a variance of counts": (
        Answer(2),
        lambda out, y: F.gaussian_nll_loss(out[:, 0], y.double(), out[:, 1].exp()),
        COUNTS,
        "output 0 is not what speaks for class 0",
    ),
    "ordinal": (Answer(2), _ordinal, KIND, "output 0 is not what speaks for class 0"),
    "pairs": (Answer(6), _contrastive, KIND % 2, "is not what speaks for class"),
    "an image": (
        Answer(12, lambda out: out.reshape(-1, 3, 2, 2)),
        nn.CrossEntropyLoss(),
        KIND[:, None, None].expand(N, 2, 2),
        r"outputs have shape \(30, 3, 2, 2\)",
    ),
    "several targets": (
        Answer(3),
        lambda out, y: F.cross_entropy(out, y["kind"]),
        {"kind": KIND},  # type: ignore[dict-item]
        "the targets are of type dict",
    ),
}


class Items(torch.utils.data.Dataset[Any]):
    def __init__(self, targets: Any) -> None:
        self.targets = targets

    def __len__(self) -> int:
        return N

    def __getitem__(self, i: int) -> Any:
        if isinstance(self.targets, dict):
            return X[i], {key: value[i] for key, value in self.targets.items()}
        return X[i], self.targets[i]


@pytest.mark.parametrize("name", NO_SCORES)
def test_a_prediction_to_flip_is_one_of_classes(name: str) -> None:
    model, loss, targets, why = NO_SCORES[name]
    problem = ptif.Problem(model, loss, Items(targets))
    with pytest.raises(
        InvalidInput, match=f"^flip_prediction.. needs a score for each class, and .*{why}.*; use small"
    ):
        flip_prediction(problem, torch.utils.data.Subset(Items(targets), [0]), most=2)


@pytest.mark.parametrize("name", ["two heads", "a share", "counts", "few counts", "ordinal", "pairs"])
def test_labels_in_doubt_are_those_of_classes(name: str) -> None:
    model, loss, targets, why = NO_SCORES[name]
    problem = ptif.Problem(model, loss, Items(targets))
    with pytest.raises(
        InvalidInput, match=f"^find_label_issues.. needs a score for each class, and .*{why}.*; give a pro"
    ):
        find_label_issues(problem, method="dual")


SCORES: dict[str, tuple[nn.Module, Any, Tensor]] = {
    "logits": (Answer(3), nn.CrossEntropyLoss(), KIND),
    "smoothed": (Answer(3), nn.CrossEntropyLoss(label_smoothing=0.2), KIND),
    "weighted": (Answer(3), nn.CrossEntropyLoss(weight=torch.tensor([1.0, 9.0, 0.1]).double()), KIND),
    "a class that does not count": (Answer(3), nn.CrossEntropyLoss(ignore_index=0), KIND),
    "log-probabilities": (Answer(3, lambda out: out.log_softmax(1)), nn.NLLLoss(), KIND),
    "probabilities": (Answer(3, lambda out: out.softmax(1)), lambda p, y: -p.gather(1, y[:, None]).log().mean(), KIND),
    "hinge": (Answer(3), nn.MultiMarginLoss(), KIND),
    "focal": (
        Answer(3),
        lambda out, y: ((1 - (nll := F.cross_entropy(out, y, reduction="none")).neg().exp()).square() * nll).mean(),
        KIND,
    ),
    "a margin of its own": (Answer(3), lambda out, y: F.cross_entropy(out - 0.5 * F.one_hot(y, 3), y), KIND),
    "soft labels": (Answer(3), nn.CrossEntropyLoss(), F.one_hot(KIND, 3) * 0.7 + 0.1),
    "many classes": (Answer(40), nn.CrossEntropyLoss(), KIND),
    "one logit": (Answer(1), nn.BCEWithLogitsLoss(), YES),
    "one logit, flat": (Answer(1, lambda out: out[:, 0]), nn.BCEWithLogitsLoss(), YES[:, 0]),
    "one probability": (Answer(1, Tensor.sigmoid), nn.BCELoss(), YES),
    "minus and plus one": (Answer(1), nn.SoftMarginLoss(), 2 * YES - 1),
    "a distribution": (Answer(3, lambda out: Categorical(logits=out)), lambda d, y: -d.log_prob(y).mean(), KIND),
    "two heads by name": (Heads(True), _of_both, KIND),
}


@pytest.mark.parametrize("name", SCORES)
def test_what_a_loss_reads_as_scores_is_taken_so(name: str) -> None:
    model, loss, targets = SCORES[name]
    problem = ptif.Problem(model, loss, Items(targets))
    outputs = problem.objective.outputs(model, (X, targets))
    check_class_scores(problem.objective, outputs, (X, targets))
    scores = class_scores(problem.objective, outputs)[0].detach()
    top = scores.topk(min(2, len(scores))).values
    margin = float(top[0] - top[1] if len(scores) > 1 else top[0].abs())
    flipped = flip_prediction(problem, torch.utils.data.Subset(Items(targets), [0]), most=2)
    assert flipped.before == pytest.approx(margin, rel=rounding(torch.float64))


def test_beside_scores_by_name_other_outputs_have_no_vote() -> None:
    named = Heads(True)
    alone = nn.Sequential(named.trunk, nn.Tanh(), named.kind)
    issues = find_label_issues(ptif.Problem(named, lambda out, y: F.cross_entropy(out["logits"], y), (X, KIND)), None)
    expected = find_label_issues(ptif.Problem(alone, nn.CrossEntropyLoss(), (X, KIND)), None)
    assert issues.predicted.tolist() == expected.predicted.tolist()
    assert gap(issues.probability, expected.probability) < rounding(torch.float64)
    assert gap(issues.votes, expected.votes) < rounding(torch.float64)


def test_certain_probabilities_of_one_class_alone_are_read_as_scores() -> None:
    """A loss of 1 / p has slopes of 10^12 beside its slopes of 1."""
    targets = torch.zeros(N, dtype=torch.int64)
    model = Answer(3, lambda out: (30 * F.one_hot(targets[: len(out)], 3) + 0.1 * out).softmax(1))
    loss, objective = _likelihood, ptif.Problem(model, _likelihood, Items(targets)).objective
    assert loss(model(X), targets) < 1e-9
    check_class_scores(objective, objective.outputs(model, (X, targets)), (X, targets))


def _likelihood(p: Tensor, y: Tensor) -> Tensor:
    return -p.gather(1, y[:, None]).log().mean()
