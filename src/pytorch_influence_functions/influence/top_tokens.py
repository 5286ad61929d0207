"""Every token of all training texts against solved queries: the extremes are kept, the rest passes by."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from ..core.distributed import World, current
from ..core.errors import TooLarge
from ..gradients.per_example import Derivatives
from ..gradients.products import Products
from ..linalg.rows import Rows
from ..objectives.tokens import TokenCrossEntropy
from ..problem.problem import Problem, sweep
from ..scores.top_tokens import TopTokens
from .question import Question
from .scoring import refuse_nonfinite
from .topk import TopK

# A token is named by its text's number and its place among the tokens that the text teaches, in one number: padding
# moves positions, and leaves the order of what is taught.
_TEXT = 1 << 32


class TokenExtremes:
    """The k largest and k smallest of weight / N <x_q, gradient of a token's part of the loss> over all tokens.

    Args:
        problem: model, loss and training texts.
        objective: the training loss, a sum over tokens.
        question: the queries.
        k: how many of either side are kept.
        ids: of the texts that are read, as positions in the problem's data; None: all.
        several: whether several checkpoints add up; all tokens' sums are then held until the last.
        room: bytes that those may take.
    """

    def __init__(
        self,
        problem: Problem,
        objective: TokenCrossEntropy,
        question: Question,
        k: int,
        ids: Int[Tensor, " n"] | None,
        several: bool,
        room: int,
    ) -> None:
        self.problem, self.objective, self.question, self.ids, self.room = problem, objective, question, ids, room
        self.extremes, self._products = TopK(len(question), k), dict[Derivatives, Products]()
        self.sums: list[tuple[Tensor, Tensor]] | None = [] if several else None

    def add(self, derivatives: Derivatives, query_ids: Int[Tensor, " q"], directions: Rows, weights: Tensor) -> None:
        """One more group of solved queries, at the model's present weights.

        Raises:
            TooLarge: the sums of several checkpoints take more than the room.
            NonFinite: a token's share is NaN or infinite.
        """
        factor = (weights[query_ids] / len(self.problem))[:, None]
        for number, (ids, batch) in enumerate(sweep(self.problem, ids=self.ids, label="tokens")):
            products = self._products.get(derivatives) or Products.of(derivatives, batch, len(ids))
            self._products[derivatives] = products
            shares = products.token_losses_along(batch, directions).double().cpu()
            taught = self.objective.taught(batch).cpu()
            values = shares[:, taught] * factor
            texts = ids.cpu().repeat_interleave(taught.sum(1))
            refuse_nonfinite(values, query_ids, texts)
            self._keep(number, query_ids, _names(ids.cpu(), taught), values)

    def result(self) -> TopTokens:
        """The extremes of all processes' texts, with the place of each token in its text alone."""
        for names, values in self.sums or ():
            self.extremes.add(torch.arange(len(self.question)), names, values)
        values, names = self.extremes.everyones(current()).result()
        texts, data, question = names // _TEXT, self.problem.data, self.question
        indices = texts if data.positions is None else data.positions[texts]
        places, k = self._places(names), self.extremes.k
        return TopTokens(values, indices, places, k, question.lower_is_better, question.names, data.whole)

    def _keep(self, number: int, query_ids: Tensor, names: Tensor, values: Tensor) -> None:
        if self.sums is None:
            self.extremes.add(query_ids, names, values)
            return
        if number == len(self.sums):
            self.sums.append((names, torch.zeros(len(self.question), len(names), dtype=torch.float64)))
            needed = sum(total.nbytes for _, total in self.sums)
            if needed > self.room:
                raise TooLarge(
                    f"The tokens' sums over several checkpoints take more than {self.room / 2**20:,.0f} MiB; ask fewer "
                    "queries at once, name texts with ids=, or raise memory=."
                )
        self.sums[number][1][query_ids] += values

    def _places(self, names: Int[Tensor, "q m"]) -> Int[Tensor, "q m"]:
        """The position of each token in its text as it is read alone, as `token_scores` counts."""
        places = torch.empty_like(names)
        for text in torch.unique(names // _TEXT).tolist():
            ((_, batch),) = sweep(self.problem, ids=[text], label="tokens", world=World())
            own = names // _TEXT == text
            places[own] = self.objective.taught(batch)[0].cpu().nonzero()[:, 0][names[own] % _TEXT]
        return places


def _names(ids: Int[Tensor, " n"], taught: Bool[Tensor, "n l"]) -> Int[Tensor, " m"]:
    """One number for each taught token of a batch, in the order of `[taught]`."""
    rank = taught.long().cumsum(1) - 1
    return (ids[:, None] * _TEXT + rank)[taught]
