"""Tokens of queries and texts, pair by pair: against autograd token by token, and they add up to the scores."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import pytorch_influence_functions as ptif
from pytorch_influence_functions.core.errors import InvalidInput
from pytorch_influence_functions.curvature import EmpiricalFisher
from pytorch_influence_functions.influence import rounds
from pytorch_influence_functions.influence.token_pairs import query_token_scores, text_token_scores
from pytorch_influence_functions.solvers import CG, Spectral, Woodbury
from tests.laws.test_token_scores import DAMPING, setting, texts, token_gradients


@pytest.mark.parametrize("solver", [Spectral(), CG(rtol=1e-11), Woodbury()])
def test_every_token_of_a_query_has_its_own_part(solver: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rounds, "_WRITTEN_BYTES", 1)  # texts are followed one by one
    problem, queries = setting()
    attribution = ptif.Influence(EmpiricalFisher(), solver, DAMPING).fit(problem)
    shares = query_token_scores(attribution, queries, [[7, 2]] * len(queries))
    g = torch.stack([token_gradients(problem, item, True).sum(0) for item in texts(9, 0)])
    x = torch.linalg.solve(g.T @ g / len(g) + DAMPING * torch.eye(g.shape[1], dtype=torch.float64), g[[7, 2]].T).T
    for row, item in zip(shares, queries, strict=True):
        torch.testing.assert_close(row, x @ token_gradients(problem, item, True).T / len(g), rtol=1e-6, atol=1e-12)
    scores = attribution.score(queries).values[:, [7, 2]].double()
    torch.testing.assert_close(torch.stack([row.sum(1) for row in shares]), scores, rtol=1e-6, atol=1e-10)


def test_over_checkpoints_they_add_up_to_the_average() -> None:
    problem, queries = setting()
    states = [
        {k: v + 0.1 * s * torch.randn(v.shape, dtype=v.dtype) for k, v in problem.model.state_dict().items()}
        for s in (0, 1)
    ]
    several = problem.with_(checkpoints=states)
    method = ptif.Influence(EmpiricalFisher(), Spectral(), DAMPING, units="spread")
    attribution = method.fit(several)
    scores = attribution.score(queries).values[:, [3, 5]].double()
    shares = query_token_scores(attribution, queries, [[3, 5]] * len(queries))
    torch.testing.assert_close(torch.stack([row.sum(1) for row in shares]), scores, rtol=1e-6, atol=1e-10)


@pytest.mark.parametrize("together", [1, 1 << 29])
def test_a_pair_has_the_same_shares_whatever_else_is_listed(together: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rounds, "_WRITTEN_BYTES", together)
    problem, queries = setting()
    attribution = ptif.Influence(EmpiricalFisher(), Spectral(), DAMPING).fit(problem)
    listed: list[list[int]] = [[4, 0], [], [8, 4, 3]][: len(queries)]
    everyones = query_token_scores(attribution, queries, [list(range(9))] * len(queries))
    texts_shares = attribution.token_scores(queries, range(9))
    for q, rows in enumerate(query_token_scores(attribution, queries, listed)):
        assert len(rows) == len(listed[q])
        for i, row in zip(listed[q], rows, strict=True):
            torch.testing.assert_close(row, everyones[q][i], rtol=1e-8, atol=1e-12)
    for q, shares in enumerate(text_token_scores(attribution, queries, listed)):
        assert list(shares) == listed[q]
        for i, row in shares.items():
            torch.testing.assert_close(row, texts_shares[i][q], rtol=1e-8, atol=1e-12)


def test_what_has_no_tokens_is_refused() -> None:
    x, y = torch.randn(8, 3), torch.randint(0, 2, (8,))
    fitted = ptif.methods.grad_dot().fit(ptif.Problem(torch.nn.Linear(3, 2), ptif.CrossEntropy(), (x, y)))
    with pytest.raises(InvalidInput, match="needs a loss that is a sum over tokens"):
        query_token_scores(fitted, (x, y), [[0]] * 8)
