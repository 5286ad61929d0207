"""Law: the slope in training inputs is that of the measure after training again, and of the score by differences."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import pytorch_influence_functions as ptif
from pytorch_influence_functions.actions import input_influence
from pytorch_influence_functions.core.errors import InvalidInput


def ridge(x: Tensor, y: Tensor, decay: float) -> Tensor:
    return torch.linalg.solve(2 / len(x) * x.T @ x + decay * torch.eye(x.shape[1]).double(), 2 / len(x) * x.T @ y)


def test_ridge_regression_refitted_with_moved_inputs() -> None:
    torch.manual_seed(0)
    x, y, decay = torch.randn(20, 4).double(), torch.randn(20, 1).double(), 0.2
    xq, yq = torch.randn(3, 4).double(), torch.randn(3, 1).double()
    model = nn.Linear(4, 1, bias=False).double()
    with torch.no_grad():
        model.weight.copy_(ridge(x, y, decay).T)
    problem = ptif.Problem(model, nn.MSELoss(), (x, y), weight_decay=decay, batch_size=3)
    ids, step = [2, 11, 5], 1e-5
    slopes = input_influence(problem, (xq, yq), ids=ids, method=ptif.exact(damping=0.0))
    assert slopes.shape == (3, 3, 4)
    for column in range(4):
        for position, i in enumerate(ids):
            up, down = x.clone(), x.clone()
            up[i, column] += step
            down[i, column] -= step
            losses = [((xq @ ridge(moved, y, decay) - yq) ** 2)[:, 0] for moved in (up, down)]
            torch.testing.assert_close(
                slopes[:, position, column], (losses[0] - losses[1]) / (2 * step), rtol=1e-6, atol=1e-9
            )


@pytest.mark.parametrize("batch_size", [2, 64])
def test_a_network_by_differences_of_the_score(batch_size: int) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.Tanh(), nn.Flatten(), nn.Linear(12, 3)).double()
    model.train()
    x, y = torch.randn(15, 1, 4, 4).double(), torch.arange(15) % 3
    queries = (torch.randn(2, 1, 4, 4).double(), torch.tensor([0, 2]))
    fitted = ptif.exact(damping=0.1).fit(ptif.Problem(model, nn.CrossEntropyLoss(), (x, y), batch_size=batch_size))
    before = {k: v.clone() for k, v in model.state_dict().items()}
    slopes = input_influence(fitted, queries, ids=[4, 9])
    assert model.training and all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    member = fitted.members[0]
    model.eval()
    solved = [member.solve(g.rows).unwrap().rows() for g in member.derivatives.stream(fitted.problem.data.of(queries))]
    step = 1e-6
    for i in (4, 9):
        for place in ((0, 0, 0), (0, 2, 3)):
            scores = []
            for sign in (1, -1):
                moved = x[i : i + 1].clone()
                moved[(0, *place)] += sign * step
                rows = next(iter(member.derivatives.stream(fitted.problem.data.of((moved, y[i : i + 1]))))).rows
                scores.append(torch.cat([s.inner(rows)[:, 0] for s in solved]))
            want = -(scores[0] - scores[1]) / (2 * step) / 15
            torch.testing.assert_close(slopes[(slice(None), [4, 9].index(i), *place)], want, rtol=1e-5, atol=1e-9)


def test_tokens_have_no_slope() -> None:
    class Words(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.head = nn.Embedding(9, 4), nn.Linear(4, 2)

        def forward(self, ids: Tensor) -> Tensor:
            out: Tensor = self.head(self.embed(ids).mean(1))
            return out

    x, y = torch.randint(0, 9, (20, 5)), torch.arange(20) % 2
    problem = ptif.Problem(Words(), nn.CrossEntropyLoss(), (x, y))
    with pytest.raises(InvalidInput, match=r"The inputs \(0: torch.int64\) are no real numbers"):
        input_influence(problem, (x[:1], y[:1]))


def test_bad_indices_and_inputs_without_a_gradient_in_one_sentence() -> None:
    class Detached(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x.detach())

    x, y = torch.randn(20, 3), torch.arange(20) % 2
    problem = ptif.Problem(nn.Linear(3, 2), nn.CrossEntropyLoss(), (x, y))
    mask = torch.arange(20) < 3
    assert input_influence(problem, (x[:2], y[:2]), ids=mask).shape == (2, 3, 3)
    for ids, match in (
        ([20], r"ids= names index 20, and the training examples are 0 to 19"),
        ([2, 2], r"ids= names index 2 more than once; give each once"),
        ([], r"ids= names no training example; give at least one, or None for all"),
    ):
        with pytest.raises(InvalidInput, match=match):
            input_influence(problem, (x[:1], y[:1]), ids=ids)
    with pytest.raises(InvalidInput, match="The model takes no gradient from its inputs"):
        input_influence(ptif.Problem(Detached(3, 2), nn.CrossEntropyLoss(), (x, y)), (x[:1], y[:1]), ids=[0])
