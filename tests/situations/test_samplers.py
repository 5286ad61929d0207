"""My loader has a sampler: only a part of the dataset was trained on, or examples are drawn with weights."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    DistributedSampler,
    RandomSampler,
    Sampler,
    SequentialSampler,
    Subset,
    SubsetRandomSampler,
    TensorDataset,
    WeightedRandomSampler,
)

import pytorch_influence_functions as ptif
from pytorch_influence_functions.core.errors import InvalidInput, NonFinite, TrainingDataWarning
from pytorch_influence_functions.problem.data import Source
from tests.tolerance import gap, rounding

N = 30
PART = [29, 3, 4, 17, 8, 11, 25, 2]
X, Y = torch.linspace(-3, 3, 3 * N).reshape(N, 3).sin(), torch.arange(N) % 2
DATA = TensorDataset(X, Y)


class Fixed(Sampler[int]):
    """The same part in every epoch, in an order of its own."""

    def __iter__(self) -> Iterator[int]:
        return iter(PART)

    def __len__(self) -> int:
        return len(PART)


class Fresh(Sampler[int]):
    """Another part in every epoch."""

    def __iter__(self) -> Iterator[int]:
        return iter(torch.randperm(N)[:8].tolist())


class Repeating(Sampler[int]):
    def __iter__(self) -> Iterator[int]:
        while True:
            yield 3


class Buckets(Sampler[list[int]]):
    """A batch sampler that visits everything, in batches of its own."""

    def __init__(self, part: list[int]) -> None:
        self.part = part

    def __iter__(self) -> Iterator[list[int]]:
        for start in range(0, len(self.part), 5):
            yield self.part[start : start + 5]


def loader(sampler: Any = None, **options: Any) -> DataLoader[Any]:
    return DataLoader(DATA, batch_size=4, sampler=sampler, **options)


class FirstOnly(SequentialSampler):
    """A class of one's own: its ancestor visits everything, it does not."""

    def __iter__(self) -> Iterator[int]:
        return iter(PART)


PARTS: dict[str, Callable[[], DataLoader[Any]]] = {
    "SubsetRandomSampler": lambda: loader(SubsetRandomSampler(PART)),
    "Fixed": lambda: loader(Fixed()),
    "in a BatchSampler": lambda: DataLoader(DATA, batch_sampler=BatchSampler(SubsetRandomSampler(PART), 4, False)),
    "batches": lambda: DataLoader(DATA, batch_sampler=Buckets(PART)),
    "subclass": lambda: loader(FirstOnly(DATA)),
}


@pytest.mark.parametrize("name", PARTS)
@pytest.mark.parametrize("top", [None, 2])
def test_a_part_is_the_training_set_and_keeps_its_places(name: str, top: int | None) -> None:
    """Oracle: the part as a dataset of its own; its columns under the places in the whole."""
    model, ids = nn.Linear(3, 2), sorted(PART)
    scores = ptif.attribute(model, PARTS[name](), (X[:2], Y[:2]), method="exact", top=top)
    alone = ptif.attribute(model, Subset(DATA, ids), (X[:2], Y[:2]), method="exact", top=top)
    for q in range(2):
        ours, theirs = scores.helpful(q, 20), alone.helpful(q, 20)
        assert [i for i, _ in ours] == [ids[i] for i, _ in theirs]
        assert gap([s for _, s in ours], [s for _, s in theirs]) < rounding(torch.float32)
    assert scores.n_train == N and scores.diagnostics.n_train == len(PART)
    assert scores.train_labels == [int(Y[i]) if i in PART else None for i in range(N)]
    assert scores.train_source.item(29)[1] == Y[29]
    assert "8 of 30 examples" in str(scores.diagnostics)


def test_examples_never_trained_on_have_no_self_influence() -> None:
    problem = ptif.Problem(nn.Linear(3, 2), nn.CrossEntropyLoss(), loader(SubsetRandomSampler(PART)))
    own = ptif.exact().fit(problem).self_influence()
    alone = ptif.exact().fit(problem.with_(data=Subset(DATA, sorted(PART)))).self_influence()
    assert own.shape == (N,) and own.nonzero().flatten().tolist() == sorted(PART)
    assert gap(own[sorted(PART)], alone) < rounding(torch.float64)


def test_queries_of_a_sampler_keep_their_places() -> None:
    scores = ptif.attribute(nn.Linear(3, 2), DATA, loader(SubsetRandomSampler([9, 4])), method="grad_dot")
    assert scores.query_ids.tolist() == [4, 9] and scores.query_labels == [0, 1]
    plain = ptif.attribute(nn.Linear(3, 2), DATA, (X[[4, 9]], Y[[4, 9]]), method="grad_dot")
    assert plain.shape == scores.shape


def test_messages_name_places_in_the_dataset() -> None:
    x = X.clone()
    x[17] = torch.nan
    bad = DataLoader(TensorDataset(x, Y), sampler=SubsetRandomSampler(PART))
    with pytest.raises(NonFinite, match="dataset index 17"):
        ptif.attribute(nn.Linear(3, 2), bad, DATA, method="grad_dot")
    fine = Source.of(DataLoader(TensorDataset(x, Y), sampler=SubsetRandomSampler([3, 4])))
    assert fine.index_of(4) == 1
    with pytest.raises(InvalidInput, match="Example 17 is not among those that the loader's sampler draws"):
        fine.index_of(17)


WHOLE: dict[str, Callable[[], DataLoader[Any]]] = {
    "shuffled": lambda: loader(shuffle=True, drop_last=True),
    "in order": lambda: loader(SequentialSampler(DATA)),
    "shared": lambda: loader(DistributedSampler(DATA, num_replicas=2, rank=0)),
    "subset of all": lambda: loader(SubsetRandomSampler(range(N))),
    "buckets": lambda: DataLoader(DATA, batch_sampler=Buckets(list(range(N))[::-1])),
}


@pytest.mark.parametrize("name", WHOLE)
def test_samplers_that_visit_everything_say_nothing(name: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        source = Source.of(WHOLE[name]())
    assert source.positions is None and len(source) == N and source.reading == "" and source.whole is source


UNCLEAR: dict[str, tuple[Callable[[], DataLoader[Any]], str]] = {
    "replacement": (lambda: loader(RandomSampler(DATA, replacement=True)), "RandomSampler, which draws .* with repl"),
    "fewer": (lambda: loader(RandomSampler(DATA, num_samples=8)), "RandomSampler, whose examples differ"),
    "fresh": (lambda: loader(Fresh()), "Fresh, whose examples differ from epoch to epoch or never end"),
    "endless": (lambda: loader(Repeating()), "Repeating, whose examples differ"),
}


@pytest.mark.parametrize("name", UNCLEAR)
def test_unclear_samplers_are_named_once_and_in_the_diagnostics(name: str) -> None:
    make, message = UNCLEAR[name]
    data = make()
    with pytest.warns(TrainingDataWarning, match=f"sampler is {message}.*Subset\\(dataset, indices\\)") as caught:
        scores = ptif.attribute(nn.Linear(3, 2), data, (X[:2], Y[:2]), loss=nn.CrossEntropyLoss(), method="grad_dot")
    assert len(caught) == 1 and scores.shape == (2, N)
    assert "[warn] data" in str(scores.diagnostics) and "all 30 examples, each once" in str(scores.diagnostics)


def test_samplers_of_another_length_than_the_dataset_are_a_part() -> None:
    for sampler in (SequentialSampler(range(8)), RandomSampler(range(8))):
        source = Source.of(loader(sampler))
        assert source.positions is not None and source.positions.tolist() == list(range(8))


def test_repeated_examples_count_once_and_what_is_never_drawn_is_left_out() -> None:
    with pytest.warns(TrainingDataWarning, match="SubsetRandomSampler draws some examples more than once; each counts"):
        source = Source.of(loader(SubsetRandomSampler([7, 7, 2])))
    assert source.positions is not None and source.positions.tolist() == [2, 7]
    assert source.reading == "2 of 30 examples, those of SubsetRandomSampler, each once although it repeats some"


def test_asking_a_sampler_leaves_all_generators_alone() -> None:
    own = torch.Generator().manual_seed(3)
    sampler = SubsetRandomSampler(PART, generator=own)
    before = own.get_state(), torch.get_rng_state()
    Source.of(loader(sampler))
    assert torch.equal(own.get_state(), before[0]) and torch.equal(torch.get_rng_state(), before[1])


def test_weights_are_refused_and_a_loss_with_weights_is_right() -> None:
    """The advice: sampling with weights w minimises the loss weighted by w, so gradients are those times w."""
    weights = torch.tensor([1.0, 3.0])
    sampler = WeightedRandomSampler(weights[Y].tolist(), N)
    with pytest.raises(InvalidInput, match=r"with weights \(WeightedRandomSampler\).*loader\.dataset.*weight=\.\.\."):
        ptif.attribute(nn.Linear(3, 2), loader(sampler), DATA)
    with pytest.raises(InvalidInput, match=r"In the queries, the DataLoader draws examples with weights"):
        ptif.attribute(nn.Linear(3, 2), DATA, loader(sampler))
    model = nn.Linear(3, 2)
    loss = ptif.CrossEntropy(weight=weights)
    weighted = ptif.attribute(model, loader(sampler).dataset, DATA, loss=loss, measure=ptif.Margin(), method="grad_dot")
    plain = ptif.attribute(model, DATA, DATA, loss=ptif.CrossEntropy(), measure=ptif.Margin(), method="grad_dot")
    assert gap(weighted.values, plain.values * weights[Y]) < rounding(torch.float32)


def test_a_sampler_that_draws_nothing_is_refused() -> None:
    with pytest.raises(InvalidInput, match="sampler SubsetRandomSampler draws no example"):
        Source.of(loader(SubsetRandomSampler([])))


def test_verification_of_a_part_says_how_and_that_works() -> None:
    model = nn.Linear(3, 2)
    scores = ptif.attribute(model, loader(SubsetRandomSampler(PART)), DATA, method="grad_dot")
    with pytest.raises(InvalidInput, match=r"a loader's sampler.*torch\.utils\.data\.Subset\(dataset, indices\)"):
        scores.verify(lambda data, seed: model, measure=nn.CrossEntropyLoss())


def fit_least_squares(dataset: Any, seed: int) -> nn.Module:
    """The minimum of the squared error, in closed form; the seed changes nothing."""
    x = torch.stack([dataset[i][0] for i in range(len(dataset))])
    y = torch.stack([dataset[i][1] for i in range(len(dataset))])
    model = nn.Linear(3, 1)
    with torch.no_grad():
        solution = torch.linalg.lstsq(torch.cat([x, torch.ones(len(x), 1)], 1), y[:, None]).solution[:, 0]
        model.weight.copy_(solution[None, :3])
        model.bias.copy_(solution[3:])
    return model


def test_verification_measures_the_queries_that_a_sampler_chose() -> None:
    """Rows are queries 4 and 9 of the dataset, not 0 and 1."""
    x = torch.randn(N, 3)
    data = TensorDataset(x, x @ torch.tensor([1.0, -1.0, 0.5]) + torch.randn(N))
    queries = DataLoader(data, sampler=SubsetRandomSampler([9, 4]))
    scores = ptif.attribute(fit_least_squares(data, 0), data, queries, loss=nn.MSELoss(), method="exact")
    verdict = scores.verify(fit_least_squares, n=6, size=1, measure=nn.MSELoss(), seeds=1)
    for removal in verdict.removals:
        kept = [i for i in range(N) if i not in removal.ids]
        x, y = data[removal.query]
        before, after = (
            float((fit_least_squares(part, 0)(x) - y).detach().square()) for part in (data, Subset(data, kept))
        )
        assert removal.query in (4, 9) and removal.actual == pytest.approx(after - before, rel=1e-3, abs=1e-4)


def test_the_loss_that_was_taken_is_named() -> None:
    inferred = ptif.attribute(nn.Linear(3, 2), DATA, (X[:2], Y[:2]), method="grad_dot").diagnostics
    assert "CrossEntropy() (inferred from outputs and targets)" in str(inferred)
    named = ptif.attribute(nn.Linear(3, 2), DATA, (X[:2], Y[:2]), loss=nn.CrossEntropyLoss(), method="grad_dot")
    assert "CrossEntropy() (given)" in str(named.diagnostics)
    again = ptif.Diagnostics.from_dict(inferred.to_dict())
    assert again.objective == "CrossEntropy()" and again.inferred
