"""What bergson takes to build an index of projected gradients and to ask it; runs in its own environment.

`FOLDER` holds a model (`model`, as transformers saves it), tokens (`tokens.safetensors`: train, queries) and gets
`scores.safetensors`; a second argument is the length of a side after the projection, a third the tokens of a batch.
Prints one line of JSON.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from measuring import measured, resident


def index_of(model: Any, tokens: Tensor, folder: Path, side: int, batch: int) -> Path:
    """Gradients of all linear layers of the base model, projected to side x side numbers each, on disk."""
    from bergson import GradientProcessor, IndexConfig, collect_gradients
    from bergson.data import allocate_batches
    from datasets import Dataset

    rows = tokens.tolist()
    columns = {"input_ids": rows, "labels": rows, "attention_mask": torch.ones_like(tokens).tolist()}
    data = Dataset.from_dict(columns | {"length": [tokens.shape[1]] * len(rows)})
    config = IndexConfig(run_path=str(folder), token_batch_size=batch, loss_reduction="mean", projection_dim=side)
    config.partial_run_path.mkdir(parents=True)
    batches = allocate_batches(data["length"][:], batch)
    processor = GradientProcessor(projection_dim=side)
    collect_gradients(model=model, data=data, processor=processor, cfg=config, batches=batches)
    return config.partial_run_path


def main(folder: Path, side: int, batch: int) -> dict[str, Any]:
    from bergson import Attributor
    from bergson.data import load_module_gradients
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(1)
    model, tokens = (
        AutoModelForCausalLM.from_pretrained(folder / "model").eval(),
        load_file(folder / "tokens.safetensors"),
    )
    record: dict[str, Any] = {"model_gib": resident()}
    with measured(record, "fit"):
        index = index_of(model, tokens["train"], folder / "train", side, batch)
    with measured(record, "score"):
        asked = load_module_gradients(index_of(model, tokens["queries"], folder / "asked", side, batch))
        queries = {name: torch.tensor(asked[name][:]) for name in asked}
        values, places = Attributor(index).search(queries, None)
    scores = torch.zeros_like(values).scatter_(1, places, values)
    save_file({"scores": scores}, folder / "scores.safetensors")
    record["disk"] = sum(path.stat().st_size for path in index.rglob("*") if path.is_file())
    return record


if __name__ == "__main__":
    print(json.dumps(main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))))
