"""The result of a calculation: it unpacks into three values, and can also be used as a dictionary."""

from __future__ import annotations

import dis
import json
import os
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import FrameType
from typing import Any, final

import torch

from ..core.errors import InvalidInput
from ..scores.scores import Scores


@final
class InfluenceResult(dict[str, dict[str, Any]]):
    """`influences, harmful, helpful = result`; and a dictionary of the influences by test index; also `result.scores`.

    `result[str(test index)]` holds `label`, `num_in_dataset`, `time_calc_influence_s`, `influence` (one number per
    training example, in training order), and the example's own `harmful` and `helpful` lists, cut at `top_k`.

    The 0.1 releases promised three values in their README, and their last commit returned the dictionary. Both uses
    work: assigned to several names it gives the three values; everywhere else (`for i in result`, `json.dumps(result)`,
    `list(result)`) it is the dictionary.

    **Sign.** A value is the predicted *increase of the test loss* if that training example were removed and the model
    retrained: positive = helpful. `helpful` is in descending, `harmful` in ascending order, equal values by index.

    `harmful` and `helpful` at the top hold all training indices, ordered by the mean value over the test examples.

    Args:
        influences: the entries by test index, as a string.
        harmful: all training indices, the most harmful first.
        helpful: all training indices, the most helpful first.
        scores: the same numbers as `Scores`.
        path: the file the entries were written to.
    """

    def __init__(
        self,
        influences: Mapping[str, dict[str, Any]],
        harmful: list[int],
        helpful: list[int],
        scores: Scores,
        path: Path | None = None,
    ) -> None:
        super().__init__(influences)
        self.harmful = harmful
        self.helpful = helpful
        self.scores = scores
        self.path = path
        """The file with the influences."""

    @property
    def influences(self) -> dict[str, dict[str, Any]]:
        """The entries by test index, as a plain dictionary."""
        return dict(self.items())

    def __reduce__(self) -> tuple[Any, ...]:
        return InfluenceResult, (self.influences, self.harmful, self.helpful, self.scores, self.path)

    @staticmethod
    def of(influences: dict[str, dict[str, Any]], scores: Scores, path: Path | None = None) -> InfluenceResult:
        """Order all training examples by the mean over the queries.

        Args:
            influences: the entries by test index, as a string.
            scores: the same numbers as `Scores`.
            path: the file the entries were written to.
        """
        return InfluenceResult(
            influences, scores.harmful_order(None).tolist(), scores.helpful_order(None).tolist(), scores, path
        )

    @staticmethod
    def load(path: str | os.PathLike[str]) -> InfluenceResult:
        """Read a result file, or any JSON in its layout.

        Args:
            path: the file.

        Raises:
            InvalidInput: it has another layout.
        """
        try:
            influences: dict[str, dict[str, Any]] = json.loads(Path(path).read_text(encoding="utf-8"))
            values = torch.tensor([entry["influence"] for entry in influences.values()], dtype=torch.float64)
            ids = torch.tensor([int(key) for key in influences])
            labels = [entry["label"] for entry in influences.values()]
        except (ValueError, TypeError, KeyError, AttributeError) as cause:
            raise InvalidInput(
                f"{os.fspath(path)!r} is not a result of calc_img_wise (an object with 'influence' per test index)."
            ) from cause
        return InfluenceResult.of(influences, Scores(values, query_ids=ids, query_labels=labels), Path(path))

    def __iter__(self) -> Iterator[Any]:
        """Influences, harmful, helpful where it is assigned to several names, else the test indices."""
        if _is_unpacking(sys._getframe(1)):
            return iter((self.influences, self.harmful, self.helpful))
        return super().__iter__()

    def __getitem__(self, key: str | int) -> Any:
        if isinstance(key, int):
            return (self.influences, self.harmful, self.helpful)[key]
        return super().__getitem__(key)

    def position(self, test_index: int | str) -> int:
        """Which row of `scores` belongs to a test index.

        Args:
            test_index: the position in the test dataset.

        Raises:
            InvalidInput: it was not part of the run.
        """
        keys = list(self.keys())
        if str(test_index) not in keys:
            raise InvalidInput(
                f"Test example {test_index} is not in this result, which has {', '.join(keys[:8])}"
                f"{' and more' if len(keys) > 8 else ''}."
            )
        return keys.index(str(test_index))

    def __repr__(self) -> str:
        rows, n = self.scores.shape
        file = "" if self.path is None else f", {str(self.path)!r}"
        return f"InfluenceResult({rows} test examples x {n:,} training examples{file})"


def _is_unpacking(caller: FrameType) -> bool:
    """Whether the caller stands at `a, b, c = ...`, which Python iterates just as it does `for i in ...`."""
    return dis.opname[caller.f_code.co_code[caller.f_lasti]] in ("UNPACK_SEQUENCE", "UNPACK_EX")


def result_entry(scores: Scores, q: int, label: Any, seconds: float, top_k: int | None) -> dict[str, Any]:
    """One test example in the original package's layout."""
    content: Mapping[str, Any] = next(iter(scores[q].to_dict(top_k).values()))
    return {**content, "label": label, "time_calc_influence_s": seconds}
