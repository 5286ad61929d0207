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
from .config import Config, Number
from .console import log, logged_to
from .engine import ClassicSettings, Engine, calculation, make_source
from .files import GRAD_Z, S_TEST, ResultFiles, StoredVectors, Vectors, load_grad_z, save_vectors, vector_file_name
from .results import InfluenceResult, result_entry
from .selection import choose_test_ids

# How many numbers of stored gradients, and of s_test vectors, are in memory at once.
_NUMBERS_AT_ONCE = 1 << 26
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
        ids = choose_test_ids(queries, c["test_sample_num"], c["test_sample_start_per_class"], c["num_classes"])
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
    r"""Influence of every training example on test examples, one test example after the other.

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


def _calculate_item(run: _ClassicRun, i: int) -> _ItemResult:
    """Influences [1, N], label and seconds of one test item."""
    start = time.perf_counter()
    query = run.engine.gradients(run.test, [i])
    solved = run.engine.s_test(query.rows)
    if run.config["save_pth"] is not None:
        save_vectors(run.engine.to_lists(solved)[0], run.s_test_path(i))
    return run.engine.influence(solved), query.labels[0], time.perf_counter() - start


def _run_here(run: _ClassicRun) -> Iterator[_ItemResult]:
    return (_calculate_item(run, i) for i in run.ids)


# The run that workers calculate. A forked process inherits it, so nothing needs to be picklable.
_worker_run: _ClassicRun | None = None


def _run_in_worker(i: int) -> tuple[Any, Any, float]:
    assert _worker_run is not None
    values, label, seconds = _calculate_item(_worker_run, i)
    return values.numpy(), label, seconds  # a tensor would be sent through a shared file


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
            for values, label, seconds in pool.imap(_run_in_worker, run.ids):
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

    It writes a file of the model's size per training example under `save_pth`, by default `outdir`. That is worth the
    space if gradients are slower to compute than to read. Arguments, returned value and errors as in `calc_img_wise`.
    `config["solver"]` must be "lissa": it is the one that makes s_test vectors. The results are written to
    `influence_results.json`.
    """
    extras = {"loss_fn": loss_fn, "params": params, "generator": generator, "progress": progress}
    with _open_run(config, model, train_loader, test_loader, extras) as run:
        if run.config["solver"] != "lissa":
            raise InvalidInput(
                "calc_all_grad_then_test stores s_test vectors, which config['solver']='auto' does not always make; "
                "use 'lissa', or calc_img_wise."
            )
        pattern = run.config["grad_z_pattern"]
        _store_gradients(run.engine, run.folder / "grad_z", pattern, range(len(run.engine)))
        labels, seconds = [], []
        for i in track(run.ids, len(run.ids), "s_test"):
            start = time.perf_counter()
            query = run.engine.gradients(run.test, [i])
            save_vectors(run.engine.to_lists(run.engine.s_test(query.rows))[0], run.s_test_path(i))
            labels.append(query.labels[0])
            seconds.append(time.perf_counter() - start)
        start = time.perf_counter()
        gradients = load_grad_z(run.folder / "grad_z", len(run.engine), pattern=pattern)
        values = inner_products(gradients, StoredVectors(tuple(run.s_test_path(i) for i in run.ids)))
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
    """Run the mode that `config["calc_method"]` names."""
    img_wise = Config.of(config)["calc_method"] == "img_wise"
    return (calc_img_wise if img_wise else calc_all_grad_then_test)(config, model, train_loader, test_loader, **extras)


# --------------------------------------------------------------------------- vectors


def _flat(vectors: Sequence[Tensor]) -> Tensor:
    return torch.cat([v.detach().reshape(-1) for v in vectors])


def inner_products(gradients: Sequence[Sequence[Tensor]], solved: Sequence[Sequence[Tensor]]) -> Tensor:
    """(1/N) <s_test, gradient>, [queries, N], with a bounded number of vectors in memory at once."""
    n, size = len(gradients), max(1, _flat(gradients[0]).numel())
    count = max(1, _NUMBERS_AT_ONCE // size)
    rows = []
    for start in range(0, len(solved), count):
        block = torch.stack([_flat(s) for s in solved[start : start + count]])
        parts = [
            block @ torch.stack([_flat(g) for g in gradients[j : j + count]]).to(block).T for j in range(0, n, count)
        ]
        rows.append(torch.cat(parts, 1) / n)
    return torch.cat(rows)


def _store_gradients(engine: Engine, folder: Path, pattern: str, ids: Sequence[int]) -> StoredVectors:
    paths = []
    for slab in engine.derivatives.stream(ids=torch.tensor(list(ids)), label="training gradients"):
        for i, vectors in zip(slab.ids.tolist(), engine.to_lists(slab.rows), strict=True):
            paths.append(folder / vector_file_name(pattern, i))
            save_vectors(vectors, paths[-1])
    return StoredVectors(tuple(paths))


def calc_grad_z(
    model: nn.Module,
    train_loader: Any,
    save_pth: Any = False,
    gpu: int = -1,
    start: int = 0,
    *,
    loss_fn: Any = None,
    params: Any = None,
    progress: Any = None,
    pattern: str = GRAD_Z,
) -> tuple[Sequence[Vectors], Any]:
    """The gradient of every training item from `start` on, as lists of CPU tensors in parameter order.

    Args:
        save_pth: a folder to write them to as `{index}.grad_z`; the returned gradients are then read from it when used.
        gpu, loss_fn, params, progress: as in `calc_img_wise`.
        pattern: how the files are named.

    Returns:
        `(gradients, save_pth)`.
    """
    settings = ClassicSettings(gpu=gpu, loss_fn=loss_fn, params=params, progress=progress)
    with calculation(model, settings):
        engine = Engine.of(model, train_loader, settings)
        ids = _ids_from(start, len(engine))
        if save_pth:
            return _store_gradients(engine, Path(save_pth), pattern, ids), save_pth
        gradients: list[Vectors] = []
        for slab in engine.derivatives.stream(ids=torch.tensor(ids), label="training gradients"):
            gradients += engine.to_lists(slab.rows)
        return gradients, save_pth


def _ids_from(start: int, size: int) -> list[int]:
    first = int(start or 0)
    if not 0 <= first < size:
        raise InvalidInput(f"start={start} lies outside the data, whose items are 0 to {size - 1}.")
    return list(range(first, size))


def _make_settings(
    gpu: int, damp: Number, scale: Number, depth: int, r: int, extras: Mapping[str, Any]
) -> ClassicSettings:
    config = Config(gpu=gpu, damp=damp, scale=scale, recursion_depth=depth, r=r)
    return ClassicSettings.of(config, **extras)


def calc_s_test(
    model: nn.Module,
    test_loader: Any,
    train_loader: Any,
    save: Any = False,
    gpu: int = -1,
    damp: Number = 0.01,
    scale: Number = 25,
    recursion_depth: int = 5000,
    r: int = 1,
    start: int = 0,
    *,
    loss_fn: Any = None,
    params: Any = None,
    generator: torch.Generator | None = None,
    progress: Any = None,
    pattern: str = S_TEST,
) -> tuple[list[Vectors], Any]:
    """s_test of every test item from `start` on, each the mean over `r` runs.

    Args:
        save: a folder to also write them to, as `{index}_recdep{depth}_r{r}.s_test`.
        others: as in `s_test` and `calc_img_wise`.

    Returns:
        `(list of lists of tensors, save)`.
    """
    extras = {"loss_fn": loss_fn, "params": params, "generator": generator, "progress": progress}
    settings = _make_settings(gpu, damp, scale, recursion_depth, r, extras)
    with calculation(model, settings):
        engine, test = Engine.of(model, train_loader, settings), Source.of(test_loader)
        ids, solutions = _ids_from(start, len(test)), []
        _ = engine.attribution
        for i in track(ids, len(ids), "s_test"):
            solutions.append(engine.to_lists(engine.s_test(engine.gradients(test, [i]).rows))[0])
            if save:
                save_vectors(solutions[-1], Path(save) / vector_file_name(pattern, i, recursion_depth, r))
    return solutions, save


def calc_s_test_single(
    model: nn.Module,
    z_test: Any,
    t_test: Any,
    train_loader: Any,
    gpu: int = -1,
    damp: Number = 0.01,
    scale: Number = 25,
    recursion_depth: int = 5000,
    r: int = 1,
    **extras: Any,
) -> Vectors:
    """s_test of one collated batch, the mean over `r` runs with different mini-batches; `extras` as in `s_test`."""
    from .single import s_test

    return s_test(z_test, t_test, model, train_loader, gpu, damp, scale, recursion_depth, r=r, **extras)


def _rank(values: Tensor) -> tuple[list[float], list[int], list[int]]:
    scores = Scores(values[None])
    return values.tolist(), scores.harmful_order(0).tolist(), scores.helpful_order(0).tolist()


def calc_influence_function(
    train_dataset_size: int,
    grad_z_vecs: Sequence[Sequence[Tensor]] | None = None,
    e_s_test: Sequence[Tensor] | None = None,
    *,
    s_test_dir: str = "s_test",
    grad_z_dir: str = "grad_z",
    s_test_id: int = 0,
) -> tuple[list[float], list[int], list[int]]:
    """Influences from vectors: `(1/N) <e_s_test, grad_z_i>`, positive = helpful.

    Args:
        train_dataset_size: N, which must be the number of gradients.
        grad_z_vecs: training gradients; read from `grad_z_dir` if not given.
        e_s_test: one s_test; that of test item `s_test_id` is read from `s_test_dir` if not given.

    Returns:
        `(influences, harmful, helpful)`: values in training order, and all indices in ascending and descending order.

    Raises:
        InvalidInput: another number of gradients, or vectors of different sizes.
    """
    from .files import load_s_test

    gradients = load_grad_z(grad_z_dir, train_dataset_size) if grad_z_vecs is None else grad_z_vecs
    solved = load_s_test(s_test_dir, s_test_id)[0] if e_s_test is None else e_s_test
    if len(gradients) != train_dataset_size:
        raise InvalidInput(f"There are {len(gradients)} gradients for {train_dataset_size} training examples.")
    shapes, expected = [tuple(g.shape) for g in gradients[0]], [tuple(s.shape) for s in solved]
    if shapes != expected:
        raise InvalidInput(f"The gradients have shapes {shapes} and the s_test {expected}; they must be of one model.")
    return _rank(inner_products(gradients, [solved])[0])


def calc_influence_single(
    model: nn.Module,
    train_loader: Any,
    test_loader: Any,
    test_id_num: int,
    gpu: int = -1,
    recursion_depth: int = 5000,
    r: int = 1,
    s_test_vec: Sequence[Tensor] | None = None,
    time_logging: bool = False,
    damp: Number = 0.01,
    scale: Number = 25,
    *,
    loss_fn: Any = None,
    params: Any = None,
    generator: torch.Generator | None = None,
    progress: Any = None,
) -> tuple[list[float], list[int], list[int], int]:
    """Influences on one test item, whose s_test is computed unless it is given.

    Returns:
        `(influences, harmful, helpful, test_id_num)`; positive = helpful.
    """
    extras = {"loss_fn": loss_fn, "params": params, "generator": generator, "progress": progress}
    settings = _make_settings(gpu, damp, scale, recursion_depth, r, extras)
    with calculation(model, settings):
        start = time.perf_counter()
        engine = Engine.of(model, train_loader, settings)
        if s_test_vec is not None:
            solved = engine.from_list(s_test_vec)
        else:
            solved = engine.s_test(engine.gradients(Source.of(test_loader), [test_id_num]).rows)
        values = engine.influence(solved)[0]
        if time_logging:
            log.info("Influences on test item %d took %.3f s.", test_id_num, time.perf_counter() - start)
    return (*_rank(values), test_id_num)
