"""What is frozen is most of a large model: nothing that is computed holds a second copy of it."""

from __future__ import annotations

import weakref
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import pytorch_influence_functions as ptif
from tests.tolerance import gap


class NewTensors(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Lists what makes tensors of certain shapes in memory of their own, and how many of them there were at once."""

    def __init__(self, *shapes: tuple[int, ...]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.shapes, self.operations, self.at_once = shapes, list[str](), 0
        self._alive: list[weakref.ref[Tensor]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {t.untyped_storage().data_ptr() for t in args if isinstance(t, Tensor)}
        returned = func(*args, **(kwargs or {}))
        shares = isinstance(returned, Tensor) and returned.untyped_storage().data_ptr() in given
        if isinstance(returned, Tensor) and not shares and tuple(returned.shape) in self.shapes:
            self.operations.append(str(func))
            self._alive = [one for one in self._alive if one() is not None] + [weakref.ref(returned)]
            self.at_once = max(self.at_once, len(self._alive))
        return returned


class Packed(nn.Module):
    """A frozen linear layer in eight bits, as quantisation makes them."""

    packed: Tensor
    scale: Tensor

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        scale = layer.weight.detach().abs().amax(1) / 127
        self.register_buffer("packed", (layer.weight.detach() / scale[:, None]).round().to(torch.int8))
        self.register_buffer("scale", scale)

    def forward(self, x: Tensor) -> Tensor:
        return (x @ self.packed.to(x.dtype).T) * self.scale


@pytest.mark.parametrize("method", ["ekfac", "grad_dot", "dual"])
def test_weights_in_eight_bits_are_neither_copied_nor_changed(method: str) -> None:
    torch.manual_seed(0)
    base, head = Packed(nn.Linear(300, 260)), nn.Linear(260, 3)
    model = nn.Sequential(base, nn.Tanh(), head).double()
    data = (torch.randn(9, 300).double(), torch.arange(9) % 3)
    plain = nn.Linear(300, 260, bias=False).double().requires_grad_(False)
    plain.weight.copy_(base.packed.double() * base.scale[:, None])
    before = base.packed.clone()
    with NewTensors((260, 300)) as made:
        scores = ptif.attribute(model, data, data, method=method)
    # The layer itself widens its weight when it runs.
    assert made.operations and "aten.clone.default" not in made.operations
    assert torch.equal(base.packed, before)
    expected = ptif.attribute(nn.Sequential(plain, nn.Tanh(), head), data, data, method=method)
    assert gap(scores.values, expected.values) < 1e-6
