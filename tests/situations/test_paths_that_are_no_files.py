"""Results are written to a link, a pipe, or a device such as /dev/stdout."""

from __future__ import annotations

import os
import threading
from pathlib import Path

import pytest
import torch
from torch import nn

import pytorch_influence_functions as ptif
from pytorch_influence_functions.core.errors import InvalidInput

posix = pytest.mark.skipif(os.name != "posix", reason="pipes and links of POSIX")


def make_scores(labels: list[str] | None = None) -> ptif.Scores:
    torch.manual_seed(0)
    x, y = torch.randn(8, 3), labels or ["ant", "bee"] * 4
    return ptif.attribute(nn.Linear(3, 2), (x, y), (x[:2], y[:2]), loss=nn.CrossEntropyLoss(), method="grad_dot")


@posix
def test_a_link_stays_and_its_file_is_replaced(tmp_path: Path) -> None:
    scores, real, link = make_scores(), tmp_path / "disk" / "real.safetensors", tmp_path / "latest.safetensors"
    scores.save(real)
    link.symlink_to(real)
    scores.top(2).save(link)
    assert link.is_symlink()
    assert ptif.Scores.load(real).shape == (2, 4)


@posix
def test_a_table_goes_into_a_pipe_and_a_file_does_not_take_its_place(tmp_path: Path) -> None:
    scores, pipe = make_scores(), tmp_path / "pipe"
    os.mkfifo(pipe)
    read: list[str] = []
    reader = threading.Thread(target=lambda: read.append(pipe.read_text()))
    reader.start()
    scores.to_csv(pipe)
    reader.join()
    assert read[0].startswith("query,train,score")
    assert pipe.is_fifo()
    with pytest.raises(InvalidInput, match="is a device or a pipe, and a file would take its place"):
        scores.save(pipe)
    assert pipe.is_fifo()


def test_half_a_letter_in_a_label_is_written_as_a_question_mark(tmp_path: Path) -> None:
    scores = make_scores(["a" + chr(0xD800), "bee"] * 4)
    scores.to_csv(tmp_path / "scores.csv")
    assert ",a?," in (tmp_path / "scores.csv").read_text(encoding="utf-8").replace("\n", ",\n")


def test_half_a_letter_in_the_name_of_a_class_can_be_printed() -> None:
    names = ["a" + chr(0xD800), "bee"] * 4
    torch.manual_seed(0)
    issues = ptif.find_label_issues(ptif.Problem(nn.Linear(3, 2), nn.CrossEntropyLoss(), (torch.randn(8, 3), names)))
    assert "a?" in str(issues).encode("utf-8").decode("utf-8")
