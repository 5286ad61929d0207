"""Retraining: together = one by one = a loop by hand; resumable, deterministic, and nothing is disturbed."""

from __future__ import annotations

import copy
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset

import pytorch_influence_functions as ptif
from pytorch_influence_functions.core.errors import InvalidInput, NonFinite
from pytorch_influence_functions.evaluation import (
    CosineDecay,
    LinearDecay,
    Recipe,
    Subsets,
    Truth,
    retrain,
    train_model,
    training,
)
from tests.tolerance import gap

N, Q = 24, 5


def net() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3)).double()


def data(seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(N, 6, generator=generator).double(), torch.randint(0, 3, (N,), generator=generator)


def queries() -> tuple[Tensor, Tensor]:
    x, y = data(1)
    return x[:Q], y[:Q]


RECIPE = Recipe(net, partial(torch.optim.SGD, lr=0.1, momentum=0.9, weight_decay=1e-2), epochs=3, batch_size=5)


def by_hand(recipe: Recipe, kept: Tensor, seed: int, y: Tensor | None = None) -> Tensor:
    """The recipe in plain words: one model, an ordinary loop."""
    x, labels = data()
    labels = labels if y is None else y
    torch.manual_seed(seed)
    model = recipe.model()
    order = torch.Generator().manual_seed(seed)
    optimizer = recipe.optimizer(model.parameters())
    rates = [g["lr"] for g in optimizer.param_groups]
    size = recipe.batch_size or N
    held = recipe.hold_batches
    total = recipe.epochs * -(-(N if held else int(kept.sum())) // size)
    step = 0
    for _ in range(recipe.epochs):
        ids = torch.randperm(N, generator=order)
        for batch in (ids if held else ids[kept[ids]]).split(size):
            for group, rate in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = rate * recipe.schedule(step, total)
            losses = functional.cross_entropy(model(x[batch]), labels[batch], reduction="none")
            optimizer.zero_grad()
            (losses * kept[batch]).mean().backward()
            optimizer.step()
            step += 1
    qx, qy = queries()
    with torch.no_grad():
        return functional.cross_entropy(model(qx), qy, reduction="none")


def made(recipe: Any = RECIPE, subsets: Any = None, seeds: Any = 2, **options: Any) -> Truth:
    chosen = Subsets.halves(N, 4) if subsets is None else subsets
    return retrain(recipe, chosen, seeds, train=data(), queries=queries(), **options)


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"hold_batches": True},
        {"batch_size": None},
        {"schedule": CosineDecay(warmup=0.3)},
        {"optimizer": partial(torch.optim.AdamW, lr=0.02)},
        {"optimizer": partial(torch.optim.RMSprop, lr=0.01)},
    ],
    ids=str,
)
def test_the_engine_is_the_loop_written_out(change: dict[str, Any]) -> None:
    recipe = Recipe(**{"model": net, "optimizer": RECIPE.optimizer, "epochs": 3, "batch_size": 5, **change})
    truth = made(recipe)
    assert "stacked" in truth.how
    for r in range(2):
        expected = by_hand(recipe, torch.ones(N, dtype=torch.bool), r)
        assert torch.allclose(truth.baseline[r], expected, rtol=1e-9, atol=1e-12)
        for s, kept in enumerate(truth.subsets.kept):
            assert torch.allclose(truth.measured[s, r], by_hand(recipe, kept, r), rtol=1e-9, atol=1e-12)


class Pictures(nn.Module):
    """A convolution, which is trained one by one."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Conv1d(1, 2, 3), nn.Tanh(), nn.Flatten(), nn.Linear(8, 3))

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.layers(x[:, None])
        return result


def pictures() -> nn.Module:
    return Pictures().double()


@pytest.mark.parametrize("held", [False, True])
@pytest.mark.parametrize("size", [5, None])
def test_one_by_one_is_the_loop_written_out(held: bool, size: int | None) -> None:
    recipe = Recipe(pictures, RECIPE.optimizer, epochs=3, batch_size=size, hold_batches=held)
    truth = made(recipe)
    assert "one by one" in truth.how
    for r in range(2):
        for s, kept in enumerate(truth.subsets.kept):
            expected = by_hand(recipe, kept, r)
            assert torch.allclose(truth.measured[s, r], expected, rtol=1e-9, atol=1e-12)
            assert not torch.allclose(truth.baseline[r], expected, rtol=1e-3)


def test_together_is_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    together = made()
    monkeypatch.setattr(training, "_LARGE_MODEL", 1)
    alone = made()
    assert "one by one" in alone.how
    assert torch.allclose(together.measured, alone.measured, rtol=1e-9, atol=1e-12)
    # What the subset does is far above what the route does.
    assert float(together.measured.std(0).mean()) > 1e-3


@pytest.mark.parametrize("workers", [1, 2, 3])
def test_workers_and_chunks_change_nothing(workers: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training, "_MAX_STACK", workers + 1)
    assert torch.allclose(made(workers=workers).measured, made().measured, rtol=1e-9, atol=1e-12)


def test_subsets_of_different_sizes() -> None:
    groups = Subsets.groups(N, [[0], [1, 2, 3], [4, 5, 6, 7, 8, 9], [2]])
    truth = made(subsets=groups)
    for s, kept in enumerate(groups.kept):
        assert torch.allclose(truth.measured[s, 1], by_hand(RECIPE, kept, 1), rtol=1e-9, atol=1e-12)


def test_other_labels() -> None:
    _, y = data()
    truth = made(subsets=Subsets.relabelled(N, [{3: 0}, {3: 2, 7: 1}]))
    for s, change in enumerate(truth.subsets.labels):
        changed = y.clone()
        for i, label in change.items():
            changed[i] = label
        expected = by_hand(RECIPE, torch.ones(N, dtype=torch.bool), 0, changed)
        assert torch.allclose(truth.measured[s, 0], expected, rtol=1e-9, atol=1e-12)


def own(dataset: Any, seed: int) -> nn.Module:
    """A training function of a user's own; at the top of a module, so that processes can be given it."""
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for x, y in torch.utils.data.DataLoader(dataset, batch_size=8, shuffle=True):
        optimizer.zero_grad()
        functional.cross_entropy(model(x), y).backward()
        optimizer.step()
    return model


def test_a_function_of_ones_own() -> None:
    seen = []

    def watched(dataset: Any, seed: int) -> nn.Module:
        seen.append((list(dataset.indices), seed, [int(y) for _, y in dataset]))
        return own(dataset, seed)

    subsets = Subsets.groups(N, [[0, 1]])
    one = made(watched, subsets, measure=nn.CrossEntropyLoss())
    two = made(own, subsets, measure=nn.CrossEntropyLoss())
    assert torch.allclose(one.measured, two.measured, rtol=1e-9, atol=1e-12)
    assert not torch.allclose(one.measured[:, 0], one.measured[:, 1], rtol=1e-3)
    labels = data()[1].tolist()
    assert seen[-1] == (list(range(2, N)), 1, labels[2:])


@pytest.mark.slow
def test_a_function_of_ones_own_in_processes() -> None:
    here = made(own, Subsets.halves(N, 2), measure=nn.CrossEntropyLoss())
    there = made(own, Subsets.halves(N, 2), measure=nn.CrossEntropyLoss(), workers=2)
    assert torch.allclose(here.measured, there.measured, rtol=1e-9, atol=1e-12)
    assert "2 processes" in there.how


def test_other_labels_for_a_function_of_ones_own() -> None:
    seen = {}

    def watched(dataset: Any, seed: int) -> nn.Module:
        seen[len(seen)] = [int(y) for _, y in dataset]
        return net()

    made(watched, Subsets.relabelled(N, [{3: 0, 5: 2}]), 1, measure=nn.CrossEntropyLoss())
    expected = data()[1].tolist()
    assert seen[0] == expected
    expected[3], expected[5] = 0, 2
    assert seen[1] == expected


def test_interrupted_work_goes_on_where_it_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trained = []
    real = training.train_together

    def counting(recipe: Any, objective: Any, examples: Any, jobs: Any, stop: Any) -> Any:
        if len(trained) >= 5:
            raise KeyboardInterrupt
        trained.extend(jobs)
        return real(recipe, objective, examples, jobs, stop)

    monkeypatch.setattr(training, "_MAX_STACK", 2)
    monkeypatch.setattr(training, "train_together", counting)
    with pytest.raises(KeyboardInterrupt):
        made(folder=tmp_path, workers=1)
    assert 0 < len(trained) < 10
    first = len(trained)
    trained.clear()
    monkeypatch.setattr(training, "train_together", lambda *a: (trained.extend(a[3]), real(*a))[1])
    resumed = made(folder=tmp_path, workers=1)
    assert len(trained) == 10 - first
    monkeypatch.undo()
    assert torch.allclose(resumed.measured, made().measured, rtol=1e-9, atol=1e-12)
    # More seeds add to what is there; another learning rate starts anew.
    trained.clear()
    monkeypatch.setattr(training, "train_together", lambda *a: (trained.extend(a[3]), real(*a))[1])
    made(folder=tmp_path, seeds=3)
    assert len(trained) == 5
    trained.clear()
    made(Recipe(net, partial(torch.optim.SGD, lr=0.2), epochs=3, batch_size=5), folder=tmp_path)
    assert len(trained) == 10


def test_the_random_state_and_the_threads_are_left_alone() -> None:
    torch.manual_seed(3)
    before, threads = torch.get_rng_state(), torch.get_num_threads()
    made()
    made(own, measure=nn.CrossEntropyLoss())
    assert torch.equal(before, torch.get_rng_state()) and threads == torch.get_num_threads()


def test_dropout_follows_the_seed() -> None:
    def dropping() -> nn.Module:
        return nn.Sequential(nn.Linear(6, 8), nn.Dropout(0.5), nn.Linear(8, 3)).double()

    recipe = Recipe(dropping, RECIPE.optimizer, epochs=2, batch_size=5)
    first = made(recipe)
    torch.rand(3)
    assert torch.allclose(first.measured, made(recipe, workers=3).measured, rtol=1e-9, atol=1e-12)
    assert "Dropout" in first.how


# --------------------------------------------------------------------------- a last batch of one


def normalised() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 3)).double()


def trained_on(recipe: Recipe, kept: Tensor, cut: Any) -> dict[str, Tensor]:
    """An ordinary loop over the batches that `cut` makes of an epoch's examples."""
    x, y = data()
    torch.manual_seed(0)
    model, order = recipe.model(), torch.Generator().manual_seed(0)
    optimizer = recipe.optimizer(model.parameters())
    orders = [torch.randperm(N, generator=order) for _ in range(recipe.epochs)]
    batches = [batch for ids in orders for batch in cut(ids[kept[ids]])]
    rates = [g["lr"] for g in optimizer.param_groups]
    for step, batch in enumerate(batches):
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate * recipe.schedule(step, len(batches))
        optimizer.zero_grad()
        functional.cross_entropy(model(x[batch]), y[batch]).backward()
        optimizer.step()
    return model.state_dict()


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return all(torch.allclose(one[k].double(), other[k].double(), rtol=1e-9, atol=1e-12) for k in one)


def test_a_last_batch_of_one_joins_the_batch_before_under_batch_normalisation() -> None:
    recipe = replace(RECIPE, model=normalised, batch_size=23)
    everyone = torch.ones(N, dtype=torch.bool)
    assert same(train_model(recipe, data()).state_dict(), trained_on(recipe, everyone, lambda ids: [ids]))
    loader = DataLoader(TensorDataset(*data()), 23, drop_last=True)
    dropped = trained_on(recipe, everyone, lambda ids: [ids[:23]])
    assert same(train_model(recipe, loader).state_dict(), dropped)
    # Of 24 examples without one, two batches of 11 leave one; the baseline has batches of 11, 11 and 2.
    smaller = replace(recipe, batch_size=11)
    assert same(train_model(smaller, data()).state_dict(), trained_on(smaller, everyone, lambda ids: ids.split(11)))
    subsets = Subsets.leave_one_out(N, [3])
    truth = made(smaller, subsets, seeds=1)
    state = trained_on(smaller, subsets.kept[0], lambda ids: [ids[:11], ids[11:]])
    model = normalised()
    model.load_state_dict(state)
    qx, qy = queries()
    with torch.no_grad():
        expected = functional.cross_entropy(model.eval()(qx), qy, reduction="none")
    assert gap(truth.measured[0, 0], expected) < 1e-9
    assert bool(made(replace(recipe, hold_batches=True), subsets, seeds=1).measured.isfinite().all())


def test_a_last_batch_of_one_stays_where_the_model_can_be_trained_on_it() -> None:
    images = nn.Sequential(nn.Unflatten(1, (1, 6)), nn.BatchNorm1d(1), nn.Flatten(), nn.Linear(6, 3)).double()
    for model in (net, lambda: copy.deepcopy(images)):
        recipe = replace(RECIPE, model=model, batch_size=23)
        apart = trained_on(recipe, torch.ones(N, dtype=torch.bool), lambda ids: ids.split(23))
        assert same(train_model(recipe, DataLoader(TensorDataset(*data()), 23, drop_last=True)).state_dict(), apart)


def test_batch_normalisation_needs_a_batch_of_two() -> None:
    recipe = replace(RECIPE, model=normalised)
    with pytest.raises(InvalidInput, match=r"^The recipe's batch_size=1 gives batches of one example, .* larger batch"):
        train_model(replace(recipe, batch_size=1), data())
    with pytest.raises(InvalidInput, match=r"^One example is left to train on, .*; keep two or more\.$"):
        made(recipe, torch.arange(N)[None] == 3, seeds=1)


def test_a_warm_start() -> None:
    start = {k: torch.ones_like(v) for k, v in net().state_dict().items()}
    still = Recipe(net, partial(torch.optim.SGD, lr=0.0), epochs=1, start=start)
    truth = made(still)
    assert float(truth.measured.std((0, 1)).max()) == 0.0


def test_the_trained_model_is_the_baseline_of_its_seed() -> None:
    model, truth = train_model(RECIPE, data(), seed=1), made()
    qx, qy = queries()
    losses = functional.cross_entropy(model(qx), qy, reduction="none")
    assert torch.allclose(losses, truth.baseline[1], rtol=1e-9) and not model.training


def test_training_reports_its_steps() -> None:
    reports: list[tuple[str, int, int]] = []
    with ptif.progress(lambda *report: reports.append(report)):
        train_model(RECIPE, data())
    steps = RECIPE.steps(N)
    assert reports == [("training", done, steps) for done in range(steps + 1)]


def test_schedules() -> None:
    assert [LinearDecay(0.5)(s, 4) for s in range(4)] == [0.5, 0.75, 0.5, 0.25]
    assert CosineDecay(0.0)(0, 10) == 1.0 and abs(CosineDecay(0.0)(5, 10) - 0.5) < 1e-12
    assert RECIPE.steps(24) == 15


def test_truth_on_disk(tmp_path: Path) -> None:
    truth = made(subsets=Subsets.relabelled(N, [{3: 0}, {4: 1}]))
    truth.save(tmp_path / "t.safetensors")
    again = Truth.load(tmp_path / "t.safetensors")
    assert torch.equal(again.measured, truth.measured) and torch.equal(again.baseline, truth.baseline)
    assert torch.equal(again.subsets.kept, truth.subsets.kept) and again.subsets.labels == truth.subsets.labels
    for name in ("name", "recipe", "fingerprint", "how"):
        assert getattr(again, name) == getattr(truth, name)
    assert "SGD(lr=0.1, momentum=0.9, weight_decay=0.01)" in again.recipe


def test_diverged_training_is_named() -> None:
    wild = Recipe(net, partial(torch.optim.SGD, lr=float("inf")), epochs=3, batch_size=5)
    with pytest.raises(NonFinite, match="seed 0 measures NaN or infinity"):
        made(wild, seeds=1)
    with pytest.raises(
        NonFinite, match=r"trained with seed 2 has NaN or infinity in '0\.weight', .*lower the learning"
    ):
        train_model(wild, data(), seed=2)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: made(subsets=Subsets.halves(9, 2)), "subsets are of 9 examples and the training data hold 24"),
        (lambda: made(subsets=torch.ones(2, N)), "bool matrix"),
        (lambda: made(subsets=torch.zeros(2, N, dtype=torch.bool)), "Subset 0, 1 keeps no example"),
        (lambda: made(seeds=0), "seeds must be"),
        (lambda: made(seeds=[1, 1]), "seeds must be"),
        (lambda: made(workers=0), "workers=0 must be a whole number of at least 1"),
        (lambda: made(own), "pass measure="),
        (lambda: made(lambda d, s: 3, measure=nn.CrossEntropyLoss()), "gave int, expected the trained"),
        (
            lambda: made(lambda d, s: net(), measure=nn.CrossEntropyLoss(), workers=2),
            "cannot be sent to another",
        ),
        (lambda: made(3), "recipe must be a Recipe or a function"),
        (lambda: made(Recipe(lambda: 3)), "gave int, expected a torch.nn.Module"),
        (lambda: Recipe(net()), "model must be a function that makes one, got Sequential"),
        (lambda: Recipe(net, epochs=0), r"Recipe\(epochs=0\) must be a whole number"),
        (lambda: made(Recipe(net, start={"x": torch.ones(1)})), "start does not fit its model"),
        (lambda: Subsets.halves(10, 0), "The number of subsets is 0; it must be a whole number of at least 1"),
        (lambda: Subsets.halves(10, 3, 1.0), "between 0 and 1"),
        (lambda: Subsets.groups(10, []), "No groups"),
        (lambda: Subsets.groups(10, [[]]), "A group is empty"),
        (lambda: Subsets.groups(3, [[0, 1, 2]]), "leaves out all 3 examples"),
        (lambda: Subsets.leave_one_out(5, [5]), "Index 5 is outside"),
        (lambda: Subsets.relabelled(5, []), "No changes of labels"),
        (lambda: made(subsets=Subsets.relabelled(N, [{0: "cat"}])), "does not fit targets"),
        (lambda: made().first(3), "There are 2 seeds; asked for 3"),
    ],
)
def test_bad_input_in_one_sentence(call: Any, words: str) -> None:
    with pytest.raises(InvalidInput, match=words) as caught:
        call()
    assert "\n" not in str(caught.value)


def test_a_model_that_is_there_already_is_not_trained_in_place() -> None:
    model, backbone = net().eval(), nn.Linear(6, 6)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    for make in (lambda: model, lambda: nn.Sequential(backbone, nn.Linear(6, 2))):
        for call in (made, lambda recipe: recipe.fresh(0)):
            with pytest.raises(InvalidInput, match=r"gives the same weights at every call.* copy\.deepcopy\(model\)"):
                call(Recipe(make))
    torch.testing.assert_close(model.state_dict(), before)
    assert not any(m.training for m in model.modules()) and all(p.grad is None for p in model.parameters())
    copied = Recipe(lambda: copy.deepcopy(model), epochs=1, loss=nn.CrossEntropyLoss())
    assert copied.fresh(0) is not copied.fresh(1) and not any(m.training for m in model.modules())


def test_plan_names() -> None:
    assert Subsets.drops(200, 3).name == "small-drop LDS: 3 times 1 % of 200 examples left out"
    assert Subsets.leave_one_out(9, [1, 2]).name == "leave-one-out: 2 of 9 examples, one at a time"
