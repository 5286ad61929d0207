"""Parts of the model, by which scores are told apart: layers, or what patterns pick."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, TypeAlias

from ..core.errors import InvalidInput, UnknownName, nearest
from ..gradients.per_example import Derivatives
from ..linalg.space import ROOT, Space

By: TypeAlias = str | Sequence[str] | Mapping[str, str | Sequence[str]]
"""What `by=` takes: `"layer"`, patterns of names, or patterns by the name of the part."""

OTHERS = "(others)"
"""The part of what no pattern picks: all parts together are the whole model."""


@dataclass(frozen=True)
class Parts:
    """The blocks of parameters of every part, each block in one part.

    >>> list(Parts({"body": ("0", "2"), "head": ("4",)}).blocks)
    ['body', 'head']
    """

    blocks: Mapping[str, tuple[str, ...]]

    def __len__(self) -> int:
        return len(self.blocks)

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
                return Parts(_by_layer(derivatives.whole))
            by = [by]
        if isinstance(by, Mapping):
            patterns = {str(k): [v] if isinstance(v, str) else list(v) for k, v in by.items()}
        elif isinstance(by, Sequence):
            patterns = {str(pattern): [pattern] for pattern in by}
        else:
            patterns = {}
        if not patterns or not all(isinstance(p, str) for several in patterns.values() for p in several):
            raise InvalidInput(
                f"by={by!r} tells no parts; write 'layer', patterns of names such as ['layers.0', '*.attention'], or "
                "patterns by the name of the part."
            )
        return Parts(_by_patterns(patterns, names))


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
