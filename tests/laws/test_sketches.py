"""Projections by random signs: linear, the same everywhere, equal to the explicit matrix, and true on average."""

from __future__ import annotations

import hashlib
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import pytorch_influence_functions as ptif
from pytorch_influence_functions.core.errors import InvalidInput
from pytorch_influence_functions.gradients import sketches
from pytorch_influence_functions.gradients.per_example import Derivatives
from pytorch_influence_functions.gradients.projections import AbstractReduction
from pytorch_influence_functions.gradients.sketches import Sketch, SketchProjector, TwoSided, random_signs, random_words
from pytorch_influence_functions.linalg.blocks import Conv, Dense, Indexed, Outer, Sum, Window, matrix_shape
from pytorch_influence_functions.linalg.rows import Rows
from pytorch_influence_functions.linalg.space import BlockSpec, Space
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


def definition(name: str, shape: tuple[int, int], k: int, seed: int) -> Tensor:
    """[coordinates, k]: place and sign of every coordinate, and the real Fourier transform of the k sums."""
    o, i = shape
    words = random_words(-(-o // k) * k, seed, name, "output", "places").reshape(-1, k)
    rows = torch.from_numpy(words.argsort(1, kind="stable")).flatten()[:o]
    shifts = torch.from_numpy((random_words(-(-i // k), seed, name, "input", "shifts") % k).astype("int64"))
    shifts[0] = 0
    columns = torch.arange(i) + shifts[torch.arange(i) // k]
    signs = random_signs(o, seed, name, "output", "signs")[:, None] * random_signs(i, seed, name, "input", "signs")
    sums = torch.nn.functional.one_hot((rows[:, None] + columns) % k, k).double() * signs[..., None]
    angles = 2 * torch.pi / k * torch.outer(torch.arange(k), torch.arange(k)).double()
    waves = [torch.ones(k, dtype=torch.float64) / k**0.5, *([torch.cos(angles[k // 2]) / k**0.5] if k % 2 == 0 else [])]
    for f in range(1, (k + 1) // 2):
        waves += [(2 / k) ** 0.5 * torch.cos(angles[f]), -((2 / k) ** 0.5) * torch.sin(angles[f])]
    transform = torch.stack(waves)
    assert gap(transform @ transform.T, torch.eye(k, dtype=torch.float64)) < 1e-12  # inner products stay
    return sums.flatten(0, 1) @ transform.T


@pytest.mark.parametrize("k", [3, 4, 9, 20])
def test_a_sketch_is_its_definition(k: int) -> None:
    """Coordinate by coordinate, for sides that are longer and shorter than k, in factors and written out."""
    problem = ptif.Problem(mlp()[0], ptif.CrossEntropy(), mlp()[1:3])
    blocks = problem.space.blocks
    expected = [definition(name, matrix_shape(block.shape), k, 2) for name, block in blocks.items()]
    assert gap(matrix(problem, Sketch(k, seed=2)), torch.cat(expected)) < 1e-12
    if max(block.numel for block in blocks.values()) > k:
        apart = [e if len(e) > k else torch.eye(len(e), dtype=torch.float64) for e in expected]
        assert gap(matrix(problem, Sketch(k, seed=2, per_layer=True)), torch.block_diag(*apart)) < 1e-12


@pytest.mark.parametrize("k", [5, 16])
@pytest.mark.parametrize("short", [1, 100])
def test_every_form_of_a_block_has_the_same_sketch(k: int, short: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """By matrix products, by fast transforms, and from rows that are written out."""
    monkeypatch.setattr(sketches, "_SHORT", short)
    outer = Outer(torch.randn(4, 6, 7).double(), torch.randn(4, 6, 12).double())
    table = Indexed(torch.randint(0, 7, (4, 6)), torch.randn(4, 6, 12).double(), 7)
    window = Window((2, 2), (1, 1), (1, 1), False)
    image = Conv(torch.randn(4, 7, 3, 4).double(), torch.randn(4, 3, 4, 5).double(), window)
    space = Space({"a": BlockSpec("a", (), (7, 12), decay=0.0)}, {})
    for block in (outer, table, image, Sum((outer, table)), Outer(outer.left[:, :1], outer.right[:, :1])):
        projector = Sketch(k).projector(space)
        expected = projector.apply(Rows({"a": Dense(block.dense())})).flat()
        monkeypatch.setattr(SketchProjector, "_is_cheaper_written_out", lambda *some: False)
        assert gap(projector.apply(Rows({"a": block})).flat(), expected) < 1e-12
        assert gap(projector.apply(Rows({"a": block.to(torch.float32)})).flat(), expected) < 1e-5


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


@pytest.mark.parametrize(
    ("make", "shape", "noise"),
    [
        (lambda s: Sketch(24, seed=s), (8, 5), lambda c, d: (1 + c * d) / 24),
        (lambda s: Sketch(10, seed=s), (8, 25), lambda c, d: (1 + d + 2 * c * d) / 10),
        (lambda s: TwoSided(3, 4, seed=s), (8, 5), lambda c, d: (1 + c * d) * (1 / 3 + 1 / 4 + 2 / 12)),
    ],
    ids=["sketch", "a side longer than k", "two-sided"],
)
def test_inner_products_are_kept_on_average(make: Any, shape: tuple[int, int], noise: Any) -> None:
    """Over many seeds the mean of <Pa, Pb> is <a, b>, and its variance no more than is said.

    The rows are products of sides that are alike, as inputs and activations are: what independent signs for outputs
    and inputs get most wrong. `noise` is the variance over |a|^2 |b|^2, where c and d are the squared cosines.
    """
    generator = torch.Generator().manual_seed(0)
    a, b = torch.rand(2, shape[1], generator=generator, dtype=torch.float64)
    d, e = torch.randn(2, shape[0], generator=generator, dtype=torch.float64) + 0.5
    space, seeds = Space({"w": BlockSpec("w", (), shape, decay=0.0)}, {}), 600
    rows = Rows({"w": Outer(torch.stack([d, e])[:, None], torch.stack([a, b])[:, None])})
    exact, size = float((a @ b) * (d @ e)), float(a.norm() * b.norm() * d.norm() * e.norm())
    drawn = torch.empty(seeds, dtype=torch.float64)
    for seed in range(seeds):
        flat = make(seed).projector(space).apply(rows).flat()
        drawn[seed] = flat[0] @ flat[1]
    assert abs(float(drawn.mean()) - exact) < 4 * float(drawn.std()) / seeds**0.5
    c_inputs, c_outputs = (float(torch.cosine_similarity(p, q, 0)) ** 2 for p, q in ((a, b), (d, e)))
    assert float(drawn.var()) < 1.25 * noise(c_inputs, c_outputs) * size**2


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
