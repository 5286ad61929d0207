"""The one call: which training examples made the model do this?"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields, is_dataclass, replace
from typing import Any, Literal, overload

import torch
from torch import nn

from .core.errors import InvalidInput
from .damping.rules import AbstractDamping
from .influence.attribution import Influence
from .influence.checks import check_top, in_queries
from .influence.method import AbstractMethod
from .linalg.rows import Route
from .linalg.space import Selection
from .problem.checkpoints import Checkpoint
from .problem.data import Source
from .problem.infer_loss import infer_objective
from .problem.problem import Problem, check_model
from .problem.weight_decay import WeightDecay
from .scores.scores import Scores
from .solvers.auto import Forecast


@overload
def attribute(
    model: nn.Module,
    train: Any,
    queries: Any,
    *,
    loss: Any = None,
    method: AbstractMethod | None = None,
    measure: Any = None,
    parameters: Selection = None,
    weight_decay: float | Mapping[str, float] | torch.optim.Optimizer | WeightDecay = 0.0,
    damping: AbstractDamping | float | None = None,
    route: Route | str | None = None,
    checkpoints: Sequence[Checkpoint] | Checkpoint = (),
    top: int | None = None,
    batch_size: int | None = None,
    deterministic: str = "warn",
    device: torch.device | str | None = None,
    verify: Any = None,
    dry_run: Literal[False] = False,
) -> Scores: ...
@overload
def attribute(
    model: nn.Module,
    train: Any,
    queries: Any,
    *,
    loss: Any = None,
    method: AbstractMethod | None = None,
    measure: Any = None,
    parameters: Selection = None,
    weight_decay: float | Mapping[str, float] | torch.optim.Optimizer | WeightDecay = 0.0,
    damping: AbstractDamping | float | None = None,
    route: Route | str | None = None,
    checkpoints: Sequence[Checkpoint] | Checkpoint = (),
    top: int | None = None,
    batch_size: int | None = None,
    deterministic: str = "warn",
    device: torch.device | str | None = None,
    verify: Any = None,
    dry_run: Literal[True],
) -> Forecast: ...
@overload
def attribute(
    model: nn.Module,
    train: Any,
    queries: Any,
    *,
    loss: Any = None,
    method: AbstractMethod | None = None,
    measure: Any = None,
    parameters: Selection = None,
    weight_decay: float | Mapping[str, float] | torch.optim.Optimizer | WeightDecay = 0.0,
    damping: AbstractDamping | float | None = None,
    route: Route | str | None = None,
    checkpoints: Sequence[Checkpoint] | Checkpoint = (),
    top: int | None = None,
    batch_size: int | None = None,
    deterministic: str = "warn",
    device: torch.device | str | None = None,
    verify: Any = None,
    dry_run: bool,
) -> Scores | Forecast: ...
def attribute(
    model: nn.Module,
    train: Any,
    queries: Any,
    *,
    loss: Any = None,
    method: AbstractMethod | None = None,
    measure: Any = None,
    parameters: Selection = None,
    weight_decay: float | Mapping[str, float] | torch.optim.Optimizer | WeightDecay = 0.0,
    damping: AbstractDamping | float | None = None,
    route: Route | str | None = None,
    checkpoints: Sequence[Checkpoint] | Checkpoint = (),
    top: int | None = None,
    batch_size: int | None = None,
    deterministic: str = "warn",
    device: torch.device | str | None = None,
    verify: Any = None,
    dry_run: bool = False,
) -> Scores | Forecast:
    r"""Predict, for every query and every training example, what removing that example would change.

    `score[q, i] = (1/N) <(C + lambda)^-1 grad m(q), grad loss(i)>` is the predicted change of the measure `m(q)` when
    example i is removed and the model retrained. For a loss, positive means helpful. Everything not given is chosen by
    size; `print(scores.diagnostics)` says what was chosen and why.

    Args:
        model: the trained model. It is left exactly as it was.
        train: what it was trained on: a Dataset, a DataLoader (its dataset, in dataset order), tensors (x, y).
        queries: what is asked about, in the same forms.
        loss: the training loss: an objective, a `torch.nn` loss, or `callable(outputs, targets)`. `None`: inferred
            from outputs and targets where that is unambiguous.
        method: an `Influence`, e.g. `ptif.dual()`, or another method such as `SOURCE`; `None`: chosen by `Auto`.
        measure: what is measured on a query, e.g. `ptif.Margin()`; `None`: the training loss.
        parameters: names, globs, modules or a predicate; `None`: everything that is trainable.
        weight_decay: the L2 strength of training, or the optimiser it is read from.
        damping: `Relative(share)`, `Absolute(value)`, `FromTraining(lr, steps)` or a number; `None`: the method's own.
        route: force one route for gradients and inner products, see `Route`; `None`: the method's own.
        checkpoints: state dicts or files; scores are averaged over them.
        top: keep only the k most helpful and k most harmful examples per query.
        batch_size: examples per batch; `None`: the loader's, else 64.
        deterministic: `"warn"`, `"error"` or `"ignore"` when reading an example twice gives different values.
        device: where to compute; `None`: where the model is.
        verify: how the model was trained, an `evaluation.Recipe` or `(dataset, seed) -> trained model`: a handful of
            removals is retrained, and the verdict stands in `scores.diagnostics.notes`. See `Scores.verify`.
        dry_run: print and return the forecast (method, passes, memory, seconds) instead of scores.

    Returns:
        `Scores` with `values` of shape (queries, N), indices being positions in the training dataset.

    Raises:
        InvalidInput, NonFinite, SolveFailed, TooLarge: one sentence each, saying what was seen and what to do.

    Example:
        >>> x, y = torch.randn(40, 3), torch.randint(0, 2, (40,))
        >>> model = nn.Linear(3, 2)
        >>> scores = attribute(model, (x, y), (x[:2], y[:2]))
        >>> scores.values.shape
        torch.Size([2, 40])
        >>> index, score = scores.helpful(0, k=1)[0]
    """
    check_model(model)
    check_top(top)
    source = Source.of(train, batch_size)
    with in_queries():
        asked = Source.of(queries, batch_size)
    objective = infer_objective(model, source, device) if loss is None else loss
    problem = Problem(
        model,
        objective,
        source,
        parameters=parameters,
        weight_decay=weight_decay,
        checkpoints=checkpoints,
        batch_size=batch_size,
        deterministic=deterministic,
        device=device,
    )
    spec: AbstractMethod = Influence() if method is None else method
    if not isinstance(spec, AbstractMethod):
        raise InvalidInput(
            f"method must be an Influence such as ptif.dual(), got {type(spec).__name__}; call what makes one, with ()."
        )
    spec = _with_options(spec, damping=damping, route=route)
    if dry_run:
        if not isinstance(spec, Influence):
            raise InvalidInput(
                f"dry_run=True forecasts an Influence, not {type(spec).__name__}; leave it out, or call fit() and "
                "score() one after the other."
            )
        forecast = spec.forecast(problem, len(asked))
        print(forecast)
        return forecast
    fitted = spec.fit(problem, n_queries=len(asked))
    if verify is None:
        return fitted.score(asked, measure, top=top)
    scores = fitted.score(asked, measure)
    verdict = scores.verify(verify, measure=problem.objective if measure is None else measure)
    noted = replace(scores.diagnostics, notes=(*scores.diagnostics.notes, verdict.sentence))
    scores = replace(scores, diagnostics=noted)
    return scores if top is None else scores.top(top)


def _with_options(spec: AbstractMethod, **options: Any) -> AbstractMethod:
    """The method with what was asked for at the door; an option it does not have is refused."""
    asked = {name: value for name, value in options.items() if value is not None}
    record: Any = spec
    known = {f.name for f in fields(record)} if is_dataclass(record) else set()
    for name in asked:
        if name not in known:
            raise InvalidInput(f"{type(spec).__name__} takes no {name}=; leave it out.")
    made: AbstractMethod = replace(record, **asked) if asked else spec
    return made
