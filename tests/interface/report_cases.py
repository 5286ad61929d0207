"""Scores with data of every kind, for reports, and a reader of what a page holds."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pytorch_influence_functions.core.token_text import TokenText
from pytorch_influence_functions.problem.data import Source
from pytorch_influence_functions.scores.diagnostics import Diagnostics
from pytorch_influence_functions.scores.scores import Scores

ATTACK = "</script><script>window.broken=1</script><img src=x onerror='window.broken=2'>\u2028 & \u202e \ud800"
CLASSES = ["cat", "dog", "<b>owl</b>"]
DIAGNOSTICS = Diagnostics(
    method="exact()", damping=0.01, residual_max=0.5, residual_mean=0.1, steps=7, n_train=40, n_queries=6, seconds=1.5,
    parameters_used=10, parameters_total=10, deterministic="yes", relative_gradient=0.08,
)  # fmt: skip


def values(queries: int = 6, n: int = 40) -> Tensor:
    return torch.randn(queries, n, generator=torch.Generator().manual_seed(0)) * 1e-3


def pictures(queries: int = 6, n: int = 40, shape: tuple[int, ...] = (1, 8, 8), **options: Any) -> Scores:
    g = torch.Generator().manual_seed(1)
    x, y = torch.rand(n, *shape, generator=g), torch.arange(n) % 3
    given: dict[str, Any] = {"train_labels": y, "query_labels": y[:queries], "class_names": CLASSES,
                             "train_source": (x, y), "query_source": (x[:queries].clone(), y[:queries]),
                             "diagnostics": DIAGNOSTICS}  # fmt: skip
    return Scores(values(queries, n), **(given | options))


def texts(text: str, queries: int = 6, n: int = 40) -> Scores:
    data = [(f"{i} {text}", i % 3) for i in range(n)]
    return pictures(queries, n, train_source=data, query_source=data[:queries])


def tables(queries: int = 6, n: int = 40, columns: int = 7) -> Scores:
    g = torch.Generator().manual_seed(2)
    x, y = torch.randn(n, columns, generator=g), torch.arange(n) % 3
    return pictures(queries, n, train_source=(x, y), query_source=(x[:queries], y[:queries]))


def probabilities(queries: int = 6) -> Tensor:
    return torch.softmax(torch.randn(queries, 3, generator=torch.Generator().manual_seed(3)) * 2, 1)


class _Blocks(HTMLParser):
    """The tags of a page as a browser sees them, and the texts of its script elements by id."""

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.scripts: dict[str, str] = {}
        self.words: list[str] = []
        self._open = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag in ("script", "style"):
            self._open = dict(attrs).get("id") or tag
            self.scripts[self._open] = ""

    def handle_endtag(self, tag: str) -> None:
        if tag in ("script", "style"):
            self._open = ""

    def handle_data(self, data: str) -> None:
        if self._open:
            self.scripts[self._open] += data
        else:
            self.words.append(data)


class Page:
    """A written report, read back."""

    def __init__(self, path: Path) -> None:
        self.text = path.read_text(encoding="utf-8")
        parser = _Blocks()
        parser.feed(self.text)
        self.tags, self.scripts, self.words = parser.tags, parser.scripts, " ".join(" ".join(parser.words).split())
        self.blocks = {n[5:]: json.loads(t) for n, t in parser.scripts.items() if n.startswith("data-")}
        for piece in sorted(path.with_name(f"{path.stem}_files").glob("*.js")):
            found = re.fullmatch(r'ptifChunk\("(\w+)",(.*)\);', piece.read_text(encoding="utf-8"), re.S)
            assert found is not None
            self.blocks[found[1]] = json.loads(found[2])

    @property
    def index(self) -> Any:
        return self.blocks["index"]

    def _joined(self, kind: str) -> list[Any]:
        names = sorted((n for n in self.blocks if re.fullmatch(kind + r"\d+", n)), key=lambda n: int(n[1:]))
        return [record for name in names for record in self.blocks[name]]

    @property
    def queries(self) -> list[Any]:
        return self._joined("q")

    @property
    def examples(self) -> dict[int, Any]:
        return {record["i"]: record for record in self._joined("e")}


class Chats:
    """Chats token by token, with text that a careless page would run, and where each comes from."""

    def __init__(self, n: int, long: int = 300) -> None:
        self.n, self.long = n, long
        self.sources = tuple(["novels", "<b>reviews</b>", ATTACK][i % 3] for i in range(n))

    def __len__(self) -> int:
        return self.n

    def __getitem__(self, i: int) -> dict[str, Tensor]:
        return {"input_ids": torch.arange(len(self.token_text(i).pieces)), "labels": torch.tensor(-100)}

    def token_text(self, i: int) -> TokenText:
        asked = ("<user>", " who", f" is{i}", f" {ATTACK}")
        answer = tuple(f" word{i}_{t}" for t in range(self.long if i % 4 == 0 else 9))
        taught = (False,) * (len(asked) + 1) + (True,) * len(answer)
        return TokenText((*asked, "<assistant>", *answer), taught, ((0, "user"), (4, f"assistant{ATTACK}")))


def chats(queries: int = 3, n: int = 12) -> Scores:
    return Scores(values(queries, n), train_source=Source.of(Chats(n)), query_source=Source.of(Chats(queries)),
                  diagnostics=DIAGNOSTICS)  # fmt: skip


def chat_tokens(queries: int = 3, n: int = 12) -> dict[int, Tensor]:
    """Token scores of which the strongest of chat i stands at its token 7, or of long ones at token 200."""
    generator, data = torch.Generator().manual_seed(5), Chats(n)
    tokens = {}
    for i in range(n):
        size = len(data.token_text(i).pieces)
        tokens[i] = torch.rand(queries, size, generator=generator, dtype=torch.float64) * 1e-4
        tokens[i][:, :5] = 0
        tokens[i][:, 200 if size > 200 else 7] = -(1.0 + i) * 1e-3
    return tokens
