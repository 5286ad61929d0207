"""SOURCE by value: against dense float64 formulas, matrix exponentials, and real gradient descent."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import scipy.linalg
import torch
from torch import Tensor, nn
from torch.func import functional_call

import pytorch_influence_functions as ptif
from pytorch_influence_functions import curvature as curvatures
from pytorch_influence_functions.core.errors import InvalidInput
from pytorch_influence_functions.curvature import GGN, Hessian
from pytorch_influence_functions.damping import FromTraining
from pytorch_influence_functions.influence.method import Fitted
from pytorch_influence_functions.influence.scoring import grouped
from pytorch_influence_functions.linalg.scaled_identity import ScaledIdentity
from pytorch_influence_functions.trajectory import SOURCE, AdamState, Segment
from pytorch_influence_functions.trajectory.unrolling import response, survival
from tests.laws.test_influence import cross_entropy, mlp, relative_gap
from tests.oracles.autograd import dense_ggn, dense_hessian, example_gradients, flat_parameters, influence, unflatten
from tests.tolerance import gap, rounding

State = dict[str, Tensor]


def squared(outputs: Tensor, targets: Tensor) -> Tensor:
    return 0.5 * (outputs - targets).square().sum(1)


def moved(model: nn.Module, by: float, seed: int = 1) -> State:
    """A checkpoint beside the model's weights."""
    g = torch.Generator().manual_seed(seed)
    state = model.state_dict()
    return {k: v + by * torch.randn(v.shape, generator=g, dtype=v.dtype) for k, v in state.items()}


def at(model: nn.Module, state: State, make: Any) -> Tensor:
    """`make(model)` at other weights."""
    own = {k: v.clone() for k, v in model.state_dict().items()}
    model.load_state_dict(state)
    out: Tensor = make(model)
    model.load_state_dict(own)
    return out


def expm(matrix: Tensor) -> Tensor:
    return torch.from_numpy(scipy.linalg.expm(matrix.numpy()))


def flow(h: Tensor, span: float, p: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """S = exp(-span P H) and R = (integral of exp(-t P H) dt) P, without inverting H: from one block exponential."""
    size, p = len(h), torch.eye(len(h), dtype=h.dtype) if p is None else p
    block = torch.zeros(2 * size, 2 * size, dtype=h.dtype)
    block[:size, :size], block[:size, size:] = -span * p @ h, span * p
    both = expm(block)
    return both[:size, :size], both[:size, size:]


def dense_source(gq: Tensor, segments: list[tuple[Tensor, Tensor]], gradients: list[Tensor]) -> Tensor:
    """The formula written out: segments (S, R) and mean gradients [N, P], in the order of training."""
    u, total = gq, torch.zeros(len(gq), len(gradients[0]), dtype=gq.dtype)
    for (s, r), g in zip(reversed(segments), reversed(gradients), strict=True):
        total += u @ r @ g.T / len(g)
        u = u @ s
    return total


def regression(n: int = 14, p: int = 4) -> tuple[nn.Module, Tensor, Tensor, Tensor, Tensor]:
    """Linear regression at its optimum: gradients and Hessian stay what they are under gradient descent."""
    torch.manual_seed(0)
    x = torch.randn(n + 3, p).double() * torch.tensor([2.0, 1.0, 0.5, 0.1])
    y = torch.randn(n + 3, 1).double()
    model = nn.Linear(p, 1, bias=False).double()
    with torch.no_grad():
        model.weight.copy_(torch.linalg.lstsq(x[:n], y[:n]).solution.T)
    return model, x[:n], y[:n], x[n:], y[n:]


def descend(
    x: Tensor, y: Tensor, start: Tensor, weights: Tensor, lr: float | Tensor, steps: int, momentum: float = 0.0
) -> Tensor:
    """Full-batch gradient descent on sum_i weights_i 1/2 (x_i theta - y_i)^2; the weights that come out."""
    theta, velocity = start.clone(), torch.zeros_like(start)
    for _ in range(steps):
        velocity = momentum * velocity + (weights * (x @ theta - y[:, 0])) @ x
        theta = theta - lr * velocity
    return theta


def one(state: Any, lr: float = 0.05, steps: float = 60, **more: Any) -> Segment:
    return Segment([state], lr=lr, steps=steps, **more)


def problem_of(data: Any, **changes: Any) -> ptif.Problem:
    model, x, y, *_ = data
    loss = changes.pop("loss", ptif.SquaredError() if y.dim() == 2 else ptif.CrossEntropy())
    return ptif.Problem(model, loss, (x, y), **changes)


def values(data: Any, method: SOURCE, **changes: Any) -> Tensor:
    return method.fit(problem_of(data, **changes)).score((data[3], data[4])).values


# --------------------------------------------------------------------------- a quadratic


def removals_by_descent(
    data: Any, lr: float | Tensor, steps: int, momentum: float = 0.0, shrink: float = 1e-5
) -> Tensor:
    """(1/N) of the slope of the query loss in -epsilon, example i down-weighted by epsilon, by finite differences."""
    model, x, y, xq, yq = data
    n, start = len(x), model.weight.detach()[0]
    out = torch.zeros(len(xq), n, dtype=torch.float64)
    for i in range(n):
        ends = []
        for sign in (1.0, -1.0):
            weights = torch.full((n,), 1.0 / n, dtype=torch.float64)
            weights[i] -= sign * shrink / n
            end = descend(x, y, start, weights, lr, steps, momentum)
            ends.append(0.5 * (xq @ end - yq[:, 0]).square())
        out[:, i] = (ends[0] - ends[1]) / (2 * shrink)
    return out


def half(data: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Hessian, training gradients and query gradients."""
    model, x, y, xq, yq = data
    return x.T @ x / len(x), example_gradients(model, squared, x, y), example_gradients(model, squared, xq, yq)


def test_one_segment_on_a_quadratic_is_gradient_flow_without_the_example() -> None:
    data = regression()
    h, g, gq = half(data)
    method = SOURCE([one(data[0].state_dict())], Hessian())
    got = values(data, method, loss=squared)
    assert relative_gap(got, dense_source(gq, [flow(h, 3.0)], [g])) < 1e-10
    dot = gq @ g.T
    assert relative_gap((dot * got).sum() / (dot * dot).sum() * dot, got) > 0.05


def test_real_gradient_descent_is_met_as_the_learning_rate_falls() -> None:
    data = regression()
    method = SOURCE([one(data[0].state_dict())], Hessian())
    got = values(data, method, loss=squared)
    gaps = [relative_gap(got, removals_by_descent(data, 3.0 / steps, steps)) for steps in (30, 120, 480)]
    assert gaps[0] > 3.5 * gaps[1] > 12 * gaps[2], gaps  # first order: a quarter each time
    assert gaps[2] < 3e-3, gaps


def test_steps_of_descent_in_closed_form() -> None:
    """(I - (I - eta H)^K) H^-1 is exactly what descent does; the exponential differs from it by about eta lam / 2."""
    data = regression()
    h, g, gq = half(data)
    eye = torch.eye(len(h), dtype=h.dtype)
    power = torch.linalg.matrix_power(eye - 0.05 * h, 60)
    exact = gq @ (eye - power) @ torch.linalg.solve(h, g.T) / len(g)
    assert relative_gap(exact, removals_by_descent(data, 0.05, 60)) < 1e-7
    got = values(data, SOURCE([one(data[0].state_dict())], Hessian()), loss=squared)
    assert 0 < relative_gap(got, exact) < 0.05 * float(torch.linalg.eigvalsh(h).max()) / 2


@pytest.mark.slow
def test_momentum_is_a_larger_learning_rate() -> None:
    data = regression()
    state = data[0].state_dict()
    heavy = values(data, SOURCE([one(state, 0.01, 60, momentum=0.8)], Hessian()), loss=squared)
    plain = values(data, SOURCE([one(state, 0.05, 60)], Hessian()), loss=squared)
    assert torch.allclose(heavy, plain, rtol=1e-12)
    gaps = [relative_gap(heavy, removals_by_descent(data, 0.6 / k, k, 0.8)) for k in (100, 400, 1600)]
    assert gaps[2] < 0.05 and gaps[0] > 2 * gaps[1] > 4 * gaps[2], gaps


@pytest.mark.slow
def test_adam_meets_real_preconditioned_descent() -> None:
    """Steps of lr * P * gradient with P as Adam has it, one learning rate per weight."""
    data = regression()
    moments = torch.tensor([[4.0, 0.25, 1.0, 0.01]]).double()
    segment = one(data[0].state_dict(), adam=AdamState({"weight": moments}, eps=0.01))
    got = values(data, SOURCE([segment], Hessian()), loss=squared)
    p = 1 / (moments[0].sqrt() + 0.01)
    gaps = [relative_gap(got, removals_by_descent(data, 3.0 / k * p, k)) for k in (60, 240, 960)]
    assert gaps[0] > 3.5 * gaps[1] > 12 * gaps[2] and gaps[2] < 5e-3, gaps


def test_long_training_is_the_influence_function() -> None:
    data = mlp()
    model, x, y, xq, yq = data
    decay = 0.01
    g, gq = example_gradients(model, cross_entropy, x, y), example_gradients(model, cross_entropy, xq, yq)
    want = influence(dense_ggn(model, cross_entropy, x, y), decay, gq, g)
    gaps = []
    for steps in (1e2, 1e4, 1e6):
        method = SOURCE([one(model.state_dict(), 0.1, steps)])
        gaps.append(relative_gap(values(data, method, weight_decay=decay), want))
    assert gaps[0] > 0.1 and gaps[2] < 1e-9, gaps
    solved = ptif.exact(damping=0.0).fit(problem_of(data, weight_decay=decay)).score((xq, yq)).values
    assert relative_gap(solved, want) < 1e-9


def test_the_free_damping_rule() -> None:
    """(1 - exp(-t lam)) / lam lies within a third of 1 / (lam + 1 / t), and meets it at both ends."""
    lam, t = torch.logspace(-8, 8, 400, dtype=torch.float64), 7.0
    ratio = response(lam, t) * (lam + 1 / t)
    assert float(ratio.min()) > 1 - 1e-9 and float(ratio.max()) < 1.3
    assert torch.allclose(ratio[[0, -1]], torch.ones(2, dtype=torch.float64), atol=1e-6)
    operator = ScaledIdentity(ptif.Problem(nn.Linear(2, 1), nn.MSELoss(), (torch.ones(2, 2), torch.ones(2, 1))).space)
    assert FromTraining(lr=0.7, steps=100, momentum=0.9).of(operator) == pytest.approx(
        1 / one({}, 0.7, 100, momentum=0.9).span
    )


def test_the_two_functions_near_zero_and_below() -> None:
    lam = torch.tensor([-2.0, -1e-3, -1e-18, 0.0, 5e-324, 1e-300, 1e-9, 1e-3, 2.0, 1e12], dtype=torch.float64)
    t = 3.0
    got = response(lam, t)
    assert bool(torch.isfinite(got).all())
    middle = lam.abs() < 1e-8
    assert torch.allclose(got[middle], torch.full_like(got[middle], t), rtol=1e-8)
    assert torch.allclose(got * lam + survival(lam, t), torch.ones_like(lam), rtol=1e-12)


# --------------------------------------------------------------------------- segments, checkpoints, Adam


def parts(data: Any, states: list[State], dense: Any) -> tuple[list[Tensor], list[Tensor]]:
    model, x, y, *_ = data
    matrices = [at(model, s, lambda m: dense(m, cross_entropy, x, y)) for s in states]
    return matrices, [at(model, s, lambda m: example_gradients(m, cross_entropy, x, y)) for s in states]


@pytest.mark.parametrize("curvature", ["ggn", "hessian"])
def test_several_segments_and_checkpoints_equal_the_formula(curvature: str) -> None:
    data = mlp()
    model, _, _, xq, yq = data
    states = [moved(model, 0.3, 1), moved(model, 0.2, 2), moved(model, 0.1, 3)]
    dense, record = (dense_ggn, GGN()) if curvature == "ggn" else (dense_hessian, Hessian())
    (h0, h1, h2), (g0, g1, g2) = parts(data, states, dense)
    decay = 0.02 * torch.eye(len(h0), dtype=h0.dtype)
    first, second = flow((h0 + h1) / 2 + decay, 0.1 * 40), flow(h2 + decay, 0.01 * 70 / (1 - 0.5))
    gq = example_gradients(model, cross_entropy, xq, yq)
    want = dense_source(gq, [first, second], [(g0 + g1) / 2, g2])
    segments = [Segment(states[:2], 0.1, 40), one(states[2], 0.01, 70, momentum=0.5)]
    got = values(data, SOURCE(segments, record), weight_decay=0.02)
    assert relative_gap(got, want) < 1e-9
    # The order of segments, and the mean over checkpoints, matter: these must not pass.
    assert relative_gap(values(data, SOURCE(segments[::-1], record), weight_decay=0.02), want) > 0.01
    assert relative_gap(dense_source(gq, [first, second], [g0, g2]), want) > 0.01
    dot = dense_source(gq, [flow(0 * h0, 1.0)], [g2])
    assert relative_gap((dot * want).sum() / (dot * dot).sum() * dot, want) > 0.1


def test_queries_may_be_measured_at_other_weights() -> None:
    data = mlp()
    model, x, y, xq, yq = data
    state = moved(model, 0.2)
    h, g = dense_ggn(model, cross_entropy, x, y), example_gradients(model, cross_entropy, x, y)
    gq = at(model, state, lambda m: example_gradients(m, cross_entropy, xq, yq))
    got = values(data, SOURCE([one(model.state_dict())], final=state))
    assert relative_gap(got, dense_source(gq, [flow(h, 3.0)], [g])) < 1e-9


def test_live_weights_are_kept_apart_and_never_taken_twice() -> None:
    """`state_dict()` hands out live tensors; the test above is one trap, this is the other."""
    model, *_ = mlp()
    with pytest.raises(InvalidInput, match=r"^Checkpoints 1 and 2 are the same tensors .*deepcopy"):
        ptif.source([model.state_dict(), model.state_dict()], 0.1, 10, segments=2)


def test_every_example_may_carry_its_penalty() -> None:
    data = mlp()
    model, x, y, xq, yq = data
    state, strength = moved(model, 0.2), 0.05
    h = at(model, state, lambda m: dense_ggn(m, cross_entropy, x, y))
    h = h + strength * torch.eye(len(h), dtype=h.dtype)
    g = at(model, state, lambda m: example_gradients(m, cross_entropy, x, y) + strength * flat_parameters(m))
    gq = example_gradients(model, cross_entropy, xq, yq)
    got = values(data, SOURCE([one(state)]), weight_decay=ptif.WeightDecay(strength, per_example=True))
    assert relative_gap(got, dense_source(gq, [flow(h, 3.0)], [g])) < 1e-9


@pytest.mark.parametrize("decoupled", [0.0, 0.03])
def test_adam_equals_the_matrix_exponential(decoupled: float) -> None:
    """exp(-t (P H + decay)): not symmetric, so a transposed or half-preconditioned product would not pass."""
    data = mlp()
    model, _, _, xq, yq = data
    states = [moved(model, 0.3, 1), moved(model, 0.1, 2)]
    moments = [{k: v.square() * 0.1 + 0.01 for k, v in moved(model, 1.0, s).items()} for s in (5, 6)]
    adams = [AdamState(m, eps=1e-3, decay=decoupled) for m in moments]
    matrices, gradients = parts(data, states, dense_ggn)
    flows = []
    for h, m in zip(matrices, moments, strict=True):
        p = torch.cat([1 / (m[k].sqrt() + 1e-3).flatten() for k in model.state_dict()]).diag()
        h = h + 0.02 * torch.eye(len(h), dtype=h.dtype)
        flows.append(flow(h + decoupled * torch.linalg.inv(p), 0.02 * 30, p))
    want = dense_source(example_gradients(model, cross_entropy, xq, yq), flows, gradients)
    segments = [one(s, 0.02, 30, adam=a) for s, a in zip(states, adams, strict=True)]
    got = values(data, SOURCE(segments), weight_decay=0.02)
    assert relative_gap(got, want) < 1e-9
    without = values(data, SOURCE([one(s, 0.02, 30) for s in states]), weight_decay=0.02)
    assert relative_gap(without, want) > 0.1


@pytest.mark.parametrize("kind", [torch.optim.Adam, torch.optim.AdamW])
def test_adam_state_is_what_adam_divides_by(kind: Any) -> None:
    """One step of a real Adam with its first moment switched off moves every weight by lr * P * gradient."""
    model, x, y, *_ = mlp()
    optimizer = kind(
        model.parameters(), lr=1e-3, betas=(0.0, 0.9), weight_decay=0.1 if kind is torch.optim.AdamW else 0
    )
    for k in range(4):
        before = torch.cat([p.detach().flatten().clone() for p in model.parameters()])
        optimizer.zero_grad()
        torch.autograd.backward(cross_entropy(model(x), y)[10 * k :].mean())
        gradient = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
        optimizer.step()
    after = torch.cat([p.detach().flatten() for p in model.parameters()])
    space = ptif.Problem(model, ptif.CrossEntropy(), (x, y)).space
    for state in (
        AdamState.of(optimizer, model),
        AdamState.of(optimizer.state_dict(), model),
    ):
        to_flat = [space.to_parameters(space.rows(v[None])) for v in (state.root(space), state.decays(space))]
        root, decay = (torch.cat([v[k].flatten() for k in model.state_dict()]) for v in to_flat)
        assert torch.allclose(after - before, -1e-3 * (root.square() * gradient + decay * before), rtol=1e-9)


# --------------------------------------------------------------------------- a network's whole trajectory


@pytest.mark.slow
def test_many_segments_meet_the_unrolled_run_of_a_network() -> None:
    """Real descent from a random start, differentiated exactly: SOURCE with ever shorter segments tends to it."""
    torch.manual_seed(0)
    n, lr, steps = 10, 0.02, 192
    model = nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 2)).double()
    x, y, xq, yq = torch.randn(n, 2).double(), torch.arange(n) % 2, torch.randn(2, 2).double(), torch.tensor([0, 1])
    start = flat_parameters(model)

    def loss(theta: Tensor, w: Tensor) -> Tensor:
        return (w * cross_entropy(functional_call(model, unflatten(model, theta), (x,)), y)).sum()

    slope = torch.func.grad(loss)
    weights, theta, path = torch.full((n,), 1.0 / n).double().requires_grad_(), start, [start]
    for _ in range(steps):
        theta = theta - lr * slope(theta, weights)
        path.append(theta.detach())
    losses = cross_entropy(functional_call(model, unflatten(model, theta), (xq,)), yq)
    want = torch.stack([-torch.autograd.grad(v, weights, retain_graph=True)[0] / n for v in losses])

    def state(k: int) -> State:
        return {name: v.clone() for name, v in unflatten(model, path[k]).items()}

    gaps = []
    for count in (1, 3, 12):
        size = steps // count
        segments = [one(state(s * size + size // 2), lr, size) for s in range(count)]
        gaps.append(
            relative_gap(
                values((model, x, y, xq, yq), SOURCE(segments, Hessian(), final=state(-1))),
                want,
            )
        )
    assert gaps[0] > 3 * gaps[1] > 9 * gaps[2] and gaps[2] < 0.02, gaps


# --------------------------------------------------------------------------- properties


def fitted(data: Any, **changes: Any) -> tuple[SOURCE, Any]:
    model = data[0]
    segments = [
        Segment([moved(model, 0.2, 1), moved(model, 0.1, 2)], 0.1, 40),
        one(model.state_dict(), 0.02),
    ]
    method = SOURCE(segments, **changes.pop("spec", {}))
    return method, method.fit(problem_of(data, **changes))


@pytest.mark.slow
def test_batches_memory_top_and_dtype_change_nothing() -> None:
    data = mlp(n=20)
    model, x, y, xq, yq = data
    before = {k: v.clone() for k, v in model.state_dict().items()}
    model.train()
    method, unrolled = fitted(data)
    scores = unrolled.score((xq, yq))
    assert model.training and all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert all(p.grad is None and p.requires_grad for p in model.parameters())
    for batch in (1, 7):
        other = method.fit(problem_of(data, batch_size=batch)).score((xq, yq), batch_size=2)
        assert torch.allclose(other.values, scores.values, rtol=1e-10, atol=1e-16)
    size = unrolled.problem.space.size
    _, tight = fitted(data, spec={"memory": 8 * size**2 * 7})
    assert gap(tight.score((xq, yq)).values, scores.values) < rounding(scores.values, condition=1e3)
    top = unrolled.score((xq, yq), top=3)
    for few, every in ((top.helpful(1, k=3), scores.helpful(1, k=3)), (top.harmful(1, k=3), scores.harmful(1, k=3))):
        assert [i for i, _ in few] == [i for i, _ in every]
        assert [v for _, v in few] == pytest.approx([v for _, v in every], rel=1e-9)
    door = ptif.attribute(model, (x, y), (xq, yq), loss=nn.CrossEntropyLoss(), method=method)
    assert gap(door.values, scores.values) < rounding(scores.values, condition=1e3)
    model.float()
    single = method.fit(problem_of((model, x.float(), y))).score((xq.float(), yq)).values
    assert single.dtype == torch.float32 and relative_gap(single, scores.values) < 1e-4


def test_queries_are_grouped_by_memory() -> None:
    data = mlp(n=20)
    _, unrolled = fitted(data)
    each = unrolled.problem.space.size * 8 * 4
    small = replace(unrolled, spec=replace(unrolled.spec, memory=each * 4 * 3))
    groups = grouped(((g.ids, g.rows) for g in small.derivatives.stream()), small._room())
    assert [len(ids) for ids, _ in groups] == [3] * 6 + [2]
    assert torch.allclose(small.self_influence(), unrolled.self_influence(), rtol=1e-10)
    got, want = small.score((data[1], data[2])), unrolled.score((data[1], data[2]))
    assert torch.allclose(got.values, want.values, rtol=1e-10)


def test_self_scores_are_the_diagonal_of_the_training_data_as_queries() -> None:
    data = mlp(n=20)
    _, unrolled = fitted(data, weight_decay=ptif.WeightDecay(0.01, per_example=True))
    want = unrolled.score((data[1], data[2])).values.diagonal()
    assert torch.allclose(unrolled.self_influence(), want, rtol=1e-9)


def test_a_measure_and_words() -> None:
    data = mlp()
    model, _, _, xq, yq = data
    _, unrolled = fitted(data, weight_decay=0.01)
    assert isinstance(unrolled, Fitted) and unrolled.why == "asked for"
    scores = unrolled.score((xq, yq), measure=ptif.Margin())
    assert not scores.lower_is_better and scores.diagnostics is not None
    found = scores.diagnostics
    assert found.damping == pytest.approx(1 / (4.0 + 1.2)) and found.residual_max < 1e-12
    assert not found.needs_minimum and found.checks()[0].status == "ok"
    assert "2 segments with 3 checkpoints" in found.notes[0] and "exp" not in str(found.notes)
    assert found.method == (
        "SOURCE([Segment(2 checkpoints, lr=0.1, steps=40), Segment(1 checkpoint, lr=0.02, steps=60)], curvature=GGN())"
    )
    wild = SOURCE([one(moved(model, 1.0), 50.0, 3)], Hessian()).fit(problem_of(data)).score((xq, yq))
    assert wild.diagnostics is not None
    notes = " ".join(wild.diagnostics.notes)
    assert "descent itself would diverge" in notes and "negative curvature" in notes


def test_an_even_split_keeps_the_training_time() -> None:
    """lr x steps of every segment is the sum over its stretches, whose rates and lengths all differ."""
    states: list[Any] = [nn.Linear(1, 1).state_dict() for _ in range(7)]
    rates, steps = [0.9, 0.7, 0.4, 0.3, 0.1, 0.05, 0.01], [10, 20, 30, 5, 40, 25, 5]
    made = ptif.source(states, lr=rates, steps=steps, momentum=0.5)
    assert [len(s.checkpoint_tuple) for s in made.parts] == [3, 2, 2] and [s.steps for s in made.parts] == [60, 45, 30]
    spans = [sum(r * n for r, n in zip(rates[a:b], steps[a:b], strict=True)) for a, b in ((0, 3), (3, 5), (5, 7))]
    assert [s.span for s in made.parts] == pytest.approx([2 * span for span in spans])
    assert [s.lr for s in made.parts] == pytest.approx(
        [span / s.steps for span, s in zip(spans, made.parts, strict=True)]
    )
    assert ptif.source(states, 0.1, 70, segments=1).parts[0].span == pytest.approx(7.0)


@pytest.mark.parametrize("curvature", ["KFAC", "EKFAC"])
def test_kronecker_curvature_equals_its_own_dense_matrix(curvature: str) -> None:
    """One or several checkpoints to a segment: the operator's columns, exponentiated densely."""
    data = mlp()
    model, _, _, xq, yq = data
    states = [moved(model, 0.2, 1), moved(model, 0.1, 2), moved(model, 0.05, 3)]
    record = getattr(curvatures, curvature)()
    segments = [Segment(states[:2], 0.1, 40), one(states[2], 0.02, 50)]
    unrolled = SOURCE(segments, record).fit(problem_of(data, weight_decay=0.01))
    space = unrolled.problem.space
    flows = []
    for stretch in unrolled.segments:
        eye = torch.eye(space.size, dtype=torch.float64)
        flows.append(flow(stretch.operator.apply(space.rows(eye)).flat(), stretch.segment.span))
    _, (g0, g1, g2) = parts(data, states, lambda *a: torch.zeros(1))
    order = space.from_parameters(unflatten_rows(model, torch.eye(space.size, dtype=torch.float64))).flat()
    gq = example_gradients(model, cross_entropy, xq, yq) @ order
    want = dense_source(gq, flows, [(g0 + g1) / 2 @ order, g2 @ order])
    scores = unrolled.score((xq, yq))
    assert relative_gap(scores.values, want) < 1e-8
    assert scores.diagnostics.residual_max < 1e-12


def unflatten_rows(model: nn.Module, flat: Tensor) -> State:
    found, start = {}, 0
    for name, p in model.named_parameters():
        found[name] = flat[:, start : start + p.numel()].reshape(len(flat), *p.shape)
        start += p.numel()
    return found
