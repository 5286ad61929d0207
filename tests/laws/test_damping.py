"""Damping rules and the diagonal they make."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

import pytorch_influence_functions as ptif
from pytorch_influence_functions.core.errors import InvalidInput, NonFinite
from pytorch_influence_functions.curvature import GGN, Budget, EmpiricalFisher, Form
from pytorch_influence_functions.damping.rules import Absolute, FromTraining, PerDirection, Relative, as_damping
from pytorch_influence_functions.gradients.per_example import Derivatives
from pytorch_influence_functions.linalg.dense import Matrix
from pytorch_influence_functions.linalg.operator import mean_determined
from pytorch_influence_functions.linalg.scaled_identity import ScaledIdentity
from pytorch_influence_functions.linalg.shift import Shift
from tests.laws.solver_cases import F64, a_space, dense_shift, outer_rows, some_rows, spectrum_matrix, uneven


class _Mean:
    def __init__(self, value: float) -> None:
        self.value = value

    def mean_eigenvalue(self) -> float:
        return self.value

    def mean_determined(self) -> float:
        return self.value

    def block_means(self) -> dict[str, float]:
        return {"all": self.value}


def test_relative_follows_the_scale_of_the_curvature() -> None:
    space = a_space()
    one = spectrum_matrix(space)
    ten = Matrix(space, 10 * one.matrix)
    assert Relative(0.3).of(one) == pytest.approx(0.3 * float(one.matrix.trace()) / space.size, rel=1e-12)
    assert Relative(0.3).of(ten) == pytest.approx(10 * Relative(0.3).of(one), rel=1e-12)
    assert Relative(0.3).of(ScaledIdentity(space, 2.0)) == pytest.approx(0.6)


@pytest.mark.parametrize("n", [5, 40], ids=["more parameters", "more outputs"])
@pytest.mark.parametrize("classes", [2, 4])
def test_per_direction_divides_the_trace_by_what_the_examples_determine(n: int, classes: int) -> None:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(3, 5), torch.nn.Tanh(), torch.nn.Linear(5, classes)).double()
    x, y = torch.randn(n, 3, dtype=F64), torch.arange(n) % classes
    problem = ptif.Problem(model, ptif.CrossEntropy(), (x, y))
    exact = GGN().of(Derivatives.of(problem), Form.MATRIX, Budget()).matrix
    rank = int(torch.linalg.matrix_rank(exact, hermitian=True))
    assert rank <= min(len(exact), n * (classes - 1))
    for method in (ptif.ekfac(PerDirection(0.3)), ptif.methods.shampoo(PerDirection(0.3))):
        member = method.fit(problem).members[0]
        expected = 0.3 * float(exact.trace()) / min(len(exact), n * (classes - 1))
        assert member.shift.damping == pytest.approx(expected, rel=1e-9)
        assert member.shift.blocks == {}  # one for all layers
    # A matrix whose rows are not known may have any rank; one made of rows, and the rows kept, have no more than rows.
    assert PerDirection(0.3).of(Matrix(problem.space, exact)) == pytest.approx(0.3 * float(exact.diagonal().mean()))
    for form in (Form.MATRIX, Form.GRAM):
        for curvature, rows in ((GGN(), n * (classes - 1)), (EmpiricalFisher(), n)):
            operator = curvature.of(Derivatives.of(problem), form, Budget())
            trace = operator.mean_eigenvalue() * len(exact)
            assert PerDirection(0.3).of(operator) == pytest.approx(0.3 * trace / min(len(exact), rows))


class _Reader(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.words, self.head = torch.nn.Embedding(6, 12), torch.nn.Linear(12, 6)

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        return self.head(self.words(input_ids).cumsum(1).tanh())


def _texts(lengths: list[int], width: int) -> list[dict[str, torch.Tensor]]:
    texts = []
    for length in lengths:
        ids = torch.randint(6, (width,), generator=torch.Generator().manual_seed(length))
        mask = (torch.arange(width) < length).long()
        texts.append({"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)})
    return texts


def test_per_direction_does_not_depend_on_the_order_or_the_padding_of_texts() -> None:
    lengths = [2, 2, 3, 3, 4, 6, 8, 9]
    model, directions = _Reader().double(), (sum(lengths) - len(lengths)) * 5
    found = []
    for order, width in ((lengths, 9), (lengths[::-1], 9), (lengths, 14)):
        problem = ptif.Problem(model, ptif.TokenCrossEntropy(shift=True), _texts(order, width))
        assert directions < problem.space.size
        for method in (ptif.ekfac(PerDirection(0.3), GGN()), ptif.methods.kfac(fisher=GGN())):
            member = method.fit(problem).members[0]
            assert member.operator.directions == pytest.approx(directions)
            found.append(member.shift.damping)
    assert found == pytest.approx(found[:2] * 3, rel=1e-6)


def test_per_direction_is_the_same_where_every_block_was_on_disk(tmp_path: Path) -> None:
    problem = ptif.Problem(_Reader(), ptif.TokenCrossEntropy(shift=True), _texts([2, 3, 4, 6, 8, 9], 9))
    method = ptif.ekfac(PerDirection(), folder=tmp_path)
    first, again = (method.fit(problem).members[0].shift.damping for _ in range(2))
    assert again == pytest.approx(first, rel=1e-6)


def test_examples_without_a_label_and_given_labels_count_for_what_they_are() -> None:
    torch.manual_seed(0)
    x, y = torch.randn(12, 9), torch.arange(12) % 3
    y[:4] = -100
    problem = ptif.Problem(torch.nn.Linear(9, 3), torch.nn.CrossEntropyLoss(ignore_index=-100), (x, y))
    for method, directions in ((ptif.ekfac(), 8 * 2), (ptif.ekfac(fisher=EmpiricalFisher()), 12)):
        member = method.fit(problem).members[0]
        trace = member.operator.mean_eigenvalue() * problem.space.size
        assert member.shift.damping == pytest.approx(0.2 * trace / directions, rel=1e-5)
    assert mean_determined({"a": 3.0}, {"a": 4}, 0.0) == 3.0  # over all parameters


def test_a_block_of_rounding_alone_has_no_part_in_what_is_determined() -> None:
    means, sizes = {"a": 2.0, "b": 1e-15}, {"a": 4, "b": 12}
    assert mean_determined(means, sizes, math.inf) == pytest.approx(2.0)
    assert mean_determined(means | {"b": 1e-9}, sizes, math.inf) == pytest.approx(0.5)


def test_directions_of_outputs_are_counted() -> None:
    tokens = {"input_ids": torch.arange(14).view(2, 7) % 4, "attention_mask": torch.ones(2, 7)}
    tokens["attention_mask"][1, :3] = 0  # padding
    shifted = ptif.TokenCrossEntropy(shift=True)
    assert shifted.output_directions(torch.zeros(2, 7, 4), tokens) == (6 + 3) / 2 * 3
    pictures = torch.zeros(2, 3, 4, dtype=torch.long)
    assert ptif.CrossEntropy().output_directions(torch.zeros(2, 5, 3, 4), (pictures, pictures)) == 3 * 4 * 4
    assert ptif.SquaredError().output_directions(torch.zeros(2, 7, 4), (tokens, tokens)) == 7 * 4


def test_from_training_is_the_inverse_of_the_distance_travelled() -> None:
    assert FromTraining(lr=0.1, steps=200).of(_Mean(1.0)) == pytest.approx(0.05)
    assert FromTraining(lr=0.1, steps=200, momentum=0.9).of(_Mean(1.0)) == pytest.approx(0.005)


def test_a_number_is_absolute_damping() -> None:
    assert as_damping(0.25) == Absolute(0.25)
    assert as_damping(Relative(0.2)) == Relative(0.2)
    assert Absolute(0.25).of(_Mean(7.0)) == 0.25


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: Relative(0.0), r"^Relative\(share=0.0\) must be a finite number above 0; 0.1 is a good start"),
        (lambda: Relative(-1.0), r"^Relative\(share=-1.0\) must be a finite number above 0"),
        (lambda: Relative(math.nan), r"share=nan\) must be a finite number above 0"),
        (lambda: PerDirection(0.0), r"^PerDirection\(share=0.0\) must be a finite number above 0; 0.2 is a good start"),
        (lambda: PerDirection().of(_Mean(0.0)), r"^PerDirection\(\) scales the mean eigenvalue .* which is 0 here"),
        (lambda: Absolute(-0.1), r"^Absolute\(value=-0.1\) must be a finite number of at least 0"),
        (lambda: Absolute(math.inf), r"value=inf\) must be a finite number of at least 0"),
        (lambda: FromTraining(0.0, 10), r"^FromTraining\(lr=0.0\) must be a finite number above 0"),
        (lambda: FromTraining(0.1, 0), r"steps=0\) must be a finite number of at least 1"),
        (lambda: FromTraining(0.1, 10, 1.0), r"momentum=1.0\) must be a number of at least 0 and below 1"),
        (lambda: Relative(0.1).of(_Mean(-2.0)), "which is -2 here; use Absolute"),
        (lambda: Relative(0.1).of(_Mean(0.0)), "which is 0 here"),
        (lambda: Shift(-1.0), "^The damping is -1.0; it must be a finite number of at least 0"),
        (lambda: Shift(math.nan), "^The damping is nan; it must be a finite number of at least 0"),
        (lambda: Shift(0.1, {"0": -0.5}), "weight decay of '0' is -0.5"),
        (lambda: Shift(0.1, {"0": 0.5, "typo": 0.5}).over(["0", "2"]), r"check \['2', 'typo'\]"),
        (lambda: Shift(0.0).inverse(some_rows(a_space(), 1)), "zero on its diagonal"),
    ],
)
def test_nonsense_is_refused_in_words(make, match) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(InvalidInput, match=match):
        make()


def test_a_curvature_of_nan_is_named() -> None:
    with pytest.raises(NonFinite, match="mean eigenvalue of the curvature is nan"):
        Relative(0.1).of(_Mean(math.nan))


def test_shift_is_the_dense_diagonal() -> None:
    space = a_space()
    shift = uneven(space)
    for rows in (some_rows(space, 4), outer_rows(space, 4, terms=3)):
        expected = rows.flat() @ dense_shift(space, shift)
        torch.testing.assert_close(shift.apply(rows).flat(), expected, rtol=1e-12, atol=0)
        torch.testing.assert_close(shift.inverse(shift.apply(rows)).flat(), rows.flat(), rtol=1e-12, atol=1e-14)


def test_shift_knows_when_it_is_one_number() -> None:
    space = a_space()
    assert Shift(0.1).uniform == 0.1
    assert Shift(0.1, dict.fromkeys(space.blocks, 0.2)).uniform == pytest.approx(0.3)
    assert uneven(space).uniform is None
    assert uneven(space, 0.5).smallest == pytest.approx(0.55)
    assert uneven(space, 0.5).largest == pytest.approx(0.6)
    assert uneven(space, 0.5).with_damping(1.0) == uneven(space, 1.0)
    assert torch.equal(dense_shift(space, Shift(0.0)), torch.zeros(space.size, space.size, dtype=F64))


def test_damping_per_block_follows_each_blocks_own_scale() -> None:
    space = a_space()
    curvature = spectrum_matrix(space)
    rule = Relative(0.3, per_block=True)
    own = {k: 0.3 * float(curvature.matrix.diagonal()[part].mean()) for k, part in space.slices.items()}
    assert rule.blocks(curvature) == pytest.approx(own, rel=1e-12)
    assert Relative(0.3).blocks(curvature) == {}
    whole = sum(own[k] * space.numel(k) for k in own) / space.size
    assert rule.of(curvature) == pytest.approx(whole, rel=1e-12)


def test_a_block_without_curvature_is_damped_by_the_overall_mean() -> None:
    space = a_space()
    first = next(iter(space.blocks))
    for rounding in (0.0, 1e-33, 1e-15):  # gradients that cancel leave some
        flat = ScaledIdentity(space, dict.fromkeys(space.blocks, 2.0) | {first: rounding})
        found = Relative(0.5, per_block=True).blocks(flat)
        assert found[first] == pytest.approx(0.5 * flat.mean_eigenvalue())
        assert set(found.values()) == {found[first], 1.0}
    small = ScaledIdentity(space, dict.fromkeys(space.blocks, 2.0) | {first: 1e-9})
    assert Relative(0.5, per_block=True).blocks(small)[first] == pytest.approx(5e-10)


def test_block_dampings_and_weight_decay_add_up() -> None:
    shift = Shift(0.2, {"a": 1.0, "b": 2.0}, {"a": 0.1, "b": 0.3})
    assert shift.over(["a", "b"]) == pytest.approx({"a": 1.1, "b": 2.3})
    assert (shift.smallest, shift.largest, shift.uniform) == (pytest.approx(1.1), pytest.approx(2.3), None)
    with pytest.raises(InvalidInput, match="name the same blocks"):
        Shift(0.2, {"a": 1.0}, {"b": 0.1})
    with pytest.raises(InvalidInput, match="The damping of 'b' is -1"):
        Shift(0.2, blocks={"b": -1.0})
