"""What every stored result depends on: the weights, the code of the model and what it computes, and the data."""

from __future__ import annotations

import functools
import hashlib
import random
import types
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any, Final, final

import numpy as np
import torch
from torch import Tensor, nn

from ..core.batches import Collated
from ..core.cut_up import cut_modules, whole
from ..core.digest import digest, tensor_bytes
from ..core.distributed import World
from ..core.fingerprint import Probe
from ..core.indexing import spread_sample
from ..core.progress import track
from .checkpoints import Checkpoint, at_checkpoint, named_tensors
from .data import IdsLike, Source
from .problem import Problem, sweep
from .random_state import same_rng

WEIGHTS, CODE, OUTPUTS = "weights", "model code", "model outputs"
_PROBES: Final = 3
_DIRECTIONS: Final = 3
_PERIOD: Final = 65_521  # a prime, so that rows of a layer do not meet the same numbers
# A parameter whose gradient is this much smaller than that of all is judged by the latter: its own may be rounding.
_SMALLEST_SHARE: Final = 0.1


@contextmanager
def seeded() -> Iterator[None]:
    """Random generators start from 0 and are put back afterwards: what draws from them draws the same in every run."""
    with same_rng():
        random.seed(0)
        np.random.seed(0)
        torch.manual_seed(0)
        yield


# --------------------------------------------------------------------------- model


def describe_model(
    problem: Problem, checkpoints: Sequence[Checkpoint | None] = ()
) -> tuple[dict[str, Any], dict[str, Probe]]:
    """The ingredients of a fingerprint that come from the model: digests of weights and code, and a probe.

    The probe is the outputs of three training examples and the derivative of a fixed combination of them with respect
    to every parameter, at each checkpoint, in eval mode. It notices what the code does not show: settings kept in the
    model's attributes, a replaced function, another version of an extension. Cost: three examples forward and backward
    per checkpoint.

    Args:
        problem: whose model and training data are used.
        checkpoints: at which weights; `None` stands for the model's own. None given: the problem's, or the model's own.
    """
    weights: list[str] = []
    numbers: list[tuple[float, float]] = []
    for checkpoint in checkpoints or problem.checkpoints or (None,):
        with nullcontext() if checkpoint is None else at_checkpoint(problem.model, checkpoint):
            weights.append(_digest_weights(problem.model))
            numbers += _probe(problem)
    dtype = problem.space.like(problem.model).dtype
    probe = Probe.of(numbers, rtol=torch.finfo(dtype).eps ** 0.5)
    return {WEIGHTS: weights, CODE: _code(problem.model)}, {OUTPUTS: probe}


def digest_model(problem: Problem) -> dict[str, Any]:
    """The ingredients of `describe_model` that need no data: the model's present weights, and its code."""
    return {WEIGHTS: [_digest_weights(problem.model)], CODE: _code(problem.model)}


def _digest_weights(model: nn.Module) -> str:
    tensors = named_tensors(model)
    if not cut_modules(model):
        return digest(tensors)
    return digest({name: digest(whole(tensor)) for name, tensor in tensors.items()})  # one at a time is gathered


def _code(model: nn.Module) -> list[Any]:
    """The classes of all modules by their place, and the functions that are kept in their attributes."""
    parts: list[Any] = []
    for name, module in model.named_modules():
        functions = [v for v in vars(module).values() if isinstance(v, (types.FunctionType, functools.partial))]
        parts.append((name, type(module), functions))
    return parts


def _probe(problem: Problem) -> list[tuple[float, float]]:
    """(value, size) pairs of a few examples at the model's present weights."""
    numbers: list[tuple[float, float]] = []
    together = replace(problem.data, batch_size=min(_PROBES, problem.batch_size))
    ids = spread_sample(len(problem), _PROBES)
    own = dict(problem.model.named_parameters(remove_duplicate=False))
    for _, batch in sweep(problem, together, ids, "looking at the model", World()):
        with seeded(), torch.inference_mode(False), torch.enable_grad():
            outputs = problem.objective.outputs(problem.model, batch)
            each = outputs.detach().reshape(len(outputs), -1)
            each = each.to(torch.promote_types(each.dtype, torch.float32))
            sizes = each.norm(dim=1).tolist()
            numbers += zip(sizes, sizes, strict=True)
            for k in range(_DIRECTIONS):
                numbers += zip((each @ _direction(each.shape[1], k, each)).tolist(), sizes, strict=True)
            if problem.is_cut_up:
                continue  # whose derivatives in the weights are in parts
            numbers += _derivatives(outputs, [own[name] for name in problem.space.names])
    return numbers


def _derivatives(outputs: Tensor, parameters: Sequence[Tensor]) -> list[tuple[float, float]]:
    """Of a fixed combination of all outputs, per parameter: one component and the size."""
    wanted = [p for p in parameters if p.requires_grad]
    if not outputs.requires_grad or not wanted:
        return []
    along = _direction(outputs.numel(), 0, outputs).reshape(outputs.shape)
    try:
        slopes: Sequence[Tensor | None] = torch.autograd.grad(outputs, wanted, along, allow_unused=True)
    except RuntimeError:  # it cannot be differentiated: whoever needs that says so in words
        return []
    components, sizes = [], []
    for parameter, slope in zip(wanted, slopes, strict=True):
        flat = torch.zeros_like(parameter) if slope is None else slope.detach()
        flat = flat.reshape(-1).to(torch.promote_types(flat.dtype, torch.float32))
        components.append(float(flat @ _direction(len(flat), 1, flat)))
        sizes.append(float(flat.norm()))
    whole = sum(size * size for size in sizes) ** 0.5
    rounding = [size + _SMALLEST_SHARE * whole for size in sizes]
    return [*zip(components, rounding, strict=True), *zip(sizes, rounding, strict=True)]


def _direction(n: int, k: int, like: Tensor) -> Tensor:
    """Fixed numbers between -1 and 1 without a pattern that a layer would share."""
    period = torch.cos(torch.arange(1, min(n, _PERIOD) + 1, dtype=torch.float64).square() * (k + 1.5)).to(like)
    return period if n <= _PERIOD else period.repeat(-(-n // _PERIOD))[:n]


# --------------------------------------------------------------------------- data


def digest_data(source: Source, ids: IdsLike = None, label: str = "reading the data") -> str:
    """A digest of the examples, as they are collated; each is read once. The batch size does not count.

    Random transforms draw from a fixed seed here. (Where a collate function pads a batch to its longest example, the
    padding and with it the batch size count.)
    """
    columns = _Columns()
    total = len(source) if ids is None else sum(map(len, source.plan(ids)))
    with seeded():
        for numbers, batch in track(source.batches(ids), total, label, lambda pair: len(pair[0]), "ex"):
            columns.absorb(numbers, len(numbers), "ids")
            if isinstance(batch, Collated):
                for e in range(len(numbers)):
                    columns.absorb(batch.part(slice(e, e + 1)).whole, 1)
                    columns.rows += 1
            else:
                columns.absorb(batch, len(numbers))
                columns.rows += len(numbers)
    return columns.digest


@final
@dataclass(eq=False)
class _Columns:
    """Batches read as columns that go on from one batch to the next."""

    rows: int = 0
    shapes: dict[str, str] = field(default_factory=dict)
    hashes: dict[str, Any] = field(default_factory=dict)

    def absorb(self, value: Any, n: int, where: str = "batch") -> None:
        """Add what a batch of `n` examples holds at one place."""
        if isinstance(value, Tensor):
            whole = value.ndim == 0 or len(value) != n
            shape = f"tensor {value.dtype} {tuple(value.shape if whole else value.shape[1:])} {whole}"
            self._add(where, shape, tensor_bytes(value))
        elif isinstance(value, Mapping):
            for key, member in value.items():
                self.absorb(member, n, f"{where}[{key!r}]")
        elif isinstance(value, (tuple, list)):
            plain = all(isinstance(member, (str, bytes, int, float, type(None))) for member in value)
            for position, member in enumerate(value):
                self._add(where, "words", digest(member).encode()) if plain else self.absorb(
                    member, n, f"{where}[{position}]"
                )
        else:
            self._add(where, "other", digest(value).encode())

    def _add(self, where: str, shape: str, content: Any) -> None:
        hashing = self.hashes.setdefault(where, hashlib.sha256())
        if self.shapes.get(where) != shape:
            hashing.update(f"from row {self.rows} on: {shape};".encode())
            self.shapes[where] = shape
        hashing.update(content)

    @property
    def digest(self) -> str:
        """Of all that was added."""
        return digest(self.rows, {where: hashing.hexdigest() for where, hashing in self.hashes.items()})
