"""How large are the scores of adapters beside what retraining does? LoRA on a small transformer, groups taken out.

    python benchmarks/adapter_sizes.py [--setting NAME ...] [--groups N]

A Llama of 2 layers and width 64 learns passages of three books, is frozen, and gets adapters of rank 4 (5,120 weights),
which Adam fine-tunes on 48 sentences (600 predicted tokens). For each of 16 groups of six sentences the fine-tuning is
done again in the same batches, where the six count as nothing; measured is -log p of eight answers. Printed is, of each
method: the slope of measured on predicted changes (1: right; .1: ten times too large), the ratio of their root mean
squares, and the correlation over the groups, mean over the answers. Needs the extra `hf`.
"""

from __future__ import annotations

import argparse
import copy
import json
import random
import time
from dataclasses import dataclass
from typing import Any

import peft
import torch
from language_retrieval import FACTS, TEXTS, fact_rows, small_model, train
from torch import Tensor

import pytorch_influence_functions as ptif
from pytorch_influence_functions.curvature import EKFAC, Fisher
from pytorch_influence_functions.damping import FromTraining, Relative

PROMPTS = [f"The keeper of the {thing} in {town} is" for town, (thing, _) in FACTS.items()]
PROMPTS += ["The library in Redcar is in the hands of", "The ferry of Farley"]
ANSWERS = [f" {name}" for _, (_, name) in FACTS.items()] + [" Jane Hill", " was kept by Otto Lang"]
NATS = ptif.TokenCrossEntropy(shift=True, average=False)


@dataclass(frozen=True)
class Setting:
    """A training by Adam (or SGD), its rate falling to 0 in a straight line."""

    steps: int
    rate: float
    batch: int
    adam: bool = True

    @property
    def damping(self) -> FromTraining:
        return FromTraining(self.rate / 2, self.steps, adam_batch=self.batch if self.adam else None)


SETTINGS = {
    "short": Setting(24, 3e-3, 8),
    "short, full batch": Setting(24, 3e-3, 48),
    "long": Setting(200, 5e-3, 48),
    "SGD": Setting(30, 2e-2, 48, adam=False),
}


def frozen_base() -> tuple[Any, Any]:
    rows = [json.loads(line)["text"] for line in TEXTS.read_text(encoding="utf-8").splitlines()]
    model, tokenizer = small_model(rows + [row["text"] for row in fact_rows(60)], size=64)
    train(model, ptif.hf.problem(model, tokenizer, rows[:144], max_length=64), 6, 3e-3)
    return model, tokenizer


def sentences() -> list[dict[str, str]]:
    """24 about the facts that are asked for and 24 others."""
    rows = fact_rows(60)
    chosen = [row for row in rows if row["town"]][:24] + [row for row in rows if not row["town"]][:24]
    random.Random(0).shuffle(chosen)
    return chosen


def fine_tune(base: Any, tokenizer: Any, kept: Tensor, setting: Setting) -> tuple[Any, ptif.Problem]:
    """Adapters trained on the sentences, of which those with `kept` 0 count as nothing."""
    torch.manual_seed(0)
    targets = ["q_proj", "v_proj", "up_proj", "down_proj"]
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=targets, task_type="CAUSAL_LM")
    model = peft.get_peft_model(copy.deepcopy(base), config)
    problem = ptif.hf.problem(model, tokenizer, sentences(), text_column="text", max_length=32)
    data, n, order = problem.data, len(problem), torch.Generator().manual_seed(1)
    optimizer = (torch.optim.Adam if setting.adam else torch.optim.SGD)(
        p for p in model.parameters() if p.requires_grad
    )
    model.train()
    batches = [ids for _ in range(setting.steps * setting.batch // n) for ids in epoch(n, setting.batch, order)]
    for step, ids in enumerate(batches):
        optimizer.param_groups[0]["lr"] = setting.rate * (1 - step / len(batches))
        batch = data.collate([data.dataset[int(i)] for i in ids])
        optimizer.zero_grad()
        (NATS.losses(NATS.outputs(model, batch), batch) * kept[ids]).mean().backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    return model.eval(), problem


def epoch(n: int, batch: int, order: torch.Generator) -> list[Tensor]:
    return list(torch.randperm(n, generator=order).split(batch))


def answer_losses(model: Any, tokenizer: Any) -> Tensor:
    queries = ptif.hf.query(model, tokenizer, PROMPTS, ANSWERS)
    batch = queries.collate([queries.dataset[i] for i in range(len(queries))])
    with torch.no_grad():
        return NATS.losses(NATS.outputs(model, batch), batch).double()


def methods(setting: Setting) -> dict[str, Any]:
    return {
        "EK-FAC": ptif.ekfac(),
        "EK-FAC, each layer's own mean eigenvalue": ptif.ekfac(Relative(1.0, per_block=True)),
        "EK-FAC, damping from training": ptif.ekfac(setting.damping),
        "dual of 3 drawn labels": ptif.dual(Fisher(samples=3)),
        "dual of 3 drawn labels, damping from training": ptif.dual(Fisher(samples=3), setting.damping),
        "dual of the given labels": ptif.dual(),
        "dual of the given labels, damping from training": ptif.dual(damping=setting.damping),
        "Gauss-Newton, damping from training": ptif.gauss_newton(setting.damping, preconditioner=EKFAC()),
    }


def run(name: str, setting: Setting, base: Any, tokenizer: Any, count: int) -> None:
    everyone = torch.ones(48)
    model, problem = fine_tune(base, tokenizer, everyone, setting)
    losses = answer_losses(model, tokenizer)
    groups = [random.Random(100 + seed).sample(range(48), 6) for seed in range(count)]
    without = [everyone.index_fill(0, torch.tensor(group), 0.0) for group in groups]
    after = [answer_losses(fine_tune(base, tokenizer, kept, setting)[0], tokenizer) for kept in without]
    measured = torch.stack(after, 1) - losses[:, None]
    print(f"{name}: {setting}, measured changes {float(measured.square().mean().sqrt()):.2f} nats", flush=True)
    queries = ptif.hf.query(model, tokenizer, PROMPTS, ANSWERS)
    for label, method in methods(setting).items():
        began = time.process_time()
        values = method.fit(problem, len(queries)).score(queries).values.double()
        predicted = torch.stack([values[:, group].sum(1) for group in groups], 1)
        slope = float((predicted * measured).sum() / predicted.square().sum())
        ratio = float(predicted.square().mean().sqrt() / measured.square().mean().sqrt())
        rows = zip(predicted, measured, strict=True)
        r = sum(float(torch.corrcoef(torch.stack(pair))[0, 1]) for pair in rows) / len(queries)
        seconds = time.process_time() - began
        print(f"  {label:<47} slope {slope:5.2f}  size {ratio:5.2f}  r {r:.2f}  {seconds:.1f} s", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--setting", action="append", choices=list(SETTINGS))
    parser.add_argument("--groups", type=int, default=16)
    asked = parser.parse_args()
    base, tokenizer = frozen_base()
    for name in asked.setting or SETTINGS:
        run(name, SETTINGS[name], base, tokenizer, asked.groups)


if __name__ == "__main__":
    main()
