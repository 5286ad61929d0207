"""What faiss, traker and dattri take for what an index does; runs in their environment, prints one line of JSON.

`faiss FOLDER DTYPE K QUERIES`: an exhaustive search (top 100) over the rows of an index, in the same type (float16, and
for int8 a byte per number with a range for each column, which faiss turns into float32).
`traker | dattri NETWORK EXAMPLES`: per-example gradients, projected to 1,024 numbers, against a plain epoch.
"""

from __future__ import annotations

import json
import resource
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any


def seconds(work: Callable[[], Any]) -> float:
    """Of the processor, the system's included."""
    start = resource.getrusage(resource.RUSAGE_SELF)
    work()
    stop = resource.getrusage(resource.RUSAGE_SELF)
    return stop.ru_utime + stop.ru_stime - start.ru_utime - start.ru_stime


def search(folder: Path, dtype: str, k: int, queries: int) -> dict[str, float]:
    """A flat index of the same rows, filled shard by shard."""
    import faiss
    import numpy as np

    faiss.omp_set_num_threads(1)
    kinds = {
        "float16": (np.float16, faiss.ScalarQuantizer.QT_fp16),
        "int8": (np.int8, faiss.ScalarQuantizer.QT_8bit),
    }
    kind, quantizer = kinds[dtype]
    flat = faiss.IndexScalarQuantizer(k, quantizer, faiss.METRIC_INNER_PRODUCT)
    for path in sorted(folder.glob("rows-*")):
        with open(path, "rb") as file:
            length = int.from_bytes(file.read(8), "little")
            entry = json.loads(file.read(length))["values"]
        rows = np.memmap(path, kind, "r", 8 + length + entry["data_offsets"][0], tuple(entry["shape"]))
        if not flat.is_trained:
            flat.train(rows[:10_000].astype(np.float32))
        for at in range(0, len(rows), 10_000):
            flat.add(rows[at : at + 10_000].astype(np.float32))
    asked = np.random.default_rng(0).standard_normal((queries, k), np.float32)
    taken = min(seconds(lambda: flat.search(asked, 100)) for _ in range(3 if queries == 1 else 1))
    return {"search": taken, "memory": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20}


def network(name: str) -> Any:
    """As in `benchmarks/index.py`."""
    from torch import nn

    if name == "mlp":
        return nn.Sequential(nn.Linear(784, 128), nn.ReLU(), nn.Linear(128, 64), nn.ReLU(), nn.Linear(64, 10))
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(),
        nn.MaxPool2d(2), nn.Flatten(), nn.Linear(2048, 64), nn.ReLU(), nn.Linear(64, 10),
    )  # fmt: skip


def epoch(model: Any, x: Any, y: Any) -> None:
    """Forward and backward over the data."""
    from torch.nn.functional import cross_entropy

    for some, labels in zip(x.split(64), y.split(64), strict=True):
        model.zero_grad()
        cross_entropy(model(some), labels).backward()


def build(library: str, name: str, count: int) -> dict[str, float]:
    """Project the gradients of so many examples."""
    import torch

    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = network(name).eval()
    x = torch.randn(count, 784) if name == "mlp" else torch.randn(count, 3, 32, 32)
    y, numbers = torch.arange(count) % 10, 1024
    plain = min(seconds(lambda: epoch(model, x, y)) for _ in range(3))
    work = by_traker if library == "traker" else by_dattri
    return {"epoch": plain, "build": seconds(lambda: work(model, x, y, numbers)), "numbers": numbers}


def by_traker(model: Any, x: Any, y: Any, numbers: int) -> None:
    """`TRAKer.featurize`, with the projector that runs without a GPU."""
    from trak import TRAKer
    from trak.projectors import BasicProjector, ProjectionType

    size = sum(p.numel() for p in model.parameters())
    with tempfile.TemporaryDirectory() as folder:
        projector = BasicProjector(
            grad_dim=size, proj_dim=numbers, seed=0, proj_type=ProjectionType.rademacher, device="cpu"
        )
        tracer = TRAKer(
            model=model, task="image_classification", train_set_size=len(x), save_dir=folder, device="cpu",
            projector=projector, use_half_precision=False,
        )  # fmt: skip
        tracer.load_checkpoint(model.state_dict(), model_id=0)
        for some, labels in zip(x.split(64), y.split(64), strict=True):
            tracer.featurize(batch=(some, labels), num_samples=len(some))
        tracer.finalize_features()


def by_dattri(model: Any, x: Any, y: Any, numbers: int) -> None:
    """`TRAKAttributor.cache`."""
    import torch
    from dattri.algorithm import TRAKAttributor
    from dattri.task import AttributionTask
    from torch.func import functional_call
    from torch.nn.functional import cross_entropy

    def loss(parameters: Any, data: Any) -> Any:
        one, label = data
        return cross_entropy(functional_call(model, parameters, one[None]), label[None])

    def probability(parameters: Any, data: Any) -> Any:
        # A batch, or one example of it under vmap.
        some, labels = data if data[1].dim() else (data[0][None], data[1][None])
        return torch.exp(-cross_entropy(functional_call(model, parameters, some), labels, reduction="none"))

    task = AttributionTask(loss_func=loss, model=model, checkpoints=model.state_dict())
    attributor = TRAKAttributor(
        task=task, correct_probability_func=probability, projector_kwargs={"proj_dim": numbers, "device": "cpu"}
    )
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, y), batch_size=64)
    attributor.cache(loader)


if __name__ == "__main__":
    if sys.argv[1] == "faiss":
        print(json.dumps(search(Path(sys.argv[2]), sys.argv[3], int(sys.argv[4]), int(sys.argv[5]))))
    else:
        print(json.dumps(build(sys.argv[1], sys.argv[2], int(sys.argv[3]))))
