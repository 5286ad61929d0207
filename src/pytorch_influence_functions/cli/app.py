"""All commands under one name."""

# No `from __future__ import annotations` in this room: typer reads them.

from typing import Annotated

import typer

from .._version import __version__
from ..demo.screen import allow_any_encoding
from .attack import attack_command
from .attribute import attribute_command
from .classic import classic_command
from .curate import curate_command
from .demo import demo_command
from .doctor import doctor_command
from .index import build_command, compact_command, graph_command, info_command, query_command, remove_command
from .input_influence import input_influence_command
from .label_issues import label_issues_command
from .report import report_command
from .self_influence import self_influence_command
from .smallest_removal import flip_command, smallest_removal_command
from .what_if import what_if_command

HELP = "Which training examples made the model say that, and which of them are wrong?"
INDEX_HELP = "Gradients stored once, for questions that come later."
EPILOG = "Exit codes: 0 done, 1 the run failed, 2 bad usage or input, 130 interrupted."


def application() -> typer.Typer:
    """A fresh typer application with every command."""
    app = typer.Typer(
        help=HELP, epilog=EPILOG, no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False
    )
    app.callback()(ptif)
    for name, command in (
        ("demo", demo_command),
        ("attribute", attribute_command),
        ("self-influence", self_influence_command),
        ("report", report_command),
        ("label-issues", label_issues_command),
        ("what-if", what_if_command),
        ("flip", flip_command),
        ("smallest-removal", smallest_removal_command),
        ("input-influence", input_influence_command),
        ("attack", attack_command),
        ("curate", curate_command),
        ("classic", classic_command),
        ("doctor", doctor_command),
    ):
        app.command(name)(command)
    index = typer.Typer(help=INDEX_HELP, epilog=EPILOG, no_args_is_help=True)
    for part, subcommand in (
        ("build", build_command),
        ("query", query_command),
        ("info", info_command),
        ("remove", remove_command),
        ("graph", graph_command),
        ("compact", compact_command),
    ):
        index.command(part)(subcommand)
    app.add_typer(index, name="index")
    return app


def _show_version(wanted: bool) -> bool:
    if wanted:
        print(__version__)
        raise typer.Exit
    return wanted


def ptif(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version and stop.", callback=_show_version, is_eager=True)
    ] = False,
) -> None:
    """Nothing of its own: options that come before the command."""
    allow_any_encoding()
