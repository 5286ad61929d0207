"""Run the Python examples in README.md and docs, so that no page shows code that does not work.

Each file's ```python blocks run in order, in one namespace, in a temporary working folder. A block whose
preceding line is `<!-- no-run -->` is skipped, and the number skipped is printed; so is one that `<!-- needs: a, b -->`
precedes where a or b is not installed, unless `--all` is given. A failure names the file
and line in the page, as if the page were the program. A name that moved is a failure too.

    python scripts/run_snippets.py              # README.md and all pages in docs
    python scripts/run_snippets.py page.md …    # these
    python scripts/run_snippets.py --all page.md  # and what a block needs must be there
"""

from __future__ import annotations

import importlib.util
import os
import re
import sys
import tempfile
import textwrap
import time
import traceback
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SKIP = "<!-- no-run -->"
NEEDS = re.compile(r"<!-- needs: (.+) -->")
FENCE = "```"


@dataclass(frozen=True)
class Snippet:
    """One block of a page: the 1-based line its code begins on, the code, whether to run it, and what it imports."""

    line: int
    code: str
    run: bool
    needs: tuple[str, ...] = ()

    def runs(self, everything: bool) -> bool:
        """Whether it is run here; with `everything`, also where a library is missing, to fail then."""
        return self.run and (everything or all(importlib.util.find_spec(name) is not None for name in self.needs))


def snippets(text: str) -> Iterator[Snippet]:
    """Yield the ```python blocks of a page, in order. Blocks in other languages are passed over."""
    lines = text.splitlines()
    opened: int | None = None
    language = ""
    for number, line in enumerate(lines):
        stripped = line.strip()
        if opened is None and stripped.startswith(FENCE):
            opened, language = number, stripped.removeprefix(FENCE).strip()
        elif opened is not None and stripped == FENCE:
            if language == "python":
                code = textwrap.dedent("\n".join(lines[opened + 1 : number]))
                before = lines[opened - 1].strip() if opened else ""
                needs = NEEDS.fullmatch(before)
                names = tuple(name.strip() for name in needs[1].split(",")) if needs else ()
                yield Snippet(opened + 2, code, before != SKIP, names)
            opened = None
    if opened is not None:
        raise ValueError(f"the block opened on line {opened + 1} is never closed")


def run_page(page: Path, everything: bool = False) -> tuple[int, int]:
    """Run one page's snippets in a fresh folder; returns (run, skipped). Exceptions pass through."""
    blocks = list(snippets(page.read_text(encoding="utf-8")))
    chosen = [block for block in blocks if block.runs(everything)]
    namespace: dict[str, object] = {"__name__": "__snippet__"}
    before = Path.cwd()
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.filterwarnings("error", r"ptif\.", DeprecationWarning)
        os.chdir(folder)
        try:
            for snippet in chosen:
                # Empty lines in front make the line numbers in a traceback those of the page.
                code = "\n" * (snippet.line - 1) + snippet.code
                exec(compile(code, str(page), "exec"), namespace)
        finally:
            os.chdir(before)
    return len(chosen), len(blocks) - len(chosen)


def main(pages: list[Path], everything: bool = False) -> int:
    """Run the pages; returns the number that failed."""
    os.environ.setdefault("MPLBACKEND", "Agg")
    failed = 0
    for page in pages:
        start = time.perf_counter()
        name = page.relative_to(ROOT) if page.is_relative_to(ROOT) else page
        try:
            run, skipped = run_page(page, everything)
        except Exception:
            failed += 1
            traceback.print_exc()
            print(f"FAILED {name}")
        else:
            note = f", {skipped} SKIPPED" if skipped else ""
            print(f"ok     {name}: {run} snippets run{note}, {time.perf_counter() - start:.1f} s")
    return failed


if __name__ == "__main__":
    named = [Path(argument).resolve() for argument in sys.argv[1:] if argument != "--all"]
    chosen = named or [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
    sys.exit(1 if main(chosen, "--all" in sys.argv) else 0)
