"""`FromTraining(adam_batch=)`: what Adam divides by is measured exactly, and sizes follow how far training came."""

from __future__ import annotations

import itertools
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

import pytorch_influence_functions as ptif
from pytorch_influence_functions.core.errors import InvalidInput
from pytorch_influence_functions.damping import FromTraining, Relative
from pytorch_influence_functions.damping.adam import adam_denominators
from pytorch_influence_functions.gradients.per_example import Derivatives
from pytorch_influence_functions.gradients.projections import Gaussian

F64 = torch.float64
N, BATCH, RATE, STEPS = 48, 8, 0.02, 24


def data(n: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    x = torch.randn(n, 6, generator=torch.Generator().manual_seed(seed), dtype=F64)
    return x, (x[:, 0] + 0.5 * x[:, 1] + 0.7 * torch.randn(n, generator=torch.Generator().manual_seed(9)) > 0).long()


def network() -> nn.Module:
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 2)).double()


@pytest.mark.parametrize("batch", [1, 2, 7, 50])
def test_it_is_the_root_mean_square_over_all_batches(batch: int) -> None:
    model, (x, y) = network(), data(7)
    found = adam_denominators(Derivatives.of(ptif.Problem(model, ptif.CrossEntropy(), (x, y))), batch)
    parameters = dict(model.named_parameters())
    squares = dict.fromkeys(parameters, 0.0)
    batches = list(itertools.combinations(range(7), min(batch, 7)))
    for ids in batches:
        loss = nn.functional.cross_entropy(model(x[list(ids)]), y[list(ids)])
        for name, gradient in zip(parameters, torch.autograd.grad(loss, list(parameters.values())), strict=True):
            squares[name] += float(gradient.square().sum()) / len(batches)
    for layer in ("0", "2"):
        size = parameters[f"{layer}.weight"].numel() + parameters[f"{layer}.bias"].numel()
        expected = ((squares[f"{layer}.weight"] + squares[f"{layer}.bias"]) / size) ** 0.5
        name = next(k for k in found if k.startswith(layer))
        assert found[name] == pytest.approx(expected, rel=1e-9)


def test_of_much_data_as_much_is_read_as_the_batch_is_large() -> None:
    n, batch = 300, 280
    model, (x, y) = network(), data(n)
    found = adam_denominators(Derivatives.of(ptif.Problem(model, ptif.CrossEntropy(), (x, y))), batch)
    parameters, squares = list(model.parameters()), dict.fromkeys(range(4), 0.0)
    for i in range(n):
        gradients = torch.autograd.grad(nn.functional.cross_entropy(model(x[i : i + 1]), y[i : i + 1]), parameters)
        for k, gradient in enumerate(gradients):
            squares[k] += float(gradient.square().sum()) / n
    means = torch.autograd.grad(nn.functional.cross_entropy(model(x), y), parameters)
    for first, name in ((0, next(iter(found))), (2, list(found)[-1])):
        mean = sum(float(means[k].square().sum()) for k in (first, first + 1))
        v = mean + (squares[first] + squares[first + 1] - mean) * (n - batch) / (batch * (n - 1))
        size = parameters[first].numel() + parameters[first + 1].numel()
        assert found[name] == pytest.approx((v / size) ** 0.5, rel=1e-6)


def test_a_projection_leaves_the_damping_in_units_of_the_parameters() -> None:
    x, y = data(N)
    model = nn.Sequential(nn.Linear(6, 40), nn.Tanh(), nn.Linear(40, 2)).double()
    derivatives = Derivatives.of(ptif.Problem(model, ptif.CrossEntropy(), (x, y)))
    parameters = adam_denominators(derivatives, BATCH)
    sizes = {name: derivatives.space.numel(name) for name in parameters}
    expected = (sum(parameters[k] ** 2 * sizes[k] for k in sizes) / sum(sizes.values())) ** 0.5
    projector = Gaussian(200).projector(derivatives.whole)
    found = adam_denominators(replace(derivatives, projector=projector), BATCH)
    assert list(found.values()) == pytest.approx([expected] * len(found), rel=0.25)


def train(keep: Tensor, x: Tensor, y: Tensor) -> nn.Module:
    """A short training by Adam in which a removed example counts as nothing: all batches are the same."""
    model = network()
    optimizer = torch.optim.Adam(model.parameters(), lr=RATE)
    generator = torch.Generator().manual_seed(1)
    for ids in (b for _ in range(STEPS * BATCH // N) for b in torch.randperm(N, generator=generator).split(BATCH)):
        losses = nn.functional.cross_entropy(model(x[ids]), y[ids], reduction="none")
        optimizer.zero_grad()
        (losses * keep[ids]).mean().backward()
        optimizer.step()
    return model.eval()


def test_sizes_after_a_short_training_by_adam_are_those_of_retraining() -> None:
    (x, y), (xq, yq) = data(N), data(6, seed=5)

    def losses(model: nn.Module) -> Tensor:
        with torch.no_grad():
            return nn.functional.cross_entropy(model(xq), yq, reduction="none")

    everyone = torch.ones(N, dtype=F64)
    model = train(everyone, x, y)
    base = losses(model)
    groups = [torch.randperm(N, generator=torch.Generator().manual_seed(s))[:6] for s in range(24)]
    kept = [everyone.index_fill(0, group, 0.0) for group in groups]
    measured = torch.stack([losses(train(keep, x, y)) - base for keep in kept], 1)
    problem = ptif.Problem(model, ptif.CrossEntropy(), (x, y))

    def slope(damping: ptif.damping.AbstractDamping) -> tuple[float, float]:
        scores = ptif.methods.exact(damping=damping).fit(problem).score((xq, yq)).values.double()
        predicted = torch.stack([scores[:, group].sum(1) for group in groups], 1)
        r = torch.corrcoef(torch.stack([predicted.flatten(), measured.flatten()]))[0, 1]
        return float((predicted * measured).sum() / predicted.square().sum()), float(r)

    followed, share = slope(FromTraining(RATE, STEPS, adam_batch=BATCH)), slope(Relative(0.1))
    assert 0.5 < followed[0] < 1.5 and followed[1] > share[1] + 0.1
    assert share[0] < 0.45


def test_what_it_cannot_do_is_said() -> None:
    with pytest.raises(InvalidInput, match="has both momentum and adam_batch, and momentum is SGD's"):
        FromTraining(0.1, 10, 0.9, adam_batch=8)
    with pytest.raises(InvalidInput, match=r"adam_batch=0\) must be a whole number of at least 1"):
        FromTraining(0.1, 10, adam_batch=0)
    with pytest.raises(InvalidInput, match=r"operator does not give; .* PerDirection\(\) or Absolute\(value\)"):
        FromTraining(0.1, 10, adam_batch=8).of(SimpleNamespace())  # type: ignore[arg-type]
    assert repr(FromTraining(0.1, 10, adam_batch=8)) == "FromTraining(lr=0.1, steps=10, adam_batch=8)"
