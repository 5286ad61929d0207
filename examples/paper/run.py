"""All figures, one after the other: `make paper`.

    python -m examples.paper.run [--small] [--only 1,2a,section_5_3] [--figures FOLDER] [--write-docs]

Exits with 1 when a number lies outside its band. `--write-docs` puts what is in the folder of pictures, from this run
or earlier ones in full form, into `docs/paper.md` and `docs/paper/`.
"""

from __future__ import annotations

import argparse
import importlib
import shutil
import sys
from pathlib import Path

from pytorch_influence_functions.core.errors import InvalidInput, nearest

from .data import ROOT
from .study import Finding, Study, add_options, finish, read, study_of, timed

FIGURES = {
    name: name if name.startswith("section") else f"figure_{name}"
    for name in ("1", "2a", "2b", "2c", "3", "4", "5", "section_5_3", "6")
}
# Retraining networks takes a quarter of an hour, and a few points say nothing.
FULL_ONLY = ("2c",)


def chosen(only: str | None, small: bool) -> list[str]:
    """Which figures to run, in the paper's order.

    Raises:
        InvalidInput: a name that is no figure's.
    """
    if only is None:
        return [name for name in FIGURES if not (small and name in FULL_ONLY)]
    names = only.split(",") if only else []
    for name in names:
        if name not in FIGURES:
            raise InvalidInput(f"There is no figure {name!r}; known are {', '.join(FIGURES)}.{nearest(name, FIGURES)}")
    return [name for name in FIGURES if name in names]


def write_docs(figures: Path) -> Path:
    """The page, and the pictures beside it, from the findings in a folder.

    Raises:
        InvalidInput: a figure is missing, or was run in its small form.
    """
    findings = []
    for name, module in FIGURES.items():
        kept = figures / f"{module}.json"
        if not kept.exists() or read(kept).small:
            raise InvalidInput(f"Figure {name} has not been run in its full form; run it before writing the page.")
        findings.append(read(kept))
    docs = ROOT / "docs"
    (docs / "paper").mkdir(exist_ok=True)
    for found in findings:
        shutil.copyfile(figures / found.picture.name, docs / "paper" / found.picture.name)
    page = (Path(__file__).parent / "page.md").read_text()
    rows = "\n".join(_row(found) for found in findings)
    parts = "\n\n".join(_part(found) for found in findings)
    target = docs / "paper.md"
    minutes = sum(found.seconds for found in findings) / 60
    page = page.replace("{{rows}}", rows).replace("{{parts}}", parts).replace("{{minutes}}", f"{minutes:.0f}")
    target.write_text(page)
    return target


def _row(found: Finding) -> str:
    head = found.bands[0]
    verdict = "yes" if found.passed else "**no**"
    return f"| {found.figure} | {head.name} | {found.paper} | **{head.value:.3g}** | {head.words} | {verdict} |"


def _part(found: Finding) -> str:
    title = found.figure if found.figure.startswith("section") else f"Figure {found.figure}"
    bands = "\n".join(
        f"| {band.name} | {band.value:.4g} | {band.words} | {'yes' if band.passed else '**no**'} |"
        for band in found.bands
    )
    notes = "\n".join(f"- {note}" for note in found.notes)
    return (
        f"### {title[0].upper()}{title[1:]}: {found.title}\n\n![{found.title}](paper/{found.picture.name})\n\n"
        f"{found.data}.\n\n| number | here | band | inside |\n|---|---|---|---|\n{bands}\n\n{notes}".rstrip()
    )


def main(arguments: list[str] | None = None) -> int:
    """Run, print, and judge."""
    parser = argparse.ArgumentParser(description="The figures of Koh & Liang (2017) again.")
    add_options(parser)
    parser.add_argument("--only", help="figures by name, with commas between; '' for none")
    parser.add_argument("--write-docs", action="store_true", help="write docs/paper.md from the findings in full form")
    options = parser.parse_args(arguments)
    study: Study = study_of(options)
    findings = []
    try:
        names = chosen(options.only, study.small)
        if study.small and options.only is None:
            print(f"Left out in the small form, for they take too long: {', '.join(FULL_ONLY)}.", flush=True)
        for name in names:
            run = importlib.import_module(f"{__package__}.{FIGURES[name]}").run
            findings.append(timed(run, study))
        if options.write_docs:
            print(f"Wrote {write_docs(study.figures).relative_to(ROOT)}.")
    except InvalidInput as wrong:
        print(wrong, file=sys.stderr)
        return 2
    met = sum(found.passed for found in findings)
    print(f"{met} of {len(findings)} within their bands, in {sum(f.seconds for f in findings) / 60:.1f} minutes.")
    return finish(findings)


if __name__ == "__main__":
    sys.exit(main())
