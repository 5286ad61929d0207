"""The league table: which method predicts retraining best, and what does it cost? `make league`.

    python benchmarks/league/run.py [--setting 1] [--methods "EK-FAC,dual"] [--peers] [--quick] [--resume]

Models, truths and settings are made from nothing and kept; methods run with their defaults, each in a process of its
own. Writes `docs/league.md` and its figures; `--quick` writes nothing. Every row is kept as soon as it is there, under
a hash of the code and the models it was made from; `--resume` takes those rows, and computes the others.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch

HERE = Path(__file__).resolve().parent
DOCS = HERE.parents[1] / "docs"
sys.path.insert(0, str(HERE.parent))

from peers import environments  # noqa: E402
from peers.run import Limits, child, python_of  # noqa: E402
from peers.workloads import CACHE, workload  # noqa: E402

from league.ours import ALONG, ENSEMBLES, METHODS  # noqa: E402 - found through the line above
from pytorch_influence_functions.evaluation import Evaluation, Truth, evaluate_one, noise_ceiling  # noqa: E402
from pytorch_influence_functions.evaluation.table import Row  # noqa: E402

SETTINGS = (1, 2, 3, 4, 5)
# Other libraries' own damping where they have a rule, else a tenth of the mean eigenvalue; not for the regression,
# whose loss their adapters here do not know.
PEERS = {
    "kronfluence": ("ekfac, own damping", "ekfac, own damping, along the run"),
    "dattri": ("ekfac", "trak 512", "arnoldi 50", "datainf"),
    "captum": ("tracin, one checkpoint", "arnoldi 50"),
}
# Compared on the same resampled subsets; what a setting does not have is left out.
PAIRS = (
    ("EK-FAC along the run", "EK-FAC"),
    ("Shampoo along the run", "EK-FAC along the run"),
    ("EK-FAC along the run", "SOURCE, EK-FAC"),
    ("EK-FAC along the run", "EK-FAC x 3"),
    ("EK-FAC along the run x 3", "EK-FAC along the run"),
    ("EK-FAC", "kronfluence: ekfac, own damping"),
    ("EK-FAC along the run", "kronfluence: ekfac, own damping, along the run"),
    ("EK-FAC", "chosen by itself"),
)
Cell = dict[str, Any]


def lines(setting: int, asked: argparse.Namespace) -> list[tuple[str, str, str, int]]:
    """(name, library, method, models) of every line of the table."""
    one = setting in (2,)  # a convex problem has one model, and no run
    found = [(name, "ours", name, 1) for name in (METHODS if one else METHODS | ALONG)]
    found += [] if one else [(f"{name} x 3", "ours", name, 3) for name in ENSEMBLES]
    if asked.peers and setting != 3:
        found += [
            (f"{library}: {method}", library, method, 1)
            for library, some in PEERS.items()
            for method in some
            if not (one and "along" in method)
        ]
    words = [w.strip() for w in (asked.methods or "").split(",") if w.strip()]
    return [line for line in found if not words or any(w in line[0] for w in words)]


def code_of(library: str) -> list[Path]:
    """The files whose content decides what a row says."""
    shared = [HERE.parent / name for name in ("worker.py", "nets.py", "peers/workloads.py", "peers/recipes.py")]
    if library != "ours":
        return [*shared, HERE.parent / f"peers/adapters/{library}.py", environments.MODERN.requirements]
    package = HERE.parents[1] / "src" / "pytorch_influence_functions"
    parts = ("cli", "demo", "hf", "actions", "report", "plots", "store", "classic")
    ours = [p for p in sorted(package.rglob("*.py")) if p.relative_to(package).parts[0] not in parts]
    return [*shared, HERE / "ours.py", *ours]


def kept_at(name: str, library: str, options: Cell, limits: Limits) -> Path:
    """Where a row is kept: the path changes with code, models, data and limits."""
    folder = workload(options["workload"], options["quick"]).folder
    files = [*code_of(library), *sorted(folder.glob("trained*.npz"))]
    parts = [hashlib.sha256(path.read_bytes()).hexdigest() for path in files]
    parts.append(json.dumps([options, limits.threads, limits.minutes, limits.gib], sort_keys=True))
    made_of = hashlib.sha256("".join(parts).encode()).hexdigest()[:16]
    return CACHE / "league" / "rows" / f"{options['workload']}-{re.sub('[^a-z0-9]+', '-', name.lower())}-{made_of}"


def ask(name: str, library: str, options: Cell, limits: Limits, asked: argparse.Namespace) -> tuple[Cell, Any] | None:
    """A method's answer and its scores [Q, N], None where it has none; kept, and taken from there when resuming."""
    place = kept_at(name, library, options, limits)
    answer_file, scores_file = place / "answer.json", place / "scores.npy"
    if not (asked.resume and answer_file.exists()):
        python = python_of(library, asked.quick)
        if python is None:
            return None
        place.mkdir(parents=True, exist_ok=True)
        answer_file.unlink(missing_ok=True)
        module = "league.ours" if library == "ours" else f"peers.adapters.{library}"
        answer = child(python, module, options, limits, scores_file)
        answer_file.write_text(json.dumps(answer))  # last: a row without it has not ended
    kept: Cell = json.loads(answer_file.read_text())
    return kept, None if "failed" in kept else np.load(scores_file)


def setting(number: int, asked: argparse.Namespace, limits: Limits) -> Cell:
    """One setting: its truth, then every method."""
    options: Cell = {"workload": 10 + number, "quick": asked.quick}
    patient = Limits(limits.threads, 120, limits.gib)
    print(f"setting {number}: models and truth ...", file=sys.stderr, flush=True)
    answer = child(sys.executable, "league.prepare", options, patient)
    if "failed" in answer:
        raise SystemExit(f"Setting {number} could not be prepared: {answer['failed']}")
    prepared: Cell = answer["result"]
    truth = Truth.load(prepared["truth"])
    cells: list[Cell] = []
    for name, library, method, models in lines(number, asked):
        found = ask(name, library, options | {"method": method, "models": models}, limits, asked)
        if found is None:
            continue
        answer, scores = found
        cell: Cell = {"name": name, "library": library, "models": models}
        if scores is None:
            cell["failed"] = answer["failed"]
        elif not np.isfinite(scores).all():
            cell["failed"] = "scores are not finite"
        else:
            cell["scores"] = torch.from_numpy(scores).double()
            cell["estimate"] = evaluate_one(cell["scores"], truth)
            cell["seconds"] = answer["cpu_seconds"]
            cell["mib"] = answer["peak_mib"] - answer["start_mib"]
        cells.append(cell)
        print(f"  {name}: {cell.get('estimate', cell.get('failed'))}", file=sys.stderr, flush=True)
    return {"number": number, "prepared": prepared, "truth": truth, "ceiling": noise_ceiling(truth), "cells": cells}


def evaluation(result: Cell) -> Evaluation:
    """The table of one setting."""
    rows = [
        Row(c["name"], c["estimate"], c["seconds"], c["models"])
        for c in sorted(result["cells"], key=lambda c: -c["estimate"].value if "estimate" in c else 9)
        if "estimate" in c
    ]
    return Evaluation("LDS", result["truth"].name, result["ceiling"], tuple(rows), {})


def reason(failure: str) -> str:
    """Why there is no number, in a few words."""
    said = failure.removeprefix("pytorch_influence_functions.core.errors.").replace("|", "/")
    return said if len(said) <= 90 else said[:90].rsplit(" ", 1)[0] + " …"


def pairs(result: Cell) -> list[str]:
    """The paired differences, as a table."""
    known = {c["name"]: c["estimate"] for c in result["cells"] if "estimate" in c}
    asked = [(a, b) for a, b in PAIRS if a in known and b in known]
    differences = [known[a].minus(known[b]) for a, b in asked]
    rows = [
        f"| {a} – {b} | {d.value:+.3f} ({d.low:+.3f} to {d.high:+.3f}) |"
        for (a, b), d in zip(asked, differences, strict=True)
    ]
    return ["| Paired difference of LDS | (95 %) |", "| --- | --- |", *rows, ""] if rows else []


def markdown(results: list[Cell], facts: Cell) -> str:
    """The page."""
    page = [(HERE / "head.md").read_text()]
    for r in results:
        p, truth = r["prepared"], r["truth"]
        ceiling = "one model per subset, no noise to be had: the ceiling is 1" if r["ceiling"] is None else (
            f"noise ceiling {r['ceiling']:.3f}")  # fmt: skip
        page += [
            f"## {r['number']}. {p['title']}",
            "",
            f"N = {p['n']:,}, {p['queries']} queries, {p['parameters']:,} parameters; loss {p['loss']:.3g} on training "
            f"data, {p['query_loss']:.3g} on queries. Truth: {truth.name}; {ceiling}. Training: `{truth.recipe}`.",
            "",
        ]
        for title, models in (("One model", 1), ("Three models", 3)):
            some = [c for c in r["cells"] if c["models"] == models]
            if not some:
                continue
            page += [f"| {title} | LDS (95 %) | of ceiling | CPU seconds | MiB |", "| --- | --- | --- | --- | --- |"]
            good = sorted((c for c in some if "estimate" in c), key=lambda c: -c["estimate"].value)
            for c in good:
                e = c["estimate"]
                share = f"{e.value / (r['ceiling'] or 1):.0%}"
                page.append(
                    f"| {c['name']} | {e.value:.3f} ({e.low:.3f} to {e.high:.3f}) | {share} | {c['seconds']:.1f} | "
                    f"{c['mib']:.0f} |"
                )
            page += [f"| {c['name']} | {reason(c['failed'])} | | | |" for c in some if "failed" in c]
            page.append("")
        page += [*pairs(r), f"![{p['title']}](league/setting_{r['number']}.png)", ""]
    page.append(
        f"torch {torch.__version__.split('+')[0]}, Python {platform.python_version()}, {facts['threads']} threads; "
        f"load when started {facts['load']:.1f}. CPU seconds are one run each."
    )
    return "\n".join(page) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description="Methods against retraining.")
    parser.add_argument("--setting", type=int, choices=SETTINGS, action="append", help="one of them (default: all)")
    parser.add_argument("--methods", help='words, comma-separated: "EK-FAC,dual"')
    parser.add_argument("--peers", action="store_true", help="other libraries too (installs them under .bench/)")
    parser.add_argument("--quick", action="store_true", help="tiny sizes, no other libraries, nothing is written")
    parser.add_argument("--threads", type=int, default=2, help="torch threads of every process (default 2)")
    parser.add_argument("--minutes", type=float, default=10, help="CPU minutes that a method may take (default 10)")
    parser.add_argument("--resume", action="store_true", help="take the rows that are kept and were made by this code")
    parser.add_argument("--gib", type=float, default=10, help="the most memory any method may ask for (default 10)")
    asked = parser.parse_args()
    if asked.quick:
        asked.peers = False
    else:
        environments.data()
    limits = Limits(asked.threads, asked.minutes, asked.gib)
    facts = {"threads": asked.threads, "load": os.getloadavg()[0]}
    results = [setting(n, asked, limits) for n in asked.setting or SETTINGS]
    for r in results:
        print(f"\n{r['prepared']['title']}\n{evaluation(r)}")
    failed = [c for r in results for c in r["cells"] if "failed" in c and c["library"] == "ours"]
    for c in failed:
        print(f"failed: {c['name']}: {c['failed']}", file=sys.stderr)
    if not asked.quick and len(results) == len(SETTINGS) and not asked.methods:
        (DOCS / "league").mkdir(exist_ok=True)
        (DOCS / "league.md").write_text(markdown(results, facts))
        for r in results:
            evaluation(r).plot().savefig(DOCS / "league" / f"setting_{r['number']}.png", dpi=110)
        numbers = {
            r["number"]: {c["name"]: c["estimate"].value for c in r["cells"] if "estimate" in c} for r in results
        }
        (DOCS / "league" / "league.json").write_text(json.dumps(numbers, indent=1) + "\n")
    return 1 if asked.quick and failed else 0


if __name__ == "__main__":
    sys.exit(main())
