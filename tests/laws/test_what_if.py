"""Law: what_if on ridge regression is the refit, and on logistic regression near it; values, not ranks."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import pytorch_influence_functions as ptif
from pytorch_influence_functions.actions import what_if
from pytorch_influence_functions.core.errors import InvalidInput, NonFinite, SolveFailed

N, P, DECAY = 40, 5, 0.3


def ridge_data() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(N, P, generator=generator, dtype=torch.float64)
    y = x @ torch.randn(P, 1, generator=generator, dtype=torch.float64) + torch.randn(
        N, 1, generator=generator, dtype=torch.float64
    )
    return x, y


def ridge_weights(x: Tensor, y: Tensor, weights: Tensor, decay: float) -> Tensor:
    """argmin (1/N) sum_i w_i (x_i theta - y_i)^2 + decay/2 |theta|^2, the bias as a column of ones; [P + 1]."""
    columns = torch.cat([x, torch.ones(len(x), 1, dtype=x.dtype)], 1)
    left = 2 / N * (columns.T * weights) @ columns + decay * torch.eye(P + 1, dtype=x.dtype)
    return torch.linalg.solve(left, 2 / N * (columns.T * weights) @ y)[:, 0]


def ridge_model(x: Tensor, y: Tensor) -> nn.Linear:
    theta = ridge_weights(x, y, torch.ones(len(x), dtype=x.dtype), DECAY)
    model = nn.Linear(P, 1).double()
    with torch.no_grad():
        model.weight.copy_(theta[None, :P])
        model.bias.copy_(theta[P:])
    return model


def problem_of(x: Tensor, y: Tensor, per_example: bool = False) -> ptif.Problem:
    decay = ptif.WeightDecay(DECAY, per_example=per_example)
    return ptif.Problem(ridge_model(x, y), nn.MSELoss(), (x, y), weight_decay=decay, batch_size=7)


NEW_X = torch.linspace(-1, 2, P, dtype=torch.float64)
MORE = (torch.linspace(-2, 1, 3 * P, dtype=torch.float64).reshape(3, P), torch.tensor([[1.0], [-1.0], [4.0]]).double())
EDITS: dict[str, dict[str, Any]] = {
    "remove one": {"remove": [3]},
    "remove eight": {"remove": [0, 1, 2, 3, 20, 21, 22, 39]},
    "remove by mask": {"remove": torch.arange(N) % 5 == 1},
    "relabel": {"relabel": {4: [7.0], 9: [-3.0]}},
    "replace": {"replace": {4: NEW_X, 30: 2 * NEW_X}},
    "relabel and replace": {"replace": {4: NEW_X}, "relabel": {4: [7.0]}},
    "add": {"add": MORE},
    "reweight": {"reweight": {5: 0.25, 6: 3.0, 7: 0.0}},
    "everything at once": {
        "remove": [0, 1],
        "relabel": {4: [7.0]},
        "replace": {30: NEW_X},
        "add": MORE,
        "reweight": {5: 0.25},
    },
}


def refit(x: Tensor, y: Tensor, edit: dict[str, Any], per_example: bool) -> Tensor:
    """The closed form after an edit, done by hand."""
    x, y, weights = x.clone(), y.clone(), torch.ones(N, dtype=torch.float64)
    if "remove" in edit:
        weights[torch.as_tensor(edit["remove"])] = 0.0
    for i, label in edit.get("relabel", {}).items():
        y[i] = torch.tensor(label).double()
    for i, inputs in edit.get("replace", {}).items():
        x[i] = inputs
    for i, w in edit.get("reweight", {}).items():
        weights[i] = w
    if "add" in edit:
        x, y = torch.cat([x, MORE[0]]), torch.cat([y, MORE[1]])
        weights = torch.cat([weights, torch.ones(len(MORE[0]), dtype=torch.float64)])
    decay = DECAY * float(weights.sum()) / N if per_example else DECAY
    return ridge_weights(x, y, weights, decay)


@pytest.mark.parametrize("per_example", [False, True])
@pytest.mark.parametrize("name", EDITS)
def test_ridge_regression_is_refitted_exactly(name: str, per_example: bool) -> None:
    x, y = ridge_data()
    problem = problem_of(x, y, per_example)
    outcome = what_if(problem, **EDITS[name], method=ptif.exact(damping=0.0))
    before = torch.cat([problem.model.weight[0], problem.model.bias]).detach()
    want = refit(x, y, EDITS[name], per_example) - before
    change = outcome.parameter_change
    got = torch.cat([change["weight"][0], change["bias"]])
    assert float((got - want).norm() / want.norm()) < 1e-10
    first = outcome.first_order[0].flat()[0]
    # Another target leaves a linear model's curvature as it is: there the first order is exact too.
    assert name == "relabel" or float((first - want).norm() / want.norm()) > 1e-3, "nothing would be tested"
    # Predictions are linear in theta, so the measured outputs change by exactly the difference.
    edited = outcome.model()
    torch.testing.assert_close(
        edited.weight[0].detach(), refit(x, y, EDITS[name], per_example)[:P], rtol=1e-9, atol=1e-11
    )


@pytest.mark.slow
@pytest.mark.parametrize("method", ["exact", "dual ggn", "cg", "guided cg"])
def test_solvers_and_batches_agree(method: str) -> None:
    x, y = ridge_data()
    curvature = ptif.curvature.GGN()
    methods = {
        "exact": ptif.exact(damping=0.01),
        "dual ggn": ptif.Influence(curvature, ptif.solvers.Woodbury(), 0.01),
        "cg": ptif.Influence(curvature, ptif.solvers.CG(rtol=1e-12), 0.01),
        "guided cg": ptif.Influence(curvature, ptif.solvers.CG(rtol=1e-12), 0.01, preconditioner=curvature),
    }
    changes = [
        what_if(problem_of(x, y).with_(batch_size=size), remove=[1, 2, 3], relabel={8: [2.0]}, method=methods[method])
        for size in (3, 64)
    ]
    want = what_if(problem_of(x, y), remove=[1, 2, 3], relabel={8: [2.0]}, method=methods["exact"])
    for outcome in changes:
        torch.testing.assert_close(outcome.corrected[0].flat(), want.corrected[0].flat(), rtol=1e-8, atol=1e-11)


def test_large_groups_by_conjugate_gradients_are_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    import importlib

    module = importlib.import_module("pytorch_influence_functions.actions.what_if")
    x, y = ridge_data()
    wanted = what_if(problem_of(x, y), remove=range(15), method=ptif.exact(damping=0.0))
    monkeypatch.setattr(module, "_DENSE_ROWS", 3)
    outcome = what_if(problem_of(x, y), remove=range(15), method=ptif.exact(damping=0.0))
    assert "conjugate gradients" in outcome.how and "quadratics" not in outcome.how
    more = what_if(problem_of(x, y), remove=range(15), add=MORE, method=ptif.exact(damping=0.0))
    assert "conjugate gradients, with the new losses as quadratics because there are 18 outputs" in more.how
    torch.testing.assert_close(outcome.corrected[0].flat(), wanted.corrected[0].flat(), rtol=1e-5, atol=1e-8)


def softmax_fit(x: Tensor, y: Tensor, weights: Tensor, decay: float) -> nn.Linear:
    """The minimum of (1/N) sum w_i CE_i + decay/2 |theta|^2, to float64's rounding."""
    model = nn.Linear(x.shape[1], 3).double()
    nn.init.zeros_(model.weight), nn.init.zeros_(model.bias)
    optimiser = torch.optim.LBFGS(model.parameters(), max_iter=500, tolerance_grad=1e-12, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimiser.zero_grad()
        losses = nn.functional.cross_entropy(model(x), y, reduction="none")
        loss = (losses * weights).sum() / len(x) + decay / 2 * sum(p.square().sum() for p in model.parameters())
        loss.backward()
        return loss

    optimiser.step(closure)
    return model


@pytest.mark.parametrize("size", [1, 10, 60])
def test_groups_of_logistic_regression_against_refits(size: int) -> None:
    torch.manual_seed(0)
    n, decay = 200, 0.01
    y = torch.arange(n) % 3
    x = torch.randn(n, 8).double() + nn.functional.one_hot(y, 8)
    xq, yq = torch.randn(20, 8).double(), torch.arange(20) % 3
    ones = torch.ones(n, dtype=torch.float64)
    model = softmax_fit(x, y, ones, decay)
    fitted = ptif.exact(damping=0.0).fit(ptif.Problem(model, nn.CrossEntropyLoss(), (x, y), weight_decay=decay))

    def losses(m: nn.Module) -> Tensor:
        return nn.functional.cross_entropy(m(xq), yq, reduction="none").detach()

    predicted, first, measured = [], [], []
    for seed in range(5):
        group = torch.randperm(n, generator=torch.Generator().manual_seed(seed))[:size]
        weights = ones.clone()
        weights[group] = 0.0
        outcome = what_if(fitted, remove=group)
        predicted.append(losses(outcome.model()) - losses(model))
        first.append(outcome.change((xq, yq), order="first"))
        measured.append(losses(softmax_fit(x, y, weights, decay)) - losses(model))
    p, f, m = (torch.cat(parts) for parts in (predicted, first, measured))
    slope, plain = ((a * m).sum() / (a * a).sum() for a in (p, f))
    assert abs(float(slope) - 1) < 0.05
    assert abs(float(plain) - 1) > abs(float(slope) - 1), "first order is not the better one"
    assert float(torch.corrcoef(torch.stack([p, m]))[0, 1]) > 0.99


def softmax_problem(n: int) -> tuple[ptif.Problem, Tensor, Tensor]:
    torch.manual_seed(0)
    y = torch.arange(n) % 3
    x = torch.randn(n, 8).double() + nn.functional.one_hot(y, 8)
    model = softmax_fit(x, y, torch.ones(n, dtype=torch.float64), 0.01)
    return ptif.Problem(model, nn.CrossEntropyLoss(), (x, y), weight_decay=0.01), x, y


EDITS_OF_CLASSES: dict[str, dict[str, Any]] = {
    "relabel": {"relabel": {i: (i + 1) % 3 for i in range(30)}},
    "replace and add": {
        "replace": {3: torch.full((8,), 2.0), 4: torch.full((8,), -2.0)},
        "add": (torch.linspace(-3, 3, 48, dtype=torch.float64).reshape(6, 8), torch.arange(6) % 3),
    },
    "everything": {
        "relabel": {0: 2, 1: 2},
        "replace": {0: torch.ones(8)},
        "remove": [5, 6],
        "reweight": {7: 9, 8: 0.1},
    },
}


@pytest.mark.parametrize("name", EDITS_OF_CLASSES)
def test_new_losses_are_themselves_and_old_ones_their_quadratics(name: str) -> None:
    """The edited objective in all of the parameters, dense in float64, is convex: least where it has no slope."""
    problem, x, y = softmax_problem(90)
    edit = EDITS_OF_CLASSES[name]
    outcome = what_if(problem, **edit, method=ptif.exact(damping=0.0))
    new_x, new_y = x.clone(), y.clone()
    weights = torch.ones(90, dtype=torch.float64)
    for i, label in edit.get("relabel", {}).items():
        new_y[i] = label
    for i, inputs in edit.get("replace", {}).items():
        new_x[i] = inputs
    weights[edit.get("remove", [])] = 0.0
    for i, w in edit.get("reweight", {}).items():
        weights[i] = w
    changed = (new_y != y) | (new_x != x).any(1)
    more_x, more_y = edit.get("add", (x[:0], y[:0]))

    def losses(flat: Tensor, inputs: Tensor, labels: Tensor) -> Tensor:
        outputs = inputs @ flat[:24].reshape(3, 8).T + flat[24:]
        return nn.functional.cross_entropy(outputs, labels, reduction="none")

    at = torch.cat([problem.model.weight.flatten(), problem.model.bias]).detach()
    lost = torch.where(changed, -1.0, (weights - 1).clamp_max(0.0))
    gained = torch.where(changed, 1.0, (weights - 1).clamp_min(0.0))
    objective = lambda t: losses(t, x, y).mean() + 0.005 * t.square().sum()  # noqa: E731
    old = lambda t: (lost * losses(t, x, y)).sum() / 90  # noqa: E731
    new = lambda t: ((gained * losses(t, new_x, new_y)).sum() + losses(t, more_x, more_y).sum()) / 90  # noqa: E731
    hessian, slope = torch.func.hessian, torch.func.grad
    kept, pull = hessian(objective)(at) + hessian(old)(at), slope(old)(at)
    change = outcome.parameter_change
    moved = torch.cat([change["weight"].flatten(), change["bias"]])
    assert "Newton steps with the new losses themselves" in outcome.how
    left = kept @ moved + pull + slope(new)(at + moved)
    before = pull + slope(new)(at)
    assert float(left.norm()) < 1e-9 * float(before.norm()), "the edited objective has a slope there"


@pytest.mark.parametrize("size", [1, 10, 100])
def test_relabelled_groups_of_logistic_regression_against_refits(size: int) -> None:
    problem, x, y = softmax_problem(1000)
    fitted = ptif.exact(damping=0.0).fit(problem)
    xq, yq = x[:40] + 0.1, y[:40]

    def losses(model: nn.Module) -> Tensor:
        return nn.functional.cross_entropy(model(xq), yq, reduction="none").detach()

    predicted, first, measured = [], [], []
    for seed in range(2):
        group = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))[:size]
        labels = y.clone()
        labels[group] = (y[group] + 1) % 3
        outcome = what_if(fitted, relabel={int(i): int(labels[i]) for i in group})
        predicted.append(outcome.change((xq, yq)))
        first.append(outcome.change((xq, yq), order="first"))
        refitted = softmax_fit(x, labels, torch.ones(len(x), dtype=torch.float64), 0.01)
        measured.append(losses(refitted) - losses(problem.model))
    p, f, m = (torch.cat(parts) for parts in (predicted, first, measured))
    slope, plain = (float((a * m).sum() / (a * a).sum()) for a in (p, f))
    # Those left have curved losses too: a tenth of all labels moves them out of their quadratics.
    assert abs(slope - 1) < (0.05 if size < 100 else 0.15)
    assert abs(plain - 1) > abs(slope - 1)


def test_a_duplicated_pair_is_not_underestimated() -> None:
    x, y = ridge_data()
    x[1], y[1] = x[0], y[0]
    x[:2] *= 3
    problem = problem_of(x, y)
    fitted = ptif.exact(damping=0.0).fit(problem)
    together = what_if(fitted, remove=[0, 1]).corrected[0].flat()
    singly = sum(what_if(fitted, remove=[i]).corrected[0].flat() for i in (0, 1))
    assert float(together.norm() / singly.norm()) > 1.1, "removing both moves more than twice removing one"


def test_the_model_and_the_data_are_left_alone() -> None:
    x, y = ridge_data()
    problem = problem_of(x, y)
    state, copies = copy.deepcopy(problem.model.state_dict()), (x.clone(), y.clone())
    problem.model.train()
    outcome = what_if(problem, replace={3: NEW_X}, relabel={5: [1.0]})
    assert problem.model.training and outcome.model().training
    assert all(torch.equal(v, problem.model.state_dict()[k]) for k, v in state.items())
    assert torch.equal(x, copies[0]) and torch.equal(y, copies[1])


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "nothing": ({}, "Nothing is changed; give remove="),
    "outside": ({"remove": [40]}, "remove= names index 40, and the training examples are 0 to 39"),
    "doubled": ({"remove": [3, 3]}, "remove= names index 3 more than once"),
    "everything": ({"remove": range(N)}, "Of the 40 training examples nothing would be left"),
    "mask": ({"remove": torch.ones(3, dtype=torch.bool)}, r"a mask of shape \(3,\) and there are 40"),
    "floats": ({"remove": [1.5]}, "takes whole numbers"),
    "two things": ({"remove": [1], "reweight": {1: 0.5}}, "Example 1 is both removed and reweighted"),
    "list of labels": ({"relabel": [1, 2]}, r"relabel= takes a mapping by index, such as \{3: 0\}, got list"),
    "weight": ({"reweight": {1: -1.0}}, r"reweight\[1\] is -1.0; it must be a finite number of at least 0"),
    "shape": ({"replace": {1: torch.zeros(2, P)}}, r"The new input has shape \(2, 5\) and the old one \(5,\)"),
    "with its label": (
        {"replace": {1: (torch.zeros(P), torch.zeros(1))}},
        r"has one input and 2 were given; the label is no input: replace= .* and relabel= a new label",
    ),
    "method": (
        {"remove": [1], "method": ptif.methods.Random()},
        "what_if\\(\\) solves a linear system, which Random does not have",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_refused_in_one_sentence(name: str) -> None:
    arguments, match = BAD[name]
    with pytest.raises(InvalidInput, match=match):
        what_if(problem_of(*ridge_data()), **arguments)


def test_a_label_outside_the_classes_is_refused() -> None:
    x, y = torch.randn(30, 4), torch.arange(30) % 3
    problem = ptif.Problem(nn.Linear(4, 3), nn.CrossEntropyLoss(), (x, y))
    with pytest.raises(InvalidInput, match=r"Label 7 at dataset index 2 is out of range.* 0\.\.2"):
        what_if(problem, relabel={2: 7})
    with pytest.raises(InvalidInput, match=r"The new label 0.5 of example 2 is no class number, as tensor\(2\) is"):
        what_if(problem, relabel={2: 0.5})  # a class number would be cut from it
    with pytest.raises(InvalidInput, match="The new label None of example 2 is no class number"):
        what_if(problem, relabel={2: None})
    with pytest.raises(NonFinite, match="NaN or infinity at dataset index 3"):
        what_if(problem, replace={3: torch.full((4,), float("nan"))})
    targets = ptif.Problem(nn.Linear(4, 1), nn.MSELoss(), (x, x[:, :1]))
    with pytest.raises(InvalidInput, match="Example 2 has no new label; give one, or remove the example"):
        what_if(targets, relabel={2: None})


def test_removing_more_curvature_than_there_is_fails_in_words() -> None:
    x, y = ridge_data()
    # More columns than examples that are left: nothing but damping holds the rest.
    problem = ptif.Problem(nn.Linear(P, 1).double(), nn.MSELoss(), (x[:8], y[:8]))
    with pytest.raises(SolveFailed, match="raise the damping"):
        what_if(problem, remove=range(7), method=ptif.exact(damping=0.0))


def test_a_loss_written_by_hand_is_refitted_exactly_too() -> None:
    x, y = ridge_data()
    by_hand = problem_of(x, y).with_(objective=lambda f, t: ((f - t) ** 2).mean())
    want = what_if(problem_of(x, y), remove=[1, 2, 3], method=ptif.exact(damping=0.0))
    outcome = what_if(by_hand, remove=[1, 2, 3], method=ptif.exact(damping=0.0))
    torch.testing.assert_close(outcome.corrected[0].flat(), want.corrected[0].flat(), rtol=1e-9, atol=1e-12)


def test_a_loss_without_a_gauss_newton_matrix_is_first_order_and_says_so() -> None:
    x, y = ridge_data()
    problem = problem_of(x, y).with_(objective=nn.L1Loss())
    fitted = ptif.Influence(ptif.curvature.Identity(), ptif.solvers.Spectral(), 0.5).fit(problem)
    assert "first order, because the loss has no Gauss-Newton matrix" in what_if(fitted, remove=[1]).how


def test_kronecker_factors_that_do_not_hold_the_examples_stay_at_first_order() -> None:
    """EK-FAC of a network that fits its data: ten examples taken out have more curvature than the factors hold."""
    generator = torch.Generator().manual_seed(0)
    y = torch.arange(120) % 3
    x = torch.randn(120, 10, generator=generator) + nn.functional.one_hot(y, 10)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(10, 12), nn.Tanh(), nn.Linear(12, 3))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    for _ in range(200):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
    fitted = ptif.ekfac(ptif.damping.Relative(0.01)).fit(ptif.Problem(model, nn.CrossEntropyLoss(), (x, y)))
    outcome = ptif.what_if(fitted, remove=list(range(10)))
    assert "first order" in outcome.how and outcome.correction == 0
    summed = fitted.score((x[:4], y[:4])).values[:, :10].sum(1).double()
    torch.testing.assert_close(outcome.change((x[:4], y[:4])), summed, rtol=1e-4, atol=1e-7)
    # New labels are put in as they are: to first order they would move the model many times too far.
    relabelled = ptif.what_if(fitted, relabel={i: (i + 1) % 3 for i in range(10)})
    assert "new losses themselves and the old ones to first order" in relabelled.how
    assert float(relabelled.corrected[0].flat().norm()) < 0.5 * float(relabelled.first_order[0].flat().norm())
    with torch.no_grad():
        before, after = (
            torch.nn.functional.cross_entropy(m(x[:10]), (y[:10] + 1) % 3) for m in (model, relabelled.model())
        )
    assert float(after) < float(before)
