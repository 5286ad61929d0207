"""Bad input, methods that follow the training run: segments, checkpoints, Adam's state."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

import pytorch_influence_functions as ptif
from pytorch_influence_functions.core.errors import TooLarge
from pytorch_influence_functions.curvature import Identity
from pytorch_influence_functions.trajectory import SOURCE, AdamState, Segment
from tests.interface.bad_input_cases import GGN, HESSIAN, INFINITE, INPUT, NAN, Row, X, put_in, state


def segment(**changes: Any) -> Callable[[nn.Module], Any]:
    """A Segment of the model's own weights, with something else put in."""

    def make(model: nn.Module) -> Segment:
        given: dict[str, Any] = {"checkpoints": [state(model)], "lr": 0.1, "steps": 10}
        return Segment(**(given | {k: v(model) if callable(v) else v for k, v in changes.items()}))

    return make


def unrolled(curvature: Any = GGN, problem: Any = None, memory: int = 1 << 30, **changes: Any) -> Callable[..., Any]:
    """SOURCE through the public door."""

    def run(model: nn.Module) -> Any:
        method = SOURCE([segment(**changes)(model)], curvature, memory=memory)
        return put_in(method=method, **(problem or {}))(model)

    return run


def even(**changes: Any) -> Callable[[nn.Module], Any]:
    def make(model: nn.Module) -> Any:
        given: dict[str, Any] = {"checkpoints": [state(model, **{"0__bias": torch.ones(5) * k}) for k in range(4)]}
        return ptif.source(**(given | {"lr": 0.1, "steps": 40} | changes))

    return make


def adam(**changes: Any) -> Callable[[nn.Module], AdamState]:
    """Adam's second moments with something else put in, under the same names as `state`."""
    return lambda model: AdamState({k: v.abs() for k, v in state(model, **changes).items()})


def _live(model: nn.Module) -> Any:
    return ptif.source([model.state_dict(), model.state_dict()], 0.1, 10, segments=1)


RUNS = [
    Row("no segment", lambda m: SOURCE([]), INPUT, r"^SOURCE takes segments, .* got none; ptif.source\("),
    Row("segments text", lambda m: SOURCE("a"), INPUT, r"^SOURCE takes segments, .*, got str"),  # type: ignore[arg-type]
    Row("curvature text", unrolled("ggn"), INPUT, r"^SOURCE's curvature must be one such as GGN\(\), got str"),
    Row("no checkpoint", segment(checkpoints=()), INPUT, r"^A Segment needs at least one checkpoint"),
    Row("a model", segment(checkpoints=lambda m: [m]), INPUT, r"not Sequential; pass model.state_dict\(\)"),
    Row("lr 0", segment(lr=0.0), INPUT, r"^Segment\(lr=0.0\) must be a finite number above 0"),
    Row("lr text", segment(lr="0.1"), INPUT, r"^Segment\(lr='0.1'\) must be a finite number above 0"),
    Row("no steps", segment(steps=-5), INPUT, r"^Segment\(steps=-5\) must be a finite number above 0"),
    Row(
        "momentum", segment(momentum=1.0), INPUT, r"^Segment\(momentum=1.0\) must be a number of at least 0 and below 1"
    ),
    Row("live weights", _live, INPUT, r"^Checkpoints 1 and 2 are the same tensors .* copy.deepcopy"),
    Row("few rates", even(lr=[0.1, 0.2]), INPUT, r"^lr has 2 numbers for 4 checkpoints; give one each"),
    Row("few steps", even(steps=[1]), INPUT, r"^steps has 1 numbers for 4 checkpoints"),
    Row("a rate of 0", even(lr=[0.1, 0.2, 0.0, 0.1]), INPUT, r"^lr\[2\] is 0.0; it must be a finite number above 0"),
    Row(
        "many segments",
        even(segments=5),
        INPUT,
        r"^segments=5 must be a whole number from 1 to 4; there cannot be more segments",
    ),
    Row(
        "wrong key",
        unrolled(checkpoints=lambda m: state(m, **{"0__weight": None})),
        INPUT,
        r"^Segment 1, checkpoint 1: the checkpoint lacks '0.weight', which the model has",
    ),
    Row(
        "NaN checkpoint",
        unrolled(checkpoints=lambda m: state(m, **{"0__bias": torch.full((5,), NAN)})),
        INFINITE,
        r"^Segment 1, checkpoint 1: the model's weights hold NaN or infinity in '0.bias'",
    ),
    Row("its own", unrolled(problem={"checkpoints": [{}]}), INPUT, r"by segment and the problem has 1 of its own"),
    Row("damping", unrolled(problem={"damping": 0.1}), INPUT, r"^SOURCE takes no damping=; leave it out\.$"),
    Row("forward", unrolled(problem={"route": "forward"}), INPUT, r"makes rows, which route='forward' does not"),
    Row(
        "small memory",
        unrolled(memory=100),
        TooLarge,
        r"dense GGN\(\) of 43 parameters over 1.*memory=bytes",
    ),
    Row("overflow", unrolled(HESSIAN, lr=1e9), INPUT, r"^Segment 1 of 1 has curvature -.* would overflow; use GGN\(\)"),
    Row("Adam text", segment(adam="adam"), INPUT, r"must be an AdamState, got str; write AdamState.of\("),
    Row("Adam and momentum", segment(adam=adam(), momentum=0.9), INPUT, r"so leave momentum at 0"),
    Row("Adam without", unrolled(adam=adam(**{"0__bias": None})), INPUT, r"no second moment for '0.bias'"),
    Row("Adam shape", unrolled(adam=adam(**{"0__bias": torch.ones(2)})), INPUT, r"has shape \[2\], the para"),
    Row(
        "Adam negative",
        lambda m: AdamState({"0": -torch.ones(2)}),
        INPUT,
        r"of '0' must be a tensor of finite",
    ),
    Row(
        "Adam of SGD",
        lambda m: AdamState.of(torch.optim.SGD(m.parameters(), 0.1), m),
        INPUT,
        r"^The optimiser holds no exp_avg_sq and step for '0.weight': it is not Adam",
    ),
    Row(
        "Adam of another",
        lambda m: AdamState.of(torch.optim.Adam([nn.Parameter(X)]), m),
        INPUT,
        r"^The optimiser holds no parameter of the model",
    ),
    Row(
        "Adam and identity",
        unrolled(Identity(), adam=adam()),
        INPUT,
        r"Identity\(\) has neither a dense matrix nor a Kronecker eigenbasis to mul",
    ),
]
