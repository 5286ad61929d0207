"""My loss compares the examples of a batch with each other, or my model draws noise in forward."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import pytorch_influence_functions as ptif
from pytorch_influence_functions.core.errors import InvalidInput
from pytorch_influence_functions.core.indexing import spread_sample
from pytorch_influence_functions.gradients.per_example import Derivatives
from pytorch_influence_functions.gradients.products import Products, PushforwardMode
from pytorch_influence_functions.objectives.base import AbstractObjective, call_model, inputs_and_targets
from pytorch_influence_functions.objectives.convert import as_objective
from tests.oracles.autograd import example_gradients
from tests.tolerance import gap, rounding

N = 24
X, Y = torch.linspace(-3, 3, 4 * N).reshape(N, 4).sin(), torch.arange(N) % 3
METHODS = ["grad_dot", "grad_cos", "dual"]


def nt_xent(z: Tensor, other: Tensor) -> Tensor:
    """Each example against its second view, the other examples of the batch as negatives."""
    similarity = F.normalize(z, dim=1) @ F.normalize(other, dim=1).T / 0.5
    return F.cross_entropy(similarity, torch.arange(len(z)))


def sup_con(z: Tensor, y: Tensor) -> Tensor:
    z = F.normalize(z, dim=1)
    itself = torch.eye(len(z), dtype=torch.bool)
    logp = (z @ z.T).masked_fill(itself, -1e9).log_softmax(1)
    same = (y[:, None] == y) & ~itself
    return -(logp * same).sum(1).div(same.sum(1).clamp_min(1)).mean()


def per_example_nt_xent(z: Tensor, other: Tensor) -> Tensor:
    similarity = F.normalize(z, dim=1) @ F.normalize(other, dim=1).T / 0.5
    return F.cross_entropy(similarity, torch.arange(len(z)), reduction="none")


def weighted_mean(f: Tensor, y: Tensor) -> Tensor:
    """torch's mean divides by the weights of the batch: the first pair has equal labels only by chance."""
    return F.cross_entropy(f, y, torch.tensor([1.0, 5.0, 25.0]))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    ("loss", "targets", "message"),
    [
        (
            nt_xent,
            X.flip(1)[:, :3].contiguous(),
            "nt_xent of two examples is neither .*make one item of the dataset a whole",
        ),
        (sup_con, Y, "sup_con of examples .* together is .* which examples share a batch"),
        (per_example_nt_xent, X.flip(1)[:, :3].contiguous(), "per_example_nt_xent"),
        (weighted_mean, torch.cat([Y[[0, 3]], Y[1:3], Y[4:]]), "weighted_mean"),
    ],
    ids=["nt_xent", "sup_con", "per example", "weighted"],
)
def test_a_loss_over_the_batch_is_refused(loss: Any, targets: Tensor, message: str, method: str) -> None:
    model = nn.Linear(4, 3)
    with pytest.raises(InvalidInput, match=message):
        ptif.attribute(model, (X, targets), (X[:2], targets[:2]), loss=loss, method=method)


WEIGHT = torch.tensor([1.0, 50.0])
RARE = torch.zeros(200).long().index_fill(0, torch.tensor([133]), 1)
MARKED = (
    torch.linspace(-2, 2, 800)
    .reshape(200, 4)
    .cos()
    .index_put((torch.tensor(133), torch.arange(3)), torch.tensor(-99.0))
)
MANY = torch.linspace(-9, 9, 800).reshape(200, 4).sin()


def rare_weight(f: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(f, y, WEIGHT)


def mean_of_marked(f: Tensor, y: Tensor) -> Tensor:
    return F.mse_loss(f[y != -99], y[y != -99])


@pytest.mark.parametrize("method", ["grad_dot", "dual", "ekfac", ptif.gauss_newton()], ids=str)
@pytest.mark.parametrize("in_memory", [True, False], ids=["tensors", "items"])
@pytest.mark.parametrize(("loss", "targets"), [(rare_weight, RARE), (mean_of_marked, MARKED)], ids=["class", "mark"])
def test_what_only_one_example_shows_is_met_in_a_pass(loss: Any, targets: Tensor, in_memory: bool, method: Any) -> None:
    """None of the examples that are looked at first has the rare class, or a mark."""
    assert 133 not in spread_sample(len(MANY), 16)
    model = nn.Linear(4, 2 if targets is RARE else 4)
    train = (MANY, targets) if in_memory else list(zip(MANY, targets, strict=True))
    with pytest.raises(InvalidInput, match=r"of examples .* together is .* which examples share a batch"):
        ptif.attribute(model, train, (MANY[:1], targets[:1]), loss=loss, method=method)


def test_forward_mode_meets_it_too() -> None:
    """Where no gradient of an example is written out, in either of the two modes."""
    problem = ptif.Problem(nn.Linear(4, 4), mean_of_marked, list(zip(MANY, MARKED, strict=True)))
    derivatives = Derivatives.of(problem)
    batch, ids = (MANY[100:], MARKED[100:]), torch.arange(100, 200)
    along = derivatives.space.rows(torch.ones(1, derivatives.space.size))
    for mode in (PushforwardMode.FORWARD, PushforwardMode.REVERSE):
        with pytest.raises(InvalidInput, match=r"examples 132, 133, .* together"):
            Products(derivatives, mode).losses_along(ids, batch, along)


@pytest.mark.parametrize("method", METHODS)
def test_settings_in_a_partial_are_those_of_the_module(method: str) -> None:
    torch.manual_seed(0)
    model, yes = nn.Linear(4, 2), F.one_hot(RARE, 2).float()
    pairs = [
        (
            partial(F.cross_entropy, weight=WEIGHT, label_smoothing=0.1),
            nn.CrossEntropyLoss(WEIGHT, label_smoothing=0.1),
            RARE,
        ),
        (partial(F.binary_cross_entropy_with_logits, pos_weight=WEIGHT), nn.BCEWithLogitsLoss(pos_weight=WEIGHT), yes),
        (partial(F.mse_loss, reduction="sum"), nn.MSELoss(reduction="sum"), yes),
    ]
    for written, module, y in pairs:
        assert repr(as_objective(written)) == repr(as_objective(module))
        values = [
            ptif.attribute(model, (MANY, y), (MANY[130:134], y[130:134]), loss=loss, method=method).values
            for loss in (written, module)
        ]
        assert gap(*values) < rounding(torch.float32)


def test_a_loss_whose_forward_was_replaced_is_taken_as_it_is_called() -> None:
    replaced, hooked, y = nn.MSELoss(), nn.MSELoss(), MANY.flip(1)
    replaced.forward = lambda f, t: (f - t).abs().pow(1.5).mean()  # type: ignore[method-assign]
    hooked.register_forward_hook(lambda _, __, value: 3 * value)
    model = nn.Linear(4, 4)
    for loss in (replaced, hooked):
        values = ptif.attribute(model, (MANY, y), (MANY[:2], y[:2]), loss=loss, method="grad_dot").values
        rows = example_gradients(model, loss, MANY, y)
        assert gap(values, rows[:2] @ rows.T / len(MANY)) < rounding(torch.float32)


def test_an_axis_that_only_outputs_or_targets_have_is_named_and_the_advice_is_the_loss() -> None:
    torch.manual_seed(0)
    model, flat, y = nn.Linear(4, 1), nn.Sequential(nn.Linear(4, 1), nn.Flatten(0)), MANY.sum(1)

    def written(f: Tensor, t: Tensor) -> Tensor:
        return (f - t).square().mean()

    cases: list[Any] = [
        (model, y, lambda f, t: written(f.squeeze(-1), t), "outputs"),
        (flat, y[:, None], lambda f, t: written(f, t.squeeze(-1)), "targets"),
    ]
    for net, targets, advised, which in cases:
        data = (MANY, targets), (MANY[:2], targets[:2])
        with pytest.raises(InvalidInput, match=rf"broadcast to \(2, 2\), .* write {which}\.squeeze\(-1\)"):
            ptif.attribute(net, *data, loss=written, method="grad_dot")
        values = ptif.attribute(net, *data, loss=advised, method="grad_dot").values
        rows = example_gradients(net, advised, MANY, targets)
        assert gap(values, rows[:2] @ rows.T / len(MANY)) < rounding(torch.float32)


def test_a_group_as_one_item_is_accepted() -> None:
    """The advice: one item of the dataset is a whole group, so that its loss is its own."""
    groups, views = X.reshape(6, 4, 4), X.flip(1).reshape(6, 4, 4)

    def loss(z: Tensor, other: Tensor) -> Tensor:
        return torch.stack([nt_xent(a, b) for a, b in zip(z, other, strict=True)])

    model = nn.Linear(4, 4)
    scores = ptif.attribute(model, (groups, views), (groups[:2], views[:2]), loss=loss, method="grad_dot")
    rows = []
    for x, other in zip(groups, views, strict=True):
        model.zero_grad()
        nt_xent(model(x), other).backward()
        rows.append(torch.cat([p.grad.flatten().clone() for p in model.parameters() if p.grad is not None]))
    oracle = torch.stack(rows)
    assert gap(scores.values, oracle[:2] @ oracle.T / 6) < rounding(torch.float32)


@dataclass(frozen=True, eq=False, repr=False)
class OwnObjective(AbstractObjective):
    lower_is_better: ClassVar[bool] = True

    def outputs(self, model: Any, batch: Any) -> Tensor:
        args, kwargs, _ = inputs_and_targets(batch)
        return call_model(model, args, kwargs)

    def losses(self, outputs: Tensor, batch: Any) -> Tensor:
        return per_example_nt_xent(outputs, inputs_and_targets(batch)[2])

    def check(self, outputs: Tensor, batch: Any, ids: Tensor) -> None: ...


def test_an_objective_of_ones_own_over_the_batch_is_refused() -> None:
    y = X.flip(1)[:, :3].contiguous()
    with pytest.raises(InvalidInput, match=r"The loss OwnObjective of one example changes by .* beside it"):
        ptif.attribute(nn.Linear(4, 3), (X, y), (X[:2], y[:2]), loss=OwnObjective(), method="grad_dot")


def test_a_loss_that_is_zero_everywhere_is_refused() -> None:
    def silent(f: Tensor, y: Tensor) -> Tensor:
        return ((f - f.mean(0)) ** 2).sum() * 0.0

    with pytest.raises(InvalidInput, match="silent is exactly 0, with no slope, for each of 24 examples"):
        ptif.attribute(nn.Linear(4, 3), (X, Y), (X[:2], Y[:2]), loss=silent, method="grad_dot")


def hinge(f: Tensor, y: Tensor) -> Tensor:
    return F.multi_margin_loss(f, y)


def test_a_loss_that_is_zero_for_most_examples_is_accepted() -> None:
    """A hinge loss is 0 where the margin is kept: one example that pays is enough."""
    x = F.one_hot(Y, 3).float() * 9
    x[7] = 0
    scores = ptif.attribute(scaled(), (x, Y), (x, Y), loss=hinge, method="grad_dot")
    assert scores.values[7, 7] > 0 and int(scores.values.count_nonzero()) >= 1


def scaled() -> nn.Module:
    model = nn.Linear(3, 3)
    with torch.no_grad():
        model.weight.copy_(torch.eye(3))
        model.bias.zero_()
    return model


# --------------------------------------------------------------------------- random forward


class Noisy(nn.Module):
    def __init__(self, only_in_training: bool = False) -> None:
        super().__init__()
        self.layer, self.only_in_training = nn.Linear(4, 3), only_in_training

    def forward(self, x: Tensor, noise: Tensor | None = None) -> Tensor:
        if noise is None:
            silent = self.only_in_training and not self.training
            noise = torch.zeros_like(x) if silent else torch.randn_like(x)
        output: Tensor = self.layer(x + noise)
        return output


@pytest.mark.parametrize("loss", [nn.CrossEntropyLoss(), lambda f, y: F.cross_entropy(f, y)])
def test_noise_in_forward_is_named(loss: Any) -> None:
    model = Noisy()
    state = torch.get_rng_state()
    with pytest.raises(InvalidInput, match=r"different outputs for the same batch twice.*once per example.*training"):
        ptif.attribute(model, (X, Y), (X[:2], Y[:2]), loss=loss, method="grad_dot")
    assert torch.equal(torch.get_rng_state(), state)


def test_both_pieces_of_advice_for_noise_work() -> None:
    noise = torch.randn(N, 4)
    model = Noisy()
    drawn = ptif.attribute(
        model, (X, noise, Y), (X[:2], noise[:2], Y[:2]), loss=nn.CrossEntropyLoss(), method="grad_dot"
    )
    fixed = X + noise
    plain = ptif.attribute(model.layer, (fixed, Y), (fixed[:2], Y[:2]), loss=nn.CrossEntropyLoss(), method="grad_dot")
    assert gap(drawn.values, plain.values) < rounding(torch.float32)
    assert ptif.attribute(Noisy(True), (X, Y), (X[:2], Y[:2]), loss=nn.CrossEntropyLoss()).values.any()


class Diffusion(nn.Module):
    """Predicts the noise that it adds itself, unless time and noise are given; returns both."""

    def __init__(self, seeded: bool = False) -> None:
        super().__init__()
        self.net, self.seeded = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 4)), seeded

    def forward(self, x: Tensor, time: Tensor | None = None, noise: Tensor | None = None) -> Any:
        generator = torch.Generator().manual_seed(0) if self.seeded else None
        time = torch.rand(len(x), generator=generator) if time is None else time
        noise = torch.randn(x.shape, generator=generator) if noise is None else noise
        mixed = (1 - time[:, None]).sqrt() * x + time[:, None].sqrt() * noise
        return {"predicted": self.net(torch.cat([mixed, time[:, None]], 1)), "noise": noise}


def denoise(out: Any, _: Any) -> Tensor:
    return F.mse_loss(out["predicted"], out["noise"])


@pytest.mark.parametrize(
    ("seeded", "message"),
    [
        (False, r"different outputs for the same batch twice.*draw noise once per example in the dataset"),
        (
            True,
            r"examples beside it .* generator that forward seeds anew; .* draw noise once per example in the dataset",
        ),
    ],
)
def test_a_diffusion_model_that_draws_in_forward_is_told_to_draw_in_the_dataset(seeded: bool, message: str) -> None:
    with pytest.raises(InvalidInput, match=message):
        ptif.attribute(Diffusion(seeded), (X, Y), (X[:2], Y[:2]), loss=denoise, method="grad_dot")


@pytest.mark.parametrize("method", ["grad_dot", "dual"])
def test_a_diffusion_model_with_one_draw_per_example_in_the_dataset_is_right(method: str) -> None:
    torch.manual_seed(0)
    model, generator = Diffusion(), torch.Generator().manual_seed(1)
    draws = (torch.rand(N, generator=generator), torch.randn(X.shape, generator=generator))
    queries = (X[:3], *(d[:3] for d in draws), Y[:3])
    scores = ptif.attribute(model, (X, *draws, Y), queries, loss=denoise, method=method, damping=0.1)
    rows = []
    for i in range(N):
        model.zero_grad()
        denoise(model(X[i : i + 1], *(d[i : i + 1] for d in draws)), None).backward()
        rows.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]).double())
    g = torch.stack(rows)
    fisher = g.T @ g / N * (method == "dual")
    damped = fisher + (0.1 if method == "dual" else 1.1) * torch.eye(len(fisher), dtype=torch.float64)
    assert gap(scores.values, g[:3] @ torch.linalg.solve(damped, g.T) / N) < rounding(torch.float32, 100)


class Standardised(nn.Module):
    def __init__(self, unbiased: bool) -> None:
        super().__init__()
        self.layer, self.unbiased = nn.Linear(4, 3), unbiased

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self.layer((x - x.mean(0)) / (x.std(0, unbiased=self.unbiased) + 1e-5))
        return output


@pytest.mark.filterwarnings("ignore:.*degrees of freedom")
@pytest.mark.parametrize("unbiased", [True, False])
def test_statistics_of_the_batch_are_refused_also_where_one_example_has_none(unbiased: bool) -> None:
    """torch's standard deviation of one example is NaN, which is no smaller than any bound."""
    with pytest.raises(InvalidInput, match=r"output for one example changes .* with the examples beside it .*std\(0\)"):
        ptif.attribute(Standardised(unbiased), (X, Y), (X[:2], Y[:2]), loss=nn.CrossEntropyLoss(), method="grad_dot")

    def collate(items: list[Any]) -> Any:
        x, y = torch.utils.data.default_collate(items)
        return (x - x.mean(0)) / (x.std(0, unbiased=unbiased) + 1e-5), y

    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(X, Y), 8, collate_fn=collate)
    with pytest.raises(InvalidInput, match=r"output for one example changes .* collate function or the model"):
        ptif.attribute(nn.Linear(4, 3), loader, (X[:2], Y[:2]), loss=nn.CrossEntropyLoss(), method="grad_dot")


@pytest.mark.filterwarnings("ignore:.*degrees of freedom")
def test_a_loss_over_the_spread_of_a_batch_is_refused() -> None:
    def spread(f: Tensor, y: Tensor) -> Tensor:
        losses = F.cross_entropy(f, y, reduction="none")
        return losses / (losses.detach().std() if len(losses) > 2 else 1.0)

    with pytest.raises(InvalidInput, match=r"The loss spread of one example changes by .* beside it"):
        ptif.attribute(nn.Linear(4, 3), (X, Y), (X[:2], Y[:2]), loss=spread, method="grad_dot")


def test_logits_that_are_masked_by_infinity_are_accepted() -> None:
    class Masked(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return F.pad(super().forward(x), (0, 1), value=-torch.inf)

    model = Masked(4, 3)
    scores = ptif.attribute(model, (X, Y), (X[:2], Y[:2]), loss=nn.CrossEntropyLoss(), method="grad_dot")
    rows = example_gradients(model, F.cross_entropy, X, Y)
    assert gap(scores.values, rows[:2] @ rows.T / N) < rounding(torch.float32)


def test_batch_statistics_are_still_named() -> None:
    model = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3, track_running_stats=False))
    with pytest.raises(InvalidInput, match=r"examples beside it in the batch.*batch normalisation|not on one alone"):
        ptif.attribute(model, (X, Y), (X[:2], Y[:2]), loss=nn.CrossEntropyLoss(), method="grad_dot")
