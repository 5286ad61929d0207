"""Logits as large as a vocabulary: taken a few examples at a time, with the same losses, slopes, draws and squares."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import pytorch_influence_functions as ptif
from pytorch_influence_functions.curvature import EKFAC, EmpiricalFisher
from pytorch_influence_functions.curvature.base import Budget, Form
from pytorch_influence_functions.curvature.kronecker import moments
from pytorch_influence_functions.gradients.per_example import Derivatives, slopes
from pytorch_influence_functions.linalg import chunks
from pytorch_influence_functions.linalg.kronecker import Kronecker
from pytorch_influence_functions.objectives.draws import Keyed
from pytorch_influence_functions.objectives.softmax import _softmax_sample
from tests.tiny_lm import VOCABULARY, TinyLM, loader, texts
from tests.tolerance import gap

N, OBJECTIVE = 6, ptif.TokenCrossEntropy(shift=True)


def language_model(tied: bool = False, **options: Any) -> TinyLM:
    torch.manual_seed(0)
    return TinyLM(tied=tied, **options).double()


def one_batch() -> tuple[dict[str, Tensor], Tensor]:
    batch = next(iter(loader(texts(N), batch_size=N)))
    with torch.no_grad():
        return batch, OBJECTIVE.outputs(language_model(), batch)


@pytest.fixture
def sizes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Chunks of two examples' logits; what is returned fills with the size of the outputs of every loss."""
    _, outputs = one_batch()
    monkeypatch.setattr(chunks, "CHUNK_NUMBERS", 2 * outputs[0].numel())
    taken: list[int] = []
    taking = ptif.TokenCrossEntropy.losses_and_slope

    def noted(self: ptif.TokenCrossEntropy, outputs: Tensor, batch: Any) -> tuple[Tensor, Tensor]:
        taken.append(len(outputs))
        return taking(self, outputs, batch)

    monkeypatch.setattr(ptif.TokenCrossEntropy, "losses_and_slope", noted)
    return taken


def test_slopes_of_large_logits_are_taken_a_few_examples_at_a_time(sizes: list[int]) -> None:
    """Reference: autograd over the whole batch."""
    batch, outputs = one_batch()
    leaf = outputs.clone().requires_grad_()
    expected = OBJECTIVE.losses(leaf, batch)
    (slope,) = torch.autograd.grad(expected.sum(), leaf)
    sizes.clear()
    values, chunked = slopes(OBJECTIVE, outputs, batch, torch.arange(N))
    assert sizes == [2, 2, 2]
    torch.testing.assert_close(values, expected.detach())
    torch.testing.assert_close(chunked, slope)


@pytest.mark.parametrize(("average", "smoothing"), [(True, 0.0), (False, 0.0), (False, 0.2)])
def test_the_slope_in_closed_form_is_autograds(average: bool, smoothing: float) -> None:
    objective = ptif.TokenCrossEntropy(average=average, shift=True, label_smoothing=smoothing)
    batch, outputs = one_batch()
    leaf = outputs.clone().requires_grad_()
    expected = objective.losses(leaf, batch)
    losses, slope = objective.losses_and_slope(outputs, batch)
    torch.testing.assert_close(losses, expected.detach())
    torch.testing.assert_close(slope, torch.autograd.grad(expected.sum(), leaf)[0])


@pytest.mark.parametrize("classes", [1024, 1500, 4099])
def test_of_many_classes_the_drawn_one_is_where_the_running_sum_passes_the_level(classes: int) -> None:
    generator = torch.Generator().manual_seed(0)
    p = (3 * torch.randn(50, 8, classes, generator=generator, dtype=torch.float64)).softmax(-1)
    p[0, 0, -40:] = 0.0  # what is left out at the end
    level = torch.rand(50, 8, generator=generator, dtype=torch.float64)
    level[0], level[1] = 1.0 - 1e-12, 1e-12
    running = p.cumsum(-1)
    expected = (running < level[..., None] * running[..., -1:]).sum(-1)
    assert torch.equal(_softmax_sample(p, level), expected)


def test_labels_drawn_a_few_examples_at_a_time_are_those_drawn_together(monkeypatch: pytest.MonkeyPatch) -> None:
    batch, outputs = one_batch()
    key = Keyed(torch.arange(N), 3)
    together = OBJECTIVE.sample_cotangent(outputs, batch, key)
    monkeypatch.setattr(chunks, "CHUNK_NUMBERS", outputs[0].numel())
    torch.testing.assert_close(OBJECTIVE.sample_cotangent(outputs, batch, key), together)


def squares(model: TinyLM, curvature: EKFAC) -> dict[str, Tensor]:
    derivatives = Derivatives.of(ptif.Problem(model, OBJECTIVE, loader(texts(8))))
    operator = curvature.of(derivatives, Form.SPECTRAL, Budget())
    assert isinstance(operator, Kronecker)
    return {name: block.values for name, block in operator.blocks.items()}


@pytest.mark.parametrize("tied", [False, True])
def test_squares_added_example_by_example_are_those_of_gradients_written_out(
    tied: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The squares of a tied embedding are checked against autograd in test_large_vocabularies.py."""
    model, curvature = language_model(tied), EKFAC(EmpiricalFisher(), largest=VOCABULARY - 1)
    expected = squares(model, curvature)
    monkeypatch.setattr(moments, "IN_TURN", 0)
    monkeypatch.setattr(moments, "_CACHED", 20)  # two rows of eight at a time
    for name, values in squares(model, curvature).items():
        torch.testing.assert_close(values, expected[name], rtol=1e-10, atol=1e-14)


# --------------------------------------------------------------------------- checkpointed activations, bfloat16


class Checkpointed(nn.Module):
    """A block whose activations are computed again on the way back."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block

    def forward(self, x: Tensor, seen: Tensor) -> Any:
        return checkpoint(self.block, x, seen, use_reentrant=False)


@pytest.mark.parametrize("method", [ptif.ekfac, ptif.dual], ids=["ekfac", "dual"])
def test_checkpointed_activations_give_the_same_scores(method: Any) -> None:
    def scores(model: TinyLM) -> Tensor:
        problem = ptif.Problem(model, OBJECTIVE, loader(texts(8)))
        return method().fit(problem).score(loader(texts(2, seed=1))).values

    expected, model = scores(language_model()), language_model()
    for k, block in enumerate(model.blocks):
        model.blocks[k] = Checkpointed(block)
    assert gap(scores(model), expected) < 1e-9


def test_bfloat16_leaves_two_digits_of_a_language_model_s_scores() -> None:
    def scores(**options: Any) -> Tensor:
        problem = ptif.Problem(language_model(width=32).float(), OBJECTIVE, loader(texts(12)))
        return ptif.ekfac().with_options(**options).fit(problem).score(loader(texts(3, seed=1))).values

    assert gap(scores(precision="bf16"), scores()) < 0.1
