"""Parts of the model, by which scores are told apart: layers, or what patterns pick."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, TypeAlias

from ..core.errors import InvalidInput, UnknownName, nearest
from ..gradients.per_example import Derivatives
from ..linalg.dual_solution import DualSolution
from ..linalg.rows import Rows
from ..linalg.space import ROOT, Space
from .heads import Cut, heads_of, rest_of

By: TypeAlias = str | Sequence[str] | Mapping[str, str | Sequence[str]]
"""What `by=` takes: `"layer"`, `"head"`, patterns of names, or patterns by the name of the part."""

OTHERS = "(others)"
"""The part of what no pattern picks: all parts together are the whole model."""


@dataclass(frozen=True)
class Part:
    """Some blocks of parameters, and some rows or columns of others."""

    blocks: tuple[str, ...]
    cuts: tuple[Cut, ...] = ()

    def of(self, rows: Rows) -> Rows:
        """What vectors in parameter space have in this part."""
        own = dict(rows.only(self.blocks).blocks)
        for cut in self.cuts:
            piece = slice(cut.start, cut.stop)
            sides = (piece, None) if cut.axis == 0 else (None, piece)
            own[cut.name] = rows.blocks[cut.block].project(*sides)
        return Rows(own)

    def of_solved(self, solved: Rows | DualSolution) -> Rows | DualSolution:
        """The same of solved queries; whole blocks of a dual solution are never written out."""
        return self.of(solved.rows()) if self.cuts else solved.only(self.blocks)


@dataclass(frozen=True)
class Parts:
    """The parts of a model by name; every parameter that takes part is in one of them.

    >>> list(Parts({"body": Part(("0", "2")), "head": Part(("4",))}))
    ['body', 'head']
    """

    parts: Mapping[str, Part]

    def __len__(self) -> int:
        return len(self.parts)

    def __iter__(self) -> Iterator[str]:
        return iter(self.parts)

    def values(self) -> list[Part]:
        """The parts, in the order of their names."""
        return list(self.parts.values())

    @property
    def divides_layers(self) -> bool:
        """Whether some layer is in more than one part."""
        return any(part.cuts for part in self.parts.values())

    @staticmethod
    def of(by: Any, derivatives: Derivatives) -> Parts:
        """Read `by=` for the parameters that take part.

        Raises:
            UnknownName: a pattern matches nothing; the nearest name is offered.
            InvalidInput: `by` is none of what can be read, two parts share a layer, or gradients are projected as a
                whole.
        """
        names = list(derivatives.whole.blocks)
        if set(names) != set(derivatives.space.blocks):
            raise InvalidInput(
                f"by={by!r} tells layers apart, and gradients are projected all together here; use per_layer=True in "
                "the projection, or a method without one."
            )
        if isinstance(by, str):
            if by == "layer":
                return Parts(_whole(_by_layer(derivatives.whole)))
            if by == "head":
                return Parts(_by_head(derivatives))
            by = [by]
        if isinstance(by, Mapping):
            patterns = {str(k): [v] if isinstance(v, str) else list(v) for k, v in by.items()}
        elif isinstance(by, Sequence):
            patterns = {str(pattern): [pattern] for pattern in by}
        else:
            patterns = {}
        if not patterns or not all(isinstance(p, str) for several in patterns.values() for p in several):
            raise InvalidInput(
                f"by={by!r} tells no parts; write 'layer', 'head', patterns of names such as "
                "['layers.0', '*.attention'], or patterns by the name of the part."
            )
        return Parts(_whole(_by_patterns(patterns, names)))


def _whole(blocks: Mapping[str, tuple[str, ...]]) -> dict[str, Part]:
    return {name: Part(several) for name, several in blocks.items()}


def _by_head(derivatives: Derivatives) -> dict[str, Part]:
    """Every attention head, and what belongs to no head by its layer."""
    space = derivatives.whole
    heads = heads_of(derivatives.problem.model, space)
    if not heads:
        raise InvalidInput(
            "by='head' found no attention among the parameters that take part: it is known by its number of heads and "
            "by projections such as q_proj, query or in_proj_weight; use by='layer', or patterns of names."
        )
    rest = rest_of(heads, space)
    parts = {name: Part((), cuts) for name, cuts in heads.items()}
    for name, blocks in _by_layer(space).items():
        own = Part(tuple(b for b in blocks if b not in rest), tuple(c for b in blocks for c in rest.get(b, ())))
        if own.blocks or own.cuts:
            parts[name] = own
    return parts


def _by_layer(space: Space) -> dict[str, tuple[str, ...]]:
    """A weight and its bias are one block of the layer's name, or blocks whose names begin with it."""
    layers: dict[str, list[str]] = {}
    for name, block in space.blocks.items():
        layers.setdefault(name if block.joint else name.rpartition(".")[0] or ROOT, []).append(name)
    return {name: tuple(blocks) for name, blocks in layers.items()}


def _by_patterns(patterns: Mapping[str, Sequence[str]], names: Sequence[str]) -> dict[str, tuple[str, ...]]:
    part_of: dict[str, str] = {}
    for part, several in patterns.items():
        for pattern in several:
            picked = [name for name in names if _picks(pattern, name)]
            if not picked:
                known = [*names, *{place for name in names for place in _places(name)}]
                raise UnknownName(
                    f"The pattern {pattern!r} of by= matches no layer that takes part (a weight and its bias go "
                    f"together under their layer's name).{nearest(pattern, known)}"
                )
            for name in picked:
                if part_of.setdefault(name, part) != part:
                    raise InvalidInput(
                        f"The parts {part_of[name]!r} and {part!r} of by= share {name!r}; let each layer be in one "
                        "part, so that parts add up to the whole."
                    )
    parts = {part: tuple(name for name in names if part_of.get(name) == part) for part in patterns}
    rest = tuple(name for name in names if name not in part_of)
    return parts | ({OTHERS: rest} if rest else {})


def _picks(pattern: str, name: str) -> bool:
    """Whether a pattern means a block, or a module that it is in."""
    return any(fnmatchcase(place, pattern) for place in _places(name))


def _places(name: str) -> list[str]:
    """The name itself and the modules around it, from the inside."""
    pieces = name.split(".")
    return [".".join(pieces[:end]) for end in range(len(pieces), 0, -1)]
