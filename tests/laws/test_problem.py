"""Problem and sweep: a frozen record that costs nothing, and one loop that visits all and leaves no trace."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils.data import Dataset

from pytorch_influence_functions.core.distributed import World
from pytorch_influence_functions.core.errors import InvalidInput, NonFinite, TrainingDataWarning, UnknownName
from pytorch_influence_functions.core.progress import progress
from pytorch_influence_functions.problem.checkpoints import at_checkpoint, load_checkpoint
from pytorch_influence_functions.problem.data import Source
from pytorch_influence_functions.problem.problem import Problem, check_weights, model_device, sweep
from pytorch_influence_functions.problem.weight_decay import WeightDecay

X, Y = torch.arange(20.0).reshape(10, 2), torch.arange(10) % 3
LOSS = nn.CrossEntropyLoss()


def net() -> nn.Sequential:
    return nn.Sequential(nn.Linear(2, 4), nn.BatchNorm1d(4), nn.Dropout(), nn.Linear(4, 3))


def problem(model: nn.Module | None = None, **options: Any) -> Problem:
    return Problem(net() if model is None else model, LOSS, (X, Y), **options)


class Counting(Dataset[Any]):
    def __init__(self) -> None:
        self.read = 0

    def __len__(self) -> int:
        return 10

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        self.read += 1
        return X[index], Y[index]


class Noisy(Counting):
    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        x, y = super().__getitem__(index)
        return x + torch.rand(2), y


# --------------------------------------------------------------------------- the record


def test_making_a_problem_computes_nothing() -> None:
    data, model = Counting(), net()
    model.register_forward_hook(lambda *_: pytest.fail("the model was called"))
    made = Problem(model, LOSS, data, parameters="no such name", checkpoints=["no such file"])
    assert len(made) == 10 and data.read == 0 and made.batch_size == 64
    with pytest.raises(UnknownName, match="no such name"):  # only now is anything looked at
        _ = made.space


def test_a_problem_is_frozen_and_copied_with_changes() -> None:
    made = problem(batch_size=3, parameters="3", weight_decay=0.5)
    with pytest.raises(dataclasses.FrozenInstanceError):
        made.batch_size = 4  # type: ignore[misc]
    assert made.space is made.space and made.space.decay == {"3": 0.5}
    other = made.with_(parameters="0", batch_size=5)
    assert other.space.decay == {"0": 0.5} and made.space.names == ("3.weight", "3.bias")
    assert (made.data.batch_size, other.data.batch_size, other.batch_size) == (3, 5, 5)
    assert made.with_(data=(X[:4], Y[:4])).batch_size == 3 and other.model is made.model
    assert "10 examples" in repr(made) and "weight_decay=0.5" in repr(made)


def test_parameters_given_as_an_iterator_last() -> None:
    model = net()
    made = problem(model, parameters=model[3].parameters())
    assert made.space.size == made.with_(weight_decay=1.0).space.size == 15


# --------------------------------------------------------------------------- weight decay


@pytest.mark.parametrize(
    "make",
    [
        lambda groups: torch.optim.SGD(groups, lr=0.1, weight_decay=0.1),
        lambda groups: torch.optim.Adam(groups, weight_decay=0.1),
        lambda groups: torch.optim.RMSprop(groups, weight_decay=0.1),
    ],
)
def test_decay_is_read_from_the_groups(make: Callable[[Any], torch.optim.Optimizer]) -> None:
    model = net()
    biases = [model[0].bias, model[3].bias]
    optimizer = make([{"params": [model[0].weight, model[3].weight]}, {"params": biases, "weight_decay": 0.0}])
    space = problem(model, weight_decay=optimizer).space
    assert space.decay == {
        "0.weight": 0.1,
        "0.bias": 0.0,
        "1.weight": 0.0,  # not in the optimiser: not decayed
        "1.bias": 0.0,
        "3.weight": 0.1,
        "3.bias": 0.0,
    }


def test_decay_is_read_from_several_optimisers_of_which_each_trains_a_part() -> None:
    model = net()
    first = torch.optim.SGD(model[0].parameters(), lr=0.1, weight_decay=0.1)
    second = torch.optim.Adam(model[3].parameters(), weight_decay=0.2)
    of_another_model = torch.optim.Adam(net().parameters(), weight_decay=0.3)
    decay = problem(model, weight_decay=[first, second, of_another_model]).space.decay
    assert decay == {"0": 0.1, "1.weight": 0.0, "1.bias": 0.0, "3": 0.2}
    assert problem(model, weight_decay=(first,)).weight_decay == problem(model, weight_decay=first).weight_decay


def test_decay_as_the_optimiser_means_it() -> None:
    """One SGD step moves as the gradient of loss + ½·strength·|θ|² says."""
    model = nn.Linear(2, 3)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0, weight_decay=0.3)
    (strength,) = problem(model, weight_decay=optimizer).space.decay.values()
    before = torch.cat([p.detach().flatten() for p in model.parameters()])
    total = LOSS(model(X), Y) + sum(0.5 * strength * p.square().sum() for p in model.parameters())
    slope = torch.cat([g.flatten() for g in torch.autograd.grad(total, list(model.parameters()))])
    LOSS(model(X), Y).backward()
    optimizer.step()
    after = torch.cat([p.detach().flatten() for p in model.parameters()])
    assert torch.allclose(before - after, slope, atol=1e-6)


def test_optimisers_without_decay_are_all_fine() -> None:
    model = net()
    made = problem(model, weight_decay=torch.optim.AdamW(model.parameters(), weight_decay=0.0))
    assert made.weight_decay == WeightDecay(0.0) and made.weight_decay.is_zero


def test_decay_records() -> None:
    per_name = WeightDecay({"3.weight": 0.2}, per_example=True)
    made = problem(weight_decay=per_name)
    assert made.weight_decay is per_name and made.space.decay["3.weight"] == 0.2
    assert hash(per_name) == hash(WeightDecay({"3.weight": 0.2}, per_example=True)) and not per_name.is_zero


class Homemade(torch.optim.Optimizer):
    def __init__(self, parameters: Any) -> None:
        super().__init__(parameters, {"weight_decay": 0.1})


def _decay(make: Callable[[Any], Any]) -> Problem:
    model = net()
    return problem(model, weight_decay=make(model.parameters()))


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (
            lambda p: torch.optim.AdamW(p, weight_decay=0.01),
            r"AdamW has decoupled weight decay \(0.01\).*not an L2 term.*FromTraining",
        ),
        (
            lambda p: torch.optim.NAdam(p, weight_decay=0.01, decoupled_weight_decay=True),
            "NAdam has decoupled",
        ),
        (Homemade, r"weight decay of Homemade \(0.1\) is not known to be an L2 term"),
        (lambda p: torch.optim.SGD(nn.Linear(1, 1).parameters()), "holds no parameter of the model"),
        (lambda p: [torch.optim.SGD(nn.Linear(1, 1).parameters())], "holds no parameter of the model"),
        (
            lambda p: [torch.optim.SGD(parameters := list(p)), torch.optim.Adam(parameters)],
            "^Two of the optimisers given as weight_decay train '0.weight', .*; pass numbers by name",
        ),
        (lambda p: [0.1, 0.2], "^weight_decay must be a number, an optimiser, a list of optimisers or .*, got list"),
        (lambda p: -0.1, "^weight_decay=-0.1 must be a finite number of at least 0"),
        (lambda p: float("nan"), "^weight_decay=nan must be a finite number of at least 0"),
        (
            lambda p: WeightDecay({"0.weight": -1.0}),
            "^The weight decay of '0.weight' is -1.0; it must be a finite number of at least 0",
        ),
    ],
)
def test_decay_that_is_no_l2_term_is_refused(make: Callable[[Any], Any], match: str) -> None:
    with pytest.raises(InvalidInput, match=match):
        _decay(make)


# --------------------------------------------------------------------------- bad problems


class TwoDevices(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.here, self.there = nn.Linear(1, 1), nn.Linear(1, 1, device="meta")


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: problem(TwoDevices()), "several devices.*'here.weight' on cpu, 'there.weight' on meta"),
        (lambda: problem(nn.Linear(2, 3, device="meta")), "meta device and has no values"),
        (lambda: problem(device="cuda"), r"lies on cpu, not on cuda; call model.to\('cuda'\) first"),
        (lambda: problem(deterministic="maybe"), "deterministic='maybe' must be 'warn', 'error' or 'ignore'"),
        (lambda: problem(batch_size=0), "^batch_size=0 must be a whole number of at least 1"),
        (lambda: problem().with_(bach_size=3), "no argument 'bach_size'. Did you mean 'batch_size'"),
        (lambda: Problem(net(), LOSS, (X, Y[:3])), "different lengths"),
    ],
)
def test_bad_problems_are_refused_in_words(make: Callable[[], Any], match: str) -> None:
    with pytest.raises(InvalidInput, match=match):
        make()


def test_the_device_is_the_models() -> None:
    assert problem().device == torch.device("cpu") == problem(device="cpu").device
    assert model_device(nn.ReLU()) == torch.device("cpu")


# --------------------------------------------------------------------------- checkpoints


def changed(model: nn.Module) -> dict[str, Tensor]:
    return {k: v + 1 for k, v in model.state_dict().items()}


@pytest.mark.parametrize("kind", ["dict", "wrapped", "safetensors", "torch"])
def test_a_checkpoint_is_put_in_and_taken_out(kind: str, tmp_path: Path) -> None:
    model = net()
    state = changed(model)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    where: Any = {"dict": state, "wrapped": {"epoch": 3, "state_dict": state}}.get(kind, tmp_path / f"w.{kind}")
    if kind == "safetensors":
        save_file(state, where)
    if kind == "torch":
        torch.save({"model": state}, where)
    if kind == "wrapped":
        torch.save(where, tmp_path / "w.pt")
        where = str(tmp_path / "w.pt")
    parameter = model[0].weight
    with pytest.raises(KeyboardInterrupt), at_checkpoint(model, where):
        assert model[0].weight is parameter
        assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
        raise KeyboardInterrupt
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_a_tied_weight_may_be_stored_once() -> None:
    model = nn.Sequential(nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False))
    model[1].weight = model[0].weight
    with at_checkpoint(model, {"1.weight": torch.eye(2)}):
        assert torch.equal(model[0].weight, torch.eye(2))
    assert not torch.equal(model[0].weight, torch.eye(2))


def _bad_states(tmp_path: Path) -> dict[str, tuple[Any, str]]:
    state = net().state_dict()
    (tmp_path / "junk.pt").write_bytes(b"junk")
    torch.save([1, 2], tmp_path / "list.pt")
    torch.save({"state_dict": net()}, tmp_path / "pickled.pt")
    return {
        "missing": ({k: v for k, v in state.items() if k != "3.bias"}, "lacks '3.bias', which the model has"),
        "unexpected": (
            {**state, "3.wieght": torch.ones(1)},
            r"holds '3.wieght', which the model does not have. Did you mean '3.weight'",
        ),
        "shape": ({**state, "3.bias": torch.ones(5)}, r"shape \[5\] for '3.bias', the model \[3\]"),
        "absent": (tmp_path / "none.pt", "none.pt' cannot be read"),
        "junk": (str(tmp_path / "junk.pt"), "junk.pt' cannot be read"),
        "list": (tmp_path / "list.pt", "is no state dict .* but list"),
        "pickled": (tmp_path / "pickled.pt", "pickled.pt' cannot be read"),
    }


@pytest.mark.parametrize("case", ["missing", "unexpected", "shape", "absent", "junk", "list", "pickled"])
def test_checkpoints_that_do_not_fit_change_nothing(case: str, tmp_path: Path) -> None:
    model = net()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    state, match = _bad_states(tmp_path)[case]
    with pytest.raises(InvalidInput, match=match), at_checkpoint(model, state):
        pass
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_one_checkpoint_may_be_given_bare() -> None:
    state = net().state_dict()
    assert problem(checkpoints=state).checkpoints[0] is state
    assert problem(checkpoints="a.pt").checkpoints == ("a.pt",)
    assert load_checkpoint({"weight": X})["weight"] is X


# --------------------------------------------------------------------------- sweep


def test_sweep_visits_everything_once_in_eval_mode() -> None:
    made = problem(batch_size=4, parameters="3")
    seen = []
    for ids, (x, y) in sweep(made):
        assert not any(m.training for m in made.model.modules())
        assert [n for n, p in made.model.named_parameters() if p.requires_grad] == ["3.weight", "3.bias"]
        assert torch.equal(x, X[ids]) and torch.equal(y, Y[ids])
        made.model(x)
        seen += ids.tolist()
    assert seen == list(range(10))
    assert all(m.training for m in made.model.modules())
    assert all(p.requires_grad for p in made.model.parameters())


def test_sweep_over_other_data_and_chosen_ids() -> None:
    made = problem(batch_size=4)
    assert [ids.tolist() for ids, _ in sweep(made, ids=[9, 0, 3, 3, 1])] == [[9, 0, 3, 3], [1]]
    queries = Source.of((X[:3], Y[:3]), 2)
    assert [ids.tolist() for ids, _ in sweep(made, queries)] == [[0, 1], [2]]


@pytest.mark.parametrize("size", [1, 2, 3, 20])
def test_shards_cover_everything_once(size: int) -> None:
    made = problem(batch_size=3)
    seen = [ids.tolist() for rank in range(size) for ids, _ in sweep(made, world=World(rank, size))]
    assert sorted(i for ids in seen for i in ids) == list(range(10))


@pytest.mark.parametrize("way", ["break", "error", "interrupt", "zip"])
def test_sweep_leaves_no_trace(way: str) -> None:
    made = problem(batch_size=2)
    made.model[2].eval()
    rng = torch.get_rng_state()
    before = [m.training for m in made.model.modules()]
    values = {k: v.clone() for k, v in made.model.state_dict().items()}
    errors = {"error": ValueError, "interrupt": KeyboardInterrupt}

    def visit() -> None:
        for _, (x, _) in sweep(made):
            torch.rand(3)
            made.model[1].train()(made.model[0](x))
            if way == "break":
                break
            if way in errors:
                raise errors[way]

    if way in errors:
        with pytest.raises(errors[way]):
            visit()
    elif way == "break":
        visit()
    else:
        assert len(list(zip(sweep(made, ids=[0, 1]), sweep(made), strict=False))) == 1  # the first ends first
    assert [m.training for m in made.model.modules()] == before
    assert all(torch.equal(v, values[k]) for k, v in made.model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), rng)
    assert torch.backends.mha.get_fastpath_enabled()


def test_sweep_reports_progress_in_examples() -> None:
    heard: list[tuple[str, int, int]] = []
    with progress(lambda *step: heard.append(step)):
        list(sweep(problem(batch_size=4), label="score"))
    assert heard == [("score", 0, 10), ("score", 4, 10), ("score", 8, 10), ("score", 10, 10)]


def test_sweep_checks_that_items_are_steady() -> None:
    with pytest.warns(TrainingDataWarning, match="read twice"):
        list(sweep(Problem(net(), LOSS, Noisy())))
    with pytest.raises(InvalidInput, match="read twice"):
        list(sweep(Problem(net(), LOSS, Noisy(), deterministic="error")))
    list(sweep(Problem(net(), LOSS, Noisy(), deterministic="ignore")))


def test_sweep_names_what_is_not_finite() -> None:
    x = X.clone()
    x[7, 0] = float("nan")
    with pytest.raises(NonFinite, match="dataset index 7"):
        list(sweep(Problem(net(), LOSS, (x, Y), batch_size=3)))
    model = net()
    with torch.no_grad():
        model[3].bias[1] = float("inf")
    with pytest.raises(NonFinite, match=r"in '3\.bias'"):
        list(sweep(problem(model)))


def test_large_weights_and_masks_are_finite_enough() -> None:
    model = net()
    with torch.no_grad():
        model[0].weight.fill_(3e38)  # the sum overflows, the weights do not
    model.register_buffer("mask", torch.tensor([0.0, float("-inf")]))
    check_weights(model)
    model.register_buffer("bad", torch.tensor([float("nan")]))
    with pytest.raises(NonFinite, match="in 'bad'"):
        check_weights(model)
