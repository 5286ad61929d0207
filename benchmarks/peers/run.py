"""Our methods and other libraries' on the same weights and data, one after the other in one run: `make peers`.

    python benchmarks/peers/run.py [--workload 1] [--methods ekfac,dual] [--quick]

Every measurement is a process of its own. What fails, or takes too long, stays in the table with its reason.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

from peers import environments  # noqa: E402 - found through the line above
from peers.judge import Retraining, spearman  # noqa: E402

WORKLOADS = (1, 2, 3, 4)
METHODS = {
    "ours": (
        "grad_dot",
        "kfac",
        "ekfac",
        "ekfac, own damping",
        "ekfac of drawn labels",
        "dual",
        "dual, own damping",
        "arnoldi 50",
        "datainf",
        "cg guided by ekfac",
    ),
    "kronfluence": ("kfac", "ekfac", "ekfac, own damping"),
    "dattri": ("ekfac", "trak 512", "arnoldi 50", "datainf", "cg"),
    "captum": ("tracin, one checkpoint", "arnoldi 50"),
    "pydvl": ("ekfac", "arnoldi 50", "nystroem 50", "cg"),
}
ENVIRONMENTS = {
    "kronfluence": environments.MODERN,
    "dattri": environments.MODERN,
    "captum": environments.MODERN,
    "pydvl": environments.NUMPY1,
}
# A quick look takes these and installs nothing, unless --methods names others.
QUICK = "ours grad_dot,ours kfac,ours ekfac,ours dual own"
Row = dict[str, Any]


@dataclass(frozen=True)
class Limits:
    """Of every process; minutes are of CPU time for each of its threads, which a loaded machine does not cut short."""

    threads: int
    minutes: float
    gib: float


def child(python: str, module: str, options: Row, limits: Limits, save: Path | None = None) -> Row:
    """One run in a fresh process: its answer, or {"failed": reason}."""
    options = options | {"threads": limits.threads, "memory_gib": limits.gib}
    options["cpu_minutes"] = limits.minutes * limits.threads
    stopped: Row = {"failed": f"stopped after {limits.minutes:g} minutes"}
    threads = str(limits.threads)
    try:
        done = subprocess.run(
            [python, "-W", "ignore", str(HERE.parent / "worker.py"), module, "make", json.dumps(options)],
            input=f"save {save}\nquit\n" if save else "go\nquit\n",
            capture_output=True,
            text=True,
            env=os.environ | {"OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads, "TQDM_DISABLE": "1"},
            timeout=10 * 60 * limits.minutes,
        )
    except subprocess.TimeoutExpired:
        return stopped
    if done.returncode == -signal.SIGXCPU:
        return stopped
    if done.returncode == 0 and done.stdout.strip():
        answer: Row = json.loads(done.stdout.splitlines()[-1])
        return answer
    said = [line.strip() for line in done.stderr.splitlines() if line.strip()]
    if done.returncode < 0:
        said.append(f"ended by signal {-done.returncode}")
    return {"failed": said[-1][:160] if said else "said nothing"}


def chosen(wanted: str | None) -> list[tuple[str, str]]:
    """Those whose "library method" contains one of the comma-separated words."""
    everything = [(library, method) for library, methods in METHODS.items() for method in methods]
    words = [w.strip() for w in (wanted or "").split(",") if w.strip()]
    # The names of methods have commas of their own; in words they may be left out.
    named = {pair: " ".join(pair).replace(",", "") for pair in everything}
    return [pair for pair in everything if not words or any(w in named[pair] for w in words)]


def python_of(library: str, quick: bool) -> str | None:
    """None: not installed, and a quick look installs nothing."""
    if library == "ours":
        return sys.executable
    environment = ENVIRONMENTS[library]
    if library == "kronfluence" and os.environ.get("PTIF_BENCH_PYTHON"):
        return environments.kronfluence()  # ready-made; it need not have the others
    if quick and not environment.ready:
        return None
    return environment.ensure()


def judged(row: Row, scores: np.ndarray, prepared: Row) -> Row:
    """The row with what is known of the quality of these scores."""
    if not np.isfinite(scores).all():
        return row | {"failed": f"{(~np.isfinite(scores)).mean():.0%} of the scores are not finite"}
    if prepared["exact"]:
        with np.load(prepared["exact"]) as file:
            exact = file["scores"]
        row |= {"spearman": spearman(scores[: len(exact)], exact)}
    if prepared["retrained"]:
        row |= {"lds": Retraining.read(prepared["retrained"]).score(scores)}
    return row


def measure(number: int, asked: argparse.Namespace, pairs: list[tuple[str, str]], limits: Limits) -> Row:
    """One workload: prepared, then every method in turn, as many rounds as asked."""
    options: Row = {"workload": number, "quick": asked.quick}
    print(f"workload {number}: weights and truth ...", file=sys.stderr, flush=True)
    patient = Limits(limits.threads, 600, limits.gib)
    answer = child(sys.executable, "peers.prepare", options | {"truth": asked.truth}, patient)
    if "failed" in answer:
        raise SystemExit(f"Workload {number} could not be prepared: {answer['failed']}")
    prepared: Row = answer["result"]
    rows: dict[tuple[str, str], Row] = {p: {"library": p[0], "method": p[1], "runs": []} for p in pairs}
    with tempfile.TemporaryDirectory() as folder:
        save = Path(folder) / "scores.npy"
        for _ in range(asked.repetitions):
            for pair, row in rows.items():
                if "failed" in row:
                    continue
                if (python := python_of(pair[0], asked.quick)) is None:
                    row["failed"] = "not installed, and --quick installs nothing"
                    continue
                load = os.getloadavg()[0]
                answer = child(python, f"peers.adapters.{pair[0]}", options | {"method": pair[1]}, limits, save)
                if "failed" in answer:
                    row["failed"] = answer["failed"]
                else:
                    row["runs"].append(answer | {"load": load})
                    if "spearman" not in row and "lds" not in row:
                        row |= judged({}, np.load(save), prepared)
                print(f"  {cells(row)}", file=sys.stderr, flush=True)
    ceiling = Retraining.read(prepared["retrained"]).ceiling() if prepared["retrained"] else None
    return {"workload": number, "prepared": prepared, "ceiling": ceiling, "rows": list(rows.values())}


# ------------------------------------------------------------------------------------------ showing


def cells(row: Row) -> str:
    """A line of the table."""
    name = f"{row['library']} {row['method']}"
    if not row["runs"]:
        return f"| {name} | **{row.get('failed', 'not run')}** | | | | |"
    seconds = [r["seconds"] for r in row["runs"]]
    parts = [statistics.median(r["parts"][k] for r in row["runs"]) for k in ("fit", "score")]
    spread = f" ({min(seconds):.2f}-{max(seconds):.2f})" if len(seconds) > 1 else ""
    memory = max(r["peak_mib"] - r["start_mib"] for r in row["runs"])
    agree = f"{row['spearman']:.3f}" if "spearman" in row else ""
    lds = "{:.3f} ({:.3f}-{:.3f})".format(*row["lds"]) if "lds" in row else ""
    note = f" **{row['failed']}**" if "failed" in row else ""
    took = f"{statistics.median(seconds):.2f}{spread} | {parts[0]:.2f} + {parts[1]:.2f}"
    return f"| {name}{note} | {took} | {memory:.0f} | {agree} | {lds} |"


def table(results: list[Row], facts: Row) -> str:
    """All workloads as markdown."""
    lines: list[str] = []
    for r in results:
        p, this = r["prepared"], "quick, " if facts["quick"] else ""
        lines += [
            f"### {r['workload']}: {p['title']} ({this}N = {p['n']:,}, Q = {p['queries']}, "
            f"{p['parameters']:,} parameters)",
            "",
            f"Damping {p['damping']:g}; accuracy {p['accuracy']:.3f} on training data, {p['query_accuracy']:.3f} on "
            f"queries. Exact answer: {p['exact_says']}. Retraining: {p['retrained_says']}"
            + (f", ceiling {r['ceiling']:.3f}" if r["ceiling"] is not None else "")
            + ".",
            "",
            "| method | seconds | fit + score | MiB above imports | Spearman with exact | LDS (95 %) |",
            "| --- | --- | --- | --- | --- | --- |",
            *(cells(row) for row in r["rows"]),
            "| torch-influence | **not on the registry** | | | | |",
            "",
        ]
    loads = [run["load"] for r in results for row in r["rows"] for run in row["runs"]]
    lines.append(
        f"torch {facts['torch']}, Python {facts['python']}, {facts['machine']}, {facts['threads']} threads; "
        f"{facts['repetitions']} run(s), each in a fresh process; limits {facts['minutes']:g} minutes and "
        f"{facts['gib']:g} GiB; load when started {min(loads, default=0):.1f}-{max(loads, default=0):.1f}."
    )
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description="Our methods and other libraries', side by side.")
    parser.add_argument("--workload", type=int, choices=WORKLOADS, help="one of them (default: all)")
    parser.add_argument("--methods", help='words, comma-separated: "ours,kronfluence ekfac"')
    parser.add_argument("--quick", action="store_true", help="tiny sizes, nothing is installed: does it still run?")
    parser.add_argument("--threads", type=int, default=2, help="torch threads of every process (default 2)")
    parser.add_argument("--repetitions", type=int, default=1, help="runs of each, in turns (default 1)")
    parser.add_argument("--minutes", type=float, default=10, help="the longest any run may take (default 10)")
    parser.add_argument("--gib", type=float, default=10, help="the most memory any run may ask for (default 10)")
    parser.add_argument(
        "--truth",
        choices=("none", "cheap", "all"),
        default="cheap",
        help="which exact answers and retrainings are computed where they are not kept yet: none, those that take "
        "minutes (workloads 1 and 4), or all (default: cheap)",
    )
    parser.add_argument("--write", action="store_true", help="also write benchmarks/peers/results.md and .json")
    asked = parser.parse_args()
    limits = Limits(asked.threads, asked.minutes, asked.gib)
    pairs = chosen(asked.methods or (QUICK if asked.quick else None))
    if not pairs:
        parser.error(f"no method is called {asked.methods!r}; there are {METHODS}")
    if not asked.quick:
        environments.data()
    start = time.time()
    numbers = (asked.workload,) if asked.workload else WORKLOADS
    results = [measure(n, asked, pairs, limits) for n in numbers]
    versions = [run["torch"] for r in results for row in r["rows"] for run in row["runs"]]
    facts = {
        "torch": versions[0] if versions else "?",
        "python": platform.python_version(),
        "machine": platform.machine(),
        "seconds": time.time() - start,
        **{k: getattr(asked, k) for k in ("quick", "threads", "repetitions", "minutes", "gib", "truth")},
    }
    text = table(results, facts)
    print(text)
    if asked.write:
        suffix = f"-{asked.workload}" * bool(asked.workload) + "-quick" * asked.quick
        (HERE / f"results{suffix}.md").write_text(text)
        (HERE / f"results{suffix}.json").write_text(json.dumps({"facts": facts, "results": results}, indent=1) + "\n")
    ours_failed = [row for r in results for row in r["rows"] if row["library"] == "ours" and "failed" in row]
    return 1 if ours_failed and asked.quick else 0


if __name__ == "__main__":
    sys.exit(main())
