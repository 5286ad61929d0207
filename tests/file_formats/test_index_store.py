"""The folder of an index: killed, damaged, full, locked, read-only, or of something else."""

from __future__ import annotations

import errno
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import pytorch_influence_functions as ptif
from pytorch_influence_functions.core import files
from pytorch_influence_functions.core.errors import InvalidInput
from pytorch_influence_functions.gradients.sketches import random_words
from pytorch_influence_functions.store import Factors, Sketch, TwoSided
from pytorch_influence_functions.store.examples import hash_examples
from pytorch_influence_functions.store.manifest import MANIFEST
from pytorch_influence_functions.store.shard_files import map_file, write_file
from tests.covering import FULL

needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork")


def problem_of(n: int = 40) -> ptif.Problem:
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(n, 6, generator=generator), torch.arange(n) % 3
    model = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3))
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape, generator=generator) / 3)
    return ptif.Problem(model, ptif.CrossEntropy(), (x, y))


def build(folder: Path, problem: ptif.Problem | None = None, **settings: Any) -> ptif.Index:
    with ptif.progress(False):
        return ptif.Index.build(
            problem or problem_of(), folder, **{"representation": TwoSided(3), "dtype": "int8", "shard": 400} | settings
        )


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def queries() -> tuple[Tensor, Tensor]:
    return torch.ones(2, 6), torch.tensor([0, 1])


# --------------------------------------------------------------------------- killed


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.uint8, torch.bool, torch.bfloat16], ids=str)
def test_digests_notice_every_change_and_nothing_else(dtype: torch.dtype) -> None:
    """Against whole numbers of any length, and with the changes that sums of words notice least: single bits."""
    generator = torch.Generator().manual_seed(0)
    x = (torch.rand(6, 3, 5, generator=generator) * 2).to(dtype)
    y = torch.arange(6)
    digests = hash_examples((x, y), 6)
    assert torch.equal(hash_examples((x[2:5].clone(), y[2:5]), 3), digests[2:5])  # of no neighbour
    assert len(set(digests.tolist())) == 6
    content = x[4].reshape(-1).view(torch.uint8).numpy().tobytes()
    total = 0
    for where, raw in (("[0]", content), ("[1]", y[4:5].numpy().tobytes())):
        words = [int.from_bytes(raw[i : i + 4], "little") for i in range(0, len(raw), 4)]
        factors = random_words(len(words), "digest of an example", where).tolist()
        total += sum(w * (f | 1) for w, f in zip(words, factors, strict=True))
        shape, kind = ((3, 5), dtype) if where == "[0]" else ((), y.dtype)
        total += int(random_words(1, "place", where, kind, shape)[0])
    assert digests[4].item() % 2**64 == total % 2**64
    assert (hash_examples((x.reshape(6, 5, 3), y), 6) != digests).all()
    bits = x.reshape(6, -1).view(torch.uint8)
    for flipped in ([0], [3], [3, 7], [0, 4, 8]):  # 3 and 7: the signs of two numbers in float32
        bits[1, flipped] ^= 1 if dtype == torch.bool else 128
        assert (hash_examples((x, y), 6) != digests).nonzero().flatten().tolist() == [1]
        bits[1, flipped] ^= 1 if dtype == torch.bool else 128


def test_a_file_is_one_that_the_library_reads(tmp_path: Path) -> None:
    """Also where tensors come in parts."""
    tensors = {
        "a": torch.arange(12, dtype=torch.int8).reshape(4, 3),
        "b": torch.randn(4, 2, dtype=torch.float64),
        "empty": torch.empty(4, 0),
        "half": torch.randn(4, 5).to(torch.bfloat16),
    }
    whole = write_file(tmp_path, "whole", tensors, {"x": 1})
    parts = write_file(tmp_path, "whole", {k: [v[:1], v[1:1], v[1:]] for k, v in tensors.items()}, {"x": 1})
    assert whole == parts and (tmp_path / whole.name).stat().st_size == whole.bytes
    for read in (load_file(tmp_path / whole.name), map_file(tmp_path, whole, verify=True).tensors):
        assert read.keys() == tensors.keys()
        assert all(read[k].dtype == v.dtype and torch.equal(read[k], v) for k, v in tensors.items())


def test_what_is_in_the_folder(tmp_path: Path) -> None:
    index = build(tmp_path)
    names = list(contents(tmp_path))
    assert names[0].startswith("basis-") and names[1] == "index.json" and len(names) > 4
    assert all(name.startswith("rows-") and name.endswith(".safetensors") for name in names[2:])
    manifest = json.loads((tmp_path / MANIFEST).read_text())
    assert manifest["kind"] == "gradient index" and manifest["format"] == 3 and manifest["complete"]
    assert [s["first"] for s in manifest["shards"]] == [0, *[s["stop"] for s in manifest["shards"]][:-1]]
    assert sum(len(index.folder.read(s.file).tensors["hashes"]) for s in index.folder.manifest.shards) == 40


def test_the_same_build_gives_the_same_bytes_and_does_nothing_twice(tmp_path: Path) -> None:
    build(tmp_path / "a")
    build(tmp_path / "b")
    assert contents(tmp_path / "a") == contents(tmp_path / "b")
    times = {path: path.stat().st_mtime_ns for path in (tmp_path / "a").iterdir()}
    build(tmp_path / "a")
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "a").iterdir()} == times


@pytest.mark.parametrize("representation", [TwoSided(3), Factors()], ids=repr)
def test_stopped_at_any_file_it_goes_on_and_ends_with_the_same_bytes(
    representation: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    replace, total = os.replace, 0

    def counting(a: Any, b: Any) -> None:
        nonlocal total
        total += 1
        replace(a, b)

    monkeypatch.setattr(os, "replace", counting)
    build(tmp_path / "whole", representation=representation)
    expected = contents(tmp_path / "whole")
    assert total == 3 + 2 * (len(expected) - 2)
    for stop in range(total):
        calls = 0

        def stopping(a: Any, b: Any, stop: int = stop) -> None:
            nonlocal calls
            calls += 1
            if calls > stop:
                raise KeyboardInterrupt
            replace(a, b)

        folder = tmp_path / str(stop)
        monkeypatch.setattr(os, "replace", stopping)
        with pytest.raises(KeyboardInterrupt):
            build(folder, representation=representation)
        monkeypatch.setattr(os, "replace", replace)
        build(folder, representation=representation)
        assert contents(folder) == expected


def kill_at(moment: float, folder: Path, problem: ptif.Problem, keeps: Any) -> None:
    """Build in another process that is killed after so many seconds."""
    child = os.fork()
    if child == 0:
        try:
            build(folder, problem, representation=keeps)
        finally:
            os._exit(0)
    time.sleep(moment)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)


def survive(kills: int, tmp_path: Path) -> int:
    """Kill builds at random moments, twice each, finish them, compare; how many had been under way."""
    # Forty shards: most of the time files are being written.
    problem, moments, interrupted = problem_of(400), random.Random(0), 0
    wholes: dict[str, tuple[float, dict[str, bytes]]] = {}
    for number in range(kills):
        keeps = (TwoSided(3), Factors(), Sketch(9))[number % 3]
        folder, whole = tmp_path / f"killed-{number}", tmp_path / repr(keeps)
        if not whole.exists():
            start = time.perf_counter()
            build(whole, problem, representation=keeps)
            wholes[repr(keeps)] = time.perf_counter() - start, contents(whole)
        took, expected = wholes[repr(keeps)]
        for _ in range(2):
            kill_at(moments.uniform(0, took), folder, problem, keeps)
            interrupted += folder.exists() and contents_or_none(folder) != expected
        build(folder, problem, representation=keeps)
        assert contents(folder) == expected
        shutil.rmtree(folder)
    return interrupted


def contents_or_none(folder: Path) -> dict[str, bytes] | None:
    try:
        return contents(folder)
    except IsADirectoryError:
        return None


@needs_fork
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_killed_at_random_moments_it_goes_on_and_ends_with_the_same_bytes(tmp_path: Path) -> None:
    """20 kills, or 200 with PTIF_KILLS=100; every moment between two files is gone through by the test above."""
    kills = int(os.environ.get("PTIF_KILLS", "100" if FULL else "10"))
    interrupted = survive(kills, tmp_path)
    print(f"{2 * kills} kills, {interrupted} of them while something was half done")
    assert interrupted > kills // 4


# --------------------------------------------------------------------------- of something else


def test_data_model_and_settings_that_changed_are_named(tmp_path: Path) -> None:
    problem = problem_of()
    x, y = problem.data.dataset.tensors
    build(tmp_path)
    refused = r"holds an index that differs in {}; give another folder, or overwrite=True to replace it"
    for settings, name in (
        ({"representation": TwoSided(2)}, "representation"),
        ({"dtype": "float16"}, "dtype"),
        ({"method": ptif.methods.kfac()}, "method"),
        ({"shard": 300}, "shard"),
        ({"problem": problem.with_(objective=nn.CrossEntropyLoss(label_smoothing=0.1))}, "loss"),
        ({"problem": problem.with_(weight_decay=0.1)}, "weight decay"),
        ({"problem": problem.with_(data=(x[:30], y[:30]))}, "training data"),
        ({"problem": problem.with_(parameters="0")}, "parameters, weight decay"),
    ):
        with pytest.raises(InvalidInput, match=refused.format(name)):
            build(tmp_path, **settings)
    with torch.no_grad():
        problem.model[0].weight[0, 0] += 1
    with pytest.raises(InvalidInput, match=refused.format("weights")):
        build(tmp_path, problem)
    before = contents(tmp_path)
    build(tmp_path, problem, overwrite=True)
    assert contents(tmp_path) != before and len(contents(tmp_path)) == len(before)


def test_every_example_is_compared_with_what_is_stored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    problem = problem_of(200)
    x, y = problem.data.dataset.tensors
    other = x.clone()
    other[77] += 1e-6
    build(tmp_path, problem, data=(x, y))
    with pytest.raises(InvalidInput, match=r"Example 77 is not what it was when the index was built \(1 of 10 in its"):
        build(tmp_path, problem, data=(other, y))
    with pytest.raises(InvalidInput, match=r"The data end at example 180 and .* holds 200; give all of the data"):
        build(tmp_path, problem, data=(x[:180], y[:180]))
    with pytest.raises(InvalidInput, match=r"hold 10 examples from|hold more examples"):
        build(tmp_path, problem, data=(torch.cat([x, x]), torch.cat([y, y])))


def test_an_interrupted_append_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    x, y = problem_of(60).data.dataset.tensors
    for name in ("whole", "stopped"):
        build(tmp_path / name)
    build(tmp_path / "whole").append((x, y))
    expected, replace, calls = contents(tmp_path / "whole"), os.replace, 0

    def stopping(a: Any, b: Any) -> None:
        nonlocal calls
        calls += 1
        if calls > 5:
            raise KeyboardInterrupt
        replace(a, b)

    index = build(tmp_path / "stopped")
    monkeypatch.setattr(os, "replace", stopping)
    with pytest.raises(KeyboardInterrupt):
        index.append((x, y))
    monkeypatch.setattr(os, "replace", replace)
    half = ptif.Index.open(tmp_path / "stopped", problem_of())
    with pytest.raises(InvalidInput, match=r"was not built to its end: 60 examples are stored; call Index.build"):
        half.score(queries())
    with pytest.raises(InvalidInput, match=r"Example 40 is not what it was"):
        half.append((x + 1, y))
    half.append((x, y))
    assert contents(tmp_path / "stopped") == expected


# --------------------------------------------------------------------------- damaged


def rows_of(folder: Path) -> list[Path]:
    return sorted(folder.glob("rows-*"))


def test_a_flipped_bit_is_noticed(tmp_path: Path) -> None:
    build(tmp_path)
    index = ptif.Index.open(tmp_path, problem_of().model)
    path = rows_of(tmp_path)[1]
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)
    with pytest.raises(InvalidInput, match=r"rows-.* is damaged: its contents are not those that were written"):
        index.score(queries())
    assert index.score(queries(), ids=slice(3)).shape == (2, 3)
    assert ptif.Index.open(tmp_path, problem_of().model, check=False).score(queries()).shape == (2, 40)


def test_a_file_that_was_cut_off_or_is_missing_is_noticed(tmp_path: Path) -> None:
    build(tmp_path)
    first, second = rows_of(tmp_path)[:2]
    first.write_bytes(first.read_bytes()[:-7])
    index = ptif.Index.open(tmp_path, problem_of().model)
    with pytest.raises(InvalidInput, match=r"has .* bytes and was written with .*, so it was cut off or replaced"):
        index.score(queries())
    second.unlink()
    with pytest.raises(InvalidInput, match=r"is missing from the index; open the index again if it was changed"):
        index.score(queries(), ids=[15])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda m: m.update(format=99),
            "has format 99 and this version reads 3; read it with pytorch_influence_",
        ),
        (
            lambda m: (m.update(format=2), m["facts"]["representation"].update(kind="Sketch")),
            "has sketches of format 2 and this version reads 3; read it with .*, or build it anew",
        ),
        (lambda m: m.update(kind="recipe"), "cannot be read as the record of an index .*of kind 'recipe'"),
        (lambda m: m.pop("shards"), "cannot be read as the record of an index .*'shards'"),
        (lambda m: m.update(fingerprint=3), "cannot be read as the record of an index"),
    ],
)
def test_a_record_of_something_else_is_refused(change: Any, message: str, tmp_path: Path) -> None:
    build(tmp_path)
    manifest = json.loads((tmp_path / MANIFEST).read_text())
    change(manifest)
    (tmp_path / MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(InvalidInput, match=message):
        ptif.Index.open(tmp_path, problem_of().model)


def test_an_index_of_the_version_before_is_read(tmp_path: Path) -> None:
    """Its sketches are other numbers; all else is as it was."""
    expected = build(tmp_path).score(queries()).values
    manifest = json.loads((tmp_path / MANIFEST).read_text())
    (tmp_path / MANIFEST).write_text(json.dumps(manifest | {"format": 2}))
    assert torch.equal(ptif.Index.open(tmp_path, problem_of().model).score(queries()).values, expected)


def test_where_there_is_no_index(tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match=r"holds no index .index.json is missing.; build one there with ptif.Index"):
        ptif.Index.open(tmp_path, problem_of().model)
    (tmp_path / MANIFEST).write_text("{")
    with pytest.raises(InvalidInput, match=r"cannot be read as the record of an index"):
        ptif.Index.open(tmp_path, problem_of().model)


# --------------------------------------------------------------------------- the disk, and others


def test_a_full_disk_is_one_sentence_and_costs_nothing_that_was_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    build(tmp_path / "whole")
    expected, sync, calls = contents(tmp_path / "whole"), os.fsync, 0

    def full(handle: int) -> None:
        nonlocal calls
        calls += 1
        if calls > 9:
            raise OSError(errno.ENOSPC, "No space left on device")
        sync(handle)

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(InvalidInput, match=r"cannot be written to .No space left on device.; give another place"):
        build(tmp_path / "full")
    kept = contents(tmp_path / "full")
    assert MANIFEST in kept and not any(name.endswith(".part") for name in kept)
    monkeypatch.setattr(os, "fsync", sync)
    build(tmp_path / "full")
    assert contents(tmp_path / "full") == expected


@needs_fork
@pytest.mark.skipif(sys.platform != "linux", reason="needs a bound on the size of files")
@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_a_write_that_stops_short_is_one_sentence(tmp_path: Path) -> None:
    """The system takes a part of a file's bytes, says so by a smaller count, and refuses the others."""
    import resource

    problem = problem_of(400)
    build(tmp_path / "whole", problem, shard="9KB")
    expected = contents(tmp_path / "whole")
    bound = max(len(content) for name, content in expected.items() if name.startswith("rows-")) - 100
    assert bound > len(expected[MANIFEST])
    child = os.fork()
    if child == 0:
        outcome = 1
        try:
            resource.setrlimit(resource.RLIMIT_FSIZE, (bound, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
            build(tmp_path / "short", problem, shard="9KB")
        except InvalidInput as refused:
            outcome = 0 if "cannot be written to (File too large); give another place" in str(refused) else 2
        finally:
            os._exit(outcome)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert not any(
        name.endswith(".part") or name in expected for name in contents(tmp_path / "short") if "rows" in name
    )
    build(tmp_path / "short", problem, shard="9KB")
    assert contents(tmp_path / "short") == expected


@pytest.mark.skipif(sys.platform != "linux" or os.geteuid() != 0, reason="needs a file system of its own")
def test_a_disk_that_is_full(tmp_path: Path) -> None:
    """A real one, of 64 kB, which becomes larger."""
    problem, disk = problem_of(400), tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(disk)]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("needs a file system of its own")
    try:
        with pytest.raises(InvalidInput, match=r"cannot be written to .No space left on device.; give another place"):
            build(disk / "i", problem)
        kept = contents(disk / "i")
        assert MANIFEST in kept and len(kept) > 2 and not any(name.endswith(".part") for name in kept)
        subprocess.run(["mount", "-o", "remount,size=4m", str(disk)], check=True)
        build(disk / "i", problem)
        build(tmp_path / "whole", problem)
        assert contents(disk / "i") == contents(tmp_path / "whole")
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_what_will_not_fit_is_not_begun(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=100))
    with pytest.raises(InvalidInput, match=r"The index would take .* GB and the disk of .* has 1e-07 GB free"):
        build(tmp_path / "i")
    assert contents(tmp_path / "i") == {}


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="everybody may write here")
def test_a_folder_that_can_only_be_read(tmp_path: Path) -> None:
    build(tmp_path / "i")
    os.chmod(tmp_path / "i", 0o500)
    try:
        index = ptif.Index.open(tmp_path / "i", problem_of().model)
        assert index.score(queries()).shape == (2, 40)
        with pytest.raises(InvalidInput, match=r"cannot be written to .Permission denied."):
            index.remove([1])
    finally:
        os.chmod(tmp_path / "i", 0o700)


def test_a_folder_that_may_not_be_written_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    index = build(tmp_path / "i")
    monkeypatch.setattr(os, "access", lambda path, mode: mode == os.R_OK)
    with pytest.raises(InvalidInput, match=r"cannot be written to .Permission denied.; give another place"):
        index.remove([1])
    assert index.score(queries()).shape == (2, 40)


def test_two_do_not_build_in_one_folder(tmp_path: Path) -> None:
    index = build(tmp_path)
    with files.locked(tmp_path):
        holder = rf"Another process is writing to .* \(process {os.getpid()} on .* since .*\); wait until it ends"
        for ask in (lambda: build(tmp_path), lambda: index.append(queries()), lambda: index.remove([1]), index.compact):
            with pytest.raises(InvalidInput, match=holder):
                ask()
        assert index.score(queries()).shape == (2, 40)  # who asks does not wait


def test_a_dead_builder_keeps_nobody_out(tmp_path: Path) -> None:
    code = (
        "import os, signal, sys; from pytorch_influence_functions.core.files import locked\n"
        "with locked(sys.argv[1]):\n    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert (tmp_path / ".lock").read_text().startswith("process ")
    build(tmp_path)
    assert not (tmp_path / ".lock").exists()


def test_nothing_outside_the_files_of_the_index_is_touched(tmp_path: Path) -> None:
    for name in ("notes.txt", "rows.safetensors", "weights-1.safetensors"):
        (tmp_path / name).write_text(name)
    index = build(tmp_path)
    index.remove(range(20)).compact()
    build(tmp_path, overwrite=True)
    for name in ("notes.txt", "rows.safetensors", "weights-1.safetensors"):
        assert (tmp_path / name).read_text() == name
