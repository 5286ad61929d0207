"""Scores told apart by parts of the model."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, Final, final

import torch
from jaxtyping import Float
from torch import Tensor

from ..core.errors import InvalidInput, UnknownName, nearest, require
from ..core.files import write_tensors
from . import export
from .contents import contents_of, read_contents, rebuild
from .diagnostics import Diagnostics
from .scores import Scores

_KIND: Final = "scores by part"
_OF_EACH: Final = ("values", "indices")
"""What every part has of its own."""


@final
@dataclass(frozen=True, eq=False, repr=False)
class PartScores(Mapping[str, Scores]):
    """The scores of every part of the model, by its name; `attribution.score(queries, by="layer")` gives them.

    A score is an inner product over all parameters, so it is the sum of its parts: what each layer contributes to the
    predicted change, after the whole system was solved. Every part is a `Scores` of its own, to rank, plot and save.

    Args:
        scores: by part, all of the same queries.

    >>> parts = PartScores({"0": Scores(torch.tensor([[0.1, -0.3]])), "2": Scores(torch.tensor([[0.2, 0.1]]))})
    >>> list(parts), parts["2"].helpful(0, k=1)[0][0], parts.values_by_part.shape
    (['0', '2'], 0, torch.Size([2, 1, 2]))
    """

    scores: Mapping[str, Scores]

    def __post_init__(self) -> None:
        object.__setattr__(self, "scores", dict(self.scores))
        if not self.scores:
            raise InvalidInput("PartScores needs the scores of at least one part.")

    def __getitem__(self, part: str) -> Scores:
        if part not in self.scores:
            raise UnknownName(f"There is no part {part!r} of the model here.{nearest(part, self.scores)}")
        return self.scores[part]

    def __iter__(self) -> Iterator[str]:
        return iter(self.scores)

    def __len__(self) -> int:
        return len(self.scores)

    def __contains__(self, part: object) -> bool:
        return part in self.scores

    @property
    def diagnostics(self) -> Diagnostics:
        """How the scores came about: the same for all parts."""
        return next(iter(self.scores.values())).diagnostics

    @property
    def values_by_part(self) -> Float[Tensor, "p q n"]:
        """All scores as one tensor.

        Raises:
            InvalidInput: each part holds other training examples (`top=`).
        """
        self._refuse_unlike()
        return torch.stack([scores.values for scores in self.scores.values()])

    def total(self) -> Scores:
        """The scores of the whole model: the sum over the parts.

        Raises:
            InvalidInput: each part holds other training examples (`top=`).
        """
        self._refuse_unlike()
        first, *others = self.scores.values()
        values = first.values.double()
        for scores in others:
            values = values + scores.values.double()
        return replace(first, values=values.to(first.values.dtype))

    def shares(self) -> dict[str, float]:
        """The root mean square of each part's scores over that of the total: where in the model the answer lies.

        Shares do not add up to one: parts that pull in opposite directions each count in full.

        Raises:
            InvalidInput: each part holds other training examples (`top=`).
        """
        whole = float(self.total().values.double().square().mean().sqrt()) or 1.0
        return {n: float(s.values.double().square().mean().sqrt()) / whole for n, s in self.scores.items()}

    def save(self, path: str | os.PathLike[str], fingerprint: str | None = None) -> None:
        """Write the scores of all parts to one safetensors file, as `Scores.save` does for one.

        Args:
            path: the file; one that is there is replaced, whole or not at all.
            fingerprint: a name for what they were made from, kept in the file.

        Raises:
            InvalidInput: labels or names are not numbers, words or lists of them; or the file cannot be written.
        """
        common, record = contents_of(next(iter(self.scores.values())))
        tensors = {k: tensor for k, tensor in common.items() if k not in _OF_EACH}
        # Labels, names and diagnostics are the same for all parts, and may be long.
        for at, scores in enumerate(self.scores.values()):
            tensors |= {f"{at}.{k}": own for k in _OF_EACH if (own := getattr(scores, k)) is not None}
        write_tensors(path, _KIND, tensors, {"parts": list(self.scores), "of all": record, "fingerprint": fingerprint})

    @classmethod
    def load(cls, path: str | os.PathLike[str], fingerprint: str | None = None) -> PartScores:
        """The scores that `save` wrote, bit for bit.

        Args:
            path: the file.
            fingerprint: what the scores must have been saved with; `None`: anything.

        Raises:
            InvalidInput: no such file, a damaged one, or one of another kind, version or fingerprint.
        """
        tensors, record = read_contents(path, _KIND, fingerprint)
        parts, common = {}, {k: tensor for k, tensor in tensors.items() if "." not in k}
        for at, name in enumerate(record.get("parts", ())):
            own = {k: tensors[f"{at}.{k}"] for k in _OF_EACH if f"{at}.{k}" in tensors}
            parts[name] = rebuild(Scores, path, common | own, record.get("of all", {}))
        return cls(parts)

    def to_frame(self) -> Any:
        """The long pandas table of `Scores.to_frame` for every part, with the column `part` in front.

        Needs pandas (`pip install 'pytorch-influence-functions[frame]'`).
        """
        pandas = require("pandas", "frame")
        tables = [pandas.DataFrame({"part": name} | export.long_table(s)) for name, s in self.scores.items()]
        return pandas.concat(tables, ignore_index=True)

    def __repr__(self) -> str:
        first = next(iter(self.scores.values()))
        names = ", ".join(map(repr, list(self.scores)[:4])) + (", ..." if len(self) > 4 else "")
        return f"PartScores({len(self)} parts: {names}; each {len(first):,} x {first.shape[1]:,})"

    def _refuse_unlike(self) -> None:
        first, *others = self.scores.values()
        for scores in others:
            same = scores.values.shape == first.values.shape and (
                scores.indices is first.indices
                or (scores.indices is not None and first.indices is not None and scores.indices.equal(first.indices))
            )
            if not same:
                raise InvalidInput(
                    "Each part holds other training examples, so parts cannot be put together; score without top=."
                )
