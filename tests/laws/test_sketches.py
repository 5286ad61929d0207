"""Projections by random signs: linear, the same everywhere, equal to the explicit matrix, and true on average."""

from __future__ import annotations

import hashlib

import pytest
import torch
from torch import Tensor, nn

import pytorch_influence_functions as ptif
from pytorch_influence_functions.core.errors import InvalidInput
from pytorch_influence_functions.gradients.per_example import Derivatives
from pytorch_influence_functions.gradients.projections import AbstractReduction
from pytorch_influence_functions.gradients.sketches import Sketch, TwoSided, random_signs, random_words
from pytorch_influence_functions.linalg.blocks import Dense, Indexed, Outer, Sum
from tests.laws.test_influence import mlp
from tests.laws.zoo import CASES, Case, build
from tests.tolerance import gap

# SHA-256 of a thousand words.
PINNED = "227faadd133bd0ef"
SPARSE = [TwoSided(3), TwoSided(2, 4, seed=5), Sketch(17), Sketch(9, seed=2), Sketch(7, per_layer=True)]


def matrix(problem: ptif.Problem, projection: AbstractReduction) -> Tensor:
    """P [parameters, k]: what the identity is projected to."""
    space = problem.space
    return projection.projector(space).apply(space.rows(torch.eye(space.size, dtype=torch.float64))).flat()


def test_words_depend_on_the_key_alone() -> None:
    """Pinned: another machine or version must draw the same projections for an index that is there."""
    words = random_words(1000, 0, "layer", "input")
    assert hashlib.sha256(words.astype("<u8").tobytes()).hexdigest()[:16] == PINNED
    assert (random_words(10, 0, "layer", "input") == words[:10]).all()
    assert (random_words(10, 0, "layer", "output") != words[:10]).all()
    assert (random_words(10, 1, "layer", "input") != words[:10]).all()


def test_signs_are_balanced_and_independent() -> None:
    signs = random_signs(100_000, 3, "a")
    assert set(signs.tolist()) == {-1.0, 1.0}
    assert abs(float(signs.mean())) < 4 / 100_000**0.5
    assert abs(float((signs[1:] * signs[:-1]).mean())) < 4 / 100_000**0.5


@pytest.mark.parametrize("projection", SPARSE, ids=repr)
def test_rows_in_factors_are_projected_as_the_explicit_matrix_does(projection: AbstractReduction) -> None:
    model, x, y, _, _ = mlp()
    problem = ptif.Problem(model, ptif.CrossEntropy(), (x, y))
    derivatives = Derivatives.of(problem)
    rows = next(iter(derivatives.stream())).rows
    projected = projection.projector(problem.space).apply(rows)
    assert gap(projected.flat(), rows.flat() @ matrix(problem, projection)) < 1e-12
    assert projected.flat().shape[1] == sum(b.numel for b in projection.projector(problem.space).space.blocks.values())


def test_a_sketch_is_its_definition() -> None:
    """Coordinate by coordinate: the piece of k that it is in, that piece's shift, and its own sign."""
    model, *_ = mlp()
    problem, k, seed = ptif.Problem(model, ptif.CrossEntropy(), mlp()[1:3]), 9, 2
    expected = []
    for name, block in problem.space.blocks.items():
        shifts = random_words(-(-block.numel // k), seed, name, "shift") % k
        signs = random_signs(block.numel, seed, name, "sign")
        lines = torch.zeros(block.numel, k, dtype=torch.float64)
        for p in range(block.numel):
            lines[p, (p + int(shifts[p // k])) % k] = signs[p]
        expected.append(lines)
    assert torch.equal(matrix(problem, Sketch(k, seed=seed)), torch.cat(expected))
    apart = matrix(problem, Sketch(k, seed=seed, per_layer=True))
    assert torch.equal(apart, torch.block_diag(*expected))


@pytest.mark.filterwarnings("ignore:Using padding='same':UserWarning")
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_every_layer_is_projected_as_its_written_out_gradient_is(case: Case) -> None:
    model, x, y = build(case)
    problem = ptif.Problem(model, ptif.CrossEntropy(), (x, y))
    rows = next(iter(Derivatives.of(problem).stream())).rows
    projector = TwoSided(2, 3).projector(problem.space)
    assert gap(projector.apply(rows).flat(), projector.apply(rows.dense()).flat()) < 1e-12


def test_other_forms_of_blocks() -> None:
    left, right = torch.randn(7, 3).double(), torch.randn(5, 2).double()
    outer = Outer(torch.randn(4, 6, 7).double(), torch.randn(4, 6, 5).double())
    table = Indexed(torch.randint(0, 7, (4, 6)), torch.randn(4, 6, 5).double(), 7)
    for block in (outer, table, Sum((outer, table)), Dense(outer.dense())):
        for a, b in ((left, right), (None, right), (left, None), (None, None)):
            dense = block.dense()
            expected = (dense if a is None else a.T @ dense) if b is None else (dense if a is None else a.T @ dense) @ b
            projected = block.project(a, b)
            assert gap(projected.dense(), expected) < 1e-12
    assert isinstance(table.project(left, right), Outer)


def test_a_convolution_is_projected_without_its_patches(float64: None) -> None:
    model = nn.Sequential(nn.Conv2d(2, 5, 3, stride=2, padding=1), nn.Tanh(), nn.Flatten(), nn.Linear(45, 3))
    x, y = torch.randn(6, 2, 6, 6), torch.randint(0, 3, (6,))
    problem = ptif.Problem(model, ptif.CrossEntropy(), (x, y))
    rows = next(iter(Derivatives.of(problem).stream())).rows
    for projection in (TwoSided(4), TwoSided(40, 3)):
        projected = projection.projector(problem.space).apply(rows)
        assert gap(projected.flat(), rows.flat() @ matrix(problem, projection)) < 1e-12


def test_inner_products_are_kept_on_average() -> None:
    """Over many seeds the mean of <Pa, Pb> is <a, b>, with the variance of a Johnson-Lindenstrauss map."""
    a, b = torch.randn(2, 40, dtype=torch.float64)
    model = nn.Linear(5, 8, bias=False).double()
    problem = ptif.Problem(model, ptif.SquaredError(), (torch.zeros(3, 5), torch.zeros(3, 8)))
    space, seeds = problem.space, 500
    rows = space.rows(torch.stack([a, b]))
    exact, size = float(a @ b), float(a.norm() * b.norm())
    for make, noise in (
        (lambda s: Sketch(10, seed=s), 1 / 10),
        (lambda s: TwoSided(3, 4, seed=s), 1 / 3 + 1 / 4 + 2 / 12),
    ):
        products = []
        for seed in range(seeds):
            flat = make(seed).projector(space).apply(rows).flat()
            products.append(float(flat[0] @ flat[1]))
        drawn = torch.tensor(products, dtype=torch.float64)
        assert abs(float(drawn.mean()) - exact) < 5 * float(drawn.std()) / seeds**0.5
        # Var <= (|a|^2 |b|^2 + <a, b>^2) / k for a sketch; with both sides each in turn and together.
        assert float(drawn.var()) < 1.3 * noise * (size**2 + exact**2)


def test_sides_no_longer_than_k_stay_as_they_are() -> None:
    model, x, y, _, _ = mlp()
    problem = ptif.Problem(model, ptif.CrossEntropy(), (x, y))
    rows = next(iter(Derivatives.of(problem).stream())).rows
    assert torch.equal(TwoSided(100).projector(problem.space).apply(rows).flat(), rows.flat())


def test_what_cannot_be_projected_is_refused() -> None:
    model, x, y, _, _ = mlp()
    problem = ptif.Problem(model, ptif.CrossEntropy(), (x, y))
    with pytest.raises(InvalidInput, match=r"Sketch\(k=57\) is no smaller than the 57 parameters"):
        Sketch(57).projector(problem.space)
    decaying = problem.with_(weight_decay={"0.weight": 0.1})
    with pytest.raises(InvalidInput, match=r"Weight decay differs between parameters, and Sketch\(k=10\) mixes them"):
        Sketch(10).projector(decaying.space)
    with pytest.raises(InvalidInput, match=r"measures its directions on the training data, which only an index does"):
        TwoSided(3, basis="eigenvectors").projector(problem.space)
    with pytest.raises(InvalidInput, match=r"TwoSided\(k_in=0\) must be a whole number of at least 1; 8 to 64 are"):
        TwoSided(0)
    with pytest.raises(InvalidInput, match=r"TwoSided\(basis='pca'\) must be 'random signs' or 'eigenvectors'"):
        TwoSided(3, basis="pca")
