"""Bugs planted in Kronecker-factored curvature: each must break its law."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import pytorch_influence_functions as ptif
from pytorch_influence_functions.curvature import GGN
from pytorch_influence_functions.curvature import exact as exact_curvatures
from pytorch_influence_functions.curvature.kronecker import moments as factors
from pytorch_influence_functions.linalg import kronecker
from pytorch_influence_functions.objectives import softmax
from pytorch_influence_functions.solvers import Spectral
from pytorch_influence_functions.solvers.preconditioner_trial import PreconditionerTrial
from pytorch_influence_functions.solvers.truncation import Truncated
from tests.laws import test_kronecker as laws
from tests.laws import test_padding, test_truncation
from tests.laws.test_influence import relative_gap
from tests.laws.zoo import CASES
from tests.planted.planting import Bug, must_be_noticed, swap

LAMBDA = 0.01


def textbook_law() -> None:
    """Two bias-free layers: EK-FAC as the papers write it, in float64, from explicit gradients."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5, bias=False), nn.Tanh(), nn.Linear(5, 3, bias=False)).double()
    x, y, xq, yq = torch.randn(25, 4).double(), torch.arange(25) % 3, torch.randn(2, 4).double(), torch.arange(2)
    got = ptif.ekfac(LAMBDA, GGN()).fit(ptif.Problem(model, ptif.CrossEntropy(), (x, y))).score((xq, yq)).values
    w1, w2 = (p.detach() for p in model.parameters())

    def parts(x: Tensor, cotangent: Tensor) -> list[tuple[Tensor, Tensor]]:
        hidden = torch.tanh(x @ w1.T)
        return [(cotangent @ w2 * (1 - hidden**2), x), (cotangent, hidden)]

    p = model(x).softmax(1).detach()
    columns = [p[:, c, None].sqrt() * (nn.functional.one_hot(torch.tensor(c), 3) - p) for c in range(3)]
    slope = p - nn.functional.one_hot(y, 3)
    slope_q = model(xq).softmax(1).detach() - nn.functional.one_hot(yq, 3)
    want = torch.zeros(2, 25).double()
    for layer in range(2):
        g = torch.cat([parts(x, c)[layer][0] for c in columns])
        a = parts(x, slope)[layer][1]
        q_g, q_a = torch.linalg.eigh(g.T @ g / 25)[1], torch.linalg.eigh(a.T @ a / 25)[1]
        values = ((g @ q_g) ** 2).T @ (a.repeat(3, 1) @ q_a) ** 2 / 25
        (gi, ai), (gq, aq) = parts(x, slope)[layer], parts(xq, slope_q)[layer]
        turned = torch.einsum("qo,qi->qoi", gq @ q_g, aq @ q_a) / (values + LAMBDA)
        want += torch.einsum("qoi,no,ni->qn", turned, gi @ q_g, ai @ q_a) / 25
    assert relative_gap(got, want) < 1e-8


def trace_law(name: str) -> None:
    laws.test_every_parameter_of_every_layer_takes_part(next(c for c in CASES if c.name == name))


def turned_wrongly(original: Any, x: Tensor, basis: Tensor | None) -> Tensor:
    return original(x, None if basis is None else basis.T.contiguous())


def not_turned_back(original: Any, self: Any, values: Tensor) -> Tensor:
    return values


def transposed_back(original: Any, self: Any, values: Tensor) -> Tensor:
    return original(kronecker.KroneckerBlock(self.left.T, self.right.T, self.values), values)


def only_the_first_column(original: Any, self: Any, columns: Any) -> None:
    original(self, columns[:1])


def uses_summed_before_squaring_are_lost(original: Any, self: Any, block: Any) -> None:
    """Every use of a table's row squared by itself."""
    turned = block.values.flatten(0, 1) if self.basis.right is None else block.values.flatten(0, 1) @ self.basis.right
    self.squares.index_add_(0, block.index.flatten(), turned.square())


def no_bound(original: Any, self: Any, training: Any) -> Tensor:
    return original(self, training) * 0.01


def trial_law() -> None:
    """A guide that is the inverse itself pays; one that is nonsense does not."""
    from pytorch_influence_functions.linalg.shift import Shift
    from tests.laws.solver_cases import a_space, some_rows, spectrum_matrix

    space = a_space()
    matrix, shift, row = spectrum_matrix(space), Shift(0.01), some_rows(space, 1)
    exact = Spectral().init(matrix, shift).inverse
    assert PreconditionerTrial.of(matrix, shift, exact, row).pays
    assert not PreconditionerTrial.of(matrix, shift, matrix.function(lambda v: v + 0.01), row).pays


BUGS = [
    Bug("eigenvectors transposed in fit", swap(factors, "_turn", turned_wrongly), textbook_law),
    Bug(
        "eigenvectors transposed in apply",
        swap(kronecker.KroneckerBlock, "out_of_basis", transposed_back),
        textbook_law,
    ),
    Bug("answer left in the eigenbasis", swap(kronecker.KroneckerBlock, "out_of_basis", not_turned_back), textbook_law),
    Bug("one class stands for all", swap(factors.BlockFactors, "see_squares", only_the_first_column), textbook_law),
    Bug(
        "eigenvalues not divided by N",
        swap(factors.BlockFactors, "corrected", lambda f, self, count: f(self, 1)),
        textbook_law,
    ),
    Bug(
        "products taken for measured eigenvalues",
        swap(factors.BlockFactors, "corrected", lambda f, self, count: self.basis),
        textbook_law,
    ),
    Bug(
        "norms left without curvature",
        swap(factors.BlockFactors, "_add_squares", lambda f, self, turned: f(self, turned * 0.0)),
        lambda: trace_law("layer norm"),
    ),
    Bug(
        "repeated tokens not added up",
        swap(factors.BlockFactors, "_squares_of_indexed", uses_summed_before_squaring_are_lost),
        lambda: trace_law("embedding"),
    ),
    Bug(
        "the same draw for basis and eigenvalues",
        swap(exact_curvatures, "draw_seed", lambda f, seed, k: f(seed, 0)),
        laws.test_eigenvalues_come_from_labels_drawn_anew,
    ),
    Bug(
        "a certificate too good to be true",
        swap(Truncated, "bound", no_bound),
        lambda: test_truncation.test_no_score_is_off_by_more_than_its_bound({"rank": 4}),
    ),
    Bug(
        "padding enters the factors",
        swap(factors, "teaching_uses", lambda f, columns: None),
        lambda: test_padding.test_scores_do_not_depend_on_padding("to 64"),
    ),
    Bug(
        "labels drawn by place",
        swap(softmax, "_of_counting", lambda f, numbers, counts: f(numbers, torch.ones_like(counts))),
        lambda: test_padding.test_scores_do_not_depend_on_padding("left to 20"),
    ),
    Bug("every guide pays", swap(PreconditionerTrial, "pays", lambda f, self: True), trial_law),
]


@pytest.mark.parametrize("bug", BUGS, ids=lambda bug: bug.name)
def test_a_planted_bug_breaks_its_law(bug: Bug, monkeypatch: pytest.MonkeyPatch) -> None:
    must_be_noticed(bug, monkeypatch)
