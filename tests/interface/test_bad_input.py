"""Bad input gets one clear sentence, through the public door: what was seen, what was expected, what to do."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jaxtyping
import pytest
import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils.data import DataLoader, TensorDataset

import pytorch_influence_functions as ptif
from pytorch_influence_functions import classic
from pytorch_influence_functions.core.errors import InvalidInput, NotLikelihood, SolveFailed, TooLarge
from pytorch_influence_functions.curvature import Fisher
from pytorch_influence_functions.damping import Absolute, FromCurve, Relative
from pytorch_influence_functions.influence.method import AbstractMethod
from pytorch_influence_functions.scaling import Leverage
from pytorch_influence_functions.solvers import CG, Spectral
from tests.interface.bad_input_cases import (
    CE,
    DATA,
    GGN,
    HESSIAN,
    INFINITE,
    INPUT,
    NAMED,
    NAN,
    TYPES_AND_SHAPES,
    C,
    Counter,
    Items,
    N,
    NoForward,
    R,
    Row,
    Through,
    Weighing,
    X,
    Y,
    absolute,
    as_float,
    ask,
    broken,
    costs,
    detached,
    elementwise,
    fitted,
    frozen,
    infinite,
    infinite_for_class_2,
    lazy,
    less_their_mean,
    masking,
    mixing,
    net,
    of_argmax,
    of_batch,
    picture,
    put,
    put_in,
    real,
    single,
    state,
    through,
    weighed,
    with_idle,
)
from tests.interface.curvature_cases import CURVATURES
from tests.interface.run_cases import RUNS


class Remembers(nn.Module):
    """Adds what the call before left."""

    def __init__(self) -> None:
        super().__init__()
        self.net, self.state = net(), torch.zeros(C)

    def forward(self, x: Tensor) -> Tensor:
        outputs: Tensor = self.net(x) + self.state
        self.state = outputs.detach().mean(0)
        return outputs


class Once(torch.autograd.Function):
    """A cube, whose backward pass cannot be differentiated."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, slope: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        cubed: Tensor = 3 * x.square() * slope
        return cubed


MODELS = [
    Row("a function", put_in(), INPUT, r"must be a torch.nn.Module, got function", lambda: lambda x: x),
    Row("a function, no loss", put_in(loss=None), INPUT, r"torch.nn.Module, got function", lambda: lambda x: x),
    Row(
        "a skorch net",
        put_in(),
        INPUT,
        r"must be a torch.nn.Module, got SimpleNamespace; the module that it trained is its .module_",
        lambda: SimpleNamespace(module_=nn.Linear(6, 3)),
    ),
    Row("a class", put_in(), INPUT, r"must be a torch.nn.Module, got the class Linear", lambda: nn.Linear),
    Row(
        "a problem, and what is asked in the second place",
        lambda m: ptif.attribute(ptif.Problem(m, CE, (X, Y)), (X, Y)),
        INPUT,
        r"got a problem, which holds its training data, .*write attribute\(problem, queries=\.\.\.\)",
    ),
    Row(
        "a problem, and nothing is asked",
        lambda m: ptif.attribute(ptif.Problem(m, CE, (X, Y))),
        INPUT,
        r"^In the queries, nothing is asked: pass queries=",
    ),
    Row(
        "keeps state between calls",
        put_in(),
        INPUT,
        r"or keeps state from the call before, .*begin every call with the same state",
        Remembers,
    ),
    Row(
        "a backward that has no derivative",
        put_in(method="koh_liang"),
        INPUT,
        r"second derivatives, .*has none \(a torch\.autograd\.Function of yours is marked @once_differentiable\)",
        through(Once.apply),
    ),
    Row("data first", lambda m: ptif.attribute((X, Y), m, (X, Y)), INPUT, r"got tuple; .*the model before the data"),  # type: ignore[call-overload]
    Row("on meta", put_in(), INPUT, r"lies on the meta device and has no values", lambda: net().to("meta")),
    Row("other device", put_in(device="meta"), INPUT, r"lies on cpu, not on meta; call model.to\('meta'\)"),
    Row("no device", put_in(device="gpuu"), INPUT, r"device='gpuu' is no device; write 'cpu', 'cuda'"),
    Row("frozen", put_in(), INPUT, r"no trainable parameter .*requires_grad_\(True\)", frozen),
    Row("no parameter", put_in(train=(X[:, :3], Y)), INPUT, r"no trainable parameter", nn.Identity),
    Row(
        "NaN weights", put_in(), INFINITE, r"weights hold NaN or infinity in '0.weight'; the training diverged", broken
    ),
    Row("lazy", put_in(), INPUT, r"'0.weight' is not initialised yet \(a lazy module\); run the model once", lazy),
    Row("lazy, no loss", put_in(loss=None), INPUT, r"'0.weight' is not initialised yet", lazy),
    Row("whole numbers", put_in(parameters="seen"), INPUT, r"'seen' is torch.int64; only real floating point", Counter),
    Row("no forward", put_in(), INPUT, r"The model failed on .*; give the model a forward method", NoForward),
    Row(
        "forward raises",
        put_in(),
        INPUT,
        r"failed on inputs of shape .*'Tensor' object has no attribute 'nope'",
        through(lambda f: f.nope),
    ),
    Row(
        "batch norm",
        put_in(),
        INPUT,
        r"not on one alone \(Expected more than 1 value .*\); .*running statistics",
        mixing,
    ),
    Row(
        "mixes examples",
        put_in(),
        INPUT,
        r"changes by .* with the examples beside it",
        through(lambda f: f - f.mean(0)),
    ),
    Row(
        "no example axis",
        put_in(),
        INPUT,
        r"outputs of shape \(\) for 3 examples; the first axis",
        through(lambda f: f.sum()),
    ),
    Row("flat outputs", put_in(), INPUT, r"outputs of shape \(9,\) for 3 examples", through(torch.flatten)),
    Row(
        "whole outputs",
        put_in(),
        INPUT,
        r"outputs of type torch.int64, .*before argmax",
        through(lambda f: f.argmax(1)),
    ),
    Row("no tensor", put_in(), INPUT, r"The model returned NoneType, expected a tensor", through(lambda f: None)),
    Row(
        "no tensor, no loss",
        put_in(loss=None),
        INPUT,
        r"The model returned dict, expected a ten",
        through(lambda f: {"f": f.argmax(1)}),
    ),
    Row(
        "two heads",
        put_in(),
        INPUT,
        r"returned a dict of a \(3, 3\) and b \(3, 3\).*alone or of each of several heads; .*loss_fn\(out\['a'\], y\)",
        through(lambda f: {"a": f, "b": 2 * f}),
    ),
    Row(
        "a tuple, no loss",
        put_in(loss=None),
        INPUT,
        r"returned a tuple of \(12, 3\) and \(12, 3\).*loss_fn\(out\[0\], y\) for the first alone",
        through(lambda f: (f, f)),
    ),
    Row(
        "one number of a batch among outputs",
        put_in(loss=lambda out, y: CE(out["f"], y) + out["balance"]),
        INPUT,
        r"changes by .*an output that is one number for the whole batch.*return one number per example",
        through(lambda f: {"f": f, "balance": f.mean()}),
    ),
    Row(
        "shapes with as many numbers",
        put_in(loss=lambda out, y: out["a"].sum(), train=Items(lambda i: (X[i], Y[i])), batch_size=5),
        INPUT,
        r"6 numbers per example in different shapes .*; pad the batches to one shape",
        through(lambda f: {"a": f.repeat(1, 2).reshape(len(f), *((2, 3) if len(f) % 2 else (3, 2)))}),
    ),
    Row(
        "weights hidden in a loss",
        put_in(loss=weighed),
        INPUT,
        r"loss weighed depends on trainable weights .*\(of shape \(3,\)\).*make the loss a torch.nn.Module.*requires_g",
    ),
    Row(
        "weights hidden in a measure",
        put_in(measure=weighed),
        INPUT,
        r"measure weighed depends on trainable weights .*weight_decay=",
    ),
    Row(
        "a checkpoint without the loss",
        lambda model: ask(model, loss=Weighing(), checkpoints=state(model)),
        INPUT,
        r"^The checkpoint lacks 'loss.weight': the loss Weighing has weights of its own.*loss.state_dict",
    ),
    Row(
        "a collate function that draws",
        put_in(train=DataLoader(TensorDataset(X, Y), collate_fn=masking), deterministic="error"),
        INPUT,
        r"^The collate function gave two different batches .*; store one draw per example in the dataset",
    ),
    Row(
        "a collate function that mixes",
        put_in(train=DataLoader(TensorDataset(X, Y), collate_fn=less_their_mean)),
        INPUT,
        r"changes by .*the collate function or the model lets examples see each other, as a mean over the batch does",
    ),
    Row(
        "detached", put_in(), INPUT, r"no derivative in the parameters 'net.0.weight'.*detaches", through(Tensor.detach)
    ),
    Row(
        "numpy",
        put_in(),
        INPUT,
        r"failed on inputs of shape \(1, 4\) .*Can't call numpy",
        through(lambda f: torch.tensor(f.numpy())),
    ),
    Row("NaN slope", put_in(), INFINITE, r"gradient is NaN .* indices 0, 1, 2", through(lambda f: f + (0 * f).sqrt())),
]

LOSSES = [
    Row("text", put_in(loss="cross_entropy"), INPUT, r"The loss is 'cross_entropy' of type str; expected an objective"),
    Row("class", put_in(loss=nn.CrossEntropyLoss), INPUT, r"the class CrossEntropyLoss; pass an instance"),
    Row("python float", put_in(loss=as_float), INPUT, r"loss returned float, expected a tensor .*\.item\(\)"),
    Row("argmax", put_in(loss=of_argmax), INPUT, r"loss of_argmax has no derivative in the model's outputs"),
    Row("detached", put_in(loss=detached), INPUT, r"loss detached has no derivative in the model's outputs"),
    Row(
        "elementwise", put_in(loss=elementwise), INPUT, r"loss elementwise returned shape \(1, 3\), expected one number"
    ),
    Row("of the batch", put_in(loss=of_batch), INPUT, r"neither the mean nor the sum .*together .*apart"),
    Row(
        "one argument",
        put_in(loss=lambda f: f.sum()),
        INPUT,
        r"failed on outputs of shape \(2, 3\) .*write it as a function of \(outputs",
    ),
    Row("infinite", put_in(loss=infinite), INFINITE, r"loss infinite is NaN or infinite on the first two examples"),
    Row(
        "sometimes",
        put_in(loss=infinite_for_class_2),
        INFINITE,
        r"loss is NaN or infinite at dataset indices 2, 5, 8, 11",
    ),
    Row("wrong kind", put_in(loss=nn.MSELoss()), INPUT, r"for one class number per example use CrossEntropy\(\)"),
    Row("class weights", put_in(loss=nn.CrossEntropyLoss(torch.ones(7))), INPUT, r"7 class weights and 3 classes"),
    Row(
        "unclear",
        real(train=(X, (R > 0).float()), loss=None),
        INPUT,
        r"cannot be told from .*; write loss=torch.nn.BCEW",
        single,
    ),
    Row(
        "unclear shapes",
        put_in(train=(X, torch.ones(N, 2)), loss=None),
        INPUT,
        r"told from outputs \(12, 3\)",
    ),
    Row(
        "margin of numbers",
        real(measure=ptif.Margin()),
        INPUT,
        r"Margin\(\) got soft targets .*for a regression mea",
        single,
    ),
    Row(
        "logit of numbers",
        put_in(measure=ptif.Logit(), queries=(X, X[:, :3])),
        INPUT,
        r"Logit\(\) got targets of shape \(12, 3\)",
    ),
    Row("measure text", put_in(measure="margin"), INPUT, r"The measure is 'margin' of type str"),
    Row("measure class", put_in(measure=ptif.Margin), INPUT, r"The measure is the class Margin; pass an instance"),
    Row("measure float", put_in(measure=as_float), INPUT, r"The measure returned float, expected a tensor"),
    Row("measure argmax", put_in(measure=of_argmax), INPUT, r"The measure of_argmax has no derivative"),
]

METHODS = [
    Row(
        "a projection wider than the model, by name",
        put_in(method="trak"),
        INPUT,
        r"no smaller than the 43 param.* ptif\.methods\.trak\(k=21\)",
    ),
    Row("number", put_in(method=3), INPUT, r"^method= must be a method such as .* got int; leave it out"),
    Row("name", put_in(method="daul"), NAMED, r"^There is no method 'daul'\. Did you mean 'dual'\? The names are"),
    Row("short name", put_in(method="tracin"), INPUT, r"^The method 'tracin' needs learning_rates, which a name"),
    Row("not called", put_in(method=ptif.tracin), INPUT, r"^method=tracin is not called and needs learning"),
    Row("abstract", put_in(method=AbstractMethod), INPUT, r"got the class AbstractMethod; leave it out"),
    Row("a solver", put_in(method=CG()), INPUT, r"^CG is a solver, .*write method=.*GGN\(\), solver=CG\(\.\.\.\)\)\.$"),
    Row("a solver class", put_in(method=CG), INPUT, r"^CG is a solver, one part of a method"),
    Row("a damping", put_in(method=Absolute(0.1)), INPUT, r"^Absolute is a damping, .*write damping=Absolute\("),
    Row("a scaling", put_in(method=Leverage()), INPUT, r"^Leverage is a scaling, .*write .*scaling=Leverage\("),
    Row(
        "solver text",
        lambda m: fitted(m, solver="cg"),
        INPUT,
        r"solver= must be a solver such as CG\(\).*got 'cg' of type str",
    ),
    Row(
        "a method as curvature",
        lambda m: fitted(m, curvature=ptif.ekfac()),
        INPUT,
        r"curvature= got Influence\(curvature=EKFAC.*which is a whole method; pass it as method=",
    ),
    Row("solver class", lambda m: fitted(m, solver=CG), INPUT, r"solver= is the class CG; write CG\(\)"),
    Row(
        "curvature class",
        lambda m: fitted(m, curvature=ptif.curvature.GGN),
        INPUT,
        r"curvature= is the class GGN; write GGN\(\)",
    ),
    Row(
        "scaling text",
        lambda m: fitted(m, scaling="leverage"),
        INPUT,
        r"scaling= must be Raw\(\) or Leverage\(\), got 'lev",
    ),
    Row("memory 0", lambda m: fitted(m, memory=0), INPUT, r"^memory=0 is no amount of memory; give bytes such as"),
    Row("memory text", lambda m: fitted(m, memory="all"), INPUT, r"^memory='all' is no amount of memory; .*or '2GB'"),
    Row(
        "over the bound",
        lambda m: fitted(m, curvature=GGN, solver=Spectral(), memory=100),
        TooLarge,
        r"would take .* GiB and the bound is .*use CG\(\)",
    ),
    Row(
        "no curvature",
        lambda m: fitted(m, solver=CG()),
        INPUT,
        r"does not say which curvature .*add curvature=GGN\(\)",
    ),
    Row("no rows", put_in(method=ptif.dual(HESSIAN)), INPUT, r"^Hessian\(\) cannot be given as rows G.*another solver"),
    Row(
        "unasked help",
        lambda m: fitted(m, curvature=GGN, solver=Spectral(), preconditioner=GGN),
        INPUT,
        r"has no use for a preconditioner; drop it",
    ),
    Row(
        "GGN of a function",
        put_in(loss=absolute, method=ptif.exact()),
        NotLikelihood,
        r"^absolute has no curvature .* is 0 at all .*; use the empirical Fisher",
    ),
    Row(
        "Fisher of a function",
        put_in(loss=absolute, method=ptif.exact(Fisher(samples=2))),
        NotLikelihood,
        r"^absolute has no curvature",
    ),
    Row(
        "indefinite",
        put_in(method=ptif.exact(HESSIAN, 0.0)),
        SolveFailed,
        r"smallest eigenvalue .* is -0.*not positive definite; .*at least Absolute",
    ),
    Row(
        "indefinite, CG",
        put_in(method=ptif.methods.koh_liang(0.0)),
        SolveFailed,
        r"negative curvature .*Absolute\(.*\) would do",
    ),
    Row(
        "indefinite, LiSSA",
        put_in(method=ptif.methods.lissa(1e-3)),
        SolveFailed,
        r"negative curvature .*Absolute\(.*\) would do",
    ),
    Row(
        "singular",
        put_in(method=ptif.exact(damping=0.0)),
        SolveFailed,
        r"is 0 within rounding .*singular.* positive damping",
    ),
    Row(
        "dual undamped",
        put_in(method=ptif.dual(damping=0.0)),
        INPUT,
        r"divides by the damping .* use a positive damping",
    ),
    Row(
        "LiSSA undamped",
        put_in(method=ptif.methods.lissa(0.0)),
        INPUT,
        r"depth from the damping, which is 0 here; give a positive",
    ),
    Row("damping negative", put_in(damping=-1), INPUT, r"^Absolute\(value=-1\) must be a finite number of at least 0"),
    Row("damping NaN", put_in(damping=NAN), INPUT, r"^Absolute\(value=nan\) must be a finite number of at least 0"),
    Row(
        "damping text", put_in(damping="0.1"), INPUT, r"^Absolute\(value='0.1'\) must be a finite number of at least 0"
    ),
    Row(
        "share 0",
        lambda m: ask(m, damping=Relative(0.0)),
        INPUT,
        r"^Relative\(share=0.0\) must be a finite number above 0; 0.1 is a good start",
    ),
    Row(
        "one lambda",
        lambda m: ask(m, damping=FromCurve(lambdas=[1.0])),
        INPUT,
        "at least two different values",
    ),
    Row(
        "a path without eigenvalues",
        lambda m: ask(m, method=ptif.Influence(GGN, CG(), FromCurve())),
        INPUT,
        "which Implicit does not have; use Woodbury",
    ),
    Row("route", lambda m: fitted(m, route="gohst"), INPUT, r"'gohst' is not a route; choose one of 'auto', 'ghost'"),
    Row(
        "forward leverage",
        lambda m: fitted(m, route="forward", scaling=Leverage()).score((X, Y)),
        INPUT,
        r"makes no rows, which this scaling needs",
    ),
    Row(
        "path of one number",
        lambda m: fitted(m).scores_over_damping((X, Y), 0.1),
        INPUT,
        r"several damping values, .*got 0.1",
    ),
    Row(
        "fit of a model",
        lambda m: ptif.Influence().fit(m),
        INPUT,
        r"take a Problem, got Sequential; write Problem\(model",
    ),
    Row("forecast of data", lambda m: ptif.Influence().forecast((X, Y)), INPUT, r"take a Problem, got tuple"),  # type: ignore[arg-type]
    Row(
        "argument",
        lambda m: ptif.Problem(m, CE, (X, Y)).with_(dta=1),
        INPUT,
        r"no argument 'dta'. Did you mean 'data'\?",
    ),
]

CHOICES = [
    Row(
        "pattern", put_in(parameters="0.wieght"), NAMED, r"'0.wieght' matches no parameter .* Did you mean '0.weight'\?"
    ),
    Row(
        "far pattern",
        put_in(parameters="encoder"),
        NAMED,
        r"'encoder' matches no parameter .* There are '0.weight', '0.bias'",
    ),
    Row("a number", put_in(parameters=3), INPUT, r"takes patterns, modules, parameters or a predicate, not int"),
    Row("foreign module", put_in(parameters=nn.Linear(2, 2)), INPUT, r"module Linear is not part of the model"),
    Row("nothing chosen", put_in(parameters=lambda n, p: False), INPUT, r"selects no parameter; pass None"),
    Row(
        "predicate raises",
        put_in(parameters=lambda n: True),
        INPUT,
        r"predicate .* failed on '0.weight' .*\(name, parameter\)",
    ),
    Row(
        "unused",
        put_in(parameters="idle"),
        INPUT,
        r"no derivative in the parameters 'idle.weight', 'idle.bias'",
        with_idle,
    ),
    Row(
        "AdamW",
        lambda m: ask(m, weight_decay=torch.optim.AdamW(m.parameters())),
        INPUT,
        r"^AdamW has decoupled weight decay \(0.01\).*no curvature; pass",
    ),
    Row(
        "foreign optimiser",
        put_in(weight_decay=torch.optim.SGD(single().parameters(), 0.1)),
        INPUT,
        r"holds no parameter of the model",
    ),
    Row(
        "decay negative", put_in(weight_decay=-1.0), INPUT, r"^weight_decay=-1.0 must be a finite number of at least 0"
    ),
    Row("decay NaN", put_in(weight_decay=NAN), INPUT, r"^weight_decay=nan must be a finite number of at least 0"),
    Row("decay text", put_in(weight_decay="1e-3"), INPUT, r"must be a number, an optimiser, .* or .*, got str"),
    Row(
        "decay name",
        put_in(weight_decay={"0.wieght": 1.0}),
        NAMED,
        r"no parameter of the model. Did you mean '0.weight'\?",
    ),
    Row(
        "no file",
        put_in(checkpoints="nowhere.pt"),
        INPUT,
        r"^The checkpoint 'nowhere.pt' cannot be read .*\.safetensors file or",
    ),
    Row(
        "keys",
        lambda m: ask(m, checkpoints=[{"0.wieght": torch.ones(1)}]),
        INPUT,
        r"holds '0.wieght', which the model does not have. Did you mean '0.weight'",
    ),
    Row(
        "keys missing",
        lambda m: ask(m, checkpoints=state(m, **{"2__bias": None})),
        INPUT,
        r"lacks '2.bias', which the model has",
    ),
    Row(
        "shape",
        lambda m: ask(m, checkpoints=state(m, **{"2__bias": torch.ones(7)})),
        INPUT,
        r"shape \[7\] for '2.bias', the model \[3\]; give",
    ),
    Row(
        "NaN",
        lambda m: ask(m, checkpoints=state(m, **{"2__bias": torch.full((C,), NAN)})),
        INFINITE,
        r"NaN or infinity in '2.bias'",
    ),
    Row("a model", lambda m: ask(m, checkpoints=m), INPUT, r"not Sequential; pass model.state_dict\(\)"),
    Row("a count", put_in(checkpoints=3), INPUT, r"^checkpoints must be state dicts .* or paths, not int"),
    Row("top 0", put_in(top=0), INPUT, r"^top=0 must be a whole number of at least 1; it is how many"),
    Row("dry run", put_in(dry_run=True), INPUT, r"^dry_run= became a function: write ptif\.forecast\(model, train, "),
    Row(
        "argument",
        put_in(wieght_decay=1),
        NAMED,
        r"has no argument 'wieght_decay'\. Did you mean 'weight_decay'",
    ),
    Row(
        "forecast argument",
        costs(batchsize=1),
        NAMED,
        r"has no argument 'batchsize'\. Did you mean 'batch_size'",
    ),
    Row("forecast of numbers", costs(method="random"), NAMED, r"^There is no method 'random'"),
    Row(
        "forecast of Random",
        costs(method=ptif.methods.Random()),
        INPUT,
        r"^Random has no forecast of its cost; call attribute",
    ),
    Row("top 2.5", put_in(top=2.5), INPUT, r"^top=2.5 must be a whole number"),
    Row("query 5", lambda m: ask(m).helpful(5), INPUT, r"There is no query 5: they are numbered 0 to 1"),
    Row("query slice", lambda m: ask(m)[7:], INPUT, r"No query was picked"),
    Row(
        "k 0",
        lambda m: ask(m).harmful(0, k=0),
        INPUT,
        r"^k=0 must be a whole number of at least 1; None",
    ),
    Row(
        "scores of NaN",
        lambda m: ptif.Scores(put(X, (1, 2), NAN)),
        INFINITE,
        r"NaN or infinite for query 1 at training index 2",
    ),
    Row(
        "no scores file",
        lambda m: ptif.Scores.load("nowhere.safetensors"),
        INPUT,
        r"no file 'nowhere.safetensors'; give the path",
    ),
]


def old(model: Any, data: tuple[Tensor, Tensor] = (X, Y), **config: Any) -> Any:
    """The call of the package this one replaces."""
    return classic.calc_img_wise(classic.get_default_config() | config, model, data, (X[:3], Y[:3]))


CLASSIC = [
    Row("key", lambda m: old(m, recursion_dept=3), NAMED, r"no key 'recursion_dept'. Did you mean 'recursion_depth'"),
    Row(
        "solver",
        lambda m: old(m, solver="lisa"),
        INPUT,
        r"^solver='lisa' is not possible; it must be one of 'lissa', 'auto'",
    ),
    Row("model", lambda m: old("net"), INPUT, r"must be a torch.nn.Module, got str"),
    Row("frozen", old, INPUT, r"no trainable parameter", frozen),
    Row("dtype", lambda m: old(m, (X.double(), Y)), INPUT, r"^The data are torch.float64 .*model\.double\(\)"),
    Row("label", lambda m: old(m, (X, put(Y, 5, C))), INPUT, r"^Label 3 at dataset index 5 is out of range"),
]


PARTS = {
    "data": DATA,
    "types and shapes": TYPES_AND_SHAPES,
    "model": MODELS,
    "loss": LOSSES,
    "method": METHODS,
    "run": RUNS,
    "curvature": CURVATURES,
    "choice": CHOICES,
    "classic": CLASSIC,
}
TABLE = {f"{part}: {row.name}": row for part, rows in PARTS.items() for row in rows}


@pytest.fixture(autouse=True)
def _as_users_have_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """Without the tests' own check of annotations, which would speak before the library does."""
    monkeypatch.chdir(tmp_path)
    before = jaxtyping.config.jaxtyping_disable
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", before)


def test_the_table_is_whole() -> None:
    assert len(TABLE) == sum(map(len, PARTS.values())) >= 50


# --------------------------------------------------------------------------- what happens


@pytest.mark.parametrize("row", TABLE.values(), ids=TABLE)
def test_bad_input_gets_one_sentence_and_the_model_is_left_alone(row: Row) -> None:
    model = row.model()
    watched = isinstance(model, nn.Module)
    if watched:
        # A mode and a flag that eval() and requires_grad_() would get wrong.
        model.train()
        next(model.children(), model).eval()
        model.register_forward_hook(lambda *_: None)
    before = repr(picture(model)) if watched else ""
    generator = torch.get_rng_state()
    with pytest.raises(ptif.InfluenceError, match=row.match) as caught:
        row.call(model)
    assert type(caught.value) is row.error
    words = str(caught.value)
    assert "\n" not in words and words[-1] in ".?" and len(words) < 520
    if watched:
        assert repr(picture(model)) == before
    assert torch.equal(torch.get_rng_state(), generator)


def test_the_cause_is_kept_for_those_who_debug_their_model() -> None:
    with pytest.raises(InvalidInput) as caught:
        ask(Through(lambda f: f.nope))
    assert isinstance(caught.value.__cause__, AttributeError)


def test_running_out_of_memory_stays_what_it_is() -> None:
    def greedy(f: Tensor) -> Tensor:
        raise torch.OutOfMemoryError("no room")

    with pytest.raises(torch.OutOfMemoryError, match="no room"):
        ask(Through(greedy))


def test_an_interrupt_passes_and_leaves_the_model_alone() -> None:
    def interrupted(f: Tensor) -> Tensor:
        raise KeyboardInterrupt

    model = Through(interrupted).train()
    before = repr(picture(model))
    with pytest.raises(KeyboardInterrupt):
        ask(model)
    assert repr(picture(model)) == before


def test_the_right_input_passes() -> None:
    """The table's starting point is fine: each row fails for its own reason only."""
    assert ask(net()).shape == (2, N)
    assert real()(single()).shape == (2, N)
    assert re.match("method", str(costs()(net())))
