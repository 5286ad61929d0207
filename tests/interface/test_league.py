"""The league, in small: models, truth, methods and table, as `make league` makes them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_one_setting_in_small(tmp_path: Path) -> None:
    command = [sys.executable, "benchmarks/league/run.py", "--quick", "--setting", "3", "--threads", "1"]
    done = subprocess.run(
        [*command, "--methods", "EK-FAC x 3,random"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env=os.environ | {"PTIF_BENCH_HOME": str(tmp_path)},
    )
    assert done.returncode == 0, done.stderr
    assert "8 subsets of 50 % of 100 examples, 2 seeds" in done.stdout
    assert "EK-FAC x 3" in done.stdout and "random" in done.stdout
    assert any(tmp_path.rglob("truth-8x2.safetensors"))
