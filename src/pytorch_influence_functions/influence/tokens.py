"""Which tokens of a training text carry its score."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..core.distributed import World, current
from ..core.errors import InvalidInput, name_ids
from ..core.progress import UNSEEN, track
from ..gradients.per_example import Derivatives
from ..gradients.products import Products
from ..linalg.rows import Rows
from ..objectives.tokens import TokenCrossEntropy
from ..problem.problem import Problem, sweep
from ..scaling.base import AbstractScaling


class TokenScores:
    """Sums over checkpoints of weight / N <x_q, gradient of each token's part of the loss>, for chosen examples.

    Args:
        problem: model, loss and training data.
        ids: positions of the examples in the training dataset.
        n_queries: how many queries there are.
        along: example -> the queries along which it is followed, `None`: all; at the others its values stay 0.
    """

    def __init__(
        self, problem: Problem, ids: Any, n_queries: int, along: Mapping[int, Sequence[int]] | None = None
    ) -> None:
        self.problem, self.ids, self.n_queries = problem, checked_ids(ids, len(problem.data.whole)), n_queries
        self._along = along
        self.values: dict[int, Tensor] = {}
        self._products: dict[Derivatives, Products] = {}  # tried once at each checkpoint

    def add(self, d: Derivatives, query_ids: Tensor, directions: Rows, weights: Tensor) -> None:
        """One more group of solved queries, at the model's present weights; `weights` multiply every query's parts."""
        # One by one: texts differ in length, and few are asked for. They share one bar.
        own = self.ids[current().share(len(self.ids))]
        for i in track(own, len(own), "tokens"):
            rows, chosen = query_ids, directions
            if self._along is not None:
                places = torch.isin(query_ids, torch.tensor(self._along[i])).nonzero().flatten()
                if not len(places):
                    continue
                rows, chosen = query_ids[places], directions.take(places)
            index = self.problem.data.index_of(i)
            for ids, batch in sweep(self.problem, ids=[index], label=UNSEEN, world=World()):
                products = self._products[d] = self._products.get(d) or Products.of(d, batch, len(ids))
                token_scores = products.token_losses_along(batch, chosen)[:, 0].double().cpu()
                total = self.values.setdefault(
                    i, torch.zeros(self.n_queries, token_scores.shape[1], dtype=torch.float64)
                )
                total[rows] += token_scores * (weights[rows] / len(self.problem))[:, None]

    def everyones(self) -> dict[int, Tensor]:
        """The values of all texts, on every process: each of them added those of its share of the texts."""
        world = current()
        if world.size == 1:
            return self.values
        own = self.ids[world.share(len(self.ids))]
        lengths = torch.tensor([self.values[i].shape[1] for i in own], dtype=torch.long)
        parts = [self.values[i] for i in own]
        flat = torch.cat(parts, 1) if parts else torch.zeros(self.n_queries, 0, dtype=torch.float64)
        texts = [
            part
            for columns, counts in zip(world.gather(flat), world.gather(lengths), strict=True)
            for part in torch.split(columns, counts.tolist(), 1)
        ]
        return {i: part.contiguous() for i, part in zip(self.ids, texts, strict=True)}


def check_tokens(d: Derivatives, scaling: AbstractScaling, call: str) -> TokenCrossEntropy:
    """The loss of texts; what has no tokens, or no direction to follow, is refused.

    Args:
        d: how gradients are taken.
        scaling: what becomes of scores.
        call: what was called, without parentheses.

    Raises:
        InvalidInput: the training loss is not a `TokenCrossEntropy`, or gradients are projected or rescaled.
    """
    if not isinstance(d.objective, TokenCrossEntropy):
        raise InvalidInput(
            f"{call}() needs a loss that is a sum over tokens, TokenCrossEntropy(), and the training loss is "
            f"{d.objective!r}; use score()."
        )
    if d.problem.is_cut_up:
        raise InvalidInput(
            "Tokens cannot be told apart in a model that fully_shard has cut up: it takes derivatives along directions "
            "of all weights at once; use score()."
        )
    if d.projector is not None:
        raise InvalidInput("Projected gradients cannot be followed back to tokens; use a method without projection=.")
    if not scaling.first_order:
        raise InvalidInput(f"{scaling!r} rescales whole examples, not tokens; use scaling=Raw().")
    return d.objective


def checked_ids(ids: Any, n: int) -> list[int]:
    try:
        token_scores = torch.as_tensor(ids if isinstance(ids, (Tensor, Sequence)) else list(ids)).reshape(-1)
    except (TypeError, ValueError, RuntimeError) as cause:
        raise InvalidInput(f"ids={ids!r} are no positions in the training dataset; give integers.") from cause
    if token_scores.numel() == 0 or token_scores.dtype.is_floating_point or token_scores.dtype == torch.bool:
        raise InvalidInput(f"ids={ids!r} are no positions in the training dataset; give at least one integer.")
    outside = [i for i in token_scores.tolist() if not 0 <= i < n]
    if outside:
        raise InvalidInput(f"Index {name_ids(outside)} is outside the {n} training examples; count from 0.")
    return [int(i) for i in dict.fromkeys(token_scores.tolist())]
