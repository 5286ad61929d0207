"""How a command ends: what it says, where, and with which exit code."""

import json
import shlex
import sys
import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, final

import typer
from rich.console import Console

from ..core.errors import InfluenceError, InvalidInput, NotLikelihood

DONE, FAILED, BAD_INPUT, INTERRUPTED = 0, 1, 2, 130
WIDTH = 80


def console(stderr: bool = False) -> Console:
    """A console at most 80 columns wide, in a log exactly so; words are printed as they are."""
    made = Console(stderr=stderr, highlight=False, markup=False, emoji=False)
    made.width = min(WIDTH, made.width) if made.is_terminal else WIDTH
    return made


@final
@dataclass(frozen=True)
class Voice:
    """Where words go: results to stdout; progress and errors to stderr.

    Args:
        json: stdout holds one JSON object and nothing else.
        quiet: nothing is said but errors.
    """

    json: bool = False
    quiet: bool = False

    @property
    def speaks(self) -> bool:
        """Whether results are told in words."""
        return not self.json and not self.quiet

    def say(self, *shown: Any) -> None:
        """Print to stdout, as words or anything that rich draws."""
        if self.speaks:
            out = console()
            for one in shown:
                out.print(one)

    def whole(self, found: Mapping[str, Any]) -> None:
        """The one object of `--json`."""
        if self.json:
            print(json.dumps(found, allow_nan=False))

    def failed(self, code: int, kind: str, sentence: str) -> None:
        """One sentence to stderr, and the object that says the same."""
        sys.stdout.flush()
        print(f"ptif: {sentence}", file=sys.stderr)
        status = "interrupted" if code == INTERRUPTED else "failed"
        self.whole({"status": status, "exit_code": code, "error": kind, "message": sentence})


@final
@dataclass
class State:
    """What an interrupted command leaves behind, in words; each command says so as it goes on."""

    kept: str = "nothing was kept"

    @property
    def sentence(self) -> str:
        """What is kept, and the command that goes on from there."""
        return f"Interrupted; {self.kept}. To go on, run the same command again: {again()}"


def again() -> str:
    """The command as it was typed."""
    return shlex.join(["ptif", *sys.argv[1:]])


@contextmanager
def ending(voice: Voice) -> Iterator[State]:
    """Within, every way to end is turned into one sentence and its exit code.

    0: done. 1: the run failed (a solve, NaN, memory, a missing extra, the disk, an error in the user's model).
    2: bad usage or input. 130: Ctrl-C.
    """
    state = State()
    try:
        yield state
    except KeyboardInterrupt:
        voice.failed(INTERRUPTED, "KeyboardInterrupt", state.sentence)
        code = INTERRUPTED
    except (InvalidInput, NotLikelihood) as error:
        voice.failed(BAD_INPUT, type(error).__name__, str(error))
        code = BAD_INPUT
    except InfluenceError as error:
        voice.failed(FAILED, type(error).__name__, str(error))
        code = FAILED
    except (typer.Exit, BrokenPipeError):
        raise
    except Exception as error:
        # Nobody foresaw this one: the whole trace helps whoever has to find out.
        traceback.print_exc()
        first = (str(error).strip().splitlines() or ["no message"])[0]
        voice.failed(FAILED, type(error).__name__, f"The run failed with {type(error).__name__}: {first}")
        code = FAILED
    else:
        return
    raise typer.Exit(code)
