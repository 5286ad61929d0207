"""Files on disk: whole or absent, damage is refused, leftovers go, and what cannot be written is one sentence."""

from __future__ import annotations

import errno
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

from pytorch_influence_functions.classic.files import save_json, save_vectors
from pytorch_influence_functions.core import files
from pytorch_influence_functions.core.cache_folder import CacheFolder
from pytorch_influence_functions.core.errors import InvalidInput
from pytorch_influence_functions.core.fingerprint import Fingerprint, Probe
from pytorch_influence_functions.evaluation import Subsets, Truth
from pytorch_influence_functions.scores.scores import Scores

SOURCES = sorted((Path(__file__).parents[2] / "src").rglob("*.py"))


def scores() -> Scores:
    return Scores(torch.arange(6.0).reshape(2, 3) / 7, train_names=["a", "b", "é"], query_labels=[1, 2])


def truth() -> Truth:
    measured = torch.arange(12.0).reshape(2, 2, 3) / 7
    return Truth(Subsets.leave_one_out(5, [1, 2]), measured, measured[0], (0, 1), recipe="r", seconds=1.5)


# --------------------------------------------------------------------------- damage


@pytest.mark.parametrize(("save", "load"), [(scores().save, Scores.load), (truth().save, Truth.load)])
def test_a_flipped_bit_is_refused_wherever_it_is(save: Any, load: Any, tmp_path: Path) -> None:
    path, again = tmp_path / "f.safetensors", tmp_path / "again"
    save(path)
    whole = path.read_bytes()
    refused = 0
    for position in range(len(whole)):
        bit = 1 << (position % 8)
        path.write_bytes(whole[:position] + bytes([whole[position] ^ bit]) + whole[position + 1 :])
        try:
            loaded = load(path)
        except InvalidInput as error:
            assert "f.safetensors" in str(error) and "\n" not in str(error)
            refused += 1
        else:  # another spelling of the same content, such as a capital letter in a JSON escape
            loaded.save(again)
            assert again.read_bytes() == whole
    assert refused > 0.98 * len(whole)


def test_a_file_without_a_checksum_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "f.safetensors"
    scores().save(path)
    path.write_bytes(path.read_bytes().replace(b"checksum", b"checksun"))
    with pytest.raises(InvalidInput, match=r"f\.safetensors' is damaged: its checksum is not that of its contents"):
        Scores.load(path)


def test_a_truth_that_lacks_something_is_refused(tmp_path: Path) -> None:
    files.write_tensors(tmp_path / "t", "truth", {"measured": torch.ones(1, 1, 1)}, {"labels": []})
    with pytest.raises(InvalidInput, match="does not hold what measurements are made of"):
        Truth.load(tmp_path / "t")


def test_scores_of_another_run_are_refused_where_one_is_named(tmp_path: Path) -> None:
    scores().save(tmp_path / "s", "mine")
    assert torch.equal(Scores.load(tmp_path / "s").values, Scores.load(tmp_path / "s", "mine").values)
    with pytest.raises(InvalidInput, match="holds scores of another run"):
        Scores.load(tmp_path / "s", "other")


# --------------------------------------------------------------------------- writing


def full_disk(*arguments: Any) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


WRITERS: dict[str, Callable[[Path], Any]] = {
    "scores": lambda path: scores().save(path),
    "scores as JSON": lambda path: scores().to_json(path),
    "truth": lambda path: truth().save(path),
    "JSON of the old API": lambda path: save_json({"a": 1}, path),
    "bytes": lambda path: files.write_bytes(path, b"x"),
    "a new file": lambda path: files.write_new(path, b"x"),
}


@pytest.mark.parametrize("writer", WRITERS.values(), ids=WRITERS)
def test_a_full_disk_is_one_sentence_and_leaves_nothing(
    writer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "fsync", full_disk)
    with pytest.raises(InvalidInput, match=r"out/f' cannot be written to \(No space left on device\); give another"):
        writer(tmp_path / "out" / "f")
    assert os.listdir(tmp_path / "out") == []


@pytest.mark.parametrize("writer", [*WRITERS.values(), lambda path: save_vectors([torch.ones(2)], path)])
def test_a_place_that_is_no_folder_is_one_sentence(writer: Any, tmp_path: Path) -> None:
    (tmp_path / "out").touch()
    with pytest.raises(InvalidInput, match=r"out/f' cannot be written to \((Not a directory|File exists)\)"):
        writer(tmp_path / "out" / "f")


def test_a_library_that_fails_to_write_is_the_same_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments: Any, **options: Any) -> None:
        raise files.SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(files, "save_file", fail)
    with pytest.raises(InvalidInput, match=r"cannot be written to \(Error while serializing.*No space left on device"):
        scores().save(tmp_path / "f")
    assert os.listdir(tmp_path) == []


def test_of_several_that_write_a_new_file_exactly_one_does(tmp_path: Path) -> None:
    with ThreadPoolExecutor(8) as pool:
        written = list(pool.map(lambda i: files.write_new(tmp_path / "f", b"%d" % i), range(40)))
    assert sum(written) == 1 and (tmp_path / "f").read_bytes() == b"%d" % written.index(True)
    assert os.listdir(tmp_path) == ["f"]


def test_a_file_system_without_links_has_new_files_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: Any) -> None:
        raise OSError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "link", refuse)
    assert files.write_new(tmp_path / "f", b"1") and not files.write_new(tmp_path / "f", b"2")
    assert (tmp_path / "f").read_bytes() == b"1" and os.listdir(tmp_path) == ["f"]


OTHER_WRITERS = re.compile(
    r"os\.replace\(|os\.rename\(|save_file\(|\.write_text\(|\.write_bytes\(|\.savefig\((?!buffer)|open\([^)]*[\"'][wax]b?\+?[\"']"
)


def test_there_is_one_writer_of_files() -> None:
    lines = [
        f"{path.name}: {line.strip()}"
        for path in SOURCES
        if path.name != "files.py" or path.parent.name != "core"
        for line in path.read_text(encoding="utf-8").splitlines()
        if OTHER_WRITERS.search(line)
    ]
    assert lines == []


# --------------------------------------------------------------------------- leftovers


def test_what_a_killed_process_left_is_removed_and_nothing_else(tmp_path: Path) -> None:
    code = (
        "import os, signal, sys; from pytorch_influence_functions.core.files import replacing\n"
        "with replacing(sys.argv[1]) as path:\n"
        "    path.write_text('half'); (path.parent / '.tmpabc').touch(); os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "f")], env=environment)
    (left,) = tmp_path.iterdir()
    assert left.name.startswith(".f.") and left.name.endswith(".part")
    running = re.sub(r"-[0-9]+-", f"-{os.getpid()}-", left.name)
    others = [".mine.part", "a.tmp", running]
    for name in others:
        (tmp_path / name).mkdir()
    files.remove_leftovers(tmp_path)
    assert sorted(os.listdir(tmp_path)) == sorted(others)


def test_on_another_machine_a_process_is_given_a_day(tmp_path: Path) -> None:
    old, new = (tmp_path / f".f.000000-{number}-00000000.part" for number in (1, 2))
    for path in (old, new):
        path.mkdir()
    os.utime(old, (time.time() - 2 * 86400,) * 2)
    files.remove_leftovers(tmp_path)
    files.remove_leftovers(tmp_path / "nowhere")
    assert list(tmp_path.iterdir()) == [new]


# --------------------------------------------------------------------------- locks


def test_two_do_not_write_to_one_folder(tmp_path: Path) -> None:
    refused = pytest.raises(
        InvalidInput, match=r"Another process is writing to .*out' \(process \d+ on .* since .*\); wait until it ends"
    )
    with files.locked(tmp_path / "out"), files.locked(tmp_path / "out", ".other"), refused:
        files.locked(tmp_path / "out").__enter__()
    with files.locked(tmp_path / "out"):
        pass
    assert os.listdir(tmp_path / "out") == []


def test_a_folder_that_can_only_be_read_needs_no_lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: Any) -> int:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(os, "open", refuse)
    with files.locked(tmp_path):
        pass


def test_the_lock_of_a_killed_process_is_free(tmp_path: Path) -> None:
    (tmp_path / ".lock").write_text("left behind")
    with files.locked(tmp_path):
        pass


# --------------------------------------------------------------------------- places of fingerprints


def made(loss: int, output: float = 1.0) -> Fingerprint:
    return Fingerprint.of({"loss": loss, "data": 3}, {"outputs": Probe.of([(output, 1.0)], 1e-4)})


def test_each_fingerprint_has_its_place_and_says_what_differs(tmp_path: Path) -> None:
    first, other = CacheFolder.of(tmp_path, made(1)), CacheFolder.of(tmp_path, made(2))
    assert first.path != other.path and (first.differs, other.differs) == ((), ("loss",))
    assert CacheFolder.of(tmp_path, made(2)) == CacheFolder(other.path, other.identity)
    near, far = CacheFolder.of(tmp_path, made(1, 1 + 1e-6)), CacheFolder.of(tmp_path, made(1, 1.1))
    assert (near.path, near.identity) == (first.path, first.identity)
    assert far.path.name == f"{first.path.name}-1" and far.differs == ("outputs",)
    assert CacheFolder.of(tmp_path, made(1, 1.1)).path == far.path


def test_a_place_whose_record_is_damaged_is_not_used(tmp_path: Path) -> None:
    first = CacheFolder.of(tmp_path, made(1))
    (first.path / "fingerprint.json").write_text("{")
    again = CacheFolder.of(tmp_path, made(1))
    assert again.path != first.path and CacheFolder.of(tmp_path, made(1)).path == again.path
