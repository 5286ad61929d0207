"""Laws of the matrix-free products: what an operation of the model lacks or gets wrong is found, not used."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import pytorch_influence_functions as ptif
from pytorch_influence_functions.core.errors import InvalidInput
from pytorch_influence_functions.curvature import GGN, Hessian
from pytorch_influence_functions.curvature.base import Budget, Form
from pytorch_influence_functions.gradients.per_example import Derivatives
from pytorch_influence_functions.gradients.products import Products, PushforwardMode
from tests.laws.zoo import CASES, build


def ready(name: str) -> tuple[Derivatives, torch.Tensor, Any]:
    model, x, y = build(next(c for c in CASES if c.name == name))
    return Derivatives.of(ptif.Problem(model, ptif.CrossEntropy(), (x, y))), torch.arange(6), (x, y)


@pytest.mark.parametrize(
    ("name", "mode"),
    [
        ("mlp", PushforwardMode.FORWARD),
        ("encoder layer", PushforwardMode.FORWARD),
        ("embedding", PushforwardMode.REVERSE),  # its padding row moves forward but not backward
        ("embedding bag", PushforwardMode.ROWS),  # no second derivative at all
    ],
)
def test_the_mode_is_found_by_comparison_and_gives_the_same_numbers(name: str, mode: PushforwardMode) -> None:
    derivatives, ids, batch = ready(name)
    products = Products.of(derivatives, batch, 6)
    assert products.mode is mode
    v = derivatives.space.rows(torch.randn(3, derivatives.space.size, dtype=torch.float64))
    rows = derivatives.loss_rows(ids, batch).rows
    torch.testing.assert_close(products.losses_along(ids, batch, v), rows.inner(v), rtol=1e-9, atol=1e-12)
    dense = GGN().of(derivatives, Form.MATRIX, Budget())
    product = products.ggn_product(ids, batch, v).flat() / 6
    torch.testing.assert_close(product, dense.apply(v).flat(), rtol=1e-9, atol=1e-12)


def test_a_missing_second_derivative_is_named() -> None:
    derivatives, _, _ = ready("embedding bag")
    with pytest.raises(InvalidInput, match="an operation of this model has none"):
        Hessian().of(derivatives, Form.IMPLICIT, Budget())


def test_a_wrong_second_derivative_is_named() -> None:
    class Skewed(torch.autograd.Function):
        """Right gradient of x^2, wrong gradient of that gradient."""

        @staticmethod
        def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
            ctx.save_for_backward(x)
            return x * x

        @staticmethod
        def backward(ctx: Any, g: torch.Tensor) -> torch.Tensor:
            (x,) = ctx.saved_tensors
            return 2 * x * g.detach()  # forgets how g depends on later layers

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.down = nn.Linear(4, 5), nn.Linear(5, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.down(Skewed.apply(self.up(x)))

    torch.manual_seed(0)
    problem = ptif.Problem(Net().double(), ptif.CrossEntropy(), (torch.randn(6, 4).double(), torch.randint(0, 3, (6,))))
    with pytest.raises(InvalidInput, match=r"not symmetric .*use GGN\(\) instead"):
        Hessian().of(Derivatives.of(problem), Form.IMPLICIT, Budget())


def test_a_second_derivative_whose_square_is_zero_in_floating_point_is_taken() -> None:
    """A smooth hinge far from its kink: 1e-170 is a number, its square is not."""
    x, y = torch.randn(8, 3, dtype=torch.float64), torch.ones(8, 1, dtype=torch.float64)
    model = nn.Linear(3, 1).double()
    nn.init.zeros_(model.weight)
    nn.init.constant_(model.bias, 5.0)
    hinge = ptif.FromFunction(lambda f, t: 0.01 * nn.functional.softplus((1 - t * f) / 0.01)[:, 0], reduction="none")
    derivatives = Derivatives.of(ptif.Problem(model, hinge, (x, y)))
    operator = Hessian().of(derivatives, Form.IMPLICIT, Budget())
    product = operator.apply(derivatives.space.rows(torch.ones(1, 4, dtype=torch.float64))).flat()
    # H = mean of s (1 - s) / t [x, 1] [x, 1]^T with s = sigmoid(-400).
    augmented = torch.cat([x, torch.ones(8, 1, dtype=torch.float64)], 1)
    expected = torch.exp(torch.tensor(-400.0).double()) / 0.01 * (augmented.T @ augmented.sum(1)) / 8
    assert 0 < float(product.abs().max()) < 1e-160
    torch.testing.assert_close(product[0] * 1e170, expected * 1e170)
