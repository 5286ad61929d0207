"""A small task file, and the command run on it."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any
from unittest.mock import patch

from typer.testing import CliRunner

from pytorch_influence_functions import cli
from pytorch_influence_functions.cli import progress_bars

N, QUERIES = 40, 12

TASK = """
import os, time
import torch
from torch.utils.data import DataLoader, Dataset

class Points(Dataset):
    classes = ["low", "high"]

    def __init__(self, n, seed):
        self.x = torch.randn(n, 4, generator=torch.Generator().manual_seed(seed))
        self.y = (self.x[:, 0] + self.x[:, 1] > 0).long()

    def __len__(self):
        return len(self.x)

    def __getitem__(self, i):
        if "SLOW" in os.environ:
            time.sleep(0.005)
        return self.x[i], self.y[i]

def get_dataloaders():
    return DataLoader(Points(40, 0), batch_size=10, shuffle=True), DataLoader(Points(12, 1), batch_size=5)

def get_model():
    torch.manual_seed(0)
    net = torch.nn.Linear(4, 2)
    data = Points(40, 0)
    steps = torch.optim.SGD(net.parameters(), lr=0.5, weight_decay=0.01)
    for _ in range(200):
        steps.zero_grad()
        torch.nn.functional.cross_entropy(net(data.x), data.y).backward()
        steps.step()
    return net
"""


def task_file(folder: Path, extra: str = "", name: str = "task.py") -> Path:
    """The task, written; `extra` is put after it."""
    path = folder / name
    path.write_text(TASK + extra, encoding="utf-8")
    return path


class Ran:
    """What a command printed, and how it ended. However slow the machine, no pass is long enough to be reported."""

    def __init__(self, *arguments: Any) -> None:
        with patch.multiple(progress_bars, SHOW_AFTER=math.inf, LINE_INTERVAL=math.inf):
            result = CliRunner().invoke(cli.build(), [str(a) for a in arguments])
        self.code, self.stdout, self.stderr = result.exit_code, result.stdout, result.stderr

    @property
    def found(self) -> Any:
        """The object of `--json`; whatever else stood on stdout would break it."""
        return json.loads(self.stdout)

    @property
    def sentence(self) -> str:
        """The one line of an error."""
        (line,) = self.stderr.strip().splitlines()
        assert line.startswith("ptif: ")
        return line.removeprefix("ptif: ")
