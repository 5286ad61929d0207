"""The folder of a run: `run.json`, the blocks that are finished, and at the end the whole."""

import contextlib
import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, final

from ..core.errors import InvalidInput
from ..core.files import write_bytes
from ..scores.scores import Scores

RUN: Final = "run.json"
SCORES: Final = "scores.safetensors"
BLOCKS: Final = "blocks"
FORMAT: Final = 1


@final
@dataclass(eq=False)
class Folder:
    """Where one run is kept. Made with `Folder.opened`.

    `run.json` says what the run was made from (`marks`) and how far it is (`status`: "running" or "complete"); finished
    blocks of queries lie in `blocks/` until the scores of all are written.
    """

    path: Path
    record: dict[str, Any] = field(default_factory=dict)
    name: str = RUN

    @classmethod
    def opened(cls, path: Path, record: Mapping[str, Any], overwrite: bool = False, name: str = RUN) -> "Folder":
        """The folder for this run: new, or with what an earlier start of the very same run left in it.

        Raises:
            InvalidInput: it holds another run, something that is no run, or cannot be written to.
        """
        made = cls(path, {"format": FORMAT, "status": "running"} | dict(record), name)
        before = made._before()
        if overwrite:
            before = None
            made._clear()
        if before is None:
            made._refuse_strangers()
            made.write()
            return made
        _refuse_other(path, before, made.record)
        made.record = {"status": "running"} | before
        return made

    def _before(self) -> dict[str, Any] | None:
        return read_record(self.path, self.name) if (self.path / self.name).exists() else None

    def _refuse_strangers(self) -> None:
        if self.name == RUN and (self.path / SCORES).exists():
            raise InvalidInput(
                f"{str(self.path)!r} holds a {SCORES} without its {RUN}; give another --out, or --overwrite to "
                "replace it."
            )

    def _clear(self) -> None:
        if self.name == RUN:
            (self.path / SCORES).unlink(missing_ok=True)
            self.drop_blocks()
        (self.path / self.name).unlink(missing_ok=True)

    @property
    def complete(self) -> bool:
        """Whether the run had been finished."""
        return bool(self.record["status"] == "complete")

    def write(self, **changes: Any) -> None:
        """Change the record and write it, whole or not at all.

        Raises:
            InvalidInput: the folder cannot be written to.
        """
        self.record |= changes
        text = json.dumps(self.record, indent=2, allow_nan=False) + "\n"
        try:
            write_bytes(self.path / self.name, text.encode())
        except OSError as cause:
            raise InvalidInput(
                f"{str(self.path)!r} cannot be written to ({cause.strerror}); give another folder to --out."
            ) from cause

    # ---------------------------------------------------------------- blocks

    def _block(self, first: int, last: int) -> Path:
        return self.path / BLOCKS / f"{first:06d}-{last:06d}.safetensors"

    def keep(self, first: int, last: int, scores: Scores) -> None:
        """Keep the scores of the queries from `first` up to `last`."""
        scores.save(self._block(first, last))

    def kept(self, first: int, last: int) -> Scores | None:
        """What was kept of these queries; None where nothing was, or its file is damaged."""
        path = self._block(first, last)
        with contextlib.suppress(InvalidInput):
            return Scores.load(path) if path.exists() else None
        return None

    def drop_blocks(self) -> None:
        """Remove the blocks: the whole is written."""
        shutil.rmtree(self.path / BLOCKS, ignore_errors=True)


def read_record(folder: Path, name: str = RUN) -> dict[str, Any]:
    """What a run wrote about itself.

    Raises:
        InvalidInput: there is no such file, or it is not one of ours.
    """
    path = folder / name
    if not path.is_file():
        raise InvalidInput(f"{str(folder)!r} holds no run ({name} is missing); give the --out of ptif attribute.")
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as cause:
        raise InvalidInput(f"{str(path)!r} cannot be read ({cause}); give another --out, or --overwrite.") from cause
    if not isinstance(found, dict) or found.get("format") != FORMAT or not isinstance(found.get("marks"), dict):
        raise InvalidInput(f"{str(path)!r} was not written by this version of ptif; give another --out.")
    return found


def _refuse_other(path: Path, before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    differ = [name for name, mark in now["marks"].items() if before["marks"].get(name) != mark]
    if not differ:
        return
    old, new = before.get("settings"), now.get("settings", {})
    changed = [k for k in new if old.get(k) != new[k]] if isinstance(old, dict) else []
    said = [f"{k} ({_short(old.get(k))} there, {_short(new[k])} here)" for k in changed if isinstance(old, dict)]
    said += [name for name in differ if name not in changed and (name != "settings" or not changed)]
    raise InvalidInput(
        f"{str(path)!r} holds another run: it differs in {', '.join(said)}; give another --out, or --overwrite to "
        "replace it."
    )


def _short(value: Any, most: int = 60) -> str:
    text = f"{len(value)}: {value[0]} … {value[-1]}" if isinstance(value, list) and value else str(value)
    return text if len(text) <= most else text[: most - 1] + "…"
