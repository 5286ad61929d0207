"""Advice in error messages, first half: the rows of methods, their parts, curvature and damping, and their makers."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

from torch import nn

import pytorch_influence_functions as ptif
from pytorch_influence_functions.curvature import (
    EKFAC,
    GGN,
    Arnoldi,
    Diagonal,
    EmpiricalFisher,
    Fisher,
    Hessian,
    Nystrom,
    Subsample,
)
from pytorch_influence_functions.damping import FromCurve, FromTraining, Relative
from pytorch_influence_functions.gradients import Gaussian
from pytorch_influence_functions.scaling import Leverage
from pytorch_influence_functions.solvers import (
    CG,
    Auto,
    BlockGroup,
    Blockwise,
    Cholesky,
    Spectral,
    Truncation,
    Woodbury,
)
from tests.interface.bad_input_cases import (
    CE,
    X,
    Y,
    ask,
    costs,
    net,
    put_in,
    single,
)

Call = Callable[[Any], Any]
PAIR, QUERY = (X, Y), (X[:2], Y[:2])


def scored(problem: dict[str, Any] | None = None, queries: Any = QUERY, **parts: Any) -> Call:
    """`Influence` of these parts, fitted and asked."""
    options = {"loss": CE, "data": PAIR} | (problem or {})

    def run(model: nn.Module) -> Any:
        given = {k: v for k, v in options.items() if k not in ("loss", "data")}
        whole = ptif.Problem(model, options["loss"], options["data"], **given)
        return ptif.Influence(**parts).fit(whole).score(queries)

    return run


def decayed(**strength: Any) -> dict[str, Any]:
    return {"weight_decay": ptif.WeightDecay(0.1, **strength)}


def asked_of_fitted(use: Callable[[Any], Any], **parts: Any) -> Call:
    return lambda model: use(ptif.Influence(**parts).fit(ptif.Problem(model, CE, PAIR)))


def probabilities() -> nn.Module:
    return nn.Sequential(net(), nn.Softmax(1))


def sigmoid() -> nn.Module:
    return nn.Sequential(single(), nn.Sigmoid())


OF_PROBABILITIES = partial(ask, loss=ptif.CrossEntropy(from_probabilities=True), method="exact")
LOGIT = ptif.FromFunction(lambda p, y: p.gather(1, y[:, None])[:, 0].logit(), lower_is_better=False)


class Advice(NamedTuple):
    name: str
    refused: Call
    says: str
    follow: tuple[Call, ...]
    model: Callable[[], Any] = net


def methods() -> list[Advice]:
    return [
        Advice("dry_run=", put_in(dry_run=True), r"write ptif.forecast\(model, train, queries, \.\.\.\)", (costs(),)),
        Advice("misspelt", put_in(dampng=0.1), r"Did you mean 'damping'", (put_in(damping=0.1),)),
        Advice(
            "a name alone",
            put_in(method="one_step_newton"),
            r"write ptif.methods.one_step_newton\(\w+=\.\.\.\)",
            (put_in(method=ptif.methods.one_step_newton(0.1)),),
        ),
        Advice(
            "not called",
            put_in(method=ptif.tracin),
            r"write method=tracin\(learning_rates=\.\.\.\)",
            (put_in(method=ptif.tracin(learning_rates=[0.1])),),
        ),
        Advice(
            "a solver",
            put_in(method=CG()),
            r"write method=ptif.Influence\(ptif.curvature.GGN\(\), solver=CG\(\.\.\.\)\)",
            (put_in(method=ptif.Influence(ptif.curvature.GGN(), solver=CG())),),
        ),
        Advice(
            "a damping", put_in(method=Relative(0.1)), r"write damping=Relative\(", (put_in(damping=Relative(0.1)),)
        ),
        Advice(
            "a scaling",
            put_in(method=Leverage()),
            r"write method=ptif.Influence\(scaling=Leverage\(",
            (put_in(method=ptif.Influence(scaling=Leverage())),),
        ),
        Advice(
            "fitted",
            asked_of_fitted(lambda fitted: ask(fitted.problem.model, method=fitted)),
            r"call its score\(queries\)",
            (asked_of_fitted(lambda fitted: fitted.score(QUERY)),),
        ),
        Advice(
            "no method",
            put_in(method=3),
            r"such as ptif.ekfac\(\), a name such as 'ekfac', or a curvature such as",
            (put_in(method=ptif.ekfac()), put_in(method="ekfac"), put_in(method=GGN()), put_in()),
        ),
        Advice(
            "no decay of the head",
            put_in(method=ptif.methods.RepresenterPoints()),
            r"give .* as weight_decay=",
            (put_in(method=ptif.methods.RepresenterPoints(), weight_decay=0.1),),
        ),
        Advice(
            "decay of examples",
            put_in(method=ptif.methods.RepresenterPoints(), weight_decay=ptif.WeightDecay(0.1, per_example=True)),
            r"use WeightDecay\(strength, per_example=False\)",
            (put_in(method=ptif.methods.RepresenterPoints(), **decayed(per_example=False)),),
        ),
        Advice(
            "no linear head",
            put_in(method=ptif.methods.RepresenterPoints(), weight_decay=0.1),
            r"use another method, such as ptif.ekfac\(\)",
            (put_in(method=ptif.ekfac()),),
            lambda: nn.Sequential(net(), nn.Tanh()),
        ),
    ]


def influence() -> list[Advice]:
    forward = {"curvature": GGN(), "solver": CG(), "route": "forward"}
    tokens = asked_of_fitted(lambda fitted: fitted.token_scores(QUERY, [0]), curvature=GGN())
    return [
        Advice(
            "a solver alone",
            scored(solver=CG()),
            r"add curvature=GGN\(\), Hessian\(\) or EmpiricalFisher\(\), or leave",
            (
                scored(curvature=GGN(), solver=CG()),
                scored(curvature=Hessian(), solver=CG(), damping=5.0),
                scored(curvature=EmpiricalFisher(), solver=CG()),
                scored(solver=Auto()),
            ),
        ),
        Advice(
            "projected and iterated",
            scored(curvature=GGN(), solver=CG(), projection=Gaussian(8)),
            r"use EmpiricalFisher\(\), GGN\(\) or Fisher\(\) with Spectral\(\), Cholesky\(\) or Woodbury\(\), or leave",
            tuple(
                scored(curvature=c, solver=s, projection=Gaussian(8))
                for c in (EmpiricalFisher(), GGN(), Fisher(samples=1))
                for s in (Spectral(), Cholesky(), Woodbury())
            ),
        ),
        Advice(
            "projected and forward",
            scored(curvature=GGN(), solver=Spectral(), projection=Gaussian(8), route="forward"),
            r"leave the route to 'auto'",
            (scored(curvature=GGN(), solver=Spectral(), projection=Gaussian(8), route="auto"),),
        ),
        Advice(
            "projected decay",
            scored(decayed(per_example=True), curvature=GGN(), solver=Woodbury(), projection=Gaussian(8)),
            r"use WeightDecay\(strength, per_example=False\)",
            (scored(decayed(per_example=False), curvature=GGN(), solver=Woodbury(), projection=Gaussian(8)),),
        ),
        Advice(
            "truncated and forward",
            scored(**forward, truncation=Truncation(rank=2)),
            r"leave one of the two out",
            (scored(**forward), scored(curvature=GGN(), solver=CG(), truncation=Truncation(rank=2))),
        ),
        Advice(
            "truncated dual",
            scored(curvature=GGN(), solver=Woodbury(), truncation=Truncation(rank=2)),
            r"leave it out, or use another solver",
            (
                scored(curvature=GGN(), solver=Woodbury()),
                scored(curvature=GGN(), solver=Spectral(), truncation=Truncation(rank=2)),
            ),
        ),
        Advice(
            "weights of checkpoints",
            scored(curvature=GGN(), weights=(0.1, 0.2)),
            r"give 1 weight",
            (scored(curvature=GGN(), weights=(0.1,)),),
        ),
        Advice(
            "fit of data",
            lambda model: ptif.dual().fit(PAIR),
            r"write Problem\(model, loss, train\), or call ptif.attr",
            (scored(curvature=GGN()), put_in()),
        ),
        Advice("tokens of a class", tokens, r"use score\(\)", (scored(curvature=GGN()),)),
        Advice(
            "no forecast",
            lambda m: ptif.methods.Random().forecast(ptif.Problem(m, CE, PAIR)),
            r"call attribute\(\), or fit",
            (put_in(method=ptif.methods.Random()),),
        ),
        Advice(
            "no damping",
            put_in(method=ptif.methods.Random(), damping=0.1),
            r"takes no damping=; leave it out",
            (put_in(method=ptif.methods.Random()),),
        ),
        Advice(
            "margin of probabilities",
            lambda m: OF_PROBABILITIES(m, measure=ptif.Margin()),
            r"FromFunction\(lambda p, y: p.gather\(1, y\[:, None\]\)\[:, 0\].logit\(\), lower_is_better=False\)",
            (lambda m: OF_PROBABILITIES(m, measure=LOGIT),),
            probabilities,
        ),
        Advice(
            "rows and forward",
            scored(**forward, scaling=Leverage()),
            r"leave the route to 'auto'",
            (scored(curvature=GGN(), solver=CG(), scaling=Leverage()),),
        ),
        Advice(
            "a class",
            scored(curvature=GGN),
            r"write GGN\(\), an instance",
            (scored(curvature=GGN()),),
        ),
        Advice(
            "one damping",
            asked_of_fitted(lambda f: f.scores_over_damping(QUERY, 0.1), curvature=GGN()),
            r"numbers such as \[0.01, 0.1\]",
            (asked_of_fitted(lambda f: f.scores_over_damping(QUERY, [0.01, 0.1]), curvature=GGN()),),
        ),
        Advice(
            "one example",
            put_in(train=(X[:1], Y[:1])),
            r"give the whole training set",
            (put_in(),),
        ),
    ]


def curvature() -> list[Advice]:
    return [
        Advice(
            "memory",
            scored(memory="much"),
            r"such as 2_000_000_000, or '2GB'",
            (scored(memory=2_000_000_000), scored(memory="2GB")),
        ),
        Advice(
            "too large",
            scored(curvature=GGN(), solver=Spectral(), memory=1000),
            r"memory=, such as Influence\(memory='16GB'\)",
            (scored(curvature=GGN(), solver=Spectral(), memory="16GB"),),
        ),
        Advice(
            "Hessian as rows",
            scored(curvature=Hessian(), solver=Woodbury(), damping=5.0),
            r"choose another solver, or Auto\(\)",
            tuple(scored(curvature=Hessian(), solver=s, damping=5.0) for s in (Auto(), CG(), Spectral())),
        ),
        Advice(
            "diagonal of Hessian",
            lambda m: Diagonal(Hessian()),
            r"use GGN\(\), Fisher\(samples=1\) or EmpiricalFisher\(\)",
            tuple(
                scored(curvature=Diagonal(c), solver=Spectral()) for c in (GGN(), Fisher(samples=1), EmpiricalFisher())
            ),
        ),
        Advice(
            "whose gradients",
            lambda m: EKFAC(fisher=Hessian()),
            r"pass GGN\(\) .*, Fisher\(samples=1\) .*, or EmpiricalFisher",
            tuple(scored(curvature=EKFAC(fisher=c)) for c in (GGN(), Fisher(samples=1), EmpiricalFisher())),
        ),
        Advice(
            "rank above P",
            scored(curvature=Nystrom(99), solver=Spectral()),
            r"use at most 43, or exact\(\)",
            (scored(curvature=Nystrom(43), solver=Spectral()), put_in(method=ptif.exact())),
        ),
        Advice(
            "indefinite Nystrom",
            lambda m: scored(curvature=Nystrom(3, Hessian()), solver=Spectral())(m),
            r"use GGN\(\), or Arnoldi\(rank, Hessian\(\)\)",
            (
                scored(curvature=Nystrom(3, GGN()), solver=Spectral()),
                scored(curvature=Arnoldi(3, Hessian()), solver=Spectral(), damping=5.0),
            ),
        ),
        Advice(
            "few steps",
            lambda m: scored(curvature=Arnoldi(9, steps=5), solver=Spectral())(m),
            r"use twice the rank, or None",
            (
                scored(curvature=Arnoldi(9, steps=18), solver=Spectral(), damping=5.0),
                scored(curvature=Arnoldi(9, steps=None), solver=Spectral(), damping=5.0),
            ),
        ),
        Advice(
            "a text",
            lambda m: scored(curvature=Arnoldi(3, "ggn"), solver=Spectral())(m),
            r"use GGN\(\) or Hessian\(\)",  # type: ignore[arg-type]
            tuple(scored(curvature=Arnoldi(3, c), solver=Spectral(), damping=5.0) for c in (GGN(), Hessian())),
        ),
        Advice(
            "a class in it",
            lambda m: scored(curvature=Arnoldi(3, GGN), solver=Spectral())(m),
            r"write GGN\(\), an instance",  # type: ignore[arg-type]
            (scored(curvature=Arnoldi(3, GGN()), solver=Spectral(), damping=5.0),),
        ),
        Advice(
            "part of a text",
            lambda m: Subsample("ggn", 8),
            r"takes a curvature such as GGN\(\)",  # type: ignore[arg-type]
            (scored(curvature=Subsample(GGN(), 8)),),
        ),
        Advice(
            "indefinite",
            scored(curvature=Hessian(), solver=Spectral(), damping=1e-6),
            r"GGN\(\) instead of Hessian\(\)",
            (scored(curvature=GGN(), solver=Spectral(), damping=1e-6),),
        ),
    ]


def damping() -> list[Advice]:
    def curve(c: Any, s: Any, **problem: Any) -> Call:
        return scored(problem, curvature=c, solver=s, damping=FromCurve())

    per_example = decayed(per_example=True)
    return [
        Advice(
            "a curve in a group",
            lambda m: scored(curvature=GGN(), solver=Blockwise(groups={"all": BlockGroup("*", damping=FromCurve())}))(
                m
            ),
            r"give a number, Relative\(\) or FromTraining\(\) here",
            tuple(
                scored(curvature=GGN(), solver=Blockwise(groups={"all": BlockGroup("*", damping=d)}))
                for d in (0.1, Relative(0.1), FromTraining(0.1, 100))
            ),
        ),
        Advice(
            "one lambda",
            lambda m: FromCurve(lambdas=[0.1]),
            r"at least two different values",
            (scored(curvature=GGN(), solver=Woodbury(), damping=FromCurve(lambdas=[0.01, 0.1])),),
        ),
        Advice(
            "a number of lambdas",
            lambda m: FromCurve(lambdas=0.1),
            r"numbers such as \[0.01, 0.1\]",
            (scored(curvature=GGN(), solver=Woodbury(), damping=FromCurve(lambdas=[0.01, 0.1])),),
        ),
        Advice(
            "a curve of the Hessian",
            curve(Hessian(), Spectral()),
            r"use GGN\(\) or EmpiricalFisher\(\), or Relative\(\)",
            (
                curve(GGN(), Spectral()),
                curve(EmpiricalFisher(), Spectral()),
                scored(curvature=Hessian(), solver=Spectral(), damping=Relative(50.0)),
            ),
        ),
        Advice(
            "a curve with decay",
            curve(GGN(), Spectral(), **per_example),
            r"give a number or Relative\(\) instead",
            (
                scored(per_example, curvature=GGN(), solver=Spectral(), damping=0.1),
                scored(per_example, curvature=GGN(), solver=Spectral(), damping=Relative()),
            ),
        ),
        Advice(
            "a curve without eigenvalues",
            curve(GGN(), CG()),
            r"use Woodbury\(\) or Spectral\(\) with GGN\(\) or EmpiricalFisher\(\), or Relative\(\)",
            (
                *(curve(c, s) for c in (GGN(), EmpiricalFisher()) for s in (Woodbury(), Spectral())),
                scored(curvature=GGN(), solver=CG(), damping=Relative()),
            ),
        ),
    ]
