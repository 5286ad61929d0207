"""How well projected gradients of a language model predict retraining, ours beside bergson's, and what they cost.

    python benchmarks/language_lds.py [--quick]

A small Llama of transformers learns 300 passages of 64 letters of Shakespeare. Truth: the loss on 50 more after
training on random halves. Every method asks the same trained model about the matrices of its blocks; indexes keep 16 x
16 numbers of each. bergson runs in an environment of its own, made under `.bench/`, or PTIF_BENCH_BERGSON_PYTHON names
the Python of one that has it. Prints the half-subset LDS with its interval, and CPU seconds.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from language_models import SIDE, bergson
from peers import environments
from peers.prepare import DATA, VOCABULARY
from peers.workloads import CACHE
from safetensors.torch import load_file
from torch import Tensor, nn

import pytorch_influence_functions as ptif
from pytorch_influence_functions.evaluation import (
    LinearDecay,
    Recipe,
    Subsets,
    Truth,
    evaluate_one,
    noise_ceiling,
    retrain,
    train_model,
)

SEED = 1000
PARAMETERS = "*_proj.weight"
"""The linear layers of the base model, which are those that bergson takes."""


def llama() -> nn.Module:
    """An untrained Llama of 2 blocks of width 64, 98,304 weights in the matrices of its blocks."""
    import transformers

    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, max_position_embeddings=64,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config)


def passages(quick: bool) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Passages to learn, and to ask about."""
    n, queries = (30, 5) if quick else (300, 50)
    train, _, asked, _ = DATA["python_manual64" if quick else "shakespeare64"](n, queries)
    first, second = ({"input_ids": ids, "labels": ids.clone()} for ids in (train, asked))
    return first, second


def recipe(quick: bool) -> Recipe:
    """How every model is trained."""
    return Recipe(
        llama, partial(torch.optim.Adam, lr=3e-3), epochs=2 if quick else 10, batch_size=15,
        schedule=LinearDecay(warmup=0.1), loss=ptif.TokenCrossEntropy(shift=True, average=False),
    )  # fmt: skip


def by_bergson(model: nn.Module, train: dict[str, Tensor], queries: dict[str, Tensor]) -> tuple[Tensor, float]:
    """Scores of bergson's index of projected gradients, and its CPU seconds."""
    with tempfile.TemporaryDirectory() as folder:
        options = argparse.Namespace(batch=8, length=train["input_ids"].shape[1], keep=folder)
        record = bergson(model, options, {"train": train["input_ids"], "queries": queries["input_ids"]})
        scores = load_file(f"{folder}/bergson")["scores"]
    return scores, record["fit"]["cpu"] + record["score"]["cpu"]


def by_index(problem: ptif.Problem, method: Any, queries: dict[str, Tensor]) -> Tensor:
    """Scores of an index that keeps as much."""
    with tempfile.TemporaryDirectory() as folder:
        index = ptif.Index.build(problem, f"{folder}/index", method, ptif.store.TwoSided(SIDE), "float32")
        return index.score(queries).values


def timed(scored: Callable[[], Tensor]) -> tuple[Tensor, float]:
    began = time.process_time()
    return scored(), time.process_time() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="tiny sizes")
    parser.add_argument("--subsets", type=int, default=60, help="random halves that are trained on")
    parser.add_argument("--seeds", type=int, default=5, help="trainings of each")
    options = parser.parse_args()
    torch.set_num_threads(1)
    if not options.quick:
        environments.data()
    train, queries = passages(options.quick)
    how, n = recipe(options.quick), len(train["labels"])
    truth: Truth = retrain(
        how, Subsets.halves(n, options.subsets), options.seeds, train=train, queries=queries, measure=how.loss,
        folder=CACHE / "language_lds", workers=1,
    )  # fmt: skip
    model = train_model(how, train, SEED).eval()
    print(f"{n} passages, {options.subsets} halves x {options.seeds} seeds; noise ceiling {noise_ceiling(truth)}")
    problem = ptif.Problem(model, how.loss, train, parameters=PARAMETERS)
    answers = {
        "EK-FAC": lambda: timed(lambda: ptif.ekfac().fit(problem).score(queries).values),
        "index of EK-FAC": lambda: timed(lambda: by_index(problem, ptif.ekfac(), queries)),
        "gradient products": lambda: timed(lambda: ptif.methods.grad_dot().fit(problem).score(queries).values),
        "index of gradients": lambda: timed(lambda: by_index(problem, ptif.methods.grad_dot(), queries)),
        "bergson": lambda: by_bergson(model, train, queries),
    }
    for name, answer in answers.items():
        scores, seconds = answer()
        print(f"{name:<20} LDS {evaluate_one(scores.double(), truth)}; {seconds:.1f} CPU s", flush=True)


if __name__ == "__main__":
    main()
