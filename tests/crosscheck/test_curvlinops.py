"""Another library's operators on the same model and data: equal, entry by entry. Run by `make crosscheck`."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import pytorch_influence_functions as ptif
from pytorch_influence_functions.curvature import EKFAC, GGN, KFAC, EmpiricalFisher, Hessian, Sharing
from pytorch_influence_functions.curvature.base import Budget, Form
from pytorch_influence_functions.gradients.per_example import Derivatives

curvlinops = pytest.importorskip("curvlinops", reason="make crosscheck installs it")


def networks() -> dict[str, tuple[nn.Module, Tensor, Tensor]]:
    torch.manual_seed(0)
    y = torch.arange(11) % 3
    return {
        "perceptron": (
            nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double(),
            torch.randn(11, 4).double(),
            y,
        ),
        "convolution": (
            nn.Sequential(
                nn.Conv2d(2, 3, 3, padding=1, stride=2), nn.Sigmoid(), nn.Conv2d(3, 2, 2), nn.Flatten(), nn.Linear(8, 3)
            ).double(),
            torch.randn(11, 2, 6, 6).double(),
            y,
        ),
    }


NETWORKS = networks()


def theirs(kind: str, model: nn.Module, x: Tensor, y: Tensor, **options: Any) -> Tensor:
    """Their operator as a matrix over the concatenation of the model's parameters."""
    parameters = list(model.parameters())
    make = getattr(curvlinops, f"{kind}LinearOperator")
    operator = make(model, nn.CrossEntropyLoss(), parameters, [(x, y)], **options)
    size = sum(p.numel() for p in parameters)
    return torch.as_tensor(operator @ torch.eye(size, dtype=torch.float64))


def ours(curvature: Any, form: Form, model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """Our operator in the same order."""
    problem = ptif.Problem(model, ptif.CrossEntropy(), (x, y))
    operator = curvature.of(Derivatives.of(problem), form, Budget())
    dense = operator.apply(problem.space.rows(torch.eye(problem.space.size, dtype=torch.float64))).flat()
    at, where = 0, {}
    for name, p in model.named_parameters():
        where[name] = torch.arange(at, at + p.numel()).reshape(p.shape[0], -1)
        at += p.numel()
    order = torch.cat([torch.cat([where[p] for p in b.parameters], 1).flatten() for b in problem.space.blocks.values()])
    found = torch.zeros_like(dense)
    found[order[:, None], order[None]] = dense
    return found


@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize(
    ("curvature", "form", "kind"),
    [
        (Hessian(), Form.MATRIX, "Hessian"),
        (Hessian(), Form.IMPLICIT, "Hessian"),
        (GGN(), Form.MATRIX, "GGN"),
        (GGN(), Form.IMPLICIT, "GGN"),
        (GGN(), Form.GRAM, "GGN"),
        (EmpiricalFisher(), Form.GRAM, "EF"),
        (EmpiricalFisher(), Form.IMPLICIT, "EF"),
    ],
    ids=str,
)
def test_operators_are_equal(network: str, curvature: Any, form: Form, kind: str) -> None:
    case = NETWORKS[network]
    torch.testing.assert_close(ours(curvature, form, *case), theirs(kind, *case), rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize(
    ("curvature", "kind", "fisher"),
    [
        (KFAC(GGN()), "KFAC", "type-2"),
        (KFAC(EmpiricalFisher()), "KFAC", "empirical"),
        (EKFAC(GGN()), "EKFAC", "type-2"),
        (EKFAC(EmpiricalFisher()), "EKFAC", "empirical"),
    ],
    ids=str,
)
def test_kronecker_factors_are_equal(network: str, curvature: Any, kind: str, fisher: str) -> None:
    case = NETWORKS[network]
    want = theirs(kind, *case, fisher_type=fisher, separate_weight_and_bias=False)
    torch.testing.assert_close(ours(curvature, Form.SPECTRAL, *case), want, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("network", NETWORKS)
def test_the_reduced_sharing_is_equal(network: str) -> None:
    case = NETWORKS[network]
    want = theirs("KFAC", *case, fisher_type="type-2", separate_weight_and_bias=False, kfac_approx="reduce")
    found = ours(KFAC(GGN(), Sharing.REDUCE), Form.SPECTRAL, *case)
    torch.testing.assert_close(found, want, rtol=1e-7, atol=1e-9)
