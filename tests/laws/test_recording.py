"""Reading runs: what other programs have kept, lists of checkpoints, and what is known of the steps between them."""

from __future__ import annotations

import json
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

import pytorch_influence_functions as ptif
from pytorch_influence_functions.core.errors import InvalidInput, MissingExtra, TrainingDataWarning
from pytorch_influence_functions.problem.checkpoints import load_checkpoint
from pytorch_influence_functions.trajectory import callbacks, lightning_callback, trainer_callback

Weights = dict[str, Tensor]


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))


def weights(seed: int) -> Weights:
    generator = torch.Generator().manual_seed(seed)
    return {k: torch.randn(v.shape, generator=generator) for k, v in net().state_dict().items()}


def same(run: ptif.Recording, seeds: tuple[int, ...]) -> bool:
    loaded = [load_checkpoint(c, net()) for c in run.checkpoints]
    return len(loaded) == len(seeds) and all(
        torch.equal(state[k], v) for state, seed in zip(loaded, seeds, strict=True) for k, v in weights(seed).items()
    )


# --------------------------------------------------------------------------- Hugging Face Trainer


def trainer_folder(folder: Path, steps: tuple[int, ...] = (10, 30, 100)) -> Path:
    """As a Trainer writes it: one folder per checkpoint, with the log so far in each."""
    for step in steps:
        path = folder / f"checkpoint-{step}"
        path.mkdir(parents=True)
        save_file(weights(step), path / "model.safetensors", metadata={"format": "pt"})
        log = [{"step": s, "learning_rate": 1e-3 / s, "loss": 1.0} for s in range(10, step + 1, 10)]
        log.append({"step": step, "train_runtime": 1.0})
        state = {"global_step": step, "log_history": log, "train_batch_size": 16, "max_steps": 100}
        (path / "trainer_state.json").write_text(json.dumps(state))
    (folder / "runs").mkdir()
    return folder


def test_a_trainers_folder_is_read_in_the_order_of_training(tmp_path: Path) -> None:
    run = ptif.Recording.open(trainer_folder(tmp_path))
    assert run.steps == (10, 30, 100) and same(run, (10, 30, 100)) and run.recorded[0].batch_size == 16
    rates = [1e-3 / s for s in range(10, 101, 10)]
    assert run.learning_rates == pytest.approx([rates[0], sum(rates[1:3]) / 2, sum(rates[3:]) / 7])
    problem = ptif.Problem(net(), ptif.CrossEntropy(), (torch.randn(9, 3), torch.arange(9) % 2))
    queries = (torch.randn(2, 3), torch.arange(2))
    scores = ptif.methods.along(tmp_path).fit(problem).score(queries)
    assert scores.diagnostics.members == 3
    want = ptif.methods.along([weights(s) for s in (10, 30, 100)]).fit(problem).score(queries)
    torch.testing.assert_close(scores.values, want.values)


def test_several_files_of_one_model_are_joined(tmp_path: Path) -> None:
    trainer_folder(tmp_path, (10, 20))
    path = tmp_path / "checkpoint-20"
    (path / "model.safetensors").unlink()
    parts: list[Weights] = [{}, {}]
    for k, (name, value) in enumerate(weights(20).items()):
        parts[k % 2][name] = value
    names = [f"model-0000{k + 1}-of-00002.safetensors" for k in range(2)]
    for file, part in zip(names, parts, strict=True):
        save_file(part, path / file)
    where = {name: file for file, part in zip(names, parts, strict=True) for name in part}
    (path / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))
    assert same(ptif.Recording.open(tmp_path), (10, 20))


def test_a_trainers_optimiser_is_read_without_running_code(tmp_path: Path) -> None:
    trainer_folder(tmp_path, (10, 20))
    model = net()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4, weight_decay=0.1)
    torch.save(optimizer.state_dict(), tmp_path / "checkpoint-10" / "optimizer.pt")
    torch.save(Trap(tmp_path / "sprung"), tmp_path / "checkpoint-20" / "optimizer.pt")
    run = ptif.Recording.open(tmp_path)
    (group,) = run.recorded[0].groups
    assert (group.lr, group.weight_decay, group.decoupled, group.beta2, group.eps) == (3e-4, 0.1, True, 0.999, 1e-8)
    assert run.recorded[1].groups[0].lr == pytest.approx(1e-3 / 20) and not (tmp_path / "sprung").exists()


class Trap:
    """Writes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


def test_weights_are_never_unpickled(tmp_path: Path) -> None:
    trainer_folder(tmp_path, (10,))
    path = tmp_path / "checkpoint-10"
    (path / "model.safetensors").unlink()
    torch.save(Trap(tmp_path / "sprung"), path / "pytorch_model.bin")
    run = ptif.Recording.open(tmp_path)
    with pytest.raises(InvalidInput, match=r"holds Python objects besides tensors, or is damaged, and is not"):
        load_checkpoint(run.checkpoints[0])
    torch.save({"state_dict": Trap(tmp_path / "sprung"), "global_step": 1}, tmp_path / "a.ckpt")
    with pytest.raises(InvalidInput, match=r"a\.ckpt' cannot be read without running code"):
        ptif.Recording.open(tmp_path / "a.ckpt")
    assert not (tmp_path / "sprung").exists()
    torch.save(weights(10), path / "pytorch_model.bin")
    assert same(ptif.Recording.open(tmp_path), (10,))


def test_a_folder_without_weights_is_no_checkpoint(tmp_path: Path) -> None:
    trainer_folder(tmp_path, (10,))
    (tmp_path / "checkpoint-10" / "model.safetensors").rename(tmp_path / "checkpoint-10" / "other.safetensors")
    with pytest.raises(InvalidInput, match=r"checkpoint-10' holds no weights \(model.safe"):
        ptif.Recording.open(tmp_path)
    with pytest.raises(InvalidInput, match=r"checkpoint-10' is a folder without weights .*; give the path"):
        load_checkpoint(tmp_path / "checkpoint-10")


# --------------------------------------------------------------------------- Lightning


def lightning_file(path: Path, step: int, **extra: Any) -> None:
    """As Lightning writes it: names of the LightningModule's, and the states of its optimisers."""
    optimizer = torch.optim.SGD(net().parameters(), lr=1 / step, momentum=0.9)
    state = {f"model.{k}": v for k, v in weights(step).items()}
    content = {"epoch": 1, "global_step": step, "pytorch-lightning_version": "2.4", "state_dict": state}
    torch.save(content | {"optimizer_states": [optimizer.state_dict()]} | extra, path)


def test_lightnings_checkpoints_are_read_in_the_order_of_training(tmp_path: Path) -> None:
    for name, step in (("epoch=1.ckpt", 40), ("epoch=0.ckpt", 20), ("last.ckpt", 40)):
        lightning_file(tmp_path / name, step)
    run = ptif.Recording.open(tmp_path)
    assert run.steps == (20, 40) and same(run, (20, 40))
    assert run.learning_rates == (1 / 20, 1 / 40) and run.segments(1)[0].momentum == 0.9
    assert same(ptif.Recording.open(tmp_path / "last.ckpt"), (40,))
    lightning_file(tmp_path / "weights_only.ckpt", 60, optimizer_states=[])
    assert ptif.Recording.open(tmp_path).recorded[-1].groups == ()
    torch.save({"weights": 1}, tmp_path / "other.ckpt")
    with pytest.raises(InvalidInput, match=r"other\.ckpt' holds no state_dict with its global_step; give checkpoints"):
        ptif.Recording.open(tmp_path)


# --------------------------------------------------------------------------- lists


def test_a_list_of_states_is_a_run() -> None:
    states = [weights(k) for k in range(4)]
    run = ptif.Recording.of(states, steps=[5, 10, 40, 100], lr=[0.1, 0.1, 0.05, 0.01])
    assert run.shares == (0.05, 0.1, 0.4, 1.0) and run.stretches == (5, 5, 30, 60) and same(run, (0, 1, 2, 3))
    assert run.learning_rates == pytest.approx((0.1, 0.1, 0.05, 0.01))
    assert [s.lr for s in run.segments(2)] == pytest.approx([0.1, (30 * 0.05 + 60 * 0.01) / 90])
    assert run.at([0.08, 0.11, 1]).steps == (10, 100) and ptif.Recording.open(run) is run
    assert repr(ptif.Recording.open(states)) == "Recording(4 checkpoints at steps 1, 2, 3, 4)"
    assert ptif.Recording.of(states, lr=0.3).learning_rates == pytest.approx((0.3,) * 4)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda s: ptif.Recording.of([]), r"^run= holds no checkpoint; give at least one state dict or path\.$"),
        (lambda s: ptif.Recording.of([3]), r"^run must be state dicts \(tensors by name\) or paths, not int"),
        (lambda s: ptif.Recording.of([s[0], dict(s[0])]), r"^Checkpoints 1 and 2 are the same tensors in memory"),
        (
            lambda s: ptif.Recording.of(s, steps=[1]),
            r"^There are 2 checkpoints, 1 steps and 2 learning rates; give",
        ),
        (
            lambda s: ptif.Recording.of(s, steps=[2, 1]),
            r"^steps=\[2, 1\] must ascend; give checkpoints in the order of",
        ),
        (lambda s: ptif.Recording.of(s, lr=-1.0), r"^lr=-1.0 must be a finite number of at least 0\.$"),
        (
            lambda s: ptif.Recording.of(s).learning_rates,
            r"^The learning rate at step 1 is not known \(checkpoints that",
        ),
        (lambda s: ptif.Recording.of(s).at([]), r"^at\(\) got no share of the run; give at least one, such as 1\.0\.$"),
        (lambda s: ptif.Recording.of(s).at([2]), r"^A share is 2; it must be a number from 0 to 1\.$"),
        (lambda s: ptif.Recording.open("nowhere"), r"^There is no run at 'nowhere'; give the folder that a Recorder"),
    ],
)
def test_what_is_no_run_gets_one_sentence(make: Callable[[list[Weights]], Any], words: str) -> None:
    with pytest.raises(InvalidInput, match=words):
        make([weights(0), weights(1)])


def test_a_folder_without_a_run_gets_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match=r"holds no recorded run; expected the recording.json of a Recorder with at"):
        ptif.Recording.open(tmp_path)


def test_rates_that_differ_between_groups_are_not_averaged(tmp_path: Path) -> None:
    model = net()
    groups = [{"params": model[0].parameters(), "lr": 0.1}, {"params": model[2].parameters()}]
    optimizer = torch.optim.SGD(groups, lr=0.2)
    with ptif.Recorder(model, optimizer, tmp_path) as recorder:
        optimizer.step()
    with pytest.raises(InvalidInput, match=r"trained with different learning rates \(0\.1, 0\.2 up to step 1\), and"):
        _ = recorder.recording.learning_rates


def test_parameters_that_another_optimiser_trains_are_named_and_their_rates_not_invented(tmp_path: Path) -> None:
    model = net()
    model.register_parameter("unused", torch.nn.Parameter(torch.zeros(2)))  # trained by nobody, and so no one's concern
    first = torch.optim.SGD(model[0].parameters(), lr=0.5)
    second = torch.optim.Adam(model[2].parameters(), lr=0.005)
    with (
        pytest.warns(
            TrainingDataWarning, match=r"^Parameters '2.weight', '2.bias' move and are in no group of"
        ) as told,
        ptif.Recorder(model, first, tmp_path) as recorder,
    ):
        for step in range(4):
            model(torch.ones(2, 3)).square().sum().backward()
            if step > 0:
                second.step()
            first.step()
    assert len(told) == 1
    run = recorder.recording
    assert [r.others for r in run.recorded] == [(), *[("2.weight", "2.bias")] * (len(run) - 1)]
    words = (
        r"^Parameters '2.weight', '2.bias' move and are in no group .* one optimiser, in groups, or build the segments"
    )
    for ask in (lambda: run.learning_rates, lambda: run.segments(1)):
        with pytest.raises(InvalidInput, match=words):
            ask()
    assert len(run.checkpoints) == len(run)


def test_a_trained_part_of_a_model_has_its_rates(tmp_path: Path) -> None:
    model = net()
    optimizer = torch.optim.SGD(model[2].parameters(), lr=0.5)
    with ptif.Recorder(model, optimizer, tmp_path) as recorder:
        model(torch.ones(2, 3)).sum().backward()
        optimizer.step()
    assert recorder.recording.learning_rates == (0.5,)


def test_moments_that_were_not_kept_are_missed_by_source_only(tmp_path: Path) -> None:
    model = net()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
    with ptif.Recorder(model, optimizer, tmp_path, second_moments=False) as recorder:
        model(torch.randn(2, 3)).sum().backward()
        optimizer.step()
    assert len(list(tmp_path.glob("*.safetensors"))) == 1
    with pytest.raises(InvalidInput, match=r"^Adam's second moments at step 1 were not recorded, and they are needed"):
        recorder.recording.segments(1)


# --------------------------------------------------------------------------- callbacks


class Base:
    """Stands in for the class that the other library has."""


def arguments() -> Any:
    return types.SimpleNamespace(world_size=1, per_device_train_batch_size=4, gradient_accumulation_steps=2)


def test_the_trainers_callback_records_its_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", types.SimpleNamespace(TrainerCallback=Base))  # type: ignore[arg-type]
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    wrapped = types.SimpleNamespace(optimizer=optimizer)  # as accelerate does
    state = types.SimpleNamespace(max_steps=50, global_step=0, is_world_process_zero=True)
    callback = trainer_callback(tmp_path, at=(0.1, 1.0))
    assert isinstance(callback, Base)
    callback.on_train_begin(arguments(), state, None, model=model, optimizer=wrapped)
    for _ in range(50):
        optimizer.step()
        state.global_step += 1
    callback.on_train_end(arguments(), state, None)
    run = ptif.Recording.open(tmp_path)
    assert run.steps == (5, 50) and run.finished and run.recorded[0].batch_size == 8
    # Resumed by the Trainer from its own checkpoint at step 20.
    state.global_step = 20
    callback.on_train_begin(arguments(), state, None, model=model, optimizer=wrapped)
    assert callback.recorder.step == 20 and ptif.Recording.open(tmp_path).steps == (5,)
    callback.on_train_end(arguments(), state, None)
    assert not ptif.Recording.open(tmp_path).finished


def test_lightnings_callback_records_its_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = types.SimpleNamespace(Callback=Base)
    monkeypatch.setitem(sys.modules, "lightning", types.SimpleNamespace(pytorch=module))  # type: ignore[arg-type]
    monkeypatch.setitem(sys.modules, "lightning.pytorch", module)  # type: ignore[arg-type]
    for length, steps in ((4, (1, 2, 4)), (float("inf"), (1, 2, 4)), (-1, (1, 2, 4))):
        model = net()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        trainer = types.SimpleNamespace(
            is_global_zero=True, estimated_stepping_batches=length, global_step=0, optimizers=[optimizer]
        )
        folder = tmp_path / str(length)
        callback = lightning_callback(folder)
        callback.on_train_start(trainer, model)
        for _ in range(4):
            optimizer.step()
        if length == 4:
            callback.on_exception(trainer, model, KeyboardInterrupt())
        else:
            callback.on_train_end(trainer, model)
        run = ptif.Recording.open(folder)
        assert run.finished == (length != 4)
        assert run.steps == ((1, 2, 3, 4) if length == 4 else steps)


@pytest.mark.parametrize(
    ("make", "absent", "words"),
    [
        (trainer_callback, ("transformers",), r"^transformers is not installed; trainer_callback\(\) needs it: pip"),
        (
            lightning_callback,
            ("lightning", "lightning.pytorch", "pytorch_lightning"),
            r"^pytorch_lightning is not installed; lightning_callback\(\) needs it: pip install pytorch_lightning\.$",
        ),
    ],
)
def test_what_is_not_installed_is_said_in_one_line(
    make: Any, absent: tuple[str, ...], words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in absent:
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(MissingExtra, match=words):
        make(tmp_path)


def test_the_callbacks_import_nothing_before_they_are_asked() -> None:
    assert not {"transformers", "lightning", "pytorch_lightning"} & set(vars(callbacks))
