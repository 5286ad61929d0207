"""The one call: which training examples made the model do this, and what would it cost to find out?"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import Any, TypedDict, overload

import torch
from torch.utils.data import DataLoader

from .core.distributed import distributed as shared_out
from .core.errors import InvalidInput, UnknownName, nearest
from .damping.rules import AbstractDamping
from .hf.asking import queries_for
from .hf.models import knows_texts
from .hf.problem import problem as hf_problem
from .hf.queries import TextQueries
from .influence.checks import check_top, in_queries
from .influence.combination import aggregate_of
from .influence.method import AbstractMethod
from .influence.parts import By
from .influence.question import model_functions, take_sides
from .linalg.rows import Route
from .linalg.space import Selection
from .methods.names import MethodLike, along_the_run, as_method
from .problem.agreement import entry
from .problem.checkpoints import Checkpoint
from .problem.data import Source
from .problem.inferred import inferred_problem
from .problem.model_state import plain_autograd
from .problem.problem import Problem, check_model
from .problem.random_state import same_rng
from .problem.weight_decay import WeightDecay
from .scores.difference import CONTRASTED
from .scores.parts import PartScores
from .scores.scores import MEAN, Scores
from .solvers.forecast import Forecast
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
    weight_decay: float | Mapping[str, float] | torch.optim.Optimizer | Sequence[torch.optim.Optimizer] | WeightDecay
    checkpoints: Sequence[Checkpoint] | Checkpoint
    batch_size: int | None
    deterministic: str
    device: torch.device | str | None


# fmt: off
@overload
def attribute(
    model: Any, train: Any = None, queries: Any = None, loss: Any = None, *, method: MethodLike | None = None,
    run: RunLike | None = None, damping: AbstractDamping | float | None = None, route: Route | str | None = None,
    precision: str | None = None, measure: Any = None, top: int | None = None, aggregate: Any = None,
    contrast: Any = None, ids: Any = None, by: None = None, verify: Any = None,
    distributed: bool = False, **problem: Unpack[ProblemOptions],
) -> Scores: ...
@overload
def attribute(
    model: Any, train: Any = None, queries: Any = None, loss: Any = None, *, method: MethodLike | None = None,
    run: RunLike | None = None, damping: AbstractDamping | float | None = None, route: Route | str | None = None,
    precision: str | None = None, measure: Any = None, top: int | None = None, aggregate: Any = None,
    contrast: Any = None, ids: Any = None, by: By, verify: Any = None,
    distributed: bool = False, **problem: Unpack[ProblemOptions],
) -> PartScores: ...
# fmt: on
def attribute(
    model: Any,
    train: Any = None,
    queries: Any = None,
    loss: Any = None,
    *,
    method: MethodLike | None = None,
    run: RunLike | None = None,
    damping: AbstractDamping | float | None = None,
    route: Route | str | None = None,
    precision: str | None = None,
    measure: Any = None,
    top: int | None = None,
    aggregate: Any = None,
    contrast: Any = None,
    ids: Any = None,
    by: By | None = None,
    verify: Any = None,
    distributed: bool = False,
    **problem: Unpack[ProblemOptions],
) -> Scores | PartScores:
    r"""Predict, for every query and every training example, what removing that example would change.

    `score[q, i] = (1/N) <(C + lambda)^-1 grad m(q), grad loss(i)>` is the predicted change of the measure `m(q)` when
    example i is removed and the model retrained. For a loss, positive means helpful. Everything not given is chosen by
    size; `print(scores.diagnostics)` says what was chosen and why.

    Args:
        model: the trained model; or a Hugging Face Trainer, or a `ptif.Problem`, which know what they were trained on;
            or a pipeline, with texts as `train`. It is left exactly as it was.
        train: what it was trained on: a Dataset, a DataLoader (its dataset in dataset order, or the part that its
            sampler draws), a pair (x, y) of tensors, arrays, frames or lists. See `Source.of`. None: the Trainer's or
            the problem's.
        queries: what is asked about, in the same forms; of a language model (a Trainer or `ptif.hf.problem`) also
            texts, chats or `{"prompt", "completion", "against"}`, or what `ptif.hf.query` gave; or
            `ptif.objectives.FromModel(f)`, about the whole model.
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
        measure: what is measured on a query, e.g. `ptif.Margin()`, or a list of several; `None`: the training loss.
        top: keep only the k most helpful and k most harmful examples per query; `None`: all scores.
        aggregate: put queries together into rows, each solved once: `"mean"`, `"sum"`, the group of every query, or by
            name the positions, a mask or the weights of its queries; `None`: a row for every query.
        contrast: what every query is compared with, in the forms of `queries`, as many or one: why this rather than
            that? `None`: nothing.
        ids: the training examples to score, or a list of them for every row; `None`: all.
        by: `"layer"` or patterns of names: scores told apart by parts of the model, as `PartScores`; `None`: whole.
        verify: how the model was trained, an `evaluation.Recipe` or `(dataset, seed) -> trained model`: a handful of
            removals is retrained, and the verdict stands in `scores.diagnostics.notes`. See `Scores.verify`.
        distributed: share the work out over the processes of `torch.distributed`, all of which make the same call; see
            `ptif.distributed`. By default every process computes alone.
        parameters: names, globs, modules or a predicate; by default everything that is trainable.
        weight_decay: the L2 strength of training, one number or by name of a parameter or glob such as `"0.*"`, or the
            optimiser it is read from, or several in a list; by default 0.
        checkpoints: state dicts or files; scores are averaged over them. By default the model's weights alone.
        batch_size: the most examples per batch; by default what suits an example's size. Scores do not depend on it,
            unless the model takes padding for input, which a warning says.
        deterministic: `"warn"` (the default), `"error"` or `"ignore"` when reading an example twice gives different
            values.
        device: where to compute; by default where the model is.

    Returns:
        `Scores` with `values` of shape (queries, N), indices being positions in the training dataset. With `by`,
        `PartScores`: one `Scores` for every part.

    Raises:
        InvalidInput: the data, model, loss or an argument cannot be used; the message says what to change.
        NonFinite: a weight, an example, a gradient or a score is NaN or infinite; the indices are named.
        SolveFailed: a solve did not converge; the message says why.
        TooLarge: the method would take more memory than its bound.
        ProcessFailed: with `distributed`, another process failed or ended.

    Example:
        >>> x, y = torch.randn(40, 3), torch.randint(0, 2, (40,))
        >>> model = torch.nn.Linear(3, 2)
        >>> scores = attribute(model, (x, y), (x[:2], y[:2]), method="dual")
        >>> scores.values.shape
        torch.Size([2, 40])
        >>> index, score = scores.helpful(0, k=1)[0]
    """
    check_top(top)
    changes = {"damping": damping, "route": route, "precision": precision}
    whole = (model, train, queries, loss, (method, run), changes, problem)
    asked = {"aggregate": aggregate, "contrast": contrast, "ids": ids, "by": by}
    with shared_out() if distributed else nullcontext():
        return _attribute(whole, measure, top, asked, verify)


@entry
def _attribute(
    given: tuple[Any, ...], measure: Any, top: int | None, asked: dict[str, Any], verify: Any
) -> Scores | PartScores:
    """What `attribute` gives: `given` are the arguments of `_prepare` behind the name, `asked` those of `score`."""
    model, loss = given[0], given[3]
    spec, whole, source = _prepare("attribute", *given)
    contrast, names, both = asked["contrast"], None, None
    _refuse_to_verify(verify, asked["aggregate"], contrast, asked["ids"], asked["by"], source)
    if contrast is not None and (isinstance(model, Problem) or knows_texts(model)):
        contrast = _known_queries(whole, contrast, "contrast")
    if isinstance(source, TextQueries):
        names, both = source.names, source if source.pairs else None
        source, contrast = take_sides(source, contrast)
    fitted: Any = spec.fit(whole, n_queries=_count_rows(source, asked["aggregate"]))
    asked = {name: value for name, value in (asked | {"contrast": contrast}).items() if value is not None}
    _check_asked(spec, fitted, asked)
    scores: Scores | PartScores = fitted.score(source, measure, top=top if verify is None else None, **asked)
    inferred = loss is None and not isinstance(model, Problem)
    if isinstance(scores, PartScores):
        return PartScores({part: _finished(one, names, both, inferred) for part, one in scores.items()})
    scores = _finished(scores, names, both, inferred)
    if verify is None:
        return scores
    verdict = scores.verify(verify, measure=whole.objective if measure is None else measure)
    diagnostics = replace(scores.diagnostics, notes=(*scores.diagnostics.notes, verdict.sentence))
    scores = replace(scores, diagnostics=diagnostics)
    return scores if top is None else scores.top(top)


def _finished(scores: Scores, names: list[str] | None, both: TextQueries | None, inferred: bool) -> Scores:
    """The scores with the queries' own names, where each is a row, both sides of pairs, and where the loss is from."""
    if both is not None and scores.diagnostics.rows == CONTRASTED:
        scores = replace(scores, query_source=both)
    if names is not None and len(names) == len(scores) and MEAN not in scores.query_ids.tolist():
        scores = replace(scores, query_names=names)
    return replace(scores, diagnostics=replace(scores.diagnostics, inferred=inferred))


def _refuse_to_verify(verify: Any, aggregate: Any, contrast: Any, ids: Any, by: Any, source: Any) -> None:
    if verify is None:
        return
    if isinstance(source, TextQueries) and source.pairs:
        raise InvalidInput("verify= retrains for one answer, not for a pair; verify the scores of each answer.")
    options = {"aggregate": aggregate, "contrast": contrast, "ids": ids, "by": by}
    options["FromModel"] = source if model_functions(source) else None
    for name, value in options.items():
        if value is not None:
            raise InvalidInput(
                f"verify= retrains and measures every query by itself, on every training example; leave {name}= or "
                "verify= out."
            )


def _count_rows(source: Any, aggregate: Any) -> int:
    """How many right-hand sides there will be: it guides the choice of the method."""
    return len(source) if aggregate is None else len(aggregate_of(aggregate, len(source)).names)


@plain_autograd()
def forecast(
    model: Any,
    train: Any = None,
    queries: Any = None,
    loss: Any = None,
    *,
    method: MethodLike | None = None,
    run: RunLike | None = None,
    damping: AbstractDamping | float | None = None,
    route: Route | str | None = None,
    precision: str | None = None,
    aggregate: Any = None,
    top: int | None = None,
    **problem: Unpack[ProblemOptions],
) -> Forecast:
    """What `attribute` would choose, and what it would cost: passes over the data, memory and seconds.

    Runs and times one small batch; nothing else is computed. Memory is what is needed beside the model.

    Args:
        model, train, queries, loss, method, run, damping, route, precision, aggregate, top: as for `attribute`.
        parameters, weight_decay, checkpoints, batch_size, deterministic, device: as for `attribute`.

    Raises:
        InvalidInput: as for `attribute`, or the method has no forecast.

    Example:
        >>> x, y = torch.randn(40, 3), torch.randint(0, 2, (40,))
        >>> forecast(torch.nn.Linear(3, 2), (x, y), (x[:2], y[:2])).why
        '8 parameters are few enough for the dense Gauss-Newton matrix, exactly'
    """
    changes = {"damping": damping, "route": route, "precision": precision}
    spec, whole, source = _prepare("forecast", model, train, queries, loss, (method, run), changes, problem)
    return spec.forecast(whole, _count_rows(source, aggregate), top)


def _prepare(
    name: str,
    model: Any,
    train: Any,
    queries: Any,
    loss: Any,
    method: tuple[Any, Any],
    changes: Mapping[str, Any],
    options: ProblemOptions,
) -> tuple[AbstractMethod, Problem, Any]:
    """The method, the problem and the queries that were asked for."""
    known = isinstance(model, Problem) or knows_texts(model)
    if not known:
        check_model(model)
        _check_given(name, train, queries)
    _check_options(name, options)
    asked, run = method
    spec = (
        as_method(asked).with_options(**changes) if run is None else along_the_run(run, asked).with_options(**changes)
    )
    if known:
        return spec, *_known_problem(name, model, train, queries, loss, options)
    batch_size = options.get("batch_size")
    data = Source.of(train, batch_size)
    _check_numbers(name, train, data)
    functions = model_functions(queries)
    with in_queries():
        source = functions or data.read_alike(queries, batch_size)
    whole = inferred_problem(model, data, **options) if loss is None else Problem(model, loss, data, **options)
    return spec, whole, source


def _known_problem(
    name: str, known: Any, train: Any, queries: Any, loss: Any, options: ProblemOptions
) -> tuple[Problem, Any]:
    """The problem of a Trainer, or the one that was given, and queries in its form."""
    if queries is None and train is not None:
        if isinstance(known, Problem):
            raise InvalidInput(
                f"{name}() got a problem, which holds its training data, and more of them in the second place; if they "
                f"are what is asked, write {name}(problem, queries=...)."
            )
        raise InvalidInput(f"{name}() got nothing that is asked; write queries=, as in {name}(trainer, queries=...).")
    if not isinstance(known, Problem):
        whole = hf_problem(known, dataset=train, loss=loss, **options)
        return whole, _known_queries(whole, queries)
    given = [*options, *(["loss"] if loss is not None else []), *(["train"] if train is not None else [])]
    if given:
        raise InvalidInput(
            f"{name}() got a problem and {given[0]}=, which belongs to it; write problem.with_({given[0]}=...), or "
            f"{name}(problem, queries=...)."
        )
    return known, _known_queries(known, queries)


def _known_queries(problem: Problem, queries: Any, place: str = "queries") -> Any:
    """Queries in the form that a problem reads, or functions of the whole model."""
    functions = model_functions(queries)
    with in_queries(place):
        return functions or (problem.data.ask or queries_for)(problem, queries)


def _check_asked(spec: AbstractMethod, fitted: Any, asked: Mapping[str, Any]) -> None:
    """Refuse ways to ask that the fitted method does not know."""
    known = inspect.signature(fitted.score).parameters
    for name in asked:
        if name not in known:
            raise InvalidInput(f"{type(spec).__name__} takes no {name}=; leave it out, or use ptif.ekfac().")


def _check_given(name: str, train: Any, queries: Any) -> None:
    for argument, value in (("train", train), ("queries", queries)):
        if value is None:
            raise InvalidInput(
                f"{name}() of a model needs {argument}=: {name}(model, train, queries); a Hugging Face Trainer or a "
                "ptif.Problem knows its training data."
            )
    if isinstance(queries, str):
        raise InvalidInput(
            "A text is asked and a model alone has no tokenizer; write "
            f"{name}(ptif.hf.problem(model, tokenizer, texts), queries=...)."
        )


def _check_numbers(name: str, train: Any, data: Source) -> None:
    """Refuse rows of texts beside a model alone, which reads numbers; a loader may still make these of texts."""
    if isinstance(train, (Source, DataLoader)) or data.in_memory:
        return
    with same_rng():
        first = data.item(0)
    cells = first.values() if isinstance(first, Mapping) else (first,)
    if any(isinstance(cell, str) for cell in cells) and not any(
        hasattr(cell, "__len__") and not isinstance(cell, str) for cell in cells
    ):
        raise InvalidInput(
            "The training data are texts and a model alone has no tokenizer; write "
            f"{name}(ptif.hf.problem(model, tokenizer, data), queries=...), or give a DataLoader that tokenises them."
        )


def _check_options(name: str, options: Mapping[str, Any]) -> None:
    """Refuse keyword arguments that do not exist, as Python would, but say which one was meant."""
    known = [*ProblemOptions.__annotations__, "loss", "method", "run", "damping", "route", "precision", "aggregate"]
    rest = ["measure", "top", "verify", "distributed"]
    parts = ["contrast", "ids", "by"]
    for option in options:
        if option in ProblemOptions.__annotations__:
            continue
        if option == "dry_run":
            raise InvalidInput("dry_run= became a function: write ptif.forecast(model, train, queries, ...).")
        if option in rest:
            raise InvalidInput(f"{name}() takes no {option}=, which does not change what is forecast; leave it out.")
        if option in _SYNONYMS:
            raise UnknownName(f"{name}() has no argument {option!r}; write {_SYNONYMS[option]}=.")
        if option in parts:
            raise InvalidInput(
                f"{name}() speaks of whole scores of all training examples and takes no {option}=; leave it out."
            )
        close = nearest(option, [*known, *(rest + parts if name == "attribute" else [])])
        raise UnknownName(f"{name}() has no argument {option!r}.{close}")
