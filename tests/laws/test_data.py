"""Data: every example once, by its index in the dataset, whatever the loader would have done."""

from __future__ import annotations

import random
import time
import warnings
from collections import UserDict, namedtuple
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import (
    ConcatDataset,
    DataLoader,
    Dataset,
    IterableDataset,
    Subset,
    TensorDataset,
    default_collate,
)

from pytorch_influence_functions.core.batches import (
    batch_slice,
    example_tensors,
    tensors_of,
    to_device,
    with_example_tensors,
)
from pytorch_influence_functions.core.errors import InvalidInput, NonFinite, TrainingDataWarning
from pytorch_influence_functions.problem.cutting import same
from pytorch_influence_functions.problem.data import Source

X, Y = torch.arange(20.0).reshape(10, 2), torch.arange(10) % 3


class Items(Dataset[Any]):
    """A map-style dataset that counts its readings."""

    def __init__(self, n: int = 10) -> None:
        self.n, self.read = n, list[int]()

    def __len__(self) -> int:
        return self.n

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        if index >= self.n:
            raise IndexError(index)
        self.read.append(index)
        return X[index], int(Y[index])


class Noisy(Items):
    """Random augmentation, by any of the global generators."""

    def __init__(self, draw: Any, only: int | None = None) -> None:
        super().__init__()
        self.draw, self.only = draw, only

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        x, y = super().__getitem__(index)
        return (x + self.draw(), y) if self.only in (None, index) else (x, y)


class Broken(Items):
    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        if index == 7:
            raise OSError("truncated file")
        return super().__getitem__(index)


class Stream(IterableDataset[Any]):
    def __iter__(self) -> Any:
        return iter([])


class NoLength(Dataset[Any]):
    def __getitem__(self, index: int) -> int:
        return index


class Columns:
    """A dataset of dictionaries that reads whole batches, as tabular libraries do."""

    features: ClassVar = {"label": namedtuple("ClassLabel", "names")(["cat", "dog"])}

    def __len__(self) -> int:
        return 10

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"x": X[index], "label": int(Y[index])}

    def __getitems__(self, ids: list[int]) -> list[dict[str, Any]]:
        return [self[i] for i in ids]


def everything(source: Source, ids: Any = None) -> tuple[list[int], list[float], list[int]]:
    seen: list[int] = []
    xs: list[float] = []
    ys: list[int] = []
    for batch_ids, (x, y) in source.batches(ids):
        assert batch_ids.dtype == torch.long and len(batch_ids) == len(x) == len(y)
        seen += batch_ids.tolist()
        xs += x[:, 0].tolist()
        ys += y.tolist()
    return seen, xs, ys


EXPECTED = (list(range(10)), X[:, 0].tolist(), Y.tolist())


@pytest.mark.parametrize(
    "data",
    [
        (X, Y),
        [X, Y],
        (X.numpy(), Y.numpy()),
        (X, Y.tolist()),
        (X.numpy()[::-1][::-1], Y),
        TensorDataset(X, Y),
        Subset(TensorDataset(X.flip(0), Y.flip(0)), list(range(9, -1, -1))),
        Subset(Subset(TensorDataset(X, Y), [*range(10), 0]), range(10)),
        ConcatDataset([TensorDataset(X[:4], Y[:4]), TensorDataset(X[4:], Y[4:])]),
        Items(),
        [(x, int(y)) for x, y in zip(X, Y, strict=True)],
        DataLoader(Items(), batch_size=3, shuffle=True, drop_last=True),
        DataLoader(TensorDataset(X, Y), batch_sampler=[[3, 1], [2, 9, 0, 4], [5, 6, 7, 8]]),
    ],
    ids=lambda d: type(d).__name__,
)
@pytest.mark.parametrize("batch_size", [None, 4])
def test_every_example_once_in_dataset_order(data: Any, batch_size: int | None) -> None:
    source = Source.of(data, batch_size)
    assert len(source) == 10 and everything(source) == EXPECTED
    assert everything(source, [7, 2, 7]) == ([7, 2, 7], X[[7, 2, 7], 0].tolist(), Y[[7, 2, 7]].tolist())
    assert everything(source.subset(torch.tensor([5, 1]))) == (
        [0, 1],
        X[[5, 1], 0].tolist(),
        Y[[5, 1]].tolist(),
    )
    assert everything(source, slice(8, None))[0] == [8, 9]


def test_the_fast_path_gives_what_the_collate_function_gives() -> None:
    dataset = TensorDataset(X, Y, torch.rand(10, 2, 3) > 0.5)
    fast = list(Source.of(dataset, 4).batches())
    slow = list(Source.of(Subset(ConcatDataset([dataset]), range(10)), 4).batches())
    for (ids, a), (ids2, b) in zip(fast, slow, strict=True):
        assert torch.equal(ids, ids2) and type(a) is type(b) and same(a, b)


def test_mappings_of_tensors_and_batches_of_dictionaries() -> None:
    named = Source.of({"x": X, "label": Y.numpy()}, 4)
    tabular = Source.of(Columns(), 4)
    for (_, a), (_, b) in zip(named.batches(), tabular.batches(), strict=True):
        assert same(a, b)
    assert same(named.item(3), {"x": X[3], "label": Y[3]})


def test_a_loader_gives_collate_batch_size_and_workers() -> None:
    def collate(items: list[Any]) -> dict[str, Any]:
        x, y = default_collate(items)
        return {"x": 2 * x, "y": y}

    source = Source.of(DataLoader(Items(), batch_size=3, collate_fn=collate))
    sizes = [len(ids) for ids, _ in source.batches()]
    assert sizes == [3, 3, 3, 1]
    assert torch.equal(next(source.batches([4]))[1]["x"], 2 * X[[4]])


def test_workers_read_the_same() -> None:
    source = Source.of(DataLoader(Items(), batch_size=4, num_workers=2, shuffle=True))
    assert source.num_workers == 2 and everything(source) == EXPECTED


def test_a_given_source_is_kept() -> None:
    source = Source.of((X, Y), 4)
    assert Source.of(source) is source and Source.of(source, 3).batch_size == 3


def test_reading_leaves_the_global_generators_alone() -> None:
    before = torch.get_rng_state(), np.random.get_state()[1].tolist()
    everything(Source.of(DataLoader(Items(), shuffle=True)))
    assert torch.equal(torch.get_rng_state(), before[0]) and np.random.get_state()[1].tolist() == before[1]


def test_arrays_that_torch_cannot_share_are_copied() -> None:
    locked = X.numpy().copy()
    locked.flags.writeable = False
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert everything(Source.of((locked, Y.numpy().astype(">i8")))) == EXPECTED


def test_constructing_reads_nothing_and_item_reads_one() -> None:
    items = Items()
    source = Source.of(items)
    assert items.read == []
    assert source.item(3)[1] == 0 and items.read == [3]


# --------------------------------------------------------------------------- randomness in the data

DRAWS = [lambda: torch.rand(1), lambda: float(np.random.rand()), random.random]


@pytest.mark.parametrize("draw", DRAWS)
def test_random_augmentation_is_noticed_and_the_generators_put_back(draw: Any) -> None:
    source = Source.of(Noisy(draw))
    before = torch.get_rng_state(), np.random.get_state()[2]
    with pytest.warns(TrainingDataWarning, match="Item 0 of the dataset was read twice.*one random draw per pass"):
        source.check_deterministic("warn")
    assert torch.equal(torch.get_rng_state(), before[0]) and np.random.get_state()[2] == before[1]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        source.check_deterministic("warn")  # said once
        source.subset([1, 2]).check_deterministic("warn")
        source.check_deterministic("ignore")
    with pytest.raises(InvalidInput, match="came out different"):
        source.check_deterministic("error")
    with pytest.raises(InvalidInput, match="came out different"):
        source.check_deterministic("error")


def test_transforms_that_act_on_some_items_only_are_noticed() -> None:
    with pytest.raises(InvalidInput, match="Item 9 of the dataset"):
        Source.of(Noisy(random.random, only=9)).check_deterministic("error")


class Flipped(Items):
    """Turns an item over with a probability, and counts how often it was read; slowly, if asked."""

    def __init__(self, probability: float, seconds: float = 0.0) -> None:
        super().__init__()
        self.probability, self.seconds = probability, seconds

    def __len__(self) -> int:
        return 200

    def __getitem__(self, i: int) -> Any:
        if self.seconds:
            time.sleep(self.seconds)
        self.read.append(i)
        x = torch.arange(4.0) + i
        return x.flip(0) if random.random() < self.probability else x


def test_transforms_that_act_with_a_small_probability_are_noticed() -> None:
    """Two readings of an item differ in 2 p (1 - p) of all cases: of p = 0.1, 34 items miss 1 in 800."""
    for seed in range(20):
        for probability in (0.5, 0.1):
            random.seed(seed)
            with pytest.raises(InvalidInput, match="random transform"):
                Source.of(Flipped(probability)).check_deterministic("error")
    quick, slow = Flipped(0.0), Flipped(0.0, 0.02)
    for items in (quick, slow):
        Source.of(items).check_deterministic("error")
    assert len(quick.read) == 2 * len(set(quick.read)) >= 60
    assert slow.read == [0, 0, 100, 100, 199, 199], "no more than that where an item takes long"


def test_steady_data_pass() -> None:
    Source.of(Items()).check_deterministic("error")
    Source.of([(float("nan"), torch.tensor([float("nan")]), np.array([np.nan]))]).check_deterministic("error")


def test_unknown_policy() -> None:
    with pytest.raises(InvalidInput, match="deterministic='maybe' must be 'warn', 'error' or 'ignore'"):
        Source.of((X, Y)).check_deterministic("maybe")


class Opaque:
    def __init__(self, value: Any) -> None:
        self.value = value


@pytest.mark.parametrize(
    ("a", "b", "agree"),
    [
        (1, 1.0, False),
        (float("nan"), float("nan"), True),
        (torch.tensor([1.0, float("nan")]), torch.tensor([1.0, float("nan")]), True),
        (torch.tensor([1.0, float("nan")]), torch.tensor([float("nan"), 1.0]), False),
        (torch.ones(2), torch.ones(1), False),
        (torch.ones(2), torch.ones(2, dtype=torch.float64), False),
        (np.array([1, 2]), np.array([1, 2]), True),
        (np.array(["a"]), np.array(["b"]), False),
        ({"a": [1, "x"]}, {"a": [1, "x"]}, True),
        ({"a": 1}, {"b": 1}, False),
        ((1, 2), (1, 2, 3), False),
        (Opaque(torch.ones(2)), Opaque(torch.ones(2)), True),
        (Opaque(1), Opaque(2), False),
        (object(), object(), True),
    ],
)
def test_two_readings_compare_by_value(a: Any, b: Any, agree: bool) -> None:
    assert same(a, b) is agree


# --------------------------------------------------------------------------- nested batches

Pair = namedtuple("Pair", "x y")


class Encoding(UserDict):  # type: ignore[type-arg]
    """Like a tokenizer's output: a mapping that can move itself."""

    def to(self, device: Any) -> Encoding:
        return Encoding({k: v.to(device) for k, v in self.data.items()})


def test_nested_batches_move_whole() -> None:
    packed = nn.utils.rnn.pack_sequence([torch.ones(2), torch.ones(1)])
    batch = {"a": [X, (Y, "text")], "b": Pair(X, None), "c": Encoding({"x": X}), "e": UserDict({"x": X})}
    moved = to_device(batch, "meta")
    assert to_device([packed], "meta")[0].data.device.type == "meta"
    assert {t.device.type for _, t in tensors_of(moved)} == {"meta"}
    assert type(moved["b"]) is Pair and moved["a"][1][1] == "text"
    assert type(moved["c"]) is Encoding and type(moved["e"]) is UserDict
    assert [where for where, _ in tensors_of(batch)][:3] == ["['a'][0]", "['a'][1][0]", "['b'][0]"]


def test_a_batch_is_sliced_by_example() -> None:
    table = torch.zeros(3, 3)
    part = batch_slice({"x": [X, Y], "table": table, "scale": torch.tensor(1.0), "n": 10}, 10, slice(2, 4))
    assert torch.equal(part["x"][0], X[2:4]) and torch.equal(part["x"][1], Y[2:4])
    assert part["table"] is table and part["scale"].ndim == 0 and part["n"] == 10
    picked = batch_slice(Pair(X, Y), 10, torch.tensor([3, 1]))
    assert type(picked) is Pair and torch.equal(picked.y, Y[[3, 1]])


def test_tensors_of_examples_are_taken_out_and_put_back_in_one_order() -> None:
    batch = {"b": [X, (torch.tensor(2.0), Y)], "a": Encoding({"x": X + 1, "table": torch.zeros(3, 3)})}
    tensors = example_tensors(batch, len(X))
    assert [t.data_ptr() for t in tensors][:2] == [X.data_ptr(), Y.data_ptr()] and len(tensors) == 3
    doubled = with_example_tensors(batch, len(X), [2 * t for t in tensors])
    assert torch.equal(doubled["b"][0], 2 * X) and torch.equal(doubled["b"][1][1], 2 * Y)
    assert type(doubled["a"]) is Encoding and torch.equal(doubled["a"]["x"], 2 * X + 2)
    assert doubled["a"]["table"] is batch["a"]["table"] and float(doubled["b"][1][0]) == 2.0


# --------------------------------------------------------------------------- names and finiteness


def test_class_names_are_found_through_wrappers() -> None:
    named = Items()
    named.classes = ["a", "b", "c"]  # type: ignore[attr-defined]
    assert Source.of(DataLoader(Subset(named, [0]))).class_names == ["a", "b", "c"]
    assert Source.of(ConcatDataset([named, Subset(named, [1])])).class_names == ["a", "b", "c"]
    assert Source.of(ConcatDataset([named, Items()])).class_names is None
    assert Source.of(Columns()).class_names == ["cat", "dog"]
    assert Source.of((X, Y)).class_names is None
    named.classes = [1, 2]  # type: ignore[attr-defined]
    assert Source.of(named).class_names is None


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_that_are_not_finite_are_named_by_dataset_index(value: float) -> None:
    x = X.clone()
    x[[3, 8]] = torch.tensor([1.0, value])
    source = Source.of((x, Y), 4)
    with pytest.raises(NonFinite, match=r"dataset index 8, 3 \(in batch\[0\]\)"):
        for ids, batch in source.batches([1, 8, 3]):
            source.check_finite(ids, batch)
    with pytest.raises(NonFinite, match="dataset index 6"):
        source.check_finite(torch.tensor([5, 6]), {"y": torch.tensor([0.0, value])})
    # A table that has no row per example, and whole numbers, are none of our business.
    source.check_finite(torch.tensor([5, 6]), [torch.full((3,), value), Y[:2], torch.tensor(value)])


# --------------------------------------------------------------------------- bad data


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: Source.of(Stream()), r"Stream can only be iterated.*list\(dataset\)"),
        (lambda: Source.of(DataLoader(Stream())), r"Stream can only be iterated.*list\(dataset\)"),
        (lambda: Source.of(x for x in [1]), "generator can only be iterated"),
        (lambda: Source.of(DataLoader(Items(), batch_size=None)), "DataLoader has batch_size=None"),
        (lambda: Source.of([]), "is empty"),
        (lambda: Source.of((X[:0], Y[:0])), "is empty"),
        (lambda: Source.of(NoLength()), "NoLength has no length"),
        (lambda: Source.of(3), "int cannot be used as data"),
        (lambda: Source.of("train.csv"), "str cannot be used as data"),
        (lambda: Source.of(nn.Sequential(nn.ReLU())), "Sequential cannot be used as data"),
        (lambda: Source.of((X, Y[:4])), r"different lengths \(0 has 10, 1 has 4\)"),
        (lambda: Source.of({"x": X, "y": Y[:4]}), r"different lengths \(x has 10, y has 4\)"),
        (
            lambda: Source.of({"train": Items(), "test": Items()}),
            "'train', 'test' is not a dataset; pass one split",
        ),
        (lambda: Source.of((np.array([{}, {}], dtype=object), Y[:2])), "Array 0 has dtype object"),
        (lambda: Source.of((np.array(["cat"] * 10), Y)), "Array 0 has dtype <U3"),
        (lambda: Source.of((X, torch.tensor(1))), "Array 1 is a single number"),
        (lambda: Source.of((X, Y), 0), "^batch_size=0 must be a whole number of at least 1"),
        (
            lambda: Source.of((X, Y)).plan([3, 10, -1]),
            "Index 10, -1 is outside the dataset, whose items are 0 to 9",
        ),
        (
            lambda: Source.of((X, Y)).plan(torch.tensor([0.5])),
            "Indices must be whole numbers, got torch.float32",
        ),
        (lambda: Source.of((X, Y)).item(10), "Index 10 is outside"),
        (lambda: Source.of((X, Y)).subset([]), "The subset is empty"),
        (
            lambda: list(Source.of(Broken()).batches()),
            "item 7 of the dataset failed with OSError: truncated file",
        ),
        (
            lambda: list(Source.of(DataLoader(Subset(Broken(), [1, 7]), num_workers=1)).batches()),
            "item 1 of the dataset failed with OSError: truncated file",
        ),
        (
            lambda: list(Source.of([(torch.ones(2), 0), (torch.ones(3), 0)]).batches()),
            "collate function failed on 2 examples with RuntimeError",
        ),
    ],
)
def test_bad_data_are_refused_in_words(make: Any, match: str) -> None:
    with pytest.raises(InvalidInput, match=match):
        make()
