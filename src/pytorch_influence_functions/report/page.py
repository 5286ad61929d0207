"""The report page: one file that opens from disk, or a page and a folder where that would be above 30 MB."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any, final

from ..core.errors import InvalidInput, require
from ..core.files import write_bytes
from ..plots.examples import Denormalize
from ..scores.scores import Scores
from .overview import Overview
from .page_data import EXAMPLES_PER_CHUNK, QUERIES_PER_CHUNK, Contents, Writer, clean, contents
from .predictions import said_of, self_influence_of
from .thumbnails import LEVELS, Detail, Lens, common_scale, lens

LIMIT = 30_000_000
"""Bytes of one file; above it the examples go to a folder beside the page."""
_PROBES = 24  # examples made to forecast the size
_ESCAPES = {"<": "\\u003c", ">": "\\u003e", "&": "\\u0026", "\u2028": "\\u2028", "\u2029": "\\u2029"}


@final
@dataclass(frozen=True)
class Report:
    """Where a report is, or would be, and how large.

    Attributes:
        path: the page.
        forecast: bytes expected before anything was written.
        written: bytes written, 0 for a dry run.
        examples: training examples on the page.
        side: longest side of their pictures, in pixels.
        folder: whether the examples are in a folder beside the page (`NAME_files`), which belongs to it.
        unreadable: examples and queries that could not be shown; the page says why.
    """

    path: Path
    forecast: int
    written: int
    examples: int
    side: int
    folder: bool
    unreadable: int

    def __str__(self) -> str:
        size = f"{self.written / 1e6:.1f} MB" if self.written else f"would be about {self.forecast / 1e6:.1f} MB"
        where = f" and the folder {files_folder(self.path).name} beside it" if self.folder else ""
        lost = f"; {self.unreadable:,} could not be shown" if self.unreadable else ""
        return f"{self.path}{where}: {size}, {self.examples:,} training examples, pictures up to {self.side} px{lost}"


def files_folder(path: Path) -> Path:
    """The folder that belongs to a page: `report.html` has `report_files`."""
    return path.with_name(f"{path.stem}_files")


def write_report(
    scores: Scores,
    path: str | os.PathLike[str],
    *,
    predictions: Any = None,
    self_influence: Any = None,
    train: Any = None,
    queries: Any = None,
    denormalize: Denormalize = None,
    columns: Sequence[str] | None = None,
    k: int = 10,
    title: str = "Influence report",
    about: str = "",
    dry_run: bool = False,
) -> Report:
    """Write the page for these scores; it needs no network and no server.

    Args:
        scores: at most about 1,000 queries x 100,000 examples stay below 60 s and 30 MB.
        path: the file to write, `.html`.
        predictions: what the model says about the queries: probabilities [Q, C], or a number each [Q].
        self_influence: [N], larger is more suspicious; orders the queue of doubtful labels.
        train, queries: the data, where the scores do not remember them (after `Scores.load`).
        denormalize: a function applied to an input before it is shown, or `(mean, std)` per channel.
        columns: names for the numbers of a table row.
        k: helpful and harmful examples kept per query.
        title, about: shown at the top; `about` says in your words which model and data these are.
        dry_run: only forecast the size, write nothing.

    Raises:
        InvalidInput: data, predictions or self-influence of another size than the scores.
        NonFinite: NaN in predictions or self-influence.
        MissingExtra: jinja2 or pillow is not installed.
    """
    require("jinja2", "report"), require("PIL", "report")
    target = _target(path)
    if isinstance(k, bool) or k != int(k) or k < 1:
        raise InvalidInput(f"k={k} keeps no example on the page; give a whole number of at least 1.")
    said = None if predictions is None else said_of(scores, predictions)
    own = None if self_influence is None else self_influence_of(self_influence, scores.n_train)
    training = lens(scores.train_source if train is None else train, scores.n_train, "train", denormalize, columns)
    asked = lens(scores.query_source if queries is None else queries, None, "queries", denormalize, columns)
    asked_for = [i for i in scores.query_ids.tolist() if i >= 0]
    scale = common_scale([(training, range(scores.n_train)), (asked, asked_for)])
    training.scale = asked.scale = scale
    found = contents(scores, training, int(k), said, own)
    detail, forecast = _detail(found, training, asked)
    if dry_run:
        return Report(target, forecast, 0, len(found.examples), detail.side, forecast > LIMIT, 0)
    writer = Writer(found, training, asked, detail)
    pieces = [(name, embedded(records)) for name, records in writer.chunks()]
    if writer.texts:
        found.index["queries"]["text"] = [clean(writer.texts.get(q, "")) for q in range(len(scores))]
    overview = Overview.of(scores, int(k), said, (training, asked), scale.note)
    page = _Page(title, about, overview, found, pieces)
    written, folder = page.write(target)
    lost = len(training.failed) + len(asked.failed)
    return Report(target, forecast, written, len(found.examples), detail.side, folder, lost)


def _target(path: str | os.PathLike[str]) -> Path:
    target = Path(path)
    if target.suffix.lower() not in (".html", ".htm"):
        raise InvalidInput(f"A report is a web page, and {os.fspath(path)!r} does not end in .html; name it so.")
    if target.is_dir():
        raise InvalidInput(f"{os.fspath(path)!r} is a folder; give the name of the file to write.")
    return target


def _detail(found: Contents, train: Lens, queries: Lens) -> tuple[Detail, int]:
    """The richest detail that fits one file, the richest of all where none does, with the bytes it will take."""
    forecasts = [(detail, _forecast(Writer(found, train, queries, detail))) for detail in LEVELS]
    return next((pair for pair in forecasts if pair[1] <= LIMIT), forecasts[0])


def _forecast(writer: Writer) -> int:
    """Bytes of the page, from a few examples and queries made as they will be."""
    rows, ids = range(len(writer.found.scores)), writer.found.examples
    size = len(embedded(writer.found.index).encode()) + 80_000
    for things, make in ((rows, writer.query), (ids, writer.example)):
        probes = list(things[:: max(1, len(things) // _PROBES)])
        size += int(len(things) * sum(len(embedded(make(i)).encode()) for i in probes) / max(1, len(probes)))
    for one in (writer.train, writer.queries):
        one.failed.clear()
    return size


def embedded(value: Any) -> str:
    """JSON that is safe inside a script element and as JavaScript, whatever its texts say.

    >>> embedded({"text": "</script><b>"})
    '{"text":"\\\\u003c/script\\\\u003e\\\\u003cb\\\\u003e"}'
    """
    text = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return re.sub("[<>&\u2028\u2029]", lambda m: _ESCAPES[m[0]], text).encode("utf-8", "replace").decode()


# --------------------------------------------------------------------------- the page


@dataclass(frozen=True, eq=False)
class _Page:
    """All there is to write, as one file or as several."""

    title: str
    about: str
    overview: Overview
    found: Contents
    pieces: list[tuple[str, str]]

    def write(self, target: Path) -> tuple[int, bool]:
        """Write one file, or several where it would be above the limit; how many bytes, and whether a folder."""
        beside = files_folder(target)
        written, whole = 0, self.html("").encode()
        folder = len(whole) > LIMIT
        if folder:
            for name, text in self.pieces:
                content = f'ptifChunk("{name}",{text});'.encode()
                write_bytes(beside / f"{name}.js", content)
                written += len(content)
            whole = self.html(beside.name).encode()
        # The page comes last, when all it needs is there.
        write_bytes(target, whole)
        _tidy(beside, [name for name, _ in self.pieces] if folder else [])
        return written + len(whole), folder

    def html(self, beside: str) -> str:
        """The page as text; `beside` names the folder of its pieces, or is empty where they are inside."""
        jinja = require("jinja2", "report")
        style, script = _part("report.css"), _part("report.js")
        digest = hashlib.sha256("".join(text for _, text in self.pieces).encode())
        digest.update(embedded(self.found.index).encode())
        meta = {
            "id": digest.hexdigest()[:16],
            "title": clean(self.title),
            "folder": beside,
            "starts": [self.found.examples[i] for i in range(0, len(self.found.examples), EXAMPLES_PER_CHUNK)],
            "perQuery": QUERIES_PER_CHUNK,
        }
        blocks = [("meta", embedded(meta)), ("index", embedded(self.found.index))]
        # Autoescaping is on: everything but our own style, script and escaped JSON is text.
        template = jinja.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True).from_string(
            _part("report.html.j2")
        )
        page: str = template.render(
            title=clean(self.title),
            about=clean(self.about),
            overview=self.overview,
            policy=_policy(style, script, bool(beside)),
            style=style,
            script=script,
            blocks=blocks + ([] if beside else self.pieces),
        )
        return page.encode("utf-8", "replace").decode()


def _policy(style: str, script: str, beside: bool) -> str:
    """What the browser may do with the page: show pictures inside it and run this one script; nothing else."""
    more = " 'strict-dynamic'" if beside else ""
    return (
        f"default-src 'none'; img-src data:; style-src '{_hash(style)}'; script-src '{_hash(script)}'{more}; "
        "base-uri 'none'; form-action 'none'"
    )


def _hash(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def _part(name: str) -> str:
    return (resources.files(__package__) / "templates" / name).read_text(encoding="utf-8")


def _tidy(folder: Path, kept: Iterable[str]) -> None:
    """Remove the pieces of an earlier, larger report from its folder; nothing else there is touched."""
    if not folder.is_dir():
        return
    names = {f"{name}.js" for name in kept}
    for file in folder.iterdir():
        if re.fullmatch(r"[qe]\d+\.js", file.name) and file.name not in names:
            file.unlink()
    if not any(folder.iterdir()):
        folder.rmdir()
