"""What every figure's file has in common: the record of what was found, beside what the paper found, and the command.

Each `figure_*.py` and `section_5_3.py` defines `run(study: Study) -> Finding`; alone it is a command:

    python -m examples.paper.figure_1 [--small] [--figures FOLDER]
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

import pytorch_influence_functions as ptif
from pytorch_influence_functions.core.errors import InvalidInput
from pytorch_influence_functions.plots import style

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

HERE = Path(__file__).resolve().parent


@dataclass(frozen=True)
class Study:
    """How much to do, and where pictures go."""

    small: bool = False
    figures: Path = HERE / "figures"

    def size(self, full: int, small: int) -> int:
        """One of two sizes."""
        return small if self.small else full

    def picture(self, figure: str) -> Path:
        """Where a figure's picture goes."""
        self.figures.mkdir(parents=True, exist_ok=True)
        return self.figures / f"{figure if figure.startswith('section') else 'figure_' + figure}.png"


@dataclass(frozen=True)
class Band:
    """A number and the open interval it has to lie in."""

    name: str
    value: float
    low: float = -math.inf
    high: float = math.inf

    @property
    def passed(self) -> bool:
        """Strictly inside; NaN never is."""
        return self.low < self.value < self.high

    @property
    def words(self) -> str:
        """The interval in words.

        >>> Band("r", 0.5, low=0.2).words, Band("r", 0.5, 0.2, 0.9).words
        ('above 0.2', '0.2 to 0.9')
        """
        if math.isinf(self.low) or math.isinf(self.high):
            return f"below {self.high:g}" if math.isinf(self.low) else f"above {self.low:g}"
        return f"{self.low:g} to {self.high:g}"

    def __str__(self) -> str:
        return f"{'ok  ' if self.passed else 'FAIL'} {self.name}: {self.value:.4g} ({self.words})"


@dataclass(frozen=True)
class Finding:
    """One figure again: its headline number beside the paper's, the bands it has to meet, its picture.

    The first band is the headline's. `paper` is what the paper (or its released code) has, in words.
    """

    figure: str
    title: str
    data: str
    paper: str
    bands: tuple[Band, ...]
    picture: Path
    notes: tuple[str, ...] = ()
    small: bool = False
    seconds: float = field(default=0.0, compare=False)

    @property
    def passed(self) -> bool:
        """Whether every number lies in its band."""
        return all(band.passed for band in self.bands)

    def __str__(self) -> str:
        size = ", small form" if self.small else ""
        lines = [f"Figure {self.figure}: {self.title} [{self.data}{size}; {self.seconds:.0f} s]"]
        lines += [f"  {band}" for band in self.bands]
        lines[1] += f"    in the paper: {self.paper}"
        return "\n".join([*lines, *(f"  {note}" for note in self.notes)])


Run = Callable[[Study], Finding]


def timed(run: Run, study: Study) -> Finding:
    """Run one figure, and print what it found."""
    start = time.perf_counter()
    with ptif.progress(False):  # hundreds of short fits
        done = run(study)
    found = replace(done, small=study.small, seconds=time.perf_counter() - start)
    print(found, flush=True)
    found.picture.with_suffix(".json").write_text(json.dumps(asdict(found), default=str, indent=1) + "\n")
    return found


def read(path: Path) -> Finding:
    """What an earlier run found, from the file beside its picture."""
    kept = json.loads(path.read_text())
    bands = tuple(Band(**band) for band in kept.pop("bands"))
    return Finding(**{**kept, "bands": bands, "notes": tuple(kept["notes"]), "picture": Path(kept["picture"])})


def main(run: Run, arguments: list[str] | None = None) -> int:
    """One figure as a command; 1 when a number lies outside its band."""
    parser = argparse.ArgumentParser()
    add_options(parser)
    return finish([timed(run, study_of(parser.parse_args(arguments)))])


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options that one figure and all of them share."""
    parser.add_argument("--small", action="store_true", help="fewer points and seeds: minutes, not half an hour")
    parser.add_argument("--figures", type=Path, default=HERE / "figures", help="folder for the pictures")


def study_of(options: argparse.Namespace) -> Study:
    """From the command line."""
    return Study(options.small, options.figures)


def finish(findings: list[Finding]) -> int:
    """The exit code, and what is outside its band on the error stream."""
    for found in findings:
        for band in found.bands:
            if not band.passed:
                print(f"Figure {found.figure} is outside its band: {band}", file=sys.stderr)
    return int(not all(found.passed for found in findings))


# ------------------------------------------------------------------------------------------ numbers


def pearson(a: Tensor, b: Tensor) -> float:
    """Pearson's correlation of two vectors."""
    return float(np.corrcoef(a.double().numpy(), b.double().numpy())[0, 1])


def spearman(a: Tensor, b: Tensor) -> float:
    """Spearman's rank correlation; no ties are expected."""
    return pearson(a.argsort().argsort(), b.argsort().argsort())


def slope(predicted: Tensor, actual: Tensor) -> float:
    """Of the line through the mean that predicts `actual` from `predicted` with least squares."""
    p, a = predicted - predicted.mean(), actual - actual.mean()
    return float((p * a).sum() / (p * p).sum())


def first_wrong(predicted: Tensor, labels: Tensor) -> int:
    """The first held-out example the model gets wrong, as the paper picks its test points.

    Raises:
        InvalidInput: there is none.
    """
    wrong = (predicted != labels).nonzero().flatten()
    if not len(wrong):
        raise InvalidInput("The model gets every held-out example right; hold out more of them.")
    return int(wrong[0])


# ------------------------------------------------------------------------------------------ pictures


@contextmanager
def drawing(path: Path, width: float, height: float) -> Iterator[Figure]:
    """An empty figure in the library's style, written to `path` at the end."""
    with style.plot_style():
        figure = style.new_figure(width, height)
        yield figure
        figure.set_layout_engine("tight")
        style.save_figure(figure, path)


def agreement(axes: Axes, predicted: Tensor, actual: Tensor, title: str, colour: str = style.HELPFUL) -> None:
    """Predicted against actual change, with the diagonal."""
    ends = [float(f(torch.cat([predicted, actual]))) for f in (torch.min, torch.max)]
    room = 0.05 * (ends[1] - ends[0])
    line = [ends[0] - room, ends[1] + room]
    axes.plot(line, line, color=style.FAINT, linewidth=0.8, linestyle="--")
    axes.scatter(actual.numpy(), predicted.numpy(), s=9, color=colour, alpha=0.6, linewidths=0)
    axes.locator_params(nbins=5)
    axes.set(xlabel="actual change in loss", ylabel="predicted change in loss", title=title)
