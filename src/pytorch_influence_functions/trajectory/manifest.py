"""The record of a recorded run on disk: one JSON file that lists every finished checkpoint."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final, final

import torch

from .._version import __version__
from ..core.errors import InvalidInput
from ..core.files import write_bytes
from .recorded_step import GroupState, RecordedStep

MANIFEST: Final = "recording.json"
_KIND: Final = "training run"
_FORMAT: Final = 1


@final
@dataclass(frozen=True, eq=False)
class Manifest:
    """What `recording.json` says.

    Args:
        folder: where it lies.
        optimizer: the optimiser's class, in words.
        parameters: the names in each parameter group.
        steps: the length of the run that was announced; None: none was.
        finished: whether the training came to its end.
        recorded: the checkpoints, in the order of training.
    """

    folder: Path
    optimizer: str
    parameters: tuple[tuple[str, ...], ...]
    steps: int | None
    finished: bool
    recorded: tuple[RecordedStep, ...] = ()

    @staticmethod
    def read(folder: Path) -> Manifest:
        """Read it.

        Raises:
            InvalidInput: there is none, it is damaged, or another version wrote it.
        """
        path = folder / MANIFEST
        try:
            stored = json.loads(path.read_text(encoding="utf-8"))
            if stored["kind"] != _KIND or stored["format"] != _FORMAT:
                raise ValueError(f"format {stored['format']} of {stored['kind']!r}")
            return Manifest(
                folder,
                str(stored["optimizer"]),
                tuple(tuple(map(str, names)) for names in stored["parameters"]),
                stored["steps"],
                bool(stored["finished"]),
                tuple(_read_step(folder, entry) for entry in stored["checkpoints"]),
            )
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as cause:
            reason = " ".join(str(cause).split()) or type(cause).__name__
            raise InvalidInput(
                f"{os.fspath(path)!r} cannot be read as the record of a training run ({reason}); record the run anew, "
                "or give its checkpoints as a list."
            ) from cause

    def write(self) -> None:
        """Put it in its place, whole or not at all."""
        content = {
            "kind": _KIND,
            "format": _FORMAT,
            "versions": {"pytorch_influence_functions": __version__, "torch": torch.__version__},
            "optimizer": self.optimizer,
            "parameters": self.parameters,
            "steps": self.steps,
            "finished": self.finished,
            "checkpoints": [_describe_step(r) for r in self.recorded],
        }
        write_bytes(self.folder / MANIFEST, (json.dumps(content, indent=1) + "\n").encode())

    def with_recorded(self, recorded: Sequence[RecordedStep]) -> Manifest:
        """The same run with other checkpoints."""
        return replace(self, recorded=tuple(sorted(recorded, key=lambda r: r.step)))


def _describe_step(recorded: RecordedStep) -> dict[str, Any]:
    moments = recorded.second_moments
    return {
        "step": recorded.step,
        "file": Path(str(recorded.weights)).name,
        "second_moments": None if moments is None else moments.name,
        "identity": recorded.identity,
        "batch_size": recorded.batch_size,
        "others": list(recorded.others),
        "groups": [g.to_dict() for g in recorded.groups],
    }


def _read_step(folder: Path, entry: Mapping[str, Any]) -> RecordedStep:
    moments = entry["second_moments"]
    return RecordedStep(
        int(entry["step"]),
        # A name, not a path: a manifest from elsewhere must not point out of its folder.
        folder / Path(str(entry["file"])).name,
        tuple(GroupState.from_dict(g) for g in entry["groups"]),
        str(entry["identity"]),
        None if moments is None else folder / Path(str(moments)).name,
        entry["batch_size"],
        # Earlier versions did not look.
        tuple(map(str, entry.get("others", ()))),
    )
