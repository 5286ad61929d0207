"""A task file without a loss: the checklist must say that the loss was inferred, not that it was given."""

from __future__ import annotations

from pathlib import Path

import pytest

import pytorch_influence_functions as ptif

pytest.importorskip("typer")

TASK = """
import torch

x, y = torch.randn(30, 4, generator=torch.Generator().manual_seed(0)), torch.arange(30) % 3

def get_model():
    torch.manual_seed(0)
    return torch.nn.Linear(4, 3)

def get_dataloaders():
    return (x[:24], y[:24]), (x[24:], y[24:])
"""
OPTIONS = "\ndef get_options():\n    return {'loss': torch.nn.CrossEntropyLoss()}\n"


@pytest.mark.parametrize(("text", "stated"), [(TASK, "inferred from outputs and targets"), (TASK + OPTIONS, "given")])
def test_the_loss_was_inferred_or_given(tmp_path: Path, text: str, stated: str) -> None:
    from typer.testing import CliRunner

    from pytorch_influence_functions import cli

    (tmp_path / "task.py").write_text(text)
    flags = ["--method", "grad_dot", "--block", "2", "--quiet", "--out", str(tmp_path / "results")]
    outcome = CliRunner().invoke(cli.build(), ["attribute", str(tmp_path / "task.py"), *flags])
    assert outcome.exit_code == 0, outcome.output
    scores = ptif.Scores.load(tmp_path / "results" / "scores.safetensors")
    assert f"CrossEntropy() ({stated})" in str(scores.diagnostics)
