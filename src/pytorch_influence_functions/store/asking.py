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
from ..influence.checks import in_queries
from ..objectives.base import AbstractObjective
from ..objectives.bernoulli import Bernoulli
from ..objectives.likelihoods import CrossEntropy, SquaredError, TokenCrossEntropy
from ..problem.problem import Problem, check_model
from ..problem.working_precision import in_working_precision
from .build import LOSS, PARAMETERS, check_model_is_same, describe_parameters
from .folder import IndexFolder

_KNOWN_LOSSES: Final = (CrossEntropy(), SquaredError(), Bernoulli(), TokenCrossEntropy())


@final
@dataclass(frozen=True, eq=False)
class Asker:
    """The model, its loss, and the training data where they are known.

    Args:
        model: the model.
        loss: its training loss.
        train: the training data; None: not given.
        problem: all of it, where that was given.
        facts: what the index says of parameters and weight decay.
    """

    model: nn.Module
    loss: Any
    train: Any
    problem: Problem | None
    facts: Mapping[str, Any] = field(default_factory=dict)
    _known: dict[str, Derivatives] = field(default_factory=dict)

    @staticmethod
    def of(problem: Problem) -> Asker:
        """Of a whole problem."""
        return Asker(problem.model, problem.objective, problem.data, problem)

    @staticmethod
    def at_open(opened: IndexFolder, model: Any, loss: Any, train: Any) -> Asker:
        """Of what was given to `Index.open`.

        Raises:
            InvalidInput: it is another model, or the loss is not known.
        """
        manifest, where = opened.manifest, os.fspath(opened.path)
        if isinstance(model, Problem):
            if loss is not None or train is not None:
                raise InvalidInput("The problem has its loss and its data; leave loss= and train= out.")
            check_model_is_same(manifest, model, where)
            return Asker.of(model)
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
        return Asker(model, loss, train, None if train is None else problem, manifest.facts)

    def derivatives(self, queries: Any, where: str, fingerprint: Fingerprint) -> Derivatives:
        """How gradients are taken, not projected; looked at once, on the training data or else on the queries.

        Raises:
            InvalidInput: loss or parameters are not those of the index.
        """
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


def _problem(model: nn.Module, loss: Any, data: Any, facts: Mapping[str, Any]) -> Problem:
    return Problem(model, loss, data, parameters=list(facts["parameters"]), weight_decay=facts["weight_decay"])
