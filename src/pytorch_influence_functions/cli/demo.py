"""`ptif demo`: train, explain, find wrong labels and check by retraining, on images that come with the package."""

from pathlib import Path
from typing import Annotated

import typer

from .exit import Output, exit_with_code
from .folder import check_folder


def demo_command(
    out: Annotated[Path, typer.Option("--out", help="Folder for what the demo writes.")] = Path("demo"),
    seed: Annotated[int, typer.Option("--seed", help="Seed of the initial weights and of the batches.")] = 0,
    quiet: Annotated[bool, typer.Option("--quiet", help="Print the summary only.")] = False,
) -> None:
    """Train a small CNN on real images, 10 % of them mislabelled; explain it, find them, check by retraining."""
    from ..demo.run import run_demo
    from ..demo.screen import Screen

    with exit_with_code(Output()) as interruption:
        check_folder(out)
        interruption.kept = "the demo keeps nothing before its end"
        run_demo(Screen(quiet), out, seed)
