"""The bundled images are what their description says, and the planted errors are exactly known."""

from __future__ import annotations

import hashlib
import importlib.util
import os
from pathlib import Path

import numpy as np
import pytest
import torch

from pytorch_influence_functions.demo import data as demo

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def data() -> demo.DemoData:
    return demo.load()


def test_shapes_and_types(data: demo.DemoData) -> None:
    assert data.train_images.shape == (2000, 28, 28) and data.train_images.dtype == np.uint8
    assert data.test_images.shape == (500, 28, 28) and data.test_images.dtype == np.uint8
    for labels in (data.train_labels, data.true_labels, data.test_labels):
        assert labels.dtype == np.int64
    assert data.planted.dtype == bool and len(data.class_names) == 10


def test_classes_are_balanced(data: demo.DemoData) -> None:
    assert np.bincount(data.true_labels).tolist() == [200] * 10
    assert np.bincount(data.test_labels).tolist() == [50] * 10


def test_order_is_mixed(data: demo.DemoData) -> None:
    # Sorted by class, a first batch would hold one class only.
    assert len(set(data.true_labels[:40].tolist())) == 10 and len(set(data.test_labels[:40].tolist())) == 10


def test_no_image_twice(data: demo.DemoData) -> None:
    assert len(set(data.train_index.tolist())) == 2000 and data.train_index.max() < 60_000
    assert len(set(data.test_index.tolist())) == 500 and data.test_index.max() < 10_000
    # An image in both parts would make its own influence the whole story.
    seen = {image.tobytes() for image in data.train_images}
    assert not any(image.tobytes() in seen for image in data.test_images)


def test_exactly_two_hundred_labels_are_wrong(data: demo.DemoData) -> None:
    assert int(data.planted.sum()) == 200
    assert np.array_equal(data.train_labels != data.true_labels, data.planted)
    assert data.train_labels.min() == 0 and data.train_labels.max() == 9
    # Wrong in many ways, not all moved by the same step.
    steps = (data.train_labels - data.true_labels)[data.planted] % 10
    assert set(steps.tolist()) == set(range(1, 10))


def test_the_same_labels_are_wrong_everywhere(data: demo.DemoData) -> None:
    digest = hashlib.sha256(data.train_labels.astype("<i8").tobytes()).hexdigest()
    assert digest[:16] == "ec72e7f043182876"


def test_loading_twice_gives_the_same(data: demo.DemoData) -> None:
    again = demo.load()
    assert np.array_equal(again.train_labels, data.train_labels)
    assert np.array_equal(again.train_images, data.train_images)


@pytest.mark.parametrize("count", [0, 1, 30])
def test_mislabel_changes_as_many_as_asked(count: int) -> None:
    labels = np.arange(30) % 3
    wrong, planted = demo.mislabel(labels, count=count, classes=3, seed=5)
    assert int((wrong != labels).sum()) == int(planted.sum()) == count
    assert labels.tolist() == (np.arange(30) % 3).tolist()  # the caller's array is left alone
    assert wrong.min() >= 0 and wrong.max() < 3


def test_mislabel_follows_its_seed() -> None:
    labels = np.arange(100) % 10
    first, second = (demo.mislabel(labels, 10, 10, seed)[0] for seed in (1, 2))
    assert not np.array_equal(first, second)


def test_datasets(data: demo.DemoData) -> None:
    train, test = demo.datasets()
    images, labels = train.tensors
    assert images.shape == (2000, 1, 28, 28) and images.dtype == torch.float32
    assert float(images.min()) == 0.0 and float(images.max()) == 1.0
    assert torch.equal((images.squeeze(1) * 255).round().to(torch.uint8), torch.from_numpy(data.train_images))
    assert labels.tolist() == data.train_labels.tolist()  # with the wrong ones
    assert test.tensors[1].tolist() == data.test_labels.tolist()
    assert train.classes == test.classes == data.class_names


def test_repr_says_what_it_is(data: demo.DemoData) -> None:
    assert repr(data) == (
        "DemoData(2000 training images, 200 of them mislabelled on purpose; 500 test images; 10 classes)"
    )


def test_file_is_small_and_licensed() -> None:
    assert demo.FILE.stat().st_size <= 2_000_000
    licence = demo.FILE.with_name("DATA_LICENSE").read_text(encoding="utf-8")
    assert "Zalando SE" in licence and "MIT" in licence


@pytest.mark.skipif("FASHION_MNIST" not in os.environ, reason="set FASHION_MNIST to the folder of the IDX files")
def test_rebuilding_gives_the_same_arrays(tmp_path: Path) -> None:
    spec = importlib.util.spec_from_file_location("build_demo_data", ROOT / "scripts/build_demo_data.py")
    assert spec is not None and spec.loader is not None
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    script.build(Path(os.environ["FASHION_MNIST"]), tmp_path / "again.npz")
    with np.load(tmp_path / "again.npz") as again, np.load(demo.FILE) as shipped:
        assert set(again.files) == set(shipped.files)
        assert all(np.array_equal(again[name], shipped[name]) for name in shipped.files)
