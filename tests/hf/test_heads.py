"""Attention heads of models of transformers: each head's own numbers, by the layout that the model's code has."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import pytorch_influence_functions as ptif
from pytorch_influence_functions.influence.heads import heads_of

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


ZEROED = {
    "Llama": ("ForCausalLM", {**SIZES, "num_key_value_heads": 4}, "model.layers.0.self_attn", "o_proj"),
    "GPTNeoX": ("ForCausalLM", {**SIZES, **TOKENS}, "gpt_neox.layers.0.attention", "dense"),
    "Bloom": ("ForCausalLM", {"hidden_size": 16, "n_head": 4, "n_layer": 1, "vocab_size": 30, **TOKENS},
              "transformer.h.0.self_attention", "dense"),
    "GPT2": ("LMHeadModel", LAYOUTS["queries, keys and values in one weight"][1], "transformer.h.0.attn", "c_proj"),
    "Bert": ("ForMaskedLM", SIZES, "bert.encoder.layer.0.attention.self", "../output.dense"),
}  # fmt: skip


@pytest.mark.parametrize("kind", ZEROED)
def test_a_head_whose_outputs_are_cut_off_has_no_gradient_of_queries_keys_and_values(kind: str) -> None:
    """What the model's own code says: the rows that fall silent are those that are called the head's."""
    suffix, sizes, attention, output = ZEROED[kind]
    torch.manual_seed(0)
    model = getattr(transformers, f"{kind}{suffix}")(getattr(transformers, f"{kind}Config")(**sizes)).double().eval()
    layer = model.get_submodule(f"{attention}/{output}".replace("self/../", "").replace("/", "."))
    head = 2
    with torch.no_grad():
        (layer.weight if kind != "GPT2" else layer.weight.T)[:, 4 * head : 4 * head + 4] = 0.0
    texts = torch.randint(1, 30, (3, 6))
    model(input_ids=texts, labels=texts).loss.backward()
    space = ptif.Problem(model, ptif.TokenCrossEntropy(shift=True), [{"input_ids": texts[0]}]).space
    rows = space.from_parameters({k: p.grad[None] for k, p in model.named_parameters() if k in space.names})
    heads = heads_of(model, space)
    sizes_of = {}
    for name, cuts in heads.items():
        outputs = [c for c in cuts if c.axis == 0]
        assert outputs and len(cuts) == len(outputs) + 1
        norms = [float(rows.blocks[c.block].project(slice(c.start, c.stop), None).dense().norm()) for c in outputs]
        sizes_of[name] = max(norms)
    silent = [name for name, size in sizes_of.items() if size < 1e-12]
    assert silent == [f"{attention}.head.{head}"] and len(heads) == 4


@pytest.mark.filterwarnings("ignore")
def test_an_adapters_side_is_divided_like_its_layer_and_unknown_attention_is_refused() -> None:
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES, num_key_value_heads=2))
    texts = [{"input_ids": text} for text in torch.randint(1, 30, (4, 6))]
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj", "o_proj"], init_lora_weights=False)
    adapted = peft.get_peft_model(model, config)
    attribution = ptif.ekfac(damping=0.1).fit(ptif.Problem(adapted, ptif.TokenCrossEntropy(shift=True), texts))
    parts = attribution.score(texts[:2], by="head")
    heads = [name for name in parts if ".head." in name or ".kv_head." in name]
    assert len(heads) == 6 and any(name.endswith("q_proj.lora_A.default") for name in parts)
    torch.testing.assert_close(parts.total().values, attribution.score(texts[:2]).values, rtol=1e-4, atol=1e-7)
    xlnet = transformers.XLNetLMHeadModel(transformers.XLNetConfig(vocab_size=30, d_model=16, n_layer=1, n_head=4))
    conv = transformers.ConvBertForMaskedLM(transformers.ConvBertConfig(**SIZES, embedding_size=16))
    for other in (xlnet, conv):
        space = ptif.Problem(other, ptif.TokenCrossEntropy(), [{**texts[0], "labels": texts[0]["input_ids"]}]).space
        try:
            assert not heads_of(other, space)  # no linear layer that is known
        except ptif.InfluenceError as refusal:
            assert "does not know how" in str(refusal)
