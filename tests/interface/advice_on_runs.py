"""Advice in error messages, third part: the rows of edits, runs and their checkpoints, trainings and their tables."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import pytorch_influence_functions as ptif
from pytorch_influence_functions import actions, evaluation, trajectory
from pytorch_influence_functions.curvature import EKFAC, GGN, EmpiricalFisher, Hessian
from pytorch_influence_functions.damping import Absolute, FromCurve, Relative
from pytorch_influence_functions.gradients import Gaussian
from pytorch_influence_functions.solvers import CG, Spectral, Woodbury
from tests.interface.advice_cases import PAIR, QUERY, Advice, Call, scored
from tests.interface.bad_input_cases import CE, N, R, X, Y, ask, net, single, through

SGD = torch.optim.SGD


def problem_of(model: nn.Module, **settings: Any) -> ptif.Problem:
    return ptif.Problem(model, CE, PAIR, **settings)


# --------------------------------------------------------------------------- edits


def edited(method: Any = "exact", **edit: Any) -> Call:
    return lambda model: ptif.what_if(problem_of(model), method=method, **edit)


def moved(statistic: Callable[..., Any], threshold: float = 0.0, method: Any = "exact", **settings: Any) -> Call:
    def run(model: nn.Module) -> Any:
        return actions.smallest_removal(problem_of(model, **settings), statistic, threshold, most=1, method=method)

    return run


def first_weight(model: nn.Module) -> Tensor:
    return next(model.parameters())[0, 0]


def finder() -> actions.LabelIssueFinder:
    return actions.LabelIssueFinder(evaluation.Recipe(net, epochs=1))


def flipped_number(ask_about: Callable[[ptif.Problem], Any]) -> Call:
    return lambda model: ask_about(ptif.Problem(model, nn.MSELoss(), (X, R)))


def forecast_of_first(model: nn.Module) -> Tensor:
    return model(X[:1]).sum()  # type: ignore[no-any-return]


def edits() -> list[Advice]:
    gone = {0: X[0], 1: X[1]}
    of_mappings = [{"x": x, "labels": y} for x, y in zip(X, Y, strict=True)]

    def keyed(new: Any) -> Call:
        class Keyed(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.net = net()

            def forward(self, x: Tensor) -> Any:
                return self.net(x)

        def run(_: nn.Module) -> Any:
            return ptif.what_if(ptif.Problem(Keyed(), CE, of_mappings), replace={0: new}, method="exact")

        return run

    def of_checkpoints(use: Callable[[Any], Any], **settings: Any) -> Call:
        def run(model: nn.Module) -> Any:
            return use(ptif.what_if(problem_of(model, **settings), remove=[0], method="exact"))

        return run

    two = {"checkpoints": [net().state_dict(), net().state_dict()]}
    return [
        Advice("nothing", edited(), "give remove=, relabel=, replace=, add= or reweight=", (edited(remove=[0]),)),
        Advice("twice", edited(remove=[1, 1]), "give each once", (edited(remove=[1]),)),
        Advice("everything", edited(remove=range(N)), "leave some in", (edited(remove=range(N - 1)),)),
        Advice(
            "short mask",
            edited(remove=torch.tensor([True])),
            "give one bool for each, or indices",
            (edited(remove=torch.arange(N) == 3), edited(remove=[3])),
        ),
        Advice(
            "inputs of a pair",
            edited(replace={0: (X[0], X[1])}),
            "replace= takes the new inputs alone",
            (edited(replace={0: (X[0],)}), edited(replace=gone)),
        ),
        Advice("a batch axis", edited(replace={0: X[:1]}), "without a batch axis", (edited(replace={0: X[0]}),)),
        Advice(
            "inputs of a mapping",
            keyed(X[1]),
            "give its new inputs as a mapping of those that change",
            (keyed({"x": X[1]}),),
        ),
        Advice(
            "no solve",
            edited(ptif.methods.RepresenterPoints(), remove=[0]),
            "give an Influence such as method='exact', 'dual' or 'ekfac'",
            (edited("exact", remove=[0]), edited("dual", remove=[0]), edited("ekfac", remove=[0])),
        ),
        Advice(
            "fitted and method",
            lambda model: ptif.what_if(ptif.ekfac().fit(problem_of(model)), remove=[0], method="exact"),
            "give the problem, or leave method= out",
            (
                lambda model: ptif.what_if(ptif.ekfac().fit(problem_of(model)), remove=[0]),
                edited("exact", remove=[0]),
            ),
        ),
        Advice(
            "several models",
            of_checkpoints(lambda prediction: prediction.model(), **two),
            "leave checkpoints= out to edit one",
            (of_checkpoints(lambda prediction: prediction.model()),),
        ),
        Advice(
            "at the threshold",
            lambda model: moved(first_weight, first_weight(model).item())(model),
            "give another threshold",
            (lambda model: moved(first_weight, first_weight(model).item() - 1e-3)(model),),
        ),
        Advice(
            "a number",
            moved(lambda model: first_weight(model).detach()),
            "write it with tensors, without .item",
            (moved(first_weight),),
        ),
        Advice(
            "several steps",
            moved(first_weight, **two),
            "give an Influence such as method='exact', and a problem without checkpoints",
            (moved(first_weight),),
        ),
        Advice(
            "one output",
            flipped_number(lambda problem: actions.flip_prediction(problem, (X[:1], R[:1]), most=1)),
            r"use smallest_removal\(\) with a statistic of your own",
            (flipped_number(lambda problem: actions.smallest_removal(problem, forecast_of_first, 0.0, most=1)),),
            single,
        ),
        Advice(
            "unfitted finder",
            lambda model: finder().ranked_label_issues_,
            "call fit",
            (lambda model: finder().fit(X, Y).ranked_label_issues_,),
        ),
    ]


# --------------------------------------------------------------------------- the training run


def trained(use: Callable[..., Any], length: int | None = None, **settings: Any) -> Call:
    """A short recorded training, and what is done with its recording."""

    def run(model: nn.Module) -> Any:
        optimizer = SGD(model.parameters(), lr=0.1)
        with tempfile.TemporaryDirectory() as folder:
            with ptif.Recorder(model, optimizer, Path(folder) / "run", steps=length, **settings):
                for _ in range(4):
                    optimizer.zero_grad()
                    F.cross_entropy(model(X), Y).backward()
                    optimizer.step()
            return use(model, ptif.Recording.open(Path(folder) / "run"))

    return run


def nothing(model: nn.Module, recording: Any) -> None:
    return None


def foreign(model: nn.Module) -> Any:
    with tempfile.TemporaryDirectory() as folder, ptif.Recorder(model, SGD(net().parameters(), lr=0.1), folder):
        return None


def states(count: int = 2) -> list[dict[str, Tensor]]:
    return [net().state_dict() for _ in range(count)]


def along(run: Callable[[], Any], **settings: Any) -> Call:
    return lambda model: ask(model, run=run(), method="ekfac", **settings)


def adam_state(optimiser: Any, stepped: bool = True) -> Call:
    def run(model: nn.Module) -> Any:
        optimizer = optimiser(model.parameters(), lr=0.1)
        if stepped:
            F.cross_entropy(model(X), Y).backward()
            optimizer.step()
        return trajectory.AdamState.of(optimizer, model)

    return run


def of_segments(**settings: Any) -> Call:
    parts = {"checkpoints": states(1), "lr": 0.1, "steps": 3} | settings
    return lambda model: ask(model, method=trajectory.SOURCE(trajectory.Segment(**parts), curvature=GGN()))


def runs() -> list[Advice]:
    of = ptif.Recording.of
    adam = torch.optim.Adam
    return [
        Advice(
            "unknown length",
            trained(nothing, at=(0.5, 1.0)),
            "give steps= too, or leave at= out",
            (trained(nothing, at=(0.5, 1.0), length=4), trained(nothing)),
        ),
        Advice("no share", trained(nothing, at=(), length=4), "such as 1.0", (trained(nothing, at=(1.0,), length=4),)),
        Advice("another's optimiser", foreign, "pass the optimiser that trains it", (trained(nothing),)),
        Advice(
            "no room",
            trained(nothing, most_bytes=10, length=4),
            "give more room, fewer shares at=",
            (trained(nothing, most_bytes="1MB", length=4),),
        ),
        Advice(
            "a loss without weights",
            trained(nothing, loss=F.cross_entropy),
            "leave it out for any other loss",
            (trained(nothing),),
        ),
        Advice(
            "no share of a recording",
            trained(lambda model, recording: recording.at(())),
            "such as 1.0",
            (trained(lambda model, recording: recording.at((1.0,))),),
        ),
        Advice("no checkpoint", along(list), "give at least one state dict or path", (along(states),)),
        Advice(
            "no run",
            along(lambda: "nowhere"),
            "give the folder that a Recorder",
            (trained(lambda m, r: along(lambda: r)(m)),),
        ),
        Advice(
            "two steps for one",
            along(lambda: of(states(1), steps=[1, 2])),
            "give one each per checkpoint",
            (along(lambda: of(states(2), steps=[1, 2])),),
        ),
        Advice(
            "backwards",
            along(lambda: of(states(2), steps=[2, 1])),
            "give checkpoints in the order of training",
            (along(lambda: of(states(2), steps=[1, 2])),),
        ),
        Advice(
            "checkpoints twice",
            along(states, checkpoints=states()),
            "leave checkpoints= out|give one",
            (along(states),),
        ),
        Advice(
            "not Adam",
            adam_state(SGD),
            "pass the state of the optimiser that trained the model",
            (adam_state(adam),),
        ),
        Advice(
            "Adam's module",
            lambda model: trajectory.AdamState.of(model, model),
            "pass the Adam or AdamW that trained the model",
            (adam_state(adam), adam_state(torch.optim.AdamW)),
        ),
        Advice(
            "an optimiser for a state",
            lambda model: of_segments(adam=adam(model.parameters()))(model),
            r"write AdamState.of\(optimizer, model\)",
            (lambda model: of_segments(adam=adam_state(adam)(model))(model),),
        ),
        Advice(
            "checkpoints of SOURCE",
            lambda model: ask(
                model, method=trajectory.SOURCE(trajectory.Segment(states(1), 0.1, 3)), checkpoints=states(1)
            ),
            "leave checkpoints= out",
            (of_segments(),),
        ),
    ]


# --------------------------------------------------------------------------- numbers that do not suit the method


def unmoved() -> nn.Module:
    """Outputs that no weight moves: the curvature is zero."""
    return through(lambda f: f * 0)()


def numbers() -> list[Advice]:
    data, flat = {"loss": CE, "data": PAIR}, QUERY
    return [
        Advice(
            "another precision",
            lambda model: ask(model, precision="fp8"),
            "write precision='bf16' .*or leave it out",
            (lambda model: ask(model, precision="bf16", method="ekfac"), ask),
        ),
        Advice(
            "two digits of second derivatives",
            scored(curvature=Hessian(), solver=CG(), precision="bf16", damping=Relative(10)),
            r"leave it out, or use GGN\(\) or EKFAC\(\)",
            (
                scored(curvature=Hessian(), solver=CG(), damping=Relative(100)),
                scored(curvature=GGN(), solver=CG(), precision="bf16", damping=Relative(10)),
                scored(curvature=EKFAC(), solver=Spectral(), precision="bf16"),
            ),
        ),
        Advice(
            "projected to more",
            scored(curvature=EmpiricalFisher(), solver=Woodbury(), projection=Gaussian(10_000)),
            "leave the projection out",
            (scored(curvature=EmpiricalFisher(), solver=Woodbury()),),
        ),
        Advice(
            "weights of units",
            scored({"checkpoints": states()}, weights=(1.0, 2.0), units="spread"),
            "leave one of the two out",
            (
                scored({"checkpoints": states()}, weights=(1.0, 2.0)),
                scored({"checkpoints": states()}, units="spread"),
            ),
        ),
        Advice(
            "lambdas of a flat loss",
            scored(data, flat, curvature=GGN(), solver=Spectral(), damping=FromCurve()),
            r"give FromCurve\(lambdas=\) numbers to try",
            (scored(data, flat, curvature=GGN(), solver=Spectral(), damping=FromCurve(lambdas=(0.1, 1.0))),),
            unmoved,
        ),
        Advice(
            "a share of a flat loss",
            scored(data, flat, curvature=GGN(), solver=Spectral()),
            r"use Absolute\(value\)",
            (scored(data, flat, curvature=GGN(), solver=Spectral(), damping=Absolute(1.0)),),
            unmoved,
        ),
    ]


# --------------------------------------------------------------------------- trainings, and tables of them


def retrained(measure: Any = None, subsets: Any = None, recipe: Any = None, **settings: Any) -> Any:
    recipe = recipe or evaluation.Recipe(net, epochs=1, loss=CE)
    whole = subsets or evaluation.Subsets.groups(N, [[0], [1, 2], [3]])
    return evaluation.retrain(recipe, whole, 1, train=PAIR, queries=QUERY, measure=measure, **settings)


def own_training(data: Any, seed: int) -> nn.Module:
    return net()


def trainings() -> list[Advice]:
    groups, relabelled = evaluation.Subsets.groups, evaluation.Subsets.relabelled
    return [
        Advice(
            "no measure",
            lambda model: retrained(recipe=own_training),
            r"pass measure=, e.g. torch.nn.CrossEntropyLoss\(\)",
            (lambda model: retrained(recipe=own_training, measure=torch.nn.CrossEntropyLoss()),),
        ),
        Advice("empty group", lambda model: groups(N, [[]]), "at least one index", (lambda model: groups(N, [[1]]),)),
        Advice("no group", lambda model: groups(N, []), "at least one list", (lambda model: groups(N, [[1]]),)),
        Advice(
            "all of them",
            lambda model: groups(N, [range(N)]),  # type: ignore[list-item]
            "give a smaller one",
            (lambda model: groups(N, [range(N - 1)]),),  # type: ignore[list-item]
        ),
        Advice(
            "no new label",
            lambda model: relabelled(N, []),
            r"at least one \{index: label\}",
            (lambda model: relabelled(N, [{0: 1}]),),
        ),
        Advice(
            "a label of another kind",
            lambda model: retrained(subsets=relabelled(N, [{0: "cat"}])),
            "give one like the dataset's",
            (lambda model: retrained(subsets=relabelled(N, [{0: 1}])),),
        ),
        Advice(
            "no method to judge",
            lambda model: evaluation.evaluate({}, retrained()),
            "give scores, or methods with problem= and queries=",
            (
                lambda model: evaluation.evaluate({"x": ask(model)}, retrained()),
                lambda model: evaluation.evaluate(
                    {"x": ptif.ekfac()}, retrained(), problem=problem_of(model), queries=QUERY
                ),
            ),
        ),
        Advice(
            "nothing to score",
            lambda model: evaluation.evaluate({"x": ptif.ekfac()}, retrained()),
            "pass problem= and queries=, or its scores",
            (
                lambda model: evaluation.evaluate({"x": ask(model)}, retrained()),
                lambda model: evaluation.evaluate(
                    {"x": ptif.ekfac()}, retrained(), problem=problem_of(model), queries=QUERY
                ),
            ),
        ),
        Advice(
            "another measure",
            lambda model: evaluation.removal_correlation(ask(model, measure=ptif.Margin()), retrained(measure=CE)),
            "pass the same measure= to both",
            (
                lambda model: evaluation.removal_correlation(ask(model), retrained(measure=CE)),
                lambda model: evaluation.removal_correlation(
                    ask(model, measure=ptif.Margin()), retrained(measure=ptif.Margin())
                ),
            ),
        ),
    ]
