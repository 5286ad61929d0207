"""The extreme tokens of all texts: against every text's own token scores, sorted here once more."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

import pytorch_influence_functions as ptif
from pytorch_influence_functions.core.errors import InvalidInput, TooLarge
from pytorch_influence_functions.gradients.vjp import detach_parameters
from pytorch_influence_functions.scores.top_tokens import TopTokens
from tests.laws.several import run_on
from tests.laws.test_token_scores import Next, setting, texts


class OfUnequalLength(Dataset[dict[str, Tensor]]):
    """Texts without padding; the batch pads them on the side that `padded` names."""

    def __init__(self, n: int, seed: int) -> None:
        self.items = [i["input_ids"][: int(i["attention_mask"].sum())] for i in texts(n, seed)]

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, i: int) -> dict[str, Tensor]:
        return {"input_ids": self.items[i], "attention_mask": torch.ones_like(self.items[i])}


class Masked(Next):
    """The same with what padding says left out, on whichever side it stands."""

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        assert attention_mask is not None
        mask = attention_mask[..., None].to(self.out.weight.dtype)
        total = (self.embed(input_ids) * mask).cumsum(1) / mask.cumsum(1).clamp_min(1.0)
        return self.out(torch.tanh(total))


def padded(side: str) -> Any:
    def collate(items: list[dict[str, Tensor]]) -> dict[str, Tensor]:
        return {
            k: torch.nn.utils.rnn.pad_sequence([i[k] for i in items], batch_first=True, padding_side=side)
            for k in items[0]
        }

    return collate


def problem_of(side: str, batch_size: int, **options: Any) -> ptif.Problem:
    torch.manual_seed(0)
    loader = DataLoader(OfUnequalLength(9, 0), batch_size, collate_fn=padded(side))
    return ptif.Problem(Masked().double(), ptif.TokenCrossEntropy(shift=True), loader, **options)


def asked() -> DataLoader[dict[str, Tensor]]:
    return DataLoader(OfUnequalLength(3, 1), 3, collate_fn=padded("right"))


def by_sorting(attribution: ptif.Attribution, queries: Any, k: int, ids: Any = range(9)) -> list[list[Any]]:
    """For every query (score, text, position) of all taught tokens, the k largest and the k smallest."""
    shares = attribution.token_scores(queries, ids)
    ranked = []
    for q in range(len(shares[ids[0]])):
        every = [(float(v[q, t]), i, t) for i, v in shares.items() for t in v[q].nonzero()[:, 0].tolist()]
        every.sort(reverse=True)
        ranked.append([*every[:k], *every[-k:]])
    return ranked


def check(result: TopTokens, expected: list[list[Any]]) -> None:
    for q, row in enumerate(expected):
        assert result.indices[q].tolist() == [i for _, i, _ in row]
        assert result.positions[q].tolist() == [t for *_, t in row]
        torch.testing.assert_close(result.values[q], torch.tensor([v for v, *_ in row], dtype=torch.float64))


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("batch_size", [1, 4])
def test_they_are_the_extremes_of_all_token_scores_however_texts_are_padded(side: str, batch_size: int) -> None:
    attribution = ptif.ekfac(damping=1e-2).fit(problem_of(side, batch_size))
    queries = asked()
    result = attribution.top_tokens(queries, k=4)
    check(result, by_sorting(attribution, queries, 4))
    first = result.helpful(1, k=2)[0]
    assert (first.score, first.index) == (float(result.values[1, 0]), int(result.indices[1, 0]))
    assert result.harmful(1, k=1)[0].score == float(result.values[1, -1])
    numbers = OfUnequalLength(9, 0)[first.index]["input_ids"].tolist()
    assert first.token == str(numbers[first.position]) and f"«{first.token}»" in first.context


def test_of_some_texts_and_over_checkpoints() -> None:
    torch.manual_seed(1)
    other = {
        k: v + 0.1 for k, v in detach_parameters(Next().double(), ("embed.weight", "out.weight", "out.bias")).items()
    }
    checkpoints = [other, {k: 1.5 * v for k, v in other.items()}]
    problem, queries = setting(checkpoints=checkpoints)
    attribution = ptif.ekfac().fit(problem)
    check(attribution.top_tokens(queries, k=3), by_sorting(attribution, queries, 3))
    check(attribution.top_tokens(queries, k=2, ids=[7, 2]), by_sorting(attribution, queries, 2, [7, 2]))
    twice = attribution.top_tokens(queries, k=2, ids=[2, 2])
    check(twice, by_sorting(attribution, queries, 2, [2]))
    with pytest.raises(TooLarge, match="name texts with ids="):
        small = ptif.ekfac().with_options(memory=200_000).fit(problem)
        small.top_tokens(queries * 2000, k=1)


def test_either_side_has_as_many_tokens_as_were_kept_of_it() -> None:
    problem, queries = setting()
    top = ptif.methods.grad_dot().fit(problem).top_tokens(queries, k=2)
    helpful, harmful = ([(t.index, t.position) for t in side(0, 10)] for side in (top.helpful, top.harmful))
    assert len(helpful) == len(harmful) == 2 and not set(helpful) & set(harmful)


def test_a_query_rather_than_another_has_the_difference_of_their_shares() -> None:
    problem, queries = setting()
    attribution = ptif.ekfac(damping=1e-2).fit(problem)
    shares = attribution.token_scores(queries, range(9))
    top = attribution.top_tokens(queries[:1], k=3, contrast=queries[1:2])
    places = zip(top.indices[0].tolist(), top.positions[0].tolist(), strict=True)
    expected = torch.stack([shares[i][0, t] - shares[i][1, t] for i, t in places])
    torch.testing.assert_close(top.values[0], expected)
    differences = torch.cat([values[0] - values[1] for values in shares.values()])
    torch.testing.assert_close(top.values[0, :3], differences.topk(3).values)


def test_what_has_no_tokens_is_refused() -> None:
    problem, queries = setting()
    attribution = ptif.ekfac().fit(problem)
    with pytest.raises(InvalidInput, match="Index 9 is outside"):
        attribution.top_tokens(queries, ids=[9])
    with pytest.raises(InvalidInput, match="at least 1"):
        attribution.top_tokens(queries, k=0)
    plain = ptif.Problem(torch.nn.Linear(2, 2), ptif.CrossEntropy(), (torch.randn(4, 2), torch.arange(4) % 2))
    with pytest.raises(InvalidInput, match=r"^top_tokens\(\) needs a loss that is a sum over tokens"):
        ptif.ekfac().fit(plain).top_tokens((torch.randn(1, 2), torch.zeros(1).long()))


def _on_one(_: int) -> tuple[Tensor, Tensor, Tensor]:
    attribution = ptif.ekfac(damping=1e-2).fit(problem_of("left", 2))
    with ptif.distributed():
        result = attribution.top_tokens(asked(), k=4)
    return result.values, result.indices, result.positions


def test_two_processes_find_the_same_tokens(tmp_path: Path) -> None:
    expected = _on_one(0)
    for outcome in run_on(2, _on_one, tmp_path):
        for ours, alone in zip(outcome, expected, strict=True):
            torch.testing.assert_close(ours, alone)
