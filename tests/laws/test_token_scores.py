"""Tokens' shares of a score: against autograd token by token and a dense solve; they add up to the score."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import pytorch_influence_functions as ptif
from pytorch_influence_functions.core.errors import InvalidInput
from pytorch_influence_functions.curvature import EKFAC, EmpiricalFisher
from pytorch_influence_functions.gradients.vjp import as_function, detach_parameters
from pytorch_influence_functions.problem.data import Source
from pytorch_influence_functions.scaling.relative import RelatIF
from pytorch_influence_functions.solvers import CG, Spectral, Woodbury

VOCABULARY, LENGTH, DAMPING = 5, 6, 1e-3


class Next(nn.Module):
    """Says the next token from the running mean of embeddings so far."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.out = nn.Embedding(VOCABULARY, 4), nn.Linear(4, VOCABULARY)

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        steps = torch.arange(1, input_ids.shape[1] + 1, dtype=self.out.weight.dtype)[None, :, None]
        return self.out(torch.tanh(self.embed(input_ids).cumsum(1) / steps))


def texts(n: int, seed: int) -> list[dict[str, Tensor]]:
    """Sequences whose ends are padding, of different lengths."""
    g = torch.Generator().manual_seed(seed)
    tokens = torch.randint(VOCABULARY, (n, LENGTH), generator=g)
    used = torch.randint(3, LENGTH + 1, (n,), generator=g)
    return [
        {"input_ids": t, "attention_mask": (torch.arange(LENGTH) < u).long()} for t, u in zip(tokens, used, strict=True)
    ]


def setting(average: bool = True, **options: Any) -> tuple[ptif.Problem, list[dict[str, Tensor]]]:
    torch.manual_seed(0)
    problem = ptif.Problem(
        Next().double(), ptif.TokenCrossEntropy(shift=True, average=average), texts(9, 0), batch_size=4, **options
    )
    return problem, texts(3, 1)


def token_gradients(problem: ptif.Problem, item: dict[str, Tensor], average: bool) -> Tensor:
    """[T, P]: the gradient of each token's own cross entropy, written out here once more."""
    model: Any = problem.model
    parameters = list(model.parameters())
    logp = model(item["input_ids"][None])[0].log_softmax(-1)
    count = int(item["attention_mask"].sum()) - 1
    rows = [torch.zeros(sum(p.numel() for p in parameters), dtype=torch.float64)] * LENGTH
    for t in range(1, count + 1):
        loss = -logp[t - 1, item["input_ids"][t]] / (count if average else 1)
        found = torch.autograd.grad(loss, parameters, retain_graph=True)
        rows[t] = torch.cat([g.flatten() for g in found])
    return torch.stack(rows)


@pytest.mark.parametrize("average", [True, False])
@pytest.mark.parametrize("solver", [Spectral(), CG(rtol=1e-11), Woodbury()])
def test_every_token_has_its_own_gradients_part(solver: Any, average: bool) -> None:
    problem, queries = setting(average)
    method = ptif.Influence(EmpiricalFisher(), solver, DAMPING)
    found = method.fit(problem).token_scores(queries, [7, 2])
    each = [token_gradients(problem, item, average) for item in texts(9, 0)]
    g = torch.stack([rows.sum(0) for rows in each])
    q = torch.stack([token_gradients(problem, item, average).sum(0) for item in queries])
    x = torch.linalg.solve(g.T @ g / len(g) + DAMPING * torch.eye(g.shape[1], dtype=torch.float64), q.T).T
    assert list(found) == [7, 2]
    for i, values in found.items():
        torch.testing.assert_close(values, x @ each[i].T / len(g), rtol=1e-6, atol=1e-12)
        assert not values[:, 0].any()  # nothing predicts the first token


def test_tokens_add_up_to_the_score_also_over_checkpoints() -> None:
    torch.manual_seed(1)
    other = {
        k: v + 0.1 for k, v in detach_parameters(Next().double(), ("embed.weight", "out.weight", "out.bias")).items()
    }
    problem, queries = setting(checkpoints=[other, {k: 1.5 * v for k, v in other.items()}])
    attribution = ptif.ekfac().fit(problem)
    scores, parts = attribution.score(queries), attribution.token_scores(queries, range(9))
    sums = torch.stack([parts[i].sum(1) for i in range(9)], 1)
    torch.testing.assert_close(sums, scores.values, rtol=1e-9, atol=1e-12)
    assert float(sums.abs().max()) > 1e-4


def test_a_token_that_teaches_nothing_new_moves_with_its_own_loss_only() -> None:
    """The parts are derivatives: a step along the solved direction changes each token's loss by its part, times N."""
    problem, queries = setting()
    attribution = ptif.Influence(EmpiricalFisher(), Spectral(), 0.1).fit(problem)
    part = attribution.token_scores(queries[:1], [4])[4][0] * len(problem)
    member = attribution.members[0]
    (gradients,) = member.derivatives.stream(Source.of(queries[:1]))
    solved = member.solve(gradients.rows).unwrap()
    tree = problem.space.to_parameters(solved)
    objective, item = ptif.TokenCrossEntropy(shift=True), problem.data.item(4)
    batch = {k: v[None] for k, v in item.items()}

    def losses(step: float) -> Tensor:
        moved = {k: v + step * tree[k][0] for k, v in detach_parameters(problem.model, problem.space.names).items()}
        return objective.token_losses(objective.outputs(as_function(problem.model, moved), batch), batch)[0]

    torch.testing.assert_close((losses(1e-6) - losses(-1e-6)) / 2e-6, part, rtol=1e-5, atol=1e-9)


def test_bad_input_gets_one_sentence() -> None:
    problem, queries = setting()
    attribution = ptif.ekfac().fit(problem)
    for ids, words in [([9], "Index 9 is outside the 9 training examples"), ([], "at least one integer"),
                       ([0.5], "no positions"), ("a", "no positions")]:  # fmt: skip
        with pytest.raises(InvalidInput, match=words):
            attribution.token_scores(queries, ids)
    plain = ptif.Problem(nn.Linear(2, 2), ptif.CrossEntropy(), (torch.randn(4, 2), torch.arange(4) % 2))
    with pytest.raises(InvalidInput, match="needs a loss that is a sum over tokens"):
        ptif.ekfac().fit(plain).token_scores((torch.randn(1, 2), torch.zeros(1).long()), [0])
    with pytest.raises(InvalidInput, match="rescales whole examples"):
        ptif.Influence(EKFAC(), scaling=RelatIF()).fit(problem).token_scores(queries, [0])
