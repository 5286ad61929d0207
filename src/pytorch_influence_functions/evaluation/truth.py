"""What retraining measured: saved, loaded, and carrying the recipe it came from."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, final

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from ..core.errors import InfluenceError, InvalidInput, NonFinite
from ..core.files import read_tensors, write_tensors
from .subsets import Protocol, Subsets

_KIND = "truth"
_RECORD = ("lower_is_better", "recipe", "measure", "how", "fingerprint", "seconds")


@final
@dataclass(frozen=True, eq=False, repr=False)
class Truth:
    """Measurements after retraining on each subset, with each seed.

    Args:
        subsets: what was trained on, and under which protocol.
        measured: float [S, R, Q], the measure of query q after training on subset s with seed r.
        baseline: float [R, Q], the same after training on everything.
        seeds: the R seeds.
        lower_is_better: of the measure, as in `Scores`.
        recipe: how models were trained, in words.
        measure: what was measured, in words.
        how: how the work was done, in words.
        fingerprint: of everything the measurements depend on: recipe, model, loss, data, queries, measure, version.
        seconds: time spent; parts found on disk count with the time they took then.

    Raises:
        InvalidInput: shapes that do not fit each other.
        NonFinite: a measurement is NaN or infinite.
    """

    subsets: Subsets
    measured: Float[Tensor, "s r q"]
    baseline: Float[Tensor, "r q"]
    seeds: tuple[int, ...]
    lower_is_better: bool = True
    recipe: str = ""
    measure: str = ""
    how: str = ""
    fingerprint: str = ""
    seconds: float = 0.0

    def __post_init__(self) -> None:
        s, r, q = self.measured.shape
        if (s, r) != (len(self.subsets), len(self.seeds)) or self.baseline.shape != (r, q):
            raise InvalidInput(
                f"Measurements of shape {tuple(self.measured.shape)} and a baseline of shape "
                f"{tuple(self.baseline.shape)} do not fit {len(self.subsets)} subsets and {len(self.seeds)} seeds; "
                "expected (subsets, seeds, queries) and (seeds, queries)."
            )
        if not bool(torch.isfinite(self.measured).all()) or not bool(torch.isfinite(self.baseline).all()):
            raise NonFinite("The measurements hold NaN or infinity: a training diverged; lower its learning rate.")

    @property
    def protocol(self) -> Protocol:
        """How the subsets were chosen."""
        return self.subsets.protocol

    @property
    def name(self) -> str:
        """The protocol with its numbers: printed beside every number that follows from it."""
        return f"{self.subsets.name}, {len(self.seeds)} seed{'s' * (len(self.seeds) != 1)}"

    @property
    def out(self) -> Bool[Tensor, "s n"]:
        """What each subset leaves out."""
        return ~self.subsets.kept

    def changes(self) -> Float[Tensor, "s r q"]:
        """Measurement minus that of training on everything with the same seed."""
        return self.measured.double() - self.baseline.double()

    def first(self, seeds: int) -> Truth:
        """The same with only the first `seeds` seeds."""
        if not 1 <= seeds <= len(self.seeds):
            raise InvalidInput(f"There are {len(self.seeds)} seeds; asked for {seeds}.")
        return self._with(self.measured[:, :seeds], self.baseline[:seeds], self.seeds[:seeds])

    def _with(self, measured: Tensor, baseline: Tensor, seeds: tuple[int, ...]) -> Truth:
        return replace(self, measured=measured, baseline=baseline, seeds=seeds)

    def predicted(self, values: Tensor) -> Float[Tensor, "q s"]:
        """What scores [Q, N] say of each subset: the sum over what it leaves out, the predicted change.

        Args:
            values: scores [Q, N].

        Raises:
            InvalidInput: scores of another shape, or a protocol that no removal scores speak of.
        """
        if self.protocol is Protocol.RELABELLED:
            raise InvalidInput(
                "Scores predict removals, and these subsets change labels; predict with the difference of two scores."
            )
        expected = (self.measured.shape[2], self.subsets.n)
        if tuple(values.shape) != expected:
            raise InvalidInput(
                f"Scores of shape {tuple(values.shape)} do not fit this truth of {expected[0]} queries and "
                f"{expected[1]} training examples; score the same data, without top=."
            )
        return values.double() @ self.out.double().T

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write to one safetensors file.

        Args:
            path: the file; one that is there is replaced, whole or not at all.

        Raises:
            InvalidInput: labels that are not numbers or words, or a place that cannot be written to.
        """
        record: dict[str, Any] = {name: getattr(self, name) for name in _RECORD}
        record |= {"seeds": list(self.seeds), "protocol": self.protocol.name, "detail": self.subsets.detail}
        record["labels"] = [[[i, label] for i, label in change.items()] for change in self.subsets.labels]
        tensors = {"kept": self.subsets.kept, "measured": self.measured, "baseline": self.baseline}
        write_tensors(path, _KIND, tensors, record)

    @staticmethod
    def load(path: str | os.PathLike[str]) -> Truth:
        """Read what `save` wrote.

        Args:
            path: the file.

        Raises:
            InvalidInput: not such a file, or a damaged one.
        """
        tensors, record = read_tensors(path, _KIND)
        try:
            labels: tuple[Mapping[int, Any], ...] = tuple({int(i): y for i, y in change} for change in record["labels"])
            subsets = Subsets(tensors["kept"], Protocol[record["protocol"]], record["detail"], labels)
            described = {name: record[name] for name in _RECORD}
            return Truth(subsets, tensors["measured"], tensors["baseline"], tuple(record["seeds"]), **described)
        except InfluenceError:
            raise
        except (KeyError, TypeError, ValueError) as cause:
            raise InvalidInput(
                f"{os.fspath(path)!r} does not hold what measurements are made of; save them anew."
            ) from cause

    def __repr__(self) -> str:
        s, r, q = self.measured.shape
        return (
            f"Truth({self.name}: {s * r} models of {self.recipe or 'an unnamed recipe'}, {self.measure or 'a measure'} "
            f"on {q} quer{'y' if q == 1 else 'ies'}{', ' + self.how if self.how else ''}, {self.seconds:.0f} s)"
        )
