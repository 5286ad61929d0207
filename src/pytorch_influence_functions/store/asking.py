"""How the gradients of queries are taken: by the model that the index was built from, with or without training data."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Final, final

import torch
from torch import nn

from ..core.errors import InvalidInput
from ..core.fingerprint import Fingerprint
from ..curvature.base import Budget
from ..gradients.per_example import Derivatives
from ..influence.attribution import Attribution, Influence
from ..influence.checks import in_queries
from ..methods.names import METHODS, as_method
from ..objectives.base import AbstractObjective
from ..objectives.bernoulli import Bernoulli
from ..objectives.likelihoods import CrossEntropy, SquaredError
from ..objectives.tokens import TokenCrossEntropy
from ..problem.data import Source
from ..problem.fitted_weights import FittedWeights
from ..problem.problem import Problem, check_model
from ..problem.working_precision import in_working_precision
from .build import LOSS, METHOD, PARAMETERS, check_model_is_same, describe_parameters
from .folder import IndexFolder
from .same_data import check_data

_BUILD: Final = "build another index"
_KNOWN_LOSSES: Final = (
    CrossEntropy(),
    SquaredError(),
    SquaredError(average=True, half=False),
    Bernoulli(),
    Bernoulli(average=True),
    *(TokenCrossEntropy(average=average, shift=shift) for average in (True, False) for shift in (False, True)),
)


@final
@dataclass(frozen=True, eq=False)
class Asker:
    """The model, its loss, and the training data where they are known.

    Args:
        model: the model.
        loss: its training loss.
        train: the examples of the index, by which its rows are named; None: not given.
        problem: all of it, where that was given.
        built_at: the model's weights when the index was built or opened.
        facts: what the index says of parameters and weight decay.
    """

    model: nn.Module
    loss: Any
    train: Source | None
    problem: Problem | None
    built_at: FittedWeights
    facts: Mapping[str, Any] = field(default_factory=dict)
    _known: dict[str, Derivatives] = field(default_factory=dict)
    _fitted: dict[str, Attribution] = field(default_factory=dict)

    @staticmethod
    def of(problem: Problem, train: Source | None) -> Asker:
        """Of a whole problem.

        Args:
            problem: model, loss and the data that the curvature is of.
            train: the examples of the index, where they are known.
        """
        return Asker(problem.model, problem.objective, train, problem, FittedWeights.of(problem))

    @staticmethod
    def at_open(opened: IndexFolder, model: Any, loss: Any, train: Any) -> Asker:
        """Of what was given to `Index.open`.

        Raises:
            InvalidInput: it is another model, other data, or the loss is not known.
        """
        manifest, where = opened.manifest, os.fspath(opened.path)
        if isinstance(model, Problem):
            if loss is not None or train is not None:
                raise InvalidInput("The problem has its loss and its data; leave loss= and train= out.")
            check_model_is_same(manifest, model, where)
            return Asker.of(model, model.data if check_data(opened, model.data) else None)
        check_model(model)
        if loss is None:
            loss = known_loss(manifest.fingerprint)
        if loss is None:
            raise InvalidInput(
                f"The index in {where!r} was built with a loss of your own, {manifest.facts['loss']}; give it as loss=."
            )
        # Nothing is read from the data of a problem until it is asked for.
        data = (torch.zeros(2, 1), torch.zeros(2)) if train is None else train
        problem = _problem(model, loss, data, manifest.facts)
        check_model_is_same(manifest, problem, where)
        whole = None if train is None else problem
        rows = None if whole is None or not check_data(opened, whole.data) else whole.data
        return Asker(model, loss, rows, whole, FittedWeights.of(problem), manifest.facts)

    def derivatives(self, queries: Any, where: str, fingerprint: Fingerprint) -> Derivatives:
        """How gradients are taken, not projected; looked at once, on the training data or else on the queries.

        Raises:
            InvalidInput: loss, parameters or weights are not those of the index.
        """
        self.built_at.check(_BUILD)
        if "" not in self._known:
            problem = self.problem
            if problem is None:
                with in_queries():
                    problem = _problem(self.model, self.loss, queries, self.facts)
            problem = in_working_precision(problem, self.facts.get("precision"))
            derivatives = replace(Derivatives.of(problem), memory=Budget().bytes)
            self._check(derivatives, where, fingerprint)
            self._known[""] = derivatives
        return self._known[""]

    def attribution(self, by: Any, damping: Any, fingerprint: Fingerprint, count: int) -> Attribution:
        """A method fitted on the training data, whose gradients are not projected; fitted once.

        Args:
            by: the method; None: the one that the index was built with.
            damping: in place of the method's own; None: that.
            fingerprint: of the index.
            count: how many examples the index holds.

        Raises:
            InvalidInput: there are no training data, or others; the weights have changed; or the index's method is not
                known by name.
        """
        self.built_at.check(_BUILD)
        if self.problem is None or self.train is not self.problem.data or len(self.problem) != count:
            held = "none are given" if self.problem is None else f"{len(self.problem):,} others are given"
            raise InvalidInput(
                f"rerank= needs the {count:,} training examples of the index, and {held}; open it with "
                "Index.open(folder, problem), or with train=."
            )
        method = known_method(fingerprint) if by is None else as_method(by)
        if not isinstance(method, Influence):
            given = "the index was built with a method of your own" if method is None else repr(method)
            raise InvalidInput(
                f"rerank= needs an Influence(...) such as method=ptif.ekfac(), and {given}; give method=."
            )
        method = method if damping is None else replace(method, damping=damping)
        key = repr(method)
        if key not in self._fitted:
            self._fitted.clear()
            self._fitted[key] = method.fit(self.problem)
        return self._fitted[key]

    def _check(self, derivatives: Derivatives, where: str, fingerprint: Fingerprint) -> None:
        ingredients = {LOSS: derivatives.objective, PARAMETERS: describe_parameters(derivatives)}
        changed = Fingerprint.of(ingredients).differences(fingerprint, among=(LOSS, PARAMETERS))
        if changed:
            raise InvalidInput(
                f"The index in {where!r} was built with another {' and other '.join(changed)}; give the same, or build "
                "another index."
            )


def known_loss(fingerprint: Fingerprint) -> AbstractObjective | None:
    """The library's own loss that an index was built with; None for any other."""
    digest = fingerprint.digests[LOSS]
    return next((loss for loss in _KNOWN_LOSSES if Fingerprint.of({LOSS: loss}).digests[LOSS] == digest), None)


def known_method(fingerprint: Fingerprint) -> Influence | None:
    """The method that an index was built with, where it is one of those that have a name; None for any other."""
    digest = fingerprint.digests[METHOD]
    named = (replace(make(), memory=Budget()) for make in METHODS.values())
    return next((m for m in named if Fingerprint.of({METHOD: m}).digests[METHOD] == digest), None)


def _problem(model: nn.Module, loss: Any, data: Any, facts: Mapping[str, Any]) -> Problem:
    columns = {place: tuple(names) for place, names in facts.get("columns", {}).items()}
    source = Source.of(data, columns=columns)
    source = replace(source, columns=columns or source.columns)
    return Problem(model, loss, source, parameters=list(facts["parameters"]), weight_decay=facts["weight_decay"])
