"""Shares of tokens for chosen pairs of a query and a training text, from either side: what a page colours."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from ..core.distributed import World
from ..core.errors import InvalidInput
from ..core.progress import UNSEEN, Meter
from ..gradients.products import Products
from ..problem.agreement import entry
from ..problem.model_state import plain_autograd
from ..problem.problem import sweep
from ..scores.difference import CONTRASTED
from ..scores.scores import Scores
from .attribution import Attribution
from .scoring import ScoringPass
from .tokens import TokenScores, check_tokens


@entry
def text_token_scores(
    attribution: Attribution, queries: Any, listed: Sequence[Sequence[int]]
) -> list[dict[int, Float[Tensor, " l"]]]:
    """`token_scores` of some pairs of a query and a text only: a text is followed along the queries that list it.

    Args:
        attribution: a fitted method.
        queries: as for `score`.
        listed: for each query, positions of texts in the training dataset.

    Returns:
        for each query {position of a text: float64 [tokens]}, as `Attribution.token_scores` has them.

    Raises:
        InvalidInput: as `token_scores`.
    """
    check_tokens(attribution.members[0].derivatives, attribution.spec.scaling, "text_token_scores")
    question = attribution._question(queries)
    along: dict[int, list[int]] = {}
    for q, ids in enumerate(listed):
        for i in ids:
            along.setdefault(i, []).append(q)
    tokens = TokenScores(attribution.problem, sorted(along), len(question), along)
    attribution._follow(question, tokens.add)
    shares = tokens.everyones()
    return [{i: shares[i][q] for i in ids} for q, ids in enumerate(listed)]


def shown_token_scores(
    tokens: Any, scores: Scores, listed: Sequence[Sequence[int]]
) -> list[dict[int, Float[Tensor, " l"]]]:
    """Shares of the tokens of the texts that are shown beside each query, in the units of the scores.

    Args:
        tokens: the fitted method that gave the scores.
        scores: which hold their queries; of pairs both sides, and the shares are those of the difference.
        listed: for each row, positions of texts in the training dataset.

    Returns:
        for each row {position of a text: float64 [tokens]}.

    Raises:
        InvalidInput: it is no fitted method, or rows are of several queries, or of queries that are not at hand.
    """
    if not isinstance(tokens, Attribution):
        raise InvalidInput(
            f"tokens= is {type(tokens).__name__}; pass the fitted method that gave the scores, such as "
            "ptif.ekfac().fit(problem), or its token_scores(queries, ids)."
        )
    source = scores.query_source
    if source is None or bool((scores.query_ids < 0).any()):
        raise InvalidInput(
            "The scores do not hold their queries, which tokens= asks about; pass tokens=attribution.token_scores("
            "queries, ids)."
        )
    pairs = int(getattr(source, "pairs", 0)) if scores.diagnostics.rows == CONTRASTED else 0
    if scores.diagnostics.rows and not pairs:
        raise InvalidInput(
            f"The rows of these scores are made of several queries ({scores.diagnostics.rows.rstrip('.')}), whose "
            "tokens cannot be told apart; score the queries one by one (pairs as rows with 'against'), or leave "
            "tokens= out."
        )
    if not any(listed):
        return [{} for _ in listed]
    rows = scores.query_ids.tolist()
    # The answers that others are held against stand behind them.
    asked = source.subset(rows + [row + pairs for row in rows] if pairs else rows)
    values = text_token_scores(tokens, asked, [*listed, *listed] if pairs else listed)
    if not pairs:
        return values
    both = zip(values[: len(rows)], values[len(rows) :], strict=True)
    return [{i: own[i] - other[i] for i in own} for own, other in both]


@plain_autograd()
def query_token_scores(
    attribution: Attribution, queries: Any, listed: Sequence[Sequence[int]]
) -> list[Float[Tensor, "n l"]]:
    """Every query token's share of the scores that a few training texts have on it.

    A query's loss is a sum over its tokens as well, and (C + lambda)^-1 is symmetric: the training texts are solved
    for, and the loss of each of the query's tokens is followed along those that the query lists.

    Args:
        attribution: a fitted method.
        queries: as for `score`; what is measured is the training loss, a `TokenCrossEntropy`.
        listed: for each query, positions of texts in the training dataset.

    Returns:
        for each query float64 [texts it lists, tokens], in the units of `score`: a row adds up to the text's score on
        the query. Of a query that lists none, [0, 0].

    Raises:
        InvalidInput: as `token_scores`.

    Reference: Grosse et al. (2023), "Studying Large Language Model Generalization with Influence Functions", §5.
    """
    check_tokens(attribution.members[0].derivatives, attribution.spec.scaling, "query_token_scores")
    problem = attribution.problem
    question = attribution._question(queries)
    rounds = attribution._rounds
    factors = rounds.factors(ScoringPass(problem, question))
    ids = sorted({i for some in listed for i in some})
    texts = ScoringPass(problem, attribution._question(problem.data.whole.subset(ids)))
    scores = [torch.zeros(0, 0, dtype=torch.float64)] * len(question)
    tried: dict[int, Products] = {}
    with Meter(len(rounds.members) * sum(map(len, listed)), "tokens of queries", "pair") as meter:
        for k, member, rows, directions in rounds.directions(texts):
            solved = {ids[row]: at for at, row in enumerate(rows.tolist())}
            for q, some in enumerate(listed):
                places = [place for place, i in enumerate(some) if i in solved]
                if not places:
                    continue
                chosen = directions.take(torch.tensor([solved[some[place]] for place in places]))
                for _, batch in sweep(problem, question.source, [q], label=UNSEEN, world=World()):
                    products = tried[k] = tried.get(k) or Products.of(member.derivatives, batch, 1)
                    shares = products.token_losses_along(batch, chosen)[:, 0].double().cpu()
                    if not scores[q].numel():
                        scores[q] = torch.zeros(len(some), shares.shape[1], dtype=torch.float64)
                    scores[q][places] += shares * (factors[k][q] / len(problem))
                meter.advance(len(places))
    return scores
