"""The import hook of the tests: it knows where a shape is named, and a wrong shape does not pass."""

from __future__ import annotations

import ast

import jaxtyping
import pytest
import torch

from pytorch_influence_functions.evaluation.correlate import weighted_ranks
from pytorch_influence_functions.evaluation.subsets import Subsets
from pytorch_influence_functions.evaluation.truth import Truth
from tests import shapes


@pytest.mark.parametrize(
    ("code", "checked"),
    [
        ('def f(x: Float[Tensor, "n p"]): ...', True),
        ('def f(x) -> Float[Tensor, " n"]: ...', True),
        ('def f(*rows: Int[Tensor, " n"]): ...', True),
        ('def f(x: dict[str, tuple[Bool[Tensor, "n p"], int]]): ...', True),
        ('class R:\n    x: Float[Tensor, "n p"]', True),
        ('class R:\n    def f(self, x: Float[Tensor, "n p"]): ...', True),
        ('def outer():\n    def f(x: Float[Tensor, "n p"]): ...', True),
        ('def f(x: Tensor, y: Literal["a", "b"]) -> dict[str, Any]: ...', False),
        ("class R:\n    x: Tensor", False),
    ],
)
def test_what_names_a_shape_is_checked(code: str, checked: bool) -> None:
    assert ("shapes" in ast.unparse(shapes.Checks().visit(ast.parse(code)))) is checked


def test_a_wrong_shape_does_not_pass() -> None:
    with pytest.raises(jaxtyping.TypeCheckError, match=r"(?s)weighted_ranks.*weights.* dimension s "):
        weighted_ranks(torch.ones(2, 5), torch.ones(3, 4))
    with pytest.raises(jaxtyping.TypeCheckError, match="baseline"):
        Truth(Subsets.halves(6, 3), torch.ones(3, 1, 2), torch.ones(2), (0,))


def test_a_package_that_was_imported_before_is_refused() -> None:
    with pytest.raises(RuntimeError, match="imported before"):
        shapes.check("torch")
