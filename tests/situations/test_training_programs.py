"""Runs of other people's training programs: the Hugging Face Trainer on a small Llama, and Lightning."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import pytorch_influence_functions as ptif
from pytorch_influence_functions.problem.checkpoints import load_checkpoint
from pytorch_influence_functions.trajectory import lightning_callback, trainer_callback
from tests.tolerance import gap

# Whatever these programs warn of is theirs.
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]
LENGTH = 12


def llama() -> Any:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=40,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=32,
        tie_word_embeddings=True,
    )
    return transformers.LlamaForCausalLM(config)


def texts(n: int, seed: int = 0) -> list[dict[str, torch.Tensor]]:
    ids = torch.randint(0, 40, (n, LENGTH), generator=torch.Generator().manual_seed(seed))
    return [{"input_ids": row, "attention_mask": torch.ones_like(row), "labels": row.clone()} for row in ids]


def trainer(model: Any, folder: Path, recording: Path, **options: Any) -> Any:
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    settings = {"max_steps": 20, "per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, "save_steps": 5}
    settings |= {"learning_rate": 1e-2, "logging_steps": 1, "report_to": [], "use_cpu": True, "disable_tqdm": True}
    arguments = transformers.TrainingArguments(output_dir=str(folder), **(settings | options))
    return transformers.Trainer(model, arguments, train_dataset=texts(32), callbacks=[trainer_callback(recording)])


def test_the_trainers_callback_and_its_own_folder(tmp_path: Path) -> None:
    model = llama()
    trainer(model, tmp_path / "out", tmp_path / "run").train()
    run, own = ptif.Recording.open(tmp_path / "run"), ptif.Recording.open(tmp_path / "out")
    assert run.steps == (1, 2, 4, 8, 14, 20) and run.finished and run.recorded[0].batch_size == 8
    assert own.steps == (5, 10, 15, 20)
    for state in (load_checkpoint(r.checkpoints[-1], model) for r in (run, own)):
        assert all(torch.equal(v, model.state_dict()[k].cpu()) for k, v in state.items())
    # Linear decay from 1e-2: step k has 1e-2 (1 - (k - 1) / 20).
    assert [r.groups[0].lr for r in run.recorded] == pytest.approx([1e-2 * (1 - (s - 1) / 20) for s in run.steps])
    assert run.recorded[-1].groups[0].decoupled and run.recorded[-1].second_moments is not None
    options: dict[str, Any] = {"loss": ptif.TokenCrossEntropy(shift=True), "batch_size": 8}
    for recorded in (run, tmp_path / "out"):
        scores = ptif.attribute(model, texts(32), texts(3, seed=1), run=recorded, **options)
        assert scores.shape == (3, 32) and scores.diagnostics.members == (6 if recorded is run else 4)
        assert not any("own weights" in note for note in scores.diagnostics.notes)


def test_the_trainer_resumes_and_the_recording_goes_on(tmp_path: Path) -> None:
    whole, broken = llama(), llama()
    trainer(whole, tmp_path / "a", tmp_path / "run a").train()
    first = trainer(broken, tmp_path / "b", tmp_path / "run b", save_total_limit=5)
    first.add_callback(stop_at(12))
    first.train()
    assert not ptif.Recording.open(tmp_path / "run b").finished
    again = llama()
    trainer(again, tmp_path / "b", tmp_path / "run b").train(resume_from_checkpoint=str(tmp_path / "b/checkpoint-10"))
    one, other = (ptif.Recording.open(tmp_path / name) for name in ("run a", "run b"))
    assert one.steps == other.steps and other.finished
    for a, b in zip(one.checkpoints, other.checkpoints, strict=True):
        for name, value in load_checkpoint(a).items():
            assert gap(load_checkpoint(b)[name], value) < 1e-5


def stop_at(step: int) -> Any:
    transformers = pytest.importorskip("transformers")

    class Stop(transformers.TrainerCallback):  # type: ignore[misc, name-defined]
        def on_step_end(self, args: Any, state: Any, control: Any, **parts: Any) -> None:
            control.should_training_stop = state.global_step >= step

    return Stop()


def lightning() -> Any:
    for name in ("lightning.pytorch", "pytorch_lightning"):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                return __import__(name, fromlist=["Trainer"])
            except ImportError:
                continue
    return pytest.skip("lightning is not installed")


def lit_model(library: Any) -> Any:
    class Net(library.LightningModule):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.net = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 2))

        def forward(self, x: torch.Tensor) -> Any:
            return self.net(x)

        def training_step(self, batch: Any, index: int) -> Any:
            return nn.functional.cross_entropy(self(batch[0]), batch[1])

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)

    return Net()


def test_lightnings_callback_and_its_own_files(tmp_path: Path) -> None:
    library = lightning()
    model = lit_model(library)
    x, y = torch.randn(40, 3, generator=torch.Generator().manual_seed(0)), torch.arange(40) % 2
    saving = library.callbacks.ModelCheckpoint(dirpath=tmp_path / "own", every_n_train_steps=10, save_top_k=-1)
    runner = library.Trainer(
        max_epochs=5, accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False,
        accumulate_grad_batches=2, callbacks=[lightning_callback(tmp_path / "run"), saving],
    )  # fmt: skip
    runner.fit(model, DataLoader(TensorDataset(x, y), batch_size=4))
    run, own = ptif.Recording.open(tmp_path / "run"), ptif.Recording.open(tmp_path / "own")
    assert run.steps == (1, 2, 5, 10, 18, 25) and run.finished and runner.global_step == 25
    assert own.steps == (10, 20) and own.learning_rates == (0.1, 0.1)
    for inner in (model, model.net):  # the names of the module, and those of the network inside it
        kept, theirs = (load_checkpoint(r.checkpoints[r.steps.index(10)], inner) for r in (run, own))
        assert all(torch.equal(kept[k], v) for k, v in theirs.items())
    scores = ptif.attribute(model.net, (x, y), (x[:2], y[:2]), run=tmp_path / "run")
    assert scores.diagnostics.members == 6 and not any("own weights" in n for n in scores.diagnostics.notes)
