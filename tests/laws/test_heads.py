"""Scores by attention head: against inner products over each head's own numbers, picked here by hand."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import pytorch_influence_functions as ptif
from pytorch_influence_functions.core.errors import InvalidInput
from pytorch_influence_functions.curvature import EmpiricalFisher
from pytorch_influence_functions.methods.papers import dual, ekfac, exact
from pytorch_influence_functions.solvers import Spectral

WIDTH, HEADS, SHARED, SIZE, DAMPING = 8, 4, 2, 2, 0.1


class Grouped(nn.Module):
    """Attention whose keys and values are shared by two heads each."""

    def __init__(self) -> None:
        super().__init__()
        self.num_heads, self.head_dim = HEADS, SIZE
        self.q_proj, self.k_proj = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, SHARED * SIZE, bias=False)
        self.v_proj, self.o_proj = nn.Linear(WIDTH, SHARED * SIZE), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        n, length, _ = x.shape
        q = self.q_proj(x).view(n, length, HEADS, SIZE).transpose(1, 2)
        k, v = (p(x).view(n, length, SHARED, SIZE).transpose(1, 2) for p in (self.k_proj, self.v_proj))
        k, v = (t.repeat_interleave(HEADS // SHARED, 1) for t in (k, v))
        mixed = ((q @ k.mT) / SIZE**0.5).softmax(-1) @ v
        return self.o_proj(mixed.transpose(1, 2).reshape(n, length, WIDTH))


class Net(nn.Module):
    def __init__(self, attention: nn.Module) -> None:
        super().__init__()
        self.attention, self.out = attention, nn.Linear(WIDTH, 3)

    def forward(self, x: Tensor) -> Tensor:
        mixed = self.attention(x) if isinstance(self.attention, Grouped) else self.attention(x, x, x)[0]
        return self.out(x + mixed).mean(1)


def grouped_heads() -> dict[str, dict[str, Any]]:
    """By part, the parameters and the rows or columns of each."""
    table: dict[str, dict[str, Any]] = {}
    for h in range(HEADS):
        own = slice(SIZE * h, SIZE * h + SIZE)
        table[f"attention.head.{h}"] = {
            "attention.q_proj.weight": (own,),
            "attention.q_proj.bias": (own,),
            "attention.o_proj.weight": (slice(None), own),
        }
    for h in range(SHARED):
        own = slice(SIZE * h, SIZE * h + SIZE)
        names = ("k_proj.weight", "v_proj.weight", "v_proj.bias")
        table[f"attention.kv_head.{h}"] = {f"attention.{name}": (own,) for name in names}
    return table | {"attention.o_proj": {"attention.o_proj.bias": ()}, "out": {"out.weight": (), "out.bias": ()}}


def torch_heads() -> dict[str, dict[str, Any]]:
    table: dict[str, dict[str, Any]] = {}
    for h in range(HEADS):
        own = [WIDTH * third + SIZE * h + j for third in range(3) for j in range(SIZE)]
        table[f"attention.head.{h}"] = {
            "attention.in_proj_weight": (own,),
            "attention.in_proj_bias": (own,),
            "attention.out_proj.weight": (slice(None), slice(SIZE * h, SIZE * h + SIZE)),
        }
    return table | {"attention.out_proj": {"attention.out_proj.bias": ()}, "out": {"out.weight": (), "out.bias": ()}}


MODELS = {
    "keys and values shared": (Grouped, grouped_heads),
    "torch's own": (lambda: nn.MultiheadAttention(WIDTH, HEADS, batch_first=True), torch_heads),
}


# Each beside one whose solved queries are written out.
PAIRS = [
    (exact(damping=DAMPING), exact(damping=DAMPING)),
    (dual(damping=DAMPING), ptif.Influence(EmpiricalFisher(), Spectral(), DAMPING)),
]


def setting(name: str) -> tuple[Net, Tensor, Tensor, dict[str, dict[str, Any]]]:
    torch.manual_seed(0)
    attention, heads = MODELS[name]
    model = Net(attention()).double()
    for p in model.parameters():
        nn.init.normal_(p, std=0.5)
    return model, torch.randn(14, 5, WIDTH).double(), torch.arange(14) % 3, heads()


def gradients(model: Net, x: Tensor, y: Tensor) -> list[dict[str, Tensor]]:
    named = dict(model.named_parameters())
    rows = []
    for i in range(len(x)):
        loss = nn.functional.cross_entropy(model(x[i : i + 1]), y[i : i + 1])
        rows.append(dict(zip(named, torch.autograd.grad(loss, list(named.values())), strict=True)))
    return rows


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize(("method", "dense"), PAIRS)
def test_a_head_is_the_inner_product_over_its_rows_and_columns(name: str, method: Any, dense: Any) -> None:
    model, x, y, heads = setting(name)
    attribution = method.fit(ptif.Problem(model, nn.CrossEntropyLoss(), (x, y)))
    parts = attribution.score((x[:3], y[:3]), by="head")
    assert set(parts) == set(heads)
    train = gradients(model, x, y)
    whole = attribution.score((x[:3], y[:3])).values
    torch.testing.assert_close(parts.total().values, whole, rtol=1e-8, atol=1e-12)
    member = dense.fit(ptif.Problem(model, nn.CrossEntropyLoss(), (x, y))).members[0]
    (queries,) = member.derivatives.stream(ptif.Problem(model, nn.CrossEntropyLoss(), (x[:3], y[:3])).data)
    solved = member.derivatives.space.to_parameters(member.solve(queries.rows).unwrap())
    for part, pieces in heads.items():
        expected = torch.stack(
            [
                sum(
                    (solved[k][(slice(None), *at)] * row[k][at or ...]).flatten(1).sum(1) for k, at in pieces.items()
                )
                for row in train
            ],
            1,
        )  # fmt: skip
        torch.testing.assert_close(parts[part].values, expected / len(x), rtol=1e-7, atol=1e-12)
    assert len({round(float(p.values.norm()), 12) for p in parts.values()}) == len(parts)


def test_a_decay_that_every_example_carries_is_divided_among_the_heads() -> None:
    model, x, y, _ = setting("keys and values shared")
    problem = ptif.Problem(model, nn.CrossEntropyLoss(), (x, y), weight_decay=ptif.WeightDecay(0.05, per_example=True))
    attribution = exact(damping=DAMPING).fit(problem)
    whole = attribution.score((x[:2], y[:2])).values
    torch.testing.assert_close(attribution.score((x[:2], y[:2]), by="head").total().values, whole)


def test_what_has_no_heads_and_an_index_are_refused(tmp_path: Any) -> None:
    plain = nn.Linear(3, 2)
    data = (torch.randn(6, 3), torch.arange(6) % 2)
    with pytest.raises(InvalidInput, match=r"^by='head' found no attention"):
        ekfac().fit(ptif.Problem(plain, nn.CrossEntropyLoss(), data)).score(data, by="head")
    model, x, y, _ = setting("keys and values shared")
    index = ptif.Index.build(ptif.Problem(model, nn.CrossEntropyLoss(), (x, y)), tmp_path / "index")
    with pytest.raises(InvalidInput, match=r"^by='head' divides layers"):
        index.score((x[:1], y[:1]), by="head")
