"""Advice in error messages, the rest: values that are not what they should be."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import pytorch_influence_functions as ptif
from pytorch_influence_functions.curvature import EKFAC, GGN, Sharing
from pytorch_influence_functions.solvers import CG, BlockGroup, Blockwise
from tests.interface.advice_cases import PAIR, Advice, scored
from tests.interface.bad_input_cases import CE, C, Items, X, Y, as_float, ask, detached, net, noisy, put, put_in, single


class TwoHeads(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.kind, self.size = nn.Linear(4, C), nn.Linear(4, C)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"kind": self.kind(x), "size": self.size(x)}


def of_file(content: Any) -> Any:
    """The call with a checkpoint of what `content` makes of the model."""

    def run(model: nn.Module) -> Any:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "checkpoint.pt"
            torch.save(content(model), path)
            return ask(model, checkpoints=[path])

    return run


def grouped(*groups: Any, **settings: Any) -> Any:
    return lambda m: scored(curvature=GGN(), solver=Blockwise(groups={"all": BlockGroup(*groups, **settings)}))(m)


def labels_are_missing(model: nn.Module) -> Any:
    return put_in(train=Items(lambda i: X[i]))(model)


ONE_HOT = F.one_hot(Y, C).float()
SIDE_BY_SIDE = {"train": {"x": X, "labels": Y}, "test": {"x": X[:2], "labels": Y[:2]}}


def parts() -> list[Advice]:
    return [
        Advice(
            "sharing",
            lambda m: EKFAC(sharing="sum"),  # type: ignore[arg-type]
            r"must be Sharing.EXPAND or Sharing.REDUCE",
            tuple(scored(curvature=EKFAC(sharing=s)) for s in (Sharing.EXPAND, Sharing.REDUCE)),
        ),
        Advice(
            "a class of a solver",
            lambda m: Blockwise(solver=CG),  # type: ignore[arg-type]
            r"write CG\(\), an instance",
            (scored(curvature=GGN(), solver=Blockwise(solver=CG())),),
        ),
        Advice("patterns of a group", grouped(3), r"by one or several patterns", (grouped("*"), grouped(["0", "2"]))),
        Advice(
            "curvature of a group",
            grouped("*", curvature="ggn"),
            r"must be a curvature such as GGN\(\), or None",
            (grouped("*", curvature=GGN()), grouped("*", curvature=None)),
        ),
        Advice(
            "a whole method",
            scored(curvature=ptif.ekfac()),
            r"pass it as method=, or call its fit\(problem\)",
            (put_in(method=ptif.ekfac()), lambda m: ptif.ekfac().fit(ptif.Problem(m, CE, PAIR))),
        ),
        Advice(
            "weights as text",
            scored(curvature=GGN(), weights="a"),
            r"one number per checkpoint, such as .*, or None for their mean",
            (scored(curvature=GGN(), weights=(0.1,)), scored(curvature=GGN(), weights=None)),
        ),
        Advice(
            "decay as text",
            put_in(weight_decay="much"),
            r"must be a number, an optimiser, .* or WeightDecay",
            (put_in(weight_decay=0.1), put_in(weight_decay=ptif.WeightDecay(0.1))),
        ),
        Advice(
            "rates and steps",
            lambda m: ptif.tracin([0.1], steps=[1, 2]),
            r"give one each per checkpoint",
            (put_in(method=ptif.tracin([0.1], steps=[1])),),
        ),
        Advice(
            "objects in a checkpoint",
            of_file(lambda m: {"state_dict": m.state_dict(), "made by": Path("x")}),
            r"save the state dict alone with torch.save\(model.state_dict\(\), path\)",
            (of_file(lambda m: m.state_dict()),),
        ),
        Advice("device", put_in(device="meta"), r"call model.to\('meta'\) first", (put_in(device="cpu"),)),
    ]


def targets() -> list[Advice]:
    tokens = ptif.TokenCrossEntropy()
    probable = {"loss": ptif.CrossEntropy(from_probabilities=True)}
    return [
        Advice(
            "inputs alone",
            labels_are_missing,
            r"expected \(inputs, target\) or a mapping with 'labels'",
            (
                put_in(train=Items(lambda i: (X[i], Y[i]))),
                put_in(train=Items(lambda i: {"input": X[i], "labels": Y[i]})),
            ),
        ),
        Advice(
            "labels as text",
            put_in(train=Items(lambda i: (X[i], "cat"))),
            r"return a number or a tensor as target",
            (put_in(train=Items(lambda i: (X[i], int(Y[i])))), put_in(train=Items(lambda i: (X[i], Y[i])))),
        ),
        Advice(
            "too many classes",
            put_in(train=(X, put(Y, 5, C))),
            r"relabel from 0 or widen the last layer",
            (lambda m: ask(nn.Linear(4, C + 1), train=(X, put(Y, 5, C))), put_in(train=(X, put(Y, 5, 0)))),
        ),
        Advice(
            "logits for probabilities",
            put_in(**probable),
            r"end the model with softmax, or use CrossEntropy\(\) for logits",
            (lambda m: ask(nn.Sequential(m, nn.Softmax(1)), **probable), put_in(loss=ptif.CrossEntropy())),
        ),
        Advice(
            "one logit",
            put_in(train=(X, Y % 2)),
            r"for one logit per example use Bernoulli\(\)",
            (put_in(loss=ptif.Bernoulli(), train=(X, Y % 2)),),
            single,
        ),
        Advice("no tokens", put_in(loss=tokens), r"for one label per example use CrossEntropy\(\)", (put_in(),)),
        Advice(
            "margin of one-hot targets",
            put_in(queries=(X[:2], ONE_HOT[:2]), measure=ptif.Margin()),
            r"use argmax on one-hot targets",
            (put_in(queries=(X[:2], ONE_HOT[:2].argmax(1)), measure=ptif.Margin()),),
        ),
        Advice("a float", put_in(loss=as_float), r"leave out \.item\(\)", (put_in(loss=F.cross_entropy),)),
        Advice("detached", put_in(loss=detached), r"use a differentiable loss", (put_in(loss=F.cross_entropy),)),
        Advice(
            "two heads",
            put_in(),
            r"loss=lambda out, y: loss_fn\(out\[",
            (put_in(loss=lambda out, y: CE(out["kind"], y), method="dual"),),
            TwoHeads,
        ),
        Advice(
            "splits",
            put_in(train=SIDE_BY_SIDE),
            r"pass one split of it, or a mapping of equally long tensors",
            (lambda m: ask(m, train=tuple(SIDE_BY_SIDE["train"].values())), put_in(train={"input": X, "labels": Y})),
        ),
        Advice(
            "words for numbers",
            put_in(queries=(X[:2], ["ant", "bee"])),
            r"give class numbers, as for training",
            (put_in(queries=(X[:2], [0, 1])),),
        ),
        Advice(
            "noise in the data",
            put_in(train=Items(noisy), deterministic="error"),
            r"or deterministic='warn'",
            (put_in(train=Items(noisy), deterministic="warn"), put_in()),
            net,
        ),
    ]
