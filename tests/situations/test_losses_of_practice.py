"""My loss is not cross entropy: any loss of torch, and the usual ones of practice."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import pytorch_influence_functions as ptif
from pytorch_influence_functions.core.errors import NotLikelihood
from pytorch_influence_functions.core.indexing import spread_sample
from pytorch_influence_functions.curvature.base import Budget, Form
from pytorch_influence_functions.curvature.exact import GGN, EmpiricalFisher
from pytorch_influence_functions.gradients.per_example import Derivatives
from pytorch_influence_functions.linalg.dense import Matrix
from pytorch_influence_functions.linalg.gram import Gram
from pytorch_influence_functions.objectives.convert import as_objective
from pytorch_influence_functions.objectives.differentiated import output_curvature
from tests.tolerance import gap, rounding

N, D, K = 24, 5, 3
Loss = Callable[[Any, Any], Tensor]
Make = Callable[[], tuple[Loss, int, Tensor]]


def numbers(k: int) -> Tensor:
    return torch.randn(N, k, generator=torch.Generator().manual_seed(3)).double()


LABELS = torch.arange(N) % K
YES = (torch.arange(N * K).reshape(N, K) % 2).double()
SIGNS = YES * 2 - 1
COUNTS = (torch.arange(N * K).reshape(N, K) % 4).double()
ONE_HOT = F.one_hot(LABELS, K).double()
SETS = torch.tensor([[0, 2, -1], [1, -1, -1]]).repeat(12, 1)
SOFT = torch.softmax(numbers(K), 1)


def label_smoothing(f: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(f, y, label_smoothing=0.1)


def weighted(f: Tensor, y: Tensor) -> Tensor:
    """Class weights written by hand: a sum does not depend on the batch."""
    return F.cross_entropy(f, y, torch.tensor([1.0, 2.0, 0.5]).to(f), reduction="sum")


def distillation(f: Tensor, teacher: Tensor) -> Tensor:
    """Hinton's: softened teacher and student, times the squared temperature."""
    t = 2.0
    return F.kl_div((f / t).log_softmax(1), (teacher / t).softmax(1), reduction="batchmean") * t * t


# Focal losses are convex but for examples that are very wrong, with a logit below -2.5.
def focal(f: Tensor, y: Tensor) -> Tensor:
    nll = F.cross_entropy(4 * f, y, reduction="none")
    return ((1 - (-nll).exp()) ** 2 * nll).mean()


def binary_focal(f: Tensor, y: Tensor) -> Tensor:
    nll = F.binary_cross_entropy_with_logits(4 * f, y, reduction="none")
    return ((1 - (-nll).exp()) ** 2 * nll).mean(1)


def dice(f: Tensor, y: Tensor) -> Tensor:
    p = f.sigmoid()
    return (1 - (2 * (p * y).sum(1) + 1) / (p.sum(1) + y.sum(1) + 1)).mean()


def quantile(f: Tensor, y: Tensor) -> Tensor:
    e = y - f
    return torch.maximum(0.9 * e, -0.1 * e).mean()


def log_cosh(f: Tensor, y: Tensor) -> Tensor:
    return torch.log(torch.cosh(f - y)).sum(1).mean()


def ordinal(f: Tensor, y: Tensor) -> Tensor:
    """CORAL: one yes or no per threshold."""
    levels = (y[:, None] > torch.arange(f.shape[1])).to(f.dtype)
    return F.binary_cross_entropy_with_logits(f, levels, reduction="none").sum(1).mean()


def gaussian_nll(f: Tensor, y: Tensor) -> Tensor:
    return F.gaussian_nll_loss(f[:, 0], y[:, 0], f[:, 1].exp())


def evidential(f: Tensor, y: Tensor) -> Tensor:
    """Dirichlet evidence with expected squared error (Sensoy et al. 2018)."""
    alpha = F.softplus(f) + 1
    s = alpha.sum(1, keepdim=True)
    return ((y - alpha / s) ** 2 + alpha * (s - alpha) / (s * s * (s + 1))).sum(1).mean()


def exponential(f: Tensor, y: Tensor) -> Tensor:
    """AdaBoost's."""
    return torch.exp(-f * y).mean()


def cosine(f: Tensor, y: Tensor) -> Tensor:
    return (1 - F.cosine_similarity(f, y, dim=1)).mean()


def triplet(f: Tensor, y: Tensor) -> Tensor:
    """Anchor, positive and negative side by side in the outputs."""
    return F.triplet_margin_loss(f[:, :2], f[:, 2:4], f[:, 4:])


CONVEX: dict[str, Make] = {
    "MSELoss": lambda: (nn.MSELoss(), K, numbers(K)),
    "CrossEntropyLoss": lambda: (nn.CrossEntropyLoss(), K, LABELS),
    "smoothed": lambda: (nn.CrossEntropyLoss(label_smoothing=0.1), K, LABELS),
    "ignored": lambda: (nn.CrossEntropyLoss(ignore_index=1), K, LABELS),
    "soft targets": lambda: (nn.CrossEntropyLoss(), K, SOFT),
    "BCEWithLogitsLoss": lambda: (nn.BCEWithLogitsLoss(pos_weight=torch.tensor([1.0, 3.0, 9.0])), K, YES),
    "PoissonNLLLoss": lambda: (nn.PoissonNLLLoss(), K, COUNTS),
    "KLDivLoss of log-softmax": lambda: (distillation, K, numbers(K)),
    "MultiLabelSoftMarginLoss": lambda: (nn.MultiLabelSoftMarginLoss(), K, YES),
    "SoftMarginLoss": lambda: (nn.SoftMarginLoss(), K, SIGNS),
    "HuberLoss": lambda: (nn.HuberLoss(delta=0.8), K, numbers(K)),
    "SmoothL1Loss": lambda: (nn.SmoothL1Loss(beta=0.8), K, numbers(K)),
    "label smoothing by hand": lambda: (label_smoothing, K, LABELS),
    "class weights by hand": lambda: (weighted, K, LABELS),
    "log cosh": lambda: (log_cosh, K, numbers(K)),
    "ordinal": lambda: (ordinal, 2, LABELS),
    "exponential": lambda: (exponential, K, SIGNS),
    "many outputs": lambda: (F.huber_loss, 20, numbers(20)),
    "many coupled outputs": lambda: (label_smoothing, 20, torch.arange(N) % 20),
}
ZERO: dict[str, Make] = {
    "L1Loss": lambda: (nn.L1Loss(), K, numbers(K)),
    "quantile": lambda: (quantile, K, numbers(K)),
    "HingeEmbeddingLoss": lambda: (nn.HingeEmbeddingLoss(margin=3.0), K, SIGNS),
    "KLDivLoss": lambda: (nn.KLDivLoss(reduction="batchmean"), K, SOFT),
}
CURVED_DOWN: dict[str, Make] = {
    "focal": lambda: (focal, K, LABELS),
    "binary focal": lambda: (binary_focal, K, YES),
    "Dice": lambda: (dice, K, YES),
    "GaussianNLLLoss": lambda: (gaussian_nll, 2, numbers(1)),
    "evidential": lambda: (evidential, K, ONE_HOT),
    "cosine": lambda: (cosine, K, numbers(K)),
    "TripletMarginLoss": lambda: (triplet, 6, LABELS),
}
UNKNOWN: dict[str, Make] = {
    "MultiMarginLoss": lambda: (nn.MultiMarginLoss(), K, LABELS),
    "MultiLabelMarginLoss": lambda: (
        nn.MultiLabelMarginLoss(),
        K,
        torch.tensor([[0, 2, -1], [1, -1, -1]]).repeat(12, 1),
    ),
}
NO_GAUSS_NEWTON = {
    **{
        k: (v, "has no curvature in the model's outputs: its second derivative is 0 at all 24") for k, v in ZERO.items()
    },
    **{k: (v, "is not convex in the model's outputs .*eigenvalue of -") for k, v in CURVED_DOWN.items()},
    **{k: (v, "torch has no second derivative of MultiL?") for k, v in UNKNOWN.items()},
}


def data_of(make: Make) -> tuple[nn.Module, Tensor, Tensor, Loss]:
    loss, k, y = make()
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(D, 4), nn.Tanh(), nn.Linear(4, k)).double()
    with torch.no_grad():
        model[2].weight.mul_(3)  # as sure of itself, and as wrong in places, as a trained model
    return model, torch.randn(N, D).double(), y, loss


def in_double(loss: Loss) -> Loss:
    return loss.double() if isinstance(loss, nn.Module) else loss


def problem_of(make: Make, dtype: torch.dtype = torch.float64) -> ptif.Problem:
    model, x, y, loss = data_of(make)
    return ptif.Problem(model.to(dtype), loss, (x.to(dtype), y.to(dtype) if y.is_floating_point() else y))


def dense_gauss_newton(make: Make) -> Tensor:
    """The mean of JᵀHJ, one example and one derivative at a time, in float64."""
    model, x, y, loss = data_of(make)
    loss, parameters = in_double(loss), list(model.parameters())
    total = torch.zeros(sum(p.numel() for p in parameters), dtype=torch.float64).diag()
    for e in range(N):
        f = model(x[e : e + 1])
        k = f.shape[1]
        rows = []
        for j in range(k):
            gradients = torch.autograd.grad(f[0, j], parameters, retain_graph=True)
            rows.append(torch.cat([g.flatten() for g in gradients]))
        jacobian = torch.stack(rows)
        h = torch.autograd.functional.hessian(lambda out, e=e: loss(out, y[e : e + 1]).sum(), f.detach())
        total += jacobian.T @ h.reshape(k, k) @ jacobian / N
    return total


def in_order_of_parameters(problem: ptif.Problem, matrix: Tensor) -> Tensor:
    """A matrix over the space's flat order, in that of `model.parameters()`."""
    size = problem.space.size
    units = problem.space.to_parameters(problem.space.rows(torch.eye(size, dtype=matrix.dtype)))
    turn = torch.cat([units[name].reshape(size, -1) for name, _ in problem.model.named_parameters()], 1)
    return turn.T @ matrix @ turn


@pytest.mark.parametrize("name", CONVEX)
def test_the_gauss_newton_matrix_of_any_convex_loss_is_that_of_its_second_derivative(name: str) -> None:
    expected = dense_gauss_newton(CONVEX[name])
    problem = problem_of(CONVEX[name])
    derivatives = Derivatives.of(problem)
    assert expected.abs().max() > 1e-4
    room = rounding(torch.float64, condition=1e3)
    dense = GGN().of(derivatives, Form.MATRIX, Budget())
    assert isinstance(dense, Matrix)
    assert gap(in_order_of_parameters(problem, dense.matrix), expected) < room
    rows = GGN().of(derivatives, Form.GRAM, Budget())
    assert isinstance(rows, Gram)
    flat = rows.rows.flat()
    assert gap(in_order_of_parameters(problem, flat.T @ flat / rows.count), expected) < room
    products = GGN().of(derivatives, Form.IMPLICIT, Budget())
    units = problem.space.rows(torch.eye(problem.space.size, dtype=torch.float64))
    assert gap(in_order_of_parameters(problem, products.apply(units).flat()), expected) < room
    assert products.mean_eigenvalue() == pytest.approx(float(expected.trace()) / len(expected), rel=0.5)


@pytest.mark.parametrize("name", CONVEX)
def test_drawn_columns_have_the_second_derivative_as_their_covariance(name: str) -> None:
    model, x, y, loss = data_of(CONVEX[name])
    curvature, outputs, many = output_curvature(as_objective(loss)), model(x[:2]).detach(), 2000
    batch = (None, y[:2].repeat(many, *[1] * (y.dim() - 1)))
    c = curvature.sample_cotangent(outputs.repeat(many, 1), batch, torch.Generator().manual_seed(0))
    covariance = torch.einsum("sna,snb->nab", *(c.reshape(many, 2, -1),) * 2) / many
    expected = curvature.output_hessian(outputs, (None, y[:2]))
    assert (covariance - expected).abs().max() < 18 * expected.abs().max() / many**0.5


@pytest.mark.parametrize("name", CONVEX)
def test_every_method_takes_a_convex_loss(name: str) -> None:
    problem = problem_of(CONVEX[name], torch.float32)
    queries = [problem.data.dataset[i] for i in range(2)]
    exact = (
        ptif.exact(damping=0.1)
        .fit(problem_of(CONVEX[name]))
        .score([problem_of(CONVEX[name]).data.dataset[i] for i in range(2)])
        .values
    )
    for method in (ptif.exact(damping=0.1), ptif.dual(GGN(), 0.1), ptif.methods.gauss_newton(0.1, rtol=1e-5)):
        assert gap(method.fit(problem).score(queries).values, exact) < 1e-3, method
    for method in (ptif.ekfac(), ptif.methods.kfac(), ptif.Influence()):
        scores = method.fit(problem).score(queries)
        assert bool(torch.isfinite(scores.values).all()), method
        assert "mpirical" not in str(scores.diagnostics), method


@pytest.mark.parametrize("name", NO_GAUSS_NEWTON)
def test_a_loss_without_gauss_newton_matrix_is_refused_and_what_is_offered_works(name: str) -> None:
    make, message = NO_GAUSS_NEWTON[name]
    problem = problem_of(make)
    queries = [problem.data.dataset[i] for i in range(2)]
    offers = r".*use the empirical Fisher instead, as ptif.dual\(\) and ptif.ekfac\(fisher=.*EmpiricalFisher\(\)\) do"
    papers = ptif.methods
    for method in (papers.exact(), papers.dual(GGN()), papers.gauss_newton(), papers.ekfac(), papers.kfac()):
        with pytest.raises(NotLikelihood, match=message + offers):
            method.fit(problem)
    for method in (ptif.dual(), ptif.ekfac(fisher=ptif.curvature.EmpiricalFisher())):
        assert bool(torch.isfinite(method.fit(problem).score(queries).values).all())


@pytest.mark.parametrize("name", NO_GAUSS_NEWTON)
def test_the_first_call_takes_the_empirical_fisher_and_says_why(name: str) -> None:
    make, message = NO_GAUSS_NEWTON[name]
    model, x, y, loss = data_of(make)
    scores = ptif.attribute(model, (x, y), (x[:2], y[:2]), loss=loss)
    expected = ptif.exact(EmpiricalFisher()).fit(problem_of(make)).score((x[:2], y[:2]))
    assert gap(scores.values, expected.values) < rounding(torch.float64, condition=1e3)
    assert "EmpiricalFisher()" in scores.diagnostics.method
    with pytest.raises(NotLikelihood, match=message):
        raise NotLikelihood(scores.diagnostics.why)


def test_the_first_call_takes_the_empirical_fisher_where_the_fit_alone_meets_a_loss_that_curves_down() -> None:
    x, curved_down = (
        torch.randn(600, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(5)),
        torch.ones(600),
    )
    seen = set(spread_sample(len(x), 256).tolist())
    curved_down[next(i for i in range(len(x)) if i not in seen)] = -0.5

    def loss(out: Tensor, y: Tensor) -> Tensor:
        return (y * out.square().sum(1)).mean()

    model, queries = nn.Linear(4, 3).double(), (x[:2], curved_down[:2])
    scores = ptif.attribute(model, (x, curved_down), queries, loss=loss)
    expected = ptif.attribute(model, (x, curved_down), queries, loss=loss, method=ptif.exact(EmpiricalFisher()))
    assert gap(scores.values, expected.values) < rounding(torch.float64, condition=1e3)
    with pytest.raises(NotLikelihood, match=r"no Gauss-Newton matrix: loss is not convex .*eigenvalue of -1"):
        raise NotLikelihood(scores.diagnostics.why)
    with pytest.raises(NotLikelihood, match="is not convex"):
        ptif.exact().fit(ptif.Problem(model, loss, (x, curved_down)))


def test_a_loss_that_is_known_equals_itself_written_by_hand() -> None:
    """Closed forms and second derivatives are two ways to one matrix."""
    model, x, y, _ = data_of(CONVEX["CrossEntropyLoss"])
    for known, own in (
        (nn.CrossEntropyLoss(), lambda f, t: F.cross_entropy(f, t)),
        (nn.CrossEntropyLoss(label_smoothing=0.2), lambda f, t: F.cross_entropy(f, t, label_smoothing=0.2)),
    ):
        values = [
            ptif.attribute(model, (x, y), (x[:3], y[:3]), loss=loss, method=method).values
            for method in (ptif.exact(), ptif.dual(GGN()), ptif.ekfac(), ptif.methods.gauss_newton(rtol=1e-8))
            for loss in (known, own)
        ]
        for one, other in zip(values[::2], values[1::2], strict=True):
            assert gap(one, other) < 1e-6


def test_pixels_are_found_to_be_independent_and_classes_not() -> None:
    """Dense outputs whose whole Hessian could not be written out: 2 x 300 numbers an example."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(1, 2, 1)).double()
    x, y = torch.randn(4, 1, 15, 20).double(), torch.randint(0, 2, (4, 15, 20))
    own, known = lambda f, t: F.cross_entropy(f, t), nn.CrossEntropyLoss()
    values = [
        ptif.attribute(net, (x, y), (x[:1], y[:1]), loss=loss, method=ptif.exact()).values for loss in (own, known)
    ]
    assert gap(*values) < 1e-8


def test_a_saturated_loss_is_not_taken_for_one_that_curves_downwards() -> None:
    """In float32 alone rounding would give the flat parts of a trained classifier negative curvature."""
    model, x, y, _ = data_of(CONVEX["CrossEntropyLoss"])
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(30)
    model, x = model.float(), x.float()
    scores = ptif.attribute(model, (x, y), (x[:3], y[:3]), loss=lambda f, t: F.cross_entropy(f, t), method=ptif.exact())
    known = ptif.attribute(model, (x, y), (x[:3], y[:3]), loss=nn.CrossEntropyLoss(), method=ptif.exact())
    assert gap(scores.values, known.values) < 1e-2


def test_outputs_that_all_depend_on_each_other_are_refused_beyond_a_few_hundred() -> None:
    torch.manual_seed(0)
    model = nn.Linear(3, 300)
    x, y = torch.randn(6, 3), torch.arange(6)
    loss = lambda f, t: F.cross_entropy(f, t)  # noqa: E731
    with pytest.raises(NotLikelihood, match=r"couples the 300 outputs of an example.* at most 256"):
        ptif.attribute(model, (x, y), (x[:1], y[:1]), loss=loss, method=ptif.ekfac())
    assert "empirical" in str(ptif.attribute(model, (x, y), (x[:1], y[:1]), loss=loss).diagnostics)


def test_torchs_mean_over_class_weights_beside_a_decay_is_said_and_the_advice_is_the_minimum() -> None:
    x, weight, decay = numbers(D), torch.tensor([10.0, 50.0, 2.0]).double(), 0.05
    model, loss = nn.Linear(D, K).double(), nn.CrossEntropyLoss(weight=weight)
    optimiser = torch.optim.LBFGS(model.parameters(), max_iter=200, tolerance_grad=1e-10, line_search_fn="strong_wolfe")

    def objective() -> Tensor:
        optimiser.zero_grad()
        value = loss(model(x), LABELS) + decay / 2 * sum(p.square().sum() for p in model.parameters())
        value.backward()
        return value

    optimiser.step(objective)
    with pytest.warns(ptif.errors.TrainingDataWarning, match=r"divides by the total class weight .* weight\[labels\]"):
        as_written = ptif.Problem(model, loss, (x, LABELS), weight_decay=decay)
    advised = ptif.CrossEntropy(weight=weight), (x, LABELS)
    as_advised = ptif.Problem(model, *advised, weight_decay=decay * float(weight[LABELS].mean()))
    verdicts = [str(ptif.dual().fit(p).score((x, LABELS)).diagnostics) for p in (as_written, as_advised)]
    assert ["[ok]   minimum" in verdict for verdict in verdicts] == [False, True]


class ReturnsItsLoss(nn.Module):
    """A classifier that computes a loss where it is given labels, in a way that its outputs do not show."""

    def __init__(self, smoothing: float, reduction: str = "mean") -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer, self.smoothing, self.reduction = nn.Linear(3, 3).double(), smoothing, reduction

    def forward(self, x: torch.Tensor, labels: torch.Tensor | None = None) -> dict[str, torch.Tensor]:
        logits = self.layer(x)
        if labels is None:
            return {"logits": logits}
        loss = nn.functional.cross_entropy(logits, labels, label_smoothing=self.smoothing, reduction=self.reduction)
        return {"logits": logits, "loss": loss}


class Silent(ReturnsItsLoss):
    """Takes labels and returns no loss."""

    def forward(self, x: torch.Tensor, labels: torch.Tensor | None = None) -> dict[str, torch.Tensor]:
        return {"logits": self.layer(x)}


def test_a_loss_that_the_model_returns_is_compared_with_the_one_that_is_taken() -> None:
    x, y = torch.randn(9, 3, dtype=torch.float64), torch.arange(9) % 3
    data = [{"x": x[i], "labels": y[i]} for i in range(9)]
    for reduction in ("mean", "sum"):
        scores = ptif.attribute(ReturnsItsLoss(0.0, reduction), data, data, method="dual")
        assert "CrossEntropy() (inferred" in str(scores.diagnostics)
    model = ReturnsItsLoss(0.2)
    said = r"ReturnsItsLoss\(labels=...\) gives .* and CrossEntropy\(\), .* pass loss=.*ModelLoss\(\)"
    with pytest.raises(ptif.errors.InvalidInput, match=said):
        ptif.attribute(model, data, data, method="dual")
    smoothed = ptif.attribute(model, data, data, loss=nn.CrossEntropyLoss(label_smoothing=0.2), method="grad_dot")
    own = ptif.attribute(model, data, data, loss=ptif.objectives.ModelLoss(), method="grad_dot")
    torch.testing.assert_close(own.values, smoothed.values)
    for silent in (nn.Linear(3, 3).double(), Silent(0.0)):
        with pytest.raises(ptif.errors.InvalidInput, match="this one returns none; pass loss="):
            ptif.attribute(silent, (x, y), (x, y), loss=ptif.objectives.ModelLoss(), method="grad_dot")


class _Three(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Linear(4, 3).double()

    def forward(self, *several: Tensor) -> tuple[Tensor, ...]:
        return tuple(self.embed(one) for one in several)


# Of operations that torch batches slowly, of which it warns.
SLOWLY_BATCHED: dict[str, tuple[nn.Module, int, Any]] = {
    "triplets": (_Three(), 3, lambda out, y: F.triplet_margin_loss(*out)),
    "divergence": (
        nn.Linear(4, 3).double(),
        1,
        lambda out, y: F.kl_div(out.log_softmax(1), F.one_hot(y, 3) * 0.7 + 0.1, reduction="batchmean"),
    ),
}


@pytest.mark.parametrize("name", SLOWLY_BATCHED)
@pytest.mark.parametrize("method", [None, "grad_dot", "dual"])
def test_nothing_is_said_that_nobody_can_help(name: str, method: str | None) -> None:
    model, inputs, loss = SLOWLY_BATCHED[name]
    x = torch.randn(inputs, 20, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    data = torch.utils.data.TensorDataset(*x, torch.arange(20) % 3)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        ptif.attribute(model, data, data, loss, method=method)
    own = (ptif.errors.TrainingDataWarning,)
    assert [str(w.message) for w in said if not issubclass(w.category, own)] == []
