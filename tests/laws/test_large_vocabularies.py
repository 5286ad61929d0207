"""A vocabulary's side of a Kronecker factor: kept as a diagonal, exact for an embedding, said, and right when tied."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import pytorch_influence_functions as ptif
from pytorch_influence_functions.curvature import EKFAC, KFAC, EmpiricalFisher, Shampoo
from pytorch_influence_functions.curvature.base import Budget, Form
from pytorch_influence_functions.gradients.per_example import Derivatives
from pytorch_influence_functions.linalg.blocks import Dense
from pytorch_influence_functions.linalg.gram import Gram
from pytorch_influence_functions.linalg.kronecker import Kronecker
from pytorch_influence_functions.linalg.rows import inner
from tests.tiny_lm import VOCABULARY, TinyLM, loader, texts

OBJECTIVE = ptif.TokenCrossEntropy(shift=True)


def language_model(tied: bool) -> TinyLM:
    torch.manual_seed(0)
    return TinyLM(tied=tied).double()


def fitted(model: TinyLM, curvature: Any) -> tuple[Kronecker, Derivatives]:
    derivatives = Derivatives.of(ptif.Problem(model, OBJECTIVE, loader(texts(8))))
    operator = curvature.of(derivatives, Form.SPECTRAL, Budget())
    assert isinstance(operator, Kronecker)
    return operator, derivatives


def gradients_by_autograd(model: TinyLM, parameter: Tensor, some: list[Tensor] | None = None) -> Tensor:
    """One example's gradient after the other, [n, V, d]."""
    rows = []
    for batch in loader(texts(8) if some is None else some, batch_size=1):
        model.zero_grad()
        OBJECTIVE.losses(OBJECTIVE.outputs(model, batch), batch).sum().backward()
        assert parameter.grad is not None
        rows.append(parameter.grad.clone())
    return torch.stack(rows)


@pytest.mark.parametrize("curvature", [EKFAC, Shampoo])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("name", ["token.weight", "head.weight"])
def test_a_long_side_keeps_its_coordinates_and_exact_second_moments(name: str, tied: bool, curvature: Any) -> None:
    """Reference: E[(G Q)^2] from one-example autograd; in the coordinates of the vocabulary Q is the other side's."""
    if tied and name == "head.weight":
        return  # one parameter, called by its first name
    model = language_model(tied)
    operator, _ = fitted(model, curvature(EmpiricalFisher(), largest=VOCABULARY - 1))
    block, g = operator.blocks[name], gradients_by_autograd(model, dict(model.named_parameters())[name])
    assert block.left is None and block.right is not None
    torch.testing.assert_close(block.values, (g @ block.right).square().mean(0), rtol=1e-9, atol=1e-13)


@pytest.mark.parametrize("curvature", [KFAC, EKFAC, Shampoo])
def test_a_tied_basis_is_that_of_both_uses_together(curvature: Any) -> None:
    """Reference: the eigenvectors of E[G^T G], G the sum of what embedding and head contribute."""
    model = language_model(tied=True)
    operator, _ = fitted(model, curvature(EmpiricalFisher(), largest=VOCABULARY - 1))
    g = gradients_by_autograd(model, model.token.weight)
    whole = torch.einsum("nvd,nve->de", g, g)
    basis = operator.blocks["token.weight"].right
    assert basis is not None
    turned = basis.T @ whole @ basis
    torch.testing.assert_close(turned, turned.diagonal().diag(), rtol=0, atol=1e-10 * float(whole.abs().max()))
    if curvature is KFAC:
        sides = operator.blocks["token.weight"].sides
        assert sides is not None
        # The diagonal of E[G G^T] and the eigenvalues of E[G^T G] over their common trace.
        torch.testing.assert_close(sides[0] / sides[0].sum(), g.square().sum((0, 2)) / g.square().sum())


def test_an_embedding_s_input_side_is_a_diagonal_without_any_loss() -> None:
    """Inputs are one-hot: the dense second moment of small vocabularies has nothing beside its diagonal."""
    model = language_model(tied=False)
    dense, derivatives = fitted(model, KFAC(EmpiricalFisher()))
    long, _ = fitted(model, KFAC(EmpiricalFisher(), largest=VOCABULARY - 1))
    assert dense.blocks["token.weight"].left is None
    torch.testing.assert_close(long.blocks["token.weight"].values, dense.blocks["token.weight"].values)
    used = torch.zeros(VOCABULARY, dtype=torch.float64)
    for text in texts(8):
        used += torch.nn.functional.one_hot(text[:-1], VOCABULARY).sum(0)
    sides = dense.blocks["token.weight"].sides
    assert sides is not None and len(derivatives.problem) == 8
    torch.testing.assert_close(sides[0] / sides[0].sum(), used / used.sum())


def test_a_head_s_diagonal_side_is_the_diagonal_of_the_dense_one() -> None:
    model = language_model(tied=False)
    dense, _ = fitted(model, KFAC(EmpiricalFisher()))
    long, _ = fitted(model, KFAC(EmpiricalFisher(), largest=VOCABULARY - 1))
    whole, kept = dense.blocks["head.weight"], long.blocks["head.weight"]
    assert whole.left is not None and whole.sides is not None and kept.sides is not None
    side = (whole.left * whole.sides[0]) @ whole.left.T
    torch.testing.assert_close(kept.sides[0], side.diagonal())


@pytest.mark.parametrize("tied", [False, True])
def test_what_is_taken_as_a_diagonal_is_said(tied: bool) -> None:
    torch.manual_seed(0)
    model = TinyLM(tied, vocabulary=40).double()
    problem = ptif.Problem(model, OBJECTIVE, loader(texts(8)))
    short = ptif.Influence(EKFAC()).fit(problem).score(loader(texts(2, seed=1)))
    assert not any("taken as diagonal" in note for note in short.diagnostics.notes)
    scores = ptif.Influence(EKFAC(largest=39)).fit(problem).score(loader(texts(2, seed=1)))
    said = f"a side of '{'token' if tied else 'head'}.weight' is 40 long, above largest=39"
    assert any(note.startswith(said) and "taken as diagonal" in note for note in scores.diagnostics.notes)


@pytest.mark.parametrize("tied", [False, True])
def test_norms_of_a_tied_weight_need_no_row_as_long_as_the_vocabulary(tied: bool) -> None:
    model = language_model(tied)
    derivatives = Derivatives.of(ptif.Problem(model, OBJECTIVE, loader(texts(8))))
    for gradients in derivatives.stream():
        for block in gradients.rows.blocks.values():
            torch.testing.assert_close(block.squared_norms(), block.dense().flatten(1).square().sum(1))


@pytest.mark.parametrize("tied", [False, True])
def test_rows_of_batches_of_different_lengths_are_kept_in_factors(tied: bool) -> None:
    """Written out, sixteen texts of a model with 135 M weights took 9 GiB instead of half a GiB."""
    torch.manual_seed(0)
    model = TinyLM(tied=tied, vocabulary=200, width=24).double()
    some = texts(8, vocabulary=200)
    derivatives = Derivatives.of(ptif.Problem(model, OBJECTIVE, loader(some, batch_size=3)))
    assert len({batch["input_ids"].shape[1] for batch in loader(some, batch_size=3)}) > 1
    gram = EmpiricalFisher().of(derivatives, Form.GRAM, Budget())
    assert isinstance(gram, Gram)
    for name in ("token.weight", *(() if tied else ("head.weight",))):
        block, parameter = gram.rows.blocks[name], model.get_parameter(name)
        assert not isinstance(block, Dense) and block.numbers < len(block) * parameter.numel()
        rows = gradients_by_autograd(model, parameter, some)
        torch.testing.assert_close(block.dense(), rows)
        torch.testing.assert_close(inner(block, block), torch.einsum("nvd,mvd->nm", rows, rows))
