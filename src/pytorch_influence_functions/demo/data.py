"""The bundled images, and the labels that are wrong on purpose.

A class-balanced part of Fashion-MNIST: 2,000 training and 500 test images of clothes, 28×28 grey values.
Licence: see `DATA_LICENSE` beside this file. `scripts/build_demo_data.py` rebuilds the file.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Int64, UInt8
from torch import Tensor
from torch.utils.data import TensorDataset

FILE = Path(__file__).with_name("fashion_mnist.npz")
CLASSES = (
    "T-shirt/top",
    "Trouser",
    "Pullover",
    "Dress",
    "Coat",
    "Sandal",
    "Shirt",
    "Sneaker",
    "Bag",
    "Ankle boot",
)
PLANTED = 200
"""How many of the 2,000 training labels are made wrong."""
SEED = 42


@dataclass(frozen=True, eq=False, repr=False)
class DemoData:
    """Images, labels of which some are wrong, and the true labels that the demo is checked against.

    `train_labels` differs from `true_labels` exactly where `planted` is True. `train_index` and
    `test_index` are the positions in the original Fashion-MNIST files.

    >>> data = load()
    >>> data
    DemoData(2000 training images, 200 of them mislabelled on purpose; 500 test images; 10 classes)
    >>> bool(((data.train_labels != data.true_labels) == data.planted).all())
    True
    """

    train_images: UInt8[np.ndarray, "n 28 28"]
    train_labels: Int64[np.ndarray, " n"]
    true_labels: Int64[np.ndarray, " n"]
    planted: Bool[np.ndarray, " n"]
    train_index: Int64[np.ndarray, " n"]
    test_images: UInt8[np.ndarray, "m 28 28"]
    test_labels: Int64[np.ndarray, " m"]
    test_index: Int64[np.ndarray, " m"]
    class_names: tuple[str, ...] = CLASSES

    def __repr__(self) -> str:
        return (
            f"DemoData({len(self.train_images)} training images, {int(self.planted.sum())} of them "
            f"mislabelled on purpose; {len(self.test_images)} test images; {len(self.class_names)} classes)"
        )


class ImageDataset(TensorDataset):
    """A `TensorDataset` of (image, label) with its class names in `classes`, as torchvision's datasets have them."""

    def __init__(self, images: Tensor, labels: Tensor, classes: tuple[str, ...]) -> None:
        super().__init__(images, labels)
        self.classes = classes


class DemoDatasets(NamedTuple):
    """The result of `datasets()`: unpack it, or use the names."""

    train: ImageDataset
    test: ImageDataset


def mislabel(
    labels: Int64[np.ndarray, " n"], count: int, classes: int, seed: int
) -> tuple[Int64[np.ndarray, " n"], Bool[np.ndarray, " n"]]:
    """Move exactly `count` labels, chosen by `seed`, each to a class drawn uniformly from the other ones.

    Returns the new labels and the mask of those that changed.

    >>> wrong, planted = mislabel(np.arange(10), count=3, classes=10, seed=0)
    >>> int(planted.sum()), bool(((wrong != np.arange(10)) == planted).all())
    (3, True)
    """
    # RandomState, not default_rng: numpy promises that its stream never changes, so the same labels are wrong
    # on every machine and under every version.
    random = np.random.RandomState(seed)
    changed = random.permutation(len(labels))[:count]
    wrong = labels.copy()
    # A step of 1 … classes − 1 around the circle of classes can never lead back to the true one.
    wrong[changed] = (wrong[changed] + random.randint(1, classes, size=count)) % classes
    planted = np.zeros(len(labels), dtype=bool)
    planted[changed] = True
    return wrong, planted


def load() -> DemoData:
    """Read the bundled images. 10 % of the training labels (200) are wrong, the same ones every time.

    Images are uint8 grey values 0 … 255, `[n, 28, 28]`, the garment light on a black ground.
    """
    with np.load(FILE, allow_pickle=False) as file:
        truth = file["train_labels"].astype(np.int64)
        labels, planted = mislabel(truth, PLANTED, len(CLASSES), SEED)
        return DemoData(
            train_images=file["train_images"],
            train_labels=labels,
            true_labels=truth,
            planted=planted,
            train_index=file["train_index"].astype(np.int64),
            test_images=file["test_images"],
            test_labels=file["test_labels"].astype(np.int64),
            test_index=file["test_index"].astype(np.int64),
        )


def datasets(data: DemoData | None = None) -> DemoDatasets:
    """Training and test set for torch: float images `[1, 28, 28]` in [0, 1], labels int64.

    The training labels include the wrong ones.

    >>> train, test = datasets()
    >>> len(train), len(test), train[0][0].shape, test.classes[9]
    (2000, 500, torch.Size([1, 28, 28]), 'Ankle boot')
    """
    data = load() if data is None else data

    def dataset(images: UInt8[np.ndarray, "k 28 28"], labels: Int64[np.ndarray, " k"]) -> ImageDataset:
        pixels = torch.from_numpy(images).unsqueeze(1).float() / 255
        return ImageDataset(pixels, torch.from_numpy(labels), data.class_names)

    return DemoDatasets(
        train=dataset(data.train_images, data.train_labels), test=dataset(data.test_images, data.test_labels)
    )
