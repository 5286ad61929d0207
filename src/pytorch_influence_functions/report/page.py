"""The report page: one file that opens from disk, or a page and a folder if one file would be above 30 MB."""

from __future__ import annotations

import base64
import hashlib
import html
import json
import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any, final
from urllib.parse import quote

from ..core.errors import InvalidInput, require
from ..core.files import write_bytes
from ..core.notebook import Printable
from ..core.validate import whole_number
from ..plots.examples import Denormalize
from ..scores.scores import Scores
from .overview import Overview
from .page_data import EXAMPLES_PER_CHUNK, QUERIES_PER_CHUNK, Contents, Writer, clean, collect_contents
from .predictions import collect_given
from .ranking import Classes
from .target import Target, UndoScaling
from .thumbnails import LEVELS, Detail, ExampleReader, make_reader, set_common_scale
from .token_colours import Sources, TokenColours

SHOWN = 10
"""Helpful examples, and harmful ones, that a page shows of every query if it is not told how many."""
LIMIT = 30_000_000
"""Bytes of one file; above it the examples go to a folder beside the page."""
_PROBES = 24  # records made to forecast the size
_ESCAPES = {"<": "\\u003c", ">": "\\u003e", "&": "\\u0026", "\u2028": "\\u2028", "\u2029": "\\u2029"}


@final
@dataclass(frozen=True, repr=False)
class Report(Printable):
    """The place and the size of a report that was written, or would be.

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
        folder = f" and the folder {files_folder(self.path).name} beside it" if self.folder else ""
        missing = f"; {self.unreadable:,} could not be shown" if self.unreadable else ""
        examples = f"{self.examples:,} training examples, pictures up to {self.side} px"
        return f"{self.path}{folder}: {size}, {examples}{missing}"

    def _repr_html_(self) -> str:
        """In a notebook: a link, and the page itself where the notebook's server can reach it."""
        words = f"<p>{html.escape(str(self))}</p>"
        if not self.written:
            return words
        absolute = self.path.resolve()
        here = Path.cwd()
        if not absolute.is_relative_to(here):  # a notebook's server hands out files below its own folder only
            return f"{words}<p><a href='{html.escape(absolute.as_uri())}' target='_blank'>open the page</a></p>"
        address = html.escape(quote(absolute.relative_to(here).as_posix()))
        frame = f"<iframe src='{address}' style='width:100%;height:640px;border:1px solid #ccc'></iframe>"
        return f"{words}<p><a href='{address}' target='_blank'>open the page in a tab of its own</a></p>{frame}"


def files_folder(path: Path) -> Path:
    """The folder that belongs to a page: `report.html` has `report_files`."""
    return path.with_name(f"{path.stem}_files")


def write_report(
    scores: Scores,
    path: str | os.PathLike[str],
    *,
    predictions: Any = None,
    train_predictions: Any = None,
    self_influence: Any = None,
    doubt: Any = None,
    train: Any = None,
    queries: Any = None,
    denormalize: Denormalize = None,
    columns: Sequence[str] | None = None,
    target: str = "",
    denormalize_target: UndoScaling = None,
    tokens: Any = None,
    sources: Sequence[Any] | None = None,
    k: int = SHOWN,
    title: str = "Influence report",
    about: str = "",
    dry_run: bool = False,
) -> Report:
    """Write the page for these scores; it needs no network and no server.

    Args:
        scores: at most about 1,000 queries x 100,000 examples stay below 60 s and 30 MB.
        path: the file to write, `.html`.
        predictions: the model's predictions for the queries: probabilities [Q, C], or a number each [Q] or [Q, 1].
        train_predictions: the same for the training examples: what the model says of each, and where it disagrees.
        self_influence: [N], larger is more suspicious.
        doubt: [N], larger is more doubtful, such as `find_label_issues(problem).doubt`: orders the queue of doubtful
            labels. `None`: the loss where `train_predictions` tell it, else `self_influence`, else the mean harm.
        train, queries: the data, if the scores do not hold them (after `Scores.load`).
        denormalize: a function applied to an input before it is shown, or `(mean, std)` per channel or table column.
        columns: names for the numbers of a table row, with units if you like: `"age [years]"`.
        target: what a predicted number is called, with its unit in brackets: `"price [$]"`.
        denormalize_target: gives back raw values of labels and predicted numbers: a function, or `(mean, std)`.
        tokens: colours the tokens of texts: the fitted method that gave the scores, which is asked about all texts
            shown and about the queries' own tokens (two passes per query and text that it shows), or what its
            `token_scores` gave.
        sources: [N], where each training example comes from: a column to filter by, with the sum of every source's
            scores; None: the data's own, from `ptif.hf.problem(..., source_column=)`.
        k: helpful and harmful examples kept per query.
        title, about: shown at the top; `about` says in your words which model and data these are.
        dry_run: only forecast the size, write nothing.

    Raises:
        InvalidInput: data, predictions or self-influence of another size than the scores.
        NonFinite: NaN in predictions or self-influence.
        MissingExtra: jinja2 or pillow is not installed.
    """
    require("jinja2", "report"), require("PIL", "report")
    page_path = _check_path(path)
    whole_number("k", k, hint="so many examples are shown at each end of a ranking")
    classes = Classes.of(scores)
    labels = Target.of(scores, classes, target, denormalize_target)
    given = collect_given(scores, labels, predictions, train_predictions, self_influence, doubt)
    train = scores.train_source if train is None else train
    queries = scores.query_source if queries is None else queries
    train_reader = make_reader(train, scores.n_train, "train", denormalize, columns)
    query_reader = make_reader(queries, None, "queries", denormalize, columns)
    query_ids = [i for i in scores.query_ids.tolist() if i >= 0]
    scale = set_common_scale([(train_reader, range(scores.n_train)), (query_reader, query_ids)])
    contents = collect_contents(scores, classes, train_reader, int(k), given)
    colours = TokenColours.of(scores, tokens, contents.lists)
    origins = Sources.of(scores, train_reader.source, sources)
    contents = contents.with_texts(colours, origins, train_reader.token_text(0) is not None)
    detail, forecast = _choose_detail(contents, train_reader, query_reader)
    if dry_run:
        return Report(page_path, forecast, 0, len(contents.examples), detail.side, forecast > LIMIT, 0)
    writer = Writer(contents, train_reader, query_reader, detail)
    pieces = [(name, embedded_json(records)) for name, records in writer.chunks()]
    if writer.texts:
        contents.index["queries"]["text"] = [clean(writer.texts.get(q, "")) for q in range(len(scores))]
    overview = Overview.of(scores, int(k), given, (train_reader, query_reader), scale.note)
    written, folder = _ReportPage(title, about, overview, contents, pieces).write(page_path)
    unreadable = len(train_reader.failed) + len(query_reader.failed)
    return Report(page_path, forecast, written, len(contents.examples), detail.side, folder, unreadable)


def _check_path(path: str | os.PathLike[str]) -> Path:
    target = Path(path)
    if target.suffix.lower() not in (".html", ".htm"):
        raise InvalidInput(f"A report is a web page, and {os.fspath(path)!r} does not end in .html; name it so.")
    if target.is_dir():
        raise InvalidInput(f"{os.fspath(path)!r} is a folder; give the name of the file to write.")
    return target


def _choose_detail(contents: Contents, train: ExampleReader, queries: ExampleReader) -> tuple[Detail, int]:
    """The richest detail that fits one file, or the richest of all if none does, with the bytes it will take."""
    forecasts = [(detail, _forecast_bytes(Writer(contents, train, queries, detail))) for detail in LEVELS]
    return next((pair for pair in forecasts if pair[1] <= LIMIT), forecasts[0])


def _forecast_bytes(writer: Writer) -> int:
    """The size of the page, from a few records of examples and queries."""
    rows, ids = range(len(writer.contents.scores)), writer.contents.examples
    size = len(embedded_json(writer.contents.index).encode()) + 80_000
    for items, make in ((rows, writer.query), (ids, writer.example)):
        probes = list(items[:: max(1, len(items) // _PROBES)])
        size += int(len(items) * sum(len(embedded_json(make(i)).encode()) for i in probes) / max(1, len(probes)))
    for reader in (writer.train, writer.queries):
        reader.failed.clear()
    return size


def embedded_json(value: Any) -> str:
    """JSON that is safe inside a script element and as JavaScript, whatever text it holds.

    >>> embedded_json({"text": "</script><b>"})
    '{"text":"\\\\u003c/script\\\\u003e\\\\u003cb\\\\u003e"}'
    """
    text = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return re.sub("[<>&\u2028\u2029]", lambda m: _ESCAPES[m[0]], text).encode("utf-8", "replace").decode()


# --------------------------------------------------------------------------- the page


@dataclass(frozen=True, eq=False)
class _ReportPage:
    """Everything that is written, as one file or as several."""

    title: str
    about: str
    overview: Overview
    contents: Contents
    pieces: list[tuple[str, str]]

    def write(self, target: Path) -> tuple[int, bool]:
        """Write one file, or several if it would be above the limit; returns the bytes and whether it has a folder."""
        pieces_folder = files_folder(target)
        written, whole = 0, self.html("").encode()
        folder = len(whole) > LIMIT
        if folder:
            for name, text in self.pieces:
                content = f'ptifChunk("{name}",{text});'.encode()
                write_bytes(pieces_folder / f"{name}.js", content)
                written += len(content)
            whole = self.html(pieces_folder.name).encode()
        # The page is written last, so that it never refers to files that are not there.
        write_bytes(target, whole)
        _remove_old_pieces(pieces_folder, [name for name, _ in self.pieces] if folder else [])
        return written + len(whole), folder

    def html(self, folder: str) -> str:
        """The page as text; `folder` is the name of the folder of its pieces, or empty if they are inside the page."""
        jinja = require("jinja2", "report")
        style = _template_file("report.css") + _template_file("texts.css")
        script = _template_file("texts.js") + _template_file("report.js")
        digest = hashlib.sha256("".join(text for _, text in self.pieces).encode())
        digest.update(embedded_json(self.contents.index).encode())
        meta = {
            "id": digest.hexdigest()[:16],
            "title": clean(self.title),
            "folder": folder,
            "starts": [self.contents.examples[i] for i in range(0, len(self.contents.examples), EXAMPLES_PER_CHUNK)],
            "perQuery": QUERIES_PER_CHUNK,
        }
        blocks = [("meta", embedded_json(meta)), ("index", embedded_json(self.contents.index))]
        # Autoescaping is on: everything but our own style, script and escaped JSON is plain text.
        template = jinja.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True).from_string(
            _template_file("report.html.j2")
        )
        page: str = template.render(
            title=clean(self.title),
            about=clean(self.about),
            overview=self.overview,
            policy=_security_policy(style, script, bool(folder)),
            style=style,
            script=script,
            blocks=blocks + ([] if folder else self.pieces),
        )
        return page.encode("utf-8", "replace").decode()


def _security_policy(style: str, script: str, folder: bool) -> str:
    """The browser may only show the pictures inside the page and run this one script."""
    more = " 'strict-dynamic'" if folder else ""
    return (
        f"default-src 'none'; img-src data:; style-src '{_content_hash(style)}'; "
        f"script-src '{_content_hash(script)}'{more}; "
        "base-uri 'none'; form-action 'none'"
    )


def _content_hash(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def _template_file(name: str) -> str:
    return (resources.files(__package__) / "templates" / name).read_text(encoding="utf-8")


def _remove_old_pieces(folder: Path, kept: Iterable[str]) -> None:
    """Remove the pieces of an earlier, larger report from the folder; other files there are left alone."""
    if not folder.is_dir():
        return
    names = {f"{name}.js" for name in kept}
    for file in folder.iterdir():
        if re.fullmatch(r"[qe]\d+\.js", file.name) and file.name not in names:
            file.unlink()
    if not any(folder.iterdir()):
        folder.rmdir()
