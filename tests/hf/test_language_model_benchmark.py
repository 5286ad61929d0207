"""The benchmark of language models in its small form: an index of projected gradients beside the exact scores."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

import pytest
from safetensors.torch import load_file

pytest.importorskip("transformers")
pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.slow]


def test_an_index_of_projected_gradients_ranks_as_the_gradients_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "benchmarks"))
    import language_models
    from measuring import rank_agreement

    options = {"model": "llama", "layers": 1, "width": 64, "texts": 48, "length": 16, "queries": 3, "batch": 8}
    options |= {"parameters": None, "precision": None, "memory": None, "keep": str(tmp_path)}
    methods = ["grad_dot", "index"]
    # Another library's index, where its environment is at hand.
    methods += ["bergson"] if "PTIF_BENCH_BERGSON_PYTHON" in os.environ else []
    for method in methods:
        record = language_models.run(argparse.Namespace(method=method, **options))
        assert {"fit", "score"} <= set(record) and record["tokens"] == 48 * 16
        assert method in language_models.show(record, {"bare": {"cpu": 1.0}})
    exact, *projected = (load_file(tmp_path / method)["scores"] for method in methods)
    assert all(scores.shape == (3, 48) and rank_agreement(exact, scores) > 0.25 for scores in projected)
    assert rank_agreement(exact, exact) == pytest.approx(1.0) and rank_agreement(exact, -exact) == pytest.approx(-1.0)
