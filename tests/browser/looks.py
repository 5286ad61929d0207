"""An open report, and the reports that are opened."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

import pytorch_influence_functions.report.page as pages
from tests.interface.report_cases import ATTACK, pictures, probabilities, tables, texts

VIEWS = (
    "overview",
    "queries",
    "q/1",
    "training/labels",
    "training/pairs",
    "training/classes",
    "training/influential",
    "decisions",
)


@dataclass(eq=False)
class Looks:
    """One page in a browser context of its own, and what went wrong on it."""

    page: Any
    path: Path
    problems: list[str] = field(default_factory=list)

    @staticmethod
    def of(browser: Any, path: Path, view: str, theme: str, width: int) -> Looks:
        height = 800 if width < 600 else 1000
        context = browser.new_context(
            color_scheme=theme,
            viewport={"width": width, "height": height},
            reduced_motion="reduce",
            accept_downloads=True,
        )
        made = Looks(context.new_page(), path)
        made.page.on("console", made._heard)
        made.page.on("pageerror", lambda error: made.problems.append(f"error: {error}"))
        made.page.on("request", made._asked)
        made.go(view)
        return made

    def go(self, view: str) -> None:
        """To another view, until its pictures are there."""
        self.page.goto(f"{self.path.as_uri()}#{view}")
        self.settle()

    def settle(self) -> None:
        self.page.wait_for_timeout(150)
        self.page.wait_for_function("() => [...document.images].every((image) => image.complete)")

    def text(self) -> str:
        """What can be read."""
        return str(self.page.locator("main").inner_text())

    def _heard(self, message: Any) -> None:
        if message.type in ("error", "warning"):
            self.problems.append(f"console: {message.text}")

    def _asked(self, request: Any) -> None:
        """The page itself, pictures inside it, and the pieces of its own folder; nothing else is ever asked for."""
        beside = self.path.with_name(f"{self.path.stem}_files").as_uri()
        own = request.url.split("#")[0] == self.path.as_uri() or request.url.startswith((beside, "data:", "blob:"))
        if not own:
            self.problems.append(f"request: {request.url}")


def made() -> dict[str, Callable[[Path], Path]]:
    """Kind -> how its report is written."""
    own = torch.linspace(1, 0, 40)

    def usual(scores: Any, **options: Any) -> Callable[[Path], Path]:
        def write(path: Path) -> Path:
            given = {"predictions": probabilities(), "train_predictions": probabilities(40), "self_influence": own}
            given |= {"doubt": own} | options  # the queue holds examples 0 to 19
            return Path(scores.report(path, **given).path)

        return write

    return {
        "pictures": usual(pictures(), about="Three classes of noise."),
        "texts": usual(texts("a text that is long enough to be cut on a small card " * 12)),
        "tables": usual(
            tables(), columns=["age", "height", "weight", "dose", "rate", "a very long name of a column", "x"]
        ),
        "attack": usual(
            pictures(
                train_source=[(f"{i} {ATTACK}", i % 3) for i in range(40)],
                query_source=[(f"{i} {ATTACK}", i % 3) for i in range(6)],
                class_names=[ATTACK, "b", "c"],
                train_names=[f"{ATTACK} {i}" for i in range(40)],
                query_names=[f"{ATTACK} {i}" for i in range(6)],
            ),
            title=ATTACK,
            about=ATTACK,
        ),
        "numbers": _numbers,
        "folder": _folder,
        "bare": lambda path: Path(
            pictures(train_source=None, query_source=None, train_labels=None, query_labels=None, class_names=None)
            .report(path)
            .path
        ),
        "odd": usual(_odd()),
        "long": usual(
            pictures(
                class_names=["W" * 120, "a label of a class with a great many words in it " * 4, "c"],
                query_names=["N" * 10_000] * 6,
                train_names=["n" * 10_000] * 40,
            )
        ),
    }


def _numbers(path: Path) -> Path:
    """A regression with more columns than a card holds."""
    g = torch.Generator().manual_seed(4)
    x, y = torch.randn(40, 30, generator=g), torch.randn(40, generator=g)
    scores = pictures(
        train_source=(x, y), query_source=(x[:6], y[:6]), train_labels=y, query_labels=y[:6], class_names=None
    )
    return Path(
        scores.report(
            path,
            predictions=x[:6, :1],
            train_predictions=x[:, :1],
            self_influence=torch.linspace(1, 0, 40),
            columns=[f"column {i} [m]" for i in range(30)],
            denormalize=(100.0, 7.0),
            target="price [$]",
            denormalize_target=(200_000.0, 50_000.0),
        ).path
    )


def _folder(path: Path) -> Path:
    limit = pages.LIMIT
    pages.LIMIT = 20_000
    try:
        report = pictures(shape=(3, 64, 64)).report(path, predictions=probabilities())
    finally:
        pages.LIMIT = limit
    assert report.folder
    return Path(report.path)


class Unreadable:
    """A dataset of which some pictures are missing, and the others' captions are unusual."""

    def __len__(self) -> int:
        return 40

    def __getitem__(self, i: int) -> Any:
        if i % 4 == 1:
            raise FileNotFoundError(f"picture {i} is gone")
        if i % 4 == 2:
            return torch.full((1, 8, 8), float("nan")), i % 3
        if i % 4 == 3:
            return "語 عربى é 👩‍👩‍👧 " + "x" * 10_000, i % 3
        return torch.rand(1, 8, 8, generator=torch.Generator().manual_seed(i)), i % 3


def _odd() -> Any:
    names = ["語" * 300, "مرحبا", "e\u0301" * 40, "\u202eabc", *[f"n{i}" for i in range(36)]]
    return pictures(
        train_source=Unreadable(), query_source=torch.utils.data.Subset(Unreadable(), range(6)), train_names=names
    )  # type: ignore[arg-type]
