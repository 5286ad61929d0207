"""Rows of a layer belong to the examples they are taken for, also where code before the layer puts a batch in another
order, joins examples of unequal size, or runs a layer on some of them only.

In every case the first three examples are alike: what tells them apart is seen on others."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_sequence
from torch.utils.data import DataLoader

import pytorch_influence_functions as ptif
from pytorch_influence_functions.core.errors import InvalidInput
from pytorch_influence_functions.gradients.per_example import Derivatives
from pytorch_influence_functions.problem.problem import Problem, sweep

Item = tuple[Any, ...]


class SortedByLength(nn.Module):
    """As code for packed sequences was written: sorted, run, and put back in order."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.rnn, self.head = nn.Embedding(9, 3), nn.GRU(3, 4, batch_first=True), nn.Linear(4, 2)

    def forward(self, tokens: Tensor, lengths: Tensor) -> Tensor:
        lengths, order = lengths.sort(descending=True, stable=True)
        packed = pack_padded_sequence(self.embed(tokens[order]), lengths, batch_first=True)
        logits: Tensor = self.head(self.rnn(packed)[1][0])[order.argsort()]
        return logits


class RealTokensOnly(nn.Module):
    """A layer on the real tokens of all texts, joined, and nothing computed for padding."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.inner, self.head = nn.Embedding(9, 3), nn.Linear(3, 4), nn.Linear(4, 2)

    def forward(self, tokens: Tensor, lengths: Tensor) -> Tensor:
        real = torch.arange(tokens.shape[1])[None] < lengths[:, None]
        hidden = torch.zeros(*tokens.shape, 4, dtype=torch.float64)
        hidden[real] = torch.tanh(self.inner(self.embed(tokens[real])))
        logits: Tensor = self.head(hidden.sum(1))
        return logits


class TimeFirstFlattened(nn.Module):
    """[tokens, texts] flattened: row i is example i only where all texts have one token."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.inner, self.head = nn.Embedding(9, 3), nn.Linear(3, 4), nn.Linear(4, 2)

    def forward(self, tokens: Tensor, lengths: Tensor) -> Tensor:
        n, t = tokens.shape
        hidden = torch.tanh(self.inner(self.embed(tokens.T).reshape(t * n, 3))).reshape(t, n, 4)
        real = torch.arange(t)[:, None] < lengths[None]
        logits: Tensor = self.head((hidden * real[..., None]).sum(0))
        return logits


class TokenByToken(nn.Module):
    """A layer that is called as often as the longest text of a batch has tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.inner, self.head = nn.Embedding(9, 3), nn.Linear(7, 4), nn.Linear(4, 2)

    def forward(self, tokens: Tensor, lengths: Tensor) -> Tensor:
        hidden = torch.zeros(len(tokens), 4, dtype=torch.float64)
        for at in range(tokens.shape[1]):
            new = torch.tanh(self.inner(torch.cat([self.embed(tokens[:, at]), hidden], 1)))
            hidden = torch.where((at < lengths)[:, None], new, hidden)
        logits: Tensor = self.head(hidden)
        return logits


class PaddedTexts(nn.Module):
    """Nothing is moved: a text's rows are its own whatever it is padded to."""

    def __init__(self, flattened: bool = False) -> None:
        super().__init__()
        self.embed, self.inner, self.head = nn.Embedding(9, 3), nn.Linear(3, 4), nn.Linear(4, 2)
        self.flattened = flattened

    def forward(self, tokens: Tensor, lengths: Tensor) -> Tensor:
        n, t = tokens.shape
        x = self.embed(tokens)
        hidden = self.inner(x.reshape(n * t, 3)).reshape(n, t, 4) if self.flattened else self.inner(x)
        logits: Tensor = self.head((torch.tanh(hidden) * (tokens > 0)[..., None]).sum(1))
        return logits


def texts(first: int, left: bool = False, count: int = 21) -> tuple[list[Item], Callable[[list[Item]], Item]]:
    """Texts of which the first three have `first` tokens and the others 1 to 6, and what makes a batch of them."""
    generator = torch.Generator().manual_seed(3)
    lengths = [first] * 3 + torch.randint(1, 7, (count - 3,), generator=generator).tolist()
    items = [
        (torch.randint(1, 9, (n,), generator=generator), int(torch.randint(0, 2, (), generator=generator)))
        for n in lengths
    ]
    side = "left" if left else "right"

    def collate(batch: list[Item]) -> Item:
        tokens = pad_sequence([tokens for tokens, _ in batch], batch_first=True, padding_side=side)
        return tokens, torch.tensor([len(tokens) for tokens, _ in batch]), torch.tensor([y for _, y in batch])

    return items, collate


class Graphs(nn.Module):
    """Nodes of all graphs joined, and summed by graph."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.head = nn.Linear(3, 4), nn.Linear(4, 2)

    def forward(self, nodes: Tensor, graph: Tensor) -> Tensor:
        hidden = torch.tanh(self.inner(nodes))
        logits: Tensor = self.head(hidden.new_zeros(int(graph.max()) + 1, 4).index_add(0, graph, hidden))
        return logits


def graphs(sizes: list[int]) -> tuple[list[Item], Callable[[list[Item]], Item]]:
    generator = torch.Generator().manual_seed(4)
    items = [(torch.randn(n, 3, generator=generator, dtype=torch.float64), at % 2) for at, n in enumerate(sizes)]

    def collate(batch: list[Item]) -> Item:
        graph = torch.cat([torch.full((len(nodes),), at) for at, (nodes, _) in enumerate(batch)])
        return torch.cat([nodes for nodes, _ in batch]), graph, torch.tensor([y for _, y in batch])

    return items, collate


class Experts(nn.Module):
    """Each example goes through the expert that the sign of its first number chooses."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList([nn.Linear(4, 3) for _ in range(2)])

    def forward(self, x: Tensor) -> Tensor:
        out, chosen = x.new_zeros(len(x), 3), (x[:, 0] > 0).long()
        for at, expert in enumerate(self.experts):
            if (chosen == at).any():
                out[chosen == at] = expert(x[chosen == at])
        return out


class SortedByExpert(nn.Module):
    """The batch is sorted by expert, cut, and put back in order; the layer before sees it sorted."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.experts = nn.Linear(4, 4), nn.ModuleList([nn.Linear(4, 3) for _ in range(2)])

    def forward(self, x: Tensor) -> Tensor:
        chosen = (x[:, 0] > 0).long()
        order = chosen.argsort(stable=True)
        hidden, first = torch.tanh(self.inner(x[order])), int((chosen == 0).sum())
        return torch.cat([self.experts[0](hidden[:first]), self.experts[1](hidden[first:])])[order.argsort()]


class EarlyExit(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner, self.more, self.head = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        hidden, going_on = torch.tanh(self.inner(x)), x[:, 0] > 0
        if going_on.any():
            hidden = hidden.clone()
            hidden[going_on] = hidden[going_on] + torch.tanh(self.more(hidden[going_on]))
        logits: Tensor = self.head(hidden)
        return logits


class Deduplicated(nn.Module):
    """Each number of a table is looked up once for a batch, in increasing order."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.inner, self.head = nn.Embedding(30, 3), nn.Linear(3, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        ids, places = x.unique(return_inverse=True)
        logits: Tensor = self.head(torch.tanh(self.inner(self.table(ids)))[places])
        return logits


def points(sign: float) -> Item:
    x = torch.randn(21, 4, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    x[:3, 0] = sign * x[:3, 0].abs()
    return x, torch.arange(21) % 3


def ids(repeated: bool) -> Item:
    generator = torch.Generator().manual_seed(6)
    chosen = torch.randint(0, 12, (21,), generator=generator) if repeated else torch.randperm(21, generator=generator)
    chosen[:3] = torch.tensor([12, 13, 14]) if repeated else chosen[:3].sort().values
    return chosen, torch.arange(21) % 3


def loader(made: tuple[list[Item], Callable[[list[Item]], Item]]) -> DataLoader[Any]:
    items, collate = made
    return DataLoader(items, 4, collate_fn=collate)  # type: ignore[arg-type]


SIZES = {
    "as they come": [4, 4, 4, 2, 3, 6, 5, 1, 4, 2, 7, 3, 3, 5, 6, 2, 4],
    "even": [4, 4, 4, 2, 6, 6, 2, 4, 6, 2, 2, 6],
}
CASES: dict[str, tuple[Callable[[], nn.Module], Callable[[], Any]]] = {
    "sorted by length": (SortedByLength, lambda: loader(texts(4))),
    "real tokens only": (RealTokensOnly, lambda: loader(texts(3))),
    "time first, flattened": (TimeFirstFlattened, lambda: loader(texts(1))),
    "token by token, first of the shortest": (TokenByToken, lambda: loader(texts(1))),
    "token by token, first of the longest": (TokenByToken, lambda: loader(texts(6))),
    "graphs of many sizes": (Graphs, lambda: loader(graphs(SIZES["as they come"]))),
    "graphs of even sizes": (Graphs, lambda: loader(graphs(SIZES["even"]))),
    "experts, the first": (Experts, lambda: points(-1)),
    "experts, the last": (Experts, lambda: points(1)),
    "sorted by expert, the first": (SortedByExpert, lambda: points(-1)),
    "sorted by expert, the last": (SortedByExpert, lambda: points(1)),
    "early exit, none": (EarlyExit, lambda: points(-1)),
    "early exit, all": (EarlyExit, lambda: points(1)),
    "each number once, sorted": (Deduplicated, lambda: ids(False)),
    "each number once, repeated": (Deduplicated, lambda: ids(True)),
}


def by_definition(problem: Problem) -> Tensor:
    """Gradients of all examples, each alone, in the order of the model's parameters."""
    rows = []
    for ids_of_one, batch in sweep(problem, replace(problem.data, batch_size=1)):
        losses = problem.objective.losses(problem.objective.outputs(problem.model, batch), batch)
        gradients = torch.autograd.grad(losses.sum(), list(problem.model.parameters()), materialize_grads=True)
        rows.append(torch.cat([g.flatten() for g in gradients]))
        assert len(ids_of_one) == 1
    return torch.stack(rows)


def by_the_library(problem: Problem, derivatives: Derivatives, order: Tensor) -> Tensor:
    rows = torch.full((len(problem), problem.space.size), torch.nan, dtype=torch.float64)
    for batch_ids, batch in sweep(problem, ids=order):
        gradients = derivatives.loss_rows(batch_ids, batch).rows
        parameters = problem.space.to_parameters(gradients)
        names = [name for name, _ in problem.model.named_parameters()]
        rows[batch_ids] = torch.cat([parameters[name].flatten(1) for name in names], 1)
    return rows


@pytest.mark.parametrize("batch_size", [2, 4, 7])
@pytest.mark.parametrize("name", CASES)
def test_rows_belong_to_their_examples(name: str, batch_size: int) -> None:
    torch.manual_seed(0)
    model, data = (make() for make in CASES[name])
    problem = ptif.Problem(model.double(), nn.CrossEntropyLoss(), data, batch_size=batch_size)
    expected, derivatives = by_definition(problem), Derivatives.of(problem)
    for order in (torch.arange(len(problem)), torch.arange(len(problem)).flip(0)):
        found = by_the_library(problem, derivatives, order)
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("flattened", [False, True])
@pytest.mark.parametrize("left", [False, True])
def test_padded_texts_keep_their_rules(left: bool, flattened: bool) -> None:
    """Alone they are padded less than in a batch, which is no reason to take them one by one."""
    torch.manual_seed(0)
    model = PaddedTexts(flattened).double()
    problem = ptif.Problem(model, nn.CrossEntropyLoss(), loader(texts(4, left)))
    derivatives = Derivatives.of(problem)
    assert set(derivatives.routes.values()) == {"rule"}
    found = by_the_library(problem, derivatives, torch.arange(len(problem)))
    torch.testing.assert_close(found, by_definition(problem), rtol=1e-9, atol=1e-11)


class Wide(nn.Module):
    """A convolution that is wider than some texts, until they are padded to the longest beside them."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.inner, self.head = nn.Embedding(9, 3), nn.Conv1d(3, 4, 5), nn.Linear(4, 2)

    def forward(self, tokens: list[Tensor]) -> Tensor:
        padded = pad_sequence(tokens, batch_first=True)
        logits: Tensor = self.head(self.inner(self.embed(padded).mT)[..., 0])
        return logits


def test_a_text_that_the_model_runs_on_only_when_padded_is_no_fault() -> None:
    torch.manual_seed(0)
    items, _ = texts(6, count=24)
    long, short = items[:3], [(tokens[:2], y) for tokens, y in items[3:]]
    mixed = [long[at % 3] if at % 4 < 3 else short[at // 4] for at in range(24)]

    def collate(batch: list[Item]) -> Item:
        return [tokens for tokens, _ in batch], torch.tensor([y for _, y in batch])

    data, queries = loader((mixed, collate)), loader((long, collate))
    scores = ptif.attribute(Wide().double(), data, queries, nn.CrossEntropyLoss(), method="grad_dot")
    assert bool(scores.values.isfinite().all()) and set(scores.diagnostics.routes.values()) == {"rule"}


class InPieces(nn.Module):
    """Rows of all examples are joined, and go through a layer some at a time."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.head = nn.Linear(2, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, 2).split(40)
        hidden = torch.cat([torch.tanh(self.inner(some)) for some in rows]).reshape(len(x), -1, 4)
        logits: Tensor = self.head(hidden.sum(1))
        return logits


def test_pieces_of_joined_rows_are_refused_where_few_examples_are_one_piece() -> None:
    torch.manual_seed(0)
    data = torch.randn(60, 10, dtype=torch.float64), torch.arange(60) % 3
    problem = ptif.Problem(InPieces().double(), nn.CrossEntropyLoss(), data)
    with pytest.raises(InvalidInput, match=r"layer 'inner' read \(40, 2\) for 60 examples.*route='loop'"):
        ptif.methods.grad_dot().fit(problem).score(data)
    rows = by_definition(problem)
    scores = ptif.methods.grad_dot().with_options(route="loop").fit(problem).score(data)
    torch.testing.assert_close(scores.values, rows @ rows.T / 60)


class MustBeSorted(nn.Module):
    """Packed without being told that texts come in any order."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.rnn, self.head = nn.Embedding(9, 3), nn.GRU(3, 4, batch_first=True), nn.Linear(4, 2)

    def forward(self, tokens: Tensor, lengths: Tensor) -> Tensor:
        packed = pack_padded_sequence(self.embed(tokens), lengths, batch_first=True)
        logits: Tensor = self.head(self.rnn(packed)[1][0])
        return logits


def test_a_model_that_runs_on_sorted_batches_only_is_given_no_others() -> None:
    torch.manual_seed(0)
    items, collate = texts(6)
    by_length = sorted(items, key=lambda item: -len(item[0]))
    problem = ptif.Problem(MustBeSorted().double(), nn.CrossEntropyLoss(), loader((by_length, collate)))
    found = by_the_library(problem, Derivatives.of(problem), torch.arange(len(problem)))
    torch.testing.assert_close(found, by_definition(problem), rtol=1e-9, atol=1e-11)


def test_a_collate_function_that_sorts_its_batch_is_refused_and_the_advice_works() -> None:
    """Training is right with it, but no row of a batch is known to be whose."""
    torch.manual_seed(0)
    items, keeps_order = texts(6)
    items[10] = items[10][0][:2], items[10][1]

    def sorts(batch: list[Item]) -> Item:
        return keeps_order(sorted(batch, key=lambda item: -len(item[0])))

    model = SortedByLength().double()
    with pytest.raises(
        InvalidInput, match=r"^The collate function makes the same batch of examples 0 and 10 which.*\.$"
    ):
        ptif.attribute(model, loader((items, sorts)), loader((items, sorts)), nn.CrossEntropyLoss(), method="grad_dot")
    problem = ptif.Problem(model, nn.CrossEntropyLoss(), loader((items, keeps_order)))
    found = by_the_library(problem, Derivatives.of(problem), torch.arange(len(problem)))
    torch.testing.assert_close(found, by_definition(problem), rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("first", [1, 3, 6])
def test_a_layer_called_for_every_token_keeps_its_rule(first: int) -> None:
    torch.manual_seed(0)
    problem = ptif.Problem(TokenByToken().double(), nn.CrossEntropyLoss(), loader(texts(first)))
    assert set(Derivatives.of(problem).routes.values()) == {"rule"}


def test_what_none_of_the_examples_looked_at_shows_is_refused_and_the_advice_works() -> None:
    """One example in 400 takes the other expert."""
    torch.manual_seed(0)
    x = torch.randn(400, 4, dtype=torch.float64)
    x[:, 0] = x[:, 0].abs()
    x[399, 0] *= -1
    data = x, torch.arange(400) % 3
    problem = ptif.Problem(Experts().double(), nn.CrossEntropyLoss(), data)
    method = ptif.methods.grad_dot()
    with pytest.raises(InvalidInput, match=r"layer 'experts.1' read .*route='loop'"):
        method.fit(problem).score(data)
    rows = by_definition(problem)
    scores = method.with_options(route="loop").fit(problem).score(data)
    torch.testing.assert_close(scores.values, rows @ rows.T / len(problem))
