"""Guard: whatever happens inside, the model and the random generators are afterwards as they were."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from pytorch_influence_functions.core.errors import UnknownName
from pytorch_influence_functions.problem.model_state import (
    derivative_safe,
    double_backward_safe,
    plain_autograd,
    preserved,
)
from pytorch_influence_functions.problem.random_state import same_rng
from tests.laws.pictures import Reading


def net() -> nn.Sequential:
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(), nn.Linear(4, 2))
    model[2].eval()  # a mixed state, as in fine-tuning with some layers kept in eval
    model[0].weight.requires_grad_(False)
    model[3].weight.grad = torch.ones(2, 4)
    model.register_buffer("hole", torch.tensor([float("nan"), 1.0]))
    return model


def state(model: nn.Module) -> dict[str, Any]:
    return {
        "modes": [m.training for m in model.modules()],
        "requires_grad": [p.requires_grad for p in model.parameters()],
        "grads": [None if p.grad is None else (id(p.grad), p.grad.tolist()) for p in model.parameters()],
        "buffers": [(id(b), str(b.tolist())) for b in model.buffers()],
        "rng": (torch.get_rng_state().tolist(), str(np.random.get_state())),
        "python": Reading(random.getstate()),
    }


def disturb(model: nn.Sequential) -> None:
    model.train().requires_grad_(True)
    model(torch.randn(5, 3)).sum().backward()  # batch statistics, gradients, random numbers
    model[1].running_var = torch.ones(4)  # a buffer replaced, not filled
    np.random.rand()
    random.seed(7)


@pytest.mark.parametrize("error", [None, ValueError, KeyboardInterrupt])
@pytest.mark.parametrize("trainable", [None, ["0.weight"], []])
def test_everything_is_put_back(error: type[BaseException] | None, trainable: list[str] | None) -> None:
    model = net()
    before = state(model)

    def visit() -> None:
        with preserved(model, trainable):
            disturb(model)
            if error is not None:
                raise error

    if error is None:
        visit()
    else:
        with pytest.raises(error):
            visit()
    assert state(model) == before


def test_inside_the_model_is_in_eval_mode_and_only_the_named_are_trainable() -> None:
    model = net()
    with preserved(model, ["0.weight", "3.bias"]):
        assert not any(m.training for m in model.modules())
        assert [n for n, p in model.named_parameters() if p.requires_grad] == ["0.weight", "3.bias"]
        assert all(p.grad is None for p in model.parameters())
    with preserved(model):
        assert not model[0].weight.requires_grad and model[0].bias.requires_grad


def test_train_is_not_called() -> None:
    class Merging(nn.Linear):
        calls = 0

        def train(self, mode: bool = True) -> Merging:
            Merging.calls += 1  # some adapters rewrite their weights here
            return super().train(mode)

    model = Merging(2, 2)
    with preserved(model):
        assert not model.training
    assert model.training and Merging.calls == 0


def test_nested_use_narrows_and_widens_again() -> None:
    model = net()
    before = state(model)
    with preserved(model, ["0.weight"]):
        with preserved(model, ["3.bias"]):
            assert [n for n, p in model.named_parameters() if p.requires_grad] == ["3.bias"]
        with preserved(model):
            assert [n for n, p in model.named_parameters() if p.requires_grad] == ["0.weight"]
        assert [n for n, p in model.named_parameters() if p.requires_grad] == ["0.weight"]
    assert state(model) == before


def test_contexts_may_end_in_any_order() -> None:
    model = net()
    before = state(model)
    first, second = preserved(model, ["0.weight"]), preserved(model, ["3.bias"])
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert not model.training and model[3].bias.requires_grad and not model[0].weight.requires_grad
    disturb(model)
    second.__exit__(None, None, None)
    assert state(model) == before


def test_an_abandoned_generator_puts_everything_back() -> None:
    model = net()
    before = state(model)

    def visits():  # type: ignore[no-untyped-def]
        with preserved(model):
            yield random.seed(7), torch.rand(1)
            yield torch.rand(1)

    running = visits()
    next(running)
    assert not model.training
    running.close()
    assert state(model) == before


def test_a_failed_call_puts_everything_back_though_the_exception_is_kept() -> None:
    model = net()
    before = state(model)

    def visits() -> Iterator[None]:
        with preserved(model), derivative_safe():
            yield

    @plain_autograd()
    def call() -> None:
        still = visits()  # a generator that stands still, held by the frame, which is held by the exception
        next(still)
        disturb(model)
        raise ZeroDivisionError

    try:
        call()
    except ZeroDivisionError as kept:
        assert state(model) == before, kept
    assert state(model) == before


def test_a_failed_call_leaves_alone_what_began_before_it() -> None:
    model = net()
    before = state(model)

    @plain_autograd()
    def call() -> None:
        with preserved(model, ["0.weight"]):
            raise ZeroDivisionError

    with preserved(model, ["3.bias"]):
        with pytest.raises(ZeroDivisionError):
            call()
        assert [n for n, p in model.named_parameters() if p.requires_grad] == ["3.bias"]
        assert not model.training and torch.is_grad_enabled()
    assert state(model) == before


def test_an_unknown_name_changes_nothing() -> None:
    model = net()
    before = state(model)
    with pytest.raises(UnknownName, match=r"no parameter '0.wieght'. Did you mean '0.weight'"):
        preserved(model, ["0.wieght"]).__enter__()
    assert state(model) == before


def test_same_rng_repeats_every_generator() -> None:
    def draw() -> tuple[float, float, float]:
        return torch.rand(1).item(), float(np.random.rand()), random.random()

    with same_rng():
        inside = draw()
    assert draw() == inside != draw()


def flags() -> tuple[Any, ...]:
    cuda = torch.backends.cuda
    return (
        torch.backends.cudnn.enabled,
        torch.backends.mkldnn.enabled,
        torch.backends.mha.get_fastpath_enabled(),
        cuda.flash_sdp_enabled(),
        cuda.mem_efficient_sdp_enabled(),
        cuda.math_sdp_enabled(),
    )


def test_kernel_settings_come_back_after_an_exception() -> None:
    before = flags()
    with pytest.raises(ZeroDivisionError), double_backward_safe():
        assert flags() == (False, False, False, False, False, True)
        raise ZeroDivisionError
    assert flags() == before


def test_kernel_settings_survive_contexts_that_end_in_any_order() -> None:
    before = flags()
    first, second = double_backward_safe(), double_backward_safe()
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert flags() == (False, False, False, False, False, True)
    second.__exit__(None, None, None)
    assert flags() == before


def test_cudnn_stays_on_without_recurrent_layers() -> None:
    before = flags()
    with derivative_safe(nn.Conv2d(1, 1, 1)):
        assert torch.backends.cudnn.enabled == before[0]
    with derivative_safe(nn.Sequential(nn.GRU(1, 1))):
        assert not torch.backends.cudnn.enabled
    assert flags() == before


def _attention(q: Tensor) -> Tensor:
    return torch.nn.functional.scaled_dot_product_attention(q, q, q).sum()


def test_attention_and_lstm_can_be_differentiated_twice_and_forward() -> None:
    q = torch.randn(1, 2, 3, 4, requires_grad=True)
    lstm = nn.LSTM(3, 4).eval()
    x = torch.randn(5, 2, 3)
    weights = dict(lstm.named_parameters())

    def run(w: dict[str, Tensor]) -> Tensor:
        return torch.func.functional_call(lstm, w, (x,))[0].sum()

    with double_backward_safe():
        (slope,) = torch.autograd.grad(_attention(q), q, create_graph=True)
        (curve,) = torch.autograd.grad(slope.square().sum(), q)
        assert torch.isfinite(curve).all() and curve.abs().sum() > 0
        _, change = torch.func.jvp(run, (weights,), (weights,))
    slopes = torch.autograd.grad(run(weights), list(weights.values()))
    pairs = zip(slopes, weights.values(), strict=True)
    assert change.item() == pytest.approx(sum((g * w).sum().item() for g, w in pairs), rel=1e-4)
