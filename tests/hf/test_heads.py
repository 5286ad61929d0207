"""Attention heads of models of transformers: each head's own numbers, by the layout that the model's code has."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import pytorch_influence_functions as ptif

transformers = pytest.importorskip("transformers")

SIZES = {"num_hidden_layers": 1, "num_attention_heads": 4, "hidden_size": 16, "intermediate_size": 16, "vocab_size": 30}
SHARED = {**SIZES, "num_key_value_heads": 2, "head_dim": 6}
TOKENS = {"bos_token_id": 0, "eos_token_id": 0}


def split(size: int, head: int) -> slice:
    return slice(size * head, size * head + size)


# By model, for a head: the parameters, and its rows (or columns) of each.
LAYOUTS: dict[str, tuple[str, dict[str, Any], str, dict[str, Any]]] = {
    "queries, keys and values in one weight": (
        "GPT2",
        {"n_layer": 1, "n_head": 4, "n_embd": 16, "n_positions": 16, "vocab_size": 30, **TOKENS},
        "transformer.h.0.attn.head.2",
        {
            "transformer.h.0.attn.c_attn.weight": (..., [16 * t + 8 + j for t in range(3) for j in range(4)]),
            "transformer.h.0.attn.c_attn.bias": ([16 * t + 8 + j for t in range(3) for j in range(4)],),
            "transformer.h.0.attn.c_proj.weight": (split(4, 2),),
        },
    ),
    "the same head by head": (
        "GPTNeoX",
        {**SIZES, **TOKENS},
        "gpt_neox.layers.0.attention.head.1",
        {
            "gpt_neox.layers.0.attention.query_key_value.weight": (split(12, 1),),
            "gpt_neox.layers.0.attention.query_key_value.bias": (split(12, 1),),
            "gpt_neox.layers.0.attention.dense.weight": (..., split(4, 1)),
        },
    ),
    "keys and values shared, a size of its own": (
        "Qwen3",
        SHARED,
        "model.layers.0.self_attn.kv_head.1",
        {
            "model.layers.0.self_attn.k_proj.weight": (split(6, 1),),
            "model.layers.0.self_attn.v_proj.weight": (split(6, 1),),
        },
    ),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_heads_part_is_what_its_own_numbers_give(name: str) -> None:
    kind, sizes, part, pieces = LAYOUTS[name]
    torch.manual_seed(0)
    model = getattr(transformers, f"{kind}{'LMHeadModel' if kind == 'GPT2' else 'ForCausalLM'}")(
        getattr(transformers, f"{kind}Config")(**sizes)
    )
    model = model.double().eval()
    texts = torch.randint(1, 30, (4, 6))
    damping = 1e9  # far above every eigenvalue: what is solved is the gradient, divided by it
    attribution = ptif.ekfac(damping=damping).fit(
        ptif.Problem(model, ptif.TokenCrossEntropy(shift=True), [{"input_ids": text} for text in texts])
    )
    queries = [{"input_ids": text} for text in texts[:2]]
    parts = attribution.score(queries, by="head")
    torch.testing.assert_close(parts.total().values, attribution.score(queries).values, rtol=1e-9, atol=0.0)

    def of(text: Tensor) -> Tensor:
        loss = model(input_ids=text[None], labels=text[None]).loss
        named = {k: p for k, p in model.named_parameters() if k in pieces}
        gradients = dict(zip(named, torch.autograd.grad(loss, list(named.values())), strict=True))
        return torch.cat([gradients[k][at].flatten() for k, at in pieces.items()])

    rows = torch.stack([of(text) for text in texts])
    torch.testing.assert_close(parts[part].values * damping, rows[:2] @ rows.T / 4, rtol=1e-6, atol=1e-12)
