"""A language model's folder, a file of texts and questions, as the task of a command: what `--hf` reads."""

import contextlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, final

from ..core.errors import InvalidInput, require
from ..core.progress import Meter
from ..hf.asking import queries_for
from ..hf.models import load_model
from ..hf.problem import problem as text_problem
from ..hf.queries import query as ask
from ..hf.texts import Texts
from ..problem.problem import Problem
from .task import Overrides, Task, move_model
from .wording import TEXT_ARGUMENTS

_FORMATS: Final = (".jsonl", ".json")
# Longer texts are content and not facts of a row.
_WORDS: Final = 100


@final
@dataclass(frozen=True)
class TextFlags:
    """The flags that stand for a task file where a language model is asked.

    `query` and `answer` are lists, an answer per query or none at all: then the model writes it, or, of plain texts,
    the query is the text that is asked about.
    """

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
    def given(self) -> list[str]:
        """The flags that were used."""
        return [f"--{name.replace('_', '-')}" for name, value in vars(self).items() if value]


def load_text_task(flags: TextFlags, overrides: Overrides, asks: bool = True) -> Task:
    """The model, its texts and the questions.

    Args:
        flags: what was given on the command line.
        overrides: what changes the problem.
        asks: whether there have to be questions; without, the task has none.

    Raises:
        InvalidInput: a flag is missing, or the file is none of texts.
        MissingExtra: transformers is not installed.
    """
    if flags.hf is None:
        raise InvalidInput(f"{flags.given[0]} belongs to a language model; give its folder with --hf.")
    if flags.dataset is None:
        raise InvalidInput("--hf needs --dataset, a .jsonl file with the texts that the model was trained on.")
    if asks and not flags.query:
        raise InvalidInput('--hf needs --query, what is asked about: --query "Who wrote Emma?", once or more often.')
    if flags.answer and len(flags.answer) != len(flags.query):
        raise InvalidInput(
            f"There are {len(flags.answer)} --answer for {len(flags.query)} --query; give one each, or none."
        )
    rows = read_rows(flags.dataset)
    with _silent_bars(), Meter(1, "loading the model") as meter:
        model = load_model(flags.hf)
        meter.advance()
    if overrides.device is not None:
        move_model(model, overrides.device)
    options: dict[str, Any] = {name: getattr(flags, name) for name in TEXT_ARGUMENTS}
    options |= {name: value for name, value in vars(overrides).items() if value is not None and name != "device"}
    problem = text_problem(model, flags.hf, rows, **options)
    queries = _questions(problem, flags, rows) if asks else None
    return Task(Path(flags.hf), problem, queries, columns=_facts_of(problem, rows))


@contextlib.contextmanager
def _silent_bars() -> Iterator[None]:
    """Without the bars of transformers, which would stand between our own lines."""
    logging = require("transformers.utils.logging", "hf")
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def read_rows(path: Path) -> list[Any]:
    """The rows of a `.jsonl` file, one object or text a line, or of a `.json` file that holds a list of them.

    Raises:
        InvalidInput: no such file, another kind, or a line that is not JSON.
    """
    if path.suffix not in _FORMATS:
        raise InvalidInput(
            f"--dataset {str(path)!r} is no .jsonl or .json file; write the texts as one JSON object a line, with "
            "dataset.to_json(path) from Hugging Face's datasets."
        )
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as cause:
        raise InvalidInput(f"--dataset {str(path)!r} cannot be read ({cause}); give a file of texts.") from cause
    if path.suffix == ".json":
        rows = _parse(path, text, "")
        if not isinstance(rows, list):
            raise InvalidInput(f"{path.name} holds a {type(rows).__name__}; expected a list of rows.")
    else:
        rows = [_parse(path, line, f", line {n}") for n, line in enumerate(text.split("\n"), 1) if line.strip()]
    if not rows:
        raise InvalidInput(f"{path.name} holds no row; give the texts that the model was trained on.")
    return rows


def _parse(path: Path, text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as cause:
        raise InvalidInput(f"{path.name}{where}: not JSON ({cause.msg}); write one object a line.") from cause


def _facts_of(problem: Problem, rows: Sequence[Any]) -> dict[str, list[Any]] | None:
    """What the rows say of their texts beside the texts: numbers, yes or no, and words of some length, by column."""
    texts = problem.data.dataset
    read = texts.columns.names if isinstance(texts, Texts) and texts.columns is not None else ()
    if len(problem.data.whole) != len(rows) or not all(isinstance(row, dict) for row in rows):
        return None
    names = dict.fromkeys(name for row in rows for name in row if name not in read)
    columns = {name: [row.get(name) for row in rows] for name in names}
    return {name: cells for name, cells in columns.items() if _are_facts(cells)} or None


def _are_facts(cells: Sequence[Any]) -> bool:
    """Whether all that is there are short texts, or all numbers."""
    there = [cell for cell in cells if cell is not None]
    if all(isinstance(cell, str) for cell in there):
        return all(len(cell) <= _WORDS for cell in there)
    return all(isinstance(cell, (bool, int, float)) for cell in there)


def _questions(problem: Problem, flags: TextFlags, rows: Sequence[Any]) -> Any:
    """Queries in the form that the texts have: of chats a user's turn, of prompts a prompt, of texts the text."""
    texts = problem.data.dataset
    if not isinstance(texts, Texts):  # a model for classes: answers are labels
        answers = [{"label": int(a) if a.isdecimal() else a} for a in flags.answer] or [{}] * len(flags.query)
        return queries_for(problem, [{"text": q} | a for q, a in zip(flags.query, answers, strict=True)])
    chats = texts.encoded[0].chat is not None
    prompts = [[{"role": "user", "content": query}] for query in flags.query] if chats else list(flags.query)
    first = rows[0]
    paired = flags.prompt_column or (isinstance(first, dict) and {"prompt", "completion"} <= set(first))
    if flags.answer or chats or paired:
        return ask(problem.model, texts.tokenizer, prompts, list(flags.answer) or None)
    return queries_for(problem, prompts)
