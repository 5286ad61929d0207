"""Several processes that share the work give what one gives alone, on every one of them."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

import pytorch_influence_functions as ptif
from pytorch_influence_functions import actions, curvature, methods, scaling, solvers
from pytorch_influence_functions.core.distributed import World
from pytorch_influence_functions.core.distributed import alone as alone_in_the_block
from pytorch_influence_functions.influence import averaging
from pytorch_influence_functions.influence.averaging import CheckpointAverage, Units
from pytorch_influence_functions.influence.topk import TopK
from tests.covering import chosen
from tests.laws.several import run_on

N, Q, LOSS = 29, 4, nn.CrossEntropyLoss()
CG = ptif.Influence(curvature.GGN(), solvers.CG(rtol=1e-10), damping=0.01)
RELATIVE = ptif.Influence(curvature.GGN(), solvers.CG(rtol=1e-10), damping=0.01, scaling=scaling.RelatIF())


def data() -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    g = torch.Generator().manual_seed(1)
    x, y = torch.randn(N + Q, 6, generator=g, dtype=torch.float64), torch.randint(3, (N + Q,), generator=g)
    return (x[:N], y[:N]), (x[N:], y[N:])


METHODS: dict[str, Any] = {
    "auto": None,
    "exact": ptif.exact(),
    "cg": CG,
    "dual": ptif.dual(),
    "dual of the outputs": ptif.dual(curvature.GGN()),
    "dual, damped by layer": ptif.dual(damping=ptif.damping.Relative(1.0, per_block=True)),
    "dual, damped by its curve": ptif.dual(damping=ptif.damping.FromCurve(data()[1])),
    "dual, solved for each": ptif.Influence(curvature.GGN(), solvers.Woodbury(), scaling=scaling.RelatIF()),
    "ekfac": ptif.ekfac(),
    "ekfac, drawn labels": ptif.ekfac(fisher=curvature.Fisher(samples=1)),
    "ekfac, given labels": ptif.ekfac(fisher=curvature.EmpiricalFisher()),
    "kfac": methods.kfac(),
    "shampoo": methods.shampoo(),
    "diagonal": methods.diagonal(),
    "guided": ptif.gauss_newton(),
    "trak": ptif.trak(k=16),
    "relatif, solved for each": RELATIVE,
    "training loss": methods.TrainingLoss(),
}
OWN = ("ekfac", "dual", "dual of the outputs", "dual, damped by layer", "cg", "training loss")
ALONG = ("raw", "spread", "final")


class Net(nn.Module):
    """A convolution, a normalisation and a head, so that blocks of every kind take part."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.head = nn.Conv1d(1, 3, 3), nn.LayerNorm(4), nn.Linear(12, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.norm(self.conv(x[:, None]))).flatten(1))


def net() -> nn.Module:
    torch.manual_seed(0)
    return Net().double()


def checkpoints() -> list[dict[str, Tensor]]:
    weights, states = net().state_dict(), []
    for _ in range(3):
        states.append({k: w + 0.3 * torch.randn_like(w) for k, w in weights.items()})
    return states


def ask(count: int = N, **options: Any) -> ptif.Scores:
    (x, y), queries = data()
    return ptif.attribute(net(), (x[:count], y[:count]), queries, loss=LOSS, **options)


def own(method: Any, **options: Any) -> Tensor:
    return method.fit(ptif.Problem(net(), LOSS, data()[0], **options)).self_influence()


def texts(n: int, seed: int) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    return torch.randint(5, (n, 6), generator=g), torch.randint(5, (n,), generator=g)


class Next(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.out = nn.Embedding(5, 4), nn.Linear(4, 5)

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.out(torch.tanh(self.embed(input_ids).cumsum(1)))


def token_scores(method: Any) -> Tensor:
    torch.manual_seed(0)
    train = [{"input_ids": t} for t in texts(9, 0)[0]]
    train[4] = {"input_ids": train[4]["input_ids"][:4]}
    problem = ptif.Problem(Next().double(), ptif.TokenCrossEntropy(shift=True), train, batch_size=1)
    values = method.fit(problem).token_scores([{"input_ids": t} for t in texts(3, 1)[0]], [4, 0, 7])
    return torch.cat([values[i] for i in (4, 0, 7)], 1)


def wrapped(_: int = 0) -> Tensor:
    """As in a training program: the wrapped model, and the loader of each process with its own sampler."""
    (x, y), queries = data()
    model: nn.Module = net()
    several = torch.distributed.is_initialized()
    if several:
        model = nn.parallel.DistributedDataParallel(model)
    sampler = DistributedSampler(TensorDataset(x, y)) if several else None
    loader = DataLoader(TensorDataset(x, y), batch_size=8, sampler=sampler, num_workers=1)
    return ptif.attribute(model, loader, queries, loss=LOSS, method="ekfac").values


def asked_alone() -> Tensor:
    """As under `if rank == 0:` after the block: a process has a part of the Gram matrix, and makes the rest."""
    fitted = ptif.dual().fit(ptif.Problem(net(), LOSS, data()[0]))
    with alone_in_the_block():
        return fitted.score(data()[1]).values


def smallest_removal() -> Tensor:
    """Which examples, and what is predicted without them: each process sees the moves of its own share only."""
    (x, y), queries = data()
    problem = ptif.Problem(net(), LOSS, (x, y))
    outcome = actions.flip_prediction(problem, queries[0][:1], method=ptif.exact(damping=0.05))
    return torch.tensor([outcome.predicted, *outcome.ids], dtype=torch.float64)


def programs() -> dict[str, Callable[[], Any]]:
    table: dict[str, Callable[[], Any]] = {}
    for name, method in METHODS.items():
        table[name] = lambda method=method: ask(method=method).values
    for name in ("auto", "ekfac", "cg"):
        table[f"{name}, top"] = lambda name=name: extremes(ask(method=METHODS[name], top=3))
    for name in OWN:
        table[f"{name}, of itself"] = lambda name=name: own(METHODS[name])
    for units in ALONG:
        along = ptif.Influence(curvature.EKFAC(), units=units)
        table[f"along, {units}"] = lambda a=along: extremes(ask(method=a, checkpoints=checkpoints(), top=3))
    for name, options in {"mean": {"aggregate": "mean"}, "of some": {"ids": [3, 20, 21]}}.items():
        table[f"ekfac, {name}"] = lambda options=options: ask(method=METHODS["ekfac"], **options).values
    for name in ("ekfac", "dual"):
        table[f"{name}, by layer"] = lambda name=name: by_layer(METHODS[name])
    table["source, by layer"] = lambda: by_layer(ptif.source(checkpoints(), lr=0.1, steps=30, segments=3))
    table["along, spread, of itself"] = lambda: own(
        ptif.Influence(curvature.EKFAC(), units="spread"), checkpoints=checkpoints()
    )
    table["along, spread, all"] = lambda: (
        ask(method=ptif.Influence(curvature.EKFAC(), units="spread"), checkpoints=checkpoints()).values
    )
    for name, matrix in {"source": curvature.GGN(), "source by factors": curvature.EKFAC()}.items():
        run = ptif.source(checkpoints(), lr=0.1, steps=30, segments=3, curvature=matrix)
        table[name] = lambda run=run: extremes(ask(method=run, top=3))
    table["source, of itself"] = lambda: own(ptif.source(checkpoints(), lr=0.1, steps=30, segments=3))
    for name in ("ekfac", "dual"):
        table[f"tokens, {name}"] = lambda name=name: token_scores(METHODS[name])
    for name in ("ekfac", "dual"):  # some processes have none
        table[f"two examples, {name}"] = lambda name=name: ask(2, method=METHODS[name]).values
    table["dual, fitted together and asked alone"] = asked_alone
    table["wrapped model and loader"] = wrapped
    table["the smallest removal"] = smallest_removal
    table["labels"] = labels_of_many
    return table


def labels_of_many() -> Tensor:
    """More examples than the look at the loss, which is not shared out, reads; -1 where none is known."""
    x, y = torch.arange(18_000, dtype=torch.float64).reshape(3000, 6).sin(), torch.arange(3000) % 3
    scores = ptif.attribute(net(), (x, y), (x[:1], y[:1]), loss=LOSS, method=ptif.ekfac(examples=20), top=3)
    return torch.tensor([-1 if label is None else label for label in scores.train_labels])


def by_layer(method: Any) -> Tensor:
    return torch.stack([part.values for part in ask(method=method, by="layer").values()])


def extremes(scores: ptif.Scores) -> Tensor:
    assert scores.indices is not None
    return torch.stack([scores.values, scores.indices.double()])


# Four processes: one way of each to share the work (sums of factors, of rows, of products, columns put together,
# extremes merged, parts, tokens, units over all columns), and examples that do not go round.
OF_FOUR = (
    "auto, top",
    "ekfac, top",
    "cg",
    "dual",
    "guided",
    "relatif, solved for each",
    "ekfac, of itself",
    "dual, of itself",
    "dual of the outputs, of itself",
    "dual, fitted together and asked alone",
    "along, spread",
    "source, by layer",
    "tokens, ekfac",
    "two examples, ekfac",
    "two examples, dual",
    "wrapped model and loader",
)
ASKED = {2: [*programs()], 4: chosen(programs(), OF_FOUR)}


def answers(_: int, names: Sequence[str]) -> dict[str, Tensor]:
    torch.manual_seed(3)
    table = programs()
    with ptif.distributed(timeout=900):
        return {name: table[name]() for name in names}


@pytest.fixture(scope="module")
def together(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], list[dict[str, Tensor]]]:
    """What so many processes gave, each number of them started once."""
    return functools.cache(lambda size: run_on(size, answers, tmp_path_factory.mktemp("together"), ASKED[size]))


@pytest.fixture(scope="module")
def alone() -> dict[str, Tensor]:
    return answers(0, ASKED[2])


@pytest.mark.slow
@pytest.mark.parametrize(("size", "name"), [(size, name) for size, names in ASKED.items() for name in names])
def test_every_process_has_what_one_computes_alone(
    together: Callable[[int], list[dict[str, Tensor]]], alone: dict[str, Tensor], size: int, name: str
) -> None:
    for values in together(size):
        torch.testing.assert_close(values[name], alone[name], rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("units", ALONG)
def test_columns_averaged_apart_are_those_averaged_together(units: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each process holds the columns of its share; sums over all columns are put in here by hand."""
    blocks = torch.randn(3, 2, 10, dtype=torch.float64)
    whole = CheckpointAverage(Units.of(units), (0.2, 0.3, 0.5), 2, 10)
    parts = [CheckpointAverage(Units.of(units), (0.2, 0.3, 0.5), 2, 10, World(rank, 3)) for rank in range(3)]
    monkeypatch.setattr(averaging, "spread_of", lambda scores, eps, world: spreads)
    for block in blocks:
        spreads = block.std(1, correction=0)
        for average in (whole, *parts):
            average.add(torch.arange(2), torch.tensor(average.columns), block[:, average.columns])
            average.end_checkpoint()
    assert [len(part.columns) for part in parts] == [3, 3, 4]
    torch.testing.assert_close(torch.cat([part.result() for part in parts], 1), whole.result())


def test_extremes_of_processes_are_merged_with_equal_scores_to_the_smaller_index() -> None:
    values = torch.randint(4, (3, 40)).double()
    whole, parts = TopK(3, 5), [TopK(3, 5) for _ in range(3)]
    whole.add(torch.arange(3), torch.arange(40), values)
    for rank, part in enumerate(parts):
        ids = torch.arange(40)[World(rank, 3).share(40)]
        part.add(torch.arange(3), ids, values[:, ids])
        part._merge()
    merged = TopK(3, 5)
    for part in parts:
        merged.absorb(part._largest.values, part._largest.ids, part._smallest.values, part._smallest.ids)
    for one, other in zip(merged.result(), whole.result(), strict=True):
        assert torch.equal(one, other)
