"""Which tokens of a query a training text explains: the other side of `token_scores`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from ..core.distributed import World
from ..core.progress import UNSEEN, Meter
from ..gradients.products import Products
from ..problem.model_state import plain_autograd
from ..problem.problem import sweep
from .attribution import Attribution
from .scoring import ScoringPass
from .tokens import check_tokens


@plain_autograd()
def query_token_scores(attribution: Attribution, queries: Any, ids: Sequence[int]) -> list[Float[Tensor, "n l"]]:
    """Every query token's share of the scores that a few training texts have on it.

    A query's loss is a sum over its tokens as well, and (C + lambda)^-1 is symmetric: the training texts are solved
    for, and the loss of each of the query's tokens is followed along them.

    Args:
        attribution: a fitted method.
        queries: as for `score`; what is measured is the training loss, a `TokenCrossEntropy`.
        ids: positions of the texts in the training dataset.

    Returns:
        for each query float64 [ids, tokens], in the units of `score`: a row adds up to the text's score on the query.

    Raises:
        InvalidInput: as `token_scores`.

    Reference: Grosse et al. (2023), "Studying Large Language Model Generalization with Influence Functions", §5.
    """
    check_tokens(attribution.members[0].derivatives, attribution.spec.scaling, "query_token_scores")
    problem = attribution.problem
    question = attribution._question(queries)
    rounds = attribution._rounds
    factors = rounds.factors(ScoringPass(problem, question))
    texts = ScoringPass(problem, attribution._question(problem.data.whole.subset(list(ids))))
    scores: list[Tensor] = []
    tried: dict[int, Products] = {}
    with Meter(len(rounds.members) * len(ids) * len(question), "tokens of queries", "text") as meter:
        for k, member, rows, directions in rounds.directions(texts):
            for q in range(len(question)):
                for _, batch in sweep(problem, question.source, [q], label=UNSEEN, world=World()):
                    products = tried[k] = tried.get(k) or Products.of(member.derivatives, batch, 1)
                    shares = products.token_losses_along(batch, directions)[:, 0].double().cpu()
                    if q == len(scores):
                        scores.append(torch.zeros(len(ids), shares.shape[1], dtype=torch.float64))
                    scores[q][rows] += shares * (factors[k][q] / len(problem))
                meter.advance(len(rows))
    return scores
