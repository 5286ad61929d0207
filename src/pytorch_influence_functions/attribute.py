"""The one call: which training examples made the model do this?"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields, is_dataclass, replace
from typing import Any, Literal, overload

import torch
from torch import Tensor, nn

from .attribution import Influence
from .checks import check_top, in_queries
from .damping import AbstractDamping
from .data import Source, to_device
from .errors import InvalidInput
from .fitting import AbstractMethod
from .guard import undisturbed
from .objectives import (
    AbstractObjective,
    Bernoulli,
    CrossEntropy,
    SquaredError,
    TokenCrossEntropy,
    inputs_and_targets,
)
from .objectives.base import check_outputs
from .problem import Checkpoint, Problem, WeightDecay, check_model, check_weights, model_device
from .rows import Route
from .scores import Scores
from .solvers import Forecast
from .space import Selection


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
    return spec.fit(problem, queries=len(asked)).score(asked, measure, top=top)


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


def infer_objective(model: nn.Module, source: Source, device: torch.device | str | None = None) -> AbstractObjective:
    """The training loss, guessed from two examples' outputs and targets; refused when it could be more than one."""
    check_weights(model)
    ids, batch = next(iter(source.batches(torch.arange(min(2, len(source))))))
    source.check_finite(ids, batch)
    batch = to_device(batch, model_device(model, device))
    with undisturbed(model), torch.no_grad():
        outputs = CrossEntropy().outputs(model, batch)
    targets = inputs_and_targets(batch)[2]
    check_outputs(outputs, ids)
    seen = f"outputs {tuple(outputs.shape)} and targets {_describe(targets)}"
    if not isinstance(targets, Tensor):
        raise InvalidInput(f"The loss cannot be told from {seen}; pass loss=, e.g. torch.nn.CrossEntropyLoss().")
    whole = not targets.is_floating_point()
    if (
        whole
        and outputs.dim() >= 2
        and targets.shape == outputs.shape[:1]
        and outputs.dim() == 2
        and outputs.shape[1] > 1
    ):
        return CrossEntropy()
    if whole and outputs.dim() == 3 and targets.shape == outputs.shape[:2]:
        return TokenCrossEntropy(shift=_is_causal(batch, targets))
    single = outputs.numel() == len(ids)
    if whole and single and targets.numel() == len(ids):
        return Bernoulli()
    binary = bool(((targets == 0) | (targets == 1)).all())
    if not whole and not binary and outputs.numel() == targets.numel():
        return SquaredError()
    raise InvalidInput(
        f"The loss cannot be told from {seen}; pass loss=, e.g. torch.nn.CrossEntropyLoss(), MSELoss() or "
        "BCEWithLogitsLoss()."
    )


def _is_causal(batch: Any, targets: Tensor) -> bool:
    """Labels that repeat the inputs mean that the model shifts them itself."""
    inputs = batch.get("input_ids") if isinstance(batch, Mapping) else None
    if not isinstance(inputs, Tensor) or inputs.shape != targets.shape:
        return False
    kept = targets >= 0
    return bool((inputs[kept] == targets[kept]).all())


def _describe(targets: Any) -> str:
    return f"{tuple(targets.shape)} of {targets.dtype}" if isinstance(targets, Tensor) else type(targets).__name__
