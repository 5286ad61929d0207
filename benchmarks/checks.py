"""Whether two sides gave the same numbers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np


def same_scores(options: dict[str, Any]) -> Callable[[], dict[str, float]]:
    """Largest difference between the two saved score tables, relative to the largest score."""

    def run() -> dict[str, float]:
        a, b = (np.load(p).astype(np.float64) for p in sorted(Path(options["folder"]).glob("*.npy")))
        return {"relative_gap": float(np.abs(a - b).max() / np.abs(a).max())}

    return run
