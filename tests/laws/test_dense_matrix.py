"""A dense curvature matrix is added up from rows within the memory that is counted for it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import pytorch_influence_functions as ptif
from pytorch_influence_functions.curvature import GGN
from pytorch_influence_functions.curvature.second_moment import SecondMoment, piece_bytes
from pytorch_influence_functions.gradients.per_example import Derivatives


class LargestResult(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """The bytes of the largest tensor that any operation wrote out."""

    bytes: int = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        if isinstance(result, Tensor):
            self.bytes = max(self.bytes, result.numel() * result.element_size())
        return result


@pytest.mark.parametrize("inputs", [1, 2])
def test_a_wide_layer_with_few_inputs_takes_no_more_than_is_counted(inputs: int) -> None:
    """Its outputs squared are more numbers than it has parameters, so that few examples are added at once."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(inputs, 300), nn.Tanh(), nn.Linear(300, 2)).double()
    data = (torch.randn(130, inputs).double(), torch.randn(130, 2).double())
    derivatives = Derivatives.of(ptif.Problem(model, ptif.SquaredError(), data, batch_size=130))
    rows = torch.cat([r.flat() for r in GGN().stream(derivatives)])
    total = SecondMoment(derivatives.space, torch.device("cpu"))
    with LargestResult() as largest:
        for batch in GGN().batches(derivatives):
            total.add(batch)
    assert total._pairs and largest.bytes <= piece_bytes(derivatives.space.size) / 2
    torch.testing.assert_close(total.matrix(), rows.T @ rows, rtol=1e-10, atol=1e-12)
