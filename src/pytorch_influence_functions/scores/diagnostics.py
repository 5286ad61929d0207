"""How a result was made and how far its assumptions hold: the checklist to read before trusting a score."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias, final

from ..core.errors import InvalidInput
from ..core.notebook import html_table

Status: TypeAlias = Literal["ok", "warn", "bad"]

LEFT_OUT, FROZEN = "(left out)", "(frozen)"
"""The name in `gradient_shares` for the parameters that did not take part."""

# The objective's gradient beside a typical example's: 0 at a minimum. `docs/trust.md` has what was measured on trained
# networks (at most the first) and on networks stopped after an epoch (above it).
_STATIONARY, _MOVING = 0.06, 0.1
# Where the gradient is below both, a factor of the loss is told from here on.
_SLIGHT = 1.1
# An alarm needs the gradient to be above a bound by so many standard errors.
_ERRORS = 2.0
# Relative residuals: below the first a ranking is safe, above the second it is the solver's noise.
_SOLVED, _UNSOLVED = 1e-2, 1e-1
# The least share of the gradient that the chosen parameters should carry.
_COVERED = 0.9


@final
@dataclass(frozen=True)
class Check:
    """One line of the checklist: what was looked at, how it stands, and why.

    `status` is `"ok"`, `"warn"` (read the result with care, or the fact is not known) or `"bad"` (an
    assumption of influence functions is broken).
    """

    name: str
    status: Status
    text: str

    def __str__(self) -> str:
        return f"{f'[{self.status}]':<7}{self.name}: {self.text}"


def _no_shares() -> dict[str, float]:
    return {}


def _no_routes() -> dict[str, str]:
    return {}


@final
@dataclass(frozen=True, repr=False)
class Diagnostics:
    """Facts of one run; `print` it for the checklist in words. NaN, None and empty words mean "not measured".

    Args:
        method: the composition, as it would be written.
        why: why it was chosen.
        damping: what is added to the curvature of the *mean* objective beside weight decay, as a number.
        weight_decay: the least weight decay of the parameters that took part; lambda is damping plus weight decay.
        weight_decay_most: the largest of them, where they differ.
        residual_max: largest relative residual |(C + D) x - b| / |b| over the queries.
        residual_mean: its mean over the queries.
        error_max: largest relative error of a solution x in the norm of C + D, at most, which is what scores are wrong
            by; of iterative solves.
        steps: products with the curvature.
        unsolved: queries whose solve ended before its tolerance, and whose scores come from what it had reached.
        smallest_curvature: the smallest eigenvalue (or Rayleigh quotient) of C that was seen.
        n_train: training examples that were used.
        n_queries: queries that were scored.
        parameters_used: numbers in the parameters that took part.
        parameters_total: numbers in all parameters of the model.
        gradient_shares: per block, its share (0 to 1) of the squared gradient norm; "(left out)" is the
            share of the trainable parameters that did not take part, "(frozen)" that of those not trainable.
        relative_gradient: |gradient of the mean training objective|, weight decay included, over the root mean square
            of the examples' gradients; sampling noise is taken off, so it is 0 at a minimum.
        relative_gradient_error: its standard error; 0 where every example was looked at.
        loss_factor: the factor of the training loss with which the weights are at a minimum beside the weight decay; 1
            where no other factor makes it one.
        gradient_examples: how many examples the three lines above were measured on.
        mode: the mode the model was in, in words: eval, dropout, batch norm.
        deterministic: whether reading an example twice gave the same: `"yes"`, `"no"` or other words.
        reduction: the training loss's reduction, in words.
        routes: how each block's gradients were taken: `"rule"`, or the fallback.
        members: checkpoints that were averaged.
        seconds: wall-clock seconds for fitting and scoring.
        notes: anything else that should be read with the result.
        objective: the training loss that was taken, as it would be written.
        inferred: whether the loss was inferred from outputs and targets rather than given.
        reading: how a loader's sampler was read, in words; empty where the whole dataset is the training set.
        padding: what padding does to an example, in words; empty where it does nothing.
        rows: how the rows were made of the queries, in words; empty where each query is a row of its own.
        measures_gradients: whether a damping rule may look at the training data's gradients (those of an index cannot).
        needs_minimum: whether the method assumes that training had ended at a minimum (unrolled ones do not).
        effective_dimension: tr(C (C + D)^-1), how many directions the data decide rather than the damping.
        lost_to_damping: median over queries of `<g, D (C + D)^-1 g> / |g|^2`, the share of a query's squared gradient
            norm that damping takes.
        approximation: in words, where the method is a formula that does not solve with its curvature; else empty.
        residual_history: largest relative residual after every step of an iterative solve, of the slowest group of
            queries; empty for direct solves.

    >>> print(Diagnostics(method="koh_liang()", residual_max=2e-6, residual_mean=1e-6, steps=12).checks()[1])
    [ok]   solve: largest relative residual 2e-06, mean 1e-06, after 12 steps
    """

    method: str = ""
    why: str = ""
    damping: float = math.nan
    residual_max: float = math.nan
    residual_mean: float = math.nan
    steps: int = 0
    unsolved: int = 0
    smallest_curvature: float | None = None
    n_train: int = 0
    n_queries: int = 0
    parameters_used: int = 0
    parameters_total: int = 0
    gradient_shares: Mapping[str, float] = field(default_factory=_no_shares)
    relative_gradient: float = math.nan
    relative_gradient_error: float = math.nan
    gradient_examples: int = 0
    mode: str = "eval mode"
    deterministic: str = "not checked"
    reduction: str = "mean of per-example losses"
    routes: Mapping[str, str] = field(default_factory=_no_routes)
    members: int = 1
    seconds: float = math.nan
    notes: tuple[str, ...] = ()
    needs_minimum: bool = True
    effective_dimension: float = math.nan
    lost_to_damping: float = math.nan
    approximation: str = ""
    residual_history: tuple[float, ...] = ()
    objective: str = ""
    inferred: bool = False
    reading: str = ""
    weight_decay: float = 0.0
    weight_decay_most: float = 0.0
    rows: str = ""
    measures_gradients: bool = True
    padding: str = ""
    loss_factor: float = 1.0
    error_max: float = math.nan

    def __post_init__(self) -> None:
        # Copies: a record must not change when its maker goes on counting.
        object.__setattr__(self, "gradient_shares", dict(self.gradient_shares))
        object.__setattr__(self, "routes", dict(self.routes))
        object.__setattr__(self, "notes", tuple(self.notes))
        object.__setattr__(self, "residual_history", tuple(self.residual_history))

    @property
    def lambda_text(self) -> str:
        """Lambda, and what it is the sum of; empty where the damping is not known."""
        if math.isnan(self.damping):
            return ""
        decays = dict.fromkeys((self.weight_decay, max(self.weight_decay, self.weight_decay_most)))
        total = " to ".join(f"{self.damping + decay:.3g}" for decay in decays)
        if not any(decays):
            return total
        return f"{total} (damping {self.damping:.3g} + weight decay {' to '.join(f'{decay:.3g}' for decay in decays)})"

    def checks(self) -> list[Check]:
        """The assumptions of influence functions, each with its verdict, in a fixed order."""
        return [
            _minimum(self),
            _solve(self),
            _curvature(self),
            _parameters(self),
            _mode(self),
            _data(self),
            _loss(self),
        ]

    @property
    def worst(self) -> Status:
        """The most serious verdict among the checks."""
        verdicts = {check.status for check in self.checks()}
        return "bad" if "bad" in verdicts else "warn" if "warn" in verdicts else "ok"

    def _facts(self) -> list[tuple[str, str]]:
        """What is told about the run above the checks: name and words."""
        facts = [("method", self.method or "not recorded")]
        facts += [("why", self.why)] if self.why else []
        facts += [("size", _describe_size(self))] if self.n_train else []
        facts += [("rows", self.rows)] if self.rows else []
        facts += [("time", f"{self.seconds:.3g} s")] if not math.isnan(self.seconds) else []
        facts += [("routes", _describe_routes(self.routes))] if set(self.routes.values()) - {"rule"} else []
        facts += [("blocks", _describe_largest(self.gradient_shares))] if self.gradient_shares else []
        return facts

    def __str__(self) -> str:
        lines = [f"{name:<8}{text}" for name, text in self._facts()]
        lines += [str(check) for check in self.checks()]
        return "\n".join(lines + [f"note    {note}" for note in self.notes])

    def __repr__(self) -> str:
        checks = self.checks()
        counts = [f"{status} {n}" for status in ("ok", "warn", "bad") if (n := sum(c.status == status for c in checks))]
        doubtful = [c.name for c in checks if c.status != "ok"]
        which = f" ({', '.join(doubtful)})" if doubtful else ""
        return f"Diagnostics({', '.join(counts)}{which}; print() shows the checklist)"

    def _repr_html_(self) -> str:
        rows = [("", *fact) for fact in self._facts()]
        rows += [(check.status, check.name, check.text) for check in self.checks()]
        return html_table(rows + [("", "note", note) for note in self.notes])

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers, strings, lists and dictionaries; NaN and infinity as the strings `"nan"`, `"inf"`."""
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        shares = {name: _as_json(share) for name, share in self.gradient_shares.items()}
        return {name: _as_json(value) for name, value in values.items()} | {
            "notes": list(self.notes),
            "gradient_shares": shares,
            "residual_history": [_as_json(r) for r in self.residual_history],
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Diagnostics:
        """The record that `to_dict` wrote.

        Args:
            values: what `to_dict` gave.

        Raises:
            InvalidInput: a field that this version does not know.
        """
        fields = {f.name: str(f.type) for f in dataclasses.fields(cls)}
        if unknown := sorted(set(values) - set(fields)):
            raise InvalidInput(
                f"The diagnostics hold the unknown field {unknown[0]!r}; "
                "read them with the version of pytorch_influence_functions that wrote them."
            )
        read: dict[str, Any] = {
            n: _as_number(v) if "float" in fields[n] and isinstance(v, str) else v for n, v in values.items()
        }
        shares = {name: float(share) for name, share in values.get("gradient_shares", {}).items()}
        history = tuple(float(r) for r in values.get("residual_history", ()))
        collections = {
            "gradient_shares": shares,
            "notes": tuple(values.get("notes", ())),
            "residual_history": history,
        }
        return cls(**{**read, **collections})


def _as_number(word: str) -> float:
    """The one NaN, so that a record equals the one that was written."""
    return math.nan if word == "nan" else float(word)


def _as_json(value: Any) -> Any:
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


# --------------------------------------------------------------------------- the checks


def _minimum(d: Diagnostics) -> Check:
    name, value = "minimum", d.relative_gradient
    if math.isnan(value):
        return Check(name, "warn", "the gradient of the training objective was not measured")
    error = 0.0 if math.isnan(d.relative_gradient_error) else d.relative_gradient_error
    fact = f"the objective's gradient is {value:.1%}{f' +- {error:.1%}' if error else ''} of a typical example's"
    fact += f" ({_describe_examples(d)})" if d.gradient_examples else ""
    if not d.needs_minimum:
        return Check(name, "ok", f"{fact}; this method follows training and needs no minimum")
    least = value - _ERRORS * error
    if least > _STATIONARY and d.loss_factor != 1.0:
        return Check(name, "bad" if least > _MOVING else "warn", f"{fact}: {_describe_factor(d)}")
    # Without the weight decay it was trained with, a model at its minimum looks as if it were not.
    decay = ", pass the weight_decay= that it was trained with," if d.weight_decay_most == 0 else ""
    if least > _MOVING:
        adam = ", with adam_batch= after Adam," if d.measures_gradients else " after SGD"
        follow = f"damping=FromTraining(lr, steps){adam} follows how far training came"
        text = (
            f"the model is far from a minimum, so the order may hold but not the sizes; train longer{decay} or {follow}"
        )
        return Check(name, "bad", f"{fact}: {text}")
    if least > _STATIONARY:
        advice = f"train longer{decay} or let the learning rate fall to 0 at the end"
        return Check(name, "warn", f"{fact}: not quite at a minimum; {advice}")
    told = abs(math.log(d.loss_factor)) > math.log(_SLIGHT)
    return Check(name, "ok", f"{fact}; {_describe_factor(d)}" if told else fact)


def _describe_factor(d: Diagnostics) -> str:
    """Of which multiple of the loss it is the minimum, and what to pass."""
    factor, outputs = d.loss_factor, round(2 / d.loss_factor)
    digits = 2 if d.relative_gradient_error > 0 else 4  # from a sample it is not known better
    # Squared errors are added up and halved where no loss is given; torch averages them over an example's outputs.
    averaged = d.objective == "SquaredError()" and outputs >= 1 and abs(2 / factor - outputs) < 0.02 * outputs
    divided = f"weight_decay={d.weight_decay_most / factor:.{digits}g}"
    if d.weight_decay != d.weight_decay_most:
        divided = f"each weight_decay divided by {factor:.{digits}g}"
    advice = f"loss=torch.nn.MSELoss(), or for this loss {divided}" if averaged else f"{divided} for this loss"
    return (
        f"with this weight decay the weights are at the minimum of {factor:.{digits}g} times this loss (training may "
        f"have added up examples, left ignored positions out of its mean, or had no factor 1/2); pass {advice}"
    )


def _describe_examples(d: Diagnostics) -> str:
    if d.gradient_examples == d.n_train:
        return f"on all {d.n_train:,} examples"
    return f"on {d.gradient_examples:,}{f' of {d.n_train:,}' if d.n_train else ''} examples"


def _solve(d: Diagnostics) -> Check:
    name = "solve"
    if math.isnan(d.residual_max):
        return Check(name, "warn", "the residual of the solve was not measured")
    fact = f"largest relative residual {d.residual_max:.1g}"
    fact += "" if math.isnan(d.residual_mean) else f", mean {d.residual_mean:.1g}"
    fact += "" if math.isnan(d.error_max) else f", relative error in the norm of C + lambda at most {d.error_max:.1g}"
    fact += f", after {d.steps:,} step{'' if d.steps == 1 else 's'}" if d.steps else ""
    if d.approximation:
        return Check(name, "warn", f"{d.approximation}: a formula that does not solve the system; {fact}")
    if d.unsolved:
        early = f"{d.unsolved:,} of {d.n_queries:,} solves" if d.n_queries else f"{d.unsolved:,} solves"
        return Check(
            name, "bad", f"{early} ended before their tolerance; {fact}: more steps, more damping, or a preconditioner"
        )
    if d.residual_max > _UNSOLVED:
        return Check(name, "bad", f"{fact}: not solved; more steps, more damping, or a preconditioner")
    if d.error_max > _UNSOLVED:
        advice = "take more steps, more damping or a preconditioner, or scale the columns of the data"
        return Check(name, "warn", f"{fact}: curvatures differ so much that a small residual proves little; {advice}")
    if d.residual_max > _SOLVED or d.error_max > _SOLVED:
        return Check(name, "warn", f"{fact}: loosely solved, so close scores may swap places")
    return Check(name, "ok", fact)


def _curvature(d: Diagnostics) -> Check:
    name, low = "damping", d.smallest_curvature
    if math.isnan(d.damping):
        return Check(name, "warn", "lambda was not recorded")
    facts = f"lambda = {d.lambda_text}"
    least = d.damping + d.weight_decay
    if not math.isnan(d.effective_dimension):
        facts += f", effective dimension {d.effective_dimension:,.4g}"
    if not math.isnan(d.lost_to_damping):
        facts += f", it takes {d.lost_to_damping:.0%} of a query's squared gradient norm"
    if low is None or math.isnan(low):
        return Check(name, "ok", f"{facts}; the smallest curvature was not measured")
    facts += f", smallest curvature seen {low:.3g}"
    # Rounding leaves tiny negative eigenvalues in a semidefinite matrix; lambda is the scale to judge by.
    if low >= -1e-3 * least:
        return Check(name, "ok", facts)
    if least <= -low:
        text = f"{facts}: lambda does not outweigh it, so there is no minimum; use GGN() or more damping"
        return Check(name, "bad", text)
    return Check(name, "warn", f"{facts}: negative curvature that only lambda outweighs; compare with GGN()")


def _parameters(d: Diagnostics) -> Check:
    name = "parameters"
    if not d.parameters_total:
        return Check(name, "warn", "how many parameters took part was not recorded")
    facts = f"{d.parameters_used:,} of {d.parameters_total:,} took part"
    if not d.gradient_shares:
        whole = d.parameters_used == d.parameters_total
        text = facts if whole else f"{facts}; the others' share of the gradient was not measured"
        return Check(name, "ok" if whole else "warn", text)
    frozen, left_out = d.gradient_shares.get(FROZEN, 0.0), d.gradient_shares.get(LEFT_OUT, 0.0)
    share = 1.0 if frozen >= 1.0 else 1.0 - left_out / (1.0 - frozen)
    if FROZEN in d.gradient_shares and left_out == 0.0:
        return Check(name, "ok", f"{facts}: all that are trainable; the model's other parameters are frozen")
    facts += f", with {share:.1%} of the squared gradient norm"
    facts += " of what is trainable" if FROZEN in d.gradient_shares else ""
    if not share >= _COVERED:
        return Check(name, "warn", f"{facts}: what the others learned is not counted")
    return Check(name, "ok", facts)


def _mode(d: Diagnostics) -> Check:
    # Everything is computed in eval mode; only words that say otherwise are a warning.
    if not d.mode:
        return Check("mode", "warn", "the mode of the model was not recorded")
    return Check("mode", "warn" if d.mode.startswith("train") else "ok", d.mode)


def _data(d: Diagnostics) -> Check:
    reading = f"; {d.reading}" if d.reading else ""
    reading += f"; {d.padding}, so scores depend on who shares a batch" if d.padding else ""
    if d.deterministic == "yes":
        # What a sampler drew is not known where all examples were taken in its stead.
        status: Status = "warn" if d.reading.startswith("all") or d.padding else "ok"
        return Check("data", status, f"an example reads the same twice{reading}")
    if d.deterministic == "no":
        text = "an example reads differently twice (random augmentation?): scores belong to one random draw"
        return Check("data", "bad", text + reading)
    return Check("data", "warn", f"whether an example reads the same twice was not checked{reading}")


def _loss(d: Diagnostics) -> Check:
    n = f"; N = {d.n_train:,} examples" if d.n_train else ""
    if not d.reduction:
        return Check("loss", "warn", f"the reduction of the loss was not recorded{n}")
    source = "inferred from outputs and targets" if d.inferred else "given"
    objective = f"{d.objective} ({source}), " if d.objective else ""
    return Check("loss", "ok", f"{objective}{d.reduction}{n}")


# --------------------------------------------------------------------------- lines above them


def _describe_size(d: Diagnostics) -> str:
    queries = f"{d.n_queries:,} quer{'y' if d.n_queries == 1 else 'ies'}"
    queries = f"{d.n_queries:,} row{'' if d.n_queries == 1 else 's'}" if d.rows else queries
    queries += f" x {d.n_train:,} training examples"
    return queries + (f", mean over {d.members} checkpoints" if d.members > 1 else "")


def _describe_routes(routes: Mapping[str, str]) -> str:
    by_route: dict[str, list[str]] = {}
    for block, route in routes.items():
        by_route.setdefault(route, []).append(block)
    return "; ".join(f"{route}: {_shorten_list(blocks)}" for route, blocks in by_route.items())


def _shorten_list(names: list[str], limit: int = 3) -> str:
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(name or "(root)" for name in names[:limit]) + more


def _describe_largest(shares: Mapping[str, float], limit: int = 3) -> str:
    # A NaN would make the order meaningless; it comes first, where a reader notices it.
    ranked = sorted(shares.items(), key=lambda item: (not math.isnan(item[1]), -item[1], item[0]))
    more = f" and {len(ranked) - limit} more" if len(ranked) > limit else ""
    largest = ", ".join(f"{name or '(root)'} {share:.0%}" for name, share in ranked[:limit])
    return f"{largest}{more} (share of the squared gradient norm)"
