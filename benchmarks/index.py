"""The index on disk: `python benchmarks/index.py [scan | build | fidelity | memory | graph] [--examples N]`.

Prints the tables of `docs/index-on-disk.md`. Seconds are those of the processor, which other programs on the machine
change less than those of the wall; what is compared is run in turns. All runs use one thread unless OMP_NUM_THREADS
says otherwise. `--peers` adds faiss, traker and dattri, which need an environment of their own: it is made under
`.bench/`, or PTIF_BENCH_INDEX_PYTHON names the Python of one that has them. `graph` needs faiss beside this package,
and `--images`, a folder with Fashion-MNIST's four files.
"""

from __future__ import annotations

import argparse
import gzip
import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import pytorch_influence_functions as ptif
from pytorch_influence_functions.demo.data import datasets as demo_datasets
from pytorch_influence_functions.store import Factors, Sketch, TwoSided
from pytorch_influence_functions.store.build import HASHES
from pytorch_influence_functions.store.folder import IndexFolder

SHARD = 100_000
REPEATS = 3
PEERS = False
# What `memory` runs, each in a process of its own.
WORKS = ("build-small", "top", "own")


def seconds(work: Callable[[], Any]) -> float:
    """Of the processor, the system's included."""
    start = resource.getrusage(resource.RUSAGE_SELF)
    work()
    stop = resource.getrusage(resource.RUSAGE_SELF)
    return stop.ru_utime + stop.ru_stime - start.ru_utime - start.ru_stime


def in_turns(works: dict[str, Callable[[], Any]], repeats: int) -> dict[str, list[float]]:
    """Seconds of each, sorted; one after the other, so that all meet the same load."""
    taken: dict[str, list[float]] = {name: [] for name in works}
    for _ in range(repeats):
        for name, work in works.items():
            taken[name].append(seconds(work))
    return {name: sorted(some) for name, some in taken.items()}


def spread(values: list[float], digits: int = 2) -> str:
    """The median, and the smallest and largest."""
    return f"{values[len(values) // 2]:.{digits}f} ({values[0]:.{digits}f}–{values[-1]:.{digits}f})"


def peer(*arguments: str) -> dict[str, float] | None:
    """What another library takes, in its own environment; None where that was not asked for."""
    if not PEERS:
        return None
    sys.path.insert(0, str(Path(__file__).resolve().parent))
    from peers.environments import index

    worker = Path(__file__).resolve().parent / "peers" / "index_worker.py"
    ran = subprocess.run([index(), "-W", "ignore", str(worker), *arguments], capture_output=True, text=True, check=True)
    found: dict[str, float] = json.loads(ran.stdout.splitlines()[-1])
    return found


def sketch_problem(k: int) -> tuple[ptif.Problem, tuple[Tensor, Tensor]]:
    """A small network with more than k parameters, and queries."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 10))
    x, y = torch.randn(256, 64), torch.arange(256) % 10
    return ptif.Problem(model, ptif.CrossEntropy(), (x, y)), (torch.randn(64, 64), torch.arange(64) % 10)


def made_index(folder: Path, examples: int, k: int, dtype: str) -> tuple[Path, nn.Module, tuple[Tensor, Tensor]]:
    """An index of random rows, of which a question needs nothing but a model."""
    problem, queries = sketch_problem(k)
    place = folder / f"{dtype}-{examples}-{k}"
    if not (place / "done").exists():
        shutil.rmtree(place, ignore_errors=True)
        index = ptif.Index.build(problem, place, ptif.methods.grad_dot(), Sketch(k), dtype)
        opened = IndexFolder.open(place)
        opened.write(replace(opened.manifest, shards=()))
        opened.drop_unlisted()
        codec = index._layout(index._fitted()).codec
        generator = torch.Generator().manual_seed(0)
        for first in range(0, examples, SHARD):
            n = min(SHARD, examples - first)
            tensors = codec.encode(torch.randn(n, k, generator=generator))
            tensors |= {HASHES: torch.zeros(n, dtype=torch.long)}
            opened.list_shards([opened.write_shard(first, first + n, tensors, {"forms": {}})])
        (place / "done").touch()
    return place, problem.model, queries


# --------------------------------------------------------------------------- scan


def read_plainly(place: Path) -> None:
    """Read every file of rows once."""
    buffer = memoryview(bytearray(16 << 20))
    for path in sorted(place.glob("rows-*")):
        with open(path, "rb", buffering=0) as file:
            while file.readinto(buffer):
                pass


def memmap_and_matmul(place: Path, queries: Tensor, k: int, dtype: str) -> None:
    """What one writes by hand: numpy memory maps, a matrix product in float32, the best of each block."""
    kinds: dict[str, Any] = {"float16": np.float16, "int8": np.int8}
    q = queries.numpy()
    for path in sorted(place.glob("rows-*")):
        with open(path, "rb") as file:
            length = int.from_bytes(file.read(8), "little")
            entry = json.loads(file.read(length))["values"]
        shape, start = entry["shape"], 8 + length + entry["data_offsets"][0]
        rows = np.memmap(path, kinds[dtype], "r", start, tuple(shape))
        for at in range(0, len(rows), 4096):
            scores = q @ rows[at : at + 4096].astype(np.float32).T
            np.argpartition(scores, -100, axis=1)[:, -100:]


def scan(folder: Path, examples: int, k: int) -> None:
    """Questions against a plain read of the same files."""
    print(f"\nscan: {examples:,} examples x {k:,}, top 100; files in the system's cache; seconds of the processor")
    print("| dtype | GB | queries | plain read | index | share of the read | memmap + matmul | faiss | its GiB |")
    print("|---|---|---|---|---|---|---|---|---|")
    for dtype in ("float16", "int8"):
        place, model, (x, y) = made_index(folder, examples, k, dtype)
        size = sum(path.stat().st_size for path in place.glob("rows-*")) / 1e9
        index = ptif.Index.open(place, model, check=False)
        for q in (1, 64):

            def ask(q: int = q, index: ptif.Index = index, x: Tensor = x, y: Tensor = y) -> None:
                index.score((x[:q], y[:q]), top=100)

            def by_hand(q: int = q, place: Path = place, dtype: str = dtype) -> None:
                memmap_and_matmul(place, torch.randn(q, k), k, dtype)

            ask()  # what is paid once
            taken = in_turns({"plain": lambda place=place: read_plainly(place), "ours": ask}, 5 if q == 1 else 3)
            other = peer("faiss", str(place), dtype, str(k), str(q))
            beside = " |" if other is None else f"{other['search']:.2f} | {other['memory']:.1f}"
            print(
                f"| {dtype} | {size:.2f} | {q} | {spread(taken['plain'])} | {spread(taken['ours'])} | "
                f"{median(taken['plain']) / median(taken['ours']):.0%} | {seconds(by_hand):.2f} | "
                f"{beside} |",
                flush=True,
            )


# --------------------------------------------------------------------------- build


def networks() -> dict[str, tuple[nn.Module, tuple[Tensor, Tensor]]]:
    """A perceptron and a small convolutional network."""
    torch.manual_seed(0)
    perceptron = nn.Sequential(nn.Linear(784, 128), nn.ReLU(), nn.Linear(128, 64), nn.ReLU(), nn.Linear(64, 10))
    convolution = nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(),
        nn.MaxPool2d(2), nn.Flatten(), nn.Linear(2048, 64), nn.ReLU(), nn.Linear(64, 10),
    )  # fmt: skip
    return {
        "MLP 784-128-64-10": (perceptron, (torch.randn(40_000, 784), torch.arange(40_000) % 10)),
        "CNN, 32² pixels": (convolution, (torch.randn(4096, 3, 32, 32), torch.arange(4096) % 10)),
    }


def epoch(model: nn.Module, data: tuple[Tensor, Tensor]) -> None:
    """Forward and backward over the data, as training does, without a step."""
    for x, y in zip(data[0].split(64), data[1].split(64), strict=True):
        model.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()


def build(folder: Path) -> None:
    """Examples per second against a plain epoch of forward and backward."""
    print("\nbuild: seconds of the processor; the curvature apart (grad_dot), files written and synced")
    print("| network | keeps | dtype | bytes | plain epoch | build | epochs |")
    print("|---|---|---|---|---|---|---|")
    kinds: tuple[tuple[Any, str], ...] = (
        (Factors(), "float32"), (Factors(), "int8"), (TwoSided(16), "float16"), (TwoSided(16), "int8"),
        (TwoSided(32), "float16"), (Sketch(1024), "float16"), (Sketch(1024), "int8"),
    )  # fmt: skip
    for name, (model, data) in networks().items():
        for keeps, dtype in kinds:
            problem = ptif.Problem(model, ptif.CrossEntropy(), data)
            places = iter([folder / f"build-{number}" for number in range(REPEATS + 1)])

            def work(
                keeps: Any = keeps, dtype: str = dtype, problem: ptif.Problem = problem, places: Any = places
            ) -> None:
                ptif.Index.build(problem, next(places), ptif.methods.grad_dot(), keeps, dtype)

            work()
            taken = in_turns({"epoch": lambda model=model, data=data: epoch(model, data), "build": work}, REPEATS)
            each = ptif.Index.open(folder / "build-0", problem).folder.manifest.bytes / len(problem)
            print(
                f"| {name} | {keeps!r} | {dtype} | {each:,.0f} | {spread(taken['epoch'])} | {spread(taken['build'])} | "
                f"{median(taken['build']) / median(taken['epoch']):.2f} |",
                flush=True,
            )
            for number in range(REPEATS + 1):
                shutil.rmtree(folder / f"build-{number}")
        for library in ("traker", "dattri"):
            few = 512
            other = peer(library, "mlp" if "MLP" in name else "cnn", str(few))
            if other is not None:
                print(
                    f"| {name} | {library}, {other['numbers']:,.0f} numbers, {few:,} examples | float32 | "
                    f"{4 * other['numbers']:,.0f} | {other['epoch']:.2f} | {other['build']:.2f} | "
                    f"{other['build'] / other['epoch']:.2f} |",
                    flush=True,
                )


# --------------------------------------------------------------------------- fidelity


def trained(n: int) -> tuple[ptif.Problem, tuple[Tensor, Tensor]]:
    """A perceptron trained on Fashion-MNIST, and test queries."""
    torch.manual_seed(0)
    train, test = demo_datasets()[:2]
    (x, y), (xq, yq) = ((s.tensors[0].flatten(1)[:m], s.tensors[1][:m]) for s, m in ((train, n), (test, 50)))
    model = nn.Sequential(nn.Linear(784, 128), nn.ReLU(), nn.Linear(128, 64), nn.ReLU(), nn.Linear(64, 10))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    for _ in range(20):
        for part in torch.randperm(len(x)).split(64):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x[part]), y[part]).backward()
            optimizer.step()
    return ptif.Problem(model, ptif.CrossEntropy(), (x, y)), (xq, yq)


def rank_agreement(a: Tensor, b: Tensor) -> float:
    """Spearman's correlation, averaged over queries."""
    ranks = [t.argsort(1).argsort(1).double() for t in (a, b)]
    return float(np.mean([np.corrcoef(p, q)[0, 1] for p, q in zip(*(r.numpy() for r in ranks), strict=True)]))


def kept_at_top(a: Tensor, b: Tensor, k: int = 20, wide: int = 100) -> float:
    """The share of the exact top k that is among the index's top `wide`."""
    best, near = a.topk(k).indices, b.topk(wide).indices
    return float((best[:, :, None] == near[:, None]).any(2).double().mean())


def fidelity(folder: Path, examples: int, picture: Path | None = None) -> None:
    """Bytes per example and agreement with the method's own scores, for every representation and type."""
    problem, queries = trained(min(examples, 2000))
    print(
        f"\nfidelity: MLP 784-128-64-10 on Fashion-MNIST, {len(problem):,} examples, {len(queries[1])} queries, EK-FAC"
    )
    exact = ptif.ekfac().fit(problem).score(queries).values
    print("| keeps | dtype | bytes | rank agreement | exact top 20 in the top 100 |")
    print("|---|---|---|---|---|")
    points: list[tuple[str, str, float, float, float]] = []
    kinds: list[tuple[Any, tuple[str, ...]]] = [
        (Factors(), ("float32", "float16", "bfloat16", "int8")),
        (TwoSided(8), ("float16", "int8")),
        (TwoSided(16), ("float32", "float16", "bfloat16", "int8", "1bit")),
        (TwoSided(32), ("float16", "int8", "1bit")),
        (TwoSided(16, basis="eigenvectors"), ("float16", "int8", "1bit")),
        (TwoSided(32, basis="eigenvectors"), ("float16", "int8", "1bit")),
        (Sketch(256), ("float16", "int8", "1bit")),
        (Sketch(1024), ("float16", "int8", "1bit")),
    ]
    for keeps, dtypes in kinds:
        for dtype in dtypes:
            index = ptif.Index.build(problem, folder / "fidelity", None, keeps, dtype, overwrite=True)
            scores = index.score(queries).values
            each = sum(s.file.bytes for s in index.folder.manifest.shards) / len(problem)
            agreement, top = rank_agreement(exact, scores), kept_at_top(exact, scores)
            print(f"| {keeps!r} | {dtype} | {each:,.0f} | {agreement:.3f} | {top:.2f} |", flush=True)
            points.append((repr(keeps), dtype, each, agreement, top))
    shutil.rmtree(folder / "fidelity")
    if picture is not None:
        draw_fidelity(points, picture)


def draw_fidelity(points: list[tuple[str, str, float, float, float]], picture: Path) -> None:
    """Bytes of an example against agreement, one line for every representation; one mark for every type."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    marks = {"float32": "o", "float16": "s", "bfloat16": "D", "int8": "^", "1bit": "x"}
    colours = {
        name: f"C{number}" for number, name in enumerate(dict.fromkeys(name.split("(")[0] for name, *_ in points))
    }
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.8), sharex=True, constrained_layout=True)
    for axis, column, title in zip(axes, (3, 4), ("rank agreement", "exact top 20 in the top 100"), strict=True):
        for name in dict.fromkeys(name for name, *_ in points):
            own = sorted((p for p in points if p[0] == name), key=lambda p: p[2])
            style = "--" if "eigenvectors" in name else "-"
            colour = colours[name.split("(")[0]]
            axis.plot([p[2] for p in own], [p[column] for p in own], style, color=colour, lw=1, alpha=0.6)
            for point in own:
                axis.plot(point[2], point[column], marks[point[1]], color=colour, ms=5, mfc="none")
        axis.set(xscale="log", xlabel="bytes of an example", ylabel=title, ylim=(0, 1.04))
        axis.grid(alpha=0.25)
    handles = [plt.Line2D([], [], color=colour, label=name) for name, colour in colours.items()]
    handles += [plt.Line2D([], [], color="gray", ls="--", label="along eigenvectors")]
    handles += [plt.Line2D([], [], color="k", marker=m, ls="", mfc="none", label=name) for name, m in marks.items()]
    axes[0].legend(handles=handles, fontsize=7, ncol=2, loc="upper left", bbox_to_anchor=(0.0, 0.98))
    picture.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(picture, dpi=130)


# --------------------------------------------------------------------------- graph


def images(folder: Path, name: str) -> tuple[Tensor, Tensor]:
    """Images and labels of Fashion-MNIST's own files."""

    def numbers(kind: str, start: int) -> Tensor:
        with gzip.open(folder / f"{name}-{kind}-ubyte.gz") as file:
            return torch.from_numpy(np.frombuffer(file.read(), np.uint8, offset=start).copy())

    return numbers("images-idx3", 16).reshape(-1, 28, 28).float() / 255, numbers("labels-idx1", 8).long()


def many_images(folder: Path, examples: int) -> tuple[ptif.Problem, tuple[Tensor, Tensor]]:
    """A perceptron trained on Fashion-MNIST, also on its images moved and mirrored, and test queries."""
    (x, y), (xq, yq) = images(folder, "train"), images(folder, "t10k")
    parts, generator = [x], torch.Generator().manual_seed(1)
    for copy in range(1, -(-examples // len(x))):
        shift = torch.randint(-2, 3, (2,), generator=generator).tolist()
        moved = torch.roll(x, shift, (1, 2))
        parts.append(moved.flip(2) if copy % 2 else moved)
    inputs, labels = torch.cat(parts).flatten(1), y.repeat(len(parts))
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(784, 128), nn.ReLU(), nn.Linear(128, 64), nn.ReLU(), nn.Linear(64, 10))
    optimizer = torch.optim.Adam(model.parameters(), 1e-3)
    for _ in range(6000):
        some = torch.randint(0, len(inputs), (128,))
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(inputs[some]), labels[some]).backward()
        optimizer.step()
    return ptif.Problem(model, nn.CrossEntropyLoss(), (inputs, labels)), (xq[:500].flatten(1), yq[:500])


def graph(folder: Path, images_at: Path, examples: int) -> None:
    """What a graph of nearest neighbours finds and costs beside the scan of all rows."""
    problem, queries = many_images(images_at, examples)
    place = folder / f"graph-{len(problem)}"
    index = ptif.Index.build(problem, place, ptif.ekfac(examples=5000), Sketch(1024), "float16")
    measure_graph(index, queries)


def measure_graph(index: ptif.Index, queries: tuple[Tensor, Tensor]) -> None:
    """Print the table."""
    made: list[ptif.Index] = []
    taken = seconds(lambda: made.append(index.build_graph()))
    index = made[0]
    record = index.folder.manifest.graph
    print(
        f"\ngraph: {len(index):,} examples, {index.folder.manifest.facts['described']}; {len(index) - record.left:,} "
        f"rows linked in {taken:.0f} s of the processor, {record.file.bytes / 1e6:,.0f} MB"
    )
    print("| examples | queries | top | scan | ef | with the graph | found | pays after |")
    print("|---|---|---|---|---|---|---|---|")
    for q in (1, 64):
        asked = tuple(t[:q] for t in queries)
        for top in (10, 100):
            exact = index.score(asked, top=top)
            for ef in (100, 200, 400):
                few = index.score(asked, top=top, ef=ef)
                found = (exact.indices[:, :, None] == few.indices[:, None]).any(2).double().mean()
                works = {
                    "scan": lambda asked=asked, top=top: index.score(asked, top=top),
                    "graph": lambda asked=asked, top=top, ef=ef: index.score(asked, top=top, ef=ef),
                }
                both = {name: median(some) for name, some in in_turns(works, REPEATS).items()}
                gain = both["scan"] - both["graph"]
                pays = f"{taken / gain:,.0f} questions" if gain > 0 else "never"
                print(
                    f"| {len(index):,} | {q} | {top} | {both['scan']:.3f} | {ef} | {both['graph']:.3f} | {found:.3f} | "
                    f"{pays} |",
                    flush=True,
                )


# --------------------------------------------------------------------------- memory


def small_rows(examples: int) -> tuple[ptif.Problem, tuple[Tensor, Tensor]]:
    """Many examples of few numbers each, so that nothing but their number can grow."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 8), nn.Tanh(), nn.Linear(8, 4))
    x, y = torch.randn(examples, 16), torch.arange(examples) % 4
    return ptif.Problem(model, ptif.CrossEntropy(), (x, y)), (torch.randn(8, 16), torch.arange(8) % 4)


def memory(folder: Path, examples: int) -> None:
    """The most memory of a process that builds, asks or takes self-influence, for growing indexes."""
    print("\nmemory: MLP 16-8-4, EK-FAC, factors in float32, files of 16 MB; 8 queries; the most that a process ever")
    print("held, and the same less the training data, which the program holds as tensors; seconds of the processor")
    print("| examples | data | on disk | work | most memory | less the data | seconds | us an example |")
    print("|---|---|---|---|---|---|---|---|")
    n = 10_000
    while n <= examples:
        for work in WORKS:
            ran = subprocess.run(
                [sys.executable, __file__, work, "--examples", str(n), "--folder", str(folder)],
                capture_output=True, text=True, check=True,
            )  # fmt: skip
            told = json.loads(ran.stdout.splitlines()[-1])
            data = n * (16 * 4 + 8) / 2**20 if work == WORKS[0] else 0.0
            name = {WORKS[0]: "build", "top": "score, top=100", "own": "self_influence"}[work]
            print(
                f"| {n:,} | {data:,.0f} MiB | {told['disk'] / 2**20:,.0f} MiB | {name} | {told['most']:,.0f} MiB | "
                f"{told['most'] - data:,.0f} MiB | {told['seconds']:.2f} | {1e6 * told['seconds'] / n:.1f} |",
                flush=True,
            )
        shutil.rmtree(folder / f"small-{n}")
        n *= 10


def one_work(folder: Path, work: str, examples: int) -> None:
    """One of the works of `memory`, and what the process held at most."""
    place = folder / f"small-{examples}"
    problem, queries = small_rows(examples if work == WORKS[0] else 8)
    if work == WORKS[0]:
        taken = seconds(lambda: ptif.Index.build(problem, place, shard="16MB"))
    else:
        index = ptif.Index.open(place, problem.model)
        taken = seconds(lambda: index.score(queries, top=100) if work == "top" else index.self_influence())
    disk = sum(path.stat().st_size for path in place.iterdir())
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(json.dumps({"most": most, "seconds": taken, "disk": disk}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("part", nargs="?", choices=["scan", "build", "fidelity", "memory", "graph", *WORKS])
    parser.add_argument("--examples", type=int, default=1_000_000)
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--folder", type=Path, default=None)
    parser.add_argument("--picture", type=Path, default=None, help="where the plot of `fidelity` goes")
    parser.add_argument(
        "--images", type=Path, default=None, help="a folder with the files of Fashion-MNIST, for `graph`"
    )
    parser.add_argument("--peers", action="store_true")
    given = parser.parse_args()
    global PEERS
    PEERS = given.peers
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    ptif.progress(False)
    with tempfile.TemporaryDirectory() as temporary:
        folder = given.folder or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        if given.part in (None, "scan"):
            scan(folder, given.examples, given.width)
        if given.part in (None, "build"):
            build(folder)
        if given.part in (None, "fidelity"):
            fidelity(folder, given.examples, given.picture)
        if given.part in (None, "memory"):
            memory(folder, given.examples)
        if given.part == "graph":
            graph(folder, given.images, given.examples)
        if given.part in WORKS:
            one_work(folder, given.part, given.examples)


if __name__ == "__main__":
    main()
