"""Files written so that a crash leaves either the old content or the new, and read so that damage is noticed."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import platform
import re
import secrets
import shutil
import sys
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Final

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from .digest import digest
from .distributed import process_count
from .errors import InvalidInput

FORMAT: Final = 2
"""Version of the layout of tensor files. A reader refuses files of another one."""
# One key only: the library writes several keys in random order, and equal results must be equal bytes.
_KEY: Final = "pytorch_influence_functions"
_HOST: Final = hashlib.sha256(platform.node().encode()).hexdigest()[:6]
_LEFT_BEHIND: Final = re.compile(r"\..*\.([0-9a-f]{6})-(\d+)-[0-9a-f]{8}\.part")
# Nothing is written for longer than this.
_DAY: Final = 86400.0


# --------------------------------------------------------------------------- writing


def cannot_write(path: str | os.PathLike[str], cause: Exception) -> InvalidInput:
    """The one sentence for a full disk, a folder without permission, or a path below a file."""
    reason = getattr(cause, "strerror", None) or " ".join(str(cause).split()) or type(cause).__name__
    return InvalidInput(
        f"{os.fspath(path)!r} cannot be written to ({reason}); give another place, or make room and permit writing."
    )


def make_folder(path: str | os.PathLike[str]) -> Path:
    """The folder, made with its parents where it is not there.

    Raises:
        InvalidInput: it cannot be made.
    """
    folder = Path(path)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as cause:
        raise cannot_write(path, cause) from cause
    return folder


@contextmanager
def _workspace(target: Path) -> Iterator[Path]:
    """A path for a new file, in a folder of its own beside `target` that is removed afterwards.

    A folder, because libraries that write files may put further ones beside theirs.
    """
    folder = target.with_name(f".{target.name[:100]}.{_HOST}-{os.getpid()}-{secrets.token_hex(4)}.part")
    folder.mkdir(parents=True)
    try:
        yield folder / target.name
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def replacing(path: str | os.PathLike[str], sync: bool = True) -> Iterator[Path]:
    """Yield a path to write to; when that has gone well the new file takes the place of the one at `path`.

    A reader finds the old file or the whole new one, never a part. Missing folders are made. On any failure what was
    written is removed and the old file kept; what a killed process left is removed by `remove_leftovers`. A symbolic
    link stays, and the file that it points to is replaced.

    Args:
        path: the file.
        sync: wait until the disk has it, so that a power cut leaves one or the other too.

    Raises:
        InvalidInput: a full disk, a read-only folder and the like, in one sentence; or a device or pipe.
    """
    target = Path(os.path.realpath(path))
    if _is_device(target):
        raise InvalidInput(
            f"{os.fspath(path)!r} is a device or a pipe, and a file would take its place; give the path of a file."
        )
    try:
        with _workspace(target) as aside:
            aside.touch()
            mode = aside.stat().st_mode
            yield aside
            # As readable as any file its owner writes; some libraries write private ones.
            os.chmod(aside, mode)
            if sync:
                _sync_file(aside)
            os.replace(aside, target)
        if sync:
            _sync_folder(target.parent)
    except OSError as cause:
        raise cannot_write(path, cause) from cause


def _is_device(path: Path) -> bool:
    """Whether something is there that is neither a file nor a folder, such as `/dev/stdout`."""
    return path.exists() and not path.is_file() and not path.is_dir()


def write_bytes(path: str | os.PathLike[str], *content: bytes | memoryview) -> None:
    """Put `content` at `path`, whole or not at all; see `replacing`. A device or pipe is written to as it is.

    Args:
        path: the file.
        content: what it holds, in pieces that are not put together in memory.
    """
    if _is_device(Path(path)):
        try:
            _write_pieces(Path(path), content)
        except OSError as cause:
            raise cannot_write(path, cause) from cause
        return
    with replacing(path) as aside:
        _write_pieces(aside, content)


def _write_pieces(path: Path, pieces: Iterable[bytes | memoryview]) -> None:
    with path.open("wb") as file:
        for piece in pieces:
            file.write(piece)


def append_scratch(path: Path, content: memoryview) -> None:
    """Write `content` behind what a file of a temporary folder has, which nobody reads after this process.

    Raises:
        InvalidInput: it cannot be written, as on a full disk.
    """
    try:
        with path.open("ab") as file:
            file.write(content)
    except OSError as cause:
        raise cannot_write(path, cause) from cause


def write_new(path: str | os.PathLike[str], content: bytes) -> bool:
    """Put `content` at `path` unless a file is there already; whether it was written.

    Of several processes that try at once, exactly one writes.
    """
    target = Path(path)
    if target.exists():
        return False
    try:
        with _workspace(target) as aside:
            aside.write_bytes(content)
            _sync_file(aside)
            _link_new(aside, target, content)
        _sync_folder(target.parent)
    except FileExistsError:
        return False
    except OSError as cause:
        raise cannot_write(path, cause) from cause
    return True


def _link_new(aside: Path, target: Path, content: bytes) -> None:
    try:
        os.link(aside, target)
    except FileExistsError:
        raise
    except OSError:  # a file system without links
        with open(target, "xb") as file:
            file.write(content)


def _sync_file(path: Path) -> None:
    with open(path, "rb+") as file:
        os.fsync(file.fileno())


def _sync_folder(folder: Path) -> None:
    """Make the renaming itself last through a power cut, where the system can."""
    if os.name != "posix":
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def remove_leftovers(folder: str | os.PathLike[str]) -> None:
    """Remove what killed processes left half written: of a process of this machine that has ended, or a day old."""
    with suppress(OSError):
        for path in Path(folder).iterdir():
            name = _LEFT_BEHIND.fullmatch(path.name)
            if name is None:
                continue
            with suppress(OSError):  # another process removes it at the same time
                ended = name[1] == _HOST and not _is_running(int(name[2]))
                if ended or time.time() - path.stat().st_mtime > _DAY:
                    shutil.rmtree(path)


def _is_running(process: int) -> bool:
    if sys.platform == "win32":
        return True  # asking there would end it; age decides
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:  # it belongs to somebody else
        pass
    return True


# --------------------------------------------------------------------------- one writer at a time


class InUse(InvalidInput):
    """Another process keeps the folder for itself."""


@contextmanager
def locked(folder: str | os.PathLike[str], name: str = ".lock") -> Iterator[None]:
    """Keep a folder for this process; the lock ends with the process, however that ends.

    `name` is the file that stands for the lock: several jobs that touch different files have one each. Nothing is kept
    out where the file system has no locks, or where the folder can only be read. The file says who has the lock.

    Raises:
        InUse: another process has it (the message says which, on which machine and since when).
        InvalidInput: the folder cannot be written to.
    """
    path = make_folder(folder) / name
    handle = _open_locked(path)
    if handle is None:
        yield
        return
    try:
        yield
    finally:
        # Removed while it is still ours: whoever opened it before looks again, see `_open_locked`.
        with suppress(OSError):
            path.unlink()
        os.close(handle)


def _open_locked(path: Path) -> int | None:
    while True:
        try:
            handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        except OSError as cause:
            if cause.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
                return None
            raise cannot_write(path.parent, cause) from cause
        alone = _lock(handle)
        with suppress(OSError):
            if alone and os.path.samestat(os.fstat(handle), os.stat(path)):
                _sign(handle)
                return handle
        holder = _holder(handle)
        os.close(handle)
        if not alone:
            cure = "wait until it ends, or give another folder"
            if process_count() > 1:
                cure = (
                    f"{process_count()} processes are running: build and write together within `with "
                    f"ptif.distributed():`, or on one of them, as under `if rank == 0:`; else {cure}"
                )
            raise InUse(f"Another process is writing to {os.fspath(path.parent)!r}{holder}; {cure}.")


def _sign(handle: int) -> None:
    """Write down who has the lock; a full disk does not keep it."""
    since = time.strftime("%Y-%m-%d %H:%M:%S %Z")
    with suppress(OSError):
        os.ftruncate(handle, 0)
        os.write(handle, f"process {os.getpid()} on {platform.node()} since {since}".encode())


def _holder(handle: int) -> str:
    """Who has the lock, in brackets; nothing where that is not known."""
    with suppress(OSError):
        holder = os.read(handle, 400).decode(errors="replace")
        return f" ({holder})" if holder else ""
    return ""


def _lock(handle: int) -> bool:
    """Whether the file is ours alone now."""
    try:
        if sys.platform == "win32":
            import msvcrt

            msvcrt.locking(handle, msvcrt.LK_NBLCK, 1)
        else:
            import fcntl

            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except PermissionError:  # Windows' word for it
        return sys.platform != "win32"
    except OSError:
        return True
    return True


# --------------------------------------------------------------------------- tensors


def write_tensors(
    path: str | os.PathLike[str], kind: str, tensors: Mapping[str, Tensor], record: Mapping[str, Any]
) -> None:
    """Write named tensors and one record of plain values as a safetensors file of the given kind, with a checksum.

    Equal contents are equal bytes.

    Raises:
        InvalidInput: the record holds something that is not a number, word, list or dictionary of these; or the file
            cannot be written.
    """
    header = {"format": FORMAT, "kind": kind, "record": dict(record)}
    try:
        text = json.dumps(header, sort_keys=True)
    except TypeError as cause:
        raise InvalidInput(
            f"These {kind} cannot be saved: {cause}; labels and names must be numbers, words or lists."
        ) from cause
    # Copies: tensors may be views that share memory, which the format refuses.
    copies = {name: value.detach().cpu().contiguous().clone() for name, value in tensors.items()}
    text = json.dumps(header | {"checksum": digest(text, copies)}, sort_keys=True)
    with replacing(path) as aside:
        try:
            save_file(copies, aside, metadata={_KEY: text})
        except SafetensorError as cause:
            raise cannot_write(path, cause) from cause


def read_tensors(
    path: str | os.PathLike[str], kind: str, cure: str = "save it anew"
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors and the record of a file of the given kind, with its checksum verified; `cure` ends the message.

    Raises:
        InvalidInput: no such file, another kind of file, one of another version, or a damaged one.
    """
    name = os.fspath(path)
    if not os.path.exists(name):
        raise InvalidInput(f"There is no file {name!r}; give the path that save() wrote.")
    if os.path.isdir(name):
        inside = sorted(file for file in os.listdir(name) if file.endswith(".safetensors"))
        such_as = f", such as {os.path.join(name, inside[0])!r}" if inside else ""
        raise InvalidInput(f"{name!r} is a folder; give the path of a file that save() wrote{such_as}.")
    try:
        with safe_open(name, framework="pt") as file:
            text = (file.metadata() or {}).get(_KEY)
            header = None if text is None else json.loads(text)
            if header is not None:
                _check_header(header, name, kind)
            tensors = {key: file.get_tensor(key).clone() for key in file.keys()}  # noqa: SIM118 (not a mapping)
    except (SafetensorError, ValueError, OSError, KeyError, RuntimeError) as cause:
        if isinstance(cause, InvalidInput):
            raise
        reason = " ".join(str(cause).split())
        raise InvalidInput(f"{name!r} is not a file of saved {kind}, or is damaged ({reason}); {cure}.") from cause
    if header is None:
        raise InvalidInput(
            f"{name!r} is a safetensors file, but not one of saved {kind}; give a file written by save()."
        )
    checksum = header.pop("checksum", None)
    if checksum != digest(json.dumps(header, sort_keys=True), tensors):
        raise InvalidInput(f"{name!r} is damaged: its checksum is not that of its contents; {cure}.")
    return tensors, header["record"]


def kind_of(path: str | os.PathLike[str]) -> str | None:
    """Which kind of file `write_tensors` wrote there; None for any other safetensors file."""
    with safe_open(os.fspath(path), framework="pt") as file:
        text = (file.metadata() or {}).get(_KEY)
    header = None if text is None else json.loads(text)
    return str(header.get("kind")) if isinstance(header, dict) else None


def _check_header(header: Any, name: str, kind: str) -> None:
    if not isinstance(header, dict) or header.get("kind") != kind or not isinstance(header.get("record"), dict):
        other = header.get("kind") if isinstance(header, dict) else type(header).__name__
        raise InvalidInput(f"{name!r} holds {other}, not {kind}; give a file written by their save().")
    if header.get("format") != FORMAT:
        raise InvalidInput(
            f"{name!r} has file format {header.get('format')} and this version reads {FORMAT}; "
            "read it with the version of pytorch_influence_functions that wrote it."
        )
