"""Nothing stale: whatever changes what code computes changes its fingerprint, and nothing else does."""

from __future__ import annotations

import enum
import functools
import os
import re
import subprocess
import sys
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import pytorch_influence_functions as ptif
from pytorch_influence_functions.core.digest import digest
from pytorch_influence_functions.core.errors import InvalidInput
from pytorch_influence_functions.core.fingerprint import Fingerprint, Probe
from pytorch_influence_functions.problem.data import Source
from pytorch_influence_functions.problem.ingredients import describe_model, digest_data
from pytorch_influence_functions.trajectory import Segment

# --------------------------------------------------------------------------- values

OTHER_VALUES: list[tuple[str, Any, Any]] = [
    ("int and float", 1, 1.0),
    ("int and bool", 1, True),
    ("zero and minus zero", 0.0, -0.0),
    ("zero and minus zero in a tensor", torch.tensor([0.0]), torch.tensor([-0.0])),
    ("text and bytes", "a", b"a"),
    ("list and tuple", [1], (1,)),
    ("set and list", {1}, [1]),
    ("what is in which list", [[1], 2], [[1, 2]]),
    ("neighbouring texts", ["ab", "c"], ["a", "bc"]),
    ("order of a list", [1, 2], [2, 1]),
    ("a key", {"a": 1}, {"b": 1}),
    ("a value", {"a": 1}, {"a": 2}),
    ("dtype", torch.zeros(2), torch.zeros(2, dtype=torch.float64)),
    ("shape", torch.zeros(2, 3), torch.zeros(3, 2)),
    ("one bit", torch.zeros(3), torch.tensor([0.0, 0.0, 1e-45])),
    ("tensor and array", torch.zeros(2), np.zeros(2, np.float32)),
    ("bfloat16", torch.ones(2, dtype=torch.bfloat16), torch.full((2,), 2.0, dtype=torch.bfloat16)),
    ("sparse values", torch.eye(2).to_sparse(), (2 * torch.eye(2)).to_sparse()),
    ("array of words", np.array(["a"]), np.array(["b"])),
    ("array of objects", np.array([None, "a"], object), np.array([None, "b"], object)),
    ("a module's buffer", nn.BatchNorm1d(2), nn.BatchNorm1d(3)),
    ("a setting of torch's loss", nn.HuberLoss(delta=1.0), nn.HuberLoss(delta=2.0)),
    ("a setting of an objective", ptif.CrossEntropy(label_smoothing=0.1), ptif.CrossEntropy()),
    ("a method", ptif.ekfac(), ptif.dual()),
    ("a damping", ptif.ekfac(damping=0.1), ptif.ekfac(damping=0.2)),
    ("functions of torch", torch.nn.functional.l1_loss, torch.nn.functional.smooth_l1_loss),
    ("ufuncs", np.add, np.multiply),
    ("patterns", re.compile("a"), re.compile("b")),
    ("random states", np.random.default_rng(0), np.random.default_rng(1)),
]


@pytest.mark.parametrize(("one", "other"), [pair[1:] for pair in OTHER_VALUES], ids=[pair[0] for pair in OTHER_VALUES])
def test_no_two_different_values_read_alike(one: Any, other: Any) -> None:
    assert digest(one) == digest(one) and digest(one) != digest(other)


def test_the_order_of_keys_does_not_count() -> None:
    model = nn.Linear(2, 3)
    state = model.state_dict()
    assert digest(state) == digest(dict(reversed(list(state.items())))) == digest(OrderedDict(state))
    assert digest({"a", "b", "c"}) == digest({"c", "b", "a"})


def test_where_numbers_lie_does_not_count() -> None:
    x = torch.arange(6.0).reshape(2, 3)
    assert digest(x) == digest(x.T.contiguous().T) == digest(torch.cat([x, x])[:2])
    assert digest(np.arange(6)) == digest(np.arange(12)[::2] // 2)


def test_a_list_that_holds_itself_has_a_digest() -> None:
    one: list[Any] = [1]
    one.append(one)
    other: list[Any] = [2]
    other.append(other)
    assert digest(one) != digest(other)


def test_what_nests_too_deeply_is_refused_in_a_sentence() -> None:
    deep: list[Any] = []
    for _ in range(5000):
        deep = [deep]
    with pytest.raises(InvalidInput, match=r"objects inside objects too deeply .*; keep such a structure out of it"):
        digest(deep)


# --------------------------------------------------------------------------- code

CODE = """
import functools
import math
import torch
SCALE = 2.0
TABLE = {"a": [1, 2]}
class Tool:
    power = 2
    def __init__(self, shift): self.shift = shift
    def __call__(self, x): return self.use(x) + self.shift
    def use(self, x): return x ** self.power
class Finer(Tool):
    @property
    def more(self): return 3
    @staticmethod
    def least(): return 4
def helper(x):
    return x * SCALE
def decorated(x):
    return x + 1
decorated = torch.no_grad()(decorated)
def make(width):
    def inner(x): return x + width
    return inner
class Table(dict):
    def first(self): return self["one"]
class Decorator:
    def __init__(self, function, times):
        functools.update_wrapper(self, function)
        self.function, self.times = function, times
    def __call__(self, x): return self.times * self.function(x)
inner = make(5)
tool = Finer(7)
table = Table(one=1)
def cached(x): return x / 2
cached = functools.lru_cache(cached)
def repeated(x): return x * 5
repeated = Decorator(repeated, 2)
def f(x, k=3, *, m=None):
    total = sum(helper(i) for i in x if i > 0)
    again = lambda q: q + 1
    if TABLE["a"]:
        total = total + inner(k) + decorated(tool(x)) + Finer.least() + table.first() + cached(x) + repeated(x)
    return total + k + math.pi + again(x)
"""
EDITS = {
    "a constant": ("i > 0", "i > 1"),
    "an operator": ("x * SCALE", "x + SCALE"),
    "a global number": ("SCALE = 2.0", "SCALE = 2.5"),
    "a global table": ('"a": [1, 2]', '"a": [1, 3]'),
    "a helper's body": ("return x * SCALE", "return x * SCALE + 1"),
    "a default": ("k=3", "k=4"),
    "a keyword default": ("m=None", "m=0"),
    "a lambda inside": ("q + 1", "q + 2"),
    "a captured value": ("make(5)", "make(6)"),
    "the body of a closure": ("x + width", "x - width"),
    "below a decorator": ("return x + 1\n", "return x + 2\n"),
    "an attribute of a library": ("math.pi", "math.e"),
    "the state of an object": ("Finer(7)", "Finer(8)"),
    "a class attribute": ("power = 2", "power = 3"),
    "a method": ("x ** self.power", "x * self.power"),
    "a property": ("return 3", "return 5"),
    "a static method": ("return 4", "return 5"),
    "a base class": ("class Finer(Tool):", "class Finer(Tool, dict):"),
    "the method of a mapping": ('self["one"]', 'self["one"] + 1'),
    "an entry of a mapping with methods": ("Table(one=1)", "Table(one=2)"),
    "below a cache": ("return x / 2", "return x / 3"),
    "what a decorating object holds": ("Decorator(repeated, 2)", "Decorator(repeated, 3)"),
    "below a decorating object": ("return x * 5", "return x * 6"),
    "a condition": ("if TABLE", "if not TABLE"),
}
SAME = {
    "defined again": (CODE, CODE),
    "lines moved": ("def helper", "\n\n\n\ndef helper"),
    "a comment": ("    return total", "    # why\n    return total"),
    "a docstring": ("    total = sum", '    "What it does."\n    total = sum'),
    "a class's docstring": ("    power = 2", '    """A tool."""\n    power = 2'),
    "layout": ("return x * SCALE", "return (\n        x\n        * SCALE\n    )"),
    "something it does not use": ("TABLE =", "OTHER = 3\nTABLE ="),
    "an annotation": ("def helper(x):", "def helper(x: 'Tensor') -> 'Tensor':"),
}


def module(source: str) -> dict[str, Any]:
    """A module of the user's own, without a file."""
    names: dict[str, Any] = {"__name__": "my_losses"}
    exec(compile(source, "my_losses.py", "exec"), names)
    return names


@pytest.mark.parametrize("edit", EDITS.values(), ids=EDITS)
def test_an_edit_that_changes_what_is_computed_is_noticed(edit: tuple[str, str]) -> None:
    assert edit[0] in CODE
    assert digest(module(CODE)["f"]) != digest(module(CODE.replace(*edit))["f"])


@pytest.mark.parametrize("edit", SAME.values(), ids=SAME)
def test_an_edit_that_changes_nothing_does_not_count(edit: tuple[str, str]) -> None:
    assert edit[0] in CODE
    assert digest(module(CODE)["f"]) == digest(module(CODE.replace(*edit))["f"])


def test_a_function_defined_in_another_place_is_the_same() -> None:
    def outer() -> Any:
        return lambda x, y: (x - y).square().mean(1)

    class Holder:
        loss = staticmethod(lambda x, y: (x - y).square().mean(1))

    at_top = module("loss = lambda x, y: (x - y).square().mean(1)")["loss"]
    assert digest(at_top) == digest(outer()) == digest(Holder.loss)


def test_partials_methods_and_instances_count_by_what_they_hold() -> None:
    names = module(CODE)
    f, tool = names["f"], names["tool"]
    assert digest(functools.partial(f, k=1)) != digest(functools.partial(f, k=2))
    assert digest(tool.use) != digest(tool) != digest(names["Finer"](8))
    assert digest(names["Finer"](7)) == digest(tool)


def test_functions_that_call_each_other_have_a_digest() -> None:
    source = "def even(n): return n == 0 or odd(n - 1)\ndef odd(n): return n != 0 and even(n - 1)\n"
    one, again = module(source), module(source)
    other = module(source.replace("n != 0", "n != 1"))
    assert digest(one["even"]) == digest(again["even"]) != digest(other["even"])
    assert digest(one["even"]) != digest(one["odd"])


class Mode(enum.Enum):
    MEAN = "mean"
    SUM = "sum"


@dataclass
class Settings:
    mode: Mode = Mode.MEAN
    places: list[int] = field(default_factory=list)
    folder: str = field(default="", metadata={"fingerprint": False})


def test_a_dataclass_counts_by_its_fields_but_those_that_ask_not_to() -> None:
    assert digest(Settings()) == digest(Settings(folder="elsewhere")) != digest(Settings(Mode.SUM))
    assert digest(Settings(places=[1])) != digest(Settings())


def test_other_factors_folders_do_not_count() -> None:
    assert digest(ptif.ekfac(folder="a")) == digest(ptif.ekfac(folder="b")) != digest(ptif.ekfac(examples=3))


def test_a_checkpoint_counts_by_its_contents_and_not_by_its_path(tmp_path: Path) -> None:
    model = nn.Linear(2, 1)
    torch.save(model.state_dict(), tmp_path / "a.pt")
    torch.save(model.state_dict(), tmp_path / "b.pt")
    one, other = (Segment([tmp_path / name], lr=0.1, steps=10) for name in ("a.pt", "b.pt"))
    before = digest(one)
    assert before == digest(other)
    torch.save({k: v + 1 for k, v in model.state_dict().items()}, tmp_path / "a.pt")
    assert digest(one) != before


# --------------------------------------------------------------------------- modules of the user's own

LOSS_FILE = """
import inner_steps
from inner_steps import shift
def loss(o, t):
    return inner_steps.scale(o - t) + shift
"""
LATE_FILE = """
def loss(o, t):
    from inner_steps import scale
    return scale(o - t)
"""
WHOLE_FILE = """
import inner_steps
def run(steps, x):
    return steps.scale(x)
def loss(o, t):
    return run(inner_steps, o - t)
"""
STEPS_FILE = """
from deeper import power
shift = 0.5
def scale(x):
    return 2 * power(x)
def unused(x):
    return x
"""
DEEPER_FILE = "def power(x):\n    return x ** 2\n"


def imported(folder: Path, monkeypatch: pytest.MonkeyPatch, loss: str = LOSS_FILE, **edits: tuple[str, str]) -> Any:
    """The loss of a small package of the user's own, imported afresh after the edits."""
    files = {"my_loss": loss, "inner_steps": STEPS_FILE, "deeper": DEEPER_FILE}
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    monkeypatch.syspath_prepend(str(folder))
    for name, text in files.items():
        before, after = edits.get(name, ("", ""))
        assert before in text
        (folder / f"{name}.py").write_text(text.replace(before, after) if before else text)
        monkeypatch.delitem(sys.modules, name, raising=False)
    return __import__("my_loss").loss


@pytest.mark.parametrize(
    "edits",
    [
        {"inner_steps": ("2 * power", "3 * power")},
        {"inner_steps": ("shift = 0.5", "shift = 0.6")},
        {"deeper": ("x ** 2", "x ** 4")},
    ],
    ids=["what it calls", "a value it imports", "what that calls"],
)
def test_an_edited_module_that_the_loss_imports_is_noticed(
    edits: dict[str, tuple[str, str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = digest(imported(tmp_path, monkeypatch))
    assert digest(imported(tmp_path, monkeypatch)) == before
    assert digest(imported(tmp_path, monkeypatch, **edits)) != before


def test_an_import_inside_the_function_is_followed_before_it_ever_ran(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = digest(imported(tmp_path, monkeypatch, LATE_FILE))
    assert digest(imported(tmp_path, monkeypatch, LATE_FILE, deeper=("x ** 2", "x ** 4"))) != before


def test_a_module_that_is_handed_on_counts_as_a_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = digest(imported(tmp_path, monkeypatch, WHOLE_FILE))
    assert digest(imported(tmp_path, monkeypatch, WHOLE_FILE)) == before
    assert digest(imported(tmp_path, monkeypatch, WHOLE_FILE, deeper=("x ** 2", "x ** 4"))) != before


def test_another_part_of_an_imported_module_does_not_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = digest(imported(tmp_path, monkeypatch))
    edit = ("def unused(x):\n    return x", "def unused(x):\n    return 2 * x")
    assert digest(imported(tmp_path, monkeypatch, inner_steps=edit)) == before


@pytest.mark.slow
def test_every_process_finds_the_same_digest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_code.py").write_text(CODE + "\nWORDS = {'x', 'y', 'z'}\ndef g(x): return x in WORDS\n")
    values = "my_code.f, my_code.g, my_code.tool, my_code.Finer, torch.nn.ReLU(), my_code.WORDS"
    command = (
        f"import my_code, torch; from pytorch_influence_functions.core.digest import digest; print(digest({values}))"
    )
    path = os.pathsep.join([str(tmp_path), *sys.path])
    # The order of a set is another one in every process, and so is every address.
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "PYTHONHASHSEED": "7"}
    run = subprocess.run([sys.executable, "-B", "-c", command], env=environment, capture_output=True, text=True)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    names = {"my_code": __import__("my_code"), "torch": torch, "digest": digest}
    assert run.stdout.strip() == eval(f"digest({values})", names), run.stderr


# --------------------------------------------------------------------------- data


def test_the_batch_size_does_not_change_the_digest_of_data() -> None:
    x, y = torch.randn(11, 3), torch.arange(11)
    texts = [(f"text {i}", i) for i in range(11)]
    for data in ((x, y), {"x": x, "labels": y}, [(x[i], int(y[i])) for i in range(11)], texts):
        assert len({digest_data(Source.of(data, batch_size=size)) for size in (1, 2, 4, 64)}) == 1


@pytest.mark.parametrize(
    "change",
    [
        lambda x, y: (x.index_fill(0, torch.tensor([7]), 0.5), y),
        lambda x, y: (x, y.index_fill(0, torch.tensor([7]), 0)),
        lambda x, y: (x.double(), y),
        lambda x, y: (x.reshape(11, 3, 1), y),
        lambda x, y: (x[:10], y[:10]),
        lambda x, y: (x.flip(0), y.flip(0)),
    ],
    ids=["an input", "a label", "dtype", "shape", "fewer", "order"],
)
def test_changed_data_have_another_digest(change: Any) -> None:
    x, y = torch.randn(11, 3), torch.arange(11)
    assert digest_data(Source.of((x, y))) != digest_data(Source.of(change(x, y)))


class Noisy(torch.utils.data.Dataset[Any]):
    """A random augmentation."""

    reads = 0

    def __len__(self) -> int:
        return 9

    def __getitem__(self, i: int) -> Any:
        type(self).reads += 1
        return torch.full((2,), float(i)) + torch.randn(2), i % 2


def test_data_are_read_once_but_for_the_first_and_random_transforms_draw_alike() -> None:
    source = Source.of(Noisy(), batch_size=4)
    Noisy.reads = 0
    before = torch.get_rng_state()
    first = digest_data(source)
    assert Noisy.reads == 10 and torch.equal(before, torch.get_rng_state())
    torch.manual_seed(5)
    assert digest_data(source) == first


# --------------------------------------------------------------------------- the model


class Net(nn.Module):
    """A model whose behaviour hangs on plain attributes, which no state dict shows."""

    def __init__(self, act: Callable[[Tensor], Tensor] = torch.tanh, stop: bool = False, scale: float = 1.0) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.a, self.b = nn.Linear(6, 8).double(), nn.Linear(8, 2).double()
        self.act, self.stop, self.scale = act, stop, scale

    def forward(self, x: Tensor) -> Tensor:
        h = self.scale * self.act(self.a(x))
        return self.b(h.detach() if self.stop else h)  # type: ignore[no-any-return]


def points() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(30, 6, generator=generator).double(), torch.randn(30, 2, generator=generator).double()


def model_fingerprint(model: nn.Module, **settings: Any) -> Fingerprint:
    return Fingerprint.of(*describe_model(ptif.Problem(model, ptif.SquaredError(), points(), **settings)))


def moved(model: nn.Module) -> nn.Module:
    with torch.no_grad():
        model.a.weight[0, 0] += 1e-12  # type: ignore[index,union-attr]
    return model


@pytest.mark.parametrize(
    ("other", "name"),
    [
        (lambda: moved(Net()), "weights"),
        (lambda: Net(torch.relu), "model outputs"),
        (lambda: Net(scale=1.001), "model outputs"),
        (lambda: Net(stop=True), "model outputs"),
        (lambda: nn.Sequential(OrderedDict(a=Net().a, t=nn.Tanh(), b=Net().b)), "model code"),
    ],
    ids=["weights", "another activation", "a setting", "a gradient that is stopped", "another class"],
)
def test_another_model_is_noticed_and_named(other: Any, name: str) -> None:
    assert model_fingerprint(Net()).differences(model_fingerprint(Net())) == ()
    assert model_fingerprint(other()).differences(model_fingerprint(Net())) == (name,)


def test_an_edited_forward_is_noticed_even_where_no_probe_reaches_it(monkeypatch: pytest.MonkeyPatch) -> None:
    before = model_fingerprint(Net())

    def forward(self: Net, x: Tensor) -> Tensor:
        h = self.scale * self.act(self.a(x))
        return self.b(h.detach() if self.stop else h) * (2.0 if float(x.abs().max()) > 1e6 else 1.0)  # type: ignore[no-any-return]

    monkeypatch.setattr(Net, "forward", forward)
    assert model_fingerprint(Net()).differences(before) == ("model code",)


def test_every_checkpoint_counts() -> None:
    states = [Net().state_dict(), {k: v * 0.9 for k, v in Net().state_dict().items()}]
    before = model_fingerprint(Net(), checkpoints=states)
    states[1] = {k: v * 0.8 for k, v in Net().state_dict().items()}
    assert model_fingerprint(Net(), checkpoints=states).differences(before) == ("weights",)


def test_looking_at_the_model_leaves_no_trace() -> None:
    model = nn.Sequential(nn.Linear(6, 4), nn.BatchNorm1d(4), nn.Dropout(), nn.Linear(4, 2)).double().train()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    random_state = torch.get_rng_state()
    first, again = model_fingerprint(model), model_fingerprint(model)
    assert first.differences(again) == () and first.identity == again.identity
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert model.training and all(p.grad is None for p in model.parameters())
    assert torch.equal(random_state, torch.get_rng_state())


def test_rounding_of_another_run_does_not_count() -> None:
    numbers = [(0.3, 1.0), (1e-9, 1.0), (float("nan"), 1.0), (float("inf"), 1.0), (-5.0, 7.0)]
    probe = Probe.of(numbers, rtol=1e-4)
    assert probe.agrees(Probe.of([(v + 1e-6 * s, s) for v, s in numbers], rtol=1e-4))
    assert not probe.agrees(Probe.of([(v + 1e-3 * s, s) for v, s in numbers], rtol=1e-4))
    assert not probe.agrees(Probe.of(numbers[:-1], rtol=1e-4))
    assert not probe.agrees(Probe.of([(v, s) if s == 1 else (float("inf"), s) for v, s in numbers], rtol=1e-4))


def test_a_fingerprint_survives_json() -> None:
    import json

    fingerprint = model_fingerprint(Net())
    again = Fingerprint.from_dict(json.loads(json.dumps(fingerprint.to_dict())))
    assert again is not None and again.identity == fingerprint.identity and again.differences(fingerprint) == ()
    for broken in (None, [], {}, {"digests": 3, "probes": {}}, {"digests": {}, "probes": {"a": {"values": "x"}}}):
        assert Fingerprint.from_dict(broken) is None


def test_probes_are_named_only_where_no_digest_differs() -> None:
    def made(loss: int, output: float) -> Fingerprint:
        return Fingerprint.of({"loss": loss}, {"outputs": Probe.of([(output, 1.0)], 1e-6)})

    assert made(1, 0.5).differences(made(2, 0.7)) == ("loss",)
    assert made(1, 0.5).differences(made(1, 0.7)) == ("outputs",)
    assert made(1, 0.5).differences(made(2, 0.7), among=["outputs"]) == ("outputs",)
    assert made(1, 0.5).differences(Fingerprint({"loss": made(1, 0.5).digests["loss"]})) == ("version",)
