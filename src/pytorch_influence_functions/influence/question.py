"""What is asked: queries as a data source, what is measured on them, and how they are put together."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.utils.data import DataLoader

from ..core.distributed import World
from ..core.errors import InvalidInput
from ..objectives.base import AbstractObjective
from ..objectives.convert import as_objective
from ..objectives.measures import FromFunction
from ..objectives.model_functions import FromModel
from ..problem.agreement import agree_on_question
from ..problem.data import Source
from ..problem.labels import Labels
from ..problem.model_and_loss import ModelAndLoss
from ..problem.problem import Problem, first_batch
from ..scores.difference import CONTRASTED
from ..scores.scores import MEAN
from .asks import AbstractAsk, DataAsk, ModelAsk, Term
from .candidates import Candidates
from .checks import check_top, in_queries, of_measure
from .combination import Aggregate, Combination, aggregate_of


@dataclass(frozen=True, eq=False)
class Question:
    """Rows of scores that are asked for, ready to be computed; `labels` fills while the queries are read.

    Args:
        asks: what the rows are gradients of, one after the other.
        lower_is_better: whether smaller is better, of all rows.
        top: how many are kept at each end of every row; None: all.
        source: the queries; None where the question is about the whole model.
        query_ids: of every row its place in the query dataset, -1 for a row of several.
        names: of every row; None: the queries' own.
        description: how the rows are made of the queries, in words; empty where each query is a row.
        labels: of the queries.
        candidates: the training examples that are scored; None: all.
        measure: what is measured, where every row is one query's own; None: rows are made otherwise.
        both: the queries with what each is contrasted with, where they were asked as pairs.
    """

    asks: tuple[AbstractAsk, ...]
    lower_is_better: bool
    top: int | None
    source: Source | None
    query_ids: Int[Tensor, " r"]
    names: list[str] | None
    description: str
    labels: Labels
    candidates: Candidates | None = None
    measure: AbstractObjective | None = None
    both: Source | None = None

    @property
    def shown(self) -> Source | None:
        """The queries that scores hold, by whose places rows are named: of pairs both sides."""
        source = self.source if self.both is None else self.both
        return None if source is None else source.whole

    @staticmethod
    def of(
        problem: Problem,
        objective: AbstractObjective,
        queries: Any,
        measure: Any = None,
        top: int | None = None,
        batch_size: int | None = None,
        aggregate: Any = None,
        contrast: Any = None,
        ids: Any = None,
    ) -> Question:
        """Read what was asked; `objective` is the training objective, which is measured where `measure` is None.

        Raises:
            InvalidInput: queries, measure, `top`, `aggregate`, `contrast` or `ids` cannot be used as they are.
        """
        check_top(top)
        functions = model_functions(queries)
        if functions:
            _refuse_beside_model(measure=measure, aggregate=aggregate, contrast=contrast)
            question = _about_model(functions, top)
        else:
            asked = (problem.batch_size if problem.data.fixed else None) if batch_size is None else batch_size
            contrast = None if contrast is None else read_asked(problem, contrast, "contrast")
            read = read_asked(problem, queries, "queries")
            own_names = None if read is queries else read.names
            queries, contrast = (queries, contrast) if read is queries else take_sides(read, contrast)
            source = _read(problem, queries, asked, "queries")
            against = None if contrast is None else _read(problem, contrast, asked, "contrast")
            given = {"measure=": measure, "top=": top, "aggregate=": aggregate, "ids=": ids}
            agree_on_question(source, against, given)
            measures = {
                name: resolve_measure(problem, objective, one, source) for name, one in _several(measure).items()
            }
            question = _about_data(source, against, measures, aggregate, top)
            if len(measures) == 1 and aggregate is None and contrast is None:
                question = replace(question, measure=next(iter(measures.values())))
            if read is not queries and read.sides[1] is not None and question.description == CONTRASTED:
                question = replace(question, both=read)
            if own_names is not None and len(own_names) == len(question) and MEAN not in question.query_ids.tolist():
                question = replace(question, names=own_names)
        if ids is None:
            return question
        return replace(question, candidates=Candidates.of(ids, problem.data, len(question)))

    def __len__(self) -> int:
        return sum(map(len, self.asks))

    def query_labels(self) -> list[Any] | None:
        """The label of every row that has a query of its own; None where no row has."""
        labels = self.labels.as_list(World())
        if labels is None or self.source is None or bool((self.query_ids == MEAN).any()):
            return None
        places = self.query_ids.tolist()
        if self.source.positions is not None:
            index = {position: i for i, position in enumerate(self.source.positions.tolist())}
            places = [index[position] for position in places]
        return [labels[i] for i in places]

    def of_values(self, values: Callable[[Source], Float[Tensor, "q n"]]) -> Float[Tensor, "r n"]:
        """The rows of anything that has a row for every query, whatever the measure.

        Args:
            values: gives them for a source of queries.

        Raises:
            InvalidInput: the question is about the whole model.
        """
        rows = []
        for ask in self.asks:
            if not isinstance(ask, DataAsk):
                raise InvalidInput(
                    "A plain baseline compares examples and cannot be asked about the whole model; use a method with "
                    "gradients, such as ptif.ekfac()."
                )
            rows.append(sum(term.combination.apply(values(term.source)) for term in ask.terms))
        return torch.cat([torch.as_tensor(part) for part in rows])


# --------------------------------------------------------------------------- reading what was asked


def take_sides(queries: Any, contrast: Any) -> tuple[Any, Any]:
    """Queries and what they are contrasted with, where queries hold both.

    Raises:
        InvalidInput: they do, and `contrast` is given too.
    """
    answers, others = queries.sides if isinstance(queries, Source) else (queries, None)
    if others is not None and contrast is not None:
        raise InvalidInput("These queries hold what they are contrasted with (against=); leave contrast= out.")
    return answers, contrast if others is None else others


def model_functions(queries: Any) -> list[FromModel]:
    """The functions of the whole model that stand in the place of queries; none where there are queries.

    Raises:
        InvalidInput: some of a list are such functions and others are not.
    """
    if isinstance(queries, FromModel):
        return [queries]
    if not isinstance(queries, (list, tuple)) or not any(isinstance(q, FromModel) for q in queries):
        return []
    functions = [q for q in queries if isinstance(q, FromModel)]
    if len(functions) < len(queries):
        raise InvalidInput(
            "The queries mix FromModel(...) with others; ask about the whole model in a call of its own."
        )
    return functions


def _about_model(functions: list[FromModel], top: int | None) -> Question:
    names = [function.called for function in functions]
    lower = _one_direction({f.called: f.lower_is_better for f in functions})
    ids = torch.full((len(functions),), MEAN)
    asks = tuple(ModelAsk(function) for function in functions)
    described = "each row is a function of the whole model"
    return Question(asks, lower, top, None, ids, names, described, Labels(0))


def _refuse_beside_model(**options: Any) -> None:
    for name, value in options.items():
        if value is not None:
            raise InvalidInput(
                f"{name}= speaks of queries, and FromModel(...) is asked of the whole model; leave one of the two out."
            )


def read_asked(problem: Problem, queries: Any, place: str, labelled: bool = False) -> Any:
    """Queries that are no examples, where the problem's data say how such are read: texts, chats, prompts.

    Args:
        problem: the problem.
        queries: what is asked.
        place: the name of the argument.
        labelled: whether each has to have its own label, and not the model's answer in its place.

    Raises:
        InvalidInput: they cannot be read, or lack labels.
    """
    if problem.data.ask is None or isinstance(queries, (Source, DataLoader)):
        return queries
    with in_queries(place):
        return problem.data.ask(problem, queries, labelled)


def _read(problem: Problem, data: Any, batch_size: int | None, place: str) -> Source:
    with in_queries(place):
        return problem.data.read_alike(data, batch_size)


def _several(measure: Any) -> dict[str, Any]:
    """Measures by what they are called in the names of rows; a single one has no name there."""
    if isinstance(measure, Mapping):
        several = {str(name): one for name, one in measure.items()}
    elif isinstance(measure, (list, tuple)):
        several = {repr(one) if isinstance(one, AbstractObjective) else _called(one): one for one in measure}
        if len(several) < len(measure):
            raise InvalidInput(
                "Two measures of measure= are called the same; give them as a dictionary, measure={'name': measure}."
            )
    else:
        return {"": measure}
    if not several:
        raise InvalidInput("measure= is empty; leave it out to measure the training loss.")
    return several


def _called(measure: Any) -> str:
    return "the training loss" if measure is None else str(getattr(measure, "__name__", type(measure).__name__))


def _one_direction(lower: Mapping[str, bool]) -> bool:
    """Whether smaller is better of all: helpful and harmful must mean the same in every row."""
    if len(set(lower.values())) > 1:
        losses = next(name for name, value in lower.items() if value)
        others = next(name for name, value in lower.items() if not value)
        raise InvalidInput(
            f"Of {losses or 'one'} smaller is better and of {others or 'another'} larger is, so one result cannot say "
            "what is helpful; ask them in two calls."
        )
    return next(iter(lower.values()))


def _about_data(
    source: Source,
    against: Source | None,
    measures: Mapping[str, AbstractObjective],
    aggregate: Any,
    top: int | None,
) -> Question:
    terms, names, places, description = _rows(source, against, aggregate)
    lower = _one_direction({name: one.lower_is_better for name, one in measures.items()})
    asks = tuple(DataAsk(one, terms) for one in measures.values())
    if len(measures) > 1:
        rows = [f"query {place}" for place in places.tolist()] if names is None else names
        names = [f"{row}, {name}" for name in measures for row in rows]
        several = f"one row for each of {len(measures)} measures"
        description = f"{several}; {description}" if description else several
    places = places.repeat(len(measures))
    return Question(asks, lower, top, source, places, names, description, Labels(len(source)))


def _rows(
    source: Source, against: Source | None, aggregate: Any
) -> tuple[tuple[Term, ...], list[str] | None, Int[Tensor, " r"], str]:
    """The terms of every row, names, places in the query dataset, and a description."""
    count = len(source)
    if against is None and aggregate is None:
        places = torch.arange(count) if source.positions is None else source.positions
        return (Term(source, Combination.each(count)),), None, places, ""
    if against is None:
        together = aggregate_of(aggregate, count)
        aggregated = (Term(source, together.combination),)
        return aggregated, list(together.names), _no_places(together), together.description
    if isinstance(aggregate, str) and aggregate == "mean":
        # The mean over pairs is the difference of two means, which also has a meaning without pairs.
        first, second = aggregate_of("mean", count), aggregate_of("mean", len(against))
        name = f"mean over {count:,} queries less the mean over {len(against):,} that they are contrasted with"
        terms = _contrasted(source, first.combination, against, second.combination)
        return terms, [name], _no_places(first), f"the row is the {name}, solved as one right-hand side"
    left, right = _pairs(source, against)
    if aggregate is not None:
        together = aggregate_of(aggregate, left.size)
        terms = _contrasted(source, together.combination.after(left), against, together.combination.after(right))
        description = f"each query is taken less the one that it is contrasted with; {together.description}"
        return terms, list(together.names), _no_places(together), description
    places = (torch.arange(count) if source.positions is None else source.positions)[left.queries]
    names = [
        f"query {a} rather than contrast {b}" for a, b in zip(places.tolist(), right.queries.tolist(), strict=True)
    ]
    return _contrasted(source, left, against, right), names, places, CONTRASTED


def _pairs(source: Source, against: Source) -> tuple[Combination, Combination]:
    """Pairs of queries and what they are contrasted with: one of either goes with all of the other."""
    a, b = len(source), len(against)
    if a != b and 1 not in (a, b):
        raise InvalidInput(
            f"There are {a:,} queries and {b:,} examples in contrast=; give as many, or one of the two alone, or take "
            "the means of both with aggregate='mean'."
        )
    size = max(a, b)
    left, right = (torch.arange(size) % n for n in (a, b))
    return Combination.picked(left, a), Combination.picked(right, b)


def _contrasted(a: Source, left: Combination, b: Source, right: Combination) -> tuple[Term, ...]:
    return Term(a, left), Term(b, right.scaled(-1.0), "contrast")


def _no_places(together: Aggregate) -> Int[Tensor, " r"]:
    return torch.full((len(together.names),), MEAN)


def resolve_measure(problem: Problem, trained: AbstractObjective, measure: Any, source: Source) -> AbstractObjective:
    """What is measured on a query, as an objective; `None` is the training objective."""
    if measure is None:
        return trained
    with of_measure():
        objective = as_objective(measure)
    if isinstance(problem.model, ModelAndLoss) and measure is problem.model.trained.module:
        return trained
    if getattr(objective, "reads_logits", False) and getattr(trained, "from_probabilities", False):
        raise InvalidInput(
            f"{objective!r} reads logits and the model gives probabilities (from_probabilities=True); write the "
            "log-odds as measure=ptif.FromFunction(lambda p, y: p.gather(1, y[:, None])[:, 0].logit(), "
            "lower_is_better=False), or for one yes or no with (2 * y - 1) * p.flatten().logit()."
        )
    if isinstance(objective, FromFunction):
        ids = torch.arange(min(2, len(source)))
        with in_queries(), first_batch(problem, source, ids) as (_, batch), torch.no_grad():
            outputs = objective.look(problem.model, batch, len(ids))
        with of_measure():
            objective = objective.resolved_on(outputs, batch)
    return objective
