"""Tiny models of transformers with random weights in float64, and a tokenizer of words, made without a network."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

VOCABULARY = 41
WORDS = (
    "the cat sat on a mat and dog ran to sea while moon rose over old house who wrote this book in year one two three"
)
CHAT = (
    "{% for m in messages %}{{ '<' + m['role'] + '> ' }}{{ m['content'] + ' <eos> ' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<assistant> ' }}{% endif %}"
)
MARKED_CHAT = (
    "{% for m in messages %}{{ '<' + m['role'] + '> ' }}{% if m['role'] == 'assistant' %}{% generation %}"
    "{{ m['content'] + ' <eos> ' }}{% endgeneration %}{% else %}{{ m['content'] + ' <eos> ' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<assistant> ' }}{% endif %}"
)


def tokenizer(chat: str | None = CHAT, **options: Any) -> Any:
    transformers, tokenizers = pytest.importorskip("transformers"), pytest.importorskip("tokenizers")
    special = ["<pad>", "<eos>", "<unk>", "<user>", "<assistant>", "<system>"]
    vocabulary = {word: i for i, word in enumerate([*special, *dict.fromkeys(WORDS.split())])}
    assert len(vocabulary) < VOCABULARY
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="<unk>"))
    words.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    options = {"model_input_names": ["input_ids", "attention_mask"]} | options  # version 4 adds kinds of tokens
    made = transformers.PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>", **options
    )
    made.chat_template = chat
    return made


def settings(**options: Any) -> dict[str, Any]:
    """Sizes by the names that most configurations have."""
    return {
        "vocab_size": VOCABULARY,
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "max_position_embeddings": 64,
        "pad_token_id": 0,
        "eos_token_id": 1,
        "bos_token_id": None,
    } | options


def build(kind: str, config: Any, seed: int = 0, dtype: torch.dtype = torch.float64, **options: Any) -> Any:
    """A model of a class of transformers, its weights random, not only its biases zero and its norms one."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(seed)
    model: nn.Module = getattr(transformers, kind)._from_config(config, **options)
    model = model.to(dtype)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.3 * torch.randn(p.shape, dtype=torch.float64).to(p))
    return model.eval()


def llama(**options: Any) -> Any:
    transformers = pytest.importorskip("transformers")
    keys = ("attn_implementation", "dtype", "seed")
    outer = {k: options.pop(k) for k in keys if k in options}
    return build("LlamaForCausalLM", transformers.LlamaConfig(**settings(num_key_value_heads=1, **options)), **outer)


def gpt2(**options: Any) -> Any:
    transformers = pytest.importorskip("transformers")
    sizes = {"vocab_size": VOCABULARY, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 64}
    outer = {k: options.pop(k) for k in ("attn_implementation", "dtype", "seed") if k in options}
    config = transformers.GPT2Config(**sizes, bos_token_id=1, eos_token_id=1, **options)
    return build("GPT2LMHeadModel", config, **outer)


def texts(n: int = 6, seed: int = 0) -> list[str]:
    """Texts of 3 to 11 words, no two of the same length beside each other."""
    generator = torch.Generator().manual_seed(seed)
    lengths = [3 + (5 * i) % 9 for i in range(n)]
    words = WORDS.split()
    return [
        " ".join(words[int(j)] for j in torch.randint(0, len(words), (length,), generator=generator))
        for length in lengths
    ]


def gradient(model: nn.Module, loss: Tensor, names: list[str] | None = None) -> Tensor:
    """One flat gradient of everything trainable, by autograd."""
    chosen = [p for n, p in model.named_parameters() if p.requires_grad and (names is None or n in names)]
    parts = torch.autograd.grad(loss, chosen, allow_unused=True)
    return torch.cat(
        [torch.zeros_like(p).flatten() if g is None else g.flatten() for p, g in zip(chosen, parts, strict=True)]
    )


def own_loss(model: nn.Module, ids: list[int], labels: list[int] | None = None) -> Tensor:
    """-log p of a text alone, as the model itself computes it: its mean over predicted tokens, times their number."""
    text = torch.tensor([ids])
    taught = text if labels is None else torch.tensor([labels])
    count = int((taught[:, 1:] != -100).sum())
    loss: Tensor = model(input_ids=text, labels=taught).loss
    return loss * count


def products(model: nn.Module, queries: list[Tensor], training: list[Tensor]) -> Tensor:
    """(1/N) <query gradient, training gradient>: gradient dot products [Q, N]."""
    return torch.stack(queries) @ torch.stack(training).T / len(training)
