"""What the library calls by its name in Python, as it is typed on the command line."""

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


def as_typed(sentence: str) -> str:
    """A sentence with flags and commands in place of arguments and functions.

    >>> as_typed("'ix' holds another index; give another folder, or overwrite=True to replace it.")
    "'ix' holds another index; give another folder, or --overwrite to replace it."
    """
    for in_python, typed in _TYPED:
        sentence = sentence.replace(in_python, typed)
    return sentence
