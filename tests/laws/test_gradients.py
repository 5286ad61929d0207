"""Law: every route of every rule equals one-example autograd in float64.

A rule that is wrong is noticed by the engine, which sets it aside and takes another way to the right numbers. A law on
numbers alone would therefore pass for any rule; so the rows must come from the rule, unless the case says otherwise.
"""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pytorch_influence_functions.core.errors import InvalidInput, NonFinite
from pytorch_influence_functions.gradients.layer_rules import RULES, find_rule, transposed_linear
from pytorch_influence_functions.gradients.per_example import Derivatives
from pytorch_influence_functions.linalg.blocks import Conv, Dense, Indexed, Outer, Sum
from pytorch_influence_functions.linalg.rows import Route, Rows
from pytorch_influence_functions.objectives import CrossEntropy
from pytorch_influence_functions.problem.problem import Problem
from tests.laws.zoo import CASES, Case, TimeFirst, build, named
from tests.oracles.autograd import example_gradients

TIGHT = 1e-10

pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same':UserWarning")


def cross_entropy(outputs: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(outputs, targets, reduction="none")


def problem_of(model: nn.Module, x: Any, y: Any, **kw: Any) -> Problem:
    return Problem(model, CrossEntropy(), (x, y), **kw)


def in_parameter_order(derivatives: Derivatives, rows: Rows) -> Tensor:
    """Rows as [n, P] in the order of `named_parameters`, which is the twin's."""
    values = derivatives.space.to_parameters(rows)
    names = [k for k, p in derivatives.problem.model.named_parameters() if p.requires_grad]
    return torch.cat([values[k].flatten(1) for k in names], 1)


def all_rows(derivatives: Derivatives) -> Tensor:
    return torch.cat([in_parameter_order(derivatives, slab.rows) for slab in derivatives.stream()])


def assert_close(a: Tensor, b: Tensor, tolerance: float = TIGHT) -> None:
    assert a.shape == b.shape
    assert float((a - b).norm()) <= tolerance * float(b.norm()) + 1e-14


def assert_by_rule(case: Case, derivatives: Derivatives) -> None:
    """Every block is taken by a layer rule, but for those that the case names."""
    for block, route in derivatives.routes.items():
        if case.covers(block):
            assert route == "rule", f"{block!r} has a rule that is missing or wrong: its rows came by {route}"
        else:
            assert route != "rule", f"{block!r} has a rule now: take it out of `without_rule` of case {case.name!r}"


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_rows_equal_autograd(case: Case) -> None:
    model, x, y = build(case)
    want = example_gradients(model, cross_entropy, x, y)
    for batch_size in (6, 4, 1):
        derivatives = Derivatives.of(problem_of(model, x, y, batch_size=batch_size))
        assert_by_rule(case, derivatives)
        assert_close(all_rows(derivatives), want)


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_every_route_gives_the_same_inner_products(case: Case) -> None:
    model, x, y = build(case)
    derivatives = Derivatives.of(problem_of(model, x, y))
    rows = next(derivatives.stream()).rows
    flat = rows.flat()
    want = flat @ flat.T
    dense = derivatives.space.rows(torch.randn(5, derivatives.space.size, dtype=torch.float64))
    for route in (Route.AUTO, Route.GHOST, Route.APPLY, Route.MATERIALISE):
        assert_close(rows.inner(rows, route), want)
        assert_close(rows.inner(rows.dense(), route), want)
        assert_close(rows.dense().inner(rows, route), want)
        assert_close(rows.inner(dense, route), flat @ dense.flat().T)
        assert_close(dense.inner(rows, route), dense.flat() @ flat.T)
    weights = torch.randn(4, len(rows), dtype=torch.float64)
    assert_close(rows.combine(weights).flat(), weights @ flat)
    assert_close(rows.squared_norms(), flat.square().sum(1))
    assert_close(rows.take(torch.tensor([4, 1])).flat(), flat[[4, 1]])
    assert_close(rows.scaled(torch.arange(6.0).double()).flat(), torch.arange(6.0).double()[:, None] * flat)
    assert_close(rows.compact().flat(), flat)
    assert_close(Rows.cat([rows, rows]).flat(), torch.cat([flat, flat]))


@pytest.mark.parametrize("route", [Route.VMAP, Route.LOOP])
@pytest.mark.parametrize("name", ["mlp", "conv2d stride", "tied", "lstm", "encoder layer"])
def test_forced_fallbacks_equal_autograd(name: str, route: Route) -> None:
    model, x, y = build(named(name))
    derivatives = Derivatives.of(problem_of(model, x, y), route)
    assert not derivatives.layers
    assert_close(all_rows(derivatives), example_gradients(model, cross_entropy, x, y))


def test_every_rule_is_used_by_a_case() -> None:
    layers = [
        module
        for case in CASES
        for name, module in build(case)[0].named_modules()
        if find_rule(module) is not None and case.covers(name)
    ]
    assert set(RULES) - {type(module) for module in layers} == set()
    assert {find_rule(module) for module in layers} == {*RULES.values(), transposed_linear}


FORMS = {
    "mlp": Outer,
    "positions": Outer,
    "conv2d stride": Conv,
    "depthwise": Dense,
    "layer norm": Dense,
    "time first": Outer,
    "folded": Outer,
    "embedding": Indexed,
    "tied": Sum,
}


@pytest.mark.parametrize("name", FORMS)
def test_rows_have_their_cheapest_form(name: str) -> None:
    model, x, y = build(named(name))
    kinds = {type(b) for b in next(Derivatives.of(problem_of(model, x, y)).stream()).rows.blocks.values()}
    assert FORMS[name] in kinds


@pytest.mark.parametrize("case", [c for c in CASES if c.without_rule], ids=lambda c: c.name)
def test_what_has_no_rule_is_named_in_one_log_line(case: Case, caplog: pytest.LogCaptureFixture) -> None:
    model, x, y = build(case)
    with caplog.at_level(logging.INFO, "pytorch_influence_functions"):
        derivatives = Derivatives.of(problem_of(model, x, y))
    without = [block for block, route in derivatives.routes.items() if route != "rule"]
    lines = [r.getMessage() for r in caplog.records if "No layer rule" in r.getMessage()]
    assert without and lines
    assert all(any(block in line for line in lines) for block in without)


def test_examples_on_axis_one_are_found_even_when_the_sequence_is_as_long_as_the_batch() -> None:
    torch.manual_seed(0)
    model, x, y = TimeFirst().double().eval(), torch.randn(64, 64, 4).double(), torch.randint(0, 3, (64,))
    derivatives = Derivatives.of(problem_of(model, x, y, batch_size=64))
    assert set(derivatives.routes.values()) == {"rule"}
    assert_close(all_rows(derivatives), example_gradients(model, cross_entropy, x, y))


def test_a_user_hook_that_changes_the_output_is_respected() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3)).double()
    model[0].register_forward_hook(lambda m, a, out: 3 * out)
    x, y = torch.randn(6, 5).double(), torch.randint(0, 3, (6,))
    assert_close(all_rows(Derivatives.of(problem_of(model, x, y))), example_gradients(model, cross_entropy, x, y))


def test_frozen_and_unused_parameters() -> None:
    torch.manual_seed(0)
    model = nn.ModuleDict({"used": nn.Linear(5, 3), "unused": nn.Linear(2, 2)}).double()
    model["used"].bias.requires_grad_(False)

    class Wrapped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.parts = model

        def forward(self, x: Tensor) -> Tensor:
            return self.parts["used"](x)

    net, x, y = Wrapped().eval(), torch.randn(6, 5).double(), torch.randint(0, 3, (6,))
    derivatives = Derivatives.of(problem_of(net, x, y))
    assert "parts.used.bias" not in derivatives.space.names
    rows = all_rows(derivatives)
    assert_close(rows, example_gradients(net, cross_entropy, x, y))
    assert rows.shape[1] == 15 + 6 and float(rows[:, 15:].abs().max()) == 0.0


@pytest.mark.parametrize("parameters", ["2", "*.bias", "0.weight", ["0.bias", "2.weight"]])
def test_a_selection_gives_the_same_numbers_as_all(parameters: Any) -> None:
    model, x, y = build(CASES[0])
    everything = Derivatives.of(problem_of(model, x, y))
    full = everything.space.to_parameters(next(everything.stream()).rows)
    some = Derivatives.of(problem_of(model, x, y, parameters=parameters))
    part = some.space.to_parameters(next(some.stream()).rows)
    assert part and set(part) < set(full)
    for name, value in part.items():
        assert_close(value, full[name])


@pytest.mark.parametrize("case", [c for c in CASES if not c.without_rule], ids=lambda c: c.name)
def test_weights_alone_and_biases_alone_are_taken_by_rule(case: Case) -> None:
    """A rule is asked for one part of a layer where only that part takes part."""
    model, x, y = build(case)
    everything = Derivatives.of(problem_of(model, x, y))
    full = everything.space.to_parameters(next(everything.stream()).rows)
    for part in ("weight", "bias"):
        names = [name for name in full if name.endswith(part)]
        if not names:
            continue
        some = Derivatives.of(problem_of(model, x, y, parameters=names))
        assert_by_rule(case, some)
        for name, value in some.space.to_parameters(next(some.stream()).rows).items():
            assert_close(value, full[name])


def test_batch_statistics_are_refused() -> None:
    model = nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4, track_running_stats=False), nn.Linear(4, 3)).double()
    conv = nn.Sequential(nn.Conv1d(2, 3, 2), nn.BatchNorm1d(3, track_running_stats=False), nn.Flatten()).double()
    x, y = torch.randn(6, 5).double(), torch.randint(0, 3, (6,))
    with pytest.raises(InvalidInput, match=r"not on one alone .*use running statistics or GroupNorm"):
        Derivatives.of(problem_of(model, x, y))
    with pytest.raises(InvalidInput, match=r"changes by .* with the examples beside it"):
        Derivatives.of(problem_of(conv, torch.randn(6, 2, 4).double(), y))


def test_a_nan_loss_names_its_indices() -> None:
    model = nn.Linear(2, 2).double()
    x = torch.tensor([[1.0, 2.0], [1e308, 1e308], [0.0, 1.0]], dtype=torch.float64)
    with torch.no_grad():
        model.weight.fill_(10.0)
    with pytest.raises(NonFinite, match=r"indices 1;"):
        list(Derivatives.of(problem_of(model, x[[0, 1, 2]], torch.tensor([0, 1, 0]), batch_size=1)).stream())


def test_outputs_without_an_example_axis_are_refused() -> None:
    class Mean(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(5, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x).mean(0)

    with pytest.raises(InvalidInput, match="first axis must run over the examples"):
        Derivatives.of(problem_of(Mean(), torch.randn(6, 5), torch.randint(0, 3, (6,))))


@pytest.mark.parametrize("name", ["mlp", "conv2d stride", "batch norm 2d", "tied", "lstm", "encoder layer"])
def test_the_model_is_left_as_it_was(name: str) -> None:
    model, x, y = build(named(name))
    model.train()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    random = torch.get_rng_state()
    list(Derivatives.of(problem_of(model, x, y)).stream())
    assert all(m.training for m in model.modules())
    assert all(p.grad is None and p.requires_grad for p in model.parameters())
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules() if "rametriz" not in str(type(m)))
    assert torch.equal(random, torch.get_rng_state())
