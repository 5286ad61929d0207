"""Nothing stale: factors and trainings on disk are used for the very same question only, and only undamaged."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import pytorch_influence_functions as ptif
from pytorch_influence_functions.core.cache_folder import CacheFolder
from pytorch_influence_functions.core.errors import InvalidInput
from pytorch_influence_functions.core.files import read_tensors
from pytorch_influence_functions.curvature import EKFAC, EmpiricalFisher, Fisher
from pytorch_influence_functions.curvature.kronecker.cache import FactorCache
from pytorch_influence_functions.evaluation import Recipe, Subsets, Truth, retrain
from pytorch_influence_functions.evaluation import retraining as retraining_module
from pytorch_influence_functions.linalg.kronecker_block import KroneckerBlock
from tests.laws.test_fingerprint import Net, model_fingerprint, module, points

# --------------------------------------------------------------------------- factors on disk


def squared(o: Tensor, t: Tensor) -> Tensor:
    return (o - t).pow(2).mean(1)


def with_helper(power: int) -> Callable[[Tensor, Tensor], Tensor]:
    """A loss that calls a helper, made afresh."""
    source = f"def size(x): return x.abs() ** {power}\ndef loss(o, t): return size(o - t).mean(1)\n"
    return module(source)["loss"]  # type: ignore[no-any-return]


def edited(power: int) -> Callable[[Tensor, Tensor], Tensor]:
    return module(f"def loss(o, t): return (o - t).pow({power}).mean(1)\n")["loss"]  # type: ignore[no-any-return]


def captured(power: int) -> Callable[[Tensor, Tensor], Tensor]:
    return lambda o, t: (o - t).pow(power).mean(1)


def default(power: int) -> Callable[[Tensor, Tensor], Tensor]:
    return module(f"def loss(o, t, power={power}): return (o - t).pow(power).mean(1)\n")["loss"]  # type: ignore[no-any-return]


EMPIRICAL = {"fisher": EmpiricalFisher()}
BLIND_SPOTS: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "an edited lambda": (
        {"loss": lambda o, t: (o - t).pow(2).mean(1), **EMPIRICAL},
        {"loss": lambda o, t: (o - t).pow(4).mean(1), **EMPIRICAL},
        "loss",
    ),
    "an edited function": ({"loss": edited(2), **EMPIRICAL}, {"loss": edited(4), **EMPIRICAL}, "loss"),
    "a captured value": ({"loss": captured(2), **EMPIRICAL}, {"loss": captured(4), **EMPIRICAL}, "loss"),
    "a default": ({"loss": default(2), **EMPIRICAL}, {"loss": default(4), **EMPIRICAL}, "loss"),
    "a helper of the loss": ({"loss": with_helper(2), **EMPIRICAL}, {"loss": with_helper(4), **EMPIRICAL}, "loss"),
    "another measure for the Fisher matrix": (
        {"fisher": EmpiricalFisher(ptif.FromFunction(edited(2)))},
        {"fisher": EmpiricalFisher(ptif.FromFunction(edited(4)))},
        "settings",
    ),
    "another activation": ({"model": Net}, {"model": lambda: Net(torch.relu)}, "model outputs"),
    "a gradient that is stopped": ({"model": Net}, {"model": lambda: Net(stop=True)}, "model outputs"),
    "data": ({}, {"data": lambda x, y: (x + 1e-9, y)}, "training data"),
    "settings": ({}, {"fisher": Fisher(samples=2)}, "settings"),
}


def score(folder: Path | None, changes: dict[str, Any]) -> ptif.Scores:
    x, y = points()
    change = changes.get("data", lambda *pair: pair)
    settings = {k: v for k, v in changes.items() if k in ("fisher", "examples")}
    return ptif.attribute(
        changes.get("model", Net)(),
        change(x, y),
        (x[:3], y[:3]),
        loss=changes.get("loss", ptif.SquaredError()),
        method=ptif.ekfac(folder=folder, damping=0.1, **settings),
    )


@pytest.mark.slow
@pytest.mark.parametrize("name", BLIND_SPOTS)
def test_factors_of_something_else_are_not_used(name: str, tmp_path: Path) -> None:
    first, second, named = BLIND_SPOTS[name]
    score(tmp_path, first)
    scores, fresh = score(tmp_path, second), score(None, second)
    torch.testing.assert_close(scores.values, fresh.values, rtol=1e-10, atol=1e-12 * float(fresh.values.abs().max()))
    assert len(list(tmp_path.iterdir())) == 2
    (note,) = [note for note in scores.diagnostics.notes if "left aside" in note]
    assert f"had results of other {named};" in note


def test_the_same_loss_defined_again_finds_its_factors(tmp_path: Path) -> None:
    first = score(tmp_path, {"loss": edited(2), **EMPIRICAL})
    (place,) = tmp_path.iterdir()
    stamps = {path.name: path.stat().st_mtime_ns for path in place.iterdir()}
    again = score(tmp_path, {"loss": edited(2), **EMPIRICAL})
    assert {path.name: path.stat().st_mtime_ns for path in place.iterdir()} == stamps and len(stamps) > 1
    torch.testing.assert_close(again.values, first.values, rtol=1e-10, atol=1e-12 * float(first.values.abs().max()))
    assert not [note for note in again.diagnostics.notes if "left aside" in note]


def test_model_outputs_that_differ_by_rounding_find_the_factors(tmp_path: Path) -> None:
    curvature = EKFAC(folder=tmp_path)
    problem = ptif.Problem(Net(), ptif.SquaredError(), points())
    ptif.Influence(curvature, damping=0.1).fit(problem)
    (record,) = tmp_path.glob("*/fingerprint.json")
    number = str(model_fingerprint(Net()).probes["model outputs"].values[0])
    text = record.read_text()
    assert number in text
    for factor, places in ((1 + 1e-11, 1), (1 + 1e-3, 2)):
        record.write_text(text.replace(number, repr(float(number) * factor), 1))
        ptif.Influence(curvature, damping=0.1).fit(problem)
        assert len(list(tmp_path.iterdir())) == places


def flip(path: Path, position: int, bit: int = 0) -> None:
    content = bytearray(path.read_bytes())
    content[position] ^= 1 << bit
    path.write_bytes(bytes(content))


def test_a_damaged_block_is_fitted_again(tmp_path: Path) -> None:
    first = score(tmp_path, {})
    files = sorted(tmp_path.rglob("*.safetensors"))
    whole = [path.read_bytes() for path in files]
    flip(files[0], len(whole[0]) - 3)  # in the numbers
    flip(files[1], 40)  # in the header
    again = score(tmp_path, {})
    torch.testing.assert_close(again.values, first.values, rtol=1e-10, atol=1e-12 * float(first.values.abs().max()))
    for path in files:
        read_tensors(path, "curvature factors")


def test_a_block_of_another_fit_is_not_used(tmp_path: Path) -> None:
    score(tmp_path / "a", {})
    score(tmp_path / "b", {"model": lambda: Net(torch.relu)})
    mine, theirs = (sorted((tmp_path / name).rglob("*.safetensors")) for name in "ab")
    for path, other in zip(mine, theirs, strict=True):
        path.write_bytes(other.read_bytes())
    torch.testing.assert_close(score(tmp_path / "a", {}).values, score(None, {}).values)


def test_a_block_that_is_damaged_while_it_is_in_use_is_refused(tmp_path: Path) -> None:
    cache = FactorCache(CacheFolder.of(tmp_path, model_fingerprint(Net())), ("a",), torch.device("cpu"))
    cache.write("a", KroneckerBlock(torch.eye(2), torch.eye(3), torch.ones(2, 3)))
    blocks = cache.blocks()
    assert list(blocks) == ["a"] and torch.equal(blocks["a"].values, torch.ones(2, 3))
    flip(cache.path("a"), cache.path("a").stat().st_size - 3)
    with pytest.raises(InvalidInput, match=r"safetensors' is damaged: its checksum .*; remove it and fit again"):
        blocks["a"]


# --------------------------------------------------------------------------- trainings on disk


def linear() -> nn.Module:
    return nn.Linear(6, 2).double()


def wider(width: int) -> Callable[[], nn.Module]:
    return lambda: nn.Sequential(nn.Linear(6, width), nn.Tanh(), nn.Linear(width, 2)).double()


def acting(act: Callable[[Tensor], Tensor]) -> Callable[[], nn.Module]:
    return lambda: Net(act)


def training(steps: int, rate: float = 0.1) -> Any:
    """A training function of a user's own, made afresh; it calls a helper."""
    source = f"""
import torch
def descend(model, x, y, rate={rate}):
    loss = (model(x) - y).square().mean()
    with torch.no_grad():
        for p, slope in zip(model.parameters(), torch.autograd.grad(loss, list(model.parameters()))):
            p -= rate * slope
def train(dataset, seed):
    model = torch.nn.Linear(6, 2).double()
    x, y = (torch.stack(part) for part in zip(*(dataset[i] for i in range(len(dataset)))))
    for _ in range({steps}):
        descend(model, x, y)
    return model
"""
    return module(source)["train"]


def truth(folder: Path | None, changes: dict[str, Any]) -> Truth:
    x, y = points()
    change = changes.get("data", lambda *pair: pair)
    settings = {k: v for k, v in changes.items() if k in ("optimizer", "epochs", "start", "hold_batches")}
    recipe = Recipe(changes.get("model", linear), loss=changes.get("loss", nn.MSELoss()), **{"epochs": 2, **settings})
    return retrain(
        changes.get("train", recipe),
        Subsets.halves(len(change(x, y)[0]), 2),
        1,
        train=change(x, y),
        queries=(x[:3] * changes.get("query", 1.0), y[:3]),
        measure=changes.get("measure"),
        folder=folder,
        workers=1,
    )


OTHER_TRAININGS: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "an edited lambda": (
        {"loss": lambda o, t: (o - t).pow(2).mean(1)},
        {"loss": lambda o, t: (o - t).abs().mean(1)},
        "loss, another measure",
    ),
    "an edited function": ({"loss": edited(2)}, {"loss": edited(4)}, "loss, another measure"),
    "a helper of the loss": ({"loss": with_helper(2)}, {"loss": with_helper(4)}, "loss, another measure"),
    "a captured value": ({"loss": captured(2)}, {"loss": captured(4)}, "loss, another measure"),
    "an edited measure": ({"measure": edited(2)}, {"measure": edited(4)}, "measure"),
    "the model function": ({"model": wider(4)}, {"model": wider(5)}, "weights, another model function"),
    "another activation": (
        {"model": acting(torch.tanh)},
        {"model": acting(torch.relu)},
        "model function",
    ),
    "the optimiser": (
        {"optimizer": partial(torch.optim.SGD, lr=0.1)},
        {"optimizer": partial(torch.optim.SGD, lr=0.2)},
        "recipe",
    ),
    "the epochs": ({"epochs": 2}, {"epochs": 3}, "recipe"),
    "data": ({}, {"data": lambda x, y: (x + 1e-9, y)}, "training data"),
    "queries": ({}, {"query": 1.1}, "queries"),
    "a training function": (
        {"train": training(2), "measure": nn.MSELoss()},
        {"train": training(3), "measure": nn.MSELoss()},
        "training function",
    ),
    "a helper's default": (
        {"train": training(2), "measure": nn.MSELoss()},
        {"train": training(2, rate=0.2), "measure": nn.MSELoss()},
        "training function",
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", OTHER_TRAININGS)
def test_measurements_of_something_else_are_not_used(name: str, tmp_path: Path) -> None:
    first, second, named = OTHER_TRAININGS[name]
    truth(tmp_path, first)
    again, fresh = truth(tmp_path, second), truth(None, second)
    torch.testing.assert_close(again.measured, fresh.measured, rtol=1e-9, atol=1e-12)
    assert len(list(tmp_path.iterdir())) == 2 and again.fingerprint == fresh.fingerprint
    assert f"had results of other {named.replace('another ', '')};" in again.how


def test_an_edited_forward_of_a_class_is_trained_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Linear(6, 2).double()

        def forward(self, x: Tensor) -> Tensor:
            return self.a(x)  # type: ignore[no-any-return]

    truth(tmp_path, {"model": Model})
    monkeypatch.setattr(Model, "forward", lambda self, x: self.a(x).tanh())
    again = truth(tmp_path, {"model": Model})
    torch.testing.assert_close(again.measured, truth(None, {"model": Model}).measured, rtol=1e-9, atol=1e-12)
    assert len(list(tmp_path.iterdir())) == 2 and "had results of other model code" in again.how


def jobs_run(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the jobs that are really carried out from now on."""
    names: list[str] = []
    run = retraining_module._Retraining._run
    monkeypatch.setattr(retraining_module._Retraining, "_run", lambda self, jobs: names.extend(jobs) or run(self, jobs))
    return names


@pytest.mark.parametrize("changes", [lambda: {"loss": edited(2)}, lambda: {"train": training(2), "measure": edited(2)}])
def test_the_same_code_defined_again_finds_its_trainings(
    changes: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = truth(tmp_path, changes())
    names = jobs_run(monkeypatch)
    again = truth(tmp_path, changes())
    assert (
        names == []
        and torch.allclose(first.measured, again.measured, rtol=1e-9, atol=1e-12)
        and "had results" not in again.how
    )


def test_a_damaged_training_is_done_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = truth(tmp_path, {})
    files = sorted(tmp_path.rglob("*.safetensors"))
    for path, position in zip(files, (path.stat().st_size - 3 for path in files), strict=True):
        flip(path, position)
    names = jobs_run(monkeypatch)
    again = truth(tmp_path, {})
    assert len(names) == 3
    torch.testing.assert_close(again.measured, first.measured, rtol=1e-9, atol=1e-12)


def test_the_trainings_of_another_request_are_not_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    truth(tmp_path / "a", {})
    truth(tmp_path / "b", {"epochs": 4})
    (mine,), (theirs,) = ((tmp_path / name).glob("*") for name in "ab")
    for path in [*mine.glob("*.safetensors")]:
        path.unlink()
    for path in theirs.glob("*.safetensors"):
        (mine / path.name).write_bytes(path.read_bytes())
    names = jobs_run(monkeypatch)
    again = truth(tmp_path / "a", {})
    assert len(names) == 3
    torch.testing.assert_close(again.measured, truth(None, {}).measured, rtol=1e-9, atol=1e-12)
