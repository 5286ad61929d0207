"""The quick start of the 0.1 releases at its defaults, 5,000 recursions an item: within a minute on a small net."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import pytorch_influence_functions as ptif
from pytorch_influence_functions.solvers.neumann import series
from tests.interface.classic_cases import hessian


def test_items_share_their_mini_batches_and_stop_when_settled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    x, y = torch.randn(120, 6), torch.arange(120) % 4
    x[:, :4] += nn.functional.one_hot(y, 4)
    model, (train, test) = nn.Linear(6, 4), (TensorDataset(x[:100], y[:100]), TensorDataset(x[100:106], y[100:106]))
    optimizer = torch.optim.Adam(model.parameters(), lr=0.05)
    for _ in range(100):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x[:100]), y[:100]).backward()
        optimizer.step()
    optimizer.zero_grad()

    steps, real = [], series.apply_sampled

    def counted(*arguments: object) -> object:
        steps.append(1)
        return real(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(series, "apply_sampled", counted)
    config = ptif.get_default_config()
    config["outdir"], config["progress"] = str(tmp_path), False
    influences, _, _ = ptif.calc_img_wise(config, model, DataLoader(train, 16, shuffle=True), DataLoader(test, 5))
    assert len(influences) == 6
    # The weakest direction forgets its start at exp(-damp) a step: exp(-0.01 t) = tolerance after 921 steps. Of all
    # 6 items together; one after another to the end they took 30,000.
    assert 600 < len(steps) < 1100

    weights = list(model.parameters())

    def row(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        loss = nn.functional.cross_entropy(model(a[None]), b[None])
        return torch.cat([g.flatten() for g in torch.autograd.grad(loss, weights)])

    h = hessian(model, lambda: nn.functional.cross_entropy(model(x[:100]), y[:100]))
    gradients = torch.stack([row(x[i], y[i]) for i in range(106)])
    exact = gradients[100:] @ torch.linalg.solve(h + 0.25 * torch.eye(len(h)), gradients[:100].T) / 100
    values = torch.tensor([entry["influence"] for entry in influences.values()])
    assert float((values - exact).norm() / exact.norm()) < 0.05  # the noise of the mini-batches
