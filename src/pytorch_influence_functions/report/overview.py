"""The text of a report's first view: the question, how it was answered, and how far to trust the answer."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, final

from .._version import __version__
from ..scores.scores import Scores
from .predictions import Given, Prediction
from .ranking import four_digits
from .target import Target
from .thumbnails import ExampleReader

_STATUS_TEXT = {"ok": "holds", "warn": "take care", "bad": "broken"}
_CHECK_NAMES = {
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
    """Text for the template.

    Attributes:
        question: the question that scores answer.
        verdict: (status, sentence) over all checks.
        facts: (term, value).
        checks: (status, status as text, name, reason).
        notes: notes of the run, and what this page could not show.
    """

    question: str
    verdict: tuple[str, str]
    facts: list[tuple[str, str]]
    checks: Sequence[tuple[str, str, str, str]]
    notes: list[str]

    @classmethod
    def of(
        cls,
        scores: Scores,
        k: int,
        given: Given,
        readers: tuple[ExampleReader, ExampleReader],
        scale_note: str,
    ) -> Overview:
        """Make the text from the diagnostics of the scores and from the failures while reading the data."""
        d = scores.diagnostics
        checks = [(c.status, _STATUS_TEXT[c.status], _CHECK_NAMES.get(c.name, c.name), c.text) for c in d.checks()]
        facts, notes = _facts(scores, given.target, given.predictions), _notes(scores, k, readers, scale_note)
        return cls(_question(scores), _verdict(scores), facts, checks, notes)


def _question(scores: Scores) -> str:
    measure = "loss" if scores.lower_is_better else "measure"
    queries = len(scores)
    queries_text = "this query" if queries == 1 else f"each of {queries:,} queries"
    worse = "rise" if scores.lower_is_better else "fall"
    sign = "Positive" if scores.lower_is_better else "Negative"
    return (
        f"By how much would the {measure} on {queries_text} change if one of {scores.n_train:,} training examples were "
        f"removed and the model retrained? {sign}: it would {worse}, so the example helped."
    )


def _verdict(scores: Scores) -> tuple[str, str]:
    checks = scores.diagnostics.checks()
    broken = sum(c.status == "bad" for c in checks)
    doubtful = sum(c.status == "warn" for c in checks)
    if broken:
        more = f", and {doubtful} to read with care" if doubtful else ""
        return "bad", f"Do not rely on single numbers: {_share_of_checks(broken, len(checks))} broken{more}."
    if doubtful:
        return "warn", f"Read with care: {_share_of_checks(doubtful, len(checks))} doubtful or not measured."
    return "ok", f"All {len(checks)} assumptions that were checked hold."


def _share_of_checks(count: int, size: int) -> str:
    return f"{count} of {size} assumptions {'is' if count == 1 else 'are'}"


def _facts(scores: Scores, target: Target, predictions: list[Prediction] | None) -> list[tuple[str, str]]:
    d = scores.diagnostics
    data = f"{scores.n_train:,} training examples, {len(scores):,} quer{'y' if len(scores) == 1 else 'ies'}"
    names = scores.class_names
    facts = [
        ("Data", data + (f", {len(names):,} classes" if names is not None else "")),
        ("Predicted number", target.name if target.numeric else ""),
        ("Method", scores.provenance or "not recorded"),
        ("Why this method", d.why),
        ("Model", f"{d.parameters_used:,} of {d.parameters_total:,} parameters" if d.parameters_total else ""),
        ("Checkpoints", f"mean over {d.members}" if d.members > 1 else ""),
        ("λ", d.lambda_text),
        ("Relative residual", _residual_text(d)),
        ("Run time", _seconds(d.seconds)),
    ]
    known = [p for p in predictions or [] if p.wrong is not None]
    if known:
        wrong = sum(bool(p.wrong) for p in known)
        facts.append(("Queries answered wrongly", f"{wrong:,} of {len(known):,} ({wrong / len(known):.1%})"))
    errors = [abs(p.error) for p in predictions or [] if not math.isnan(p.error)]
    if errors:
        mean = target.number_text(four_digits(sum(errors) / len(errors)))
        facts.append(("Error of the model", f"mean absolute {mean} over {len(errors):,} queries"))
    return [(term, value) for term, value in (*facts, ("Written by", f"version {__version__}")) if value]


def _residual_text(d: Any) -> str:
    if math.isnan(d.residual_max):
        return "not measured"
    mean = "" if math.isnan(d.residual_mean) else f", mean {d.residual_mean:.2g}"
    steps = f", after {d.steps:,} step{'' if d.steps == 1 else 's'}" if d.steps else ""
    return f"largest {d.residual_max:.2g}{mean}{steps}"


def _seconds(value: float) -> str:
    if math.isnan(value):
        return "not recorded"
    return f"{value:.3g} s" if value < 120 else f"{value / 60:.1f} min"


def _notes(scores: Scores, k: int, readers: tuple[ExampleReader, ExampleReader], scale_note: str) -> list[str]:
    notes = list(scores.diagnostics.notes)
    stored, n = scores.shape[1], scores.n_train
    if stored < n:
        notes.append(
            f"Only {stored:,} scores per query are held of {n:,}: means over queries count the others as 0, "
            "and histograms show what is held."
        )
    notes.append(f"Of each query the {min(k, stored):,} most helpful and most harmful examples are kept on this page.")
    for reader, name in zip(readers, ("training", "query"), strict=True):
        if reader.source is None:
            notes.append(f"The {name} data were not at hand, so their pictures and texts are missing.")
        elif reader.failed:
            index, why = next(iter(reader.failed.items()))
            notes.append(f"{len(reader.failed):,} {name} examples could not be shown; the first is {index}: {why}")
    return notes + ([f"Pictures: {scale_note}."] if scale_note else [])
