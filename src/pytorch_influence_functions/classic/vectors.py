"""The pieces of the original `calc_influence_function` module: gradients, s_test vectors, and their products."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..core.distributed import World
from ..core.errors import InvalidInput
from ..core.progress import track
from ..problem.data import Source
from ..scores.scores import Scores
from .config import Config, Number
from .console import log
from .engine import ClassicSettings, Engine, calculation
from .files import (
    GRAD_Z,
    S_TEST,
    StoredVectors,
    Vectors,
    load_grad_z,
    load_s_test,
    save_vectors,
    vector_file_name,
)

# How many numbers of stored gradients, and of s_test vectors, are in memory at once.
_NUMBERS_AT_ONCE = 1 << 26


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


def store_gradients(engine: Engine, folder: Path, pattern: str, ids: Sequence[int]) -> StoredVectors:
    """Write the gradients of training items, one file each."""
    paths = []
    for slab in engine.derivatives.stream(ids=torch.tensor(list(ids)), label="training gradients", world=World()):
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
        model, train_loader: as in `calc_img_wise`.
        start: the first training item.

    Returns:
        `(gradients, save_pth)`.
    """
    settings = ClassicSettings(gpu=gpu, loss_fn=loss_fn, params=params, progress=progress)
    with calculation(model, settings):
        engine = Engine.of(model, train_loader, settings)
        ids = _ids_from(start, len(engine))
        if save_pth:
            return store_gradients(engine, Path(save_pth), pattern, ids), save_pth
        gradients: list[Vectors] = []
        for slab in engine.derivatives.stream(ids=torch.tensor(ids), label="training gradients", world=World()):
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
        model, test_loader, train_loader: as in `calc_img_wise`.
        gpu, damp, scale, recursion_depth, r: as in the config.
        start: the first test item.
        loss_fn, params, generator, progress: as in `calc_img_wise`.
        pattern: how the files are named.

    Returns:
        `(list of lists of tensors, save)`.
    """
    extras = {"loss_fn": loss_fn, "params": params, "generator": generator, "progress": progress}
    settings = _make_settings(gpu, damp, scale, recursion_depth, r, extras)
    with calculation(model, settings):
        engine, test = Engine.of(model, train_loader, settings), Source.of(test_loader).whole
        ids = _ids_from(start, len(test))
        solutions: list[Vectors] = []
        _ = engine.attribution
        for block in track(engine.blocks(ids), len(ids), "s_test", len):
            solved = engine.to_lists(engine.s_test(engine.gradients(test, block).rows))
            for i, vectors in zip(block, solved, strict=True):
                if save:
                    save_vectors(vectors, Path(save) / vector_file_name(pattern, i, recursion_depth, r))
            solutions += solved
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
    """s_test of one collated batch, the mean over `r` runs with different mini-batches; `extras` as in `s_test`.

    Args:
        model: the trained model; left as it was.
        z_test, t_test: a collated batch; of several examples the mean loss is taken.
        train_loader: the training data; its batch size is that of the mini-batches.
        gpu, damp, scale, recursion_depth: as in the config.
        r: how many runs are averaged.
        extras: keyword arguments of `s_test`.
    """
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
        s_test_dir: the folder that `calc_s_test` wrote to.
        grad_z_dir: the folder that `calc_grad_z` wrote to.
        s_test_id: which test item's s_test is read.

    Returns:
        `(influences, harmful, helpful)`: values in training order, and all indices in ascending and descending order.

    Raises:
        InvalidInput: another number of gradients, or vectors of different sizes.
    """
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

    Args:
        model, train_loader, test_loader: as in `calc_img_wise`.
        test_id_num: which test item.
        gpu, recursion_depth, r, damp, scale: as in the config.
        s_test_vec: the item's s_test; `None`: it is computed.
        time_logging: log how long it took.
        loss_fn, params, generator, progress: as in `calc_img_wise`.

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
            solved = engine.s_test(engine.gradients(Source.of(test_loader).whole, [test_id_num]).rows)
        values = engine.influence(solved)[0]
        if time_logging:
            log.info("Influences on test item %d took %.3f s.", test_id_num, time.perf_counter() - start)
    return (*_rank(values), test_id_num)
