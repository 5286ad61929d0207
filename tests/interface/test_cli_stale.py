"""The command line never shows an old answer: edited imports, mixed settings and damaged blocks are noticed."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import pytorch_influence_functions as ptif
from pytorch_influence_functions.cli import run as run_module
from pytorch_influence_functions.cli.folder import RunFolder
from pytorch_influence_functions.core.files import locked
from pytorch_influence_functions.core.fingerprint import Fingerprint
from tests.interface.cli_cases import QUERIES, Ran, task_file

NETWORK = """import torch
class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = torch.nn.Linear(6, 8), torch.nn.Linear(8, 2)

    def forward(self, x):
        return self.b(self.a(x).relu())

def measure(outputs, targets):
    return size(outputs[:, 0] - targets)

def size(x):
    return x.square()
"""
TASK = """import torch, my_network
g = torch.Generator().manual_seed(0)
x = torch.randn(40, 6, generator=g)
y = (x[:, 0] > 0).long()
def get_model(): return my_network.Net()
def get_dataloaders(): return (x, y), (x[:3], y[:3])
def get_options(): return {"measure": my_network.measure}
"""


@pytest.fixture
def task(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A task file that imports its model and its measure from a module beside it."""
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    monkeypatch.setattr(sys, "path", list(sys.path))
    (tmp_path / "my_network.py").write_text(NETWORK)
    (tmp_path / "task.py").write_text(TASK)
    return tmp_path / "task.py"


def attribute(task: Path, *more: Any) -> Ran:
    """The command as a process of its own would run it: nothing is imported yet."""
    sys.modules.pop("my_network", None)
    return Ran("attribute", task, "--method", "grad-dot", "--out", task.parent / "r", *more)


def edit(task: Path, before: str, after: str, name: str = "my_network.py") -> None:
    text = (task.parent / name).read_text()
    assert before in text
    (task.parent / name).write_text(text.replace(before, after))


@pytest.mark.parametrize(
    ("before", "after", "named"),
    [
        ("relu", "tanh", "model code"),
        ("self.a(x).relu()", "self.a(x).detach().relu()", "model code"),
        ("outputs[:, 0]", "outputs[:, 1]", "measure"),
        ("x.square()", "x.abs()", "measure"),
    ],
)
def test_an_edit_of_what_the_task_imports_is_noticed(task: Path, before: str, after: str, named: str) -> None:
    assert attribute(task, "--quiet").code == 0
    old = ptif.Scores.load(task.parent / "r/scores.safetensors").values
    edit(task, before, after)
    other = attribute(task, "--quiet")
    assert other.code == 2 and f"holds another run: it differs in {named}; give another --out" in other.sentence
    assert attribute(task, "--quiet", "--overwrite").code == 0
    assert not torch.allclose(ptif.Scores.load(task.parent / "r/scores.safetensors").values, old)


def test_comments_layout_and_what_is_not_used_do_not_count(task: Path) -> None:
    assert attribute(task, "--quiet").code == 0
    edit(task, "import torch", "# A comment.\n\n\nimport torch")
    edit(task, "    def forward", "    # What the model does.\n    def forward")
    edit(task, "def measure", "def unused():\n    return 3\n\ndef measure")
    edit(task, "g = torch", "# Another.\ng = torch", "task.py")
    assert attribute(task, "--json").found["resumed_queries"] == 3


def test_self_influence_is_computed_again_too(task: Path) -> None:
    def run(*more: Any) -> Ran:
        sys.modules.pop("my_network", None)
        return Ran("self-influence", task, "--method", "exact", "--out", task.parent / "r", "--quiet", *more)

    assert run().code == 0
    numbers = task.parent / "r/self_influence.safetensors"
    stamp = numbers.stat().st_mtime_ns
    assert run().code == 0 and numbers.stat().st_mtime_ns == stamp
    edit(task, "relu", "tanh")
    other = run()
    assert other.code == 2 and "differs in model code;" in other.sentence
    assert run("--overwrite").code == 0


def test_the_batch_size_does_not_stand_between_a_run_and_its_page(task: Path) -> None:
    assert attribute(task, "--quiet", "--batch-size", 7).code == 0
    sys.modules.pop("my_network", None)
    assert Ran("report", task.parent / "r", "--task", task, "--quiet").code == 0


@pytest.mark.parametrize(
    ("before", "after", "named"),
    [
        ("manual_seed(0)", "manual_seed(1)", "weights"),
        ("relu", "tanh", "model outputs"),
        ("x[:3]", "x[3:6]", "queries"),
    ],
)
def test_the_page_is_not_made_with_another_model(task: Path, before: str, after: str, named: str) -> None:
    assert attribute(task, "--quiet").code == 0
    edit(task, before, after, "task.py" if named == "queries" else "my_network.py")
    sys.modules.pop("my_network", None)
    other = Ran("report", task.parent / "r", "--task", task, "--quiet")
    assert other.code == 2 and f"The {named} of task.py are not those of the run" in other.sentence
    assert not (task.parent / "r/report.html").exists()
    edit(task, after, before, "task.py" if named == "queries" else "my_network.py")
    sys.modules.pop("my_network", None)
    assert Ran("report", task.parent / "r", "--task", task, "--quiet").code == 0


# --------------------------------------------------------------------------- blocks


def interrupted(task: Path, monkeypatch: pytest.MonkeyPatch, blocks: int, *more: Any) -> None:
    """A run that ends by Ctrl-C after so many blocks."""
    write = RunFolder.write_block
    written: list[int] = []

    def stop(self: RunFolder, first: int, last: int, scores: ptif.Scores) -> None:
        write(self, first, last, scores)
        written.append(first)
        if len(written) == blocks:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(RunFolder, "write_block", stop)
        assert Ran("attribute", task, "--block", 3, "--out", task.parent / "r", "--quiet", *more).code == 130
    assert len(written) == blocks


def test_blocks_of_two_settings_are_never_mixed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first run's block is put back among the second's, as two processes on one folder could do."""
    task, out = task_file(tmp_path), tmp_path / "r"
    interrupted(task, monkeypatch, 2, "--method", "grad-dot")
    foreign = (out / "blocks/000003-000006.safetensors").read_bytes()
    interrupted(task, monkeypatch, 1, "--method", "exact", "--overwrite")
    (out / "blocks/000003-000006.safetensors").write_bytes(foreign)
    ran = Ran("attribute", task, "--method", "exact", "--block", 3, "--out", out, "--json")
    assert ran.code == 0 and ran.found["resumed_queries"] == 3
    whole = Ran("attribute", task, "--method", "exact", "--block", 3, "--out", tmp_path / "whole", "--quiet")
    assert whole.code == 0
    mixed, clean = (ptif.Scores.load(tmp_path / n / "scores.safetensors").values for n in ("r", "whole"))
    torch.testing.assert_close(mixed, clean)


def test_other_settings_do_not_go_on_with_the_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    task = task_file(tmp_path)
    interrupted(task, monkeypatch, 1, "--method", "grad-dot")
    for more, named in ((("--damping", "0.5"), "method ("), (("--top", "3"), "top (None there, 3 here)")):
        other = Ran("attribute", task, "--method", "grad-dot", "--block", 3, "--out", tmp_path / "r", *more)
        assert other.code == 2 and f"it differs in {named}" in other.sentence


def test_a_call_that_failed_before_its_first_block_does_not_keep_the_folder(tmp_path: Path) -> None:
    task, out = task_file(tmp_path), tmp_path / "r"
    wrong = Ran("attribute", task, "--method", "grad-dot", "--by", "lay", "--out", out)
    assert wrong.code == 2 and "'lay'" in wrong.sentence
    assert Ran("attribute", task, "--method", "grad-dot", "--by", "layer", "--out", out, "--quiet").code == 0
    assert ptif.PartScores.load(out / "parts.safetensors") is not None
    other = Ran("attribute", task, "--method", "grad-dot", "--out", out)
    assert other.code == 2 and "holds another run" in other.sentence


@pytest.mark.parametrize("place", ["numbers", "header"])
def test_a_damaged_block_is_computed_again(place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    task, out = task_file(tmp_path), tmp_path / "r"
    interrupted(task, monkeypatch, 2, "--method", "grad-dot")
    path = out / "blocks/000000-000003.safetensors"
    content = bytearray(path.read_bytes())
    content[-3 if place == "numbers" else 60] ^= 1
    path.write_bytes(bytes(content))
    ran = Ran("attribute", task, "--method", "grad-dot", "--block", 3, "--out", out, "--json")
    assert ran.code == 0 and ran.found["resumed_queries"] == 3
    task_values = ptif.Scores.load(out / "scores.safetensors").values
    assert Ran("attribute", task, "--method", "grad-dot", "--block", 3, "--out", tmp_path / "w", "--quiet").code == 0
    torch.testing.assert_close(task_values, ptif.Scores.load(tmp_path / "w/scores.safetensors").values)


def test_damaged_results_of_a_finished_run_are_computed_again_and_never_shown(tmp_path: Path) -> None:
    task, out = task_file(tmp_path), tmp_path / "r"
    first = Ran("attribute", task, "--method", "grad-dot", "--out", out, "--json").found
    path = out / "scores.safetensors"
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(bytes(content))
    assert "is damaged: its checksum" in Ran("report", out).sentence
    again = Ran("attribute", task, "--method", "grad-dot", "--out", out, "--json").found
    assert again["resumed_queries"] == 0 and again["influences"] == first["influences"]
    assert Ran("attribute", task, "--method", "grad-dot", "--out", out, "--json").found["resumed_queries"] == QUERIES


def test_scores_of_another_run_are_not_shown_as_this_ones(tmp_path: Path) -> None:
    task, out = task_file(tmp_path), tmp_path / "r"
    assert Ran("attribute", task, "--method", "grad-dot", "--out", out, "--quiet").code == 0
    foreign = (out / "scores.safetensors").read_bytes()
    assert Ran("attribute", task, "--method", "exact", "--out", out, "--quiet", "--overwrite").code == 0
    expected = ptif.Scores.load(out / "scores.safetensors").values
    (out / "scores.safetensors").write_bytes(foreign)
    assert "holds scores of another run" in Ran("report", out).sentence
    assert Ran("attribute", task, "--method", "exact", "--out", out, "--quiet").code == 0
    torch.testing.assert_close(ptif.Scores.load(out / "scores.safetensors").values, expected)


def test_two_processes_do_not_write_to_one_folder(tmp_path: Path) -> None:
    task, out = task_file(tmp_path), tmp_path / "r"
    with locked(out, ".run.json.lock"):
        ran = Ran("attribute", task, "--method", "grad-dot", "--out", out)
        assert ran.code == 2 and "Another process is writing to" in ran.sentence and "--overwrite" not in ran.sentence
        # Self-influence touches other files of the folder.
        assert Ran("self-influence", task, "--method", "exact", "--out", out, "--quiet").code == 0
    assert Ran("attribute", task, "--method", "grad-dot", "--out", out, "--quiet").code == 0
    assert not [name for name in os.listdir(out) if name.startswith(".")]


def test_the_record_holds_the_fingerprint_and_a_rounded_probe_is_the_same_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    task, out = task_file(tmp_path), tmp_path / "r"
    command = ("attribute", task, "--method", "grad-dot", "--out", out)
    assert Ran(*command, "--quiet").code == 0
    record = json.loads((out / "run.json").read_text())
    fingerprint = Fingerprint.from_dict(record["fingerprint"])
    assert fingerprint is not None
    values = fingerprint.probes["model outputs"].values
    real = run_module.fingerprint_run

    def rounded(*arguments: Any) -> Fingerprint:
        made = real(*arguments)
        probe = made.probes["model outputs"]
        object.__setattr__(probe, "values", tuple(value * (1 + 1e-6) for value in probe.values))
        return made

    monkeypatch.setattr(run_module, "fingerprint_run", rounded)
    assert len(values) > 10 and Ran(*command, "--json").found["resumed_queries"] == QUERIES


def test_settings_of_two_runs_are_told_apart_without_cut_ones() -> None:
    """What differs is shown, however long the settings are."""
    from pytorch_influence_functions.cli.folder import _told_apart

    assert _told_apart({"damping": "0.1"}, {"damping": "0.01"}, "damping") == ("0.1", "0.01")
    method = "Influence(GGN(), CG(rtol=1e-05, max_steps=500), damping=Relative(share={}), preconditioner=EKFAC())"
    whole = (method.format("0.1"), method.format("0.25"))
    assert _told_apart({"method": whole[0]}, {"method": whole[1]}, "method") == whole
    long = "Influence(GGN(), CG(" + ", ".join(f"option_{i}={i}" for i in range(20)) + "), damping=Relative(share={}))"
    there, here = _told_apart({"method": long.format("0.1")}, {"method": long.format("0.25")}, "method")
    assert (there, here) == ("… share=0.1))", "… share=0.25))")
    early = _told_apart({"m": "A(x=1, " + "y" * 300 + ")"}, {"m": "A(x=2, " + "y" * 300 + ")"}, "m")
    assert early[0].startswith("A(x=1") and early[1].startswith("A(x=2") and all(t.endswith(" …") for t in early)
