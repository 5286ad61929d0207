"""A forward that calls `.to` on its own layers, as routers of experts do, which torch's transforms do not survive."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

import pytorch_influence_functions as ptif
from pytorch_influence_functions.core.functional import call_with
from tests.tolerance import gap


class Router(nn.Module):
    """A parameter without a rule, and a layer that is moved to a type, its own or another, whenever it is called."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.randn(3, dtype=torch.float64))
        self.layer = nn.Linear(3, 2, dtype=torch.float64)
        self.dtype = dtype

    def forward(self, x: Tensor) -> Tensor:
        self.layer = self.layer.to(self.dtype)
        out: Tensor = self.layer((x * self.scale).to(self.dtype))
        return out.double()


def data(n: int = 7) -> TensorDataset:
    generator = torch.Generator().manual_seed(1)
    return TensorDataset(torch.randn(n, 3, dtype=torch.float64, generator=generator), torch.arange(n) % 2)


@pytest.mark.parametrize("method", ["grad_dot", "exact"])
@pytest.mark.parametrize(
    ("dtype", "parameters"), [(torch.float64, None), (torch.float64, ["scale"]), (torch.float32, ["scale"])]
)
def test_scores_are_those_of_autograd_and_the_layer_stays(
    dtype: torch.dtype, method: str, parameters: list[str] | None
) -> None:
    torch.manual_seed(0)
    model, rows = Router(dtype), data()
    model.layer.to(dtype)  # as its first call leaves it
    before = {name: value.clone() for name, value in model.state_dict().items()}
    plain = Router(dtype)
    plain.load_state_dict(before)
    names = parameters or [name for name, _ in plain.named_parameters()]
    weights = [dict(plain.named_parameters())[name] for name in names]

    def row(i: int) -> Tensor:
        loss = nn.functional.cross_entropy(plain(rows[i][0][None]), rows[i][1][None])
        return torch.cat([g.flatten().double() for g in torch.autograd.grad(loss, weights)])

    scores = ptif.attribute(
        model, rows, rows, loss=nn.CrossEntropyLoss(), method=method, parameters=parameters
    ).values.double()
    if method == "grad_dot":
        gradients = torch.stack([row(i) for i in range(7)])
        assert gap(scores, gradients @ gradients.T / 7) < (1e-9 if dtype == torch.float64 else 1e-5)
    assert bool(torch.isfinite(scores).all())
    for name, value in model.state_dict().items():
        assert type(value) is Tensor and value.dtype == before[name].dtype and torch.equal(value, before[name])
    assert nn.Module._apply.__module__ == "torch.nn.modules.module"


def test_a_layer_that_would_be_converted_in_a_transform_is_refused_there() -> None:
    model, x = Router(torch.float32), torch.zeros(1, 3, dtype=torch.float64)
    with pytest.raises(RuntimeError, match=r"converts its own weights while .*in __init__"):
        call_with(model, {"scale": torch.zeros(3, dtype=torch.float64)}, (x,))
    assert model.layer.weight.dtype == torch.float64
    assert model.float().scale.dtype == torch.float32
