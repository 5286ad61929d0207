"""Bugs planted on purpose: each must break a law, or the law is asleep.

Here the pipeline: values, indices, what is left behind. Other lists: layers, Kronecker factors, runs, evaluation.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import pytorch_influence_functions as ptif
from pytorch_influence_functions.core.errors import NonFinite, SolveFailed
from pytorch_influence_functions.curvature import GGN
from pytorch_influence_functions.damping import Relative
from pytorch_influence_functions.gradients import per_example as gradients
from pytorch_influence_functions.influence import attribution, scoring, topk
from pytorch_influence_functions.linalg.dense import Eigen
from pytorch_influence_functions.linalg.gram import Gram
from pytorch_influence_functions.linalg.space import Space
from pytorch_influence_functions.problem import model_state as guard
from pytorch_influence_functions.problem.data import Source
from pytorch_influence_functions.scaling import leverage
from pytorch_influence_functions.solvers import CG, Neumann, Spectral, Woodbury
from pytorch_influence_functions.solvers.base import Solution, System
from pytorch_influence_functions.solvers.neumann import series
from tests.oracles.autograd import dense_ggn, example_gradients, influence
from tests.planted.planting import Bug, Patch, must_be_noticed, swap

LAMBDA = 1e-2


def cross_entropy(outputs: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(outputs, targets, reduction="none")


def gap(a: Tensor, b: Tensor) -> float:
    return float((a.double() - b.double()).norm() / b.double().norm())


# --------------------------------------------------------------------------- laws, small and quick


def small(seed: int = 0, n: int = 24) -> tuple[nn.Module, Tensor, Tensor, Tensor, Tensor]:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4), nn.Tanh(), nn.Linear(4, 3)).double()
    x, y = torch.randn(n + 3, 4).double(), torch.randint(0, 3, (n + 3,))
    return model, x[:n], y[:n], x[n:], y[n:]


def values_law(solver: Any, decay: float = 0.0, loss: Any = None, train: Any = None) -> None:
    """Scores are those of the dense float64 solve."""
    model, x, y, xq, yq = small()
    g, gq = example_gradients(model, cross_entropy, x, y), example_gradients(model, cross_entropy, xq, yq)
    want = influence(dense_ggn(model, cross_entropy, x, y), LAMBDA + decay, gq, g)
    got = ptif.attribute(
        model,
        train(x, y) if train else (x, y),
        (xq, yq),
        loss=loss or nn.CrossEntropyLoss(),
        method=ptif.Influence(GGN(), solver, LAMBDA),
        weight_decay=decay,
    )
    assert gap(got.values, want) < 1e-6


def fisher_law() -> None:
    model, x, y, xq, yq = small()
    g, gq = example_gradients(model, cross_entropy, x, y), example_gradients(model, cross_entropy, xq, yq)
    for loss in (F.cross_entropy, nn.CrossEntropyLoss()):
        got = ptif.attribute(model, (x, y), (xq, yq), loss=loss, method=ptif.dual(damping=LAMBDA))
        assert gap(got.values, influence(g.T @ g / len(g), LAMBDA, gq, g)) < 1e-6


def relative_law() -> None:
    model, x, y, xq, yq = small()
    trace = float(dense_ggn(model, cross_entropy, x, y).diagonal().mean())
    for solver in (Spectral(), CG(1e-10)):
        spec = ptif.Influence(GGN(), solver, Relative(0.5))
        got = ptif.attribute(model, (x, y), (xq, yq), loss=nn.CrossEntropyLoss(), method=spec)
        assert got.diagnostics.damping == pytest.approx(0.5 * trace, rel=1e-6)


def trace_law() -> None:
    """The model is left as it was."""
    model, x, y, xq, yq = small()
    model.train()
    model[0].weight.requires_grad_(False)
    other = {k: v + 1 for k, v in model.state_dict().items()}
    before = {k: v.clone() for k, v in model.state_dict().items()}
    ptif.attribute(model, (x, y), (xq, yq), loss=nn.CrossEntropyLoss(), checkpoints=[other])
    assert all(m.training for m in model.modules())
    assert [p.requires_grad for p in model.parameters()] == [False] + [True] * 5
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert not any(m._forward_hooks for m in model.modules())


def ridge_law() -> None:
    """Leave-one-out of ridge regression in closed form."""
    torch.manual_seed(0)
    x, y = torch.randn(12, 3).double(), torch.randn(12, 1).double()

    def fit(keep: list[int]) -> Tensor:
        a = x[keep].T @ x[keep] / 12 + 0.2 * torch.eye(3).double()
        return torch.linalg.solve(a, x[keep].T @ y[keep] / 12)

    full = fit(list(range(12)))
    model = nn.Linear(3, 1, bias=False).double()
    with torch.no_grad():
        model.weight.copy_(full.T)
    change = torch.stack([(x[:2] @ (fit([j for j in range(12) if j != i]) - full))[:, 0] for i in range(12)], 1)
    measure = ptif.FromFunction(lambda out, t: out[:, 0], lower_is_better=False, reduction="none")
    fitted = ptif.methods.one_step_newton(1e-12).fit(ptif.Problem(model, ptif.SquaredError(), (x, y), weight_decay=0.2))
    assert gap(fitted.score((x[:2], y[:2]), measure).values, change) < 1e-8


def stopped_law() -> None:
    """A solver that stops early says so."""
    model, x, y, xq, yq = small()
    method = ptif.Influence(GGN(), CG(rtol=1e-10, max_steps=2, incomplete="error"), 1e-6)
    with pytest.raises(SolveFailed):
        ptif.attribute(model, (x, y), (xq, yq), loss=nn.CrossEntropyLoss(), method=method)


def nan_law() -> None:
    with pytest.raises(NonFinite):
        ptif.Scores(torch.tensor([[1.0, float("nan")]]))


def top_law() -> None:
    """The merged extremes are those of the whole."""
    model, x, y, xq, yq = small()
    options: dict[str, Any] = {"loss": nn.CrossEntropyLoss(), "batch_size": 5, "damping": LAMBDA}
    full, top = (
        ptif.attribute(model, (x, y), (xq, yq), **options),
        ptif.attribute(model, (x, y), (xq, yq), top=2, **options),
    )
    for q in range(3):
        assert [i for i, _ in top.helpful(q, 2)] == [i for i, _ in full.helpful(q, 2)]
        assert [i for i, _ in top.harmful(q, 2)] == [i for i, _ in full.harmful(q, 2)]


def shuffled_law() -> None:
    """Indices are positions in the dataset, whatever the loader's order."""
    dataset = torch.utils.data.TensorDataset
    values_law(Spectral(), train=lambda x, y: torch.utils.data.DataLoader(dataset(x, y), 7, shuffle=True))


def lissa_law() -> None:
    """The series ends at the damped inverse."""
    model, x, y, xq, yq = small()
    g, gq = example_gradients(model, cross_entropy, x, y), example_gradients(model, cross_entropy, xq, yq)
    want = influence(dense_ggn(model, cross_entropy, x, y), 0.1, gq, g)
    spec = ptif.Influence(GGN(), Neumann(batch_size=24, tolerance=1e-4), 0.1)
    got = ptif.attribute(model, (x, y), (xq, yq), loss=nn.CrossEntropyLoss(), method=spec)
    assert gap(got.values, want) < 1e-2


def gram_relative_law() -> None:
    """Relative damping is a share of trace / P, for stored rows too."""
    model, x, y, xq, yq = small()
    g = example_gradients(model, cross_entropy, x, y)
    want = 0.5 * float(g.square().sum()) / len(g) / g.shape[1]
    got = ptif.attribute(model, (x, y), (xq, yq), loss=nn.CrossEntropyLoss(), method=ptif.dual(damping=Relative(0.5)))
    assert got.diagnostics.damping == pytest.approx(want, rel=1e-6)


# --------------------------------------------------------------------------- bugs


def transposed(original: Any, self: Eigen, f: Any) -> Eigen:
    made = original(self, f)
    return Eigen(made.space, made.vectors.T.contiguous(), made.values)


def per_batch_mean(original: Any, objective: Any, outputs: Tensor, batch: Any, ids: Tensor) -> Any:
    losses, slope = original(objective, outputs, batch, ids)
    return losses, slope / len(ids)


def wrong_indices(original: Any, self: Any, plan: Any) -> Any:
    rolled = [torch.roll(ids, 1) for ids in plan]
    for ids, (_, batch) in zip(plan, original(self, rolled), strict=True):
        yield ids, batch


def last_batch_lost(original: Any, self: Any, at: Tensor, ids: Tensor, values: Tensor) -> None:
    if int(ids.max()) < 20:
        original(self, at, ids, values)


def left_in_eval(original: Any, self: Any) -> None:
    original(self)
    for module, _ in self.modes:
        module.training = False


def left_thawed(original: Any, self: Any) -> None:
    original(self)
    for parameter, _, _ in self.parameters:
        parameter.requires_grad_(True)


@contextmanager
def checkpoint_left_in(original: Any, model: nn.Module, checkpoint: Any) -> Iterator[None]:
    model.load_state_dict(checkpoint)
    yield


def scored(change: Callable[[Any, Tensor], Tensor]) -> Patch:
    """A bug in what leaves the scoring pass."""

    def bug(original: Any, self: Any, *args: Any) -> Any:
        return ((ids, change(self, v)) for ids, v in original(self, *args))

    return swap(scoring.TrainingStream, "blocks", bug)


def one_step_only(original: Any, self: Any, seed: int) -> Tensor:
    begun = self._begin()
    step = self.plan.step
    return begun + step * (self.b - self.state.system.product(begun))


def added_leverage(original: Any, derivatives: Any, solve: Any, count: int, only: Any = None) -> Any:
    return original(derivatives, solve, -count, only)


DENSE = partial(values_law, Spectral())
ITERATED = partial(values_law, CG(1e-10, incomplete="error"))
ELSEWHERE = swap(gradients, "slopes", per_batch_mean)
SNAPSHOT = guard._Snapshot

BUGS = [
    Bug("eigenvectors transposed", swap(Eigen, "function", transposed), DENSE),
    Bug("1/N lost", scored(lambda self, v: v * len(self.derivatives.problem)), DENSE),
    Bug("sign flipped", scored(lambda self, v: -v), DENSE),
    Bug("damping left out of the product", swap(System, "product", lambda f, self, x: self.curvature(x)), ITERATED),
    Bug(
        "damping put on b",
        swap(CG, "solve", lambda f, self, st, b: f(self, st, b.scaled(1 + LAMBDA))),
        ITERATED,
    ),
    Bug("stopped early, silently", swap(Solution, "unwrap", lambda f, self: self.value), stopped_law),
    Bug(
        "weight decay forgotten",
        swap(Space, "of", lambda f, model, parameters=None, decay=0.0: f(model, parameters)),
        partial(values_law, Woodbury(), 0.3),
    ),
    Bug(
        "sum taken for the mean eigenvalue",
        swap(Gram, "block_means", lambda f, self: {k: v * self.size for k, v in f(self).items()}),
        gram_relative_law,
    ),
    Bug("Gram divided by N twice", swap(Gram, "gram", lambda f, self: f(self) / self.count), fisher_law),
    Bug("mean taken for per-example loss", ELSEWHERE, fisher_law),
    Bug("batches under wrong indices", swap(Source, "load", wrong_indices), shuffled_law),
    Bug("model left in eval mode", swap(SNAPSHOT, "restore", left_in_eval), trace_law),
    Bug("frozen parameters thawed", swap(SNAPSHOT, "restore", left_thawed), trace_law),
    Bug("checkpoint left in the model", swap(attribution, "at_checkpoint", checkpoint_left_in), trace_law),
    Bug("leverage added, not removed", swap(leverage, "leverage_corrected", added_leverage), ridge_law),
    Bug("NaN ranked", swap(ptif.Scores, "_check_finite", lambda f, self: None), nan_law),
    Bug("last batch lost in the merge", swap(topk.TopK, "add", last_batch_lost), top_law),
    Bug("series not fed back", swap(series._Series, "once", one_step_only), lissa_law),
]


@pytest.mark.parametrize("bug", BUGS, ids=lambda bug: bug.name)
def test_a_planted_bug_breaks_its_law(bug: Bug, monkeypatch: pytest.MonkeyPatch) -> None:
    must_be_noticed(bug, monkeypatch)
