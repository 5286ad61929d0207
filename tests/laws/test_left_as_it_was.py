"""Law: what a forward, or a loss, keeps on its module is afterwards what it was before: identity and content.

A model that writes to an attribute of every kind goes through the public calls, and is interrupted. What it kept inside
a transform of torch (a dead wrapper) would break its owner's next `copy.deepcopy`, and an attribute that was taken
away the next forward.
"""

from __future__ import annotations

import collections
import copy
import random
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import pytorch_influence_functions as ptif
from pytorch_influence_functions.problem.model_state import preserved


class Slotted:
    __slots__ = ("count", "last")

    def __init__(self) -> None:
        self.count = 0


class History(list[Any]):
    """A list of the user's own, with an attribute."""

    total = 0


class Keeping(nn.Module):
    """Writes to attributes of every kind that a module may have, and its outputs depend on none of them."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.act, self._private, self.mode, self.ratio = nn.Linear(4, 3), None, None, "a", 0.5
        self.state, self.pair, self.flags = (torch.zeros(2), [1]), None, frozenset({1})
        self.history, self.long, self.own = [1, [2]], list(range(2000)), History([1])
        self.cache, self.ordered, self.default = {"a": {"b": [1]}}, collections.OrderedDict(a=1, b=2), None
        self.default = collections.defaultdict(list, k=[1])
        self.queue, self.sizes, self.counter = collections.deque([1, 2], maxlen=2), {1}, collections.Counter("a")
        self.out, self.slotted, self.config = SimpleNamespace(logits=None), Slotted(), SimpleNamespace(gone=1)
        self.ema, self.big, self.array = torch.zeros(3), torch.zeros(3), np.zeros(3)
        self.generator, self.python, self.numpy = torch.Generator(), random.Random(0), np.random.default_rng(0)
        self.register_buffer("late", None)
        self.register_buffer("steps", torch.zeros(1))
        self.hidden = [nn.Sequential(nn.BatchNorm1d(3), nn.Identity())]
        self.removed = 1

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.layer(x)
        self.act = self._private = self.out.logits = self.slotted.last = out
        self.mode, self.ratio, self.pair, self.state = "b", 2, (out, out), (out, [2])
        self.history.append(out)
        self.history[1].append(out)
        self.long.append(1)
        self.own.append(out)
        self.own.total = 1
        self.cache["a"]["b"].append(out)
        self.ordered.move_to_end("a")
        self.default["new"].append(out)
        self.default["k"].append(out)
        self.queue.append(3)
        self.sizes.add(len(self.sizes) + 7)
        self.counter["b"] += 1
        self.slotted.count += 1
        self.config.__dict__.pop("gone", None)
        self.ema.add_(1)
        self.big.data = torch.ones(5)
        self.array += 1
        torch.rand(1, generator=self.generator)
        self.python.random()
        self.numpy.random()
        self.late = out.detach()
        self.steps += 1
        if not hasattr(self, "lazy"):
            self.register_buffer("lazy", torch.zeros(3))
            del self.removed
        inner: Any = self.hidden[0]
        inner[1].last = out
        inner[0].running_mean += 1
        self.new = out
        return out


def contents(value: Any, names: frozenset[str] = frozenset()) -> Any:
    """Identity and content of everything in a value, however deep."""
    kind = type(value)
    if isinstance(value, Tensor):
        return id(value), value.dtype, value.tolist()
    if isinstance(value, np.ndarray):
        return id(value), value.tolist()
    if isinstance(value, torch.Generator):
        return id(value), value.get_state().tolist()
    if isinstance(value, random.Random):
        return id(value), value.getstate()
    if isinstance(value, np.random.Generator):
        return id(value), str(value.bit_generator.state)
    if isinstance(value, dict):
        return id(value), [(key, contents(member)) for key, member in value.items()], contents_of_object(value)
    if isinstance(value, (list, tuple, collections.deque)):
        return id(value), [contents(member) for member in value], contents_of_object(value)
    if isinstance(value, (set, frozenset)):
        return id(value), sorted(map(id, value))
    return (kind, value) if kind in (int, float, str, bool) else (kind, id(value), contents_of_object(value))


def contents_of_object(value: Any) -> Any:
    slots = {name: getattr(value, name, "missing") for name in getattr(type(value), "__slots__", ())}
    members = vars(value) | slots if hasattr(value, "__dict__") else slots
    if isinstance(value, type) or (callable(value) and not isinstance(value, nn.Module)):
        return None
    return [(name, contents(members[name])) for name in sorted(members)]


N = 12


def data() -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    torch.manual_seed(0)
    x, y = torch.randn(N + 2, 4), torch.arange(N + 2) % 3
    return (x[:N], y[:N]), (x[N:], y[N:])


def problem_of(model: nn.Module, train: Any) -> ptif.Problem:
    return ptif.Problem(model, nn.CrossEntropyLoss(), train)


CALLS: dict[str, Callable[[nn.Module, Any, Any], Any]] = {
    **{
        str(method): lambda model, train, queries, method=method: (
            ptif.attribute(model, train, queries, nn.CrossEntropyLoss(), method=method).values
        )
        for method in ("grad_dot", "dual", "ekfac", "exact")
    },
    "attribute": lambda model, train, queries: ptif.attribute(model, train, queries).values,
    "label issues": lambda model, train, queries: ptif.find_label_issues(problem_of(model, train), method="ekfac").ids(
        3
    ),
    "what if": lambda model, train, queries: ptif.what_if(problem_of(model, train), remove=[1], method="dual").change(
        queries
    ),
}


@pytest.mark.parametrize("name", CALLS)
def test_what_a_forward_keeps_is_put_back(name: str) -> None:
    train, queries = data()
    model = Keeping()
    plain: Any = nn.Sequential(collections.OrderedDict(layer=model.layer))
    before, keys = contents(model), list(model.state_dict())
    values = CALLS[name](model, train, queries)
    assert contents(model) == before and list(model.state_dict()) == keys
    copy.deepcopy(model)
    torch.testing.assert_close(values, CALLS[name](plain, train, queries), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("at", [1, 3])
def test_what_an_interrupted_forward_keeps_is_put_back(at: int) -> None:
    class Torn(Keeping):
        calls = 0

        def forward(self, x: Tensor) -> Tensor:
            out = super().forward(x)
            Torn.calls += 1
            if Torn.calls == at:
                raise KeyboardInterrupt
            return out

    train, queries = data()
    model = Torn()
    before = contents(model)
    with pytest.raises(KeyboardInterrupt):
        ptif.attribute(model, train, queries, method="dual")
    assert contents(model) == before


def test_every_kind_of_attribute_is_written_to() -> None:
    """Else the law above could not fail."""
    model = Keeping()
    unlike = {"training", "hidden", "flags", "_parameters", "_modules", "_non_persistent_buffers_set"}
    hooks = {name for name in vars(model) if "hook" in name}
    before = {name: contents(value) for name, value in vars(model).items()}
    model(torch.randn(2, 4))
    same = {name for name, value in vars(model).items() if before.get(name) == contents(value)}
    assert same - hooks - unlike == set()
    assert before["hidden"] != contents(model.hidden)


class Watched(nn.Module):
    """A loss that keeps what it computed."""

    def __init__(self, weighted: bool) -> None:
        super().__init__()
        self.last, self.calls, self.history = None, 0, [0]
        self.register_buffer("ema", torch.zeros(1))
        if weighted:
            self.scale = nn.Parameter(torch.ones(3))

    def forward(self, outputs: Tensor, targets: Tensor) -> Tensor:
        if "scale" in self._parameters:
            outputs = outputs * self.scale
        self.last = loss = nn.functional.cross_entropy(outputs, targets)
        self.calls += 1
        self.history.append(loss)
        return loss


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("method", ["grad_dot", "dual"])
def test_what_a_loss_keeps_is_put_back(method: str, weighted: bool) -> None:
    train, queries = data()
    loss = Watched(weighted)
    before = contents(loss)
    ptif.attribute(nn.Linear(4, 3), train, queries, loss, method=method)
    assert contents(loss) == before
    copy.deepcopy(loss)


def test_parameters_and_modules_that_a_pass_adds_go_again() -> None:
    model: Any = nn.Linear(1, 1)
    model.register_parameter("free", None)
    before = contents(model)
    with preserved(model):
        model.free, model.more, model.added = nn.Parameter(torch.zeros(1)), nn.Parameter(torch.zeros(1)), nn.Identity()
    assert contents(model) == before


def test_what_other_threads_work_with_is_left_alone() -> None:
    import threading

    class Writer:
        def __init__(self) -> None:
            self.lock, self.events, self.count = threading.Lock(), [1], 0

    model: Any = nn.Linear(1, 1)
    model.writer = Writer()
    with preserved(model):
        model.writer.count = 1
    assert model.writer.count == 1
