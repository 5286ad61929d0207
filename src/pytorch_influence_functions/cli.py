"""The command line: `ptif demo`."""

# No `from __future__ import annotations` here: typer reads them, and is itself a name inside `build` only.

import sys
from pathlib import Path
from typing import Annotated, Any

from ._version import __version__
from .errors import InfluenceError, MissingExtra, require


def main() -> None:
    """Entry point of `ptif`. Without typer and rich it says in one line how to install them."""
    try:
        require("rich", "cli")
        app = build()
    except MissingExtra as error:
        raise SystemExit(f"ptif: {error}") from None
    app()


def build() -> Any:
    """The typer application."""
    typer = require("typer", "cli")
    app = typer.Typer(
        help="Which training examples made the model say that, and which of them are wrong?",
        no_args_is_help=True,
        add_completion=False,
        pretty_exceptions_enable=False,
    )

    def show_version(wanted: bool) -> bool:
        if wanted:
            print(__version__)
            raise typer.Exit
        return wanted

    @app.callback()  # type: ignore[untyped-decorator]
    def ptif(
        version: Annotated[
            bool, typer.Option("--version", help="Print the version and stop.", callback=show_version, is_eager=True)
        ] = False,
    ) -> None:
        pass

    @app.command()  # type: ignore[untyped-decorator]
    def demo(
        out: Annotated[Path, typer.Option("--out", help="Folder for what the demo writes.")] = Path("demo"),
        seed: Annotated[int, typer.Option("--seed", help="Seed of the initial weights and of the batches.")] = 0,
        quiet: Annotated[bool, typer.Option("--quiet", help="Print the summary only.")] = False,
    ) -> None:
        """Train a small CNN on real images, 10 % of them mislabelled; explain it, find them, check by retraining."""
        from .demo.run import run
        from .demo.screen import Screen, plain_output
        from .demo.train import Recipe

        plain_output()
        try:
            run(Screen(quiet), out, recipe=Recipe(seed=seed))
        except InfluenceError as error:
            print(f"ptif: {error}", file=sys.stderr)
            raise typer.Exit(1) from None

    return app


if __name__ == "__main__":
    main()
