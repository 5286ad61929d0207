"""A switch that was left on around the call changes no score, and is left as it was.

A notebook often begins with `torch.set_grad_enabled(False)`, and evaluation code runs under `torch.no_grad()`,
`torch.inference_mode()` or autocast. The entries are those of the law on training mode, and a few more.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import pytorch_influence_functions as ptif
from pytorch_influence_functions.core.errors import IncompleteSolveWarning, SolveFailed
from pytorch_influence_functions.gradients.per_example import Derivatives
from pytorch_influence_functions.problem.problem import sweep
from tests.laws.test_training_mode import ENTRIES, ITERATIVE, OUTSIDE, RETRAINING, case, expected
from tests.oracles import autograd as oracle
from tests.tolerance import gap


@contextmanager
def grad_disabled() -> Iterator[None]:
    """As `torch.set_grad_enabled(False)` at the top of a notebook."""
    torch.set_grad_enabled(False)
    try:
        yield
    finally:
        torch.set_grad_enabled(True)


SWITCHES: dict[str, Callable[[], AbstractContextManager[Any]]] = {
    "no_grad": torch.no_grad,
    "set_grad_enabled(False)": grad_disabled,
    "inference_mode": torch.inference_mode,
    "autocast": lambda: torch.autocast("cpu", dtype=torch.bfloat16),
    "no_grad and autocast": lambda: all_of(torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16)),
}


@contextmanager
def all_of(*contexts: AbstractContextManager[Any]) -> Iterator[None]:
    with contexts[0], all_of(*contexts[1:]) if len(contexts) > 1 else nullcontext():
        yield


def settings() -> tuple[Any, ...]:
    return (
        torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
        torch.is_autocast_enabled("cpu"),
        torch.get_autocast_dtype("cpu"),
        torch.is_autocast_cache_enabled(),
    )


# What takes a second and is switched in one place goes through the hardest switch only.
LONG = (*RETRAINING, *OUTSIDE, *ITERATIVE)
HARDEST = "no_grad and autocast"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("entry", "switch"), [(e, s) for e in ENTRIES for s in SWITCHES if e not in LONG or s == HARDEST]
)
def test_the_scores_are_those_without_the_switch_which_stays(entry: str, switch: str, tmp_path: Path) -> None:
    model, train, queries = case("perceptron")
    with SWITCHES[switch]():
        before = settings()
        values = ENTRIES[entry](model, train, queries, tmp_path / "switched")
        assert settings() == before
    assert settings() == (True, False, False, torch.get_autocast_dtype("cpu"), True)
    torch.testing.assert_close(values, expected(entry, "perceptron"))


def test_results_and_models_made_in_inference_mode_can_be_used_outside_it_and_inside() -> None:
    model, train, queries = case("perceptron")
    plain = ptif.attribute(model, train, queries, method="dual").values
    with torch.inference_mode():
        inner, inner_train, inner_queries = case("perceptron")
        assert all(t.is_inference() for t in [*inner.state_dict().values(), *inner_train])
        attribution = ptif.dual().fit(ptif.Problem(inner, nn.CrossEntropyLoss(), inner_train))
        scores, own = attribution.score(inner_queries), attribution.self_influence()
        spread = ptif.attribute(inner, inner_train, inner_queries, method="ekfac", checkpoints=[inner.state_dict()])
    assert not (scores.values.is_inference() or own.is_inference() or spread.values.is_inference())
    before = {k: v.clone() for k, v in inner.state_dict().items()}
    kept = dict(inner.named_parameters())
    outside = ptif.attribute(inner, inner_train, inner_queries, method="dual").values
    torch.testing.assert_close(scores.values, plain)
    torch.testing.assert_close(outside, plain)
    torch.testing.assert_close(spread.values, ptif.attribute(model, train, queries, method="ekfac").values)
    assert all(torch.equal(v, before[k]) for k, v in inner.state_dict().items())
    assert all(p is kept[k] and p.is_inference() for k, p in inner.named_parameters())


def test_contexts_may_end_in_any_order_as_generators_do() -> None:
    model, train, _ = case("perceptron")
    problem = ptif.Problem(model, nn.CrossEntropyLoss(), train, batch_size=8)
    with torch.no_grad():
        first, second = sweep(problem), sweep(problem)
        next(first), next(second)
        assert torch.is_grad_enabled()
        first.close()
        assert torch.is_grad_enabled()
        second.close()
        assert not torch.is_grad_enabled()


# --------------------------------------------------------------------------- autocast inside forward


BF16 = torch.finfo(torch.bfloat16).eps


class OpensAutocast(nn.Module):
    """A model that runs its layers in bfloat16, as models written for training on GPUs do."""

    def __init__(self, returns: torch.dtype) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(1, 4, 2), nn.Tanh(), nn.Flatten(), nn.Linear(16, 12), nn.LayerNorm(12), nn.PReLU(), nn.Tanh()
        )
        self.head = nn.Linear(12, 3)
        self.returns = returns

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            outputs: Tensor = self.head(self.body(x))
        return outputs.to(self.returns)


def autocast_case(returns: torch.dtype) -> tuple[nn.Module, Any, Any]:
    torch.manual_seed(0)
    x, y = torch.randn(28, 1, 3, 3), torch.arange(28) % 3
    return OpensAutocast(returns), (x[:24], y[:24]), (x[24:], y[24:])


@pytest.mark.parametrize("returns", [torch.bfloat16, torch.float32], ids=str)
def test_gradients_of_a_model_that_opens_autocast_are_its_own_autograd_s(returns: torch.dtype) -> None:
    model, train, queries = autocast_case(returns)

    def loss(outputs: Tensor, targets: Tensor) -> Tensor:
        return nn.functional.cross_entropy(outputs.float(), targets, reduction="none")

    g, q = (oracle.example_gradients(model, loss, *data).double() for data in (train, queries))
    problem = ptif.Problem(model, nn.CrossEntropyLoss(), train)
    routes = Derivatives.of(problem).routes
    assert {routes[k] for k in ("body.0", "body.3", "head")} == {"rule"}, routes
    scores = ptif.methods.grad_dot().fit(problem).score(queries).values
    assert gap(scores, q @ g.T / len(g)) < 4 * BF16
    dual = ptif.dual(damping=1.0).fit(problem).score(queries).values
    fisher = g.T @ g / len(g)
    assert gap(dual, oracle.influence(fisher, 1.0, q, g)) < 8 * BF16


# The linear models that are trained beside the model take no pictures; with the true Hessian no net here is convex.
NOT_PICTURES = (*RETRAINING, "classic, auto_tune")


@pytest.mark.parametrize("returns", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("entry", [entry for entry in ENTRIES if entry not in NOT_PICTURES])
def test_every_entry_takes_a_model_that_opens_autocast(entry: str, returns: torch.dtype, tmp_path: Path) -> None:
    model, train, queries = autocast_case(returns)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", IncompleteSolveWarning)  # products in bfloat16 end where rounding does
        try:
            values = ENTRIES[entry](model, train, queries, tmp_path)
        except SolveFailed:
            assert entry in ("arnoldi", "koh_liang")  # the Hessian of an untrained net is indefinite
            values = torch.zeros(())
    for part in values if isinstance(values, list) else [values]:
        assert bool(torch.isfinite(torch.as_tensor(part)).all())
    assert settings() == (True, False, False, torch.get_autocast_dtype("cpu"), True)
