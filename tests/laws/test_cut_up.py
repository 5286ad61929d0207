"""Models that fully_shard has cut up: what one process computes with all of it, and never more than a layer here."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

import pytorch_influence_functions as ptif
from pytorch_influence_functions import curvature, solvers
from pytorch_influence_functions.core.distributed import World
from pytorch_influence_functions.core.errors import InvalidInput
from pytorch_influence_functions.problem.problem import in_step
from tests.laws.several import message_of, run_on

N, Q, LOSS = 29, 3, nn.CrossEntropyLoss()


class Block(nn.Module):
    """Attention behind a normalisation."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.q, self.k = nn.LayerNorm(6), nn.Linear(6, 6), nn.Linear(6, 6, bias=False)
        self.v, self.out = nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        return x + self.out(F.scaled_dot_product_attention(self.q(h), self.k(h), self.v(h)))


class Net(nn.Module):
    """A transformer of two blocks; `tied`: its head is its embedding."""

    def __init__(self, tied: bool = False) -> None:
        super().__init__()
        self.embed, self.blocks = nn.Embedding(7, 6), nn.ModuleList([Block(), Block()])
        self.head = nn.Linear(6, 7, bias=False)
        if tied:
            self.head.weight = self.embed.weight

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        for block in self.blocks:
            x = block(x)
        return self.head(x.mean(1))


class Odd(nn.Module):
    """A layer without a rule."""

    def __init__(self) -> None:
        super().__init__()
        self.scale, self.head = nn.Parameter(torch.ones(5)), nn.Linear(5, 7)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(x.double() * self.scale)


def net(tied: bool = False) -> Any:
    torch.manual_seed(0)
    model = Net(tied).double()
    return cut(model, *model.blocks)


def cut(model: nn.Module, *parts: nn.Module, **settings: Any) -> nn.Module:
    """The model, cut up where there are several processes."""
    if dist.is_initialized():
        for part in (*parts, model):
            fully_shard(part, **settings)
    return model


def data() -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    g = torch.Generator().manual_seed(1)
    x, y = torch.randint(7, (N + Q, 5), generator=g), torch.randint(7, (N + Q,), generator=g)
    return (x[:N], y[:N]), (x[N:], y[N:])


def ask(method: Any = "ekfac", model: nn.Module | None = None, **options: Any) -> ptif.Scores:
    return ptif.attribute(model or net(), *data(), loss=LOSS, method=method, **options)


def checkpoints() -> list[dict[str, Tensor]]:
    torch.manual_seed(0)
    weights, states = Net().double().state_dict(), []
    for _ in range(2):
        states.append({name: w + 0.3 * torch.randn_like(w) for name, w in weights.items()})
    return states


def in_training() -> Tensor:
    """Amid a training loop, which goes on as if nothing had been asked."""
    model, (x, y) = net(), data()[0]
    optimiser = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)

    def step() -> None:
        LOSS(model.train()(x), y).backward()
        optimiser.step()

    step()
    with torch.no_grad():
        model(x)  # the outermost weights stay gathered
    values = ask(model=model).values
    assert model.training and all(p.grad is not None for p in model.parameters())
    optimiser.zero_grad()
    step()
    return torch.cat([values, model(x[:Q]).detach()], 1)


def half_frozen() -> Tensor:
    model = net()
    model.blocks[0].requires_grad_(False)
    values = ask(model=model).values
    assert not model.blocks[0].q.weight.requires_grad and model.head.weight.requires_grad
    return values


def by_layer_and_of_itself() -> Tensor:
    train, queries = data()
    fitted = ptif.ekfac().fit(ptif.Problem(net(), LOSS, train))
    parts = torch.stack([part.values for part in fitted.score(queries, by="layer").values()])
    return torch.cat([parts.flatten(), fitted.self_influence()])


CG = ptif.Influence(curvature.GGN(), solvers.CG(rtol=1e-8), damping=1.0)
PROGRAMS: dict[str, Callable[[], Tensor]] = {
    "chosen by itself": lambda: ask(None).values,
    "ekfac, by layer and of itself": by_layer_and_of_itself,
    "ekfac, some parameters": lambda: ask(parameters=["blocks.1.*", "head"]).values,
    "ekfac, tied": lambda: ask(model=net(tied=True)).values,
    "along the run": lambda: ask(checkpoints=checkpoints()).values,
    "dual": lambda: ask("dual").values,
    "conjugate gradients": lambda: ask(CG).values,
    "in training": in_training,
    "half frozen": half_frozen,
}


def one_at_a_time() -> ptif.Scores:
    (x, y), queries = data()
    return ptif.attribute(net(), (x[:3], y[:3]), queries, loss=LOSS, method="ekfac", batch_size=1)


REFUSED: dict[str, tuple[Callable[[], Any], str]] = {
    "hessian": (
        lambda: ask(ptif.Influence(curvature.Hessian(), solvers.CG(), damping=1.0)),
        "Hessian() needs second derivatives, which a model that fully_shard has cut up does not give",
    ),
    "of itself by cg": (
        lambda: CG.fit(ptif.Problem(net(), LOSS, data()[0])).self_influence(),
        "The model is cut up over 2 processes by fully_shard, each pass needs all of them, and here each would make a",
    ),
    "one at a time": (one_at_a_time, "A process has 1 of the examples and another 2 batches"),
    "no rule": (lambda: ask(model=cut(Odd().double())), "Gradients of 'scale' cannot be taken in a model that"),
    "loop": (lambda: ask(route="loop"), "Gradients of 'embed.weight' cannot be taken in a model that fully_shard has"),
    "narrow copy": (
        lambda: ask(precision="bf16"),
        "precision='bf16' works on a copy of the model, and this one is",
    ),
    "function of the weights": (
        lambda: ptif.attribute(
            net(), data()[0], ptif.objectives.FromModel(lambda m: m.head.weight.sum()), loss=LOSS, method="ekfac"
        ),
        "FromModel is differentiated in all weights at once, of which fully_shard leaves each process a part",
    ),
    "tokens": (
        lambda: (
            ptif.ekfac()
            .fit(ptif.Problem(net_of_texts(), ptif.TokenCrossEntropy(shift=True), texts(), batch_size=4))
            .token_scores(texts()[:1], [0])
        ),
        "Tokens cannot be told apart in a model that fully_shard has cut up",
    ),
    "index": (
        lambda: ptif.Index.build(ptif.Problem(net(), LOSS, data()[0]), os.devnull),
        "The model is cut up by fully_shard, whose passes all processes make together, and in an index each writes",
    ),
}


def texts() -> list[dict[str, Tensor]]:
    return [{"input_ids": x} for x in data()[0][0]]


def net_of_texts() -> nn.Module:
    class Next(Net):
        def forward(self, input_ids: Tensor) -> Tensor:
            return self.head(self.blocks[1](self.blocks[0](self.embed(input_ids))))

    torch.manual_seed(0)
    return cut(Next().double())


def gathered_at_most() -> tuple[int, int]:
    """The most weights that were whole at any call of a layer, and those of the largest block and outside of blocks."""
    model, most = net(), 0

    def look(*_: Any) -> None:
        nonlocal most
        most = max(most, sum(p.numel() for p in model.parameters() if not hasattr(p, "full_tensor")))

    for layer in (model.embed, model.head, model.blocks[0].q, model.blocks[1].out):
        layer.register_forward_hook(look)
    ask(model=model)
    assert all(hasattr(p, "full_tensor") for p in model.parameters())
    outside = model.embed.weight.numel() + model.head.weight.numel()
    return most, sum(p.numel() for p in model.blocks[0].parameters()) + outside


def one_has_a_nan() -> Tensor:
    """In the loss of its own examples, which the other meets in its next pass."""
    model, (x, y) = net(), data()[0]

    def spoil(_: Any, __: Any, outputs: Tensor) -> Tensor:
        # Example 3 is of the first process only, and none of those that all look at.
        return outputs * torch.where(torch.arange(len(outputs)) == 3, torch.nan, 1.0)[:, None]

    fitted = ptif.ekfac().fit(ptif.Problem(model, LOSS, (x, y)))
    if dist.get_rank() == 0:
        model.register_forward_hook(spoil)
    return fitted.self_influence()


def half_precision() -> Tensor:
    torch.manual_seed(0)
    model = Net()
    cut(model, *model.blocks, mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16))
    return ask(model=model).values


def everything(_: int) -> dict[str, Any]:
    told: dict[str, Any] = {"not all asked": message_of(lambda: ask())}
    with ptif.distributed(timeout=900):
        told |= {name: program() for name, program in PROGRAMS.items()}
        told |= {name: message_of(program) for name, (program, _) in REFUSED.items()}
        told["gathered"], told["half precision"] = gathered_at_most(), half_precision()
        told["nan"] = message_of(one_has_a_nan)
    return told


@pytest.fixture(scope="module")
def together(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return run_on(2, everything, tmp_path_factory.mktemp("cut_up"))


@pytest.mark.slow
@pytest.mark.parametrize("name", PROGRAMS)
def test_a_model_that_is_cut_up_gives_what_one_process_computes(together: list[dict[str, Any]], name: str) -> None:
    expected = PROGRAMS[name]()
    for told in together:
        torch.testing.assert_close(told[name], expected, rtol=1e-6, atol=1e-9)


@pytest.mark.slow
@pytest.mark.parametrize("name", REFUSED)
def test_what_needs_all_weights_at_once_is_refused(together: list[dict[str, Any]], name: str) -> None:
    for told in together:
        assert told[name].startswith(f"InvalidInput: {REFUSED[name][1]}")


@pytest.mark.slow
def test_no_more_than_one_part_is_gathered_beside_the_outermost(together: list[dict[str, Any]]) -> None:
    for told in together:
        most, allowed = told["gathered"]
        assert 0 < most <= allowed


@pytest.mark.slow
def test_a_precision_of_the_passes_is_borne(together: list[dict[str, Any]]) -> None:
    torch.manual_seed(0)
    expected = ask(model=Net()).values.flatten()
    for told in together:
        assert float(torch.corrcoef(torch.stack([told["half precision"].flatten(), expected]))[0, 1]) > 0.98


@pytest.mark.slow
def test_processes_that_compute_alone_are_told_and_do_not_hang(together: list[dict[str, Any]]) -> None:
    for told in together:
        assert told["not all asked"].startswith(
            "InvalidInput: The model is cut up over 2 processes by fully_shard, each pass needs all of them, and 1 "
            "computes here; make the same call on every process with distributed=True"
        )


@pytest.mark.slow
def test_a_failure_amid_a_pass_ends_all(together: list[dict[str, Any]]) -> None:
    first, second = (told["nan"] for told in together)
    assert first.startswith("NonFinite: The loss is NaN or infinite at dataset indices 3;")
    assert second.startswith("ProcessFailed: Process 0 of 2 failed, and all stop with it: NonFinite: The loss is NaN")


def test_shares_are_cut_into_as_many_batches_on_every_process(monkeypatch: pytest.MonkeyPatch) -> None:
    plan = [torch.arange(0, 4), torch.arange(4, 7)]
    assert in_step(plan, World()) is plan
    for other, expected in (((3, 7), [[0, 1, 2], [3, 4], [5, 6]]), ((2, 6), [[0, 1, 2, 3], [4, 5, 6]])):
        theirs = iter((torch.tensor([other[0]]), torch.tensor([-other[1]])))
        monkeypatch.setattr(World, "all_max", lambda _, own: torch.maximum(own, next(theirs)))  # noqa: B023
        assert [part.tolist() for part in in_step(plan, World(0, 2))] == expected
    theirs = iter((torch.tensor([2]), torch.tensor([0])))
    with pytest.raises(InvalidInput, match=r"^A process has 0 of the examples and another 2 batches, .* each of the 2"):
        in_step(plan, World(0, 2))
