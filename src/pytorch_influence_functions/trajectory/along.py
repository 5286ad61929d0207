"""Attribution along the training run: one method at several checkpoints, averaged in units of each one's spread."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, final

from ..core.errors import InvalidInput
from ..curvature.convexity import is_convex
from ..influence.agreement import Units
from ..influence.attribution import Attribution, Influence
from ..influence.method import AbstractMethod
from ..problem.checkpoints import Checkpoint
from ..problem.problem import Problem
from ..solvers.forecast import Forecast
from .recording import Recording, open_runs

# Measured on logistic regression over Fashion-MNIST; see docs/along.md.
_CONVEX = (
    "the training objective is convex in the parameters: where training came to its one minimum, the final weights "
    "alone (without run=) predict retraining better, a linear datamodelling score of .92 against .83 in one case; "
    "where it was stopped before, the run does, .80 against .70"
)


@final
@dataclass(frozen=True, eq=False, repr=False)
class Along(AbstractMethod):
    r"""A method asked at every checkpoint of a training run, the answers averaged.

    With s_c the scores of a query at checkpoint c, and sigma_c their standard deviation over the training examples,

        score = G * mean_c(s_c / sigma_c),    G = geometric mean of sigma_c

    See `ptif.methods.along`.

    Args:
        run: a recording, a folder, a list of checkpoints, or a list of several runs.
        method: the method that is asked at each of them.
        units: `"spread"` as above; `"final"` with the last checkpoint's sigma as G; `"raw"`: the plain mean.

    Raises:
        InvalidInput: no run, a method that cannot be averaged, or unknown units.
    """

    run: Any
    method: AbstractMethod
    units: Units | str = Units.SPREAD

    def __post_init__(self) -> None:
        object.__setattr__(self, "run", open_runs(self.run))
        object.__setattr__(self, "units", Units.of(self.units))
        given: Any = self.method
        if not isinstance(given, Influence):
            raise InvalidInput(_refusal(given))
        # Settings that the units would undo are refused here.
        object.__setattr__(self, "method", replace(given, units=self.units))

    @property
    def runs(self) -> tuple[Recording, ...]:
        """The runs, each a training of its own."""
        runs: tuple[Recording, ...] = self.run
        return runs

    @property
    def checkpoints(self) -> tuple[Checkpoint, ...]:
        """The checkpoints of all runs; the last one of the first run comes last, because it is the model's."""
        first, *others = self.runs
        return (*(c for run in others for c in run.checkpoints), *first.checkpoints)

    def __repr__(self) -> str:
        runs = " + ".join(str(len(run)) for run in self.runs)
        return f"along({runs} checkpoints, {self.method!r})"

    def __fingerprint__(self) -> tuple[Any, ...]:
        """What results depend on: the weights rather than the folder they are read from."""
        return ([run.recorded for run in self.runs], self.method, Units.of(self.units).value)

    def fit(self, problem: Problem, n_queries: int = 1) -> Attribution:
        """Fit the method at every checkpoint.

        Args:
            problem: model, loss and training data.
            n_queries: how many queries are expected.

        Raises:
            InvalidInput: the problem has checkpoints of its own, or a recorded one does not fit the model.
        """
        fitted = self._asked.fit(self._along(problem), n_queries)
        return replace(fitted, run_notes=tuple(self._notes(problem)))

    def forecast(self, problem: Problem, n_queries: int = 1, top: int | None = None) -> Forecast:
        """What `fit` and `score` would cost.

        Args:
            problem: model, loss and training data.
            n_queries: how many queries there will be.
            top: how many scores are kept of every query at either end, as in `score`; `None`: all.
        """
        return self._asked.forecast(self._along(problem), n_queries, top)

    def with_options(self, **options: Any) -> Along:
        """A copy whose method has these fields changed, such as another damping.

        Args:
            options: fields of the method by name; None leaves one as it is.

        Raises:
            InvalidInput: the method has no such field.
        """
        return replace(self, method=self.method.with_options(**options))

    @property
    def _asked(self) -> Influence:
        """The method, in these units."""
        method: Any = self.method
        asked: Influence = method
        return asked

    def _along(self, problem: Problem) -> Problem:
        if problem.checkpoints:
            raise InvalidInput(
                f"along() takes its checkpoints from the run and the problem has {len(problem.checkpoints)} of its "
                "own; leave checkpoints= out."
            )
        return problem.with_(checkpoints=self.checkpoints)

    def _notes(self, problem: Problem) -> list[str]:
        """What is told of the runs."""
        described = " and ".join(run.describe() for run in self.runs)
        notes = [f"asked along the training run: {described}"]
        if not self.runs[0].ends_at(problem.model):
            notes.append(
                "the model's own weights are not those of the run's last checkpoint: the scores speak of the run"
            )
        return [*notes, _CONVEX] if is_convex(problem) else notes


def _refusal(given: Any) -> str:
    """Why this is not asked at every checkpoint, and what to write."""
    name = getattr(given, "__name__", given)
    if isinstance(name, str):
        return f"along() asks a method at every checkpoint, got {name!r}; write its call, ptif.methods.{name}()."
    if isinstance(given, Along):
        return "This method follows a run already; leave out along(), or run=."
    return (
        f"along() asks an Influence such as ptif.ekfac() at every checkpoint, got {type(given).__name__}; a method "
        "that follows the run itself takes its parts: trajectory.SOURCE(recording.segments())."
    )
