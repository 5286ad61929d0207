"""Objectives: losses are torch's, closed forms are autograd's, every transform goes through."""

from __future__ import annotations

from collections import UserDict, namedtuple
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.func import grad, hessian, jacrev, jvp, vmap

from pytorch_influence_functions.objectives import (
    AbstractLikelihood,
    AbstractObjective,
    Bernoulli,
    CrossEntropy,
    FromFunction,
    Logit,
    Margin,
    SquaredError,
    TokenCrossEntropy,
)
from pytorch_influence_functions.objectives.base import inputs_and_targets
from pytorch_influence_functions.objectives.convert import as_objective
from pytorch_influence_functions.objectives.draws import Keyed
from tests.tolerance import gap, rounding

Case = tuple[AbstractObjective, Tensor, Tensor]


def randn(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def rand(*shape: int) -> Tensor:
    return torch.rand(*shape, dtype=torch.float64)


def labels(high: int, *shape: int, ignored: bool = False) -> Tensor:
    drawn = torch.randint(high, shape)
    return torch.where(torch.rand(shape) < 0.3, -100, drawn) if ignored else drawn


def tokens(n: int) -> Tensor:
    made = labels(4, n, 3, ignored=True)
    made[:, 2] = 1  # every sequence keeps one token
    return made


#: Every likelihood, over shapes and settings: name -> (objective, outputs, targets) for n examples.
LIKELIHOODS: dict[str, Callable[[int], Case]] = {
    "classes": lambda n: (CrossEntropy(), randn(n, 4), labels(4, n)),
    "ignored": lambda n: (CrossEntropy(), randn(n, 3), labels(3, n, ignored=True)),
    "int32": lambda n: (CrossEntropy(), randn(n, 3), labels(3, n).int()),
    "weighted": lambda n: (CrossEntropy(rand(3)), randn(n, 3), labels(3, n)),
    "smoothed": lambda n: (CrossEntropy(rand(3), 0.2), randn(n, 3), labels(3, n, ignored=True)),
    "soft": lambda n: (CrossEntropy(), randn(n, 3), rand(n, 3).softmax(1)),
    "soft unnormalised": lambda n: (CrossEntropy(rand(3), 0.1), randn(n, 3), rand(n, 3)),
    "segmentation": lambda n: (CrossEntropy(rand(3)), randn(n, 3, 2, 2), labels(3, n, 2, 2, ignored=True)),
    "soft segmentation": lambda n: (CrossEntropy(), randn(n, 3, 2), rand(n, 3, 2)),
    "log-probabilities": lambda n: (as_objective(nn.NLLLoss()), randn(n, 3).log_softmax(1), labels(3, n)),
    "tokens": lambda n: (TokenCrossEntropy(), randn(n, 3, 4), tokens(n)),
    "token sum": lambda n: (TokenCrossEntropy(average=False), randn(n, 3, 4), tokens(n)),
    "causal": lambda n: (TokenCrossEntropy(shift=True), randn(n, 3, 4), tokens(n)),
    "smoothed tokens": lambda n: (TokenCrossEntropy(shift=True, label_smoothing=0.3), randn(n, 3, 4), tokens(n)),
    "squares": lambda n: (SquaredError(), randn(n, 3), randn(n, 3)),
    "mean squares": lambda n: (as_objective(nn.MSELoss()), randn(n, 2, 2), randn(n, 2, 2)),
    "one number": lambda n: (SquaredError(half=False), randn(n, 1), randn(n)),
    "bare number": lambda n: (SquaredError(), randn(n), randn(n, 1)),
    "binary": lambda n: (Bernoulli(), randn(n), labels(2, n)),
    "binary column": lambda n: (Bernoulli(pos_weight=3.0), randn(n, 1), labels(2, n).float()),
    "multi-label": lambda n: (Bernoulli(rand(3), rand(3), average=True), randn(n, 3), labels(2, n, 3)),
    "soft multi-label": lambda n: (Bernoulli(2.0, rand(3)), randn(n, 3), rand(n, 3)),
}
MEASURES: dict[str, Callable[[int], Case]] = {
    "margin": lambda n: (Margin(), randn(n, 4), labels(4, n)),
    "margin of two": lambda n: (Margin(), randn(n, 2), labels(2, n)),
    "margin of one": lambda n: (Margin(), randn(n), labels(2, n)),
    "logit": lambda n: (Logit(), randn(n, 4), labels(4, n)),
    "logit of one": lambda n: (Logit(), randn(n, 1), labels(2, n)),
    "function": lambda n: (FromFunction(lambda f, y: (f - y).pow(2).mean()), randn(n, 2), randn(n, 2)),
    "nested": lambda n: (FromFunction(lambda f, y: (f - y[0]).exp().sum()), randn(n), randn(n)),
}
ALL = LIKELIHOODS | MEASURES
each_likelihood = pytest.mark.parametrize("name", LIKELIHOODS)
each_objective = pytest.mark.parametrize("name", ALL)


def case(name: str, n: int = 3) -> tuple[Any, Tensor, Any]:
    objective, outputs, targets = ALL[name](n)
    return objective, outputs, (None, (targets,) if name == "nested" else targets)


def autograd_hessian(objective: AbstractObjective, outputs: Tensor, batch: Any) -> Tensor:
    """[n, c, c], by two derivatives of each example's loss alone."""
    found = []
    for e in range(len(outputs)):
        one = (None, batch[1][e : e + 1])
        h = hessian(lambda f, one=one: objective.losses(f[None], one)[0])(outputs[e])
        found.append(h.reshape(outputs[e].numel(), -1))
    return torch.stack(found)


def close(a: Tensor, b: Tensor, tolerance: float = 1e-10) -> None:
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


# --------------------------------------------------------------------------- closed forms


@pytest.mark.slow
@settings(max_examples=60)
@given(st.sampled_from(sorted(LIKELIHOODS)), st.integers(1, 4), st.integers(0, 2**31))
def test_closed_forms_are_the_autograd_hessian(name: str, n: int, seed: int) -> None:
    torch.manual_seed(seed)
    objective, outputs, batch = case(name, n)
    assert isinstance(objective, AbstractLikelihood)
    objective.check(outputs, batch, torch.arange(n))
    oracle = autograd_hessian(objective, outputs, batch)

    root = objective.root(outputs, batch)
    assert root.shape == (objective.root_size(outputs), *outputs.shape)
    flat = root.flatten(2) if root.dim() > 2 else root[..., None]
    close(torch.einsum("kna,knb->nab", flat, flat), oracle)
    close(objective.output_hessian(outputs, batch), oracle)
    v = torch.randn_like(outputs)
    product = torch.einsum("nab,nb->na", oracle, v.reshape(n, -1)).reshape(outputs.shape)
    close(objective.hessian_product(outputs, batch, v), product)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_the_root_of_cross_entropy_has_one_column_less_than_classes_however_sure_the_model_is(
    dtype: torch.dtype,
) -> None:
    """Probabilities add up to one. Tails of 1e-40 and 0 must leave neither NaN nor cancelled digits."""
    logits = torch.tensor([[0.0, 1.0, 2.0], [30.0, 0.0, -5.0], [-300.0, 0.0, 300.0], [0.0, -95.0, -100.0]], dtype=dtype)
    labels = torch.tensor([0, 1, 2, 0])
    root = CrossEntropy().root(logits, (None, labels))
    assert root.shape == (2, 4, 3) == (CrossEntropy().root_size(logits), 4, 3)
    p = logits.double().softmax(1)
    exact = torch.diag_embed(p) - p[:, :, None] * p[:, None]
    found = torch.einsum("kna,knb->nab", root.double(), root.double())
    assert bool(torch.isfinite(root).all())
    torch.testing.assert_close(found, exact, rtol=1e-5, atol=1e-7)
    # What is left of a class beside a sure one: in the formula above it has lost all its digits.
    assert float(found[1, 0, 0]) == pytest.approx(float(p[1, 1] + p[1, 2]), rel=1e-5, abs=0.0)


@each_likelihood
def test_closed_forms_hold_at_every_listed_case(name: str) -> None:
    objective, outputs, batch = case(name)
    oracle = autograd_hessian(objective, outputs, batch)
    close(objective.output_hessian(outputs, batch), oracle)
    if name != "ignored":
        assert oracle.abs().max() > 1e-3  # the oracle says something


@each_likelihood
def test_sampled_cotangents_have_the_hessian_as_their_covariance(name: str, generator: torch.Generator) -> None:
    objective, outputs, batch = case(name, 2)
    many = 20_000
    wide = outputs.repeat(many, *[1] * (outputs.dim() - 1))
    targets = batch[1].repeat(many, *[1] * (batch[1].dim() - 1))
    c = objective.sample_cotangent(wide, (None, targets), generator).reshape(many, 2, -1)
    covariance = torch.einsum("sna,snb->nab", c, c) / many
    exact = objective.output_hessian(outputs, batch)
    # Entries of c cᵀ are bounded or have few moments; six standard errors of the largest.
    room = 6 * 3 * exact.abs().max() / many**0.5
    assert (covariance - exact).abs().max() < room
    assert c.mean(0).abs().max() < 6 * exact.abs().max().sqrt() / many**0.5


def test_a_generator_makes_samples_repeatable() -> None:
    objective, outputs, batch = case("classes", 30)
    first, again, other = (
        objective.sample_cotangent(outputs, batch, torch.Generator().manual_seed(s)) for s in (1, 1, 2)
    )
    assert gap(again, first) < rounding(first) and gap(other, first) > 1e-3


# --------------------------------------------------------------------------- transforms


@each_objective
def test_losses_work_under_vmap_jvp_and_second_derivatives(name: str) -> None:
    objective, outputs, batch = case(name)
    v = torch.randn_like(outputs)
    slope = grad(lambda f: objective.losses(f, batch).sum())(outputs)
    _, along = jvp(lambda f: objective.losses(f, batch), (outputs,), (v,))
    close(along, (slope * v).reshape(len(v), -1).sum(1))
    moved = vmap(lambda d: jvp(lambda f: objective.losses(f, batch), (outputs,), (d,))[1])(torch.stack([v, 2 * v]))
    close(moved[1], 2 * along)
    # Forward over reverse, as Hessian products are made; one example's loss knows nothing of the others.
    _, curved = jvp(grad(lambda f: objective.losses(f, batch).sum()), (outputs,), (v,))
    assert torch.isfinite(curved).all()
    mixed = jacrev(lambda f: objective.losses(f, batch))(outputs).reshape(len(v), len(v), -1)
    assert mixed[0, 1].abs().max() == 0.0


@each_objective
def test_a_batch_is_its_examples_one_by_one(name: str) -> None:
    objective, outputs, batch = case(name, 5)
    if name == "nested":
        batch = (None, batch[1][0][:, None])
        objective = FromFunction(lambda f, y: (f - y[:, 0]).exp().sum())
    whole = objective.losses(outputs, batch)
    assert whole.shape == (5,)
    apart = [objective.losses(outputs[e : e + 1], (None, batch[1][e : e + 1])) for e in range(5)]
    close(whole, torch.cat(apart))

    def one(f: Tensor, y: Tensor) -> Tensor:
        return objective.losses(f[None], (None, y[None]))[0]

    close(vmap(one, randomness="different")(outputs, batch[1]), whole)


Boxes = namedtuple("Boxes", "low high")


@pytest.mark.parametrize("vectorised", [True, False])
@pytest.mark.parametrize("kind", [dict, UserDict, Boxes, tuple, list])
def test_targets_of_any_nesting_are_taken_apart(kind: Any, vectorised: bool) -> None:
    """A tokenizer's mapping as well: each example sees its own entries, in a container of the same kind."""
    outputs, low, high = randn(5), randn(5), randn(5).abs()
    named = {"low": low, "high": high}
    targets = kind(**named) if kind is Boxes else kind(named) if kind in (dict, UserDict) else kind([low, high])

    def loss(f: Tensor, y: Any) -> Tensor:
        assert type(y) is kind
        below, above = (y["low"], y["high"]) if kind in (dict, UserDict) else y
        if not vectorised and float(f.detach().sum()) > 100:  # a branch on values cannot be vectorised
            return f.sum()
        return ((f - below) ** 2 * above).mean()

    objective = FromFunction(loss).resolved(outputs, targets)
    assert objective.reduction == "mean"
    close(objective.losses(outputs, (None, targets)), (outputs - low) ** 2 * high)


# --------------------------------------------------------------------------- torch's own losses


def on(loss: Any, outputs: Tensor, targets: Tensor) -> Tensor:
    return as_objective(loss).losses(outputs, (None, targets))


def test_cross_entropy_is_torchs() -> None:
    f, w = randn(6, 4), rand(4)
    y = torch.tensor([0, 3, -100, 2, 1, 1])
    for settings_ in ({}, {"weight": w}, {"label_smoothing": 0.3}, {"weight": w, "label_smoothing": 0.3}):
        expected = F.cross_entropy(f, y, reduction="none", **settings_)
        close(on(nn.CrossEntropyLoss(**settings_), f, y), expected)
        soft = rand(6, 4)
        expected = F.cross_entropy(f, soft, reduction="none", **settings_)
        close(on(nn.CrossEntropyLoss(**settings_), f, soft), expected)
    close(on(nn.CrossEntropyLoss(), f[:2], y[:2]).mean(), F.cross_entropy(f[:2], y[:2]))
    close(on(nn.CrossEntropyLoss(ignore_index=3), f[:2], y[:2])[1], torch.zeros((), dtype=torch.float64))


def test_dense_cross_entropy_is_the_mean_over_own_positions() -> None:
    f, y = randn(4, 3, 2, 5), labels(3, 4, 2, 5, ignored=True)
    expected = F.cross_entropy(f, y, reduction="none").flatten(1).mean(1)
    close(on(nn.CrossEntropyLoss(), f, y), expected)
    # … which is torch's global mean up to one factor for all examples.
    close(expected.sum() * 10 / (y != -100).sum(), F.cross_entropy(f, y))


def test_nll_is_cross_entropy_in_value_and_parameter_gradient() -> None:
    z, y = randn(5, 3), labels(3, 5)
    w = rand(3)
    close(on(nn.NLLLoss(weight=w), z.log_softmax(1), y), F.nll_loss(z.log_softmax(1), y, w, reduction="none"))
    ours = grad(lambda z: on(nn.NLLLoss(), z.log_softmax(1), y).sum())(z)
    close(ours, grad(lambda z: F.nll_loss(z.log_softmax(1), y, reduction="sum"))(z))


def test_squares_and_bernoulli_are_torchs() -> None:
    f, y, b, w, p = randn(5, 3), randn(5, 3), labels(2, 5, 3).double(), rand(3), rand(3)
    close(on(nn.MSELoss(), f, y), F.mse_loss(f, y, reduction="none").mean(1))
    close(on(nn.MSELoss(reduction="sum"), f, y), F.mse_loss(f, y, reduction="none").sum(1))
    close(SquaredError().losses(f, (None, y)), 0.5 * (f - y).pow(2).sum(1))
    expected = F.binary_cross_entropy_with_logits(f, b, w, pos_weight=p, reduction="none").mean(1)
    close(on(nn.BCEWithLogitsLoss(w, pos_weight=p), f, b), expected)


def test_one_output_is_never_broadcast_against_the_targets() -> None:
    f, y = randn(4, 1), randn(4)
    close(on(nn.MSELoss(), f, y), (f[:, 0] - y).pow(2))
    close(on(nn.BCEWithLogitsLoss(), f, y > 0), on(nn.BCEWithLogitsLoss(), f[:, 0], y > 0))


def test_bce_of_probabilities_is_bernoulli_of_their_logits() -> None:
    model = nn.Sequential(nn.Linear(2, 3), nn.Sigmoid()).double()
    x, y = randn(6, 2), labels(2, 6, 3).double()
    objective = as_objective(nn.BCELoss())
    losses = objective.losses(objective.outputs(model, (x, y)), (x, y))
    expected = F.binary_cross_entropy(model(x), y, reduction="none").mean(1)
    close(losses, expected)
    for ours, theirs in zip(
        torch.autograd.grad(losses.sum(), list(model.parameters())),
        torch.autograd.grad(expected.sum(), list(model.parameters())),
        strict=True,
    ):
        close(ours, theirs)


def test_saturated_probabilities_stay_finite() -> None:
    p = torch.tensor([0.0, 1.0], requires_grad=True)
    objective = Bernoulli(from_probabilities=True)
    batch = (p, torch.tensor([0, 1]))
    losses = objective.losses(objective.outputs(lambda x: x, batch), batch)
    assert torch.isfinite(losses).all() and losses.max() < 1e-6
    assert torch.isfinite(torch.autograd.grad(losses.sum(), p)[0]).all()


def test_token_losses_average_over_own_tokens() -> None:
    f = randn(2, 4, 5)
    y = torch.tensor([[1, 2, -100, -100], [0, 4, 3, -100]])
    each = F.cross_entropy(f.movedim(-1, 1), y, reduction="none")
    close(TokenCrossEntropy(average=False).losses(f, (None, y)), each.sum(1))
    close(TokenCrossEntropy().losses(f, (None, y)), each.sum(1) / torch.tensor([2, 3]))
    smooth = F.cross_entropy(f.movedim(-1, 1), y, reduction="none", label_smoothing=0.2)
    close(TokenCrossEntropy(label_smoothing=0.2).losses(f, (None, y)), smooth.sum(1) / torch.tensor([2, 3]))


def test_shifted_tokens_are_a_causal_language_model() -> None:
    f, ids = randn(2, 4, 5), labels(5, 2, 4)
    expected = F.cross_entropy(f[:, :-1].movedim(-1, 1), ids[:, 1:], reduction="none")
    objective = TokenCrossEntropy(shift=True)
    close(objective.losses(f, {"input_ids": ids, "labels": ids}), expected.mean(1))
    # Without labels the input ids are taken, where the attention mask says so.
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]])
    padded = {"input_ids": ids, "attention_mask": mask}
    close(objective.losses(f, padded), torch.stack([expected[0].mean(), expected[1, 0]]))
    seen = objective.outputs(lambda input_ids, attention_mask: f, padded)
    assert seen is f


# --------------------------------------------------------------------------- measures


def test_margin_is_the_log_odds_of_the_target() -> None:
    f, y = randn(6, 4), labels(4, 6)
    p = f.softmax(1)[torch.arange(6), y]
    close(Margin().losses(f, (None, y)), (p / (1 - p)).log())
    close(Logit().losses(f, (None, y)), f[torch.arange(6), y])
    # A sure model: 1 - p is 0 in floating point, the margin is not infinite.
    sure = torch.tensor([[800.0, 0.0]], dtype=torch.float64)
    close(Margin().losses(sure, (None, torch.tensor([0]))), torch.tensor([800.0], dtype=torch.float64))


def test_margin_of_one_logit_is_that_of_two_classes() -> None:
    f, y = randn(5), labels(2, 5)
    two = torch.stack([torch.zeros_like(f), f], 1)
    for outputs, targets in ((f, y), (f[:, None], y), (f[:, None], y[:, None].float())):
        close(Margin().losses(outputs, (None, targets)), Margin().losses(two, (None, y)))


def test_which_way_is_better() -> None:
    assert not Margin().lower_is_better and not Logit().lower_is_better
    for name in LIKELIHOODS:
        assert case(name)[0].lower_is_better
    assert FromFunction(F.l1_loss).lower_is_better
    assert not FromFunction(F.l1_loss, lower_is_better=False).lower_is_better


# --------------------------------------------------------------------------- batches and models


def test_batches_are_taken_apart() -> None:
    x, y = torch.ones(2), torch.zeros(2)
    assert inputs_and_targets((x, y)) == ((x,), {}, y)
    assert inputs_and_targets([x, x, y]) == ((x, x), {}, y)
    assert inputs_and_targets(({"a": x}, y)) == ((), {"a": x}, y)
    assert inputs_and_targets({"a": x, "labels": y}) == ((), {"a": x}, y)
    assert inputs_and_targets({"a": x, "label": y}) == ((), {"a": x}, y)


@pytest.mark.parametrize(
    "objective", [CrossEntropy(), SquaredError(), Bernoulli(), Margin(), FromFunction(abs, takes_one=True)]
)
def test_outputs_are_found_in_what_models_return(objective: AbstractObjective) -> None:
    f = torch.ones(2, 3)
    batch = {"x": f, "labels": torch.zeros(2)}
    for found in (f, SimpleNamespace(logits=f), {"logits": f}, (f, None), [f]):
        assert objective.outputs(lambda x, found=found: found, batch) is f


def test_records_compare_hash_and_show_their_settings() -> None:
    w = torch.tensor([1.0, 2.0])
    assert CrossEntropy(w) == CrossEntropy(w.clone()) and hash(CrossEntropy(w)) == hash(CrossEntropy(w.clone()))
    assert CrossEntropy(w) != CrossEntropy() and CrossEntropy() != Margin()
    assert repr(CrossEntropy()) == "CrossEntropy()"
    assert repr(CrossEntropy(w, 0.1)) == "CrossEntropy(weight=[1, 2], label_smoothing=0.1)"
    assert repr(FromFunction(F.l1_loss, False)) == "FromFunction(function=l1_loss, lower_is_better=False)"


def test_an_objective_that_is_no_dataclass_has_a_repr_and_a_key() -> None:
    class Confidence(AbstractObjective):
        lower_is_better = False

        def __init__(self, scale: float) -> None:
            self.scale = scale

        def outputs(self, model: Any, batch: Any) -> Tensor:
            return model(batch[0])

        def losses(self, outputs: Tensor, batch: Any) -> Tensor:
            return self.scale * outputs.amax(1)

        def check(self, outputs: Tensor, batch: Any, ids: Tensor) -> None: ...

    assert repr(Confidence(2.0)) == "Confidence(scale=2.0)"
    assert Confidence(2.0) == Confidence(2.0) != Confidence(3.0)
    assert len({Confidence(2.0), Confidence(2.0)}) == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@each_likelihood
def test_every_dtype_is_kept(name: str, dtype: torch.dtype, generator: torch.Generator) -> None:
    objective, outputs, batch = case(name)
    low = outputs.to(dtype)
    for found in (
        objective.losses(low, batch),
        objective.root(low, batch),
        objective.sample_cotangent(low, batch, generator),
        objective.hessian_product(low, batch, low),
    ):
        assert found.dtype == dtype
    torch.testing.assert_close(
        objective.losses(low, batch).double(), objective.losses(outputs, batch), rtol=0.05, atol=0.05
    )


def test_losses_are_mapped() -> None:
    w = torch.tensor([1.0, 2.0])
    assert as_objective(nn.CrossEntropyLoss(w, ignore_index=1, label_smoothing=0.1)) == CrossEntropy(w, 0.1, 1)
    assert as_objective(nn.MSELoss()) == SquaredError(average=True, half=False)
    assert as_objective(nn.BCEWithLogitsLoss(pos_weight=w)) == Bernoulli(pos_weight=w, average=True)
    assert as_objective(nn.BCELoss()) == Bernoulli(average=True, from_probabilities=True)
    assert as_objective(F.cross_entropy) == CrossEntropy()
    kept = Margin()
    assert as_objective(kept) is kept

    class Mine(nn.CrossEntropyLoss):
        pass

    assert isinstance(as_objective(Mine()), FromFunction)  # what it computes is not known


def test_keyed_draws_belong_to_the_example_and_are_uniform() -> None:
    ids = torch.arange(4000)
    whole = Keyed(ids, 3).uniform(torch.Size([4000, 5]))
    part = Keyed(ids[7:9], 3).uniform(torch.Size([2, 5]))
    assert torch.equal(whole[7:9], part)
    assert float(whole.min()) > 0 and float(whole.max()) < 1
    # Ten equal bins of 20,000 numbers: chi-squared with 9 degrees of freedom stays below 28 in 99.9 % of all cases.
    counts = torch.histc(whole, bins=10, min=0, max=1)
    assert float(((counts - 2000) ** 2 / 2000).sum()) < 28
    # Neighbouring examples, positions and seeds are unrelated.
    other = Keyed(ids, 4).uniform(torch.Size([4000, 5]))
    pairs = [(whole[1:, 0], whole[:-1, 0]), (whole[:, 0], whole[:, 1]), (whole[:, 0], other[:, 0])]
    for a, b in pairs:
        assert abs(float(torch.corrcoef(torch.stack([a, b]))[0, 1])) < 0.06
