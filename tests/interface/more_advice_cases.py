"""Advice in error messages, second half: the rows of solvers, losses, data and models."""

from __future__ import annotations

from functools import partial
from typing import Any

import pandas as pd
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset, WeightedRandomSampler

import pytorch_influence_functions as ptif
from pytorch_influence_functions.curvature import (
    EKFAC,
    GGN,
    KFAC,
    EmpiricalFisher,
    Fisher,
    Hessian,
    Nystrom,
    Shampoo,
)
from pytorch_influence_functions.damping import FromTraining, Relative
from pytorch_influence_functions.solvers import (
    CG,
    Auto,
    BlockGroup,
    Blockwise,
    DataInf,
    Factored,
    Neumann,
    Spectral,
    Truncation,
    Woodbury,
)
from tests.interface.advice_cases import Advice, scored
from tests.interface.bad_input_cases import (
    C,
    Endless,
    Items,
    R,
    Stream,
    X,
    Y,
    ask,
    elementwise,
    lazy,
    net,
    put_in,
    ragged,
    real,
    single,
    through,
)

WORDS = pd.Series(["ant", "bee", "cow"] * 4)
FRAME = pd.DataFrame(X.numpy(), columns=["a", "b", "c", "d"]).assign(label=Y.numpy())
TABLE = FRAME.drop(columns="label")
FLAGS = (Y > 0).float()[:, None]


def optimiser(make: Any, **settings: Any) -> Call:
    return lambda model: ask(model, weight_decay=make(model.parameters(), lr=0.1, weight_decay=0.1), **settings)


def gaussian(outputs: Tensor, targets: Tensor) -> Tensor:
    return F.gaussian_nll_loss(outputs[:, :1], targets[:, None], outputs[:, 1:2].square() + 1)


def weighted(sampler: bool) -> DataLoader[Any]:
    drawn = WeightedRandomSampler([1.0, 2.0, 3.0] * 4, 12) if sampler else None
    return DataLoader(TensorDataset(X, Y), 4, sampler=drawn)


def scripted() -> Any:
    return torch.jit.script(net())  # type: ignore[no-untyped-call]


def from_scripted(model: Any) -> Any:
    plain = net()
    plain.load_state_dict(model.state_dict())
    return ask(plain)


def run_once(model: nn.Module) -> Any:
    model(X)
    return ask(model)


def solvers() -> list[Advice]:
    dual = partial(scored, curvature=GGN(), solver=Woodbury())
    neumann = partial(scored, curvature=GGN())
    apart = {"weight_decay": {"0.weight": 0.1}}
    return [
        Advice(
            "a preconditioner too many",
            scored(curvature=GGN(), solver=Spectral(), preconditioner=GGN()),
            r"drop it, or use CG\(\)",
            (scored(curvature=GGN(), solver=Spectral()), scored(curvature=GGN(), solver=CG(), preconditioner=GGN())),
        ),
        Advice(
            "no cheap inverse",
            scored(curvature=GGN(), solver=CG(), preconditioner=Hessian()),
            r"use EKFAC\(\), EmpiricalFisher\(\), Fisher\(samples=1\) or GGN\(\)",
            tuple(
                scored(curvature=GGN(), solver=CG(), preconditioner=c)
                for c in (EKFAC(), EmpiricalFisher(), Fisher(samples=1), GGN())
            ),
            lambda: nn.Sequential(nn.Linear(4, 800), nn.Tanh(), nn.Linear(800, C)),
        ),
        Advice(
            "a dropped guide",
            scored(curvature=GGN(), solver=CG(), preconditioner=Nystrom(3, complement="dropped")),
            r"use complement='zero'",
            (scored(curvature=GGN(), solver=CG(), preconditioner=Nystrom(3, complement="zero")),),
        ),
        Advice(
            "dropped",
            scored(curvature=Nystrom(3, complement="dropped"), solver=CG()),
            r"use it, or complement='zero'",
            (
                scored(curvature=Nystrom(3, complement="dropped"), solver=Spectral()),
                scored(curvature=Nystrom(3, complement="zero"), solver=CG()),
            ),
        ),
        Advice(
            "no product form",
            scored(curvature=EKFAC(), solver=Factored()),
            r"use KFAC\(\), or Spectral\(\) for EKFAC\(\) and Shampoo\(\)|choose another solver",
            (
                scored(curvature=KFAC(), solver=Factored()),
                scored(curvature=EKFAC(), solver=Spectral()),
                scored(curvature=Shampoo(), solver=Spectral()),
            ),
        ),
        Advice(
            "DataInf of GGN",
            scored(curvature=GGN(), solver=DataInf()),
            r"use EmpiricalFisher\(\).* or Fisher\(samples=1\)",
            (
                scored(curvature=EmpiricalFisher(), solver=DataInf()),
                scored(curvature=Fisher(samples=1), solver=DataInf()),
            ),
        ),
        Advice(
            "DataInf undamped",
            scored(curvature=EmpiricalFisher(), solver=DataInf(), damping=0.0),
            r"such as Relative\(0.1\)",
            (scored(curvature=EmpiricalFisher(), solver=DataInf(), damping=Relative(0.1)),),
        ),
        Advice(
            "DataInf over all",
            scored(apart, curvature=EmpiricalFisher(), solver=DataInf(per_block=False)),
            r"use per_block=True, or one number",
            (
                scored(apart, curvature=EmpiricalFisher(), solver=DataInf(per_block=True)),
                scored({"weight_decay": 0.1}, curvature=EmpiricalFisher(), solver=DataInf(per_block=False)),
            ),
        ),
        Advice("dual undamped", dual(damping=0.0), r"such as Relative\(0.1\)", (dual(damping=Relative(0.1)),)),
        Advice(
            "blocks in blocks",
            lambda m: scored(curvature=GGN(), solver=Blockwise(solver=Blockwise()))(m),
            r"such as Spectral\(\) or CG\(\)",
            tuple(scored(curvature=GGN(), solver=Blockwise(solver=s)) for s in (Spectral(), CG())),
        ),
        Advice(
            "patterns",
            lambda m: Blockwise(groups="fc"),
            r"map names to patterns, such as",  # type: ignore[arg-type]
            (
                scored(curvature=GGN(), solver=Blockwise(groups={"head": "2", "body": "0*"})),
                scored(curvature=GGN(), solver=Blockwise(groups=None)),
            ),
        ),
        Advice(
            "a block left out",
            scored(curvature=GGN(), solver=Blockwise(groups={"a": "0"})),
            r"add a group for them, or leave them out with parameters=",
            (
                scored(curvature=GGN(), solver=Blockwise(groups={"a": "0", "b": "2"})),
                scored({"parameters": "0.*"}, curvature=GGN(), solver=Blockwise(groups={"a": "0"})),
            ),
        ),
        Advice(
            "damped twice",
            scored(curvature=GGN(), solver=Blockwise(groups={"a": BlockGroup("*", damping=0.1)}), damping=0.2),
            r"leave one of the two out",
            (
                scored(curvature=GGN(), solver=Blockwise(groups={"a": BlockGroup("*", damping=0.1)})),
                scored(curvature=GGN(), solver=Blockwise(groups={"a": "*"}), damping=0.2),
            ),
        ),
        Advice(
            "a series undamped",
            neumann(solver=Neumann(), damping=0.0),
            r"give a positive damping or `steps`",
            (neumann(solver=Neumann(), damping=0.1), neumann(solver=Neumann(steps=20), damping=0.0)),
        ),
        Advice(
            "a series of no examples",
            scored(curvature=EKFAC(), solver=Neumann(batch_size=4)),
            r"leave batch_size unset|choose another solver, or Auto\(\)",
            (scored(curvature=EKFAC(), solver=Auto()),),
        ),
        Advice(
            "rank and tolerance",
            lambda m: Truncation(tolerance=0.01, rank=32),
            r"a tolerance such as 0.01, or a rank such as 32",
            (
                scored(curvature=GGN(), solver=Spectral(), truncation=Truncation(tolerance=0.01)),
                scored(curvature=GGN(), solver=Spectral(), truncation=Truncation(rank=32)),
            ),
        ),
    ]


def objectives() -> list[Advice]:
    return [
        Advice(
            "a class", put_in(loss=nn.CrossEntropyLoss), r"pass an instance, CrossEntropyLoss\(\.\.\.\)", (put_in(),)
        ),
        Advice(
            "a text",
            put_in(loss="mse"),
            r"such as CrossEntropy\(\), a torch.nn loss, or a function",
            (put_in(loss=ptif.CrossEntropy()), put_in(), put_in(loss=F.cross_entropy)),
        ),
        Advice("no target", put_in(train=X), r"expected \(inputs, target\)", (put_in(train=(X, Y)),)),
        Advice(
            "an autoencoder",
            put_in(train=X, queries=X[:2], loss=None),
            r"\(x, x\) for an autoencoder",
            (put_in(train=(X, X), queries=(X[:2], X[:2]), loss=None),),
            lambda: nn.Linear(4, 4),
        ),
        Advice(
            "keys",
            put_in(train={"x": X, "y": Y}, loss=None),
            r"under 'labels' or 'label'",
            (put_in(train={"x": X, "labels": Y}), put_in(train={"x": X, "label": Y})),
            lambda: Keyword(),
        ),
        Advice(
            "float labels",
            put_in(train=(X, Y.float())),
            r"convert them with \.long\(\)",
            (put_in(train=(X, Y.float().long())),),
        ),
        Advice(
            "one-hot",
            put_in(train=(X, F.one_hot(Y, C))),
            r"convert them with \.float\(\)",
            (put_in(train=(X, F.one_hot(Y, C).float())),),
        ),
        Advice(
            "a column", put_in(train=(X, Y[:, None])), r"\.squeeze\(-1\)", (put_in(train=(X, Y[:, None].squeeze(-1))),)
        ),
        Advice(
            "logits",
            real(loss=nn.BCELoss(), train=(X, FLAGS), queries=(X[:2], FLAGS[:2])),
            r"use Bernoulli\(\) or BCEWithLogitsLoss\(\) for logits",
            tuple(
                real(loss=loss, train=(X, FLAGS), queries=(X[:2], FLAGS[:2]))
                for loss in (ptif.Bernoulli(), nn.BCEWithLogitsLoss())
            ),
            single,
        ),
        Advice(
            "no log",
            put_in(loss=nn.NLLLoss()),
            r"end the model with log_softmax, or use CrossEntropy\(\)",
            (lambda m: ask(nn.Sequential(m, nn.LogSoftmax(1)), loss=nn.NLLLoss()), put_in(loss=ptif.CrossEntropy())),
        ),
        Advice(
            "both",
            lambda m: ptif.CrossEntropy(from_log_probabilities=True, from_probabilities=True),
            r"leave one out",
            (
                lambda m: ptif.CrossEntropy(from_log_probabilities=True),
                lambda m: ptif.CrossEntropy(from_probabilities=True),
            ),
        ),
        Advice(
            "class weights",
            put_in(loss=nn.CrossEntropyLoss(torch.ones(2))),
            r"give one weight per class",
            (put_in(loss=nn.CrossEntropyLoss(torch.ones(C))),),
        ),
        Advice(
            "not reduced",
            put_in(loss=elementwise),
            r"e\.g\. \.flatten\(1\)\.mean\(1\)",
            (put_in(loss=lambda f, y: elementwise(f, y).flatten(1).mean(1), method="dual"),),
        ),
        Advice(
            "three arguments",
            put_in(loss=nn.GaussianNLLLoss(), train=(X, R[:, 0]), queries=(X[:2], R[:2, 0])),
            r"write it as a function of \(outputs, targets\)",
            (put_in(loss=gaussian, train=(X, R[:, 0]), queries=(X[:2], R[:2, 0]), method="dual"),),
        ),
        Advice(
            "argmax",
            put_in(),
            r"return what comes before argmax",
            (lambda m: ask(m.net),),
            through(lambda f: f.argmax(1)),
        ),
    ]


class Keyword(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = net()

    def forward(self, x: Tensor) -> Any:
        return self.net(x)


class Sized(Endless):
    def __len__(self) -> int:
        return len(X)


def problem() -> list[Advice]:
    dataset = TensorDataset(X, Y)
    return [
        Advice("a stream", put_in(train=Stream()), r"list\(dataset\)", (put_in(train=[*Stream(), *Stream()]),)),
        Advice(
            "no batches",
            put_in(train=DataLoader(dataset, batch_size=None)),
            r"make it with a batch_size, or pass its dataset",
            (put_in(train=DataLoader(dataset, batch_size=4)), put_in(train=dataset)),
        ),
        Advice("no length", put_in(train=Endless()), r"give it a __len__", (put_in(train=Sized()),)),
        Advice(
            "no data",
            put_in(train="train.csv"),
            r"expected a Dataset, a DataLoader, or tensors or arrays \(x, y\)",
            (put_in(train=dataset), put_in(train=DataLoader(dataset)), put_in(), put_in(train=(X.numpy(), Y.numpy()))),
        ),
        Advice(
            "ragged",
            put_in(train=Items(ragged)),
            r"a DataLoader whose collate_fn pads them",
            (put_in(train=DataLoader(Items(ragged), 4, collate_fn=cut)),),
        ),
        Advice(
            "weights of a sampler",
            put_in(train=weighted(True)),
            r"pass its dataset, loader.dataset, .*CrossEntropy\(weight=",
            (put_in(train=weighted(False).dataset, loss=ptif.CrossEntropy(weight=torch.tensor([1.0, 2.0, 3.0]))),),
        ),
        Advice(
            "a table",
            put_in(train=FRAME),
            r"pass a pair, such as \(frame.drop\(columns='label'\), frame\['label'\]\)",
            (put_in(train=(FRAME.drop(columns="label"), FRAME["label"])),),
        ),
        Advice(
            "other words",
            put_in(train=(TABLE, WORDS), queries=(TABLE[:1], ["dog"])),
            r"by these names, or as class numbers",
            (
                put_in(train=(TABLE, WORDS), queries=(TABLE[:1], ["bee"])),
                put_in(train=(TABLE, WORDS), queries=(X[:1], Y[:1])),
            ),
        ),
        Advice("scripted", put_in(), r"with the weights of scripted.state_dict\(\)", (from_scripted,), scripted),
        Advice("lazy", put_in(), r"run the model once on a batch first", (run_once,), lazy),
        Advice("device", put_in(device="gpuu"), r"write 'cpu', .* or leave it out", (put_in(device="cpu"), put_in())),
        Advice(
            "AdamW",
            optimiser(torch.optim.AdamW),
            r"pass weight_decay=0 and let damping=FromTraining\(lr, steps\) stand for it, or pass a number",
            (put_in(weight_decay=0, damping=FromTraining(0.1, 100)), put_in(weight_decay=0.1)),
        ),
        Advice(
            "another's optimiser",
            lambda m: ask(m, weight_decay=torch.optim.SGD(net().parameters(), 0.1)),
            r"pass the optimiser that trained it, or a number",
            (optimiser(torch.optim.SGD), put_in(weight_decay=0.1)),
        ),
        Advice(
            "a model for a checkpoint",
            lambda m: ask(m, checkpoints=[m]),
            r"pass model.state_dict\(\)",
            (lambda m: ask(m, checkpoints=[m.state_dict()]),),
        ),
        Advice(
            "frozen",
            put_in(),
            r"call requires_grad_\(True\) or name the parameters with parameters=",
            (lambda m: ask(m.requires_grad_(True)), put_in(parameters="*")),
            lambda: net().requires_grad_(False),
        ),
        Advice(
            "float64",
            put_in(train=(X.double(), Y)),
            r"the data with \.float\(\) .*, or the model with model\.double\(\)",
            (
                put_in(train=(X.double().float(), Y)),
                lambda m: ask(m.double(), train=(X.double(), Y), queries=(X[:2].double(), Y[:2])),
            ),
        ),
        Advice(
            "mixing",
            put_in(),
            r"use running statistics or GroupNorm",
            (
                lambda m: ask(nn.Sequential(m[0], nn.BatchNorm1d(5), m[2])),
                lambda m: ask(nn.Sequential(m[0], nn.GroupNorm(1, 5), m[2])),
            ),
            lambda: nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5, track_running_stats=False), nn.Linear(5, 3)),
        ),
        Advice(
            "two arguments",
            put_in(loss=lambda f, y: f),
            r"a batch \(a, \.\.\., y\) is used as model\(a, \.\.\.\)",
            (put_in(train=(X, Y, Y), queries=(X[:2], Y[:2], Y[:2]), loss=lambda f, y: f, method="dual"),),
            lambda: OwnLoss(),
        ),
    ]


class OwnLoss(nn.Module):
    """Takes the labels and returns its own loss, one per example."""

    def __init__(self) -> None:
        super().__init__()
        self.net = net()

    def forward(self, x: Tensor, y: Tensor) -> Any:
        return F.cross_entropy(self.net(x), y, reduction="none")


def cut(items: list[Any]) -> Any:
    return torch.stack([x[:4] for x, _ in items]), torch.stack([y for _, y in items])
