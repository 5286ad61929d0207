"""How a command ends: its output on stdout and stderr, and its exit code."""

import json
import shlex
import sys
import traceback
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, final

import typer
from rich.console import Console

from ..core.distributed import process_count
from ..core.errors import InfluenceError, InvalidInput, NotLikelihood
from .wording import as_typed

DONE, FAILED, BAD_INPUT, INTERRUPTED = 0, 1, 2, 130
MAX_WIDTH = 80


def make_console(stderr: bool = False) -> Console:
    """A console at most 80 columns wide, in a log exactly so; text is printed as it is."""
    console = Console(stderr=stderr, highlight=False, markup=False, emoji=False)
    console.width = min(MAX_WIDTH, console.width) if console.is_terminal else MAX_WIDTH
    return console


@final
@dataclass(frozen=True)
class Output:
    """The output of a command: results on stdout; progress and errors on stderr.

    Args:
        json: stdout holds one JSON object and nothing else.
        quiet: nothing is printed but errors.
    """

    json: bool = False
    quiet: bool = False

    @property
    def prints_text(self) -> bool:
        """Whether results are printed as text."""
        return not self.json and not self.quiet

    def print_text(self, *items: Any) -> None:
        """Print text, or anything that rich draws, to stdout."""
        if self.prints_text:
            console = make_console()
            for item in items:
                console.print(item)

    def print_json(self, result: Mapping[str, Any]) -> None:
        """Print the one object of `--json`."""
        if self.json:
            print(json.dumps(result, allow_nan=False))

    def print_failure(self, code: int, kind: str, sentence: str) -> None:
        """Print one sentence to stderr, and with `--json` an object that says the same."""
        sys.stdout.flush()
        print(f"ptif: {sentence}", file=sys.stderr)
        status = "interrupted" if code == INTERRUPTED else "failed"
        self.print_json({"status": status, "exit_code": code, "error": kind, "message": sentence})


@final
@dataclass
class Interruption:
    """What an interrupted command leaves behind; each command updates `kept` as it goes on."""

    kept: str = "nothing was kept"

    @property
    def sentence(self) -> str:
        """What is kept, and the command that goes on from there."""
        return f"Interrupted; {self.kept}. To go on, run the same command again: {typed_command()}"


def typed_command() -> str:
    """The command as it was typed."""
    return shlex.join(["ptif", *sys.argv[1:]])


@contextmanager
def exit_with_code(output: Output) -> Iterator[Interruption]:
    """Turn every failure inside into one sentence and its exit code.

    0: done. 1: the run failed (a solve, NaN, memory, a missing extra, the disk, an error in the user's model).
    2: bad usage or input. 130: Ctrl-C.
    """
    interruption = Interruption()
    try:
        _refuse_several()
        with _warnings_as_lines(output):
            yield interruption
    except KeyboardInterrupt:
        output.print_failure(INTERRUPTED, "KeyboardInterrupt", interruption.sentence)
        code = INTERRUPTED
    except (InvalidInput, NotLikelihood) as error:
        output.print_failure(BAD_INPUT, type(error).__name__, as_typed(str(error)))
        code = BAD_INPUT
    except InfluenceError as error:
        output.print_failure(FAILED, type(error).__name__, as_typed(str(error)))
        code = FAILED
    except (typer.Exit, BrokenPipeError):
        raise
    except Exception as error:
        # This error was not foreseen, so the whole trace is printed.
        traceback.print_exc()
        first = (str(error).strip().splitlines() or ["no message"])[0]
        output.print_failure(FAILED, type(error).__name__, f"The run failed with {type(error).__name__}: {first}")
        code = FAILED
    else:
        return
    raise typer.Exit(code)


@contextmanager
def _warnings_as_lines(output: Output) -> Iterator[None]:
    """Print the package's own warnings as one line each, without the place in Python where they arose."""
    with warnings.catch_warnings():
        usual = warnings.showwarning

        def show(message: Warning | str, category: type[Warning], *place: Any, **more: Any) -> None:
            if category.__module__.partition(".")[0] != __name__.partition(".")[0]:
                usual(message, category, *place, **more)
            elif not output.quiet:
                print(f"ptif: {as_typed(str(message))}", file=sys.stderr, flush=True)

        warnings.showwarning = show
        yield


def _refuse_several() -> None:
    """Refuse to be one of several processes, which would all write the same files and print the same lines.

    Raises:
        InvalidInput: torchrun has started this one and others.
    """
    if (count := process_count()) > 1:
        raise InvalidInput(
            f"A command of ptif is one process, and torchrun started {count}; start it without torchrun, or share the "
            "work out in a program of your own with ptif.distributed()."
        )
