"""A tiny causal language model with an attention mask, and texts of unequal length that can be padded at will."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

VOCABULARY, PAD = 13, 0
Batch = dict[str, Tensor]


class TinyLM(nn.Module):
    """Two pre-norm blocks of width 8; positions are counted over the tokens that the mask lets through."""

    def __init__(self, tied: bool = False, vocabulary: int = VOCABULARY, width: int = 8, longest: int = 64) -> None:
        super().__init__()
        self.token = nn.Embedding(vocabulary, width)
        self.position = nn.Embedding(longest, width)
        self.blocks = nn.ModuleList(_Block(width) for _ in range(2))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, vocabulary, bias=False)
        if tied:
            self.head.weight = self.token.weight

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        place = (attention_mask.cumsum(1) - 1).clamp_min(0)
        x = self.token(input_ids) + self.position(place)
        t = input_ids.shape[1]
        causal = torch.ones(t, t, dtype=torch.bool, device=input_ids.device).tril()
        # Every position sees itself, so that no row of the softmax is empty.
        seen = causal & (attention_mask[:, None, None, :].bool() | torch.eye(t, dtype=torch.bool))
        for block in self.blocks:
            x = block(x, seen)
        logits: Tensor = self.head(self.norm(x))
        return logits


class _Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x: Tensor, seen: Tensor) -> Tensor:
        n, t, d = x.shape
        q, k, v = self.qkv(self.norm1(x)).reshape(n, t, 3, 2, d // 2).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=seen)
        x = x + self.out(mixed.transpose(1, 2).reshape(n, t, d))
        y: Tensor = x + self.down(F.gelu(self.up(self.norm2(x))))
        return y


def texts(n: int, seed: int = 0, vocabulary: int = VOCABULARY, longest: int = 9) -> list[Tensor]:
    """Token sequences of 3 to `longest` tokens, none of them the padding token."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(3, longest + 1, (n,), generator=generator).tolist()
    return [torch.randint(1, vocabulary, (length,), generator=generator) for length in lengths]


def padding(length: int = 0, left: bool = False, prompt: int = 0) -> Callable[[Sequence[Tensor]], Batch]:
    """A collate function that pads to `length`, or to the longest of the batch, and ignores `prompt` first tokens."""

    def collate(items: Sequence[Tensor]) -> Batch:
        longest = max(length, *(len(x) for x in items))

        def pad(x: Tensor, fill: int) -> Tensor:
            room = (longest - len(x), 0) if left else (0, longest - len(x))
            return F.pad(x, room, value=fill)

        labels = [torch.cat([x.new_full((prompt,), -100), x[prompt:]]) for x in items]
        return {
            "input_ids": torch.stack([pad(x, PAD) for x in items]),
            "attention_mask": torch.stack([pad(torch.ones_like(x), 0) for x in items]),
            "labels": torch.stack([pad(x, -100) for x in labels]),
        }

    return collate


class Texts(torch.utils.data.Dataset[Tensor]):
    """A list of token sequences as a dataset."""

    def __init__(self, items: Sequence[Tensor]) -> None:
        self.items = list(items)

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, i: int) -> Tensor:
        return self.items[i]


def loader(items: Sequence[Tensor], batch_size: int = 4, **options: Any) -> Any:
    """A loader of padded texts; `options` as for `padding`."""
    return torch.utils.data.DataLoader(Texts(items), batch_size=batch_size, collate_fn=padding(**options))
