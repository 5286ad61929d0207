"""Families of models of transformers at tiny size: scores are those of autograd on the model's own loss, alone.

Each case is a row of the table in docs/language-models.md.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import pytorch_influence_functions as ptif
from pytorch_influence_functions.problem.data import Source
from tests.hf.tiny import VOCABULARY, build, gpt2, gradient, llama, own_loss, products, settings, texts, tokenizer

transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.filterwarnings("ignore")


@dataclass(frozen=True)
class Case:
    """A model, its problem and queries, and the model's own loss of each training example and query, taken alone."""

    model: nn.Module
    problem: Any
    queries: Any
    training: list[Callable[[], Tensor]]
    asked: list[Callable[[], Tensor]]


def causal(model: Any) -> Case:
    words = tokenizer()
    training, asked = texts(5), texts(2, seed=1)
    losses = [[lambda t=t: own_loss(model, words(t)["input_ids"]) for t in part] for part in (training, asked)]
    return Case(model, ptif.hf.problem(model, words, training), asked, *losses)


def gpt_neox() -> Case:
    return causal(build("GPTNeoXForCausalLM", transformers.GPTNeoXConfig(**settings(rotary_pct=0.5))))


def qwen3() -> Case:
    sizes = settings(num_key_value_heads=1, head_dim=8)
    return causal(build("Qwen3ForCausalLM", transformers.Qwen3Config(**sizes)))


def gemma2() -> Case:
    sizes = settings(num_key_value_heads=1, head_dim=8, sliding_window=16, query_pre_attn_scalar=8)
    config = transformers.Gemma2Config(**sizes, final_logit_softcapping=3.0, attn_logit_softcapping=5.0)
    return causal(build("Gemma2ForCausalLM", config, attn_implementation="eager"))


def mixtral() -> Case:
    sizes = settings(num_key_value_heads=1, num_local_experts=3, num_experts_per_tok=2)
    config = transformers.MixtralConfig(**sizes)
    # Its fast kernels for experts, new in version 5, do not know float64.
    slow = {} if transformers.__version__.startswith("4.") else {"experts_implementation": "eager"}
    return causal(build("MixtralForCausalLM", config, **slow))


def mamba() -> Case:
    sizes = {"vocab_size": VOCABULARY, "hidden_size": 8, "state_size": 4, "num_hidden_layers": 2, "time_step_rank": 2}
    return causal(build("MambaForCausalLM", transformers.MambaConfig(**sizes, pad_token_id=0)))


def t5() -> Case:
    sizes = {"vocab_size": VOCABULARY, "d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 2, "num_heads": 2}
    config = transformers.T5Config(**sizes, decoder_start_token_id=0, pad_token_id=0, feed_forward_proj="gated-gelu")
    model, words = build("T5ForConditionalGeneration", config), tokenizer()
    rows = [{"read": a, "write": b} for a, b in zip(texts(5), texts(5, seed=2), strict=True)]

    def loss(row: dict[str, str]) -> Tensor:
        # What it writes ends with the token that ends a text.
        ends = {"read": [], "write": [1]}
        ids = {key: torch.tensor([words(text)["input_ids"] + ends[key]]) for key, text in row.items()}
        mean: Tensor = model(input_ids=ids["read"], labels=ids["write"]).loss
        return mean * ids["write"].numel()

    problem = ptif.hf.problem(model, words, rows, prompt_column="read", completion_column="write")
    asked = [{"prompt": row["read"], "completion": row["write"]} for row in rows[:2]]
    losses = [lambda row=row: loss(row) for row in rows]
    return Case(model, problem, asked, losses, losses[:2])


def _with_labels(model: Any, items: list[dict[str, Any]], collate: Any = None) -> Case:
    """Examples with labels; the model's own loss, which is a mean over the example's outputs."""
    data = Source(items, collate) if collate is not None else items
    objective = ptif.CrossEntropy()
    losses = [lambda item=item: model(**{k: torch.as_tensor(v)[None] for k, v in item.items()}).loss for item in items]
    return Case(model, ptif.Problem(model, objective, data), data, losses, losses)


def _padded(items: list[dict[str, Any]]) -> dict[str, Tensor]:
    longest = max(len(item["input_ids"]) for item in items)
    keys = [key for key in items[0] if key != "labels"]
    rows = {k: torch.tensor([item[k] + [0] * (longest - len(item[k])) for item in items]) for k in keys}
    return rows | {"labels": torch.tensor([item["labels"] for item in items])}


def bert() -> Case:
    """Pairs of sentences with a class."""
    model = build("BertForSequenceClassification", transformers.BertConfig(**settings(num_labels=3)))
    items = []
    for i, (a, b) in enumerate(zip(texts(5), texts(5, seed=3), strict=True)):
        first, second = (tokenizer()(text)["input_ids"] for text in (a, b))
        ids = [*first, 1, *second]
        kinds = [0] * (len(first) + 1) + [1] * len(second)
        items.append({"input_ids": ids, "attention_mask": [1] * len(ids), "token_type_ids": kinds, "labels": i % 3})
    return _with_labels(model, items, _padded)


def masked_bert() -> Case:
    """Fill in the blanks: labels at masked tokens only."""
    model = build("BertForMaskedLM", transformers.BertConfig(**settings()))
    words = tokenizer()
    rows = []
    for text in texts(5):
        ids = words(text)["input_ids"]
        blanked = [3 if place % 3 == 1 else token for place, token in enumerate(ids)]
        rows.append({"input_ids": blanked, "labels": [t if p % 3 == 1 else -100 for p, t in enumerate(ids)]})

    def loss(row: dict[str, list[int]]) -> Tensor:
        inputs = {key: torch.tensor([values]) for key, values in row.items()}
        mean: Tensor = model(**inputs).loss
        return mean * (inputs["labels"] != -100).sum()

    losses = [lambda row=row: loss(row) for row in rows]
    problem = ptif.hf.problem(model, words, rows)
    return Case(model, problem, rows[:2], losses, losses[:2])


def vit() -> Case:
    sizes = {k: v for k, v in settings().items() if k in ("hidden_size", "intermediate_size", "num_hidden_layers")}
    config = transformers.ViTConfig(**sizes, num_attention_heads=2, image_size=8, patch_size=4, num_labels=3)
    model = build("ViTForImageClassification", config)
    pixels = torch.randn(5, 3, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    return _with_labels(model, [{"pixel_values": x, "labels": torch.tensor(i % 3)} for i, x in enumerate(pixels)])


def clip() -> Case:
    """Two towers, trained on the similarity of pairs: a loss over a batch has none per example."""
    if transformers.__version__.startswith("4."):
        pytest.skip("CLIP's mask cannot be made in float64 there")
    tower = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = transformers.CLIPTextConfig(**tower, vocab_size=VOCABULARY, max_position_embeddings=16, eos_token_id=1)
    image = transformers.CLIPVisionConfig(**tower, image_size=8, patch_size=4)
    config = transformers.CLIPConfig(text_config=text.to_dict(), vision_config=image.to_dict(), projection_dim=8)
    inside = build("CLIPModel", config)

    class Towers(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.clip = inside

        def forward(self, input_ids: Tensor, pixel_values: Tensor) -> tuple[Tensor, Tensor]:
            out = self.clip(input_ids=input_ids, pixel_values=pixel_values)
            return out.text_embeds, out.image_embeds

    model = Towers()
    generator = torch.Generator().manual_seed(0)
    items = [
        {
            "input_ids": torch.tensor([5, 6 + i, 7 + 2 * i, 1]),
            "pixel_values": torch.randn(3, 8, 8, dtype=torch.float64, generator=generator),
            "labels": torch.tensor(float(i % 2) * 2 - 1, dtype=torch.float64),
        }
        for i in range(5)
    ]

    def pair_loss(embeddings: tuple[Tensor, Tensor], match: Tensor) -> Tensor:
        words, pictures = embeddings
        return nn.functional.softplus(-match * (words * pictures).sum(-1)).mean()

    def alone(item: dict[str, Tensor]) -> Tensor:
        return pair_loss(model(item["input_ids"][None], item["pixel_values"][None]), item["labels"][None])

    losses = [lambda item=item: alone(item) for item in items]
    return Case(model, ptif.Problem(model, pair_loss, items), items, losses, losses)


def whisper() -> Case:
    sizes = {"d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 24, "decoder_ffn_dim": 24}
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "num_mel_bins": 4}
    special = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 1, "decoder_start_token_id": 2}
    config = transformers.WhisperConfig(
        vocab_size=VOCABULARY, max_source_positions=6, max_target_positions=16, **sizes, **heads, **special
    )
    model = build("WhisperForConditionalGeneration", config)
    generator = torch.Generator().manual_seed(0)
    items = [
        {
            "input_features": torch.randn(4, 12, dtype=torch.float64, generator=generator),
            "labels": torch.randint(3, VOCABULARY, (2 + i,), generator=generator),
        }
        for i in range(4)
    ]

    def collate(rows: list[dict[str, Tensor]]) -> dict[str, Tensor]:
        labels = nn.utils.rnn.pad_sequence([r["labels"] for r in rows], batch_first=True, padding_value=-100)
        from pytorch_influence_functions.hf.padding import shift_of

        sounds = torch.stack([r["input_features"] for r in rows])
        return {"input_features": sounds, "decoder_input_ids": shift_of(model)(labels), "labels": labels}

    def loss(item: dict[str, Tensor]) -> Tensor:
        mean: Tensor = model(**{k: v[None] for k, v in item.items()}).loss
        return mean * len(item["labels"])

    data = Source(items, collate)
    losses = [lambda item=item: loss(item) for item in items]
    return Case(model, ptif.Problem(model, ptif.TokenCrossEntropy(average=False), data), data, losses, losses)


CASES = {
    "Llama": lambda: causal(llama()),
    "Llama, tied": lambda: causal(llama(tie_word_embeddings=True)),
    "GPT-2": lambda: causal(gpt2()),
    "GPT-NeoX": gpt_neox,
    "Qwen3": qwen3,
    "Gemma 2": gemma2,
    "Mixtral": mixtral,
    "Mamba": mamba,
    "T5": t5,
    "BERT, pairs": bert,
    "BERT, blanks": masked_bert,
    "ViT": vit,
    "CLIP": clip,
    "Whisper": whisper,
}


@pytest.mark.parametrize("name", CASES)
def test_scores_are_autograds(name: str) -> None:
    case = CASES[name]()
    scores = ptif.attribute(case.problem, queries=case.queries, method="grad_dot")
    training = [gradient(case.model, loss()) for loss in case.training]
    asked = [gradient(case.model, loss()) for loss in case.asked]
    expected = products(case.model, asked, training)
    gap = (scores.values.double() - expected).abs().max() / expected.abs().max()
    assert gap < 2e-6, f"{name}: {gap:.2g}"
    trainable = sum(p.numel() for p in case.model.parameters() if p.requires_grad)
    assert scores.diagnostics.parameters_used == case.problem.space.size == trainable
