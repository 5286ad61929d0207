"""How much is worked on at once: long loops over rows are cut into chunks whose temporaries fit in memory."""

from __future__ import annotations

# The numbers that the temporaries of one chunk may take, whatever is computed.
CHUNK_NUMBERS = 1 << 24
# Scores that are computed at once, in numbers, but of at least so many training examples, so that products are fast.
SCORE_NUMBERS, SCORE_ROWS = 1 << 22, 64
# Columns that are gathered before the extremes among them are picked: one selection over many is cheaper than many.
_GATHERED = 1024
# Rows that are written out at once for a product, in numbers, but at least so many rows, so that the product is fast.
_WRITTEN_NUMBERS, _WRITTEN_ROWS = 1 << 22, 256


def written_numbers(numbers_each: int) -> int:
    """The numbers of rows that are written out at once for a product, where one row takes so many.

    >>> written_numbers(100), written_numbers(50_000), written_numbers(10_000_000)
    (4194304, 12800000, 16777216)
    """
    return min(CHUNK_NUMBERS, max(_WRITTEN_NUMBERS, _WRITTEN_ROWS * numbers_each))


def gathered_columns(k: int) -> int:
    """Columns of scores that are gathered before the k extremes of every row are picked.

    >>> gathered_columns(10), gathered_columns(1000)
    (1024, 4000)
    """
    return max(_GATHERED, 4 * k)


def chunks(count: int, numbers_each: int, most: int | None = None) -> list[slice]:
    """Slices that cover `count` items in order, so that the items of one slice take at most `CHUNK_NUMBERS` numbers.

    Args:
        count: how many items there are.
        numbers_each: how many numbers one item takes; one item is never cut.
        most: another bound than `CHUNK_NUMBERS`.

    >>> chunks(5, 10, most=20)
    [slice(0, 2, None), slice(2, 4, None), slice(4, 5, None)]
    """
    bound = CHUNK_NUMBERS if most is None else most
    step = max(1, bound // max(1, numbers_each))
    return [slice(start, min(start + step, count)) for start in range(0, count, step)]
