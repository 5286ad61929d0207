"""My model gives an image: thousands of outputs for every example."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import pytorch_influence_functions as ptif
from tests.tolerance import gap


class UNet(nn.Module):
    def __init__(self, channels: int, classes: int = 1) -> None:
        super().__init__()
        c = channels
        self.enter, self.down = nn.Conv2d(1, c, 3, padding=1), nn.Conv2d(c, 2 * c, 3, padding=1, stride=2)
        self.up, self.leave = nn.ConvTranspose2d(2 * c, c, 2, 2), nn.Conv2d(2 * c, classes, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        wide = self.enter(x).relu()
        out: Tensor = self.leave(torch.cat([self.up(self.down(wide).relu()), wide], 1))
        return out


def masks(side: int, channels: int = 2) -> tuple[nn.Module, Tensor, Tensor]:
    torch.manual_seed(0)
    x = torch.randn(6, 1, side, side)
    return UNet(channels), x, (x > 0.5).float()


@pytest.mark.parametrize("side", [32, 64])
def test_the_first_call_takes_a_few_passes_however_many_pixels(side: int) -> None:
    """With 1,325 passes and 108 seconds for 16 masks of 64 pixels a side it did not."""
    model, x, y = masks(side, 5)
    loss = nn.BCEWithLogitsLoss()
    cost = ptif.forecast(model, (x, y), (x[:1], y[:1]), loss=loss)
    assert cost.passes < 10 and "EKFAC" in cost.method and "outputs" in cost.why
    assert ptif.attribute(model, (x, y), (x[:1], y[:1]), loss=loss).values.shape == (1, 6)


def test_the_forecast_counts_what_the_passes_hold() -> None:
    model, x, y = masks(32)
    small = ptif.forecast(model, (x, y), (x[:1], y[:1]), loss=nn.BCEWithLogitsLoss())
    model, x, y = masks(64)
    large = ptif.forecast(model, (x, y), (x[:1], y[:1]), loss=nn.BCEWithLogitsLoss())
    activations = 4 * 6 * 64 * 64 * (1 + 2 + 1)  # inputs of the layers at full size, in bytes
    assert activations < large.batch_bytes < 20 * activations
    assert large.batch_bytes == pytest.approx(4 * small.batch_bytes, rel=0.1)
    assert "MiB for the passes of a batch" in str(large)


@pytest.mark.parametrize("method", ["ekfac", "gauss_newton", "dual", "grad_dot"])
def test_a_loss_of_ones_own_over_pixels_scores_as_the_known_one(method: str) -> None:
    """Its second derivative is found to be one number per pixel."""
    model, x, y = masks(20)
    # The default is a share of a mean eigenvalue that is drawn for so many outputs.
    damping = None if method == "grad_dot" else 0.1
    own, known = lambda f, t: F.binary_cross_entropy_with_logits(f, t), nn.BCEWithLogitsLoss()
    scores = [
        ptif.attribute(
            model.double(), (x.double(), y), (x[:2].double(), y[:2]), loss=loss, method=method, damping=damping
        ).values
        for loss in (own, known)
    ]
    # EK-FAC draws for pixels: other draws for a loss whose likelihood is not known.
    assert gap(*scores) < (0.5 if method == "ekfac" else 2e-3)
