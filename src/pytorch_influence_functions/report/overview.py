"""The first view of a report in words: what was asked, how it was answered, how far to trust it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, final

from .._version import __version__
from ..scores.scores import Scores
from .predictions import Said
from .thumbnails import Lens

_WORDS = {"ok": "holds", "warn": "take care", "bad": "broken"}
_NAMES = {
    "minimum": "At a minimum",
    "solve": "Solved",
    "damping": "Damping",
    "parameters": "Parameters",
    "mode": "Mode of the model",
    "data": "Data",
    "loss": "Loss",
}


@final
@dataclass(frozen=True)
class Overview:
    """Plain words for the template.

    Attributes:
        question: what was asked.
        verdict: (status, sentence) over all checks.
        facts: (term, value).
        checks: (status, status in words, name, reason).
        notes: what else to know: notes of the run, and what this page could not show.
    """

    question: str
    verdict: tuple[str, str]
    facts: list[tuple[str, str]]
    checks: Sequence[tuple[str, str, str, str]]
    notes: list[str]

    @classmethod
    def of(cls, scores: Scores, k: int, said: list[Said] | None, lenses: tuple[Lens, Lens], scaled: str) -> Overview:
        """From the diagnostics of the scores and from what was met while reading the data."""
        d = scores.diagnostics
        checks = [(c.status, _WORDS[c.status], _NAMES.get(c.name, c.name), c.text) for c in d.checks()]
        return cls(_question(scores), _verdict(scores), _facts(scores, said), checks, _notes(scores, k, lenses, scaled))


def _question(scores: Scores) -> str:
    measure = "loss" if scores.lower_is_better else "measure"
    queries = len(scores)
    of = "this query" if queries == 1 else f"each of {queries:,} queries"
    worse = "rise" if scores.lower_is_better else "fall"
    sign = "Positive" if scores.lower_is_better else "Negative"
    return (
        f"By how much would the {measure} on {of} change if one of {scores.n_train:,} training examples were removed "
        f"and the model retrained? {sign}: it would {worse}, so the example helped."
    )


def _verdict(scores: Scores) -> tuple[str, str]:
    checks = scores.diagnostics.checks()
    broken = sum(c.status == "bad" for c in checks)
    amber = sum(c.status == "warn" for c in checks)
    if broken:
        more = f", and {amber} to read with care" if amber else ""
        return "bad", f"Do not rely on single numbers: {_of(broken, len(checks))} broken{more}."
    if amber:
        return "warn", f"Read with care: {_of(amber, len(checks))} doubtful or not measured."
    return "ok", f"All {len(checks)} assumptions that were checked hold."


def _of(count: int, size: int) -> str:
    return f"{count} of {size} assumptions {'is' if count == 1 else 'are'}"


def _facts(scores: Scores, said: list[Said] | None) -> list[tuple[str, str]]:
    d = scores.diagnostics
    data = f"{scores.n_train:,} training examples, {len(scores):,} quer{'y' if len(scores) == 1 else 'ies'}"
    names = scores.class_names
    facts = [
        ("Data", data + (f", {len(names):,} classes" if names is not None else "")),
        ("Method", scores.provenance or "not recorded"),
        ("Why this method", d.why),
        ("Model", f"{d.parameters_used:,} of {d.parameters_total:,} parameters" if d.parameters_total else ""),
        ("Checkpoints", f"mean over {d.members}" if d.members > 1 else ""),
        ("Damping λ", _number(d.damping)),
        ("Relative residual", _residual(d)),
        ("Run time", _seconds(d.seconds)),
    ]
    known = [s for s in said or [] if s.wrong is not None]
    if known:
        wrong = sum(bool(s.wrong) for s in known)
        facts.append(("Queries answered wrongly", f"{wrong:,} of {len(known):,} ({wrong / len(known):.1%})"))
    return [(term, value) for term, value in (*facts, ("Written by", f"version {__version__}")) if value]


def _number(value: float) -> str:
    return "" if math.isnan(value) else f"{value:.3g}"


def _residual(d: Any) -> str:
    if math.isnan(d.residual_max):
        return "not measured"
    mean = "" if math.isnan(d.residual_mean) else f", mean {d.residual_mean:.2g}"
    return f"largest {d.residual_max:.2g}{mean}" + (f", after {d.steps:,} steps" if d.steps else "")


def _seconds(value: float) -> str:
    if math.isnan(value):
        return "not recorded"
    return f"{value:.3g} s" if value < 120 else f"{value / 60:.1f} min"


def _notes(scores: Scores, k: int, lenses: tuple[Lens, Lens], scaled: str) -> list[str]:
    notes = list(scores.diagnostics.notes)
    held, n = scores.shape[1], scores.n_train
    if held < n:
        notes.append(
            f"Only {held:,} scores per query are held of {n:,}: means over queries count the others as 0, "
            "and histograms show what is held."
        )
    notes.append(f"Of each query the {min(k, held):,} most helpful and most harmful examples are kept on this page.")
    for one, name in zip(lenses, ("training", "query"), strict=True):
        if one.source is None:
            notes.append(f"The {name} data were not at hand, so their pictures and texts are missing.")
        elif one.failed:
            index, why = next(iter(one.failed.items()))
            notes.append(f"{len(one.failed):,} {name} examples could not be shown; the first is {index}: {why}")
    return notes + ([f"Pictures: {scaled}."] if scaled else [])
