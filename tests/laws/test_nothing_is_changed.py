"""Law: whatever is called, and however it ends, nothing of the user's is changed, and wrapping changes no score.

Every public entry goes through models that are partly frozen or share weights and are wrapped, all of them in training
mode with gradients and hooks on them; and each is interrupted. `pictures.py` lists what is looked at.
"""

from __future__ import annotations

import functools
import inspect
import re
import tempfile
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.data import Dataset

import pytorch_influence_functions as ptif
from pytorch_influence_functions.core.errors import InfluenceError
from pytorch_influence_functions.core.functional import call_with
from tests.covering import FULL
from tests.laws.pictures import differences, picture
from tests.laws.test_training_mode import ENTRIES, ITERATIVE, OUTSIDE, RETRAINING, case, expected, in_use, settled

# --------------------------------------------------------------------------- situations


def frozen_backbone() -> nn.Module:
    model: Any = case("perceptron")[0]
    for layer in model[:2]:
        layer.requires_grad_(False).zero_grad()
    return model


def tied_weights() -> nn.Module:
    torch.manual_seed(0)
    first, second = nn.Linear(4, 4), nn.Linear(4, 4)
    second.weight = first.weight
    return in_use(nn.Sequential(first, nn.BatchNorm1d(4), nn.Tanh(), second, nn.Linear(4, 3)).double())


STATES: dict[str, Callable[[], nn.Module]] = {
    "whole": lambda: case("perceptron")[0],
    "frozen backbone": frozen_backbone,
    "tied weights": tied_weights,
}
WRAPPERS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "bare": lambda model: model,
    "compiled": lambda model: torch.compile(model, backend="eager"),  # type: ignore[dict-item, return-value]
    "DistributedDataParallel": nn.parallel.DistributedDataParallel,
    "DataParallel": nn.DataParallel,
}


@pytest.fixture(scope="module")
def one_process(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A process group of one, as `torchrun --nproc-per-node 1` makes it."""
    store = tmp_path_factory.mktemp("group") / "store"
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def rows() -> list[tuple[str, str, str]]:
    """(entry, state, wrapper): every entry with both states, each in another wrapper, in turn.

    Wrappers are taken off in one place before an entry looks at the states of the weights: which wrapper is around
    which state makes no difference to an entry, and each of the six pairs goes through a third of them. What takes
    seconds and goes the same way as another entry is asked once.
    """
    if FULL:
        return [(entry, state, wrapper) for entry in ENTRIES for state in STATES for wrapper in WRAPPERS]
    again, table = (*ITERATIVE, *RETRAINING, *OUTSIDE), []
    wrappers = [name for name in WRAPPERS if name != "bare"]
    for turn, entry in enumerate(ENTRIES):
        pairs = [("frozen backbone", wrappers[turn % 3]), ("tied weights", wrappers[(turn + 1) % 3])]
        table += [(entry, *pair) for pair in ([("whole", "compiled")] if entry in again else pairs)]
    return table


@functools.cache
def of_the_plain_model(entry: str, state: str) -> Any:
    if state == "whole":
        return expected(entry, "perceptron")
    _, train, queries = case("perceptron")
    with tempfile.TemporaryDirectory() as folder:
        return ENTRIES[entry](settled(STATES[state]()), train, queries, Path(folder))


@pytest.mark.slow
@pytest.mark.parametrize(("entry", "state", "wrapper"), rows())
@pytest.mark.usefixtures("one_process")
def test_scores_are_those_of_the_plain_model_and_nothing_is_changed(
    entry: str, state: str, wrapper: str, tmp_path: Path
) -> None:
    _, train, queries = case("perceptron")
    model = WRAPPERS[wrapper](STATES[state]())
    before = picture(model, train, queries)
    values = ENTRIES[entry](model, train, queries, tmp_path)
    assert differences(before, picture(model, train, queries)) == []
    torch.testing.assert_close(values, of_the_plain_model(entry, state))


class TwoNames(nn.Module):
    """A layer that stands under two names, as the embedding of T5 does, and shares its weight with a third."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.scale, self.last = nn.Linear(4, 4), nn.Parameter(torch.ones(4)), nn.Linear(4, 4)
        self.again = self.first
        self.last.weight = self.first.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.tanh(self.again(self.first(x) * self.scale)))[:, :3]


@pytest.mark.parametrize("method", ["grad_dot", "gauss_newton", "dual"])
def test_a_layer_under_two_names_stays_one_layer(method: str) -> None:
    """torch.func.functional_call leaves such a model untied."""
    model, (_, train, queries) = TwoNames().double(), case("perceptron")
    before = picture(model, train, queries)
    scores = ptif.attribute(model, train, queries, method=method)
    assert differences(before, picture(model, train, queries)) == []
    again = ptif.attribute(model, train, queries, method=method)
    torch.testing.assert_close(scores.values, again.values)
    if method == "grad_dot":
        rows = []
        for x, y in (train, queries):
            losses = nn.functional.cross_entropy(model(x), y, reduction="none")
            rows.append(
                [
                    torch.cat(
                        [g.flatten() for g in torch.autograd.grad(loss, list(model.parameters()), retain_graph=True)]
                    )
                    for loss in losses
                ]
            )
        expected = torch.stack(rows[1]) @ torch.stack(rows[0]).T / len(rows[0])
        torch.testing.assert_close(scores.values.double(), expected, rtol=1e-6, atol=1e-9)


def test_new_weights_are_taken_by_their_names_alone() -> None:
    model, x = TwoNames().double(), torch.randn(2, 4, dtype=torch.float64)
    new, bare = torch.eye(4, dtype=torch.float64), model.scale.detach()
    by_either = [call_with(model, {name: new}, (x,)) for name in ("first.weight", "last.weight")]
    torch.testing.assert_close(by_either[0], by_either[1])
    both = {"first.weight": new, "last.weight": new}
    torch.testing.assert_close(call_with(model, both, (x,)), by_either[0])
    with pytest.raises(ptif.errors.UnknownName, match=r"TwoNames has no parameter or buffer 'scales'.* mean 'scale'"):
        call_with(model, {"scales": bare}, (x,))
    with pytest.raises(ptif.errors.InvalidInput, match=r"'last.weight' is one weight with another that was given"):
        call_with(model, both | {"last.weight": 2 * new}, (x,))


# --------------------------------------------------------------------------- interruptions


class Alarm:
    """A hook of the user's that goes off at one of the model's forward passes."""

    def __init__(self, at: int | None = None, error: type[BaseException] = KeyboardInterrupt) -> None:
        self.at, self.error, self.passes = at, error, 0

    def __call__(self, *anything: Any) -> None:
        self.passes += 1
        if self.passes == self.at:
            raise self.error


@functools.cache
def passes_of(entry: str) -> int:
    """How often the entry runs the model."""
    model, train, queries = case("perceptron")
    alarm = Alarm()
    model.register_forward_pre_hook(alarm)
    with tempfile.TemporaryDirectory() as folder:
        ENTRIES[entry](model, train, queries, Path(folder))
    return alarm.passes


# Those of the command line end in an exit code, which their own tests look at.
INTERRUPTED = [entry for entry in ENTRIES if entry not in OUTSIDE]
NO_PASS = ("Random", "responses", "retraining", "retraining by a function")  # run a copy of the model, or none


@pytest.mark.slow
@pytest.mark.parametrize("entry", INTERRUPTED)
def test_an_interruption_in_the_middle_changes_nothing(entry: str, tmp_path: Path) -> None:
    count = passes_of(entry)
    assert count or entry in NO_PASS
    places = {1: KeyboardInterrupt, count: ZeroDivisionError, count // 2: KeyboardInterrupt} if count > 1 else {}
    for at, error in places.items():
        model, train, queries = case("perceptron")
        model.register_forward_pre_hook(Alarm(at, error))
        before, kept = picture(model, train, queries), None
        try:
            ENTRIES[entry](model, train, queries, tmp_path / str(at))
        except (KeyboardInterrupt, ZeroDivisionError, InfluenceError) as caught:
            kept = caught
        # While the exception is kept, as a notebook does, with every frame that it passed through.
        assert differences(before, picture(model, train, queries)) == []
        # What was only tried may fail, but a user who wants to stop is heard.
        assert error is ZeroDivisionError or isinstance(kept, KeyboardInterrupt)


class Torn(Dataset[Any]):
    """Examples of which one ends the call when it is read for the so-manieth time."""

    def __init__(self, data: Any, index: int, reading: int) -> None:
        self.data, self.index, self.left = data, index, reading

    def __len__(self) -> int:
        return len(self.data[0])

    def __getitem__(self, i: int) -> Any:
        if i == self.index:
            self.left -= 1
            if not self.left:
                raise KeyboardInterrupt
        return self.data[0][i], self.data[1][i]


@pytest.mark.parametrize("reading", [1, 2])
@pytest.mark.parametrize("entry", ["attribute", "ekfac", "dual", "gauss_newton", "self-influence", "forecast"])
def test_an_interruption_in_the_data_set_changes_nothing(entry: str, reading: int, tmp_path: Path) -> None:
    model, train, queries = case("perceptron")
    before = picture(model, train, queries)
    with suppress(KeyboardInterrupt):
        ENTRIES[entry](model, Torn(train, 13, reading), queries, tmp_path)
        assert entry == "forecast" or reading == 2  # one batch is enough, or one pass
    assert differences(before, picture(model, train, queries)) == []


@pytest.mark.parametrize("method", ["exact", "dual", "koh_liang", "ekfac"])
@pytest.mark.parametrize("at", [1, 3, 9])
def test_an_interruption_in_the_loss_changes_nothing(method: str, at: int) -> None:
    model, train, queries = case("perceptron")
    alarm = Alarm(at)

    def loss(outputs: Tensor, targets: Tensor) -> Tensor:
        alarm()
        return (outputs[:, 0] - targets).square()

    before = picture(model, train, queries)
    with pytest.raises(KeyboardInterrupt):
        ptif.attribute(model, train, queries, loss=loss, method=method)
    assert differences(before, picture(model, train, queries)) == []


# --------------------------------------------------------------------------- is the list complete?

# Public calls that are handed a model and compute nothing with it.
READ_ONLY = {
    "AdamState.of": "reads names of parameters",
    "WeightDecay.from_optimizer": "reads names of parameters",
    "SOURCE.fit": "the entry 'source'",
    "train_model": "makes a model of its own",
    "Recording.ends_at": "compares weights",
    "FromModel.value": "runs the user's function; the entry 'a function of the model'",
    "Edit.of": "describes an edit of the data",
    "get_dataset_sample_ids": "reads labels only",
    "get_dataset_sample_ids_per_class": "reads labels only",
    "doctor": "of language models; tests/hf/test_left_as_it_was.py",
    "quanda_explainer": "fits and scores as Influence does; tests/interface/test_interop.py",
}
TAKES_A_MODEL = {"model", "problem", "train_loader", "test_loader", "recipe"}


def takes_a_model(function: Any) -> bool:
    return inspect.isfunction(function) and bool(TAKES_A_MODEL & set(inspect.signature(function).parameters))


def public_calls() -> Iterator[str]:
    """Functions and methods of the public face that are handed a model."""
    modules = [getattr(ptif, name) for name in ptif.__all__ if inspect.ismodule(getattr(ptif, name))]
    for module in [ptif, *modules]:
        for name in getattr(module, "__all__", ()):
            value = getattr(module, name)
            if inspect.isclass(value):
                for key, member in vars(value).items():
                    function = getattr(member, "__func__", member)
                    if not key.startswith("_") and takes_a_model(function):
                        yield f"{name}.{key}"
            elif takes_a_model(value):
                yield name


def test_every_public_call_that_takes_a_model_is_an_entry() -> None:
    source = Path(inspect.getfile(case)).read_text()
    objectives = {"outputs", "look", "values", "own_values", "fit", "forecast", "AbstractCurvature"}
    missing = {
        call
        for call in public_calls()
        if call not in READ_ONLY
        and call.split(".")[-1] not in objectives
        and not re.search(rf"\b{call.split('.')[-1]}\b", source)
    }
    assert missing == set()
