"""What the library calls by its name in Python, as it is typed on the command line."""

import re
from typing import Final

_TYPED: Final = (
    ("overwrite=True", "--overwrite"),
    ("with ptif.Index.build.", "with ptif index build."),
    ("call Index.build(...) again", "run ptif index build again"),
    ("call Index.build(...) or append(...) again", "run ptif index build again"),
    ("of where= holds", "of --where holds"),
    (
        "of that kind, a list of them, or a function of the column such as lambda values: values > 3.",
        "of that kind; --where may be given again for another.",
    ),
)
TEXT_ARGUMENTS: Final = (
    "messages_column",
    "text_column",
    "prompt_column",
    "completion_column",
    "label_column",
    "source_column",
    "max_length",
    "normalisation",
)
"""Arguments of `ptif.hf.problem` that are flags under the same name."""
_ARGUMENT: Final = re.compile(rf"\b({'|'.join(TEXT_ARGUMENTS)})=(?=(\S?))")


def as_typed(sentence: str) -> str:
    """A sentence with flags and commands in place of arguments and functions.

    >>> as_typed("give max_length= as training did, or text_column='body'.")
    "give --max-length as training did, or --text-column 'body'."

    >>> as_typed("'ix' holds another index; give another folder, or overwrite=True to replace it.")
    "'ix' holds another index; give another folder, or --overwrite to replace it."
    """
    for in_python, typed in _TYPED:
        sentence = sentence.replace(in_python, typed)
    return _ARGUMENT.sub(_as_flag, sentence)


def _as_flag(argument: re.Match[str]) -> str:
    """`max_length=` as `--max-length`, with a space before a value."""
    flag, follows = f"--{argument[1].replace('_', '-')}", argument[2]
    return f"{flag} " if follows and follows not in ".,;:)" else flag
