"""The folder of a run: `run.json`, the blocks that are finished, and at the end the whole."""

import contextlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, final

from ..core.errors import InvalidInput
from ..core.files import locked, remove_leftovers, write_bytes
from ..core.fingerprint import Fingerprint
from ..scores.parts import PartScores
from ..scores.scores import Scores
from .by_part import PARTS, SCORES, file_of

RUN: Final = "run.json"
BLOCKS: Final = "blocks"
FORMAT: Final = 2
_WHOLE: Final = 120
"""Settings of up to so many letters are shown whole."""


@final
@dataclass(eq=False)
class RunFolder:
    """Where one run is kept. Made with `RunFolder.open`.

    `run.json` says what the run was made from (`fingerprint`) and how far it is (`status`: "running" or "complete");
    finished blocks of queries lie in `blocks/` until the scores of all are written. Every file of scores carries the
    identity of the fingerprint, and one of another run is never used.
    """

    path: Path
    record: dict[str, Any] = field(default_factory=dict)
    name: str = RUN

    @classmethod
    @contextlib.contextmanager
    def open(
        cls,
        path: Path,
        fingerprint: Fingerprint,
        record: Mapping[str, Any],
        overwrite: bool = False,
        name: str = RUN,
    ) -> Iterator["RunFolder"]:
        """The folder for this run: new, or with what an earlier start of the very same run left in it.

        Within, no other process writes such a run there.

        Raises:
            InvalidInput: it holds another run, something that is no run, or cannot be written to; or another process
                is writing there.
        """
        start = {"format": FORMAT, "status": "running", "fingerprint": fingerprint.to_dict()}
        folder = cls(path, start | dict(record), name)
        with locked(path, f".{name}.lock"):
            remove_leftovers(path)
            remove_leftovers(path / BLOCKS)
            folder._begin(fingerprint, overwrite)
            yield folder

    def _begin(self, fingerprint: Fingerprint, overwrite: bool) -> None:
        if overwrite:
            self._clear()
        if not (self.path / self.name).exists():
            self._refuse_strangers()
            self.write()
            return
        before = read_record(self.path, self.name)
        if self._holds_nothing(before):
            self.write()
            return
        _refuse_other(self.path, fingerprint, before, self.record.get("settings", {}))
        self.record = {"status": "running"} | before

    def _holds_nothing(self, before: Mapping[str, Any]) -> bool:
        """Whether an earlier start ended before it kept anything: the corrected call may take its place."""
        kept = (self.path / BLOCKS).glob("*") if self.name == RUN else ()
        return before["status"] != "complete" and not any(kept)

    def _refuse_strangers(self) -> None:
        strays = [name for name in (SCORES, PARTS) if (self.path / name).exists()]
        if self.name == RUN and strays:
            raise InvalidInput(
                f"{str(self.path)!r} holds a {strays[0]} without its {RUN}; give another --out, or --overwrite to "
                "replace it."
            )

    def _clear(self) -> None:
        (self.path / self.name).unlink(missing_ok=True)
        if self.name == RUN:
            for name in (SCORES, PARTS):
                (self.path / name).unlink(missing_ok=True)
            self.drop_blocks()

    @property
    def is_complete(self) -> bool:
        """Whether the run had been finished."""
        return bool(self.record["status"] == "complete")

    @property
    def identity(self) -> str:
        """What every file of this run carries."""
        return fingerprint_of(self.record).identity

    def write(self, **changes: Any) -> None:
        """Change the record and write it, whole or not at all.

        Raises:
            InvalidInput: the folder cannot be written to.
        """
        self.record |= changes
        text = json.dumps(self.record, indent=2, allow_nan=False) + "\n"
        write_bytes(self.path / self.name, text.encode())

    # ---------------------------------------------------------------- scores

    def write_scores(self, scores: Scores | PartScores) -> None:
        """Write the scores of all queries."""
        scores.save(self.path / file_of(scores), self.identity)

    def read_scores(self) -> Scores | PartScores | None:
        """The scores of all queries; None where there are none of this run, or their file is damaged."""
        return self._read(self.path / SCORES) or self._read(self.path / PARTS)

    def _block(self, first: int, last: int) -> Path:
        return self.path / BLOCKS / f"{first:06d}-{last:06d}.safetensors"

    def write_block(self, first: int, last: int, scores: Scores | PartScores) -> None:
        """Keep the scores of the queries from `first` up to `last`."""
        scores.save(self._block(first, last), self.identity)

    def has_block(self, first: int, last: int) -> bool:
        """Whether there is a file of these queries."""
        return self._block(first, last).exists()

    def read_block(self, first: int, last: int) -> Scores | PartScores | None:
        """What was kept of these queries; None where nothing of this run was, or its file is damaged."""
        return self._read(self._block(first, last))

    def _read(self, path: Path) -> Scores | PartScores | None:
        with contextlib.suppress(InvalidInput):
            return Scores.load(path, self.identity)
        with contextlib.suppress(InvalidInput):
            return PartScores.load(path, self.identity)
        return None

    def drop_blocks(self) -> None:
        """Remove the blocks: the whole is written."""
        shutil.rmtree(self.path / BLOCKS, ignore_errors=True)


def check_folder(path: Path) -> None:
    """Refuse a place where no folder can be made, before any work is done for it.

    Raises:
        InvalidInput: it, or a folder it would be in, is a file, or cannot be written to.
    """
    existing = path.absolute()
    while not existing.exists():
        existing = existing.parent
    if not existing.is_dir():
        raise InvalidInput(f"{str(existing)!r} is a file, and --out names a folder to write to; give another name.")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise InvalidInput(f"The folder {str(existing)!r} cannot be written to; give another --out.")


def fingerprint_of(record: Mapping[str, Any]) -> Fingerprint:
    """What a run was made from, by its record."""
    fingerprint = Fingerprint.from_dict(record["fingerprint"])
    assert fingerprint is not None, "read_record() has looked at it"
    return fingerprint


def read_record(folder: Path, name: str = RUN) -> dict[str, Any]:
    """What a run wrote about itself.

    Raises:
        InvalidInput: there is no such file, or it is not one of ours.
    """
    path = folder / name
    if not path.is_file():
        raise InvalidInput(f"{str(folder)!r} holds no run ({name} is missing); give the --out of ptif attribute.")
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as cause:
        raise InvalidInput(f"{str(path)!r} cannot be read ({cause}); give another --out, or --overwrite.") from cause
    known = isinstance(record, dict) and record.get("format") == FORMAT and isinstance(record.get("status"), str)
    if not known or Fingerprint.from_dict(record.get("fingerprint")) is None:
        raise InvalidInput(f"{str(path)!r} was not written by this version of ptif; give another --out.")
    return dict(record)


def _refuse_other(path: Path, fingerprint: Fingerprint, before: Mapping[str, Any], settings: Mapping[str, Any]) -> None:
    names = fingerprint.differences(fingerprint_of(before))
    if not names:
        return
    old = before.get("settings")
    # A setting is shown where its own digest differs, or that of all settings which have none of their own.
    asked = [k for k in settings if k in names or ("settings" in names and k not in fingerprint.digests)]
    changed = [k for k in asked if isinstance(old, dict) and old.get(k) != settings[k]]
    parts = [f"{k} ({there} there, {here} here)" for k in changed for there, here in [_told_apart(old, settings, k)]]
    parts += [name for name in names if name not in changed and (name != "settings" or not changed)]
    raise InvalidInput(
        f"{str(path)!r} holds another run: it differs in {', '.join(parts)}; give another --out, or --overwrite to "
        "replace it."
    )


def _told_apart(there: Any, here: Mapping[str, Any], name: str) -> tuple[str, str]:
    """A setting of both runs: whole where both are short, else the parts in which they differ."""
    texts = [_as_text(side.get(name)) for side in (there, here)]
    if max(map(len, texts)) <= _WHOLE:
        return texts[0], texts[1]
    shortest = min(map(len, texts))
    same = next((k for k in range(shortest) if texts[0][k] != texts[1][k]), shortest)
    # From the beginning of the argument in which they differ to the end of that argument, or a little further.
    start = max(texts[0].rfind(mark, 0, same) + len(mark) for mark in (", ", "("))
    start = start if start > len(", ") else 0
    return _stretch(texts[0], start), _stretch(texts[1], start)


def _as_text(value: Any) -> str:
    return f"{len(value)}: {value[0]} … {value[-1]}" if isinstance(value, list) and value else str(value)


def _stretch(text: str, start: int) -> str:
    part = text[start : start + _WHOLE]
    if start + _WHOLE < len(text):
        part = part[: max(part.rfind(", "), _WHOLE // 2)] + " …"
    return ("… " if start else "") + part
