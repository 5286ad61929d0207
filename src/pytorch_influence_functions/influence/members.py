"""The fitted checkpoints of an attribution: kept while there is room, else fitted again when asked for."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import overload

from ..core.distributed import current
from ..curvature.base import Budget
from .fitted_member import FittedMember
from .held_bytes import bytes_held
from .member_fits import FitChanged


@dataclass(frozen=True)
class MemberFacts:
    """What is told of a fitted checkpoint after it is gone."""

    damping: float
    effective_dimension: float
    notes: tuple[str, ...]

    @staticmethod
    def of(member: FittedMember) -> MemberFacts:
        """The facts of one fitted checkpoint."""
        notes = tuple(getattr(member.operator, "notes", ()))
        return MemberFacts(member.shift.damping, member.effective_dimension, notes)


@dataclass(eq=False, repr=False)
class Members(Sequence[FittedMember]):
    """One fitted member per checkpoint.

    All of them are fitted once by `fit`. The first is kept, and so are the next ones while all together fit the memory
    budget; any other is fitted again whenever it is asked for. So memory does not grow with the number of checkpoints.

    Args:
        fit_one: fits the member of one checkpoint, counted from 0.
        size: how many checkpoints there are.
        budget: what the kept members may take together.
    """

    fit_one: Callable[[int], FittedMember]
    size: int
    budget: Budget
    facts: list[MemberFacts] = field(default_factory=list)
    _kept: dict[int, FittedMember] = field(default_factory=dict)

    @staticmethod
    def fit(fit_one: Callable[[int], FittedMember], count: int, budget: Budget) -> Members:
        """Fit every member once."""
        members, used = Members(fit_one, count, budget), 0
        for k in range(count):
            member = fit_one(k)
            members.facts.append(MemberFacts.of(member))
            # Processes that share curvature and solver hold parts of other sizes, and have to fit again alike.
            used += int(current().largest(bytes_of(member)))
            if k == 0 or used <= budget.bytes:
                members._kept[k] = member
        return members

    def __len__(self) -> int:
        return self.size

    def __repr__(self) -> str:
        return f"Members({self.size} fitted, {len(self._kept)} kept)"

    @overload
    def __getitem__(self, k: int) -> FittedMember: ...
    @overload
    def __getitem__(self, k: slice) -> Sequence[FittedMember]: ...
    def __getitem__(self, k: int | slice) -> FittedMember | Sequence[FittedMember]:
        if isinstance(k, slice):
            return [self[i] for i in range(self.size)[k]]
        k = range(self.size)[k]
        return self._kept[k] if k in self._kept else self.fit_one(k)

    def __iter__(self) -> Iterator[FittedMember]:
        return (self[k] for k in range(self.size))

    @property
    def kept(self) -> int:
        """How many are kept in memory."""
        return len(self._kept)

    def transform(self, change: Callable[[FittedMember], FittedMember]) -> Members:
        """The same checkpoints with every member changed, such as by another damping."""
        return Members.fit(FitChanged(self, change), self.size, self.budget)


def bytes_of(member: FittedMember) -> int:
    """Bytes of the tensors that a fitted member holds beside the model and the data."""
    return bytes_held(member.operator, member.preconditioner, member.state)
