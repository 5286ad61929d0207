"""Saved scores: bit for bit, the same bytes for the same result, never half a file, never pickle."""

from __future__ import annotations

import json
import os
import pickle
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from pytorch_influence_functions.core import files
from pytorch_influence_functions.core.errors import InvalidInput
from pytorch_influence_functions.scores.diagnostics import Diagnostics
from pytorch_influence_functions.scores.scores import Scores


def full(dtype: torch.dtype = torch.float32) -> Scores:
    torch.manual_seed(3)
    return Scores(
        torch.randn(3, 7, dtype=dtype),
        lower_is_better=False,
        train_labels=torch.arange(7),
        query_labels=["a", 2, 0.5],
        train_names=[f"é{i}" for i in range(7)],
        query_names=["x", "y", "z"],
        class_names=["α", "β"],
        query_ids=torch.tensor([9, 4, 7]),
        diagnostics=Diagnostics(method="dual()", damping=0.1 + 0.2, gradient_shares={"w": 1 / 3}, notes=("n",)),
        provenance="dual() 1.0",
        train_source=object(),
    )


def assert_same(a: Scores, b: Scores) -> None:
    for name in ("values", "indices", "query_ids", "train_labels", "query_labels"):
        one, two = getattr(a, name), getattr(b, name)
        assert type(one) is type(two)
        if isinstance(one, torch.Tensor):
            assert one.dtype == two.dtype and torch.equal(one, two)
        else:
            assert one == two
    for name in ("lower_is_better", "n_train", "train_names", "query_names", "class_names", "provenance"):
        assert getattr(a, name) == getattr(b, name)
    assert a.diagnostics.to_dict() == b.diagnostics.to_dict()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
def test_round_trip_is_bit_exact(tmp_path: Path, dtype: torch.dtype) -> None:
    s = full(dtype)
    s.values[0, 0] = -0.0
    s.save(tmp_path / "s.safetensors")
    back = Scores.load(tmp_path / "s.safetensors")
    assert_same(s, back)
    assert torch.signbit(back.values[0, 0]) and back.train_source is None
    assert back.harmful(1, 3) == s.harmful(1, 3)


@pytest.mark.parametrize("part", [lambda s: s.top(2), lambda s: s[1], lambda s: s[:, [5, 1]], lambda s: s.mean()])
def test_parts_round_trip_too(tmp_path: Path, part: Any) -> None:
    s = part(full())
    s.save(tmp_path / "s")
    assert_same(s, Scores.load(tmp_path / "s"))


def test_plain_scores_round_trip(tmp_path: Path) -> None:
    s = Scores(torch.zeros(1, 2))
    s.save(str(tmp_path / "s"))
    assert_same(s, Scores.load(str(tmp_path / "s")))


def test_equal_scores_are_equal_bytes_in_every_process(tmp_path: Path) -> None:
    full().save(tmp_path / "a")
    full().save(tmp_path / "b")
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    # Several header keys would come in random order; one key cannot.
    size = int.from_bytes((tmp_path / "a").read_bytes()[:8], "little")
    header = json.loads((tmp_path / "a").read_bytes()[8 : 8 + size])
    assert list(header["__metadata__"]) == ["pytorch_influence_functions"]
    assert json.loads(header["__metadata__"]["pytorch_influence_functions"])["format"] == files.FORMAT
    Scores.load(tmp_path / "a").save(tmp_path / "c")
    assert (tmp_path / "a").read_bytes() == (tmp_path / "c").read_bytes()
    changed = full()
    changed.values[2, 6] += 1e-3
    changed.save(tmp_path / "d")
    assert (tmp_path / "a").read_bytes() != (tmp_path / "d").read_bytes()


def test_a_crash_leaves_the_old_file_and_no_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "s"
    full().save(path)
    before = path.read_bytes()

    def crash(handle: int) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", crash)
    with pytest.raises(KeyboardInterrupt):
        Scores(torch.ones(1, 2)).save(path)
    assert path.read_bytes() == before and os.listdir(tmp_path) == ["s"]


def test_it_is_synced_before_it_is_renamed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[str] = []
    fsync, rename = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda h: (done.append("sync"), fsync(h))[1])
    monkeypatch.setattr(os, "replace", lambda a, b: (done.append("rename"), rename(a, b))[1])
    full().save(tmp_path / "s")
    assert done[:2] == ["sync", "rename"]


def test_the_file_is_as_readable_as_any(tmp_path: Path) -> None:
    full().save(tmp_path / "s")
    (tmp_path / "other").touch()
    assert (tmp_path / "s").stat().st_mode == (tmp_path / "other").stat().st_mode


def other_tensors(path: Path) -> None:
    safetensors.torch.save_file({"x": torch.ones(2)}, path)


def later_version(path: Path) -> None:
    record = json.dumps({"format": 99, "kind": "scores", "record": {}})
    safetensors.torch.save_file({"x": torch.ones(2)}, path, metadata={"pytorch_influence_functions": record})


def other_kind(path: Path) -> None:
    files.write_tensors(path, "index", {"x": torch.ones(2)}, {})


def not_scores(path: Path) -> None:
    files.write_tensors(path, "scores", {"x": torch.ones(2)}, {"diagnostics": {}})


def cut(path: Path) -> None:
    full().save(path)
    path.write_bytes(path.read_bytes()[:-5])


WRONG: dict[str, tuple[Any, str]] = {
    "pickle": (lambda p: p.write_bytes(pickle.dumps({"a": 1})), "is not a file of saved scores"),
    "text": (lambda p: p.write_text("hello"), "is not a file of saved scores"),
    "empty": (lambda p: p.touch(), "is not a file of saved scores"),
    "folder": (lambda p: p.mkdir(), r"is a folder; give the path of a file that save\(\) wrote\.$"),
    "folder of scores": (
        lambda p: full().save(p / "scores.safetensors"),
        r"is a folder; give .*, such as '.*scores\.safetensors'\.$",
    ),
    "cut": (cut, "is not a file of saved scores, or is damaged"),
    "other tensors": (other_tensors, "is a safetensors file, but not one of saved scores"),
    "later version": (later_version, "has file format 99 and this version reads 2"),
    "other kind": (other_kind, "holds index, not scores"),
    "not scores": (not_scores, "does not hold what scores are made of"),
    "nothing": (lambda p: None, "There is no file"),
}


@pytest.mark.parametrize("name", WRONG)
def test_loading_something_else_is_one_clear_sentence(tmp_path: Path, name: str) -> None:
    make, match = WRONG[name]
    path = tmp_path / "file.safetensors"
    make(path)
    with pytest.raises(InvalidInput, match=match) as caught:
        Scores.load(path)
    assert "file.safetensors" in str(caught.value) and "\n" not in str(caught.value)


def test_labels_that_are_no_words_are_refused_and_nothing_is_written(tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match=r"These scores cannot be saved: .*complex"):
        Scores(torch.zeros(1, 2), train_labels=[1j, 2j]).save(tmp_path / "s")
    assert os.listdir(tmp_path) == []
