"""All benchmarks, side by side in one run: `make bench`, or `python benchmarks/run.py --quick --only a`.

Prints a table; writes `benchmarks/results.json` and `benchmarks/results.md`. Needs only the standard library itself:
every measurement runs in a process of its own.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from harness import HERE, Side, compare, once

Row = dict[str, Any]


def workload_a(quick: bool, threads: int, repetitions: int) -> Iterator[Row]:
    """The seed's CIFAR net, one query: our scoring pass against one backward pass per image."""
    n = 500 if quick else 2000
    for seed, loop in ((True, "loop as the seed's"), (False, "leanest loop")):
        options = {"n": n, "batch_size": 200, "seed": seed}
        with tempfile.TemporaryDirectory() as folder:
            row = compare(
                Side("ours", "ours", "cifar_score", options),
                Side("loop", "plain", "cifar_loop", options),
                threads,
                repetitions,
                Path(folder),
            )
            check = Side("check", "checks", "same_scores", {"folder": folder})
            gap = once(check, threads)["result"]["relative_gap"]
        if not gap <= 1e-4:
            raise SystemExit(f"a: ours and the loop differ by {gap:.2g} (relative); expected at most 1e-4.")
        yield row | {
            "workload": "a",
            "what": f"CIFAR net, {n:,} images, 1 query: scoring pass vs. {loop}, one backward pass per image",
            "target": ">= 20x",
            "met": row["ratio"]["median"] >= 20,
            "note": f"{loop}: largest difference of the scores is {gap:.1e} of the largest score",
        }


def workload_b(quick: bool, threads: int, repetitions: int) -> Iterator[Row]:
    """MLP on Fashion-MNIST: the dual end to end against kronfluence's EK-FAC."""
    from peers.environments import kronfluence

    n, queries = (500, 50) if quick else (2000, 200)
    python = kronfluence()
    with tempfile.TemporaryDirectory() as folder:
        options = {"folder": folder, "n": n, "queries": queries, "batch_size": 500, "epochs": 120}
        trained = once(Side("training", "ours", "fashion_prepare", options), threads)["result"]
        row = compare(
            Side("dual", "ours", "fashion_dual", options),
            Side("ekfac", "peers.adapters.kronfluence", "fashion_ekfac", options, python),
            threads,
            repetitions,
            Path(folder),
        )
        options["exact_queries"] = 5 if quick else 10
        exact = once(Side("exact", "ours", "fashion_exact", options), threads)["result"]
    agree = ", ".join(f"{k} {v:.3f}" for k, v in exact["spearman"].items())
    yield row | {
        "workload": "b",
        "what": f"MLP 784-128-64-10, N = {n:,}, Q = {queries}: dual vs. kronfluence 1.0.1 EK-FAC, data to scores",
        "target": ">= 10x",
        "met": row["ratio"]["median"] >= 10,
        "note": f"Spearman with exact Gauss-Newton scores (damping {exact['damping']:g}, {exact['queries']} queries): "
        f"{agree}; training accuracy {trained['train_accuracy']:.3f}",
        "exact": exact,
        "trained": trained,
    }


def workload_c(quick: bool, threads: int, repetitions: int) -> Iterator[Row]:
    """The floor: one forward and backward pass over the training set."""
    for case in ("mlp", "cnn", "transformer"):
        options = {"case": case, "quick": quick}
        row = compare(
            Side("ours", "ours", "floor_score", options),
            Side("epoch", "plain", "epoch", options),
            threads,
            repetitions,
        )
        cost = {"median": 1 / row["ratio"]["median"], "low": 1 / row["ratio"]["high"]}
        cost["high"] = 1 / row["ratio"]["low"]
        yield row | {
            "workload": "c",
            "what": f"{case}: scoring one query vs. one forward + backward pass over the training set",
            "ratio": cost,
            "target": "<= 2x",
            "met": cost["median"] <= 2,
            "note": "here the ratio is ours / floor",
        }


WORKLOADS = {"a": workload_a, "b": workload_b, "c": workload_c}


def timing(side: dict[str, Any]) -> str:
    return f"{side['median']:.3f} s ({side['low']:.3f}-{side['high']:.3f})"


def memory(side: dict[str, Any]) -> str:
    return f"{side['peak_mib']:.0f} (+{side['peak_mib'] - side['start_mib']:.0f})"


def table(rows: list[Row], facts: dict[str, Any]) -> str:
    """The results as a markdown table."""
    head = ("", "what", "ours", "other", "ratio", "target", "peak MiB, ours", "peak MiB, other")
    lines = ["| " + " | ".join(head) + " |", "|" + " --- |" * len(head)]
    for r in rows:
        ratio = f"**{r['ratio']['median']:.2f}x** ({r['ratio']['low']:.2f}-{r['ratio']['high']:.2f})"
        target = f"{r['target']} {'met' if r['met'] else 'MISSED'}"
        ours, theirs = r["ours"], r["theirs"]
        cells = (
            r["workload"],
            r["what"],
            timing(ours),
            timing(theirs),
            ratio,
            target,
            memory(ours),
            memory(theirs),
        )
        lines.append("| " + " | ".join(cells) + " |")
    notes = [f"- {r['workload']}: {r['note']}" for r in rows]
    said = (
        f"torch {facts['torch']}, Python {facts['python']}, {facts['machine']}, {facts['threads']} torch thread(s); "
        f"median of {facts['repetitions']} repetitions (smallest-largest), sides alternated; memory: most resident in "
        "a process of its own (and growth since it was set up)."
    )
    return "\n".join([*lines, "", said, "", *notes, ""])


def main() -> int:
    parser = argparse.ArgumentParser(description="Benchmarks, side by side.")
    parser.add_argument("--quick", action="store_true", help="small sizes, 3 repetitions: does it still run?")
    parser.add_argument("--only", choices=WORKLOADS, help="one workload")
    parser.add_argument("--threads", type=int, default=1, help="torch threads of every process (default 1)")
    parser.add_argument("--repetitions", type=int, help="timed repetitions (default 5; 3 with --quick)")
    asked = parser.parse_args()
    repetitions = asked.repetitions or (3 if asked.quick else 5)
    rows: list[Row] = []
    start = time.time()
    for name, workload in WORKLOADS.items():
        if asked.only in (None, name):
            for row in workload(asked.quick, asked.threads, repetitions):
                rows.append(row)
                ratio = row["ratio"]["median"]
                print(f"{name}: {row['what']}: {ratio:.2f}x ({row['target']})", file=sys.stderr, flush=True)
    facts = {
        "torch": rows[0]["torch"],
        "python": platform.python_version(),
        "machine": platform.machine(),
        "threads": asked.threads,
        "repetitions": repetitions,
        "quick": asked.quick,
        "seconds": time.time() - start,
    }
    text = table(rows, facts)
    print(text)
    # A small or partial run must not replace the full results.
    suffix = "" if not asked.quick and asked.only is None else f"-{asked.only or 'all'}{'-quick' * asked.quick}"
    (HERE / f"results{suffix}.json").write_text(json.dumps({"facts": facts, "rows": rows}, indent=1) + "\n")
    (HERE / f"results{suffix}.md").write_text(text)
    return 0 if all(r["met"] for r in rows) or asked.quick else 1


if __name__ == "__main__":
    sys.exit(main())
