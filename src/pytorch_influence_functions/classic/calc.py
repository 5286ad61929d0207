"""The original `calc_influence_function` module: from a config to results and files."""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..core.errors import InvalidInput
from ..core.progress import track
from ..problem.data import Source
from ..scores.scores import Scores
from .config import Config
from .console import log, logged_to
from .engine import ClassicSettings, Engine, calculation, make_source
from .files import ResultFiles, StoredVectors, save_vectors, vector_file_name
from .gradient_index import index_gradients, indexed_products, write_gradient_files
from .results import InfluenceResult, result_entry
from .selection import choose_test_ids

# The file of partial results grows with every item; writing it may take this share of the time.
_WRITING_SHARE = 0.1


# --------------------------------------------------------------------------- one run


@dataclass(frozen=True, eq=False)
class _ClassicRun:
    """A config with its data and its engine; made inside `calculation`."""

    config: Config
    engine: Engine
    test: Source
    ids: list[int]
    files: ResultFiles

    @property
    def folder(self) -> Path:
        """The folder of stored vectors."""
        return Path(self.config["save_pth"] or self.config["outdir"])

    def s_test_path(self, i: int) -> Path:
        c = self.config
        return self.folder / "s_test" / vector_file_name(c["s_test_pattern"], i, c["recursion_depth"], c["r"])

    @property
    def list_length(self) -> int | None:
        k = self.config["top_k"]
        return None if k is None else min(int(k), len(self.engine))

    def scores(self, values: Tensor, ids: Sequence[int], labels: list[Any]) -> Scores:
        return Scores(
            values,
            query_ids=torch.tensor(list(ids)),
            query_labels=labels,
            class_names=self.engine.problem.data.class_names or self.test.class_names,
            train_source=self.engine.problem.data,
            query_source=self.test,
        )


@contextmanager
def _open_run(
    config: Mapping[str, Any] | None,
    model: nn.Module,
    train_loader: Any,
    test_loader: Any,
    extras: Mapping[str, Any],
) -> Iterator[_ClassicRun]:
    """Do what both modes do first: read the config and the data, and write the meta file."""
    c = Config.of(config)
    train = c["train_loader"] if train_loader is None else train_loader
    test = c["test_loader"] if test_loader is None else test_loader
    if train is None or test is None:
        which = "train_loader" if train is None else "test_loader"
        raise InvalidInput(f"There is no {which}; pass it, or set config[{which!r}].")
    settings = ClassicSettings.of(c, **extras)
    with ExitStack() as stack:
        stack.enter_context(logged_to(c["log_filename"]))
        stack.enter_context(calculation(model, settings))
        queries = make_source(test, settings.deterministic)
        ids = choose_test_ids(
            queries,
            c["test_sample_num"],
            c["test_sample_start_per_class"],
            c["num_classes"],
            c.spelled("test_sample_start_per_class"),
        )
        start, num = int(c["test_sample_start_per_class"] or 0), int(c["test_sample_num"] or 0)
        files = ResultFiles(Path(c["outdir"]), start, num, c["results_name"], c["keep_tmp"])
        files.meta({**c.items_for_json(), "test_sample_index_list": ids})
        yield _ClassicRun(c, Engine.of(model, train, settings), queries, ids, files)


def calc_img_wise(
    config: Mapping[str, Any] | None,
    model: nn.Module,
    train_loader: Any = None,
    test_loader: Any = None,
    *,
    loss_fn: Any = None,
    params: Any = None,
    generator: torch.Generator | None = None,
    progress: Any = None,
) -> InfluenceResult:
    r"""Influence of every training example on test examples, some test examples at a time.

    `influence[i] = (1/N) s_test . grad L(z_i)`, with `s_test = (H + damp * scale)^-1 grad L(z_test)`: the predicted
    *increase of the test loss* if training example i were removed and the model retrained. Positive = helpful.

    Args:
        config: `get_default_config()`, or a plain dictionary with some of its keys; see `Config`.
        model: the trained model; left as it was.
        train_loader, test_loader: loaders, datasets or tensors `(x, y)`; by default the config's. Indices are positions
            in the *dataset*: samplers and shuffling play no part.
        loss_fn: the training loss (an objective, a `torch.nn` loss or `callable(outputs, targets)`), by default cross
            entropy.
        params: names, globs, modules or a predicate; by default everything trainable.
        generator: where the seed is drawn from, by default `config["seed"]`.
        progress: overrides `config["progress"]`.

    Returns:
        `InfluenceResult`: unpacks into `influences, harmful, helpful`. The influences are also written to `outdir`.

    Raises:
        SolveFailed: the recursion diverges; the message names a scale that works.
        InvalidInput, NonFinite, UnknownName: in one sentence.

    Reference: Koh & Liang (2017), "Understanding Black-box Predictions via Influence Functions".
    """
    extras = {"loss_fn": loss_fn, "params": params, "generator": generator, "progress": progress}
    with _open_run(config, model, train_loader, test_loader, extras) as run:
        return _calculate_at_once(run) if run.config["solver"] == "auto" else _calculate_one_by_one(run)


def _calculate_one_by_one(run: _ClassicRun) -> InfluenceResult:
    influences: dict[str, dict[str, Any]] = {}
    parts: list[Scores] = []
    timer = _WriteTimer()
    results = _run_here(run) if run.config["num_workers"] == 1 else _run_in_workers(run)
    items = track(zip(run.ids, results, strict=True), len(run.ids), "test items")
    for k, (i, (values, label, seconds)) in enumerate(items):
        parts.append(run.scores(values, [i], [label]))
        influences[str(i)] = result_entry(parts[-1], 0, label, seconds, run.list_length)
        if k + 1 < len(run.ids) and (run.config["keep_tmp"] or timer.due):
            timer.time(partial(run.files.partial, influences, k))
    path = run.files.result(influences)
    values = torch.cat([s.values for s in parts])
    return InfluenceResult.of(influences, run.scores(values, run.ids, [e["label"] for e in influences.values()]), path)


_ItemResult = tuple[Tensor, Any, float]


def _calculate_items(run: _ClassicRun, ids: list[int]) -> list[_ItemResult]:
    """Influences [1, N], label and seconds of each of some test items, which share their mini-batches."""
    start = time.perf_counter()
    query = run.engine.gradients(run.test, ids)
    solved = run.engine.s_test(query.rows)
    if run.config["save_pth"] is not None:
        for i, vectors in zip(ids, run.engine.to_lists(solved), strict=True):
            save_vectors(vectors, run.s_test_path(i))
    values = run.engine.influence(solved)
    seconds = (time.perf_counter() - start) / len(ids)
    return [(values[k : k + 1], label, seconds) for k, label in enumerate(query.labels)]


def _run_here(run: _ClassicRun) -> Iterator[_ItemResult]:
    return (result for ids in run.engine.blocks(run.ids) for result in _calculate_items(run, ids))


# The run that workers calculate. A forked process inherits it, so nothing needs to be picklable.
_worker_run: _ClassicRun | None = None


def _run_in_worker(ids: list[int]) -> list[tuple[Any, Any, float]]:
    assert _worker_run is not None
    # A tensor would be sent through a shared file.
    return [(values.numpy(), label, seconds) for values, label, seconds in _calculate_items(_worker_run, ids)]


def _run_in_workers(run: _ClassicRun) -> Iterator[_ItemResult]:
    """The same items in several processes, in order; a result does not depend on the process that calculates it."""
    global _worker_run
    if "fork" not in multiprocessing.get_all_start_methods() or run.engine.problem.device.type != "cpu":
        raise InvalidInput(
            f"num_workers={run.config['num_workers']} needs a model on the CPU and a system that can fork; use "
            "num_workers=1 and split the run by test_sample_start_per_class."
        )
    _ = run.engine.attribution  # fitted once, before the processes are forked
    _worker_run = run
    try:
        with multiprocessing.get_context("fork").Pool(run.config["num_workers"], torch.set_num_threads, (1,)) as pool:
            for results in pool.imap(_run_in_worker, run.engine.blocks(run.ids, run.config["num_workers"])):
                for values, label, seconds in results:
                    yield torch.from_numpy(values), label, seconds
    finally:
        _worker_run = None


class _WriteTimer:
    """Says when a growing file may be written again, so that writing takes only a share of the time."""

    def __init__(self) -> None:
        self._took, self._ended = 0.0, time.perf_counter()

    @property
    def due(self) -> bool:
        return (time.perf_counter() - self._ended) * _WRITING_SHARE >= self._took

    def time(self, write: Callable[[], Any]) -> None:
        start = time.perf_counter()
        write()
        self._ended = time.perf_counter()
        self._took = self._ended - start


def _calculate_at_once(run: _ClassicRun) -> InfluenceResult:
    start = time.perf_counter()
    scores = run.engine.score_automatically(run.test, run.ids)
    seconds = (time.perf_counter() - start) / len(run.ids)
    log.info("solver 'auto': %s", scores.diagnostics.method)
    labels = [None] * len(run.ids) if scores.query_labels is None else [x for x in scores.query_labels]
    scores = run.scores(scores.values, run.ids, labels)
    influences = {str(i): result_entry(scores, q, labels[q], seconds, run.list_length) for q, i in enumerate(run.ids)}
    return InfluenceResult.of(influences, scores, run.files.result(influences))


def calc_all_grad_then_test(
    config: Mapping[str, Any] | None,
    model: nn.Module,
    train_loader: Any = None,
    test_loader: Any = None,
    *,
    loss_fn: Any = None,
    params: Any = None,
    generator: torch.Generator | None = None,
    progress: Any = None,
) -> InfluenceResult:
    """The same influences as `calc_img_wise` by way of the disk: all training gradients, all s_test, then products.

    The gradients are kept in an index, the folder `index` under `save_pth`, by default `outdir`: exactly, as the inputs
    of layers and the gradients at their outputs, which for perceptrons and heads take a hundredth of what gradients do.
    An interrupted run goes on there, and a later one with other test items computes no gradient again; of another
    model, loss or other data they are computed anew. `ptif.Index.open` opens it too. Each gradient is also written to
    a file of the model's size, `grad_z/0.grad_z` and so on; `config["grad_z_files"] = False` leaves these out, and
    `load_grad_z` then reads the folder `index`.

    Arguments, returned value and errors as in `calc_img_wise`. `config["solver"]` must be "lissa": it is the one that
    makes s_test vectors. The results are written to `influence_results.json`.

    Args:
        config, model, train_loader, test_loader: as in `calc_img_wise`.
        loss_fn, params, generator, progress: as in `calc_img_wise`.
    """
    extras = {"loss_fn": loss_fn, "params": params, "generator": generator, "progress": progress}
    with _open_run(config, model, train_loader, test_loader, extras) as run:
        if run.config["solver"] != "lissa":
            raise InvalidInput(
                "calc_all_grad_then_test stores s_test vectors, which config['solver']='auto' does not always make; "
                "use 'lissa', or calc_img_wise."
            )
        _ = run.engine.attribution  # how it takes gradients holds for all of them
        stored = index_gradients(run.engine, run.folder / "index")
        if run.config["grad_z_files"]:
            write_gradient_files(stored, run.folder / "grad_z", run.config["grad_z_pattern"])
        labels, seconds = [], []
        for ids in track(run.engine.blocks(run.ids), len(run.ids), "s_test", len):
            start = time.perf_counter()
            query = run.engine.gradients(run.test, ids)
            solved = run.engine.to_lists(run.engine.s_test(query.rows))
            for i, vectors in zip(ids, solved, strict=True):
                save_vectors(vectors, run.s_test_path(i))
            labels += query.labels
            seconds += [(time.perf_counter() - start) / len(ids)] * len(ids)
        start = time.perf_counter()
        values = indexed_products(run.engine, stored, StoredVectors(tuple(run.s_test_path(i) for i in run.ids)))
        share = (time.perf_counter() - start) / len(run.ids)
        scores = run.scores(values, run.ids, labels)
        influences = {
            str(i): result_entry(scores, q, labels[q], seconds[q] + share, run.list_length)
            for q, i in enumerate(run.ids)
        }
        return InfluenceResult.of(influences, scores, run.files.result(influences, all_at_once=True))


def calc_influences(
    config: Mapping[str, Any] | None, model: nn.Module, train_loader: Any = None, test_loader: Any = None, **extras: Any
) -> InfluenceResult:
    """Run the mode that `config["calc_method"]` names.

    Args:
        config, model, train_loader, test_loader: as in `calc_img_wise`.
        extras: the keyword arguments of `calc_img_wise`.
    """
    img_wise = Config.of(config)["calc_method"] == "img_wise"
    return (calc_img_wise if img_wise else calc_all_grad_then_test)(config, model, train_loader, test_loader, **extras)
