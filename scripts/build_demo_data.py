"""Rebuild the image data that ships inside the package: a class-balanced part of Fashion-MNIST.

Debian packages the whole data set, so no download from anywhere else is needed:

    apt-get update
    apt-get download dataset-fashion-mnist
    dpkg -x dataset-fashion-mnist_*.deb unpacked
    python scripts/build_demo_data.py unpacked/usr/share/datasets/fashion-mnist

The output is a pure function of the input: the same bytes every time, so a rebuild shows no difference.
"""

from __future__ import annotations

import argparse
import gzip
from pathlib import Path

import numpy as np

TRAIN, TEST, SEED = 2000, 500, 20170825
TARGET = Path(__file__).parents[1] / "src/pytorch_influence_functions/demo/fashion_mnist.npz"


def read_idx(path: Path) -> np.ndarray:
    """Read one gzipped IDX file: two zero bytes, type, number of axes, big-endian sizes, then the values."""
    raw = gzip.decompress(path.read_bytes())
    if raw[:3] != b"\0\0\x08":
        raise ValueError(f"{path} is not an IDX file of unsigned bytes: it begins with {raw[:4].hex()}.")
    sizes = np.frombuffer(raw, ">u4", count=raw[3], offset=4)
    return np.frombuffer(raw, np.uint8, offset=4 + 4 * raw[3]).reshape(sizes)


def balanced(labels: np.ndarray, count: int, random: np.random.RandomState) -> np.ndarray:
    """Choose `count` indices, equally many of every class, in random order."""
    classes = np.unique(labels)
    share, rest = divmod(count, len(classes))
    if rest:
        raise ValueError(f"{count} examples cannot be divided equally among {len(classes)} classes.")
    chosen = [random.choice(np.flatnonzero(labels == c), share, replace=False) for c in classes]
    return random.permutation(np.concatenate(chosen))


def build(folder: Path, target: Path = TARGET) -> None:
    """Write `target` from the four IDX files in `folder`."""
    # RandomState, not default_rng: numpy promises that its stream never changes.
    random = np.random.RandomState(SEED)
    arrays: dict[str, np.ndarray] = {}
    for part, prefix, count in (("train", "train", TRAIN), ("test", "t10k", TEST)):
        images = read_idx(folder / f"{prefix}-images-idx3-ubyte.gz")
        labels = read_idx(folder / f"{prefix}-labels-idx1-ubyte.gz")
        index = balanced(labels, count, random)
        arrays[f"{part}_images"] = images[index]
        arrays[f"{part}_labels"] = labels[index]
        arrays[f"{part}_index"] = index.astype(np.uint16)
    np.savez_compressed(target, **arrays)  # type: ignore[arg-type]  # arrays are arrays, not the flag
    print(f"{target}: {target.stat().st_size / 1e6:.2f} MB")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="folder with the four *-ubyte.gz files")
    parser.add_argument("--output", type=Path, default=TARGET)
    arguments = parser.parse_args()
    build(arguments.folder, arguments.output)
