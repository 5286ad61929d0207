"""The flags that several commands share, and the config file that may replace them."""

import json
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Final, final

import typer

from ..core.errors import InvalidInput, UnknownName, nearest, require
from ..core.validate import is_finite, is_whole
from ..hf.normalisation import NORMALISATIONS
from .task import Overrides, Task, load_task
from .texts import TextFlags, load_text_task

# --------------------------------------------------------------------------- flags

TaskFile = Annotated[
    Path | None,
    typer.Argument(
        help="Python file with get_model() and get_dataloaders(), or a problem and queries.", metavar="TASK"
    ),
]
Out = Annotated[Path | None, typer.Option("--out", help="Folder for the results. (default: results)")]
Method = Annotated[
    str | None, typer.Option("--method", help="auto, ekfac, dual, … (default: the task's own, else auto)")
]
Run = Annotated[
    Path | None,
    typer.Option("--run", help="The folder of a recorded training run: the method is asked at all its checkpoints."),
]
Damping = Annotated[
    str | None,
    typer.Option(
        "--damping",
        help="0.01, relative:0.1, per-block:0.1, per-direction:0.2, training:RATE:STEPS or adam:RATE:STEPS:BATCH. "
        "(default: the method's)",
    ),
]
WeightDecay = Annotated[float | None, typer.Option("--weight-decay", help="The L2 strength of training.")]
BatchSize = Annotated[int | None, typer.Option("--batch-size", help="Examples per batch. (default: the loader's)")]
Device = Annotated[str | None, typer.Option("--device", help="Move the model there first: cpu, cuda, cuda:1, mps.")]
LanguageModel = Annotated[
    str | None, typer.Option("--hf", help="Folder of a Hugging Face model, or of its adapters, instead of TASK.")
]
Texts = Annotated[Path | None, typer.Option("--dataset", help="With --hf: its training texts, a .jsonl file.")]
Query = Annotated[
    list[str] | None,
    typer.Option("--query", help="With --hf: a text, prompt or user's turn to ask about; repeatable."),
]
Answer = Annotated[
    list[str] | None, typer.Option("--answer", help="The answer to each --query. (default: what the model writes)")
]
MessagesColumn = Annotated[str | None, typer.Option("--messages-column", help="The column with chats.")]
TextColumn = Annotated[str | None, typer.Option("--text-column", help="The column with texts.")]
PromptColumn = Annotated[str | None, typer.Option("--prompt-column", help="The column with prompts.")]
CompletionColumn = Annotated[str | None, typer.Option("--completion-column", help="The column with answers.")]
LabelColumn = Annotated[
    str | None, typer.Option("--label-column", help="The column with labels, of a model for classes of texts.")
]
SourceColumn = Annotated[
    str | None, typer.Option("--source-column", help="The column that says where a text comes from, for the page.")
]
MaxLength = Annotated[int | None, typer.Option("--max-length", help="The most tokens of a text.")]
Normalisation = Annotated[
    str | None,
    typer.Option("--normalisation", help="How a text counts: trainer, sum or mean of its tokens. (default: trainer)"),
]
By = Annotated[
    list[str] | None,
    typer.Option("--by", help="Scores by part of the model: layer, a pattern, or NAME=PATTERN,PATTERN; repeatable."),
]
Queries = Annotated[str | None, typer.Option("--queries", help="Positions: 0:20, 5, or 1,4,10:20. (default: all)")]
ResultFolder = Annotated[
    Path | None, typer.Option("--out", help="Folder for the result as a file. (default: none is written)")
]
ConfigFile = Annotated[
    Path | None, typer.Option("--config", help="TOML or JSON file with any of these settings; flags win.")
]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace another run that lies in --out.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Forecast passes, memory and seconds; compute nothing.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object to stdout and nothing else.")]
Quiet = Annotated[bool, typer.Option("--quiet", help="Say nothing but errors.")]

# --------------------------------------------------------------------------- settings


@final
@dataclass(frozen=True)
class RunSettings:
    """The settings of a run: from flags, else from the file, else these defaults."""

    task: Path | None = None
    out: Path = Path("results")
    method: str | None = None
    run: Path | None = None
    damping: str | None = None
    queries: str = "all"
    top: int | None = None
    by: tuple[str, ...] = ()
    block: int | None = None
    report: bool = False
    weight_decay: float | None = None
    batch_size: int | None = None
    device: str | None = None
    hf: str | None = None
    dataset: Path | None = None
    query: tuple[str, ...] = ()
    answer: tuple[str, ...] = ()
    messages_column: str | None = None
    text_column: str | None = None
    prompt_column: str | None = None
    completion_column: str | None = None
    label_column: str | None = None
    source_column: str | None = None
    max_length: int | None = None
    normalisation: str | None = None

    @property
    def texts(self) -> TextFlags:
        """The settings that stand for a task file where a language model is asked."""
        return TextFlags(**{name: getattr(self, name) for name in TextFlags.__annotations__})

    @property
    def task_file(self) -> Path:
        """The task file.

        Raises:
            InvalidInput: neither the command nor the file names one.
        """
        if self.task is None:
            raise InvalidInput(
                "There is no task file; write ptif COMMAND task.py, or task = 'task.py' in --config; for a language "
                'model ptif attribute --hf FOLDER --dataset texts.jsonl --query "…".'
            )
        if self.texts.given:
            raise InvalidInput(f"A task file and {self.texts.given[0]} name two tasks; give one of them.")
        return self.task

    def load(self, asks: bool = True) -> Task:
        """The task: of a task file, or of a language model and its texts.

        Args:
            asks: whether there have to be questions to a language model.

        Raises:
            InvalidInput: neither is named, or what is named cannot be used.
        """
        if self.task is None and self.texts.given:
            return load_text_task(self.texts, self.overrides, asks)
        return load_task(self.task_file, self.overrides)

    @property
    def overrides(self) -> Overrides:
        """The settings that change the task's problem."""
        return Overrides(self.weight_decay, self.batch_size, self.device)


def _is_count(value: Any) -> bool:
    return is_whole(value) and value >= 1


def _is_number(value: Any) -> bool:
    return is_finite(value) and value >= 0


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and bool(value)


_Kind = tuple[Callable[[Any], bool], str, Callable[[Any], Any]]
_TEXT: _Kind = (_is_text, "words", str)
_PATH: _Kind = (_is_text, "a path", Path)
_TEXTS: _Kind = (
    lambda v: _is_text(v) or (isinstance(v, (list, tuple)) and bool(v) and all(map(_is_text, v))),
    "a text, or a list of texts",
    lambda v: (v,) if isinstance(v, str) else tuple(v),
)
_COUNT: _Kind = (_is_count, "a whole number of at least 1", int)
_KINDS: Final[Mapping[str, _Kind]] = {
    "task": _PATH,
    "out": _PATH,
    "method": _TEXT,
    "run": _PATH,
    "damping": (
        lambda v: _is_text(v) or _is_number(v),
        "a number, 'relative:SHARE', 'per-block:SHARE', 'per-direction:SHARE', 'training:RATE:STEPS' or "
        "'adam:RATE:STEPS:BATCH'",
        str,
    ),
    "queries": (lambda v: _is_text(v) or (is_whole(v) and v >= 0), "such as '0:20'", str),
    "top": _COUNT,
    "by": _TEXTS,
    "block": _COUNT,
    "report": (lambda v: isinstance(v, bool), "true or false", bool),
    "weight_decay": (_is_number, "a number of at least 0", float),
    "batch_size": _COUNT,
    "device": _TEXT,
    "hf": _TEXT,
    "dataset": _PATH,
    "query": _TEXTS,
    "answer": _TEXTS,
    "messages_column": _TEXT,
    "text_column": _TEXT,
    "prompt_column": _TEXT,
    "completion_column": _TEXT,
    "label_column": _TEXT,
    "source_column": _TEXT,
    "max_length": _COUNT,
    "normalisation": (lambda v: v in NORMALISATIONS, f"one of {', '.join(NORMALISATIONS)}", str),
}


def missing_argument(name: str, what: str) -> InvalidInput:
    """The error of a command without one of its arguments.

    Args:
        name: of the argument, as the usage line has it.
        what: to give there.
    """
    return InvalidInput(f"{name} is missing; give {what}.")


def settings_among(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Those arguments of a command that are settings, which the file of `--config` may hold as well.

    Args:
        arguments: all of the command's, by name: its `locals()`.
    """
    return {name: value for name, value in arguments.items() if name in _KINDS}


def merge_settings(flags: Mapping[str, Any], config: Path | None = None) -> RunSettings:
    """Merge the settings of the file with the flags, which win; `None` among the flags means not given.

    Raises:
        InvalidInput: the file cannot be read, or a value cannot be used.
        UnknownName: the file names a setting that the command does not have.
    """
    settings = {} if config is None else _read_settings(config, tuple(flags))
    for name, value in flags.items():
        if value is not None:
            settings[name] = _check_setting(f"--{name.replace('_', '-')}", name, value)
    return replace(RunSettings(), **settings)


def _read_settings(path: Path, known: tuple[str, ...]) -> dict[str, Any]:
    settings: dict[str, Any] = {}
    for key, value in read_table(path).items():
        name = key.replace("-", "_")
        if name not in known:
            raise UnknownName(
                f"{path.name} has no setting {key!r}.{nearest(name, known)} It may have {', '.join(known)}."
            )
        setting = _check_setting(f"{key} in {path.name}", name, value)
        # A path in a file is relative to the file's folder.
        settings[name] = path.parent / setting if isinstance(setting, Path) else setting
    return settings


def _check_setting(source: str, name: str, value: Any) -> Any:
    is_valid, expected, convert = _KINDS[name]
    value = str(value) if isinstance(value, Path) else value
    if not is_valid(value):
        raise InvalidInput(f"{source} is {value!r}; it must be {expected}.")
    return convert(value)


def read_table(path: Path) -> dict[str, Any]:
    """The table in a TOML or JSON file.

    Raises:
        InvalidInput: no such file, another kind, damaged, or no table.
    """
    if path.suffix not in (".toml", ".json"):
        raise InvalidInput(f"The config {str(path)!r} must end in .toml or .json.")
    try:
        text = path.read_text(encoding="utf-8")
        table = _toml().loads(text) if path.suffix == ".toml" else json.loads(text)
    except FileNotFoundError as cause:
        raise InvalidInput(f"The config {str(path)!r} does not exist; give the path of a TOML or JSON file.") from cause
    except (OSError, ValueError) as cause:  # both readers' errors, and bad UTF-8, are ValueErrors
        message = " ".join(str(cause).split()).rstrip(".")
        raise InvalidInput(f"The config {str(path)!r} cannot be read ({message}); correct it.") from cause
    if not isinstance(table, dict):
        raise InvalidInput(
            f"The config {str(path)!r} holds a {type(table).__name__}; it must be one table of settings."
        )
    return table


def _toml() -> Any:
    """The TOML reader: Python's own from 3.11 on."""
    return require("tomllib" if sys.version_info >= (3, 11) else "tomli", "cli")
