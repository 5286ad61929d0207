"""Small float64 models that between them use every layer rule and every fallback.

A case says which of its parameters have no rule; all others must be taken by theirs, or the law fails. So a case with a
new layer tests the rule of that layer, and not the engine's way around a rule that is wrong.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


class Conv1D(nn.Module):
    """The transformers' linear layer: weight stored [in, out]."""

    def __init__(self, nf: int, nx: int) -> None:
        super().__init__()
        self.nf = nf
        self.weight = nn.Parameter(torch.randn(nx, nf) * 0.3)
        self.bias = nn.Parameter(torch.randn(nf) * 0.1)

    def forward(self, x: Tensor) -> Tensor:
        return torch.addmm(self.bias, x.view(-1, x.size(-1)), self.weight).view(*x.shape[:-1], self.nf)


class LlamaRMSNorm(nn.Module):
    def __init__(self, d: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(d) + 0.5)
        self.variance_epsilon = 1e-5

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)


class Residual(nn.Module):
    """A layer called twice, an in-place activation, a raw parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(6, 6)
        self.scale = nn.Parameter(torch.rand(6) + 0.5)
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.relu_(self.inner(x))
        h = self.inner(h * self.scale) + x
        return self.head(h)


class Tied(nn.Module):
    """Embedding and head share one table; learned positions; Conv1D; RMS norm; attention by hand."""

    def __init__(self, vocabulary: int = 7, d: int = 4, length: int = 5) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocabulary, d)
        self.positions = nn.Embedding(length, d)
        self.mix = Conv1D(d, d)
        self.norm = LlamaRMSNorm(d)
        self.head = nn.Linear(d, vocabulary, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, x: Tensor) -> Tensor:
        h = self.embed(x) + self.positions(torch.arange(x.shape[1]))
        h = h + torch.softmax(h @ h.mT, -1) @ self.mix(h)
        return self.head(self.norm(h)).mean(1)


class TiedByUse(nn.Module):
    """The table is used a second time without its module: the hook alone would miss it."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(7, 4)
        self.out = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.embed(x)).mean(1) @ self.embed.weight.T


class TimeFirst(nn.Module):
    """Examples on axis 1, as nn.TransformerEncoderLayer's default has it."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(4, 6)
        self.norm = nn.LayerNorm(6)
        self.down = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.norm(torch.tanh(self.up(x.transpose(0, 1))))).mean(0)


class Folded(nn.Module):
    """Positions folded into the batch axis, for a linear and a convolution layer."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(4, 4)
        self.conv = nn.Conv1d(1, 2, 3)
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        n, t, d = x.shape
        h = torch.tanh(self.up(x.reshape(n * t, d)))
        h = self.conv(h[:, None, :]).flatten(1)
        return self.head(h.reshape(n, t, -1).mean(1))


class Recurrent(nn.Module):
    def __init__(self, kind: type[nn.Module]) -> None:
        super().__init__()
        self.rnn = kind(3, 4, batch_first=True)  # type: ignore[call-arg]
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.rnn(x)[0][:, -1])


class TwoInputs(nn.Module):
    """nn.Bilinear: hooks keep a layer's first input only, so it can have no rule."""

    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Bilinear(5, 4, 4)
        self.up = nn.Linear(5, 4)
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.mix(x, torch.tanh(self.up(x)))))


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attend = nn.MultiheadAttention(4, 2, batch_first=True)
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.attend(x, x, x, need_weights=False)[0].mean(1))


def _flat(*layers: nn.Module) -> nn.Sequential:
    return nn.Sequential(*layers, nn.Flatten())


def _classify(net: nn.Module, x: Tensor) -> nn.Sequential:
    with torch.no_grad():
        width = net.eval()(x[:1]).shape[1]
    return nn.Sequential(net, nn.Linear(width, 3))


def _batch_norm(net: nn.Module) -> nn.Module:
    for m in net.modules():
        if isinstance(m, nn.modules.batchnorm._BatchNorm):
            m.running_mean.uniform_(-1, 1)  # type: ignore[union-attr, operator]
            m.running_var.uniform_(0.5, 2)  # type: ignore[union-attr, operator]
    return net


@dataclass(frozen=True)
class Case:
    name: str
    make: Callable[[], nn.Module]
    x: Callable[[], Tensor]
    outputs: int = 3
    without_rule: tuple[str, ...] = ()
    """Modules or parameters that no rule covers; every other parameter must be taken by a rule."""

    def covers(self, name: str) -> bool:
        """Whether the parameter or module of that name must be taken by a rule."""
        return not any(name == one or name.startswith(f"{one}.") for one in self.without_rule)


def images(*shape: int) -> Callable[[], Tensor]:
    return lambda: torch.randn(6, *shape)


def tokens(length: int, top: int = 7) -> Callable[[], Tensor]:
    return lambda: torch.randint(0, top, (6, length))


def _conv(make: Callable[[], nn.Module], *shape: int) -> Callable[[], nn.Module]:
    return lambda: _classify(_flat(make(), nn.Tanh()), torch.randn(1, *shape))


CASES = [
    Case("mlp", lambda: nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3)), images(5)),
    Case("no bias", lambda: nn.Sequential(nn.Linear(5, 4, bias=False), nn.ReLU(True), nn.Linear(4, 3)), images(5)),
    Case("root linear", lambda: nn.Linear(5, 3), images(5)),
    Case(
        "positions", lambda: nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Flatten(), nn.Linear(24, 3)), images(2, 3, 5)
    ),
    Case("conv1d", _conv(lambda: nn.Conv1d(2, 3, 3, padding=1, padding_mode="circular"), 2, 7), images(2, 7)),
    Case("conv2d stride", _conv(lambda: nn.Conv2d(2, 3, 3, stride=2, padding=1), 2, 6, 5), images(2, 6, 5)),
    Case("conv2d dilation", _conv(lambda: nn.Conv2d(2, 3, (3, 2), dilation=(1, 2)), 2, 6, 5), images(2, 6, 5)),
    Case("conv2d same", _conv(lambda: nn.Conv2d(2, 3, 4, padding="same"), 2, 6, 5), images(2, 6, 5)),
    Case("conv2d valid", _conv(lambda: nn.Conv2d(2, 3, 3, padding="valid", bias=False), 2, 6, 5), images(2, 6, 5)),
    Case(
        "conv2d reflect", _conv(lambda: nn.Conv2d(2, 3, 3, padding=1, padding_mode="reflect"), 2, 5, 5), images(2, 5, 5)
    ),
    Case(
        "conv2d replicate",
        _conv(lambda: nn.Conv2d(2, 3, 3, padding=(1, 2), padding_mode="replicate"), 2, 5, 5),
        images(2, 5, 5),
    ),
    Case("conv2d groups", _conv(lambda: nn.Conv2d(4, 6, 3, groups=2, padding=1), 4, 4, 4), images(4, 4, 4)),
    Case("depthwise", _conv(lambda: nn.Conv2d(4, 4, 3, groups=4), 4, 4, 4), images(4, 4, 4)),
    Case("conv3d", _conv(lambda: nn.Conv3d(1, 2, 2, stride=(1, 2, 1)), 1, 3, 4, 3), images(1, 3, 4, 3)),
    Case(
        "transposed conv",
        _conv(lambda: nn.ConvTranspose2d(2, 3, 2), 2, 3, 3),
        images(2, 3, 3),
        without_rule=("0.0",),
    ),
    Case("layer norm", lambda: nn.Sequential(nn.Linear(5, 4), nn.LayerNorm(4), nn.Linear(4, 3)), images(5)),
    Case("layer norm 2d", lambda: nn.Sequential(nn.LayerNorm((3, 4)), nn.Flatten(), nn.Linear(12, 3)), images(3, 4)),
    Case("rms norm", lambda: nn.Sequential(nn.Linear(5, 4), nn.RMSNorm(4), nn.Linear(4, 3)), images(5)),
    Case("group norm", _conv(lambda: nn.Sequential(nn.Conv2d(2, 4, 3), nn.GroupNorm(2, 4)), 2, 5, 5), images(2, 5, 5)),
    Case("instance norm 1d", _conv(lambda: nn.InstanceNorm1d(2, affine=True), 2, 5), images(2, 5)),
    Case("instance norm 2d", _conv(lambda: nn.InstanceNorm2d(2, affine=True), 2, 5, 5), images(2, 5, 5)),
    Case("instance norm 3d", _conv(lambda: nn.InstanceNorm3d(2, affine=True), 2, 2, 3, 2), images(2, 2, 3, 2)),
    Case(
        "batch norm 1d",
        lambda: _batch_norm(nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 3))),
        images(5),
    ),
    Case(
        "batch norm 2d",
        lambda: _batch_norm(_conv(lambda: nn.Sequential(nn.Conv2d(2, 4, 3, bias=False), nn.BatchNorm2d(4)), 2, 5, 5)()),
        images(2, 5, 5),
    ),
    Case("batch norm 3d", lambda: _batch_norm(_conv(lambda: nn.BatchNorm3d(2), 2, 2, 3, 2)()), images(2, 2, 3, 2)),
    Case("sync batch norm", lambda: _batch_norm(_conv(lambda: nn.SyncBatchNorm(2), 2, 3, 3)()), images(2, 3, 3)),
    Case(
        "embedding", lambda: nn.Sequential(nn.Embedding(7, 4, padding_idx=0), nn.Flatten(), nn.Linear(20, 3)), tokens(5)
    ),
    Case(
        "embedding bag", lambda: nn.Sequential(nn.EmbeddingBag(7, 4), nn.Linear(4, 3)), tokens(5), without_rule=("0",)
    ),
    Case("called twice", Residual, images(6), without_rule=("scale",)),
    Case("tied", Tied, tokens(5), 7),
    Case("tied by use", TiedByUse, tokens(5), 7, without_rule=("embed",)),
    Case("time first", TimeFirst, images(5, 4)),
    Case("time first, as long as a batch", TimeFirst, images(6, 4)),
    Case("folded", Folded, images(5, 4)),
    Case("lstm", lambda: Recurrent(nn.LSTM), images(5, 3), without_rule=("rnn",)),
    Case("gru", lambda: Recurrent(nn.GRU), images(5, 3), without_rule=("rnn",)),
    Case("attention", Attention, images(5, 4), without_rule=("attend",)),
    Case(
        "encoder layer",
        lambda: _flat(
            nn.TransformerEncoderLayer(4, 2, 8, dropout=0.5, batch_first=True), nn.Flatten(), nn.Linear(20, 3)
        ),
        images(5, 4),
        without_rule=("0.self_attn",),
    ),
    Case(
        "weight norm",
        lambda: nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(5, 4)), nn.Tanh(), nn.Linear(4, 3)),
        images(5),
        without_rule=("0",),
    ),
    Case("prelu", lambda: nn.Sequential(nn.Linear(5, 4), nn.PReLU(4), nn.Linear(4, 3)), images(5), without_rule=("1",)),
    Case("bilinear", TwoInputs, images(5), without_rule=("mix",)),
    Case("dropout", lambda: nn.Sequential(nn.Linear(5, 4), nn.Dropout(0.5), nn.Linear(4, 3)), images(5)),
]


def named(name: str) -> Case:
    """The case of that name."""
    return next(case for case in CASES if case.name == name)


def build(case: Case, seed: int = 0, n: int = 6) -> tuple[nn.Module, Any, Any]:
    """A float64 model in eval mode, inputs and integer targets."""
    torch.manual_seed(seed)
    model = case.make().double().eval()
    x = case.x()
    x = x.double() if x.is_floating_point() else x
    return model, x, torch.randint(0, case.outputs, (len(x),))
