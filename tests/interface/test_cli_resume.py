"""Ctrl-C for real: a subprocess gets SIGINT, says how to go on, and goes on to the same scores."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import pytest

import pytorch_influence_functions as ptif
from tests.interface.cli_cases import QUERIES, Ran, task_file
from tests.tolerance import gap, rounding

pytestmark = [pytest.mark.slow, pytest.mark.skipif(os.name == "nt", reason="signals are sent differently there")]

ARGUMENTS = ("--method", "grad_dot", "--block", "3", "--out")
COMMAND = (sys.executable, "-m", "pytorch_influence_functions.cli", "attribute")


def environment(**more: str) -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "80", **more}


def wait_for(path: Path, process: subprocess.Popen[str]) -> None:
    for _ in range(1200):
        if path.exists():
            return
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.05)
    raise AssertionError(f"{path} never came")


@contextmanager
def started(task: Path, out: Path, *more: str) -> Iterator[subprocess.Popen[str]]:
    """The command under way on a slow data set, its first block already kept."""
    process = subprocess.Popen(
        [*COMMAND, str(task), *ARGUMENTS, str(out), *more],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment(SLOW="1"),
        # Started by a shell in the background, the tests themselves ignore Ctrl-C, and children inherit that.
        preexec_fn=partial(signal.signal, signal.SIGINT, signal.SIG_DFL),
    )
    try:
        wait_for(out / "blocks/000000-000003.safetensors", process)
        yield process
    finally:
        process.kill()
        process.communicate()


def test_ctrl_c_keeps_what_is_finished_and_the_same_command_goes_on(tmp_path: Path) -> None:
    task, out, whole = task_file(tmp_path), tmp_path / "r", tmp_path / "whole"
    with started(task, out) as process:
        process.send_signal(signal.SIGINT)
        stdout, stderr = process.communicate(timeout=60)
    assert process.returncode == 130 and stdout == ""
    (sentence,) = [line for line in stderr.splitlines() if "Interrupted" in line]
    kept = len(list((out / "blocks").iterdir())) * 3
    assert 3 <= kept < QUERIES and f"{kept} of {QUERIES} queries are kept in '{out}'" in sentence
    assert sentence.endswith(f"run the same command again: ptif attribute {task} {' '.join(ARGUMENTS)} {out}")
    assert "Traceback" not in stderr and not list(out.rglob("*.part"))
    assert json.loads((out / "run.json").read_text())["status"] == "running"

    again = Ran("attribute", task, *ARGUMENTS, out, "--json")
    assert again.code == 0 and again.found["resumed_queries"] == kept
    assert Ran("attribute", task, *ARGUMENTS, whole, "--quiet").code == 0
    resumed, uninterrupted = (ptif.Scores.load(p / "scores.safetensors") for p in (out, whole))
    assert gap(resumed.values, uninterrupted.values) < rounding(resumed.values)
    assert resumed.query_ids.tolist() == list(range(QUERIES))
    assert resumed.query_labels == uninterrupted.query_labels
    assert not (out / "blocks").exists()


def test_a_process_that_is_killed_outright_goes_on_too_and_a_damaged_block_is_made_again(tmp_path: Path) -> None:
    task, out, backup = task_file(tmp_path), tmp_path / "r", tmp_path / "backup"
    with started(task, out) as process:
        process.kill()
        process.wait()
    shutil.copytree(out, backup)
    kept = len(list((out / "blocks").glob("*.safetensors"))) * 3
    again = Ran("attribute", task, *ARGUMENTS, out, "--json").found
    assert again["resumed_queries"] == kept >= 3 and again["n_queries"] == QUERIES

    shutil.rmtree(out)
    backup.rename(out)
    (out / "blocks/000000-000003.safetensors").write_bytes(b"torn")
    assert Ran("attribute", task, *ARGUMENTS, out, "--json").found["resumed_queries"] == kept - 3
    assert ptif.Scores.load(out / "scores.safetensors").shape[0] == QUERIES


def test_with_json_the_interruption_is_an_object_too(tmp_path: Path) -> None:
    with started(task_file(tmp_path), tmp_path / "r", "--json") as process:
        process.send_signal(signal.SIGINT)
        stdout, _ = process.communicate(timeout=60)
    found = json.loads(stdout)
    assert (found["status"], found["exit_code"]) == ("interrupted", 130) and "queries are kept" in found["message"]
