"""Bugs planted in layer rules and in the inner products of their rows: each must break its law.

The engine notices a wrong rule by itself and sets it aside. So every bug of a rule is planted twice: as it is, where
the law has to see that the rule is not used, and with the engine's own check blinded, where the numbers have to tell.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pytorch_influence_functions.gradients import layer_rules, recording
from pytorch_influence_functions.gradients.probe import Probe
from pytorch_influence_functions.linalg import rows
from pytorch_influence_functions.linalg.blocks import Conv, Dense, Outer
from tests.laws import test_gradients as laws
from tests.laws.zoo import CASES, Case, build, named
from tests.planted.planting import Bug, Patch, all_of, must_be_noticed, swap

pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same':UserWarning")


def rows_law(case: Case) -> None:
    """Rows are taken by rule, and are those of one-example autograd."""
    laws.test_rows_equal_autograd(case)


def routes_law(case: Case) -> None:
    """Inner products are the same on every route."""
    laws.test_every_route_gives_the_same_inner_products(case)


def blind(monkeypatch: pytest.MonkeyPatch) -> None:
    """The engine's own comparison with autograd finds nothing wrong."""
    monkeypatch.setattr(Probe, "disagreeing", lambda self, pullback, blocks: [])


def rule(kind: type[nn.Module], bug: Callable[..., Any]) -> Patch:
    """Plant a bug in a layer rule."""

    def plant(monkeypatch: pytest.MonkeyPatch) -> None:
        original = layer_rules.RULES[kind]
        monkeypatch.setitem(layer_rules.RULES, kind, lambda *args: bug(original, *args))

    return plant


# --------------------------------------------------------------------------- bugs


def zeros(original: Any, module: Any, x: Tensor, g: Tensor, part: str) -> Dense:
    return Dense(torch.zeros_like(original(module, x, g, part).dense()))


def no_bias(original: Any, module: Any, x: Tensor, g: Tensor, part: str) -> Any:
    block = original(module, x, g, part)
    if part != "joint":
        return block
    return Outer(block.left, torch.cat([block.right[..., :-1], torch.zeros_like(block.right[..., :1])], -1))


def mirrored(original: Any, module: Any, x: Tensor, g: Tensor, part: str) -> Any:
    block = original(module, x, g, part)
    return Conv(block.left, block.x.flip(-1), block.window) if isinstance(block, Conv) else block


def zeros_as_padding(original: Any, module: Any, x: Tensor) -> Tensor:
    full = original(module, x)
    grown = [f - s for f, s in zip(full.shape[2:], x.shape[2:], strict=True)]
    sides = [side for g in reversed(grown) for side in (g // 2, g - g // 2)]
    return F.pad(x, sides)


def product_of_sums(original: Any, a: Outer, b: Outer) -> Tensor:
    return (a.left.sum(1) @ b.left.sum(1).T) * (a.right.sum(1) @ b.right.sum(1).T)


@cache
def case_with(kind: type[nn.Module]) -> Case:
    """The first case whose rule for that kind of layer has to be used."""
    return next(
        case
        for case in CASES
        if any(type(m) is kind and case.covers(name) for name, m in build(case)[0].named_modules())
    )


def rows_law_of(kind: type[nn.Module]) -> None:
    rows_law(case_with(kind))


RULE_BUGS = [
    *(Bug(f"{kind.__name__}'s rule gives zeros", rule(kind, zeros), partial(rows_law_of, kind))
      for kind in layer_rules.RULES),
    Bug("Conv1D's rule gives zeros", swap(layer_rules, "transposed_linear", zeros), partial(rows_law, named("tied"))),
    Bug("look-alikes' rule gives zeros", swap(layer_rules, "rms_norm", zeros), partial(rows_law, named("tied"))),
    Bug("bias column dropped", rule(nn.Linear, no_bias), partial(rows_law, named("mlp"))),
    Bug("patches mirrored", rule(nn.Conv2d, mirrored), partial(rows_law, named("conv2d stride"))),
    Bug(
        "padding mode ignored",
        swap(layer_rules, "pad_input", zeros_as_padding),
        partial(rows_law, named("conv2d reflect")),
    ),
    Bug("second use dropped", swap(recording, "add", lambda f, a, b: a), partial(rows_law, named("tied"))),
]  # fmt: skip
BUGS = [Bug("ghost product of sums", swap(rows, "_ghost", product_of_sums), partial(routes_law, named("positions")))]


@pytest.mark.parametrize("blinded", [False, True], ids=["", "blinded"])
@pytest.mark.parametrize("bug", RULE_BUGS, ids=lambda bug: bug.name)
def test_a_wrong_rule_breaks_its_law(bug: Bug, blinded: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    plant = all_of(bug.plant, blind) if blinded else bug.plant
    must_be_noticed(Bug(bug.name, plant, bug.law), monkeypatch)


@pytest.mark.parametrize("bug", BUGS, ids=lambda bug: bug.name)
def test_a_planted_bug_breaks_its_law(bug: Bug, monkeypatch: pytest.MonkeyPatch) -> None:
    must_be_noticed(bug, monkeypatch)
