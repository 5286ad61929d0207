"""Recording a training: what is kept equals the weights at that step, whatever the loop does, and whenever it ends."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import pytorch_influence_functions as ptif
from pytorch_influence_functions.core.errors import InvalidInput, TrainingDataWarning
from pytorch_influence_functions.core.files import locked
from pytorch_influence_functions.problem.checkpoints import load_checkpoint
from pytorch_influence_functions.trajectory import SOURCE, recorder
from pytorch_influence_functions.trajectory.schedule import Doubling, SharesOfRun
from tests.covering import FULL

Weights = dict[str, Tensor]


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 2))


def data(step: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(step)
    return torch.randn(8, 3, generator=generator), torch.randint(0, 2, (8,), generator=generator)


def copy(model: nn.Module) -> Weights:
    return {k: v.clone() for k, v in model.state_dict().items()}


def train(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    steps: int,
    schedule: Any = None,
    accumulate: int = 1,
    first: int = 0,
) -> Iterator[tuple[int, Weights]]:
    """(step, weights after it) of an ordinary loop."""
    for step in range(first + 1, steps + 1):
        optimizer.zero_grad()
        for part in range(accumulate):
            x, y = data(step * accumulate + part)
            (nn.functional.cross_entropy(model(x), y) / accumulate).backward()
        optimizer.step()
        if schedule is not None:
            schedule.step()
        yield step, copy(model)


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-3)


def adamw(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=0.1)


def grouped(model: nn.Module) -> torch.optim.Optimizer:
    first, last = list(model.parameters())[:2], list(model.parameters())[2:]
    return torch.optim.SGD(
        [{"params": first, "lr": 0.2, "weight_decay": 0.01}, {"params": last}], lr=0.05, momentum=0.5
    )


OPTIMIZERS: dict[str, Callable[[nn.Module], torch.optim.Optimizer]] = {
    "sgd": sgd,
    "adamw": adamw,
    "amsgrad": lambda m: torch.optim.Adam(m.parameters(), lr=0.01, amsgrad=True),
    "groups": grouped,
    "rmsprop": lambda m: torch.optim.RMSprop(m.parameters(), lr=0.01),
}


@pytest.mark.slow
@pytest.mark.parametrize("length", [None, 60])
@pytest.mark.parametrize(("name", "accumulate"), [*((name, 1) for name in OPTIMIZERS), ("groups", 3)])
def test_every_checkpoint_holds_the_weights_of_its_step(
    name: str, accumulate: int, length: int | None, tmp_path: Path
) -> None:
    model = net()
    optimizer = OPTIMIZERS[name](model)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda k: 1 / (1 + k))
    seen, rates = {}, {}
    with ptif.Recorder(model, optimizer, tmp_path, steps=length, batch_size=24) as recording:
        for step, weights in train(model, optimizer, 60, None, accumulate):
            seen[step], rates[step] = weights, [group["lr"] for group in optimizer.param_groups]
            schedule.step()
    run = ptif.Recording.open(tmp_path)
    assert run.steps == ((1, 3, 6, 12, 24, 42, 60) if length else (1, 2, 4, 8, 16, 32, 60)) and run.finished
    assert recording.recording.steps == run.steps and recording.step == 60
    for recorded in run.recorded:
        kept = load_checkpoint(recorded.weights, model)
        assert kept.keys() == seen[recorded.step].keys()
        assert all(torch.equal(kept[k], v) for k, v in seen[recorded.step].items())
        assert [g.lr for g in recorded.groups] == rates[recorded.step] and recorded.batch_size == 24
        for k, group in enumerate(recorded.groups):
            assert group.lr_sum == pytest.approx(sum(rates[s][k] for s in range(1, recorded.step + 1)))
            own = optimizer.param_groups[k]
            assert (group.momentum, group.weight_decay) == (own.get("momentum", 0.0), own.get("weight_decay", 0.0))


def test_the_model_and_the_optimiser_are_left_as_they_were(tmp_path: Path) -> None:
    plain, recorded = net(), net()
    for model in (plain, recorded):
        optimizer = sgd(model)
        if model is recorded:
            with ptif.Recorder(model, optimizer, tmp_path):
                list(train(model, optimizer, 30))
        else:
            list(train(model, optimizer, 30))
        assert not optimizer._optimizer_step_pre_hooks and not optimizer._optimizer_step_post_hooks
    assert all(torch.equal(a, b) for a, b in zip(copy(plain).values(), copy(recorded).values(), strict=True))


# --------------------------------------------------------------------------- mixed precision


@pytest.mark.parametrize("fused", [False, True])
def test_a_step_that_the_scaler_leaves_out_is_not_counted(fused: bool, tmp_path: Path) -> None:
    """Fused optimisers are called nevertheless, and leave it out themselves."""
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, fused=fused)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    taken, seen = 0, {}
    with ptif.Recorder(model, optimizer, tmp_path, at=(0.2, 0.4, 1.0), steps=10) as recording:
        for step in range(1, 15):
            x, y = data(step)
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(model(x), y)
            scaler.scale(loss * (math.inf if step % 4 == 2 else 1.0)).backward()
            before = copy(model)
            scaler.step(optimizer)
            scaler.update()
            moved = any(not torch.equal(v, before[k]) for k, v in model.named_parameters())
            taken += moved
            seen[taken] = copy(model)
    assert taken == recording.step == 10
    for recorded in recording.recording.recorded:
        kept = load_checkpoint(recorded.weights)
        assert all(torch.equal(kept[k], seen[recorded.step][k].detach()) for k, _ in model.named_parameters())
    assert recording.recording.steps == ptif.Recording.open(recording).steps == (2, 4, 10)


# --------------------------------------------------------------------------- the schedule


@settings(max_examples=60, deadline=None)
@given(steps=st.integers(1, 5000), most=st.integers(2, 12))
def test_at_any_step_the_kept_ones_are_within_a_factor_of_two(steps: int, most: int) -> None:
    schedule, kept = Doubling(most), []
    for step in range(1, steps + 1):
        if schedule.wants(step):
            kept = schedule.keep([*kept, step])
    ended = schedule.keep([*kept, steps] if kept[-1] < steps else kept)
    for at_the_end in (kept, ended):
        assert len(at_the_end) <= most
        assert all(a < b <= 2 * a for a, b in pairwise(at_the_end))
        # What was thinned out is early: the first that is left stands at most at this share of the run.
        assert at_the_end[0] == 1 or at_the_end[0] <= steps / 2 ** (most - 2)
    assert kept[-1] >= steps / 2 ** (1 / 4) - 1


@settings(max_examples=60, deadline=None)
@given(steps=st.integers(1, 100_000), shares=st.lists(st.floats(0, 1), min_size=1, max_size=9))
def test_shares_are_of_the_announced_length(steps: int, shares: list[float]) -> None:
    targets = SharesOfRun(tuple(shares), steps).targets
    assert list(targets) == sorted(set(targets)) and targets[-1] <= steps and len(targets) <= len(shares)
    for share in shares:
        assert min(abs(t - share * steps) for t in targets) <= (0.5 if share * steps >= 0.5 else 1.0)
    assert (0 in targets) == (0.0 in shares)


def test_the_weights_before_the_first_step_are_kept_where_asked_for(tmp_path: Path) -> None:
    model = net()
    start, optimizer = copy(model), sgd(model)
    with ptif.Recorder(model, optimizer, tmp_path, at=(0, 0.5, 1), steps=4) as recording:
        list(train(model, optimizer, 4))
    assert recording.recording.steps == (0, 2, 4)
    kept = load_checkpoint(recording.recording.checkpoints[0])
    assert all(torch.equal(kept[k], v) for k, v in start.items())
    assert recording.recording.stretches == (0, 2, 2)
    assert [len(s.checkpoint_tuple) for s in recording.recording.segments(2)] == [1, 1]  # nothing led to the start


# --------------------------------------------------------------------------- what is stored


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", torch.float16])
def test_half_precision_rounds_once_and_never_overflows(dtype: Any, tmp_path: Path) -> None:
    model = net()
    with torch.no_grad():
        model[0].bias.fill_(1e5)  # type: ignore[operator, union-attr]
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0)
    with ptif.Recorder(model, optimizer, tmp_path, steps=2, at=(1.0,), dtype=dtype) as recording:
        list(train(model, optimizer, 2))
    kept, own = load_checkpoint(recording.recording.checkpoints[0]), copy(model)
    narrow = getattr(torch, dtype) if isinstance(dtype, str) else dtype
    for name, value in own.items():
        fits = value.is_floating_point() and not (name == "0.bias" and narrow is torch.float16)
        assert torch.equal(kept[name], value.to(narrow) if fits else value)
    file = recording.recording.recorded[0].second_moments
    moments, _ = recorder_moments(file)
    assert {v.dtype for v in moments.values()} == {torch.bfloat16}


def recorder_moments(file: Any) -> Any:
    from pytorch_influence_functions.core.files import read_tensors

    return read_tensors(file, "second moments")


def test_adams_second_moments_are_those_that_source_takes(tmp_path: Path) -> None:
    model = net().double()
    optimizer = adamw(model)
    with ptif.Recorder(model, optimizer, tmp_path, steps=20, at=(0.5, 1.0)) as recording:
        for step, _ in train_double(model, optimizer, 20):
            if step == 20:
                state = ptif.trajectory.AdamState.of(optimizer, model)
    first, last = recording.recording.segments(2)
    assert last.adam is not None and first.adam is not None
    assert (last.adam.eps, last.adam.decay) == (1e-8, 0.1)
    assert (last.lr, last.steps) == (pytest.approx(0.01), 10)
    for name, moment in state.second_moments.items():
        torch.testing.assert_close(last.adam.second_moments[name], moment)
    assert not torch.allclose(first.adam.second_moments["3.weight"], state.second_moments["3.weight"])
    x, y = data(1)
    problem = ptif.Problem(model, ptif.CrossEntropy(), (x.double(), y))
    assert SOURCE([first, last]).fit(problem).score((x[:2].double(), y[:2])).shape == (2, 8)


def train_double(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int) -> Iterator[tuple[int, None]]:
    for step in range(1, steps + 1):
        x, y = data(step)
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x.double()), y).backward()
        optimizer.step()
        yield step, None


def test_shared_weights_are_kept_once_and_frozen_ones_too(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3), nn.Linear(3, 2))
    model[1].weight = model[0].weight  # type: ignore[union-attr]
    model[2].weight.requires_grad_(False)  # type: ignore[union-attr, operator]
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    with ptif.Recorder(model, optimizer, tmp_path, steps=1) as recording:
        list(train(model, optimizer, 1))
    kept = load_checkpoint(recording.recording.checkpoints[0], model)
    assert set(kept) == set(copy(model)) - {"1.weight"}
    assert all(torch.equal(v, copy(model)[k]) for k, v in kept.items())


def test_wrapped_models_are_recorded_by_the_names_inside(tmp_path: Path) -> None:
    model = nn.DataParallel(net())
    optimizer = sgd(model)
    with ptif.Recorder(model, optimizer, tmp_path, steps=1) as recording:
        list(train(model, optimizer, 1))
    assert set(load_checkpoint(recording.recording.checkpoints[0])) == set(net().state_dict())


# --------------------------------------------------------------------------- bounds


def test_the_bound_on_bytes_lowers_the_count(tmp_path: Path) -> None:
    model = net()
    each = sum(v.numel() * v.element_size() for v in model.state_dict().values())
    optimizer = sgd(model)
    with ptif.Recorder(model, optimizer, tmp_path, most_bytes=3 * each + 1) as recording:
        list(train(model, optimizer, 100))
    assert recording.recording.steps == (32, 64, 100)
    assert len(list(tmp_path.glob("*.safetensors"))) == 3
    for options, needed in (({}, 2), ({"steps": 100}, 8)):
        with pytest.raises(InvalidInput, match=rf"^One checkpoint takes 0\.0 MiB and most_bytes=.* not for {needed};"):
            ptif.Recorder(model, optimizer, tmp_path / "b", most_bytes=each, **options).begin()  # type: ignore[arg-type]


def test_a_full_disk_ends_the_recording_and_not_the_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, written = net(), []

    def full(path: Any, *rest: Any) -> None:
        if len(written) == 2:
            raise InvalidInput("'x' cannot be written to (No space left on device); give another place.")
        written.append(path)
        original(path, *rest)

    original = recorder.write_tensors
    monkeypatch.setattr(recorder, "write_tensors", full)
    optimizer = sgd(model)
    stopped = pytest.warns(TrainingDataWarning, match=r"^Recording stopped at step 3: 'x' cannot be written to")
    with stopped, ptif.Recorder(model, optimizer, tmp_path):
        assert len(list(train(model, optimizer, 10))) == 10
    run = ptif.Recording.open(tmp_path)
    assert run.steps == (1, 2) and not run.finished


# --------------------------------------------------------------------------- the end, and going on


def test_an_exception_between_steps_keeps_the_last_one(tmp_path: Path) -> None:
    model = net()
    optimizer = sgd(model)
    with pytest.raises(KeyboardInterrupt), ptif.Recorder(model, optimizer, tmp_path, steps=100):
        for step, weights in train(model, optimizer, 100):  # noqa: B007
            if step == 37:
                raise KeyboardInterrupt
    run = ptif.Recording.open(tmp_path)
    assert run.steps == (2, 5, 10, 20, 37) and not run.finished and "unfinished" in repr(run)
    assert all(torch.equal(v, weights[k]) for k, v in load_checkpoint(run.checkpoints[-1]).items())
    assert "of a training that had not come to its end" in run.describe()


def test_an_exception_within_a_step_keeps_the_one_before_it(tmp_path: Path) -> None:
    class Breaking(torch.optim.SGD):
        def step(self, closure: Any = None) -> Any:
            super().step(closure)
            raise RuntimeError

    model = net()
    optimizer = Breaking(model.parameters(), lr=0.1)
    with pytest.raises(RuntimeError), ptif.Recorder(model, optimizer, tmp_path) as recording:
        list(train(model, optimizer, 5))
    assert recording.step <= 1


@pytest.mark.parametrize("make", [sgd, adamw])
def test_a_resumed_training_goes_on(make: Any, tmp_path: Path) -> None:
    """Stopped at step 37, resumed from the recorded step 20: as if it had never stopped."""
    model, seen = net(), {}
    optimizer = make(model)
    states = {}
    with pytest.raises(KeyboardInterrupt), ptif.Recorder(model, optimizer, tmp_path, steps=100):
        for step, _ in train(model, optimizer, 100):
            states[step] = copy(model), json_like(optimizer.state_dict())
            if step == 37:
                raise KeyboardInterrupt
    again = net()
    again.load_state_dict(states[20][0])
    optimizer = make(again)
    optimizer.load_state_dict(states[20][1])
    with ptif.Recorder(again, optimizer, tmp_path, steps=100) as recording:
        assert recording.step == 20 and recording.recording.steps == (2, 5, 10, 20)
        for step, weights in train(again, optimizer, 100, first=20):
            seen[step] = weights
    run = ptif.Recording.open(tmp_path)
    assert run.steps == (2, 5, 10, 20, 40, 70, 100) and run.finished
    assert run.learning_rates == pytest.approx([optimizer.param_groups[0]["lr"]] * 7)
    straight = net()
    optimizer = make(straight)
    whole = dict(train(straight, optimizer, 100))
    for recorded in run.recorded:
        assert all(torch.equal(v, whole[recorded.step][k]) for k, v in load_checkpoint(recorded.weights).items())


def json_like(state: dict[str, Any]) -> dict[str, Any]:
    import copy as copying

    return copying.deepcopy(state)


def test_where_a_resumed_training_stands(tmp_path: Path) -> None:
    model = net()
    optimizer = adamw(model)
    with ptif.Recorder(model, optimizer, tmp_path, steps=50):
        list(train(model, optimizer, 50))
    list(train(model, optimizer, 53, first=50))  # not recorded: Adam itself has counted
    with ptif.Recorder(model, optimizer, tmp_path, steps=100) as recording:
        assert recording.step == 53
    moved = net()
    with torch.no_grad():
        moved[0].weight += 1  # type: ignore[operator, union-attr]
    with pytest.raises(
        InvalidInput,
        match=r"holds a recorded run up to step 53, and the model's weights are none of its checkpoints; give start=",
    ):
        ptif.Recorder(moved, sgd(moved), tmp_path).begin()
    with ptif.Recorder(moved, sgd(moved), tmp_path, start=10) as recording:
        assert recording.recording.steps == (1, 2, 5, 10)
    with ptif.Recorder(moved, optimizer := sgd(moved), tmp_path, overwrite=True) as recording:
        list(train(moved, optimizer, 1))
    assert recording.recording.steps == (1,) and len(list(tmp_path.glob("step-*"))) == 1


def test_a_training_that_starts_anew_does_not_go_on_with_another_run(tmp_path: Path) -> None:
    """A warmup's first rate is 0, so the weights after that step are those of every start."""

    def run(**options: Any) -> ptif.Recorder:
        again = nn.Sequential(nn.Linear(3, 2))
        again.load_state_dict(start)
        optimizer = sgd(again)
        with ptif.Recorder(again, optimizer, tmp_path, steps=6, **options) as recording:
            for step in range(recording.step, 6):
                optimizer.param_groups[0]["lr"] = 0.1 * step
                optimizer.zero_grad()
                x, y = data(step)
                nn.functional.cross_entropy(again(x), y).backward()
                optimizer.step()
        return recording

    start = nn.Sequential(nn.Linear(3, 2)).state_dict()
    first = run()
    identities = [r.identity for r in first.recording.recorded]
    assert first.recording.recorded[0].unmoved and not first.recording.recorded[-1].unmoved
    match = r"holds a recorded run up to step 6, and this training starts anew; give start= .* overwrite=True to"
    for options in ({}, {"start": 0}):
        with pytest.raises(InvalidInput, match=match):
            run(**options)
    assert [r.identity for r in ptif.Recording.open(tmp_path).recorded] == identities
    assert run(start=2).step == 6
    assert run(start=0, overwrite=True).recording.steps == first.recording.steps
    start = load_checkpoint(first.recording.checkpoints[1])  # step 2, whose weights have moved: found by them
    assert first.recording.steps[1] == 2 and run().recording.steps == first.recording.steps


@pytest.mark.parametrize("name", [n for n in dir(torch.optim) if isinstance(getattr(torch.optim, n), type)])
def test_every_optimiser_of_torch_is_recorded(name: str, tmp_path: Path) -> None:
    """Also one with a pair for eps, without rates or with other settings than Adam's."""
    if name == "Optimizer":
        return
    sparse = name == "SparseAdam"
    model = nn.Sequential(nn.Embedding(5, 3, sparse=sparse), nn.Flatten(), nn.Linear(6, 2, bias=False))
    optimizer = getattr(torch.optim, name)([model[0].weight] if sparse else list(model.parameters()))

    def loss() -> Tensor:
        optimizer.zero_grad()
        value = nn.functional.cross_entropy(model(torch.tensor([[0, 1], [2, 3]])), torch.tensor([0, 1]))
        value.backward()
        return value

    with ptif.Recorder(model, optimizer, tmp_path, steps=2) as recording:
        for _ in range(2):
            optimizer.step(loss)
    assert recording.recording.steps == (1, 2)
    assert recording.recording.recorded[-1].groups[0].lr == pytest.approx(float(optimizer.defaults["lr"]))


def test_what_cannot_be_recorded_does_not_end_the_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = net()
    optimizer = sgd(model)
    optimizer.param_groups[0] |= {"eps": (None, 1e-3), "betas": (0.9, 0.99, 0.999), "weight_decay": torch.tensor(0.1)}
    with ptif.Recorder(model, optimizer, tmp_path, steps=2) as recording:
        list(train(model, optimizer, 1))
        (group,) = recording.recording.recorded[0].groups
        assert (group.eps, group.beta2, group.weight_decay) == (None, None, pytest.approx(0.1))
        optimizer.param_groups[0]["lr"] = None  # as Adafactor's, which finds its own
        recording._after_step(optimizer)
    assert recording.recording.recorded[-1].groups == ()
    model = net()
    monkeypatch.setattr(ptif.Recorder, "_groups", lambda self: {}["what"])
    stopped = pytest.warns(TrainingDataWarning, match=r"Recording stopped at step 1: KeyError: 'what'")
    with ptif.Recorder(model, optimizer := sgd(model), tmp_path, steps=2, overwrite=True), stopped:
        list(train(model, optimizer, 2))


KILLED = """
import os, random, signal, sys, time
import torch
from torch import nn
import pytorch_influence_functions as ptif
from pytorch_influence_functions.problem.checkpoints import load_checkpoint
from tests.laws.test_recorder import net, data

folder, counter, steps, kills = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])

def child():
    torch.set_num_threads(1)
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    if os.path.exists(os.path.join(folder, "recording.json")):
        try:
            run = ptif.Recording.open(folder)
        except ptif.errors.InvalidInput as error:
            assert "at least one checkpoint" in str(error), error
        else:
            model.load_state_dict(load_checkpoint(run.checkpoints[-1], model))
    file = os.open(counter, os.O_WRONLY | os.O_CREAT)
    with ptif.Recorder(model, optimizer, folder) as recorder:
        while recorder.step < steps:
            x, y = data(recorder.step + 1)
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x), y).backward()
            optimizer.step()
            os.pwrite(file, recorder.step.to_bytes(8, "little"), 0)

random.seed(0)
done = 0
while True:
    pid = os.fork()
    if pid == 0:
        try:
            child()
        except BaseException:
            import traceback
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    if done < kills:
        time.sleep(random.uniform(0.02, 0.35))
        os.kill(pid, signal.SIGKILL)
    _, status = os.waitpid(pid, 0)
    if os.WIFEXITED(status):
        assert os.WEXITSTATUS(status) == 0
        print(done)
        break
    done += 1
    reached = int.from_bytes(open(counter, "rb").read(8), "little") if os.path.exists(counter) else 0
    if not os.path.exists(os.path.join(folder, "recording.json")) or reached < 1:
        continue
    kept = ptif.Recording.open(folder)
    assert kept.steps[-1] >= reached / 2 - 1, (kept.steps, reached)
    assert all(b <= 2 * a for a, b in zip(kept.steps, kept.steps[1:])), kept.steps
    for path in kept.checkpoints:
        load_checkpoint(path)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="needs fork and SIGKILL")
def test_killed_at_random_moments_it_goes_on_and_ends_as_if_never_killed(tmp_path: Path) -> None:
    """12 kills by SIGKILL, or 25, each followed by a training that goes on from the last recorded step."""
    root, (steps, kills) = Path(__file__).parents[2], (40_000, 25) if FULL else (15_000, 12)
    command = [sys.executable, "-c", KILLED, str(tmp_path / "run"), str(tmp_path / "counter"), str(steps), str(kills)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=root, timeout=300)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) >= 0.75 * kills
    run = ptif.Recording.open(tmp_path / "run")
    assert run.finished and run.steps[-1] == steps
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    files = {f.name for f in (tmp_path / "run").iterdir()}
    assert files == {"recording.json", *(Path(str(c)).name for c in run.checkpoints)}
    wanted = set(run.steps[:3])
    for step, weights in train(model, optimizer, max(wanted)):
        if step in wanted:
            kept = load_checkpoint(run.checkpoints[run.steps.index(step)])
            assert all(torch.equal(v, weights[k]) for k, v in kept.items())


# --------------------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"at": (0.5,)}, r"^Recorder\(at=\.\.\.\) gives shares of a run whose length is not known; give steps= too"),
        ({"at": (0.5, 2), "steps": 9}, r"^A share in at= is 2; it must be a number from 0 to 1\.$"),
        ({"at": (), "steps": 9}, r"^Recorder\(at=\(\)\) records nothing; give at least one share"),
        ({"at": 3, "steps": 9}, r"^Recorder\(at=3\) must be shares of the run"),
        ({"steps": 0}, r"^Recorder\(steps=0\) must be a whole number of at least 1; the optimiser steps"),
        ({"most": 1}, r"^Recorder\(most=1\) must be a whole number of at least 2; 8 is usual\.$"),
        ({"dtype": "int8"}, r"^Recorder\(dtype='int8'\) must be 'float16', 'bfloat16' or None\.$"),
        ({"start": -1}, r"^Recorder\(start=-1\) must be a whole number of at least 0\.$"),
        ({"most_bytes": "much"}, r"^memory='much' is no amount of memory"),
        ({"optimizer": 3}, r"^Recorder takes the torch.optim.Optimizer that trains the model, got int\.$"),
        ({"model": 3}, r"^The model must be a torch.nn.Module, got int"),
        ({"model": nn.Linear(2, 1)}, r"^The optimiser holds no parameter of the model; pass the optimiser that"),
    ],
    ids=str,
)
def test_bad_settings_get_one_sentence(options: dict[str, Any], words: str, tmp_path: Path) -> None:
    model = net()
    parts: dict[str, Any] = {"model": model, "optimizer": sgd(model), "folder": tmp_path} | options
    with pytest.raises(InvalidInput, match=words):
        ptif.Recorder(**parts).begin()


def test_one_folder_has_one_recorder_at_a_time(tmp_path: Path) -> None:
    model = net()
    with locked(tmp_path), pytest.raises(InvalidInput, match=r"^Another process is writing to"):
        ptif.Recorder(model, sgd(model), tmp_path).begin()
    recording = ptif.Recorder(model, sgd(model), tmp_path)
    with recording, pytest.raises(InvalidInput, match=r"^This Recorder records already; make one for each training"):
        recording.begin()
    recording.end()  # a second end does nothing


def test_only_the_first_of_several_processes_records(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recorder, "process_rank", lambda: 1)
    model = net()
    optimizer = sgd(model)
    with ptif.Recorder(model, optimizer, tmp_path / "run"):
        list(train(model, optimizer, 3))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "damage",
    [
        lambda folder: (folder / "recording.json").write_text("{"),
        lambda folder: (folder / "recording.json").write_text("[]"),
        lambda folder: edit(folder, lambda m: m.pop("checkpoints")),
        lambda folder: edit(folder, lambda m: m.update(format=99)),
        lambda folder: edit(folder, lambda m: m["checkpoints"][0].update(step="first")),
    ],
)
def test_a_damaged_record_gets_one_sentence(damage: Any, tmp_path: Path) -> None:
    recorded(tmp_path)
    damage(tmp_path)
    with pytest.raises(InvalidInput, match=r"recording.json' cannot be read as the record of a training run \("):
        ptif.Recording.open(tmp_path)


def recorded(folder: Path) -> ptif.Recording:
    model = net()
    optimizer = sgd(model)
    with ptif.Recorder(model, optimizer, folder) as recording:
        list(train(model, optimizer, 5))
    return recording.recording


def edit(folder: Path, change: Any) -> None:
    manifest = json.loads((folder / "recording.json").read_text())
    change(manifest)
    (folder / "recording.json").write_text(json.dumps(manifest))


def test_flipped_bits_are_noticed_when_the_weights_are_loaded(tmp_path: Path) -> None:
    run = recorded(tmp_path)
    path = Path(str(run.checkpoints[0]))
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(bytes(content))
    with pytest.raises(
        InvalidInput, match=r"is damaged: its checksum is not that of its contents; record the run anew"
    ):
        load_checkpoint(run.checkpoints[0])


def test_a_manifest_does_not_point_out_of_its_folder(tmp_path: Path) -> None:
    recorded(tmp_path / "run")
    edit(tmp_path / "run", lambda m: m["checkpoints"][0].update(file="../elsewhere.safetensors"))
    assert Path(str(ptif.Recording.open(tmp_path / "run").checkpoints[0])).parent == tmp_path / "run"


def test_the_built_in_recipe_is_recorded_too(tmp_path: Path) -> None:
    from pytorch_influence_functions.evaluation import LinearDecay, Recipe, train_model

    x, y = torch.randn(20, 3, generator=torch.Generator().manual_seed(0)), torch.arange(20) % 2
    recipe = Recipe(net, lambda p: torch.optim.SGD(p, lr=0.1), 5, 5, LinearDecay(0.0), nn.CrossEntropyLoss())
    plain = train_model(recipe, (x, y), seed=3)
    for _ in range(2):  # another training there is replaced
        model = train_model(recipe, (x, y), seed=3, record=tmp_path, at=(0.5, 1.0))
        run = ptif.Recording.open(tmp_path)
        assert run.steps == (10, 20) and run.finished and run.recorded[0].batch_size == 5
        assert run.learning_rates == pytest.approx([0.1 * (1 - 4.5 / 20), 0.1 * (1 - 14.5 / 20)])
        for kept in (load_checkpoint(run.checkpoints[-1]), copy(plain)):
            assert all(torch.equal(v, copy(model)[k]) for k, v in kept.items())


def test_a_loss_with_weights_of_its_own_is_kept_with_the_model(tmp_path: Path) -> None:
    class Centres(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.centres = nn.Parameter(torch.randn(2, 2, generator=torch.Generator().manual_seed(0)))

        def forward(self, outputs: Tensor, targets: Tensor) -> Tensor:
            return nn.functional.cross_entropy(outputs @ self.centres.T, targets)

    model, loss = net(), Centres()
    optimizer = torch.optim.SGD([*model.parameters(), *loss.parameters()], lr=0.1)
    with ptif.Recorder(model, optimizer, tmp_path, steps=9, loss=loss) as recording:
        for step in range(9):
            x, y = data(step)
            optimizer.zero_grad()
            loss(model(x), y).backward()
            optimizer.step()
    kept = load_checkpoint(recording.recording.checkpoints[-1])
    assert torch.equal(kept.pop("loss.centres"), loss.centres) and kept.keys() == model.state_dict().keys()
    method = ptif.methods.along(tmp_path, ptif.methods.grad_dot())
    scores = method.fit(ptif.Problem(model, loss, data(1))).score(data(2))
    assert scores.diagnostics.members == 5 and not any("own weights" in n for n in scores.diagnostics.notes)
    with pytest.raises(InvalidInput, match=r"^Recorder\(loss=\.\.\.\) takes a torch.nn.Module with weights of its"):
        ptif.Recorder(model, optimizer, tmp_path / "b", loss=nn.functional.cross_entropy).begin()  # type: ignore[arg-type]
