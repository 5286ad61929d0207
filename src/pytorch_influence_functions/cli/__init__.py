"""The command line, `ptif`: one file per command. The room behind this door is entered with typer and rich only."""

from __future__ import annotations

from typing import Any

from ..core.errors import MissingExtra, require

__all__ = ["build", "main"]


def main() -> None:
    """Entry point of `ptif`. Without typer and rich it says in one line how to install them."""
    try:
        app = build()
        app()
    except MissingExtra as error:
        raise SystemExit(f"ptif: {error}") from None
    except KeyboardInterrupt:  # before or after the command's own work
        raise SystemExit(130) from None


def build() -> Any:
    """The typer application.

    Raises:
        MissingExtra: typer or rich is not installed.
    """
    require("rich", "cli")
    require("typer", "cli")
    from .app import application

    return application()
