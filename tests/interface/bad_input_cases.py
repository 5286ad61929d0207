"""Bad input, first half: the public doors with one thing wrong, rows about data, types and shapes, and their makers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset

import pytorch_influence_functions as ptif
from pytorch_influence_functions.core.errors import InvalidInput, NonFinite, UnknownName
from pytorch_influence_functions.curvature import Hessian

D, C, N = 4, 3, 12
_FIXED = torch.Generator().manual_seed(7)
X = torch.randn(N, D, generator=_FIXED)
Y = torch.arange(N) % C
R = torch.randn(N, 1, generator=_FIXED)
NAN, INF = float("nan"), float("inf")
CE = nn.CrossEntropyLoss()
GGN, HESSIAN = ptif.curvature.GGN(), Hessian()


# --------------------------------------------------------------------------- models


def net() -> nn.Module:
    return nn.Sequential(nn.Linear(D, 5), nn.Tanh(), nn.Linear(5, C))


def single() -> nn.Module:
    return nn.Linear(D, 1)


class Through(nn.Module):
    """A network whose outputs go through a function."""

    def __init__(self, function: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.net = net()
        self.function = function

    def forward(self, x: Tensor) -> Any:
        return self.function(self.net(x))


class Words(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(5, 4)
        self.head = nn.Linear(4, C)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.table(x))
        return out


class Both(nn.Module):
    """Takes ids and numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.words = Words()
        self.net = net()

    def forward(self, ids: Tensor, x: Tensor) -> Any:
        return self.words(ids) + self.net(x)


class Counter(nn.Module):
    """Has a parameter of whole numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.net = net()
        self.seen = nn.Parameter(torch.ones(2, dtype=torch.long), requires_grad=False)

    def forward(self, x: Tensor) -> Any:
        return self.net(x)


class NoForward(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(2))


def through(function: Callable[[Tensor], Any]) -> Callable[[], nn.Module]:
    return lambda: Through(function)


def frozen() -> nn.Module:
    return net().requires_grad_(False)


def broken() -> nn.Module:
    model = net()
    with torch.no_grad():
        next(model.parameters())[0, 0] = NAN
    return model


def mixing() -> nn.Module:
    return nn.Sequential(nn.Linear(D, 5), nn.BatchNorm1d(5, track_running_stats=False), nn.Linear(5, C))


def lazy() -> nn.Module:
    return nn.Sequential(nn.LazyLinear(5), nn.Linear(5, C))


def with_idle() -> nn.Module:
    model = Through(lambda f: f)
    model.add_module("idle", nn.Linear(2, 2))
    return model


def picture(model: nn.Module) -> dict[str, Any]:
    """Everything of a model that an error may not change."""
    seen: dict[str, Any] = {}
    for name, module in model.named_modules():
        hooks = [v for k, v in vars(module).items() if "hooks" in k]
        seen[f"module {name}"] = (module.training, [list(h) for h in hooks])
    for name, p in [*model.named_parameters(), *model.named_buffers()]:
        known = not nn.parameter.is_lazy(p) and not p.is_meta
        seen[f"tensor {name}"] = (type(p), id(p), p.requires_grad, p.grad, p.tolist() if known else None)
    return seen


# --------------------------------------------------------------------------- data


def put(values: Tensor, index: Any, value: float) -> Tensor:
    made = values.clone()
    made[index] = value
    return made


class Items(Dataset[Any]):
    """A dataset of what a function of the index gives."""

    def __init__(self, function: Callable[[int], Any]) -> None:
        self.function = function

    def __len__(self) -> int:
        return N

    def __getitem__(self, index: int) -> Any:
        return self.function(index)


class Stream(IterableDataset[Any]):
    def __iter__(self) -> Iterator[Any]:
        return iter([(X[0], Y[0])])


class Endless(Dataset[Any]):
    def __getitem__(self, index: int) -> Any:
        return X[index], Y[index]


def torn(index: int) -> Any:
    if index == 7:
        raise OSError("file gone")
    return X[index], Y[index]


def ragged(index: int) -> Any:
    return torch.zeros(4 + (index == 3)), Y[index]


def noisy(index: int) -> Any:
    return X[index] + torch.randn(D), Y[index]


# --------------------------------------------------------------------------- losses


def as_float(f: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(f, y).item()  # type: ignore[return-value]


def of_argmax(f: Tensor, y: Tensor) -> Tensor:
    return (f.argmax(1) != y).to(f.dtype)


def detached(f: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(f.detach(), y)


def elementwise(f: Tensor, y: Tensor) -> Tensor:
    return (f - F.one_hot(y, C)) ** 2


def of_batch(f: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(f, y) * len(f) ** 2


def absolute(f: Tensor, y: Tensor) -> Tensor:
    return (f - F.one_hot(y, C)).abs().mean()


def infinite_for_class_2(f: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(f, y, reduction="none") / (y != 2).to(f.dtype)


def infinite(f: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(f, y) / 0


# --------------------------------------------------------------------------- the doors


def ask(model: nn.Module, **changes: Any) -> Any:
    """`attribute` with everything right, but for `changes`."""
    given: dict[str, Any] = {"train": (X, Y), "queries": (X[:2], Y[:2]), "loss": CE} | changes
    return ptif.attribute(model, given.pop("train"), given.pop("queries"), **given)


def put_in(**changes: Any) -> Callable[[nn.Module], Any]:
    return lambda model: ask(model, **changes)


def costs(**changes: Any) -> Callable[[nn.Module], Any]:
    """The forecast of the same."""
    return lambda model: ptif.forecast(model, (X, Y), (X[:2], Y[:2]), **({"loss": CE} | changes))


def real(**changes: Any) -> Callable[[nn.Module], Any]:
    """The same for regression."""
    given: dict[str, Any] = {"train": (X, R), "queries": (X[:2], R[:2]), "loss": nn.MSELoss()}
    return put_in(**(given | changes))


def fitted(model: nn.Module, **changes: Any) -> ptif.Attribution:
    return ptif.Influence(**changes).fit(ptif.Problem(model, CE, (X, Y)))


def state(model: nn.Module, **changes: Tensor | None) -> dict[str, Tensor]:
    """The model's state dict, with tensors replaced or (None) left out; `__` stands for a dot."""
    found: dict[str, Any] = model.state_dict() | {k.replace("__", "."): v for k, v in changes.items()}
    return {k: v for k, v in found.items() if v is not None}


_SCALE = nn.Parameter(torch.ones(C))


def weighed(f: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(f * _SCALE, y)


class Weighing(nn.Module):
    """A loss with a weight of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(C))

    def forward(self, f: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(f * self.weight, y)


def masking(items: list[Any]) -> tuple[Tensor, Tensor]:
    x = torch.stack([x for x, _ in items])
    return x * (torch.rand_like(x) > 0.5), torch.stack([y for _, y in items])


def less_their_mean(items: list[Any]) -> tuple[Tensor, Tensor]:
    x = torch.stack([x for x, _ in items])
    return x - x.mean(0), torch.stack([y for _, y in items])


class Row(NamedTuple):
    name: str
    call: Callable[[Any], Any]
    error: type[Exception]
    match: str
    model: Callable[[], Any] = net


INPUT, NAMED, INFINITE = InvalidInput, UnknownName, NonFinite

DATA = [
    Row("empty", put_in(train=(X[:0], Y[:0])), INPUT, r"^The dataset \(TensorDataset\) is empty; at least one"),
    Row("no queries", put_in(queries=(X[:0], Y[:0])), INPUT, r"^In the queries, the dataset .* is empty; at least one"),
    Row(
        "one example",
        put_in(train=(X[:1], Y[:1])),
        INPUT,
        r"hold 1 example, expected at least 2: removing the only one",
    ),
    Row("lengths", put_in(train=(X, Y[:-1])), INPUT, r"different lengths \(0 has 12, 1 has 11\)"),
    Row("lengths by name", put_in(train={"x": X, "labels": Y[1:]}), INPUT, r"\(x has 12, labels has 11\)"),
    Row("a single number", put_in(train=(torch.tensor(1.0), Y)), INPUT, r"Array 0 is a single number; expected one"),
    Row("one query bare", put_in(queries=(X[0], Y[0])), INPUT, r"In the queries, array 1 is a single number"),
    Row("text", put_in(train="train.csv"), INPUT, r"^str cannot be used as data; expected a Dataset, a DataLoader"),
    Row("nothing", put_in(train=None), INPUT, r"^attribute\(\) of a model needs train="),
    Row("nothing asked", put_in(queries=None), INPUT, r"attribute\(\) of a model needs queries="),
    Row("strings", put_in(train=np.array(["a", "b"])), INPUT, r"dtype <U1, which is not numeric; convert it"),
    Row("iterable", put_in(train=Stream()), INPUT, r"^Stream can only be iterated.*list\(dataset\)"),
    Row("iterable in a loader", put_in(train=DataLoader(Stream())), INPUT, r"^Stream can only be iterated"),
    Row("generator", put_in(train=(pair for pair in [])), INPUT, r"^generator can only be iterated"),
    Row(
        "loader without batches",
        put_in(train=DataLoader(TensorDataset(X, Y), batch_size=None)),
        INPUT,
        r"has batch_size=None.*make it with a batch_size, or pass its dataset",
    ),
    Row("no length", put_in(train=Endless()), INPUT, r"^Endless has no length; give it a __len__"),
    Row("item raises", put_in(train=Items(torn)), INPUT, r"Reading item 7 .* failed with OSError: file gone"),
    Row("query raises", put_in(queries=Items(torn)), INPUT, r"In the queries, reading item 7 .* file gone"),
    Row(
        "ragged",
        put_in(train=Items(ragged)),
        INPUT,
        r"collate function failed .*\[5\] at entry 3; give examples of one",
    ),
    Row(
        "augmented", put_in(train=Items(noisy), deterministic="error"), INPUT, r"^Item 0 .* read twice .* random transf"
    ),
    Row("policy", put_in(deterministic="eror"), INPUT, r"^deterministic='eror' must be 'warn', 'error' or 'ignore'"),
    Row("batch size 0", put_in(batch_size=0), INPUT, r"batch_size=0 must be a whole number of at least 1"),
    Row("batch size text", put_in(batch_size="8"), INPUT, r"batch_size='8' must be a whole number of at least 1"),
    Row("NaN", put_in(train=(put(X, 5, NAN), Y)), INFINITE, r"^The data hold NaN or infinity at dataset index 5 "),
    Row("infinity", put_in(train=(put(X, [5, 8], INF), Y)), INFINITE, r"at dataset index 5, 8 \(in batch\[0\]\); rep"),
    Row("NaN asked", put_in(queries=(put(X, 1, NAN), Y)), INFINITE, r"In the queries, the data hold NaN .* index 1 "),
    Row("NaN target", real(train=(X, put(R, 4, NAN))), INFINITE, r"dataset index 4 \(in batch\[1\]\)", single),
    Row("NaN, no loss", put_in(train=(put(X, 0, NAN), Y), loss=None), INFINITE, r"The data hold NaN .* index 0 "),
    Row(
        "data on meta",
        put_in(train=(X.to("meta"), Y)),
        INPUT,
        r"^Item 0 .* meta device \(in \[0\]\), which holds no val",
    ),
    Row("labels on meta", put_in(train=(X, Y.to("meta"))), INPUT, r"^Item 0 .* meta device \(in \[1\]\)"),
    Row(
        "batch on meta",
        put_in(train=(X.to("meta"), Y), deterministic="ignore"),
        INPUT,
        r"^The batch lies on the meta device",
    ),
]

TYPES_AND_SHAPES = [
    Row(
        "float64 data",
        put_in(train=(X.double(), Y)),
        INPUT,
        r"^The data are torch.float64 \(.*\(3, 4\)\) and the model's layer '0' \(Linear\) is torch.float32; convert "
        r"one of them: the data with \.float\(\) in the dataset .*, or the model with model\.double\(\)\.$",
    ),
    Row(
        "float64 model",
        put_in(),
        INPUT,
        r"^The data are torch.float32 .* is torch.float64; .* data with \.double\(\) .*model\.float\(\)\.$",
        lambda: net().double(),
    ),
    Row("float64 query", put_in(queries=(X[:2].double(), Y[:2])), INPUT, r"In the queries, the data are torch.float64"),
    Row("float64, no loss", put_in(train=(X.double(), Y), loss=None), INPUT, r"^The data are torch.float64"),
    Row("half", put_in(train=(X.half(), Y)), INPUT, r"data are torch.float16 .*model\.half\(\)"),
    Row(
        "bytes",
        put_in(train=(X.byte(), Y)),
        INPUT,
        r"data are torch.uint8 .*; convert the data with \.float\(\) in the da",
    ),
    Row(
        "one of two",
        put_in(train=(Y, X.double(), Y)),
        INPUT,
        r"data are torch.float64 \(inputs of shape \(3,\), \(3, 4\)\) and the model's layer 'net.0' \(Linear\)",
        Both,
    ),
    Row("swapped", put_in(train=(Y, X)), INPUT, r"data are torch.int64 \(inputs of shape \(3,\)\)"),
    Row(
        "shape",
        put_in(train=(X[:, :3], Y)),
        INPUT,
        r"^The model failed at layer '0' \(Linear\) on inputs of shape \(3, 3\) \(RuntimeError: mat1 and mat2 .*; give",
    ),
    Row(
        "shape, no loss",
        put_in(train=(X[:, :3], Y), loss=None),
        INPUT,
        r"layer '0' \(Linear\) on inputs of shape \(12, 3\)",
    ),
    Row(
        "shape asked",
        put_in(queries=(X[:2, :3], Y[:2])),
        INPUT,
        r"In the queries, the model failed at layer '0' .*\(2, 3\)",
    ),
    Row(
        "two inputs",
        put_in(train=(X, X, Y)),
        INPUT,
        r"on inputs of shape \(3, 4\), \(3, 4\) .*used as model\(a, \.\.\.\)",
    ),
    Row(
        "keyword", put_in(train={"pixels": X, "labels": Y}), INPUT, r"\('pixels'\) are no arguments of forward, .* keys"
    ),
    Row("float ids", put_in(train=(X[:, 0], Y)), INPUT, r"layer 'table' \(Embedding\).* 0 to 4, .*\.long\(\)", Words),
    Row("ids out of range", put_in(train=(Y + 5, Y)), INPUT, r"layer 'table' .*IndexError.* 0 to 4, so check", Words),
    Row("no target", put_in(train=X), INPUT, r"^A batch of 1 member has no target; expected \(inputs, target\)"),
    Row("no target asked", put_in(queries=X), INPUT, r"In the queries, a batch of 1 member has no target"),
    Row("inputs only", put_in(train=Items(lambda i: X[i])), INPUT, r"A batch of type Tensor has no target"),
    Row("no labels key", put_in(train={"x": X, "y": Y}), INPUT, r"keys 'x', 'y' has no target; .* 'labels' or 'label'"),
    Row(
        "text labels",
        put_in(train=Items(lambda i: (X[i], "cat"))),
        INPUT,
        r"targets are of type tuple, expected a tensor",
    ),
    Row(
        "label too large",
        put_in(train=(X, put(Y, 5, C))),
        INPUT,
        r"^Label 3 at dataset index 5 is out of range.* 0\.\.2",
    ),
    Row("label negative", put_in(train=(X, put(Y, 5, -1))), INPUT, r"^Label -1 at dataset index 5 is out of range"),
    Row(
        "label asked", put_in(queries=(X, put(Y, 4, 9))), INPUT, r"In the queries, label 9 at dataset index 4 is out of"
    ),
    Row("label, no loss", put_in(train=(X, put(Y, 5, C)), loss=None), INPUT, r"^Label 3 at dataset index 5 is out of"),
    Row("float labels", put_in(train=(X, Y.float())), INPUT, r"must be integers, so convert them with \.long\(\)"),
    Row(
        "target shape", real(train=(X, X)), INPUT, r"targets of shape \(12, 4\) for outputs of shape \(12, 1\)", single
    ),
    Row(
        "class in yes or no",
        real(train=(X, Y[:, None].float()), loss=nn.BCEWithLogitsLoss()),
        INPUT,
        r"Target 2 at dataset indices 2, 5, 8, 11 is not from 0 to 1; .*recode",
        single,
    ),
]
