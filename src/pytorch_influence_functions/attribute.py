"""The one call: which training examples made the model do this, and what would it cost to find out?"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, TypedDict

import torch
from torch import nn

from .core.errors import InvalidInput, UnknownName, nearest
from .damping.rules import AbstractDamping
from .influence.checks import check_top, in_queries
from .influence.method import AbstractMethod
from .linalg.rows import Route
from .linalg.space import Selection
from .methods.names import MethodLike, as_method
from .methods.papers import ekfac
from .problem.checkpoints import Checkpoint
from .problem.data import Source
from .problem.infer_loss import infer_objective
from .problem.model_state import plain_autograd
from .problem.problem import Problem, check_model
from .problem.weight_decay import WeightDecay
from .scores.scores import Scores
from .solvers.forecast import Forecast
from .trajectory.along import Along
from .trajectory.recording import RunLike

if sys.version_info >= (3, 11):
    from typing import Unpack
else:  # torch brings it along
    from typing_extensions import Unpack


# What the same things are called elsewhere.
_SYNONYMS = (
    dict.fromkeys(("criterion", "loss_fn", "loss_function", "loss_func", "objective", "task"), "loss")
    | dict.fromkeys(("params", "layers", "layer", "modules", "parameter_names"), "parameters")
    | dict.fromkeys(("k", "top_k", "topk", "n", "num"), "top")
    | dict.fromkeys(("damp", "lambda_", "lam", "regularization"), "damping")
    | dict.fromkeys(("l2", "wd", "l2_reg", "optimizer", "optimiser"), "weight_decay")
    | dict.fromkeys(("ckpt", "checkpoint", "ckpts"), "checkpoints")
    | dict.fromkeys(("target", "metric", "measurement"), "measure")
)


class ProblemOptions(TypedDict, total=False):
    """The keyword arguments of `attribute` and `forecast` that are handed to `Problem`."""

    parameters: Selection
    weight_decay: float | Mapping[str, float] | torch.optim.Optimizer | WeightDecay
    checkpoints: Sequence[Checkpoint] | Checkpoint
    batch_size: int | None
    deterministic: str
    device: torch.device | str | None


@plain_autograd()
def attribute(
    model: nn.Module,
    train: Any,
    queries: Any,
    *,
    loss: Any = None,
    method: MethodLike | None = None,
    run: RunLike | None = None,
    damping: AbstractDamping | float | None = None,
    route: Route | str | None = None,
    precision: str | None = None,
    measure: Any = None,
    top: int | None = None,
    verify: Any = None,
    **problem: Unpack[ProblemOptions],
) -> Scores:
    r"""Predict, for every query and every training example, what removing that example would change.

    `score[q, i] = (1/N) <(C + lambda)^-1 grad m(q), grad loss(i)>` is the predicted change of the measure `m(q)` when
    example i is removed and the model retrained. For a loss, positive means helpful. Everything not given is chosen by
    size; `print(scores.diagnostics)` says what was chosen and why.

    Args:
        model: the trained model. It is left exactly as it was.
        train: what it was trained on: a Dataset, a DataLoader (its dataset in dataset order, or the part that its
            sampler draws), a pair (x, y) of tensors, arrays, frames or lists. See `Source.of`.
        queries: what is asked about, in the same forms.
        loss: the training loss: an objective, a `torch.nn` loss, or `callable(outputs, targets)`. `None`: inferred
            from outputs and targets where that is unambiguous.
        method: a method such as `ptif.ekfac()`, its name such as `"ekfac"`, or a curvature such as
            `ptif.curvature.GGN()`; `None`: chosen by size, and `ptif.ekfac()` with `run`.
        run: how the model was trained, for more accurate scores: the folder that a `ptif.Recorder` wrote, or what else
            `ptif.methods.along` takes. The method is asked at every checkpoint and the answers averaged.
        damping: `Relative(share)`, `Absolute(value)`, `FromTraining(lr, steps)` or a number; `None`: the method's own.
        route: force one route for gradients and inner products, see `Route`; `None`: the method's own.
        precision: `"bf16"` computes passes and the products of scoring in bfloat16, and sums in float32; `None`: the
            model's precision, float32 at least.
        measure: what is measured on a query, e.g. `ptif.Margin()`; `None`: the training loss.
        top: keep only the k most helpful and k most harmful examples per query; `None`: all scores.
        verify: how the model was trained, an `evaluation.Recipe` or `(dataset, seed) -> trained model`: a handful of
            removals is retrained, and the verdict stands in `scores.diagnostics.notes`. See `Scores.verify`.
        parameters: names, globs, modules or a predicate; by default everything that is trainable.
        weight_decay: the L2 strength of training, or the optimiser it is read from; by default 0.
        checkpoints: state dicts or files; scores are averaged over them. By default the model's weights alone.
        batch_size: the most examples per batch; by default what suits an example's size. Scores do not depend on it.
        deterministic: `"warn"` (the default), `"error"` or `"ignore"` when reading an example twice gives different
            values.
        device: where to compute; by default where the model is.

    Returns:
        `Scores` with `values` of shape (queries, N), indices being positions in the training dataset.

    Raises:
        InvalidInput: the data, model, loss or an argument cannot be used; the message says what to change.
        NonFinite: a weight, an example, a gradient or a score is NaN or infinite; the indices are named.
        SolveFailed: a solve did not converge; the message says why.
        TooLarge: the method would take more memory than its bound.

    Example:
        >>> x, y = torch.randn(40, 3), torch.randint(0, 2, (40,))
        >>> model = nn.Linear(3, 2)
        >>> scores = attribute(model, (x, y), (x[:2], y[:2]), method="dual")
        >>> scores.values.shape
        torch.Size([2, 40])
        >>> index, score = scores.helpful(0, k=1)[0]
    """
    check_top(top)
    changes = {"damping": damping, "route": route, "precision": precision}
    spec, whole, source = _prepare("attribute", model, train, queries, loss, (method, run), changes, problem)
    fitted = spec.fit(whole, n_queries=len(source))
    scores = fitted.score(source, measure, top=top if verify is None else None)
    scores = replace(scores, diagnostics=replace(scores.diagnostics, inferred=loss is None))
    if verify is None:
        return scores
    verdict = scores.verify(verify, measure=whole.objective if measure is None else measure)
    diagnostics = replace(scores.diagnostics, notes=(*scores.diagnostics.notes, verdict.sentence))
    scores = replace(scores, diagnostics=diagnostics)
    return scores if top is None else scores.top(top)


@plain_autograd()
def forecast(
    model: nn.Module,
    train: Any,
    queries: Any,
    *,
    loss: Any = None,
    method: MethodLike | None = None,
    run: RunLike | None = None,
    damping: AbstractDamping | float | None = None,
    route: Route | str | None = None,
    precision: str | None = None,
    **problem: Unpack[ProblemOptions],
) -> Forecast:
    """What `attribute` would choose, and what it would cost: passes over the data, memory and seconds.

    Runs and times one small batch; nothing else is computed. Memory is what is needed beside the model.

    Args:
        model, train, queries, loss, method, run, damping, route, precision: as for `attribute`.
        parameters, weight_decay, checkpoints, batch_size, deterministic, device: as for `attribute`.

    Raises:
        InvalidInput: as for `attribute`, or the method has no forecast.

    Example:
        >>> x, y = torch.randn(40, 3), torch.randint(0, 2, (40,))
        >>> forecast(nn.Linear(3, 2), (x, y), (x[:2], y[:2])).why
        '8 parameters are few enough for the dense Gauss-Newton matrix, exactly'
    """
    changes = {"damping": damping, "route": route, "precision": precision}
    spec, whole, source = _prepare("forecast", model, train, queries, loss, (method, run), changes, problem)
    return spec.forecast(whole, len(source))


def _prepare(
    name: str,
    model: Any,
    train: Any,
    queries: Any,
    loss: Any,
    method: tuple[Any, Any],
    changes: Mapping[str, Any],
    options: ProblemOptions,
) -> tuple[AbstractMethod, Problem, Source]:
    """The method, the problem and the queries that were asked for."""
    check_model(model)
    _check_options(name, options)
    asked, run = method
    if run is not None and asked is None:
        asked = ekfac()
    spec = as_method(asked).with_options(**changes)
    if run is not None:
        spec = Along(run, spec)
    batch_size = options.get("batch_size")
    data = Source.of(train, batch_size)
    with in_queries():
        source = Source.of(queries, batch_size, data.class_names or ())
    objective = infer_objective(model, data, options.get("device")) if loss is None else loss
    return spec, Problem(model, objective, data, **options), source


def _check_options(name: str, options: Mapping[str, Any]) -> None:
    """Refuse keyword arguments that do not exist, as Python would, but say which one was meant."""
    known = [*ProblemOptions.__annotations__, "loss", "method", "run", "damping", "route", "precision"]
    rest = ["measure", "top", "verify"]
    for option in options:
        if option in ProblemOptions.__annotations__:
            continue
        if option == "dry_run":
            raise InvalidInput("dry_run= became a function: write ptif.forecast(model, train, queries, ...).")
        if option in rest:
            raise InvalidInput(f"{name}() takes no {option}=, which does not change what is forecast; leave it out.")
        if option in _SYNONYMS:
            raise UnknownName(f"{name}() has no argument {option!r}; write {_SYNONYMS[option]}=.")
        close = nearest(option, [*known, *(rest if name == "attribute" else [])])
        raise UnknownName(f"{name}() has no argument {option!r}.{close}")
