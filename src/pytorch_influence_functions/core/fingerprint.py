"""What a stored result was made from: one digest per ingredient, so that a mismatch names what changed."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, final

import torch

from .._version import __version__
from .digest import digest

VERSION = {"pytorch_influence_functions": __version__, "torch": torch.__version__}
"""An ingredient of every fingerprint: another version may compute other numbers."""
_DIGITS = 12


@final
@dataclass(frozen=True)
class Probe:
    """Numbers computed on a few examples: compared rather than hashed, since rounding differs from run to run.

    Args:
        values: the numbers.
        sizes: for each, the size that its rounding is relative to.
        rtol: how far two runs of the same code may lie apart, relative to `sizes`.
    """

    values: tuple[float, ...]
    sizes: tuple[float, ...]
    rtol: float

    @staticmethod
    def of(pairs: Iterable[tuple[float, float]], rtol: float) -> Probe:
        """From (value, size) pairs."""
        values, sizes = zip(*pairs, strict=True)
        return Probe(tuple(map(_short, values)), tuple(map(_short, sizes)), rtol)

    def agrees(self, other: Probe) -> bool:
        """Whether both can come from the same code, up to rounding."""
        if len(self.values) != len(other.values):
            return False
        rtol = max(self.rtol, other.rtol)
        rows = zip(self.values, other.values, self.sizes, other.sizes, strict=True)
        return all(_near(a, b, rtol * max(abs(s), abs(t))) for a, b, s, t in rows)


def _short(number: float) -> float:
    return float(f"{number:.{_DIGITS}g}")


def _near(a: float, b: float, room: float) -> bool:
    if not (math.isfinite(a) and math.isfinite(b)):
        return a == b or (math.isnan(a) and math.isnan(b))
    return abs(a - b) <= room


@final
@dataclass(frozen=True)
class Fingerprint:
    """What a result depends on, by name.

    Args:
        digests: one per ingredient that is the same to the bit in every run: weights, loss, data, settings.
        probes: what was computed on a few examples, compared up to rounding.

    Example:
        >>> old, new = (Fingerprint.of({"loss": loss, "data": [1.0]}) for loss in (abs, round))
        >>> new.differences(old)
        ('loss',)
    """

    digests: Mapping[str, str]
    probes: Mapping[str, Probe] = field(default_factory=dict)

    @staticmethod
    def of(ingredients: Mapping[str, Any], probes: Mapping[str, Probe] | None = None) -> Fingerprint:
        """Digest every ingredient; the version of this library and of torch is added."""
        named = {**ingredients, "version": VERSION}
        return Fingerprint({name: digest(value) for name, value in named.items()}, dict(probes or {}))

    @property
    def key(self) -> str:
        """A name for the ingredients that are the same to the bit in every run: 24 hexadecimal digits."""
        return digest(dict(self.digests))[:24]

    @property
    def identity(self) -> str:
        """A name for this very record, probes included: what a file carries that belongs to it."""
        return digest(self.to_dict())[:24]

    def differences(self, earlier: Fingerprint, among: Sequence[str] | None = None) -> tuple[str, ...]:
        """The ingredients that differ; probes are named only where no digest differs, since they follow from these.

        Args:
            earlier: the other fingerprint.
            among: look at these ingredients only; `None`: at all.
        """

        def asked(names: Iterable[str]) -> list[str]:
            return [name for name in names if among is None or name in among]

        names = asked({**self.digests, **earlier.digests})
        changed = [name for name in names if self.digests.get(name) != earlier.digests.get(name)]
        return tuple(changed or [n for n in asked({**self.probes, **earlier.probes}) if not self._agrees(earlier, n)])

    def _agrees(self, earlier: Fingerprint, name: str) -> bool:
        mine, other = self.probes.get(name), earlier.probes.get(name)
        return mine is not None and other is not None and mine.agrees(other)

    def to_dict(self) -> dict[str, Any]:
        """As plain values for JSON; the numbers of a probe are written as one line."""
        probes = {
            name: {"values": " ".join(map(str, p.values)), "sizes": " ".join(map(str, p.sizes)), "rtol": p.rtol}
            for name, p in self.probes.items()
        }
        return {"digests": dict(self.digests), "probes": probes}

    @staticmethod
    def from_dict(stored: Any) -> Fingerprint | None:
        """What `to_dict` gave, or None where it is something else."""
        try:
            probes = {
                name: Probe(_numbers(p["values"]), _numbers(p["sizes"]), float(p["rtol"]))
                for name, p in stored["probes"].items()
            }
            digests = {str(name): str(value) for name, value in stored["digests"].items()}
        except (AttributeError, KeyError, TypeError, ValueError):
            return None
        return Fingerprint(digests, probes)


def _numbers(line: str) -> tuple[float, ...]:
    return tuple(map(float, line.split()))
