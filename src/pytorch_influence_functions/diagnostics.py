"""How a result was made and how far its assumptions hold: the checklist to read before trusting a score."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

Status = Literal["ok", "warn", "bad"]


@dataclass(frozen=True)
class Check:
    """One line of the checklist: what was looked at, the verdict, and the reason in words."""

    name: str
    status: Status
    text: str


def _nothing() -> dict[str, float]:
    return {}


def _no_words() -> dict[str, str]:
    return {}


@dataclass(frozen=True)
class Diagnostics:
    """What was done, and the state of the assumptions behind it. `print` it for the checklist in words."""

    method: str
    why: str = ""
    damping: float = math.nan
    residual_max: float = math.nan
    residual_mean: float = math.nan
    steps: int = 0
    smallest_curvature: float | None = None
    n_train: int = 0
    n_queries: int = 0
    parameters_used: int = 0
    parameters_total: int = 0
    gradient_shares: Mapping[str, float] = field(default_factory=_nothing)
    relative_gradient: float = math.nan
    gradient_examples: int = 0
    mode: str = "eval mode"
    deterministic: str = "not checked"
    reduction: str = "mean of per-example losses"
    routes: Mapping[str, str] = field(default_factory=_no_words)
    members: int = 1
    seconds: float = math.nan
    notes: tuple[str, ...] = ()

    def checks(self) -> list[Check]:
        """The checklist, worst matters included, in a fixed order."""
        return [
            self._stationarity(),
            self._solved(),
            self._curvature(),
            self._parameters(),
            Check("mode", "ok", self.mode),
            Check("data", "warn" if self.deterministic == "no" else "ok", self._data_words()),
            Check("loss", "ok", f"{self.reduction}; N = {self.n_train:,}"),
            *(Check("note", "warn", text) for text in self.notes),
        ]

    def _stationarity(self) -> Check:
        value = self.relative_gradient
        if math.isnan(value):
            return Check("minimum", "warn", "the training gradient was not looked at")
        words = f"the training gradient is {value:.1%} of a typical example's gradient (on {self.gradient_examples:,} examples)"
        if value > 0.3:
            return Check(
                "minimum", "bad", f"{words}: the model is far from a minimum; train longer or read with care"
            )
        if value > 0.1:
            return Check("minimum", "warn", f"{words}: not quite at a minimum")
        return Check("minimum", "ok", words)

    def _solved(self) -> Check:
        words = f"residual at most {self.residual_max:.1e} after {self.steps} step{'' if self.steps == 1 else 's'}"
        if math.isnan(self.residual_max):
            return Check("solve", "warn", "no residual is known")
        return Check("solve", "ok" if self.residual_max < 0.05 else "warn", words)

    def _curvature(self) -> Check:
        smallest, lam = self.smallest_curvature, self.damping
        if smallest is None:
            return Check("curvature", "ok", f"lambda = {lam:.3g}")
        words = f"lambda = {lam:.3g}, smallest curvature seen {smallest:.3g}"
        if smallest < 0 and -smallest > 0.5 * lam:
            return Check("curvature", "warn", f"{words}: damping barely outweighs negative curvature")
        return Check("curvature", "ok", words)

    def _parameters(self) -> Check:
        share = 1.0 - self.gradient_shares.get("(left out)", 0.0)
        words = (
            f"{self.parameters_used:,} of {self.parameters_total:,} parameters took part, with {share:.1%} of the squared "
            "gradient norm"
        )
        return Check("parameters", "ok" if share > 0.9 else "warn", words)

    def _data_words(self) -> str:
        return {
            "yes": "an example reads the same twice",
            "no": "an example reads differently twice (random augmentation?): scores belong to one random draw",
        }.get(self.deterministic, "determinism was not checked")

    def __str__(self) -> str:
        lines = [f"method      {self.method}"]
        if self.why:
            lines.append(f"why         {self.why}")
        lines.append(f"size        {self.n_queries:,} queries x {self.n_train:,} training examples")
        if self.members > 1:
            lines.append(f"ensemble    mean over {self.members} checkpoints")
        marks = {"ok": "ok  ", "warn": "look", "bad": "BAD "}
        lines += [f"{c.name:<11} [{marks[c.status]}] {c.text}" for c in self.checks()]
        ways = sorted(set(self.routes.values()))
        if ways and ways != ["rule"]:
            slow = ", ".join(f"{k} by {v}" for k, v in self.routes.items() if v != "rule")
            lines.append(f"gradients   layer rules, except {slow}")
        if not math.isnan(self.seconds):
            lines.append(f"time        {self.seconds:.2f} s")
        return "\n".join(lines)
